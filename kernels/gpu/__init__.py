"""Products on a GPU: Triton kernels, tiles, tuning."""
