"""Shipped recipes (YAML) and the demo models with the scripts that trained them."""
