"""How fast models train and decode: what is measured, and sweeps of such measurements."""
