"""What a solver does with single weights on a CPU, compiled: rounding.cpp.

Tensors are fp32, contiguous and columns-first: [K, N] for a linear of N outputs and K inputs.
Results are the same with any number of threads.

    library = compiled(Wt)             # None: torch's operators have to do it
    best = best_scale(library, Wt, scale, zero, -8, 7, importance)
"""

import torch
from torch import Tensor

from compress.kernels.cpu import native

Bound = float | Tensor


def compiled(x: Tensor) -> native.Kernels | None:
    """The compiled library where it takes x; None where x is none of its own, or there is none."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous():
        return None
    return native.kernels()


def best_scale(
    kernels: native.Kernels,
    Wt: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    low: int,
    high: int,
    importance: Tensor | None,
) -> Tensor:
    """Which of S scales each output is rounded with at the least error, the first if several: [N].

    Args:
        Wt: [K, N] weights that share a scale for each output.
        scale: [S, N], none of them zero.
        zero: [S, N] zero points, integers as floats, or None for all zero.
        low, high: the least and the greatest code.
        importance: [K], for sum_k importance_k e_k^2; None for sum_k |e_k|^2.4.
    """
    (K, N), S = Wt.shape, len(scale)
    scale = _numbers(scale, (S, N), "scales")
    zero = None if zero is None else _numbers(zero, (S, N), "zero points")
    if importance is not None:
        importance = _numbers(importance.to(torch.float32), (K,), "a weight for each input")
    best = torch.empty(N, dtype=torch.int64, device="cpu")
    kernels.library.modelpress_best_scale(
        Wt.data_ptr(),
        scale.data_ptr(),
        _address(zero),
        _address(importance),
        best.data_ptr(),
        K,
        N,
        S,
        low,
        high,
        importance is None,
        torch.get_num_threads(),
    )
    return best


def round_in_order(
    kernels: native.Kernels,
    base: Tensor,
    coupling: Tensor,
    low: Bound,
    high: Bound,
    scale: Tensor | None = None,
) -> Tensor:
    """Rounds the rows of `base` [B, N] in turn, in place, as `quantization/rounding.py` says.

    coupling: [B, B]; low, high: numbers, [N], or both [B, N]; scale: [B, N] or None.
    """
    B, N = base.shape
    coupling = _numbers(coupling, (B, B), "a coupling of columns")
    shape = (B, N) if any(isinstance(b, Tensor) and b.dim() == 2 for b in (low, high)) else (N,)
    bounds = [_bound(bound, shape) for bound in (low, high)]
    scale = None if scale is None else _numbers(scale, (B, N), "scales")
    kernels.library.modelpress_round_in_order(
        base.data_ptr(),
        coupling.data_ptr(),
        *(bound.data_ptr() for bound in bounds),
        _address(scale),
        B,
        N,
        N if len(shape) == 2 else 0,
        torch.get_num_threads(),
    )
    return base


def _bound(bound: Bound, shape: tuple[int, ...]) -> Tensor:
    """The least or greatest levels in this shape."""
    if not isinstance(bound, Tensor):
        return torch.full(shape, float(bound), device="cpu")
    return _numbers(bound.to(torch.float32).expand(shape), shape, "bounds")


def _numbers(tensor: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """The tensor as the library reads it, which cannot check what lies behind an address."""
    right = tensor.shape == shape and tensor.dtype == torch.float32
    native.require(right and tensor.device.type == "cpu", f"{what} in fp32")
    return tensor.contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
