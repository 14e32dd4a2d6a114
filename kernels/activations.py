"""Products of quantised weights and activations (W4A4, W8A8): integers in int8, sums in int32.

    h = x M^T                                         an online Hadamard rotation, or h = x
    a[m] = max_k |h[m, k]| / L                        one scale per token, symmetric
    q[m, k] = round(h[m, k] / a[m])                   int8
    y[m, n] = a[m] * sum over g of s[n, g] * (sum over k in g of q[m, k] (c[n, k] - z[n, g]))

L = 2^(bits-1) - 1, so that no value is cut off; or, as compressed-tensors has it (`full_range`),
L = 2^(bits-1) - 1/2, and q is clamped to [-2^(bits-1), 2^(bits-1) - 1]. A token's largest value
then lies between two integers, and its last bit decides.

The inner sum is exact, so the only error of y beyond the rounding of q and of the result is that of
fp32 scales and sums. On a GPU, rotation and rounding are one pass, and int8 tensor cores multiply
weights that stay packed (gpu/integer_launch.py, Triton); CPUs: cpu/integers.py.

    q, a = quantize_tokens(x, bits=4, factors=())
    y = integer_matmul(q, a, weight, bias, dtype=x.dtype)  # of pack_kernel, or pack_integers
"""

import os

import torch
from torch import Tensor

from compress.kernels.codes import butterfly_size
from compress.kernels.cpu import native
from compress.kernels.cpu.weight import CpuWeight, IntegerWeight
from compress.kernels.gpu.layout import KernelWeight

BITS = range(2, 9)


# ---- tokens -------------------------------------------------------------------------------------


def quantize_tokens(
    x: Tensor,
    bits: int = 4,
    factors: tuple[Tensor, ...] | None = None,
    full_range: bool = False,
) -> tuple[Tensor, Tensor]:
    """x [..., K] (fp16, bf16, fp32) as int8 [..., K] and one fp32 scale per token [...].

    factors: None for no rotation; else x is rotated first, by the transform of `hadamard_` with
    these factors, () for a plain power of two. full_range: integers down to -2^(bits-1). x is not
    changed. A token that holds an infinity or a NaN becomes zeros, and its scale is what it holds:
    all of its products are NaN. Raises ValueError for bits outside 2..8, sizes that `hadamard_`
    refuses, and on a GPU more than 2^15 inputs.
    """
    if bits not in BITS:
        raise ValueError(f"activations take 2 to 8 bits, found {bits}")
    K, power = x.shape[-1], 1
    if factors is not None:
        power = butterfly_size(K, factors)
    values, scale = _quantize_tokens(x.reshape(-1, K), list(factors or ()), power, bits, full_range)
    return values.view(x.shape), scale.view(x.shape[:-1])


@torch.library.custom_op("modelpress::quantize_tokens", mutates_args=())
def _quantize_tokens(
    x: Tensor, factors: list[Tensor], power: int, bits: int, full_range: bool
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> int8 [M, K], fp32 [M]; power: the part of K that butterflies take."""
    half = 2 ** (bits - 1)
    steps = half - 0.5 if full_range else half - 1.0
    if not has_kernels(x):
        h = _transform(x, factors, power) if factors or power > 1 else x
        library = native.kernels() if h.device.type == "cpu" and h.dtype in native.KINDS else None
        return (library.round_tokens if library else _round_tokens)(h, steps, half)
    from compress.kernels.gpu.integer_launch import launch_quantize  # needs triton, CPUs do not

    return launch_quantize(x, factors, power, steps, half)


@_quantize_tokens.register_fake
def _(
    x: Tensor, factors: list[Tensor], power: int, bits: int, full_range: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def has_kernels(x: Tensor) -> bool:
    """On a GPU, or in Triton's interpreter: asked without importing triton."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def _transform(x: Tensor, factors: list[Tensor], power: int) -> Tensor:
    """The rotation in fp32 by torch: x [M, K] times M^T."""
    y = x.float()
    left = len(x)
    for factor in factors:
        order = len(factor)
        y = factor.float() @ y.reshape(left, order, -1) * order**-0.5
        left *= order
    half = 1
    while half < power:
        a, b = y.reshape(-1, 2, half).unbind(1)
        y = torch.stack([a + b, a - b], dim=1)
        half *= 2
    return y.reshape(x.shape) * power**-0.5


def _round_tokens(x: Tensor, steps: float, half: int) -> tuple[Tensor, Tensor]:
    x = x.float()
    scale = x.abs().amax(1) / steps
    values = (x / scale.clamp_min(1e-30)[:, None]).round().clamp(-half, half - 1)
    # what a NaN becomes as an integer is not defined
    return values.where(scale.isfinite()[:, None], 0).to(torch.int8), scale


# ---- products -----------------------------------------------------------------------------------


def integer_matmul(
    values: Tensor,
    token_scale: Tensor,
    weight: KernelWeight | CpuWeight,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """values int8 [..., K] and their scales [...] times the transpose of `weight`: [..., N].

    y has `dtype`. Activations of a weight with permuted inputs (act-order) are permuted here. A
    KernelWeight is for a GPU, a CpuWeight for a CPU. Raises ValueError for another K, other scales
    and a CpuWeight that was not packed for integers; on a GPU for groups that are no multiple of 32
    and 8 bits with zero points.
    """
    K = weight.shape[1]
    if values.shape[-1] != K or values.dtype != torch.int8:
        raise ValueError(
            f"expected int8 activations of {K} features, found {values.dtype} {list(values.shape)}"
        )
    if token_scale.shape != values.shape[:-1] or token_scale.dtype != torch.float32:
        raise ValueError(
            f"expected an fp32 scale for each token {list(values.shape[:-1])}, found "
            f"{token_scale.dtype} {list(token_scale.shape)}"
        )
    if isinstance(weight, CpuWeight):
        if not isinstance(weight, IntegerWeight):
            raise ValueError("this weight was packed for activations in floats, not in int8")
        for what, given in (("values", values), ("scales", token_scale)):
            if given.device != weight.packed.device:  # its address would be read as one of here
                raise ValueError(f"expected {what} on {weight.packed.device}, found {given.device}")
    if weight.order is not None:
        values = values[..., weight.order]
    rows, scales = values.reshape(-1, K).contiguous(), token_scale.reshape(-1).contiguous()
    if isinstance(weight, KernelWeight):
        y = _integer_matmul(
            rows,
            scales,
            weight.words,
            weight.high,
            weight.scale,
            weight.zero,
            bias,
            weight.bits,
            weight.group_size or 0,
            dtype,
        )
    else:
        y = weight.matmul(rows, scales, bias, dtype)
    return y.view(*values.shape[:-1], y.shape[-1])


@torch.library.custom_op("modelpress::integer_matmul", mutates_args=())
def _integer_matmul(
    values: Tensor,
    token_scale: Tensor,
    words: Tensor,
    high: Tensor | None,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """int8 [M, K] -> [M, N]; group_size 0 is one scale per output."""
    from compress.kernels.gpu.integer_launch import launch_product  # needs triton, CPUs do not

    weight = KernelWeight(words, high, scale, zero, bits, group_size or None, values.shape[1])
    return launch_product(values, token_scale, weight, bias, dtype)


@_integer_matmul.register_fake
def _(values: Tensor, token_scale: Tensor, words: Tensor, *others: object) -> Tensor:
    dtype = others[-1]
    assert isinstance(dtype, torch.dtype)
    return values.new_empty(values.shape[0], words.shape[1], dtype=dtype)
