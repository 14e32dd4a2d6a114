"""Coordinate descent on a layer's error, after the column loop, with closed-form scales.

The column loop never returns to a column. Given its levels x and scales s, the error

    f(Q) = tr(E H E^T),  E = W - Q,  Q = x s

is quadratic in each single weight: with G = H E (columns-first), the best value of column j, all
others kept, is Q_j + G_j / H_jj, so taking the nearest grid point never raises f. Before a group's
columns are swept, its scale moves by the exact minimiser of f for fixed levels,

    ds = <x, G> / <x, H x>

Blocks keep the work in matrix products: G of a block is one product with all of E, and the
changes within the block are followed by `rounding.py`. One sweep costs 2 N K^2 operations.

    refine(result, Wt, H, grid, group_size, sweeps=5)
"""

import torch
from torch import Tensor

from compress.quantization.gptq import BLOCK, QuantizedColumns
from compress.quantization.grid import UniformGrid
from compress.quantization.rounding import round_in_order

SETTLED = 5e-3  # on the layers tried, what further sweeps gain is under 1 % of the error


def refine(
    result: QuantizedColumns,
    Wt: Tensor,
    H: Tensor,
    grid: UniformGrid,
    group_size: int | None,
    sweeps: int,
    settled: float = SETTLED,
) -> list[int]:
    """Lowers tr(E H E^T) by `sweeps` passes over the columns, changing `result` in place.

    Args:
        result: levels and scales to start from.
        Wt: [K, N] the weights to represent.
        H: [K, K] symmetric, diagonal positive.
        settled: a sweep that changes no more than this share of the levels is the last.

    Returns:
        how many levels each sweep changed.
    """
    changed: list[int] = []
    if not sweeps:
        return changed
    E = Wt - result.dequantised()
    for _ in range(sweeps):
        if group_size is None:
            _refit_channel(result, Wt, H, grid, E)
        changed.append(_sweep(result, Wt, H, grid, group_size, E))
        if changed[-1] <= settled * Wt.numel():
            break
    if group_size is None:
        _refit_channel(result, Wt, H, grid, E)
    return changed


def _refit_channel(
    result: QuantizedColumns, Wt: Tensor, H: Tensor, grid: UniformGrid, E: Tensor
) -> None:
    """The best single scale of each row of W for its levels."""
    _refit(result, 0, grid, result.x, H @ result.x, E, swapped=True)
    torch.addcmul(Wt, result.x, result.scale[0], value=-1, out=E)


def _refit(
    result: QuantizedColumns,
    g: int,
    grid: UniformGrid,
    x: Tensor,
    Hx: Tensor,
    G: Tensor,
    swapped: bool,
) -> Tensor:
    """Moves the scale of group g to the minimiser of f; returns the step as stored, [N].

    <x, G> with G = H E may be given the other way round, as <H x, E> (`swapped`). Rows whose
    levels are all zero keep their scale, and so do those with zero points whose minimiser has the
    other sign: only symmetric grids have scales of either sign.
    """
    before = result.scale[g].clone()
    step = ((Hx if swapped else x) * G).sum(0) / (x * Hx).sum(0)
    after = grid.stored(before + torch.where(step.isfinite(), step, 0.0))
    result.scale[g] = after if grid.symmetric else torch.where(after < 0, before, after)
    return result.scale[g] - before


def _sweep(
    result: QuantizedColumns,
    Wt: Tensor,
    H: Tensor,
    grid: UniformGrid,
    group_size: int | None,
    E: Tensor,
) -> int:
    """One pass over all columns; E [K, N] is kept up to date. Returns how many levels changed."""
    K = H.shape[0]
    size = group_size or BLOCK
    moved = torch.zeros((), dtype=torch.int64, device=E.device)
    for start in range(0, K, size):
        inside = slice(start, min(start + size, K))
        x, H_block = result.x[inside], H[inside, inside]
        G = H[inside] @ E  # [B, N]
        g = 0
        if group_size is not None:
            g = start // group_size
            Hx = H_block @ x
            step = _refit(result, g, grid, x, Hx, G, swapped=False)
            G.addcmul_(Hx, step, value=-1)
        scale = result.scale[g]
        # Column j aims at x_j + (G_j / s - sum_{i<j} H_ji (new x_i - x_i)) / H_jj.
        per_pivot = H_block / H_block.diagonal()[:, None]
        base = per_pivot.tril() @ x
        base.addcmul_(G.div_(scale), 1 / H_block.diagonal()[:, None])
        new = round_in_order(base, per_pivot, *grid.range(result.zero_of(g)))
        moved += torch.count_nonzero(new != x)
        result.x[inside] = new
        torch.addcmul(Wt[inside], new, scale, value=-1, out=E[inside])
    return int(moved)
