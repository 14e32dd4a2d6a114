"""Bit widths for layers: scores, allocators, search."""
