"""Models: families, the model without its weights, vision towers."""
