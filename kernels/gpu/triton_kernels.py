"""The Triton kernels themselves: y = x W^T for packed weights with 16-bit or 32-bit activations.

Those of integer activations and Hadamard transforms: triton_activations.py.

Nothing here chooses or checks anything; matmul.py does. Common to all:

    x [M, K], row stride given; words, high: layout.py; scale [G, N]; zero uint8 [G, N]; bias [N]
    BITS     width of a code
    GROUP    inputs that share a scale, 0 for one scale per output
    CHUNK    inputs that are multiplied at once, a divisor of the block
    STEP     those of them that share a scale: less than CHUNK only for groups of 8, 16, 24, 48, ...
    WARPS    warps that divide the outputs of a tile among them

The weight is the left operand, W x^T, and outputs are the rows of a tile. Tensor cores take their
left operand from registers, and `words` has for each thread the codes that the thread multiplies.
So a code is loaded, shifted, masked and made a float where it is used, and exchanged with no other
thread: what the reshapes and permutations below say is who holds what, and no instruction. They
hold for the fragments of `mma` and of Hopper's `wgmma`; elsewhere the compiler moves data, and
results stay the same.

Codes meet the activations as the exact integers c - z. Symmetric weights have z = 2^(BITS-1) as a
constant, and no zero tensor is read.

Without a GPU these run under TRITON_INTERPRET=1, set before triton is imported; bf16 arithmetic is
wrong there, so launchers refuse it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Of every launch: whether a product and a sum are made one instruction differs by version, and with
# it the last bit of a result. Kernels say fma where they mean it.
FIXED_OPTIONS = {"enable_fp_fusion": False}

# A code in the low mantissa bits of these is 1024, 128 or 2^23 plus the code: a float without a
# conversion, which has a quarter of the throughput of other instructions on most GPUs.
MAGIC_FP16: tl.constexpr = tl.constexpr(0x6400)
MAGIC_BF16: tl.constexpr = tl.constexpr(0x4300)
MAGIC_FP32: tl.constexpr = tl.constexpr(0x4B000000)
PREFETCHED: tl.constexpr = tl.constexpr(4)  # blocks of words
SETTLE: tl.constexpr = tl.constexpr(
    tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)
    and not triton.knobs.runtime.interpret
)


@triton.jit
def _share(words, start, first, N, EACH: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """EACH words of every output of a tile, [BLOCK_N / (16 WARPS), 2, WARPS, 8, EACH].

    Output 16 (WARPS a + w) + 8 h + r at place [a, h, w, r]: rows r and r + 8 are one thread's.
    """
    EIGHT: tl.constexpr = 8 * EACH
    i = tl.arange(0, BLOCK_N * EACH)
    eight = (i // (2 * EIGHT * WARPS)) * WARPS + (i // EIGHT) % WARPS
    at = (2 * eight + (i // (EIGHT * WARPS)) % 2) * EIGHT + i % EIGHT
    inside = first * EACH + at < N * EACH
    loaded = tl.load(words + start * EACH + at, mask=inside, other=0, eviction_policy="evict_first")
    return loaded.reshape(BLOCK_N // (16 * WARPS), 2, WARPS, 8, EACH)


@triton.jit
def load_words(
    words, high, block, first, N, BITS: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr
):
    """The words of outputs first, ..., first + BLOCK_N - 1 and one block of inputs.

    Twice [BLOCK_N / (16 WARPS), 2, WARPS, 8, 4, 4]: of 3 bits put together, eight codes to a word,
    four bits apart, with even t (layout.py) and with odd t; of other widths both are the words.
    """
    REST: tl.constexpr = BLOCK_N // (16 * WARPS)
    start = (block * N + first).to(tl.int64)
    low = _share(words, start, first, N, 16, BLOCK_N, WARPS).reshape(REST, 2, WARPS, 8, 4, 4)
    even = low
    odd = low
    if BITS == 3:
        hi = _share(high, start, first, N, 8, BLOCK_N, WARPS).reshape(REST, 2, WARPS, 8, 4, 2, 1)
        hi = hi.broadcast_to(REST, 2, WARPS, 8, 4, 2, 2).reshape(REST, 2, WARPS, 8, 4, 4)
        hi = hi << (2 - 2 * (tl.arange(0, 4) % 2))[None, None, None, None, None, :]
        even = (low & 0x33333333) | (hi & 0x44444444)
        odd = ((low >> 2) & 0x33333333) | ((hi >> 1) & 0x44444444)
    return even, odd


@triton.jit
def by_output(values, BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """values [BLOCK_N] where the words of these outputs are: [1, ..., 2, WARPS, 8, 1, 1]."""
    places = values.reshape(BLOCK_N // (16 * WARPS), WARPS, 2, 8).permute(0, 2, 1, 3)
    return places[None, :, :, :, :, None, None]


@triton.jit
def code_pairs(
    even, odd, c: tl.constexpr, magic: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr
):
    """Chunk c of a block: words with two codes each, of neighbouring inputs, at bits 0 and 16.

    [CHUNK / 32] and the shape of `even`; `magic` is set in all of them.
    """
    T: tl.constexpr = CHUNK // 32
    MASK: tl.constexpr = (2**BITS - 1) * 0x10001
    if BITS != 3:
        t = (c * T + tl.arange(0, T))[:, None, None, None, None, None, None]
        pair = ((even[None] >> (t * BITS)) & MASK) | magic
    elif T == 1:
        word = even if c % 2 == 0 else odd
        pair = ((word[None] >> (c // 2 * 4)) & MASK) | magic
    else:
        u = (c * (T // 2) + tl.arange(0, T // 2))[:, None, None, None, None, None, None]
        first = ((even[None] >> (u * 4)) & MASK) | magic
        second = ((odd[None] >> (u * 4)) & MASK) | magic
        both = tl.join(first, second).permute(0, 7, 1, 2, 3, 4, 5, 6)
        pair = both.reshape(
            T,
            even.shape[0],
            even.shape[1],
            even.shape[2],
            even.shape[3],
            even.shape[4],
            even.shape[5],
        )
    return pair


@triton.jit
def as_tile(a, b, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """What was made of the two codes of each pair, as the tile [BLOCK_N, CHUNK] of the weight."""
    both = tl.join(a, b)
    fields = both.reshape(CHUNK // 32, BLOCK_N // (16 * WARPS), 2, WARPS, 8, 4, 2, 2, 2)
    return fields.permute(1, 3, 2, 4, 0, 6, 7, 5, 8).reshape(BLOCK_N, CHUNK)


@triton.jit
def _floats(
    even, odd, c: tl.constexpr, z, s, dtype: tl.constexpr,
    BITS: tl.constexpr, CHUNK: tl.constexpr, HAS_ZERO: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Chunk c of a block, [BLOCK_N, CHUNK] in `dtype`: c - z, or (c - z) s rounded once if SCALED.

    z and s [BLOCK_N]. A zero point is taken off the integer: MAGIC + 2^BITS + c - z is positive.
    """
    OFFSET: tl.constexpr = 2**BITS if HAS_ZERO else 2 ** (BITS - 1)
    if dtype == tl.float16 or (dtype == tl.bfloat16 and BITS < 8):
        HALF: tl.constexpr = MAGIC_FP16 if dtype == tl.float16 else MAGIC_BF16
        ONE: tl.constexpr = 1024.0 if dtype == tl.float16 else 128.0
        if HAS_ZERO:
            up = by_output(-z * 0x10001 + (HALF + OFFSET) * 0x10001, BLOCK_N, WARPS)
            pair = code_pairs(even, odd, c, 0, BITS, CHUNK) + up
        else:
            pair = code_pairs(even, odd, c, HALF * 0x10001, BITS, CHUNK)
        a = pair.to(tl.int16).to(dtype, bitcast=True) - (ONE + OFFSET)
        b = (pair >> 16).to(tl.int16).to(dtype, bitcast=True) - (ONE + OFFSET)
    else:
        pair = code_pairs(even, odd, c, 0, BITS, CHUNK)
        up = MAGIC_FP32
        if HAS_ZERO:
            up = by_output(-z + (MAGIC_FP32 + OFFSET), BLOCK_N, WARPS)
        a = ((pair & 0xFF) + up).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)
        b = (((pair >> 16) & 0xFF) + up).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)
    if SCALED:
        places = by_output(s, BLOCK_N, WARPS)
        if s.dtype != a.dtype:  # 16-bit integers and a wider scale
            a, b, places = a.to(tl.float32), b.to(tl.float32), places.to(tl.float32)
        a, b = a * places, b * places
    return as_tile(a.to(dtype), b.to(dtype), CHUNK, BLOCK_N, WARPS)


