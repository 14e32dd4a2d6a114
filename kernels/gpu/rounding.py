"""Rounding columns in order on a GPU: all of a block's steps in one launch.

    x_j = clamp(round(base_j - sum_{i<j} U_ji x_i))

In torch each column takes a handful of launches, and hardly any work is in one of them. Sums are in
fp32, in the order of i; outputs do not depend on one another, so each has a thread of its own.

    round_rows_(base, coupling, low, high)       # base [B, N] becomes x
"""

import torch
import triton
from torch import Tensor

from compress.kernels.gpu import triton_rounding as kernels
from compress.kernels.gpu.matmul import check_launch, on_its_device
from compress.kernels.gpu.triton_kernels import FIXED_OPTIONS

# Columns a launch: of more, what the first do to the last is faster as a matrix product, and U
# [128, 128] stays in the cache next to a multiprocessor.
MOST_ROWS = 128
RUN = 16  # columns in registers: 32 spill on some GPUs
OPTIONS = {"RUN": RUN, "BLOCK_N": 32, "num_warps": 1, "num_stages": 1, **FIXED_OPTIONS}


def round_rows_(
    base: Tensor,
    coupling: Tensor,
    low: float | Tensor,
    high: float | Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """Rounds the rows of `base` in turn, in place: half to even; a NaN stays one.

    Args:
        base: [B, N] fp32, contiguous: what each row would be if those before it were zero.
        coupling: [B, B] fp32, U_ji at row j, column i; only i < j is read.
        low, high: the levels' range: a number, [N] or [B, N]; integers below 2^22.
        scale: [B, N] if rows differ in scale; base and result are then x * scale.

    Returns:
        base.

    Raises:
        ValueError: another dtype, a base that is not contiguous, tensors on several devices or on
            none that runs Triton's kernels.
    """
    for name, given in (("base", base), ("coupling", coupling), ("scale", scale)):
        if given is not None and given.dtype != torch.float32:
            raise ValueError(f"expected a {name} in fp32, found {given.dtype}")
    if not base.is_contiguous():
        raise ValueError("rounding in place takes a contiguous base: call .contiguous()")
    bounds = low, high
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        bounds = _as_tensor(low, base), _as_tensor(high, base)
    check_launch(base, coupling, scale, *(each for each in bounds if isinstance(each, Tensor)))
    if base.numel():
        _launch(base, _whole_runs(coupling), *bounds, None if scale is None else scale.contiguous())
    return base


def _as_tensor(bound: float | Tensor, base: Tensor) -> Tensor:
    """A bound as a contiguous tensor [N] or [B, N] in base's dtype."""
    if isinstance(bound, Tensor):
        return bound.to(base.dtype).contiguous()
    return base.new_full(base.shape[1:], bound)


def _row_stride(bound: float | Tensor) -> int:
    """From one row of a bound to the next: 0 for one that all share."""
    return bound.stride(0) if isinstance(bound, Tensor) and bound.dim() == 2 else 0


def _whole_runs(coupling: Tensor) -> Tensor:
    """The coupling transposed, contiguous, with zeros up to whole runs."""
    missing = -len(coupling) % RUN
    if missing:
        coupling = torch.nn.functional.pad(coupling, (0, missing, 0, missing))
    return coupling.T.contiguous()


@on_its_device
def _launch(
    base: Tensor,
    links: Tensor,
    low: float | Tensor,
    high: float | Tensor,
    scale: Tensor | None,
) -> None:
    B, N = base.shape
    kernels.round_kernel[(triton.cdiv(N, OPTIONS["BLOCK_N"]),)](
        base,
        links,
        low if isinstance(low, Tensor) else float(low),
        high if isinstance(high, Tensor) else float(high),
        scale,
        B,
        N,
        len(links),
        _row_stride(low),
        _row_stride(high),
        TENSORS=isinstance(low, Tensor),
        SCALED=scale is not None,
        **OPTIONS,
    )
