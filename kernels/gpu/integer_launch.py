"""Launches of the integer kernels on a GPU; activations.py says what they compute.

values, scale = launch_quantize(x, factors, power, steps=7.0, half=8)
y = launch_product(values, scale, weight, bias, torch.float16)
"""

import torch
import triton
from torch import Tensor

from compress.kernels.codes import check_integer_sums
from compress.kernels.gpu import triton_activations as kernels
from compress.kernels.gpu.hadamard import hadamard_
from compress.kernels.gpu.layout import KernelWeight, block_columns
from compress.kernels.gpu.matmul import (
    MMA_TABLE,
    SMALLEST_CHUNK,
    add_up,
    check_launch,
    on_its_device,
    tile_constants,
    weight_constants,
    workspace,
)
from compress.kernels.gpu.occupancy import (
    ceil_div,
    multiprocessors,
    shared_memory,
    split_of,
    stages,
)
from compress.kernels.gpu.triton_kernels import FIXED_OPTIONS
from compress.kernels.gpu.tuning import Tiles

TILES = MMA_TABLE  # int32 sums of a group lie beside the fp32 ones in registers
PROGRAMS_PER_SM = 2  # by their registers, of the largest tile
LARGEST_TOKEN = 1 << 15  # inputs: one program holds all of a token in registers


@on_its_device
def launch_quantize(
    x: Tensor, factors: list[Tensor], power: int, steps: float, half: int
) -> tuple[Tensor, Tensor]:
    """x [M, K], rotated by factors and butterflies of size `power`: int8 [M, K], fp32 [M].

    steps: of a scale to the largest value; values lie in [-half, half).

    Raises ValueError for tokens of more than LARGEST_TOKEN inputs, and as `check_launch` does.
    """
    check_launch(x)
    M, K = x.shape
    size = triton.next_power_of_2(K)
    if size > LARGEST_TOKEN:
        raise ValueError(f"tokens of up to {LARGEST_TOKEN} inputs are quantised, found {K}")
    values, scale = x.new_empty(M, K, dtype=torch.int8), x.new_empty(M, dtype=torch.float32)
    if M == 0:
        return values, scale
    if factors:
        x = hadamard_(x.contiguous().clone(), tuple(factors), butterflies=False)
    x = x if x.stride(-1) == 1 else x.contiguous()
    kernels.quantize_kernel[(M,)](
        x,
        values,
        scale,
        K,
        x.stride(0),
        power**-0.5,
        STEPS=steps,
        HALF=half,
        SIZE=size,
        LOG=power.bit_length() - 1,
        num_warps=min(16, max(1, size // 512)),
        **FIXED_OPTIONS,
    )
    return values, scale


def launch_product(
    values: Tensor,
    token_scale: Tensor,
    weight: KernelWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """values int8 [M, K] -> [M, N] in `dtype`, with the table's tiles for M rows."""
    others = (weight.words, weight.high, weight.scale, weight.zero, token_scale, bias)
    check_launch(values.new_empty(0, dtype=dtype), values, *others)
    if weight.bits == 8 and weight.zero is not None:
        raise ValueError("integer products take 8-bit weights without zero points: symmetric ones")
    check_integer_sums(weight.columns, weight.group_size)
    if len(values) == 0:
        return values.new_empty(0, weight.shape[0], dtype=dtype)
    tiles = next((tiles for tiles in TILES if tiles.rows >= len(values)), TILES[-1])
    return tiled_integers(values, token_scale, weight, bias, tiles, dtype)


@on_its_device
def tiled_integers(
    values: Tensor,
    token_scale: Tensor,
    weight: KernelWeight,
    bias: Tensor | None,
    tiles: Tiles,
    dtype: torch.dtype,
) -> Tensor:
    """Int8 tensor cores, values [M, K] -> [M, N]; any M, more than tiles.rows too."""
    constants = weight_constants(weight)
    if constants["STEP"] < SMALLEST_CHUNK:
        raise ValueError(
            f"integer products take groups of a multiple of {SMALLEST_CHUNK} inputs, or one per "
            f"output, found {weight.group_size}"
        )
    M, (N, K) = len(values), weight.shape
    grid = ceil_div(M, tiles.block_m) * ceil_div(N, tiles.block_n)
    held = PROGRAMS_PER_SM * multiprocessors(values.device)
    split = split_of(tiles, grid, weight, held)
    out = workspace(values, N, split, dtype)
    kernels.integer_matmul_kernel[(grid, split)](
        values, token_scale, weight.words, weight.high, weight.scale, weight.zero, bias, out,
        M, N, K, split, **constants, EVEN=K % block_columns(weight.bits) == 0,
        HAS_BIAS=bias is not None and split == 1, **tile_constants(tiles),
        num_warps=tiles.warps,
        num_stages=stages(tiles, weight.bits, 1, shared_memory(values.device)),
        **FIXED_OPTIONS,
    )  # fmt: skip
    return add_up(out, bias, dtype)
