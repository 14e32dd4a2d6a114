"""Checkpoints: reading, writing, checking, resuming, describing and publishing them.

files               files that are whole or not there
safetensors_io      tensors of a model folder, one at a time; shards
compressed_tensors  the packed layout, and its section of config.json
journal             what an unfinished run has done, so that it can continue
verify              reload a checkpoint in a fresh process and compare its logits
loading             a model that runs; what is inside a folder
card, hub           the model card; publishing
"""
