"""The Hugging Face bridge beside the library that it reads and writes for."""
