"""Triton kernels of integer activations: Hadamard passes, quantisation by token, int8 products.

Launched by hadamard.py and integer_launch.py, which choose and check. Names, and the layout of
weights, are those of triton_kernels.py.
"""

import triton
import triton.language as tl

from compress.kernels.gpu.triton_kernels import (
    as_tile,
    by_output,
    code_pairs,
    load_activations,
    load_rows,
    load_words,
    load_zero,
    settled,
)

# 1.5 * 2^23: added and taken off again, it rounds an fp32 below 2^22 to the nearest integer, ties
# to even, as torch.round does.
ROUND: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _butterfly(v, SIZE: tl.constexpr, LOG: tl.constexpr):
    """LOG steps of the fast Walsh-Hadamard transform on a vector [SIZE]: on each 2^LOG of it."""
    for step in tl.static_range(LOG):
        pairs = v.reshape(SIZE >> (step + 1), 2, 1 << step).permute(0, 2, 1)
        a, b = tl.split(pairs)
        v = tl.join(a + b, a - b).permute(0, 2, 1).reshape(SIZE)
    return v


@triton.jit
def butterfly_kernel(x, norm, SIZE: tl.constexpr, LOG: tl.constexpr):
    """One vector of SIZE = 2^LOG, in place: the fast Walsh-Hadamard transform times `norm`."""
    at = x + tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    v = _butterfly(tl.load(at).to(tl.float32), SIZE, LOG)
    tl.store(at, (v * norm).to(x.dtype.element_ty))


@triton.jit
def factor_kernel(
    x,
    factor,
    norm,
    right,
    ORDER: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x [left, ORDER, right] in place: factor [ORDER, ORDER] (+-1, of x's dtype) along the middle.

    Program (i, j): all of the middle axis for tile j of the right one, so nothing is read that
    another program writes.
    """
    i = tl.arange(0, PADDED)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    square = (i < ORDER)[:, None] & (i < ORDER)[None, :]
    H = tl.load(factor + i[:, None] * ORDER + i[None, :], mask=square, other=0)
    start = tl.program_id(0).to(tl.int64) * ORDER * right
    at = x + start + i[:, None] * right + j[None, :]
    mask = (i < ORDER)[:, None] & (j < right)[None, :]
    v = tl.load(at, mask=mask, other=0)
    y = tl.dot(H, v, input_precision="ieee") * norm
    tl.store(at, y.to(x.dtype.element_ty), mask=mask)


@triton.jit
def quantize_kernel(
    x,
    values,
    scale,
    K,
    stride,
    norm,
    STEPS: tl.constexpr,
    HALF: tl.constexpr,
    SIZE: tl.constexpr,
    LOG: tl.constexpr,
):
    """One token x [K]: transformed in pieces of 2^LOG (0: as it is), then to int8 and its scale.

    values int8 [tokens, K] in [-HALF, HALF); scale fp32 [tokens] = max |x| / STEPS. The transformed
    token goes from registers to int8 and is never written.
    """
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    v = tl.load(x + token * stride + i, mask=i < K, other=0).to(tl.float32)
    v = _butterfly(v, SIZE, LOG) * norm
    # as integers, sizes are in the order of the floats, and NaN, which a maximum of floats drops,
    # is above all others
    largest = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
    # a token of zeros has scale 0 and values 0
    q = (v * (STEPS / tl.maximum(largest, 1e-30)) + ROUND) - ROUND
    q = tl.minimum(tl.maximum(q, -HALF), HALF - 1)
    q = tl.where(largest < float("inf"), q, 0)
    tl.store(values + token * K + i, q.to(tl.int8), mask=i < K)
    tl.store(scale + token, largest / STEPS)


@triton.jit(do_not_specialize=["M", "split"])
def integer_matmul_kernel(
    values, token_scale, words, high, scale, zero, bias, out, M, N, K, split,
    BITS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
    EVEN: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """A tile of y = token_scale * (values W^T) + bias by int8 tensor cores, values int8 [M, K].

    Sums over a group, or over all of K with one scale per output, are int32 and exact. Programs and
    out as in matmul_kernel; STEP is CHUNK.
    """
    BLOCK: tl.constexpr = 16 * (32 // (2 if BITS == 3 else BITS))
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) // tiles_m) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    share = tl.program_id(1)
    inside = n < N
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    whole = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for block in range(share, tl.cdiv(K, BLOCK), split):
        even, odd = load_words(words, high, block, first, N, BITS, BLOCK_N, WARPS)
        for c in tl.static_range(BLOCK // CHUNK):
            k0 = block * BLOCK + c * CHUNK
            xs = load_activations(values, m, K, k0, M, K, CHUNK, EVEN, BLOCK_M)
            group = min(k0, K - 1) // GROUP if GROUP > 0 else 0
            z = load_zero(zero, group, first, N, BITS, HAS_ZERO, BLOCK_N)
            z = by_output(z, BLOCK_N, WARPS)
            pair = code_pairs(even, odd, c, 0, BITS, CHUNK)
            a, b = ((pair & 0xFF) - z).to(tl.int8), ((pair >> 16) - z).to(tl.int8)
            w = as_tile(a, b, CHUNK, BLOCK_N, WARPS)
            if GROUP > 0:
                s = load_rows(scale + group * N, first, N, BLOCK_N).to(tl.float32)
                part = tl.dot(w, xs, out_dtype=tl.int32).to(tl.float32)
                total = tl.fma(part, tl.broadcast_to(s[:, None], part.shape), total)
            else:
                whole = settled(tl.dot(w, xs, whole, out_dtype=tl.int32))
    if GROUP == 0:
        s = load_rows(scale, first, N, BLOCK_N).to(tl.float32)
        total = whole.to(tl.float32) * s[:, None]
    total *= tl.load(token_scale + m, mask=m < M, other=0)[None, :]
    if HAS_BIAS:
        total += load_rows(bias, first, N, BLOCK_N).to(tl.float32)[:, None]
    at = (share * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < M)[None, :] & inside[:, None])
