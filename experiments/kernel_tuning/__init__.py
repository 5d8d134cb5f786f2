"""Tuning and compiling the kernels: the search, the programs for each GPU, and the resources that they take."""
