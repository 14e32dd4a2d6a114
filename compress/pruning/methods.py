"""Which of an image's tokens stay: the interface of a pruning method, and VFlowOpt.

A method sees one image at one stage, its m tokens that are still there, and names the `count` that
stay; some of those may hold a mix of others. The baselines are in `compress.pruning.baselines`.

    selection = PRUNING_METHODS["vflowopt"](strategy).select(candidates, count)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.pruning.recycle import grid_cells, keep_with_cells, merge_cells
from compress.pruning.tower import VisualTokens
from compress.recipe.strategy import PruneStrategy
from compress.registry import Registry

# Of classes with the interface `PruningMethod`.
PRUNING_METHODS: Registry[Any] = Registry("pruning method")


@dataclass(frozen=True)
class Candidates:
    """The tokens of one image before a stage, in the order of the prompt."""

    features: Tensor  # [m, D], the hidden states that enter the stage's layer
    tokens: VisualTokens  # of the same m
    protected: Tensor  # [m] bool: these stay
    stage: int  # 0 for the first
    generator: torch.Generator  # on the CPU; the only source of chance
    language_attention: Tensor | None = None  # [m], from the prompt's last token, a layer before


Mix = Callable[[Tensor], Tensor]  # [m, D] -> [r, D]


@dataclass(frozen=True)
class Selection:
    """What stays: `kept` [count], rising; those at `merged` [r] get `values` [r, D].

    `mix` made those of the features [m, D], and makes the same of all else that the tokens have.
    `not_recycled`: the image has more cells than tokens may stay, so the rest of it is lost.
    """

    kept: Tensor
    merged: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    values: Tensor | None = None
    mix: Mix | None = None
    not_recycled: bool = False


class PruningMethod(Protocol):
    """A way to choose. `signals` are what it reads of the vision tower (`VisualTokens`)."""

    signals: ClassVar[frozenset[str]]

    def __init__(self, strategy: PruneStrategy): ...
    def select(self, candidates: Candidates, count: int) -> Selection: ...


def keep_highest(scores: Tensor, count: int, protected: Tensor) -> Tensor:
    """Indices [count] of the highest scores, rising; of equal scores the first; protected first.

    Raises UsageError if more tokens are protected than may stay.
    """
    check_protected(protected, count)
    order = scores.float().masked_fill(protected, torch.inf).argsort(descending=True, stable=True)
    return order[:count].sort().values


def check_protected(protected: Tensor, count: int) -> None:
    if int(protected.sum()) > count:
        raise UsageError(
            f"{int(protected.sum())} newline tokens of an image are protected, and only {count} "
            "tokens may stay: raise the ratios, or set protect_newlines to false"
        )


@PRUNING_METHODS.register("vflowopt")
class VisualFlow:
    """The most important by ViT attention and entropy; at stage 0 the rest is recycled.

    An image with more cells than tokens may stay is not recycled, and says so.

    The map is the same at every stage; a recycled token keeps the importance of its place.
    arXiv 2508.05211, section 3.2.
    """

    signals = frozenset({"importance"})

    def __init__(self, strategy: PruneStrategy):
        self.cell = strategy.cell

    def select(self, candidates: Candidates, count: int) -> Selection:
        tokens, protected = candidates.tokens, candidates.protected
        assert tokens.importance is not None
        if self.cell is None or candidates.stage > 0:
            return Selection(keep_highest(tokens.importance, count, protected))
        check_protected(protected, count)
        cells = grid_cells(tokens.segment, tokens.row, tokens.column, self.cell)
        if int(protected.sum()) + len(cells[~protected].unique()) > count:
            kept = keep_highest(tokens.importance, count, protected)
            return Selection(kept, not_recycled=True)
        kept, places = keep_with_cells(tokens.importance, cells, count, protected)
        importance, unmixed = tokens.importance, kept.clone()

        def mix(x: Tensor) -> Tensor:
            return merge_cells(x, importance, cells, unmixed, places)

        kept[places] = True
        return Selection(kept.nonzero()[:, 0], places, mix(candidates.features), mix)
