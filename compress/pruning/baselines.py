"""What VFlowOpt is measured against, behind the same interface.

| method | keeps | source |
|---|---|---|
| random | a random subset | - |
| uniform | every n/count-th token in raster order | - |
| pooling | the mean of each block of a grid that has exactly `count` blocks | - |
| fastv | most attended by the prompt's last token in the layer before | arXiv 2403.06764 |
| pyramiddrop | the same, at several stages | arXiv 2410.17247 |
| visionzip | most attended by CLS, the rest merged by key similarity | arXiv 2412.04467 |
| divprune | a greedy max-min subset by cosine distance | arXiv 2503.02175 |

Differences from the papers: scores of FastV and PyramidDrop come from q and k of the layer before
the stage; VisionZip merges in the language model's embedding space, by plain mean, and uses
received attention where the tower has no CLS token.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from compress.pruning.methods import (
    PRUNING_METHODS,
    Candidates,
    Selection,
    check_protected,
    keep_highest,
)
from compress.pruning.recycle import first_of_each, merge_cells
from compress.recipe.strategy import PruneStrategy

# VisionZip's split of 64 tokens: 54 dominant, 10 contextual.
CONTEXTUAL_SHARE = 10 / 64


class _Baseline:
    signals: frozenset[str] = frozenset()

    def __init__(self, strategy: PruneStrategy):
        pass


@PRUNING_METHODS.register("random")
class Random(_Baseline):
    """A random subset."""

    def select(self, candidates: Candidates, count: int) -> Selection:
        protected = candidates.protected
        scores = torch.rand(len(protected), generator=candidates.generator)
        return Selection(keep_highest(scores.to(protected.device), count, protected))


@PRUNING_METHODS.register("uniform")
class Uniform(_Baseline):
    """Evenly spaced in raster order, the same distance from both ends."""

    def select(self, candidates: Candidates, count: int) -> Selection:
        protected = candidates.protected
        check_protected(protected, count)
        free = (~protected).nonzero()[:, 0]
        wanted = count - int(protected.sum())
        steps = (2 * torch.arange(wanted, device=free.device) + 1) * len(free)
        chosen = free[steps // (2 * max(wanted, 1))]
        return Selection(torch.cat([protected.nonzero()[:, 0], chosen]).sort().values)


@PRUNING_METHODS.register("pooling")
class AveragePooling(_Baseline):
    """Each grid is cut into blocks, each replaced by its mean, at the token nearest its middle."""

    def select(self, candidates: Candidates, count: int) -> Selection:
        tokens, protected = candidates.tokens, candidates.protected
        check_protected(protected, count)
        free = (~protected).nonzero()[:, 0]
        segment = tokens.segment[free]
        labels, sizes = segment.unique(return_counts=True)
        shares = share_out(count - int(protected.sum()), sizes.tolist())
        block = torch.full_like(free, -1)
        first = 0
        for label, share in zip(labels.tolist(), shares, strict=True):
            here = segment == label
            if share:
                row, column = tokens.row[free[here]], tokens.column[free[here]]
                block[here] = first + block_grid(row, column, share)
            first += share
        free, block = free[block >= 0], block[block >= 0]
        row, column = tokens.row[free].float(), tokens.column[free].float()
        distance = (row - _means(row, block)[block]).square()
        distance += (column - _means(column, block)[block]).square()
        order = distance.argsort(stable=True)
        places = order[first_of_each(block[order])].sort().values
        nothing = torch.zeros_like(block, dtype=torch.bool)

        def mix(x: Tensor) -> Tensor:
            return merge_cells(x[free], torch.ones_like(row), block, nothing, places)

        kept = torch.cat([protected.nonzero()[:, 0], free[places]]).sort().values
        return Selection(kept, free[places], mix(candidates.features), mix)


class _LanguageAttention(_Baseline):
    def select(self, candidates: Candidates, count: int) -> Selection:
        assert candidates.language_attention is not None
        return Selection(keep_highest(candidates.language_attention, count, candidates.protected))


@PRUNING_METHODS.register("fastv")
class FastV(_LanguageAttention):
    """Most attended by the prompt's last token, once, after the first layers."""


