"""y = x W^T + bias for packed weights on a GPU: which kernel, with which tiles, and its launch.

    rows of x      kernel
    1              decode: no tensor core, inputs split over programs
    up to 64       split-K: tensor cores, inputs split over programs
    up to 256      tiled: tensor cores, one pass
    more           the weight is expanded once and multiplied by cuBLAS

TABLE holds the tiles; what `modelpress bench kernels --tune` measured on this device for a shape
comes before it (tuning.py).

Splitting gives a narrow product enough programs to keep all of the memory busy. Their sums go to a
workspace [SPLIT, M, N] in fp32, which a second kernel adds up in a fixed order: no atomics, so the
same input gives the same bits. Above about 256 rows (H100) tensor cores, not memory, are the limit,
and no kernel that unpacks as it goes beats a plain product.

fp16, bf16 and fp32 activations; sums in fp32; y in the dtype of x. `quantized_matmul` is a custom
operator with a fake implementation: torch.compile and CUDA graphs take it as it is.

    y = quantized_matmul(x, weight, bias)        # weight: layout.KernelWeight
"""

import math
from functools import cache

import torch
import triton
from torch import Tensor

from compress.kernels import triton_kernels as kernels
from compress.kernels import tuning
from compress.kernels.layout import ROWS, KernelWeight, block_columns
from compress.kernels.tuning import Tiles

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Programs for each multiprocessor that splitting aims at: enough loads in flight to hide latency.
PROGRAMS_PER_SM = 4
DENSE_TILE = 128
LARGEST_CHUNK = 128  # depth of one tensor-core product: bounds the unpacked tile
INTERPRETER_MEMORY = 64 * 1024
REDUCE_BLOCK = 1024


DECODE = Tiles(rows=1, block_m=1, block_n=128, warps=4, stages=3)
# First row that fits wins; above the last one the weight is expanded. Chosen by what fits shared
# memory and fills tensor cores, and not yet measured on any GPU.
TABLE = (
    Tiles(rows=16, block_m=16, block_n=64, warps=4, stages=4),
    Tiles(rows=32, block_m=32, block_n=64, warps=4, stages=4),
    Tiles(rows=64, block_m=64, block_n=64, warps=4, stages=3),
    Tiles(rows=128, block_m=64, block_n=128, warps=4, stages=3, split=1),
    Tiles(rows=256, block_m=128, block_n=128, warps=8, stages=3, split=1),
)
# Without tensor cores for fp32, a library's product wins sooner, and tiles take twice the memory.
FP32_ENTRIES = 2


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
        rows, weight.words, weight.high, weight.scale, weight.zero, bias,
        weight.bits, weight.group_size or 0,
    )  # fmt: skip
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
    check_launch(x, scale, bias)
    if len(x) == 0:
        return x.new_empty(0, words.shape[1])
    tiles = tiles_for(x, weight)
    if tiles is None:
        return dense_matmul(x, weight, bias)
    if len(x) == 1:
        return decode_matmul(x, weight, bias, tiles)
    return tiled_matmul(x, weight, bias, tiles)


@_quantized_matmul.register_fake
def _(x, words, high, scale, zero, bias, bits, group_size):
    return x.new_empty(x.shape[0], words.shape[1])


def tiles_for(x: Tensor, weight: KernelWeight) -> Tiles | None:
    """Tiles for x [M, K] on its device: tuned ones, else those of the table; None: expand W."""
    M, (N, K) = len(x), weight.shape
    if TABLE[-1].rows >= M and x.dtype != torch.float32:  # tuned with 16-bit activations
        key = (device_name(x.device), N, K, weight.bits, weight.group_size, tuning.bucket(M))
        tuned = tuning.find(*key)
        if tuned is not None:
            return tuned
    if M == 1:
        return DECODE
    table = TABLE[:FP32_ENTRIES] if x.dtype == torch.float32 else TABLE
    return next((tiles for tiles in table if tiles.rows >= M), None)


# ---- launches -----------------------------------------------------------------------------------


