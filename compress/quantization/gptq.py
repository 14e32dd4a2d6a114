"""GPTQ's column loop, written with the Cholesky factor of H itself.

With H = R R^T, R upper triangular, and E = W - Q, the error of a layer is

    tr(E H E^T) = ||E R||^2 = sum_j ||E_j R_jj + sum_{i<j} E_i R_ij||^2

so, going from the first column to the last, the best value for column j is the grid point nearest

    W_j + sum_{i<j} E_i M_ij,     M = R diag(R)^-1

This is the same recursion as GPTQ's (arXiv 2210.17323, Algorithm 1) through the inverse of H, in
exact arithmetic; it needs one Cholesky factorisation and no inverse. The sum is taken in two
parts: the columns before the current block by one matrix product, those inside it one by one.

Tensors are columns-first, [K, N]: column j of W is row j here, and contiguous.

    result = column_loop(Wt, M, pivots, grid, group_size, clip, importance)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quantization.grid import UniformGrid, search_scale

BLOCK = 128  # columns a block; GPTQ's B


@dataclass
class Codes:
    """A quantised linear, columns-first. Group g of column k is `group_of[k]`.

    Attributes:
        codes: [K, N] integers, as floats.
        scale: [G, N].
        zero: [G, N] integers as floats, or None.
        group_of: [K] the row of `scale` that each column uses.
        error: tr(E H E^T) with the damped H, kept up to date by whoever changes the codes.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_of: Tensor
    error: float = 0.0

    def dequantised(self, grid: UniformGrid) -> Tensor:
        """Q, [K, N]."""
        zero = None if self.zero is None else self.zero[self.group_of]
        return grid.dequantise(self.codes, self.scale[self.group_of], zero)


def group_index(columns: int, group_size: int | None, device: torch.device) -> Tensor:
    """[K] the group of each column; one group where group_size is None."""
    return torch.arange(columns, device=device) // (group_size or columns)


def nearest(
    Wt: Tensor, grid: UniformGrid, group_size: int | None, clip: str, importance: Tensor | None
) -> Codes:
    """Rounding to nearest: every group's scale, then every weight on its own."""
    K, N = Wt.shape
    size = group_size or K
    result = Codes(
        codes=torch.empty_like(Wt),
        scale=Wt.new_empty(K // size, N),
        zero=None if grid.symmetric else Wt.new_empty(K // size, N),
        group_of=group_index(K, group_size, Wt.device),
    )
    for g in range(K // size):
        part = slice(g * size, (g + 1) * size)
        weight = None if importance is None else importance[part]
        scale, zero = search_scale(grid, Wt[part], clip, weight)
        result.scale[g] = scale
        if zero is not None:
            result.zero[g] = zero
        result.codes[part] = grid.quantise(Wt[part], scale, zero)
    return result


def column_loop(
    Wt: Tensor,
    M: Tensor,
    pivots: Tensor,
    grid: UniformGrid,
    group_size: int | None,
    clip: str,
    importance: Tensor,
    order: Tensor | None = None,
    block: int = BLOCK,
) -> Codes:
    """Quantises the columns in turn, each making up for what those before it have left.

    Args:
        Wt: [K, N] weights.
        M: [K, K] unit upper triangular, R diag(R)^-1; of the permuted H if `order` is given.
        pivots: [K] diag(R)^2.
        group_size: columns that share a scale; None for one scale a row of W.
        clip: the clip search (see `search_scale`).
        importance: [K] diag(H), in the weights' own order.
        order: [K] the order in which columns are taken (act-order). The groups stay those of the
            original order and their scales are fixed before the loop ("static" act-order), so the
            file needs no index of groups.
        block: columns a block where groups do not set it.

    Returns:
        the codes in the original order of columns.
    """
    K, N = Wt.shape
    static = order is not None or group_size is None
    # Static: all scales come from the weights as they are. Otherwise a group's scale is chosen
    # when the loop reaches it, for the weights it then has to represent.
    result = (
        nearest(Wt, grid, group_size, clip, importance)
        if static
        else Codes(
            codes=torch.empty_like(Wt),
            scale=Wt.new_empty(K // group_size, N),
            zero=None if grid.symmetric else Wt.new_empty(K // group_size, N),
            group_of=group_index(K, group_size, Wt.device),
        )
    )
    W = Wt if order is None else Wt[order]
    group_of = result.group_of if order is None else result.group_of[order]
    codes = torch.empty_like(Wt)
    E = torch.empty_like(Wt)  # W - Q, [K, N]
    error = torch.zeros((), dtype=torch.float64, device=Wt.device)
    step = block if static else group_size
    for start in range(0, K, step):
        inside = slice(start, min(start + step, K))
        targets = W[inside].clone()
        if start:
            targets.addmm_(M[:start, inside].T, E[:start])
        if not static:
            g = start // group_size
            scale, zero = search_scale(grid, targets, clip, importance[inside])
            result.scale[g] = scale
            if zero is not None:
                result.zero[g] = zero
        _inside_block(
            targets, W[inside], M[inside, inside], codes[inside], E[inside],
            grid, result, group_of[inside].tolist(),
        )  # fmt: skip
        # `targets` now holds what each column had to be; Q is W - E.
        missed = targets.sub_(W[inside]).add_(E[inside])
        error += (pivots[inside] @ missed.square_()).sum(dtype=torch.float64)
    result.error = float(error)
    if order is not None:
        result.codes[order] = codes
    else:
        result.codes = codes
    return result


def _inside_block(
    targets: Tensor,  # [B, N] with the earlier blocks' part already added; changed in place
    W: Tensor,  # [B, N]
    M: Tensor,  # [B, B] unit upper triangular
    codes: Tensor,  # [B, N] out
    E: Tensor,  # [B, N] out
    grid: UniformGrid,
    result: Codes,
    groups: list[int],
) -> None:
    inverse = {g: 1 / result.scale[g] for g in set(groups)}
    for j, g in enumerate(groups):
        t = targets[j]
        if j:
            t.addmv_(E[:j].T, M[:j, j])
        c = torch.mul(t, inverse[g], out=codes[j])
        if result.zero is not None:
            c += result.zero[g]
        c.round_().clamp_(grid.low, grid.high)
        if result.zero is None:
            torch.addcmul(W[j], c, result.scale[g], value=-1, out=E[j])
        else:
            torch.addcmul(W[j], c - result.zero[g], result.scale[g], value=-1, out=E[j])
