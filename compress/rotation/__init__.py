"""Rotations: Hadamard matrices of every even size, norm fusion, rotating a decoder layer."""
