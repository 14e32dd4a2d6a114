"""Rounding columns one after the other, each knowing what those before it became.

Both the column loop of GPTQ and the coordinate descent that refines its result come down to

    x_j = clamp(round(base_j - sum_{i<j} U_ij x_i))

with x in levels (codes minus zero point) and a triangular coupling U. Neighbours are followed one
by one in small runs, the rest by matrix products. On a GPU, where a column is not worth the
launches it takes, a run is one launch of a Triton kernel; on a CPU all is one compiled loop.

    round_in_order(base, coupling, low, high)     # base [B, N] becomes x
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from compress.kernels.activations import has_kernels
from compress.kernels.cpu import rounding as on_cpu

# Columns followed one by one before a matrix product takes over: few enough that a run of them
# stays in the cache nearest to the core.
RUN = 16

Bound = float | Tensor
# Rounds the few rows of a run: base, coupling, low, high, scale.
Follow = Callable[[Tensor, Tensor, Bound, Bound, Tensor | None], object]


def round_in_order(
    base: Tensor, coupling: Tensor, low: Bound, high: Bound, scale: Tensor | None = None
) -> Tensor:
    """Rounds the rows of `base` in turn, in place.

    By a kernel, where base is fp32 and contiguous: on a GPU if triton is there, on a CPU compiled.

    Args:
        base: [B, N] what each column would be if those before it were zero.
        coupling: [B, B], row j holds U_ij at column i; only i < j is read.
        low, high: the levels' range: a number, [N], or [B, N].
        scale: [B, N] if columns differ in scale; base and result are then weights, x * scale,
            and not levels.

    Returns:
        base.
    """
    if has_kernels(base) and base.dtype == torch.float32 and base.is_contiguous():
        found = _kernel()
        if found is not None:
            return _in_runs(*found, base, coupling, low, high, scale)
    library = on_cpu.compiled(base)
    if library is not None:
        return on_cpu.round_in_order(library, base, coupling, low, high, scale)
    return round_eagerly(base, coupling, low, high, scale)


def round_eagerly(
    base: Tensor, coupling: Tensor, low: Bound, high: Bound, scale: Tensor | None = None
) -> Tensor:
    """`round_in_order` by torch's operators, a few for each column, on any device."""
    return _in_runs(_follow, RUN, base, coupling.contiguous(), low, high, scale)


@cache
def _kernel() -> tuple[Follow, int] | None:
    """The kernel and the columns of its runs; says once where a GPU has to do without."""
    try:
        from compress.kernels.gpu.rounding import MOST_ROWS, round_rows_  # needs triton
    except ImportError as error:
        warnings.warn(
            f"columns are rounded one by one, which is slow on a GPU: {error}", stacklevel=2
        )
        return None
    return round_rows_, MOST_ROWS


def _in_runs(
    follow: Follow,
    run: int,
    base: Tensor,
    coupling: Tensor,
    low: Bound,
    high: Bound,
    scale: Tensor | None,
) -> Tensor:
    """Runs of so many rows one after the other, each after what those before it have to say."""
    for start in range(0, len(base), run):
        part = slice(start, start + run)
        if start:
            base[part].addmm_(coupling[part, :start], base[:start], alpha=-1)
        bounds = _rows_of(low, part), _rows_of(high, part)
        follow(base[part], coupling[part, part], *bounds, None if scale is None else scale[part])
    return base


def _rows_of(bound: Bound, part: slice) -> Bound:
    return bound[part] if isinstance(bound, Tensor) and bound.dim() == 2 else bound


def _follow(base: Tensor, coupling: Tensor, low: Bound, high: Bound, scale: Tensor | None) -> None:
    """The rows one by one."""
    rows, links = base.unbind(0), coupling.unbind(0)
    lows, highs = _per_row(low, len(rows)), _per_row(high, len(rows))
    for j, x in enumerate(rows):
        if j:
            x.addmv_(base[:j].T, links[j][:j], alpha=-1)
        if scale is not None:
            x.div_(scale[j])
        x.round_().clamp_(lows[j], highs[j])  # type: ignore[arg-type]  # two numbers or tensors
        if scale is not None:
            x.mul_(scale[j])


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
