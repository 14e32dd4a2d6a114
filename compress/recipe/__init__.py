"""The recipe: what it may say, and where each value stands in its file."""
