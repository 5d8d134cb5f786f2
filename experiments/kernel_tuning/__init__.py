"""Tuning and compiling the kernels: the search, what is compiled for which GPUs, and what the compiler made of it."""
