"""Packed weight layouts and kernels. Depends on torch and triton only."""
