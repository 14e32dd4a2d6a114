"""y = x W^T + bias for packed weights on a GPU: with which tiles, and the launch.

    rows of x      what runs
    up to 32       matmul_kernel, scales on fp32 sums
    up to 512      matmul_kernel, scales on the weights, each rounded once
    more           the weight is expanded once and multiplied by cuBLAS; without Hopper's or
                   Blackwell's products beyond 128 rows, in fp32 and in groups that are no
                   multiple of 32 inputs beyond 32

TABLE holds the tiles; what `modelpress bench kernels --tune` measured on this device for a shape
comes before it (tuning.py).

Splitting gives a narrow product enough programs to keep all of the memory busy. Their sums go to a
workspace [split, M, N] in fp32, which a second kernel adds up in a fixed order: no atomics, so the
same input gives the same bits. With many rows tensor cores, not memory, are the limit: to expand
the weight once then costs less than to unpack it for every tile of rows.

fp16, bf16 and fp32 activations; sums in fp32; y in the dtype of x. `quantized_matmul` is a custom
operator with a fake implementation: torch.compile and CUDA graphs take it as it is.

    y = quantized_matmul(x, weight, bias)        # weight: KernelWeight, of pack_kernel
"""

import math
from collections.abc import Callable
from functools import cache, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

from compress.kernels.gpu import triton_kernels as kernels
from compress.kernels.gpu import tuning
from compress.kernels.gpu.layout import KernelWeight, block_columns
from compress.kernels.gpu.occupancy import (
    LARGEST_CHUNK,
    ceil_div,
    most_held,
    multiprocessors,
    programs_beside,
    shared_memory,
    split_of,
    stages,
)
from compress.kernels.gpu.tuning import Tiles

P = ParamSpec("P")
R = TypeVar("R")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Beyond these rows, scaling sums would take more instructions and registers than scaling weights.
EXACT_ROWS = 32
DENSE_TILE = 64
# Depth of one product, of few rows and of many: the more, the fewer sums to scale; the less, the
# fewer registers hold weights.
CHUNKS = (LARGEST_CHUNK, LARGEST_CHUNK)
SMALLEST_CHUNK = 32  # two codes of each thread of a fragment
REDUCE_BLOCK = 512


# First row that fits wins; above the last one the weight is expanded.
TABLE = (
    Tiles(rows=8, block_m=8, block_n=32, warps=2, stages=3),
    Tiles(rows=16, block_m=16, block_n=64, warps=4, stages=3),
    Tiles(rows=32, block_m=32, block_n=128, warps=8, stages=3),
    Tiles(rows=64, block_m=64, block_n=64, warps=4, stages=3),
    Tiles(rows=512, block_m=128, block_n=128, warps=8, stages=3),
)
# Without Hopper's wgmma, whose right operand stays in shared memory, a thread holds all of a tile.
MMA_TABLE = (
    *TABLE[:2],
    Tiles(rows=32, block_m=32, block_n=128, warps=4, stages=3),
    Tiles(rows=128, block_m=64, block_n=128, warps=4, stages=3),
)
# Groups that are no multiple of 32 take a product for each 16 inputs, and registers for its sums.
ODD_TABLE = (Tiles(rows=32, block_m=8, block_n=128, warps=4, stages=2),)
ODD_FP32_TABLE = (Tiles(rows=32, block_m=8, block_n=64, warps=4, stages=2),)
# Without tensor cores for fp32, a library's product wins sooner, and tiles take twice the memory.
FP32_TABLE = (
    Tiles(rows=8, block_m=8, block_n=64, warps=4, stages=2),
    Tiles(rows=32, block_m=32, block_n=32, warps=4, stages=2),
)


