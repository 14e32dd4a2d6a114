"""Triton kernels of integer activations: Hadamard passes, quantisation by token, int8 products.

Launched by hadamard.py and activations.py, which choose and check. Names and the layout of weights
as in triton_kernels.py.
"""

import triton
import triton.language as tl

from compress.kernels.triton_kernels import load_words

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
    x, factor, norm, right,
    ORDER: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    x, values, scale, K, stride, norm,
    LARGEST: tl.constexpr, SIZE: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """One token x [K]: transformed in pieces of 2^LOG (0: as it is), then to int8 and its scale.

    values int8 [tokens, K] in [-LARGEST, LARGEST]; scale fp32 [tokens] = max |x| / LARGEST. The
    transformed token goes from registers to int8 and is never written.
    """
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    v = tl.load(x + token * stride + i, mask=i < K, other=0).to(tl.float32)
    v = _butterfly(v, SIZE, LOG) * norm
    largest = tl.max(tl.abs(v), 0)
    # a token of zeros has scale 0 and values 0
    q = (v * (LARGEST / tl.maximum(largest, 1e-30)) + ROUND) - ROUND
    tl.store(values + token * K + i, q.to(tl.int8), mask=i < K)
    tl.store(scale + token, largest / LARGEST)


@triton.jit
def _int8_codes(low, hi, c: tl.constexpr, z, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk c of a block as c - z in int8: words [ROWS, BLOCK_N] -> [CHUNK, BLOCK_N]."""
    ROWS: tl.constexpr = 16
    PART: tl.constexpr = 2 if BITS == 3 else BITS
    planes = c * (CHUNK // ROWS) + tl.arange(0, CHUNK // ROWS)[:, None, None]
    code = (low[None, :, :] >> (planes * PART)) & (2**PART - 1)
    if BITS == 3:
        code = code | (((hi[None, :, :] >> (planes * 2)) & 1) << 2)
    return (code.reshape(CHUNK, low.shape[1]) - z[None, :]).to(tl.int8)


@triton.jit
def integer_matmul_kernel(
    values, token_scale, words, high, scale, zero, bias, out, M, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of y = token_scale * (values W^T) + bias by int8 tensor cores, values int8 [M, K].

    Sums over a group, or over all of K with one scale per output, are int32 and exact. Programs and
    out as in matmul_kernel.
    """
    ROWS: tl.constexpr = 16
    PART: tl.constexpr = 2 if BITS == 3 else BITS
    BLOCK: tl.constexpr = ROWS * (32 // PART)
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    inside = n < N
    rows = m.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    whole = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for block in range(split, tl.cdiv(K, BLOCK), SPLIT):
        low, hi = load_words(words, high, block, n, N, BITS)
        for c in tl.static_range(BLOCK // CHUNK):
            k0 = block * BLOCK + c * CHUNK
            k = k0 + tl.arange(0, CHUNK)
            mask = (m < M)[:, None] & (k < K)[None, :]
            xs = tl.load(values + rows * K + k[None, :], mask=mask, other=0)
            group = min(k0, K - 1) // GROUP if GROUP > 0 else 0
            if HAS_ZERO:
                z = tl.load(zero + group * N + n, mask=inside, other=0).to(tl.int32)
            else:
                z = tl.full((BLOCK_N,), 2 ** (BITS - 1), tl.int32)
            w = _int8_codes(low, hi, c, z, BITS, CHUNK)
            if GROUP > 0:
                s = tl.load(scale + group * N + n, mask=inside, other=0).to(tl.float32)
                total += tl.dot(xs, w, out_dtype=tl.int32).to(tl.float32) * s[None, :]
            else:
                whole = tl.dot(xs, w, whole, out_dtype=tl.int32)
    if GROUP == 0:
        s = tl.load(scale + n, mask=inside, other=0).to(tl.float32)
        total = whole.to(tl.float32) * s[None, :]
    total *= tl.load(token_scale + m, mask=m < M, other=0)[:, None]
    if HAS_BIAS and SPLIT == 1:
        total += tl.load(bias + n, mask=inside, other=0).to(tl.float32)[None, :]
    at = (split * M + rows) * N + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & inside[None, :])
