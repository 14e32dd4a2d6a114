"""Rounding columns one after the other, each knowing what those before it became.

Both the column loop of GPTQ and the coordinate descent that refines its result come down to

    x_j = clamp(round(base_j - sum_{i<j} U_ij x_i))

with x in levels (codes minus zero point) and a triangular coupling U. Neighbours are followed one
by one in small runs, the rest by matrix products.

    round_in_order(base, coupling, low, high)     # base [B, N] becomes x
"""

import torch
from torch import Tensor

# Columns followed one by one before a matrix product takes over: few enough that a run of them
# stays in the cache nearest to the core.
RUN = 16

Bound = float | Tensor


def round_in_order(
    base: Tensor, coupling: Tensor, low: Bound, high: Bound, scale: Tensor | None = None
) -> Tensor:
    """Rounds the rows of `base` in turn, in place.

    Args:
        base: [B, N] what each column would be if those before it were zero.
        coupling: [B, B], row j holds U_ij at column i; only i < j is read.
        low, high: the levels' range: a number, [N], or [B, N].
        scale: [B, N] if columns differ in scale; base and result are then weights, x * scale,
            and not levels.

    Returns:
        base.
    """
    rows, links = base.unbind(0), coupling.contiguous().unbind(0)
    lows, highs = _per_row(low, len(rows)), _per_row(high, len(rows))
    for start in range(0, len(rows), RUN):
        stop = min(start + RUN, len(rows))
        if start:
            base[start:stop].addmm_(coupling[start:stop, :start], base[:start], alpha=-1)
        for j in range(start, stop):
            x = rows[j]
            if j > start:
                x.addmv_(base[start:j].T, links[j][start:j], alpha=-1)
            if scale is not None:
                x.div_(scale[j])
            x.round_().clamp_(lows[j], highs[j])  # type: ignore[arg-type]  # two numbers or tensors
            if scale is not None:
                x.mul_(scale[j])
    return base


def _per_row(bound: Bound, count: int) -> list[Bound]:
    if isinstance(bound, Tensor) and bound.dim() == 2:
        return list(bound.unbind(0))
    return [bound] * count


def quadratic(H: Tensor, A: Tensor, block: int = 256) -> Tensor:
    """a_n^T H a_n for each column a_n of A [K, N], H [K, K] symmetric: [N], in fp64.

    Takes the lower triangle's blocks alone, so half the operations of H @ A.
    """
    total = torch.zeros(A.shape[1], dtype=torch.float64, device=A.device)
    for start in range(0, H.shape[0], block):
        part = slice(start, min(start + block, H.shape[0]))
        HA = H[part, part] @ A[part]
        if start:
            HA.addmm_(H[part, :start], A[:start], alpha=2)
        total += HA.mul_(A[part]).sum(0)
    return total
