"""Checkpoints: the formats of packed weights, who loads them, what is inside, publishing."""
