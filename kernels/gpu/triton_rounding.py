"""The Triton kernel that rounds columns in order, each knowing what those before it became.

    x_j = clamp(round(base_j - sum_{i<j} U_ji x_i))

Launched by rounding.py, which chooses and checks. A thread has one output, and RUN of its rows at a
time in registers: first it takes off what earlier runs have to say, whose levels are in memory,
then it follows the run row by row. The loop over a run is unrolled, so the compiler knows which
register is row j: nothing is moved or exchanged to take a row out, and each product is made once.
"""

import triton
import triton.language as tl

# 1.5 * 2^23: added and taken off again, it rounds an fp32 below 2^22 to the nearest integer, ties
# to even, as torch.round does. From 2^22 on a number is beyond any level and goes to its bound.
ROUND: tl.constexpr = tl.constexpr(12582912.0)
ROUNDED_BELOW: tl.constexpr = tl.constexpr(4194304.0)
UNROLLED: tl.constexpr = tl.constexpr(4)  # earlier rows whose loads are under way together


@triton.jit
def _to_level(v, low, high):
    """clamp(round(v), low, high) of fp32; a NaN stays one."""
    v = tl.where(tl.abs(v) < ROUNDED_BELOW, (v + ROUND) - ROUND, v)
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row(tile, i, j):
    """Row j of tile [RUN, BLOCK_N], exact: adding -0.0 changes nothing, as the compiler knows."""
    return tl.sum(tl.where((i == j)[:, None], tile, -0.0), 0)


@triton.jit
def _take_off(tile, link, x, i, FIRST: tl.constexpr, RUN: tl.constexpr):
    """Less the products of x [BLOCK_N] with the RUN links that lie at `link`, from FIRST on.

    Numbers one by one: as a vector each would be loaded by one thread, to be handed to the others.
    """
    u = tl.zeros((RUN,), tl.float32)
    for k in tl.static_range(FIRST, RUN):
        u = tl.where(i == k, tl.load(link + k), u)
    u = tl.broadcast_to(u[:, None], tile.shape)
    return tl.fma(u, tl.broadcast_to(-x[None, :], tile.shape), tile)


# Were N or a stride known to be a multiple of 16, four outputs next to each other would be one
# thread's, and the rows of a run spread over others.
@triton.jit(do_not_specialize=["B", "N", "least_row", "most_row"])
def round_kernel(
    base, links, least, most, scale, B, N, width, least_row, most_row,
    TENSORS: tl.constexpr, SCALED: tl.constexpr, RUN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """base [B, N] in place, BLOCK_N outputs a program of one warp.

    links [width, width]: U_ji at [i, j]; width: B rounded up to whole runs, zeros beyond B. least,
    most: two numbers, or where TENSORS two pointers, and the strides of their rows; columns touch.
    scale [B, N] if SCALED.
    """
    i = tl.arange(0, RUN)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    for start in range(0, B, RUN):
        rows = (start + i).to(tl.int64)[:, None]
        held = (start + i < B)[:, None] & inside[None, :]
        at = rows * N + n[None, :]
        tile = tl.load(base + at, mask=held, other=0)
        if SCALED:
            scales = tl.load(scale + at, mask=held, other=1)
        if TENSORS:
            lows = tl.load(least + rows * least_row + n[None, :], mask=held, other=0)
            highs = tl.load(most + rows * most_row + n[None, :], mask=held, other=0)
        row, link = base + n, links + start
        for _ in range(0, start, UNROLLED):
            for _k in tl.static_range(UNROLLED):
                x = tl.load(row, mask=inside, other=0)
                tile = _take_off(tile, link, x, i, 0, RUN)
                row, link = row + N, link + width
        for j in tl.static_range(RUN):
            x = _row(tile, i, j)
            if SCALED:
                x = tl.div_rn(x, _row(scales, i, j))
            if TENSORS:
                x = _to_level(x, _row(lows, i, j), _row(highs, i, j))
            else:
                x = _to_level(x, least, most)
            if SCALED:
                x *= _row(scales, i, j)
            after = tl.where((i == j)[:, None], tl.broadcast_to(x[None, :], tile.shape), tile)
            tile = tl.where((i > j)[:, None], _take_off(tile, link, x, i, j + 1, RUN), after)
            link += width
        tl.store(base + at, tile, mask=held)
        tl.debug_barrier()  # what one thread has written here another may read in the next run
