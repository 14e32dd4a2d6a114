"""Local lm-eval tasks: one folder each."""
