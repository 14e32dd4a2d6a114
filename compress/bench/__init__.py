"""Benchmarks: kernels, quantising, whole models, pruning."""
