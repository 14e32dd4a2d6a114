"""Importance scores: which tokens of a sequence decide how a layer is rounded (`tokens`)."""
