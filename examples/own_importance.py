"""A token importance of your own: register a class, name it in a recipe.

python examples/own_importance.py [OUTPUT]
"""

import sys

from torch import Tensor

import compress
from compress.importance.tokens import LayerContext
from compress.registry import TOKEN_IMPORTANCE


@TOKEN_IMPORTANCE.register("early_tokens")
class EarlyTokens:
    """The earlier a token, the more it matters."""

    def score(self, context: LayerContext) -> Tensor:
        """[B, T], higher = more important."""
        return -context.mask.cumsum(-1).float()


def main(output: str = "outputs/example-own-importance") -> float:
    """How many tokens of a window carry the weight, averaged over layers."""
    recipe = compress.Recipe.load(
        "demo-lm",
        overrides=[
            "quantize.token_importance=early_tokens",
            "calibration.samples=4",
            "calibration.length=64",
            "evaluate=null",
        ],
    )
    result = compress.run(recipe, output, overwrite=True, self_check=False)
    sizes = [
        facts["effective_sample_size"] for facts in result.layers if facts["layer"] is not None
    ]
    return sum(sizes) / len(sizes)


if __name__ == "__main__":
    print(f"{main(*sys.argv[1:]):.1f} of 64 tokens")
