"""What the kernels must compute, in plain torch and 64-bit floats.

y[m, n] = sum_k x[m, k] * (c[n, k] - z[n, k // g]) * s[n, k // g] + bias[n]

expected = reference_matmul(x, codes, bias)      # x [..., K] -> fp64 [..., N]
"""

from dataclasses import replace

import torch
from torch import Tensor

from compress.kernels.codes import Codes

BLOCK_VALUES = 1 << 20  # in fp64 at a time


def dequantize(weight: Codes) -> Tensor:
    """The weight [N, K] in fp64, exact: a code of 8 bits times a scale of at most 24."""
    K = weight.codes.shape[1]
    size = K if weight.group_size is None else weight.group_size
    group = torch.arange(K, device=weight.codes.device) // size
    zero = 2.0 ** (weight.bits - 1) if weight.zero is None else weight.zero.double()[:, group]
    columns = (weight.codes.double() - zero) * weight.scale.double()[:, group]
    if weight.order is None:
        return columns
    return torch.empty_like(columns).index_copy_(1, weight.order, columns)


def dense(weight: Codes, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`, each value rounded once, without all of it in fp64."""
    N, K = weight.codes.shape
    result = torch.empty(N, K, dtype=dtype, device=weight.codes.device)
    for start in range(0, N, step := max(1, BLOCK_VALUES // max(K, 1))):
        rows = slice(start, start + step)
        zero = None if weight.zero is None else weight.zero[rows]
        part = replace(weight, codes=weight.codes[rows], scale=weight.scale[rows], zero=zero)
        result[rows] = dequantize(part).to(dtype)
    return result


def reference_matmul(x: Tensor, weight: Codes, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the weight's transpose, plus bias [N]: fp64 [..., N]."""
    y = x.double() @ dequantize(weight).T
    return y if bias is None else y + bias.double()
