"""Recycling: what is pruned leaves one token per grid cell behind.

A token at (row, column) of its grid lies in cell (floor(row / a), floor(column / a)). The pruned
tokens of a cell become one, their mean weighted by importance, at the place of the cell's most
important pruned token:

    v_cell = sum_i I_i v_i / sum_i I_i

A recycled token counts as kept, so the budget is met exactly: pruning one more token makes at most
one more cell non-empty, hence (kept + cells) takes every value between its smallest and N.
arXiv 2508.05211, section 3.2, equations 6 and 7. Nothing loops over cells.

    kept, places = keep_with_cells(importance, cells, count, protected)
"""

import torch
from torch import Tensor

from compress.errors import UsageError


def grid_cells(segment: Tensor, row: Tensor, column: Tensor, size: float) -> Tensor:
    """Cell number of each token, [n] int64, from 0; cells of two segments are never the same.

    `size` is the cell's side a in tokens, which need not be whole.
    """
    y, x = (row / size).floor().long(), (column / size).floor().long()
    columns, rows = int(x.max()) + 1, int(y.max()) + 1
    number = (segment * rows + y) * columns + x
    return torch.unique(number, return_inverse=True)[1]


def keep_with_cells(
    importance: Tensor, cells: Tensor, count: int, fixed: Tensor
) -> tuple[Tensor, Tensor]:
    """Which tokens stay as they are, so that they and the recycled ones are exactly `count`.

    Args:
        importance: [n]; the lowest go first, of equal ones the later.
        cells: [n] cell numbers of `grid_cells`.
        count: kept plus recycled tokens.
        fixed: [n] bool, tokens that are never pruned.

    Returns:
        kept [n] bool, and the places of the recycled tokens [cells] (each pruned cell's most
        important token; of equal ones the first), sorted.

    Raises:
        UsageError: even one token per cell is more than `count`.
    """
    n = importance.numel()
    order = importance.masked_fill(fixed, torch.inf).argsort(descending=True, stable=True).flip(0)
    order = order[: n - int(fixed.sum())]  # the first to go comes first
    new_cell = first_of_each(cells[order])
    left = n - torch.arange(1, len(order) + 1, device=order.device) + new_cell.cumsum(0)
    reached = (left == count).nonzero()
    if count < n and len(reached) == 0:
        least = int(left[-1]) if len(left) else n
        raise UsageError(
            f"one recycled token per cell leaves at least {least} of {n} visual tokens, the budget "
            f"is {count}: choose larger cells or a larger first ratio"
        )
    pruned = order[: int(reached[0]) + 1] if count < n else order[:0]
    kept = torch.ones(n, dtype=torch.bool, device=importance.device)
    kept[pruned] = False
    # Walking back, a cell's most important pruned token is the first that is met.
    back = pruned.flip(0)
    return kept, back[first_of_each(cells[back])].sort().values


def merge_cells(
    values: Tensor, importance: Tensor, cells: Tensor, kept: Tensor, places: Tensor
) -> Tensor:
    """The recycled tokens [cells, D] at `places`, in the dtype of `values` [n, D].

    Computed in fp32. A cell whose importances are all zero is averaged with equal weights.
    """
    pruned = ~kept
    target = torch.full((int(cells.max()) + 1,), -1, device=cells.device)
    target[cells[places]] = torch.arange(len(places), device=cells.device)
    to = target[cells[pruned]]
    weight = importance[pruned].float()
    # Relative to the cell's largest, so that sums of tiny importances keep their precision.
    weight = weight.clamp(min=torch.finfo(torch.float32).tiny)
    peak = weight.new_zeros(len(places)).scatter_reduce_(0, to, weight, "amax")
    weight = weight / peak[to]
    total = weight.new_zeros(len(places)).index_add_(0, to, weight)
    merged = torch.zeros(len(places), values.shape[1], device=values.device)
    merged.index_add_(0, to, weight[:, None] * values[pruned].float())
    return (merged / total[:, None]).to(values.dtype)


def first_of_each(labels: Tensor) -> Tensor:
    """Bool [n]: whether a label occurs here for the first time."""
    order = labels.argsort(stable=True)
    ordered = labels[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return torch.zeros_like(first).scatter_(0, order, first)
