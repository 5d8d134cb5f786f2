"""The speed of training and decoding: single measurements, and sweeps of them."""