def decode_matmul(
    x: Tensor, weight: KernelWeight, bias: Tensor | None = None, tiles: Tiles = DECODE
) -> Tensor:
    """One row, x [1, K] -> [1, N]."""
    N, K = weight.shape
    grid = triton.cdiv(N, tiles.block_n)
    split = split_of(tiles, grid, weight, x.device)
    out = workspace(x, N, split, x.dtype)
    kernels.decode_kernel[(grid, split)](
        x, weight.words, weight.high, weight.scale, weight.zero, bias, out, N, K,
        **weight_constants(weight), HAS_BIAS=bias is not None, SPLIT=split, BLOCK_N=tiles.block_n,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return add_up(out, bias, x.dtype)


def tiled_matmul(x: Tensor, weight: KernelWeight, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """Tensor cores, x [M, K] -> [M, N]; one pass, or split-K where `tiles` says so."""
    M, (N, K) = len(x), weight.shape
    grid = triton.cdiv(M, tiles.block_m) * triton.cdiv(N, tiles.block_n)
    split = split_of(tiles, grid, weight, x.device)
    out = workspace(x, N, split, x.dtype)
    kernels.matmul_kernel[(grid, split)](
        x, weight.words, weight.high, weight.scale, weight.zero, bias, out, M, N, K, x.stride(0),
        **weight_constants(weight), HAS_BIAS=bias is not None, SPLIT=split,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        num_warps=tiles.warps,
        num_stages=stages(tiles, weight.bits, x.element_size(), shared_memory(x.device)),
    )  # fmt: skip
    return add_up(out, bias, x.dtype)


def dense_matmul(x: Tensor, weight: KernelWeight, bias: Tensor | None = None) -> Tensor:
    """The weight expanded to x's dtype and multiplied by the vendor's library."""
    W = dequantize_transposed(weight, x.dtype)
    return x @ W if bias is None else torch.addmm(bias.to(x.dtype), x, W)


def dequantize_transposed(weight: KernelWeight, dtype: torch.dtype) -> Tensor:
    """The weight's transpose [K, N], each entry rounded once; inputs in the layout's order."""
    N, K = weight.shape
    out = torch.empty(K, N, dtype=dtype, device=weight.words.device)
    grid = (triton.cdiv(K, block_columns(weight.bits)), triton.cdiv(N, DENSE_TILE))
    kernels.dequantize_kernel[grid](
        weight.words, weight.high, weight.scale, weight.zero, out, N, K,
        **weight_constants(weight), BLOCK_N=DENSE_TILE, num_warps=4,
    )  # fmt: skip
    return out


def splits(tiles: int, columns: int, bits: int, device: torch.device) -> int:
    """Programs that share the inputs of each tile: a power of two, at most one for each block.

    A power of two because it is a compile-time constant, of which there should be few.
    """
    blocks = triton.cdiv(columns, block_columns(bits))
    wanted = min(blocks, PROGRAMS_PER_SM * _multiprocessors(device) // tiles)
    return 1 << max(wanted.bit_length() - 1, 0) if wanted > 0 else 1


def stages(tiles: Tiles, bits: int, size: int, memory: int) -> int:
    """Blocks in flight: what `tiles` asks for, or fewer, so that they fit shared memory.

    size: bytes of an activation; memory: bytes of shared memory that one program may take.
    """
    block = block_columns(bits)
    words = (2 if bits == 3 else 1) * ROWS * tiles.block_n * 4
    unpacked = min(block, LARGEST_CHUNK) * tiles.block_n * size
    each = tiles.block_m * block * size + words
    return max(1, min(tiles.stages, (memory - unpacked) // each))


def split_of(tiles: Tiles, grid: int, weight: KernelWeight, device: torch.device) -> int:
    """What `tiles` says, or by device; never more than there are blocks to share."""
    if tiles.split is None:
        return splits(grid, weight.columns, weight.bits, device)
    return min(tiles.split, triton.cdiv(weight.columns, block_columns(weight.bits)))


@cache
def device_name(device: torch.device) -> str:
    """The name that tuned tiles are kept under."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may take."""
    if device.type != "cuda":
        return INTERPRETER_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter runs programs one after another
    return torch.cuda.get_device_properties(device).multi_processor_count


def weight_constants(weight: KernelWeight) -> dict[str, int | bool]:
    """The compile-time constants of every kernel that reads a weight."""
    block = block_columns(weight.bits)
    group = weight.group_size or 0  # gcd(block, 0, 128) = gcd(block, 128)
    return {
        "BITS": weight.bits,
        "GROUP": group,
        "CHUNK": math.gcd(block, group, LARGEST_CHUNK),
        "HAS_ZERO": weight.zero is not None,
    }


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
    kernels.reduce_kernel[(triton.cdiv(out.numel(), REDUCE_BLOCK),)](
        parts, bias, out, out.shape[1], out.numel(),
        SPLIT=len(parts), HAS_BIAS=bias is not None, BLOCK=REDUCE_BLOCK,
    )  # fmt: skip
    return out


def interpreted() -> bool:
    """Whether the kernels were imported under TRITON_INTERPRET=1 and run on the CPU."""
    return not isinstance(kernels.decode_kernel, triton.runtime.JITFunction)


def check_launch(x: Tensor, *others: Tensor | None) -> None:
    """Raises ValueError for what no kernel can run, or would run wrongly without a word."""
    tensors = [x, *(t for t in others if t is not None)]
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