@triton.jit
def load_rows(values, first, N, BLOCK_N: tl.constexpr):
    """values[first], ... of a tile's outputs, [BLOCK_N], 0 beyond N; from half as many addresses.

    A tensor of fewer elements than threads is loaded by each thread that needs it. A larger one
    would be loaded once and exchanged, between two barriers.
    """
    i = tl.arange(0, BLOCK_N // 2)
    n = first + (i // 8) * 16 + i % 8
    upper = tl.load(values + n, mask=n < N, other=0)
    lower = tl.load(values + n + 8, mask=n + 8 < N, other=0)
    return tl.join(upper, lower).reshape(BLOCK_N // 16, 8, 2).permute(0, 2, 1).reshape(BLOCK_N)


@triton.jit
def load_zero(
    zero, group, first, N, BITS: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr
):
    """z of each output of a tile in a group, int32 [BLOCK_N]."""
    if HAS_ZERO:
        z = load_rows(zero + group * N, first, N, BLOCK_N).to(tl.int32)
    else:
        z = tl.full((BLOCK_N,), 2 ** (BITS - 1), tl.int32)
    return z


@triton.jit
def load_activations(
    x,
    rows,
    stride,
    k0,
    M,
    K,
    CHUNK: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """x^T of a tile's rows, [CHUNK, BLOCK_M]: inputs from k0, zero beyond K.

    Rows beyond M: the last row again, which spares the mask, or 0 in the smallest tiles, where
    reading it more than once would cost as much as the weight.
    """
    k = k0 + tl.arange(0, CHUNK)
    if BLOCK_M <= 16:
        at = x + rows.to(tl.int64)[None, :] * stride + k[:, None]
        mask = (rows < M)[None, :]
        if not EVEN:
            mask = mask & (k < K)[:, None]
        xs = tl.load(at, mask=mask, other=0)
    else:
        at = x + tl.minimum(rows, M - 1).to(tl.int64)[None, :] * stride + k[:, None]
        xs = tl.load(at) if EVEN else tl.load(at, mask=(k < K)[:, None], other=0)
    return xs


@triton.jit
def settled(sums):
    """The sums once all products that make them have ended, where SETTLE says that none may go on.

    Triton before 3.7 leaves Hopper's products running while the registers of their left operand get
    the next weights (its issue 9433). It waits for a product whose sums are looked at.
    """
    if SETTLE:
        if sums.dtype == tl.float32:
            sums = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [sums], tl.float32, True, 1)
        else:
            sums = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [sums], tl.int32, True, 1)
    return sums


@triton.jit
def _prefetch(words, share, split, first, N, blocks, BLOCK_N: tl.constexpr):
    """Brings a program's first words into the second-level cache; nothing else writes them."""
    LINE: tl.constexpr = 32  # words of a cache line
    i = tl.arange(0, PREFETCHED * BLOCK_N * 16 // LINE)
    block = share + i // (BLOCK_N * 16 // LINE) * split
    at = (block * N + first).to(tl.int64) * 16 + i % (BLOCK_N * 16 // LINE) * LINE
    at = tl.maximum(tl.minimum(at, (blocks * N).to(tl.int64) * 16 - LINE), 0)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [words + at], tl.int32, False, 1
    )


@triton.jit(do_not_specialize=["M", "split"])
def matmul_kernel(
    x, words, high, scale, zero, bias, out, M, N, K, stride, split,
    BITS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
    EVEN: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_M, BLOCK_N] of y by tensor cores; program (tile, s) takes every split-th block.

    out is y [M, N], or the fp32 workspace [split, M, N]. A scale multiplies the fp32 sum of its
    group, so that nothing of what the file holds is rounded; SCALED, for many rows, multiplies the
    weights instead and rounds each once. Programs next to each other share a tile of weights, which
    then comes from the cache for all but one. EVEN: K is a multiple of the block. EARLY: launched
    before the kernel in front of it ends, which may write x and read what out had held.
    """
    BLOCK: tl.constexpr = 16 * (32 // (2 if BITS == 3 else BITS))
    STEPS: tl.constexpr = CHUNK // STEP
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) // tiles_m) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    share = tl.program_id(1)
    inside = n < N
    if EARLY:
        _prefetch(words, share, split, first, N, tl.cdiv(K, BLOCK), BLOCK_N)
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # A scale is loaded one step before it is used: nothing else hides how long that takes.
    group = min(share * BLOCK, K - 1) // GROUP if GROUP > 0 else 0
    next_scale = load_rows(scale + group * N, first, N, BLOCK_N)
    for block in range(share, tl.cdiv(K, BLOCK), split):
        even, odd = load_words(words, high, block, first, N, BITS, BLOCK_N, WARPS)
        for i in tl.static_range(BLOCK // STEP):
            k0 = block * BLOCK + i * STEP
            if i % STEPS == 0:
                xs = load_activations(x, m, stride, k0, M, K, CHUNK, EVEN, BLOCK_M)
            s = next_scale
            group = 0
            if GROUP > 0:
                group = min(k0, K - 1) // GROUP
                after = k0 + STEP if i + 1 < BLOCK // STEP else (block + split) * BLOCK
                next_group = min(after, K - 1) // GROUP
                next_scale = load_rows(scale + next_group * N, first, N, BLOCK_N)
            z = load_zero(zero, group, first, N, BITS, HAS_ZERO, BLOCK_N)
            w = _floats(
                even, odd, i // STEPS, z, s, xs.dtype,
                BITS, CHUNK, HAS_ZERO, SCALED, BLOCK_N, WARPS,
            )  # fmt: skip
            if STEP < CHUNK:  # the weights of the other steps meet nothing
                step = (tl.arange(0, CHUNK) // STEP == i % STEPS)[None, :]
                w = tl.where(step, w, tl.zeros((BLOCK_N, CHUNK), w.dtype))
            if GROUP > 0 and not SCALED:
                part = tl.dot(w, xs, input_precision="ieee")
                total = tl.fma(part, tl.broadcast_to(s.to(tl.float32)[:, None], part.shape), total)
            else:
                total = settled(tl.dot(w, xs, total, input_precision="ieee"))
    if GROUP == 0 and not SCALED:
        total *= next_scale.to(tl.float32)[:, None]
    if HAS_BIAS:
        total += load_rows(bias, first, N, BLOCK_N).to(tl.float32)[:, None]
    at = (share * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < M)[None, :] & inside[:, None])


@triton.jit(do_not_specialize=["split"])
def reduce_kernel(
    workspace, bias, out, N, size, split,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out = sum of workspace [split, size] over split, always in the same order, plus bias [N].

    MOST: a power of two that split does not exceed. All parts are on their way before any is added.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    share = tl.arange(0, MOST)
    # an offset of all shares may have no place in 32 bits
    at = share.to(tl.int64)[:, None] * size + i[None, :]
    y = tl.sum(tl.load(workspace + at, (share < split)[:, None] & inside[None, :], other=0), 0)
    if HAS_BIAS:
        y += tl.load(bias + i % N, mask=inside, other=0).to(tl.float32)
    tl.store(out + i, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(
    words, high, scale, zero, out, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
    HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """out [N, K] = the weight, each entry rounded once; program (tile of outputs, block)."""
    BLOCK: tl.constexpr = 16 * (32 // (2 if BITS == 3 else BITS))
    STEPS: tl.constexpr = CHUNK // STEP
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    inside = n < N
    even, odd = load_words(words, high, block, first, N, BITS, BLOCK_N, WARPS)
    for i in tl.static_range(BLOCK // STEP):
        k = block * BLOCK + (i // STEPS) * CHUNK + tl.arange(0, CHUNK)
        group = min(block * BLOCK + i * STEP, K - 1) // GROUP if GROUP > 0 else 0
        s = load_rows(scale + group * N, first, N, BLOCK_N)
        z = load_zero(zero, group, first, N, BITS, HAS_ZERO, BLOCK_N)
        w = _floats(
            even, odd, i // STEPS, z, s.to(tl.float32), tl.float32,
            BITS, CHUNK, HAS_ZERO, True, BLOCK_N, WARPS,
        )  # fmt: skip
        mask = inside[:, None] & (k < K)[None, :]
        if STEP < CHUNK:
            mask = mask & (tl.arange(0, CHUNK) // STEP == i % STEPS)[None, :]
        at = n.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(out + at, w.to(out.dtype.element_ty), mask=mask)
