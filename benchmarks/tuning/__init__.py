"""Numerics and tiles of the kernels on a GPU."""
