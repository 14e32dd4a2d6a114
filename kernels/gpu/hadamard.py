"""Fast Hadamard transform of activations on a GPU, in place: for rotations that stay online.

    y = x M^T,   M = (F_1 (x) F_2 (x) ... (x) Sylvester(2^m)) / sqrt(n),   n = f_1 f_2 ... 2^m

F_i are Hadamard matrices of orders that are no power of two (12, 20, 28, ...), given by the caller;
the rest of n is a power of two and takes m butterfly steps. Every pass divides by the square root
of its own order, so that 16-bit values between two passes stay as large as they were. Sums are in
fp32. M is symmetric for a plain power of two; for the inverse pass the transposed factors.

    hadamard_(x)                         # x [..., 4096]
    hadamard_(x, (H28,))                 # x [..., 28 * 512]
"""

import torch
import triton
from torch import Tensor

from compress.kernels.codes import butterfly_size
from compress.kernels.gpu import triton_activations as kernels
from compress.kernels.gpu.matmul import check_launch, on_its_device
from compress.kernels.gpu.triton_kernels import FIXED_OPTIONS

FACTOR_TILE = 64


def hadamard_(x: Tensor, factors: tuple[Tensor, ...] = (), butterflies: bool = True) -> Tensor:
    """Overwrites x [..., n] (contiguous; fp16, bf16, fp32) with its transform, and returns it.

    factors: +-1 matrices [f, f]; ValueError if their orders do not divide n, or leave no power of
    two. Without `butterflies`, the power of two is left to what reads x next.
    """
    butterfly_size(x.shape[-1], factors)
    if not x.is_contiguous():
        raise ValueError("a transform in place takes a contiguous tensor: call .contiguous()")
    _hadamard(x, [factor.to(x.dtype).contiguous() for factor in factors], butterflies)
    return x


@torch.library.custom_op("modelpress::hadamard", mutates_args=("x",))
def _hadamard(x: Tensor, factors: list[Tensor], butterflies: bool) -> None:
    check_launch(x, *factors)
    _launch(x, factors, butterflies)


@on_its_device
def _launch(x: Tensor, factors: list[Tensor], butterflies: bool) -> None:
    right, left = x.shape[-1], x.numel() // max(x.shape[-1], 1)
    if x.numel() == 0:
        return
    for factor in factors:
        order = len(factor)
        right //= order
        tile = min(FACTOR_TILE, max(16, triton.next_power_of_2(right)))
        kernels.factor_kernel[(left, triton.cdiv(right, tile))](
            x,
            factor,
            order**-0.5,
            right,
            ORDER=order,
            PADDED=max(16, triton.next_power_of_2(order)),
            BLOCK=tile,
            **FIXED_OPTIONS,
        )
        left *= order
    if butterflies and right > 1:
        kernels.butterfly_kernel[(left,)](
            x,
            right**-0.5,
            SIZE=right,
            LOG=right.bit_length() - 1,
            num_warps=min(16, max(1, right // 512)),
            **FIXED_OPTIONS,
        )


@_hadamard.register_fake
def _(x: Tensor, factors: list[Tensor], butterflies: bool) -> None:
    return None
