"""Calibration data: text, windows of tokens, prompts with images, activations."""
