"""The Triton kernels themselves: y = x W^T for packed weights with 16-bit or 32-bit activations.

Those of integer activations and Hadamard transforms: triton_activations.py.

Nothing here chooses or checks anything; matmul.py does. Common to all:

    x [M, K], row stride given; words, high: layout.py; scale [G, N]; zero uint8 [G, N]; bias [N]
    BITS     width of a code; PART of its bits lie in `words` (2 of 3, else all), PLANES = 32 / PART
    GROUP    inputs that share a scale, 0 for one scale per output
    CHUNK    gcd(block, GROUP, 128) inputs: what is multiplied before a scale is applied

Codes meet the activations as the exact integers c - z, and scales are applied to fp32 sums. That
is one multiplication per output and chunk in place of one per weight, and it rounds nothing that
the file holds. Symmetric weights have z = 2^(BITS-1) as a constant, and no zero tensor is read.

Without a GPU these run under TRITON_INTERPRET=1, set before triton is imported; bf16 arithmetic is
wrong there, so launchers refuse it.
"""

import triton
import triton.language as tl

# 2^23 as fp32 bits: OR a code of fewer than 24 bits into them, and the float is 2^23 + code.
MAGIC: tl.constexpr = tl.constexpr(0x4B000000)


@triton.jit
def _zero_point(zero, at, inside, BITS: tl.constexpr, HAS_ZERO: tl.constexpr):
    """z of each output as fp32 [BLOCK_N], at offsets `at` of the zero tensor."""
    if HAS_ZERO:
        z = tl.load(zero + at, mask=inside, other=0).to(tl.float32)
    else:
        z = tl.full(at.shape, 2 ** (BITS - 1), tl.float32)
    return z


