"""Importance: which tokens decide the rounding (`tokens`), which layers need bits (`layers`)."""
