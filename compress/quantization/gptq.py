"""GPTQ's column loop, written with the Cholesky factor of H itself.

With H = R R^T, R upper triangular, and E = W - Q, the error of a layer is

    tr(E H E^T) = ||E R||^2 = sum_j ||E_j R_jj + sum_{i<j} E_i R_ij||^2

so, going from the first column to the last, the best value for column j is the grid point nearest

    W_j + sum_{i<j} E_i M_ij,     M = R diag(R)^-1

This is the same recursion as GPTQ's (arXiv 2210.17323, Algorithm 1) through the inverse of H, in
exact arithmetic; it needs one Cholesky factorisation and no inverse. The sum is taken in two
parts: the columns before the current block by one matrix product, those inside it one by one
(`rounding.py`). The error itself is the sum of the squares above, and so comes at no cost.

Tensors are columns-first, [K, N]: column j of W is row j here, and contiguous.

    result = column_loop(Wt, M, grid, group_size, clip, importance)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quantization.grid import UniformGrid, search_scale
from compress.quantization.rounding import round_in_order

BLOCK = 128  # columns a block; GPTQ's B


@dataclass
class QuantizedColumns:
    """A quantised linear, columns-first. Column k uses row `group_of[k]` of scale and zero.

    Attributes:
        x: [K, N] codes minus zero point, integers as floats.
        scale: [G, N].
        zero: [G, N] integers as floats, or None.
        group_of: [K].
        error: [N] fp64, each output's share of ||E R||^2, where `column_loop` was asked for it.
    """

    x: Tensor
    scale: Tensor
    zero: Tensor | None
    group_of: Tensor
    error: Tensor | None = None

    @classmethod
    def empty(cls, Wt: Tensor, grid: UniformGrid, group_size: int | None) -> "QuantizedColumns":
        K, N = Wt.shape
        groups = K // (group_size or K)
        return cls(
            x=torch.empty_like(Wt),
            scale=Wt.new_empty(groups, N),
            zero=None if grid.symmetric else Wt.new_empty(groups, N),
            group_of=torch.arange(K, device=Wt.device) // (group_size or K),
        )

    def zero_of(self, g: int) -> Tensor | None:
        return None if self.zero is None else self.zero[g]

    def dequantised(self) -> Tensor:
        """Q, [K, N]."""
        return self.x * self.scale[self.group_of]

    def codes(self) -> Tensor:
        """What is stored: [K, N]."""
        return self.x if self.zero is None else self.x + self.zero[self.group_of]


def nearest(
    Wt: Tensor, grid: UniformGrid, group_size: int | None, clip: str, importance: Tensor
) -> QuantizedColumns:
    """Rounding to nearest: every group's scale, then every weight on its own."""
    size = group_size or Wt.shape[0]
    result = QuantizedColumns.empty(Wt, grid, group_size)
    for g in range(result.scale.shape[0]):
        part = slice(g * size, (g + 1) * size)
        _set_scale(result, g, grid, Wt[part], clip, importance[part])
        levels = (Wt[part] / result.scale[g]).round_()
        result.x[part] = grid.clamp_(levels, result.zero_of(g))
    return result


def _set_scale(
    result: QuantizedColumns, g: int, grid: UniformGrid, Wt: Tensor, clip: str, importance: Tensor
) -> None:
    result.scale[g], zero = search_scale(grid, Wt, clip, importance)
    if result.zero is not None and zero is not None:
        result.zero[g] = zero


def column_loop(
    Wt: Tensor,
    M: Tensor,
    grid: UniformGrid,
    group_size: int | None,
    clip: str,
    importance: Tensor,
    order: Tensor | None = None,
    block: int = BLOCK,
    pivots: Tensor | None = None,
) -> QuantizedColumns:
    """Quantises the columns in turn, each making up for what those before it have left.

    Args:
        Wt: [K, N] weights.
        M: [K, K] unit upper triangular, R diag(R)^-1; of the permuted H if `order` is given.
        group_size: columns that share a scale; None for one scale a row of W.
        clip: the clip search (see `search_scale`).
        importance: [K] diag(H), in the weights' own order.
        order: [K] the order in which columns are taken (act-order). The groups stay those of the
            original order and their scales are fixed before the loop ("static" act-order), so the
            file needs no index of groups.
        block: columns a block where groups do not set it.
        pivots: [K] R_jj^2; with it (and no `order`) the result has its error, each output's share
            of ||E R||^2.
    """
    if order is not None:
        return _in_another_order(Wt, M, grid, group_size, clip, importance, order, block)
    K = Wt.shape[0]
    result = QuantizedColumns.empty(Wt, grid, group_size)
    if group_size is None:
        _set_scale(result, 0, grid, Wt, clip, importance)
    E = torch.empty_like(Wt)  # W - Q
    error = Wt.new_zeros(Wt.shape[1], dtype=torch.float64)
    step = group_size or block
    for start in range(0, K, step):
        inside = slice(start, min(start + step, K))
        W, coupling = Wt[inside], M[inside, inside].T.contiguous()
        feedback = M[:start, inside].T @ E[:start]  # zeros for the first block
        g = 0
        if group_size is not None:
            # The scale is chosen for the weights that the group now has to represent: those that
            # make up together for the errors so far. Each of W + feedback does for them alone.
            g = start // group_size
            shift = torch.linalg.solve_triangular(
                coupling, feedback, upper=False, unitriangular=True
            )
            _set_scale(result, g, grid, shift.add_(W), clip, importance[inside])
        scale = result.scale[g]
        # The feedback inside the block, E_i M_ij = W_i M_ij - Q_i M_ij: its first part is known.
        base = torch.addmm(feedback, coupling, W).div_(scale)
        x = round_in_order(base, coupling, *grid.range(result.zero_of(g)))
        result.x[inside] = x
        torch.addcmul(W, x, scale, value=-1, out=E[inside])
        if pivots is not None:
            error += pivots[inside] @ feedback.addmm_(coupling, E[inside]).square_()
    result.error = None if pivots is None else error
    return result


def _in_another_order(
    Wt: Tensor,
    M: Tensor,
    grid: UniformGrid,
    group_size: int | None,
    clip: str,
    importance: Tensor,
    order: Tensor,
    block: int,
) -> QuantizedColumns:
    """The loop with act-order: neighbours differ in scale, so it runs on weights, not levels."""
    result = nearest(Wt, grid, group_size, clip, importance)  # for its scales
    W, group_of = Wt[order], result.group_of[order]
    E = torch.empty_like(W)
    for start in range(0, W.shape[0], block):
        inside = slice(start, start + block)
        coupling = M[inside, inside].T.contiguous()
        groups = group_of[inside]
        base = torch.addmm(W[inside], coupling.tril(-1), W[inside])
        if start:
            base.addmm_(M[:start, inside].T, E[:start])
        scale = result.scale[groups]
        low, high = grid.range(None if result.zero is None else result.zero[groups])
        Q = round_in_order(base, coupling, low, high, scale)
        E[inside] = W[inside] - Q
        result.x[order[inside]] = (Q / scale).round_()
    return result
