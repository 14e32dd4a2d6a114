"""Quantisation: from one layer's weights and what they read to integer codes."""
