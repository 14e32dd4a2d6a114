"""The first calibration tokens with what they weigh in a few layers: a picture for the report.

Each of three layers, early, middle and late, keeps the weights of the first window's first tokens
among its facts, and modelpress.json has these tokens as text, once:

    layers[k].token_weights      [n], mean one over the whole window
    token_sample.tokens          [n] pieces of text that make up the text together

That text is an excerpt of the calibration data. What is pushed to a hub quotes only corpora that
anybody has (`may_be_quoted`).

    token_sample(data, tokenizer, layers)     # {"tokens": ["import", " os", ...]}
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compress.data.prompts import CalibrationData
from compress.data.text import DATASETS
from compress.data.windows import CalibrationWindows
from compress.errors import UsageError
from compress.models.skeleton import Skeleton

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

LENGTH = 128  # tokens
CUT = "\ufffd"  # what decoders make of a character whose bytes are not all there


def layers_shown(count: int) -> set[int]:
    """Of so many layers an early, a middle and a late one."""
    early = count // 6
    return {early, count // 2, count - 1 - early}


def weights_shown(w: Tensor) -> list[float]:
    """Of the weights [B, T] of a batch those of the sample, to three digits."""
    return [float(f"{value:.3g}") for value in w[0, :LENGTH].tolist()]


def token_sample(
    data: CalibrationData, skeleton: Skeleton, layers: Sequence[Mapping[str, Any]]
) -> dict[str, list[str]] | None:
    """The sample's tokens as text; None where no layer has weights of them, or nobody can tell."""
    shown = max((len(layer.get("token_weights", ())) for layer in layers), default=0)
    if not shown or not isinstance(data, CalibrationWindows):
        return None
    try:
        tokenizer = skeleton.tokenizer()
    except UsageError:  # windows of the caller's own need none
        return None
    return {"tokens": pieces(tokenizer, data.input_ids[0, :shown].tolist())}


def pieces(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, so that the pieces together are the text.

    Of the tokens of one character the last has all of it, the others nothing.
    """
    found: list[str] = []
    before = ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        whole = text.rstrip(CUT) if end < len(ids) else text
        new = len(whole) > len(before) and whole.startswith(before)
        found.append(whole[len(before) :] if new else "")
        before = whole if new else before
    return found


def may_be_quoted(recipe: Mapping[str, Any]) -> bool:
    """Whether the recipe's calibration text is one that anybody has."""
    return (recipe.get("calibration") or {}).get("dataset") in DATASETS
