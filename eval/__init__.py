"""Modules of the toolkit that measure: they are handed models and know nothing of recipes."""
