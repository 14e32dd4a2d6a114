"""Recipes for tiny multimodal checkpoints: per default nothing is rotated, quantised or pruned."""

from compress.recipe.recipe import Recipe

BITS = {"bits": 8, "group_size": "channel", "token_importance": "uniform"}
HALF = {"keep": 0.5, "stages": [0, 2], "strategy": {"voter_threshold": 1.1}}


def recipe_of(folder, **sections):
    sections = {"rotate": "none", "quantize": {"method": "none"}} | sections
    data = {"calibration": {"length": 64}} | sections
    return Recipe.from_dict({"model": str(folder)} | data)


def images(dataset, **more):
    return {"dataset": str(dataset), "samples": 3, "length": 64} | more
