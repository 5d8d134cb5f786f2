"""The families of flash-linear-attention 0.6: their configs, and their tensors."""
