"""Products on a CPU: packed weights, compiled loops."""
