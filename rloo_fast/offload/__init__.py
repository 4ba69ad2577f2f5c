"""Tensors of the trainer on the GPU in, the same tensors on the host out, and back again."""