@triton.jit
def _integers(
    low, hi, c: tl.constexpr, z, dtype: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr
):
    """Chunk c of a block as c - z in `dtype`: words [ROWS, BLOCK_N] -> [CHUNK, BLOCK_N].

    Planes follow each other along the first axis, so that row k is input k of the chunk.
    """
    ROWS: tl.constexpr = 16
    PART: tl.constexpr = 2 if BITS == 3 else BITS
    planes = c * (CHUNK // ROWS) + tl.arange(0, CHUNK // ROWS)[:, None, None]
    code = (low[None, :, :] >> (planes * PART)) & (2**PART - 1)
    if BITS == 3:
        code = code | (((hi[None, :, :] >> (planes * 2)) & 1) << 2)
    code = code.reshape(CHUNK, low.shape[1])
    # Putting a code into the mantissa of 1024 (or of 128) converts it without a conversion
    # instruction, which has a quarter of the throughput of the rest on most GPUs.
    if dtype == tl.float16:
        values = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
        integers = values - (z + 1024).to(tl.float16)[None, :]
    elif dtype == tl.bfloat16 and BITS < 8:
        values = (code | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
        integers = values - (z + 128).to(tl.bfloat16)[None, :]
    else:
        integers = (code.to(tl.float32) - z[None, :]).to(dtype)
    return integers


@triton.jit
def load_words(words, high, block, n, N, BITS: tl.constexpr):
    """The words of a block, and of 3 bits its high bits shifted to bits 0, 2, 4, ..."""
    ROWS: tl.constexpr = 16
    r = tl.arange(0, ROWS)
    inside = (n < N)[None, :]
    at = (block * ROWS + r)[:, None] * N + n[None, :]
    low = tl.load(words + at, mask=inside, other=0, eviction_policy="evict_first")
    hi = low
    if BITS == 3:
        at = ((block // 2) * ROWS + r)[:, None] * N + n[None, :]
        hi = tl.load(high + at, mask=inside, other=0) >> (block % 2)
    return low, hi


@triton.jit
def _whole_codes(low, hi):
    """3-bit codes put together, 8 to a word, 4 bits apart: of the even planes, of the odd ones."""
    even = (low & 0x33333333) | ((hi << 2) & 0x44444444)
    odd = ((low >> 2) & 0x33333333) | (hi & 0x44444444)
    return even, odd


@triton.jit
def _decode_plane(low, hi, z, xk, part, j: tl.constexpr, BITS: tl.constexpr):
    """part + (c - z) x of plane j: fp32 [ROWS, BLOCK_N]. Of 3 bits, low and hi are whole codes.

    The code is left at its place s in the word, as c 2^s in the mantissa of 2^23, and x is divided
    by 2^s instead: one AND-OR and one subtraction per weight, no shift, no conversion. Codes that
    would lie above bit 22 come from the word shifted once for several planes.
    """
    APART: tl.constexpr = 4 if BITS == 3 else BITS
    AT: tl.constexpr = j // 2 if BITS == 3 else j
    PER: tl.constexpr = (23 - BITS) // APART + 1  # codes below bit 23, without another shift
    BASE: tl.constexpr = (AT // PER) * PER
    S: tl.constexpr = (AT - BASE) * APART
    word = hi if BITS == 3 and j % 2 == 1 else low
    field = ((word >> (BASE * APART)) & ((2**BITS - 1) << S)) | MAGIC
    value = field.to(tl.float32, bitcast=True) - (z * (2**S) + 8388608.0)[None, :]
    # fma by name: whether a product and a sum become one is an option that differs by version
    return tl.fma(value, tl.broadcast_to((xk * (1.0 / 2**S))[:, None], value.shape), part)


@triton.jit
def decode_kernel(
    x, words, high, scale, zero, bias, out, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row of x. Program (i, s): outputs of tile i, blocks s, s + SPLIT, ... of the inputs.

    out is y [N], or the fp32 workspace [SPLIT, N] if SPLIT > 1. No tensor core: the row would fill
    one sixteenth of it.
    """
    ROWS: tl.constexpr = 16
    PART: tl.constexpr = 2 if BITS == 3 else BITS
    BLOCK: tl.constexpr = ROWS * (32 // PART)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    inside = n < N
    r = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for block in range(split, tl.cdiv(K, BLOCK), SPLIT):
        low, hi = load_words(words, high, block, n, N, BITS)
        if BITS == 3:
            low, hi = _whole_codes(low, hi)
        for c in tl.static_range(BLOCK // CHUNK):
            k0 = block * BLOCK + c * CHUNK
            group = min(k0, K - 1) // GROUP if GROUP > 0 else 0
            s = tl.load(scale + group * N + n, mask=inside, other=0).to(tl.float32)
            z = _zero_point(zero, group * N + n, inside, BITS, HAS_ZERO)
            part = tl.zeros((ROWS, BLOCK_N), tl.float32)
            for p in tl.static_range(CHUNK // ROWS):
                k = k0 + p * ROWS + r
                xk = tl.load(x + k, mask=k < K, other=0).to(tl.float32)
                part = _decode_plane(low, hi, z, xk, part, c * (CHUNK // ROWS) + p, BITS)
            total += part * s[None, :]
    y = tl.sum(total, 0)
    if HAS_BIAS and SPLIT == 1:
        y += tl.load(bias + n, mask=inside, other=0).to(tl.float32)
    tl.store(out + split * N + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def matmul_kernel(
    x, words, high, scale, zero, bias, out, M, N, K, stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_M, BLOCK_N] of y by tensor cores; program (tile, s) takes every SPLIT-th block.

    out is y [M, N], or the fp32 workspace [SPLIT, M, N] if SPLIT > 1. Programs next to each other
    share a tile of weights, which then comes from the cache for all but one.
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
    for block in range(split, tl.cdiv(K, BLOCK), SPLIT):
        low, hi = load_words(words, high, block, n, N, BITS)
        for c in tl.static_range(BLOCK // CHUNK):
            k0 = block * BLOCK + c * CHUNK
            k = k0 + tl.arange(0, CHUNK)
            mask = (m < M)[:, None] & (k < K)[None, :]
            xs = tl.load(x + rows * stride + k[None, :], mask=mask, other=0)
            group = min(k0, K - 1) // GROUP if GROUP > 0 else 0
            z = _zero_point(zero, group * N + n, inside, BITS, HAS_ZERO)
            w = _integers(low, hi, c, z, xs.dtype, BITS, CHUNK)
            if GROUP > 0:
                s = tl.load(scale + group * N + n, mask=inside, other=0).to(tl.float32)
                total += tl.dot(xs, w, input_precision="ieee") * s[None, :]
            else:
                total = tl.dot(xs, w, total, input_precision="ieee")
    if GROUP == 0:
        total *= tl.load(scale + n, mask=inside, other=0).to(tl.float32)[None, :]
    if HAS_BIAS and SPLIT == 1:
        total += tl.load(bias + n, mask=inside, other=0).to(tl.float32)[None, :]
    at = (split * M + rows) * N + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & inside[None, :])


@triton.jit
def reduce_kernel(
    workspace, bias, out, N, size,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = sum of workspace [SPLIT, size] over SPLIT, always in the same order, plus bias [N]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    y = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLIT):
        y += tl.load(workspace + split * size + i, mask=inside, other=0)
    if HAS_BIAS:
        y += tl.load(bias + i % N, mask=inside, other=0).to(tl.float32)
    tl.store(out + i, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(
    words, high, scale, zero, out, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [K, N] = the weight's transpose, rounded once; program (block, tile of outputs)."""
    ROWS: tl.constexpr = 16
    PART: tl.constexpr = 2 if BITS == 3 else BITS
    BLOCK: tl.constexpr = ROWS * (32 // PART)
    block = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    low, hi = load_words(words, high, block, n, N, BITS)
    for c in tl.static_range(BLOCK // CHUNK):
        k0 = block * BLOCK + c * CHUNK
        group = min(k0, K - 1) // GROUP if GROUP > 0 else 0
        s = tl.load(scale + group * N + n, mask=inside, other=0).to(tl.float32)
        z = _zero_point(zero, group * N + n, inside, BITS, HAS_ZERO)
        w = _integers(low, hi, c, z, tl.float32, BITS, CHUNK) * s[None, :]
        k = k0 + tl.arange(0, CHUNK)
        mask = (k < K)[:, None] & inside[None, :]
        at = k.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out + at, w.to(out.dtype.element_ty), mask=mask)
