"""Checkpoints as models: `compress.load` and the quantiser of transformers."""
