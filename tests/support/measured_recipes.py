"""Recipes that are measured on the first tokens of a text."""

from compress.recipe.recipe import Recipe
from support.tiny_checkpoints import recipe_for

TOKENS, LENGTH = 300, 32


def recipe_of(model, text, name, evaluate=None, **quantize) -> Recipe:
    dataset = {"dataset": str(text), "length": LENGTH, "tokens": TOKENS}
    return recipe_for(
        model,
        text,
        name=name,
        rotate="hadamard",
        quantize=quantize,
        evaluate={"perplexity": dataset} | (evaluate or {}),
    )
