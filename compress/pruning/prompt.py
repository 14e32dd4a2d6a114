"""A prompt that is being pruned: which of its positions each decoder layer sees, and where.

Rows of a batch may keep different numbers of tokens, so every layer sees slots: `index` tells the
position in the unpruned prompt, `valid` whether there is a token at all. Tokens stay in order, and
lie at the end of their row (as `generate` needs it), or at its start if the batch is padded right.

    prompt = PrunedPrompt(mask, images)
    hidden = take(hidden, prompt.narrow(layer=9))
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.pruning.tower import VisualTokens


@dataclass
class PromptImage:
    """One image of a batch: its tokens, and those that are still there."""

    row: int
    positions: Tensor  # [n], of its placeholders in the row
    tokens: VisualTokens
    alive: Tensor = field(init=False)  # [m], indices into `tokens`, rising
    kept: list[tuple[int, int]] = field(default_factory=list)  # (layer, count) of each stage
    merged: Tensor | None = None  # indices into `tokens` of those that hold a mean of others
    at_least: bool = False  # a stage kept more than its share: one token, or the protected ones
    not_recycled: bool = False  # more cells than tokens that may stay

    def __post_init__(self) -> None:
        self.alive = torch.arange(len(self.tokens), device=self.positions.device)

    def kept_at(self, layer: int) -> int:
        """Tokens that decoder layer `layer` sees."""
        return next((n for start, n in reversed(self.kept) if start <= layer), len(self.tokens))


@dataclass(frozen=True)
class View:
    """What the decoder layers from `layer` on see."""

    layer: int
    index: Tensor  # [B, S], position in the unpruned prompt, each at most once
    valid: Tensor  # [B, S] bool


class PrunedPrompt:
    """State of one batch from its prefill to its last decoding step."""

    def __init__(self, mask: Tensor, images: list[PromptImage]):
        """`mask` [B, L] bool: the tokens of the unpruned prompt that are no padding."""
        self.mask, self.images = mask, images
        batch, length = mask.shape
        positions = torch.arange(length, device=mask.device).expand(batch, length)
        self.views = [View(0, positions, mask)]
        self.align_right = bool(mask[:, -1].all())

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    def view(self, layer: int) -> View:
        """The view of decoder layer `layer`."""
        return next(view for view in reversed(self.views) if view.layer <= layer)

    def kept(self, layer: int) -> Tensor:
        """Positions of the unpruned prompt that decoder layer `layer` sees: [B, L] bool."""
        view = self.view(layer)
        return torch.zeros_like(self.mask).scatter(1, view.index, view.valid)

    def slots(self) -> Tensor:
        """Where each position lies in the latest view: [B, L], -1 if it is gone."""
        view = self.views[-1]
        numbers = torch.arange(view.index.shape[1], device=view.index.device).expand_as(view.index)
        found = torch.full_like(self.mask, -1, dtype=torch.long)
        return found.scatter(1, view.index, numbers.masked_fill(~view.valid, -1))

    def narrow(self, layer: int) -> Tensor | None:
        """Opens the view from `layer` on, without the image tokens that are no longer alive.

        Returns the slots of the view before that the new one is made of [B, S'], or None if no
        token goes: then nothing changes.
        """
        before = self.views[-1]
        stays = self.mask.clone()
        for image in self.images:
            stays[image.row, image.positions] = False
            stays[image.row, image.positions[image.alive]] = True
        keep = before.valid & stays.gather(1, before.index)
        if torch.equal(keep, before.valid):
            return None
        order = compact(keep, self.align_right)
        view = View(layer, before.index.gather(1, order), keep.gather(1, order))
        if layer == before.layer:
            self.views.pop()
        self.views.append(view)
        return order


def compact(keep: Tensor, align_right: bool) -> Tensor:
    """Slots [B, n] that hold each row's kept ones in order, n the most of a row.

    Shorter rows are filled with slots that are not kept, at the side that `align_right` leaves.
    """
    most = int(keep.sum(dim=1).max())
    order = keep.int().argsort(dim=1, descending=not align_right, stable=True)
    return order[:, keep.shape[1] - most :] if align_right else order[:, :most]


def take(x: Tensor, order: Tensor) -> Tensor:
    """x [B or 1, S, ...] at the slots `order` [B, n]: [B, n, ...]."""
    x = x.expand(order.shape[0], *x.shape[1:])
    index = order.view(*order.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def take_positions(positions: Tensor, order: Tensor) -> Tensor:
    """Position ids [B or 1, S] or, for M-RoPE, [rows, B, S] at the slots `order`."""
    if positions.ndim == 2:
        return take(positions, order)
    return torch.stack([take(row, order) for row in positions])