def quantized_matmul(x: Tensor, weight: KernelWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the transpose of `weight` [N, K], plus bias [N]: [..., N] in x's dtype.

    Raises ValueError for a last axis other than K, a dtype other than fp16, bf16 and fp32, and
    tensors that lie neither on a GPU nor in Triton's interpreter.
    """
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(f"expected activations of {K} features, found {list(x.shape)}")
    if weight.order is not None:
        x = x[..., weight.order]
    rows = x.reshape(-1, K)
    if rows.stride(-1) != 1 or rows.stride(0) < K:
        rows = rows.contiguous()
    y = _quantized_matmul(
        rows,
        weight.words,
        weight.high,
        weight.scale,
        weight.zero,
        bias,
        weight.bits,
        weight.group_size or 0,
    )
    return y.view(*x.shape[:-1], N)


@torch.library.custom_op("modelpress::quantized_matmul", mutates_args=())
def _quantized_matmul(
    x: Tensor,
    words: Tensor,
    high: Tensor | None,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """x [M, K] -> [M, N]; group_size 0 is one scale per output."""
    weight = KernelWeight(words, high, scale, zero, bits, group_size or None, x.shape[1])
    check_launch(x, words, high, scale, zero, bias)
    if len(x) == 0:
        return x.new_empty(0, words.shape[1])
    tiles = tiles_for(x, weight)
    if tiles is None:
        return dense_matmul(x, weight, bias)
    return tiled_matmul(x, weight, bias, tiles)


@_quantized_matmul.register_fake
def _(x: Tensor, words: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], words.shape[1])


def tiles_for(x: Tensor, weight: KernelWeight) -> Tiles | None:
    """Tiles for x [M, K] on its device: tuned ones, else those of the table; None: expand W."""
    M, (N, K) = len(x), weight.shape
    table = table_of(x.dtype, x.device, weight.group_size)
    if table[-1].rows >= M and x.dtype != torch.float32:  # tuned with 16-bit activations
        key = (device_name(x.device), N, K, weight.bits, weight.group_size, tuning.bucket(M))
        tuned = tuning.find(*key)
        if tuned is not None:
            return tuned
    return next((tiles for tiles in table if tiles.rows >= M), None)


@cache
def table_of(dtype: torch.dtype, device: torch.device, group_size: int | None) -> tuple[Tiles, ...]:
    """The built-in tiles of a device; the interpreter takes Hopper's."""
    cuda = device.type == "cuda"
    major = torch.cuda.get_device_capability(device)[0] if cuda else 9
    return table_for(major, dtype == torch.float32, group_size)


def table_for(major: int, fp32: bool, group_size: int | None) -> tuple[Tiles, ...]:
    """The built-in tiles of compute capability `major`, for fp32 or for 16-bit activations."""
    if group_size is not None and group_size % SMALLEST_CHUNK:
        return ODD_FP32_TABLE if fp32 else ODD_TABLE
    if fp32:
        return FP32_TABLE
    return TABLE if major in (9, 10) else MMA_TABLE


# ---- launches -----------------------------------------------------------------------------------


def on_its_device(
    launch: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Makes the device of the first tensor current: Triton launches there, whatever it is given."""

    @wraps(launch)
    def launched(x: Tensor, *arguments: P.args, **options: P.kwargs) -> R:
        with torch.cuda.device_of(x):
            return launch(x, *arguments, **options)

    return launched


@on_its_device
def tiled_matmul(x: Tensor, weight: KernelWeight, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """Tensor cores, x [M, K] -> [M, N]; one pass, or split-K where `tiles` says so."""
    M, (N, K) = len(x), weight.shape
    many = M > EXACT_ROWS
    options = (
        weight_constants(weight, many)
        | tile_constants(tiles)
        | {
            "EVEN": K % block_columns(weight.bits) == 0,
            "SCALED": many and weight.group_size is not None,
            **kernels.FIXED_OPTIONS,
            "num_warps": tiles.warps,
            "num_stages": stages(tiles, weight.bits, x.element_size(), shared_memory(x.device)),
            **early_launch(x.device),
        }
    )
    grid = ceil_div(M, tiles.block_m) * ceil_div(N, tiles.block_n)
    held = 0
    if tiles.split is None and most_held(tiles, x.device) >= 2 * grid:
        stride = 16 if x.stride(0) % 16 == 0 else 17  # all that code is compiled for
        sizes, constants = (N, K, stride), tuple(options.items())
        held = programs_held(x.dtype, weight.scale.dtype, sizes, constants, x.device)
    split = split_of(tiles, grid, weight, held)
    out = workspace(x, N, split, x.dtype)
    kernels.matmul_kernel[(grid, split)](
        x, weight.words, weight.high, weight.scale, weight.zero, bias if split == 1 else None, out,
        M, N, K, x.stride(0), split, HAS_BIAS=bias is not None and split == 1, **options,
    )  # fmt: skip
    return add_up(out, bias, x.dtype)


@cache
def programs_held(
    dtype: torch.dtype,
    scale: torch.dtype,
    sizes: tuple[int, int, int],
    options: tuple[tuple[str, int], ...],
    device: torch.device,
) -> int:
    """Programs of a split matmul_kernel that the device runs at once: no more are worth starting.

    By the registers and the shared memory of the compiled kernel; WARPS_PER_SM at most.
    """
    if device.type != "cuda":
        return 1
    constants = dict(options)
    high = torch.int32 if constants["BITS"] == 3 else None
    zero = torch.uint8 if constants["HAS_ZERO"] else None
    with torch.cuda.device(device):
        compiled = kernels.matmul_kernel.warmup(
            dtype, torch.int32, high, scale, zero, None, torch.float32,
            2, *sizes, 2, HAS_BIAS=False, grid=(1,), **constants,
        )  # fmt: skip
        compiled._init_handles()  # as Triton's tutorials ask for the registers of a kernel
    has = torch.cuda.get_device_properties(device)
    registers = has.regs_per_multiprocessor  # type: ignore[attr-defined]  # missing in its types
    memory, warps = shared_memory(device), constants["num_warps"]
    held = programs_beside(compiled.n_regs, compiled.metadata, warps, registers, memory)
    return held * multiprocessors(device)


def dense_matmul(x: Tensor, weight: KernelWeight, bias: Tensor | None = None) -> Tensor:
    """The weight expanded to x's dtype and multiplied by the vendor's library."""
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, dequantize_weight(weight, x.dtype), bias)


def dequantize_weight(weight: KernelWeight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K], each entry rounded once; inputs in the layout's order."""
    N, K = weight.shape
    out = torch.empty(N, K, dtype=dtype, device=weight.words.device)
    _dequantize(out, weight)
    return out


@on_its_device
def _dequantize(out: Tensor, weight: KernelWeight) -> None:
    N, K = weight.shape
    grid = (ceil_div(N, DENSE_TILE), ceil_div(K, block_columns(weight.bits)))
    kernels.dequantize_kernel[grid](
        weight.words,
        weight.high,
        weight.scale,
        weight.zero,
        out,
        N,
        K,
        **weight_constants(weight),
        BLOCK_N=DENSE_TILE,
        WARPS=DENSE_TILE // 16,
        num_warps=DENSE_TILE // 16,
        **kernels.FIXED_OPTIONS,
    )


@cache
def device_name(device: torch.device) -> str:
    """The name that tuned tiles are kept under."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def weight_constants(weight: KernelWeight, many: bool = False) -> dict[str, int | bool]:
    """The compile-time constants of every kernel that reads a weight.

    many: for more than EXACT_ROWS rows of activations.
    """
    return scheme_constants(weight.bits, weight.group_size, weight.zero is None, many)


def scheme_constants(
    bits: int, group_size: int | None, symmetric: bool, many: bool = False
) -> dict[str, int | bool]:
    """What `weight_constants` gives, for a weight that need not be there."""
    block = block_columns(bits)
    group = group_size or 0  # gcd(block, 0, ...) = gcd(block, ...)
    step = math.gcd(block, group, CHUNKS[many])
    return {
        "BITS": bits,
        "GROUP": group,
        "CHUNK": max(step, SMALLEST_CHUNK),
        "STEP": step,
        "HAS_ZERO": not symmetric,
    }


def tile_constants(tiles: Tiles) -> dict[str, int]:
    """The compile-time constants of every kernel that works on tiles."""
    warps = min(tiles.warps, tiles.block_n // 16)
    return {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "WARPS": warps}


def workspace(x: Tensor, outputs: int, split: int, dtype: torch.dtype) -> Tensor:
    """Where programs write: y [M, N] itself, or a part of it each, fp32 [split, M, N]."""
    if split == 1:
        return x.new_empty(len(x), outputs, dtype=dtype)
    return x.new_empty(split, len(x), outputs, dtype=torch.float32)


def add_up(parts: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y of what `workspace` gave: as it is, or the sum of the parts plus bias [N]."""
    if parts.dim() == 2:
        return parts
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    kernels.reduce_kernel[(ceil_div(out.numel(), REDUCE_BLOCK),)](
        parts,
        bias,
        out,
        out.shape[1],
        out.numel(),
        len(parts),
        HAS_BIAS=bias is not None,
        BLOCK=REDUCE_BLOCK,
        MOST=tuning.bucket(len(parts)),
        **kernels.FIXED_OPTIONS,
        **early_launch(parts.device),
    )
    return out


@cache
def early_launch(device: torch.device) -> dict[str, bool]:
    """Options of a launch that may begin before the kernel in front of it ends: from Hopper on.

    Such a kernel waits itself for what the one in front writes ("programmatic dependent launch",
    CUDA C++ Programming Guide): only the time that a launch takes is hidden.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


def interpreted() -> bool:
    """Whether the kernels were imported under TRITON_INTERPRET=1 and run on the CPU."""
    return not isinstance(kernels.matmul_kernel, triton.runtime.JITFunction)


def check_launch(x: Tensor, *others: Tensor | None) -> None:
    """Raises ValueError for what no kernel can run, or would run wrongly without a word."""
    tensors = [x, *(t for t in others if t is not None)]
    if devices := {t.device for t in tensors} - {x.device}:
        raise ValueError(f"expected all tensors on {x.device}, found some on {devices.pop()}")
    if x.dtype not in DTYPES:
        raise ValueError(f"kernels take fp16, bf16 and fp32 activations, found {x.dtype}")
    if interpreted():
        # triton computes bf16 as integers there, silently (its debugging page, "Limitations")
        if any(t.dtype == torch.bfloat16 for t in tensors):
            raise ValueError("Triton's interpreter gets bf16 wrong: test with fp16 or fp32")
    elif not all(t.is_cuda for t in tensors):
        raise ValueError(
            f"Triton kernels run on a GPU, found tensors on {x.device}: use QuantLinear, which has "
            "another path there"
        )
