"""What calibrating cost each of several recipes, and whether that was the same for all.

A method that sees more tokens, or runs them through more models, has an advantage that is not its
own. Recipes that calibrate nothing have none to compare.

    for line in unequal(recipes, runs): print(line)
"""

from collections.abc import Sequence

from compress.comparison.study import Run
from compress.recipe.recipe import Recipe


def unequal(recipes: Sequence[Recipe], runs: Sequence[Run]) -> list[str]:
    """A line for recipes that were calibrated with unequal means; none for equal ones."""
    tokens: dict[str, list[int]] = {}
    for run in runs:
        if count := run.get("calibration_tokens"):
            tokens.setdefault(run["name"], []).append(count)
    passes = {recipe.name: _further_passes(recipe) for recipe in recipes if recipe.name in tokens}
    # Seeds draw other conversations, of other lengths: a recipe differs from itself then.
    if len({(max(tokens[name]), further) for name, further in passes.items()}) < 2:
        return []
    told = [f"{name} {_range(tokens[name])} tokens{further}" for name, further in passes.items()]
    return [f"unequal calibration: {'; '.join(told)}"]


def _further_passes(recipe: Recipe) -> str:
    """What runs the tokens through a model once more than quantising its layers does."""
    further = ""
    if recipe.quantize.target.name == "full_precision":
        further += ", twice: in the 16-bit model as well (quantize.target: full_precision)"
    if recipe.allocate is not None and recipe.allocate.reads_windows:
        further += f", and up to {recipe.allocate.samples} windows for its widths (allocate)"
    return further


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"