@PRUNING_METHODS.register("pyramiddrop")
class PyramidDrop(_LanguageAttention):
    """Most attended by the prompt's last token, at several stages."""


@PRUNING_METHODS.register("visionzip")
class VisionZip(_Baseline):
    """Dominant tokens by CLS attention; the others go to evenly spaced contextual ones."""

    signals = frozenset({"attention", "keys"})

    def select(self, candidates: Candidates, count: int) -> Selection:
        tokens, protected = candidates.tokens, candidates.protected
        assert tokens.attention is not None and tokens.keys is not None
        check_protected(protected, count)
        free = count - int(protected.sum())
        contextual = math.floor(free * CONTEXTUAL_SHARE + 0.5)
        dominant = keep_highest(tokens.attention, count - contextual, protected)
        if contextual == 0:
            return Selection(dominant)
        left = torch.ones_like(protected)
        left[dominant] = False
        rest = left.nonzero()[:, 0]
        steps = torch.arange(contextual, device=rest.device) * len(rest) // contextual
        targets = rest[steps]
        keys = normalize(tokens.keys.float(), dim=-1)
        group = (keys[rest] @ keys[targets].T).argmax(dim=1)
        group[steps] = torch.arange(contextual, device=rest.device)  # each target is its own
        alike, nothing = torch.ones(len(rest), device=rest.device), torch.zeros_like(rest).bool()

        def mix(x: Tensor) -> Tensor:
            return merge_cells(x[rest], alike, group, nothing, steps)

        kept = torch.cat([dominant, targets]).sort().values
        return Selection(kept, targets, mix(candidates.features), mix)


@PRUNING_METHODS.register("divprune")
class DivPrune(_Baseline):
    """Greedy max-min diversity: each next token is the farthest from all that were chosen.

    The first is the one farthest from its nearest neighbour. O(count * m) after the distances.
    """

    def select(self, candidates: Candidates, count: int) -> Selection:
        protected = candidates.protected
        check_protected(protected, count)
        unit = normalize(candidates.features.float(), dim=-1)
        chosen = protected.nonzero()[:, 0].tolist()
        distance = 1 - unit @ unit.T  # [m, m]
        if chosen:
            nearest = distance[chosen].min(dim=0).values
        else:
            nearest = distance.clone().fill_diagonal_(torch.inf).min(dim=0).values
        taken = protected.clone()
        while len(chosen) < count:
            best = int(nearest.masked_fill(taken, -torch.inf).argmax())
            nearest = torch.minimum(nearest, distance[best]) if chosen else distance[best].clone()
            chosen.append(best)
            taken[best] = True
        return Selection(torch.tensor(chosen, device=unit.device).sort().values)


def share_out(count: int, sizes: list[int]) -> list[int]:
    """`count` split in proportion to `sizes`, by largest remainder; of equal ones the first."""
    total = sum(sizes)
    shares = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(count * sizes[i] % total))
    for i in by_remainder[: count - sum(shares)]:
        shares[i] += 1
    return shares


def block_grid(row: Tensor, column: Tensor, blocks: int) -> Tensor:
    """Block number [n] of the tokens of a full grid, cut into exactly `blocks` non-empty blocks.

    Bands of rows, each cut into nearly the same number of columns, as square as that allows.
    """
    row, column = row - row.min(), column - column.min()  # newline tokens have one column, the last
    height, width = int(row.max()) + 1, int(column.max()) + 1
    bands = round(math.sqrt(blocks * height / width))
    bands = min(max(bands, -(-blocks // width), 1), height, blocks)
    band = row * bands // height
    first = band * blocks // bands
    columns = (band + 1) * blocks // bands - first  # of this token's band
    return first + column * columns // width


def _means(x: Tensor, group: Tensor) -> Tensor:
    """Mean of x [n] in each group, [groups]."""
    total = x.new_zeros(int(group.max()) + 1)
    return total.index_add(0, group, x) / total.index_add(0, group, torch.ones_like(x))
