"""Coordinate descent on a layer's error, after the column loop, with closed-form scales.

The column loop never returns to a column. Given its codes, the error

    f(Q) = tr(E H E^T),  E = W - Q

is quadratic in each single weight: with G = H E (columns-first), the best value of column j, all
others kept, is Q_j + G_j / H_jj, so taking the nearest grid point never raises f. Between the
sweeps over the columns, the scale of a group moves by the exact minimiser of f for fixed codes,

    ds = <C, G> / <C, H C>          C = codes minus zero point of that group

Blocks keep the work in matrix products: G of a block is one product with all of E, and the
changes within the block are followed one column at a time. One sweep costs 2 N K^2 operations.

    refine(result, Wt, H, grid, group_size, sweeps=5)
"""

import torch
from torch import Tensor

from compress.quantization.gptq import BLOCK, Codes
from compress.quantization.grid import UniformGrid


def refine(
    result: Codes, Wt: Tensor, H: Tensor, grid: UniformGrid, group_size: int | None, sweeps: int
) -> list[float]:
    """Lowers tr(E H E^T) by `sweeps` passes over the columns, changing `result` in place.

    Args:
        result: codes and scales to start from.
        Wt: [K, N] the weights to represent.
        H: [K, K] symmetric, diagonal positive.

    Returns:
        the share of codes that each sweep changed; it stops early when none changes.
        `result.error` falls by exactly what the steps gain.
    """
    changed: list[float] = []
    E = Wt - result.dequantised(grid)
    for _ in range(sweeps):
        if group_size is None:
            _refit_channel(result, Wt, H, grid, E)
        moved = _sweep(result, H, grid, group_size, E)
        changed.append(moved / Wt.numel())
        if moved == 0:
            break
    if changed and group_size is None:
        _refit_channel(result, Wt, H, grid, E)
    return changed


def _refit_channel(result: Codes, Wt: Tensor, H: Tensor, grid: UniformGrid, E: Tensor) -> None:
    """The best single scale of each row of W for its codes: s = <C, H W> / <C, H C>."""
    C = result.codes if result.zero is None else result.codes - result.zero
    HC = H @ C
    _move_scale(result, 0, grid, C, (HC * E).sum(0), (HC * C).sum(0), E)


def _move_scale(
    result: Codes, g: int, grid: UniformGrid, C: Tensor, CG: Tensor, CHC: Tensor, E: Tensor
) -> Tensor:
    """Moves the scale of group g to its best value CG / CHC away; returns the step, rounded.

    Rows whose codes are all zero keep their scale. C, E: the group's rows; CG, CHC: [N].
    """
    before = result.scale[g].clone()
    step = CG / CHC
    result.scale[g] = grid.stored(before + torch.where(step.isfinite(), step, 0.0))
    step = result.scale[g] - before
    E.addcmul_(C, step, value=-1)
    result.error -= float((step * (2 * CG - step * CHC)).sum(dtype=torch.float64))
    return step


def _sweep(
    result: Codes, H: Tensor, grid: UniformGrid, group_size: int | None, E: Tensor
) -> float:
    """One pass over all columns; E [K, N] is kept up to date. Returns how many codes changed."""
    K = H.shape[0]
    size = group_size or BLOCK
    moved, gained = torch.zeros(2, dtype=torch.float64, device=E.device)
    for start in range(0, K, size):
        inside = slice(start, min(start + size, K))
        G = H[inside] @ E  # [B, N]
        H_block = H[inside, inside]
        g = 0
        if group_size is not None:
            g = start // group_size
            _refit_group(result, g, H_block, grid, inside, G, E)
        before = result.codes[inside].clone()
        D = _block_step(G, H_block, result.codes[inside], result.scale[g], grid)
        E[inside] -= D
        moved += (before != result.codes[inside]).sum()
        # G now holds each column's own G at the time of its step.
        gain = D * G.mul_(2).addcmul_(D, H_block.diagonal()[:, None], value=-1)
        gained += gain.sum(dtype=torch.float64)
    result.error -= float(gained)
    return float(moved)


def _refit_group(
    result: Codes, g: int, H_block: Tensor, grid: UniformGrid, inside: slice, G: Tensor, E: Tensor
) -> None:
    C = result.codes[inside]
    if result.zero is not None:
        C = C - result.zero[g]
    HC = H_block @ C
    step = _move_scale(result, g, grid, C, (C * G).sum(0), (C * HC).sum(0), E[inside])
    G.addcmul_(HC, step, value=-1)


def _block_step(
    G: Tensor, H_block: Tensor, codes: Tensor, scale: Tensor, grid: UniformGrid
) -> Tensor:
    """Coordinate descent inside one block: changes codes [B, N], returns Q's change D [B, N].

    The zero point cancels: only differences of codes enter.
    """
    D = torch.empty_like(G)
    inverse = 1 / scale
    diagonal = H_block.diagonal().tolist()
    for j, H_jj in enumerate(diagonal):
        t = G[j]
        if j:
            t.addmv_(D[:j].T, H_block[:j, j], alpha=-1)
        new = torch.addcmul(codes[j], t, inverse, value=1 / H_jj)
        new.round_().clamp_(grid.low, grid.high)
        torch.sub(new, codes[j], out=D[j])
        D[j] *= scale
        codes[j] = new
    return D
