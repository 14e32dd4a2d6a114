"""Packed products on a CPU: the table of layouts, the choice of one, and the product.

A weight stays packed in one of three layouts for floats and two for integers. `tiles` and `quads`
are compiled for this machine by native.py, where it has a C++ compiler. Without one, torch's
operators run: `int4` where it is exact, else `rows`; and `groups`.

    weight = pack_cpu(codes, dtype=torch.bfloat16)
    y = cpu_matmul(x, weight, bias)
    codes = weight.unpack()                # exact
"""

import torch
from torch import Tensor

from compress.kernels.codes import Codes
from compress.kernels.cpu.int4 import Int4Weight
from compress.kernels.cpu.integers import GroupsWeight, QuadsWeight
from compress.kernels.cpu.rows import RowsWeight
from compress.kernels.cpu.tiles import TilesWeight
from compress.kernels.cpu.weight import CpuWeight, FloatWeight, IntegerWeight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of activations
# The fastest first; the last one takes every weight of a width in WIDTHS.
FLOAT_LAYOUTS: tuple[type[FloatWeight], ...] = (TilesWeight, Int4Weight, RowsWeight)
INTEGER_LAYOUTS: tuple[type[IntegerWeight], ...] = (QuadsWeight, GroupsWeight)


def pack_cpu(weight: Codes, dtype: torch.dtype) -> FloatWeight:
    """Packs codes in the layout that is fastest on this machine for activations of `dtype`.

    Raises ValueError for a width that kernels do not run.
    """
    fit = (layout for layout in FLOAT_LAYOUTS if layout.takes(weight, dtype))
    return next(fit, FLOAT_LAYOUTS[-1]).pack(weight)


def pack_integers(weight: Codes) -> IntegerWeight:
    """Packs codes in the layout that is fastest on this machine for activations rounded to int8.

    Raises ValueError for a width that kernels do not run, and as `check_integer_sums` does.
    """
    fit = (layout for layout in INTEGER_LAYOUTS if layout.takes(weight))
    return next(fit, INTEGER_LAYOUTS[-1]).pack(weight)


def cpu_matmul(x: Tensor, weight: CpuWeight, bias: Tensor | None = None) -> Tensor:
    """Multiplies x [M, K] by the transpose of `weight` [N, K], plus bias [N]: [M, N], x's dtype.

    Raises ValueError for another K, dtype or device, for a weight packed for other activations, and
    where a weight packed for compiled kernels meets a process that has none.
    """
    K = weight.shape[1]
    if x.shape[-1] != K:
        raise ValueError(f"expected activations of {K} features, found {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"expected activations in fp16, bf16 or fp32, found {x.dtype}")
    if x.device.type != weight.packed.device.type:  # its address would be read as one of here
        raise ValueError(f"expected activations on {weight.packed.device}, found {x.device}")
    if not isinstance(weight, FloatWeight):
        raise ValueError("this weight was packed for activations in int8, not in floats")
    if weight.order is not None:
        x = x[..., weight.order]
    return weight.matmul(x, bias)
