"""Comparison of the Hugging Face bridge with flash-linear-attention, whose checkpoints it reads and writes."""
