// y = x W^T for weights in the "tiles" layout of tiles.py; native.py compiles it where it runs.
//
//     packed [tiles, ceil(K / 2), 16 * BITS bytes]: inputs k, k + 1 of 64 outputs. Number i of 16 holds
//     those of outputs i, 16 + i, 32 + i, 48 + i, low bits first, least byte first:
//         8 bits   16 numbers of 4 bytes, of k; then those of k + 1
//         4 bits   16 numbers of 4 bytes: k in the lower half, k + 1 in the upper one
//         3 bits   of 3 bytes, the same: first the lower two of all, then the third of all
//         2 bits   of 2 bytes, the same
//     scale [G, N] fp32, bf16 or fp16; zero [G, N] bytes, or null and z = MIDDLE everywhere
//     y [M, N] = sum over g of scale_g * sum over k in group g of x[m, k] * (c[k, n] - z_g[n])
//
// Codes meet x as the exact integers c - z, a scale meets the fp32 sum of its group: nothing that
// the file holds is rounded. Sums run in one order whatever the number of threads.
//
// Codes of 64 outputs are expanded as they are loaded, and multiplied at once by up to six rows of
// x, which are interleaved first, so that they are read in a stream; if there are more rows, what
// was expanded stays in the first-level cache for them, CHUNK inputs at a time. bf16 is multiplied
// as pairs of inputs where the processor does that (AVX512-BF16), else x comes as fp32.
//
// Instructions by name are only the bf16 product, the lookups (AVX-512) that turn symmetric codes of
// up to 4 bits into c - z at once, and loads. Elsewhere a code becomes a float where it lies in its
// byte: put into the low bits of 2^23, times 2^at for the `at` bits below it; 2^23 + z 2^at is
// subtracted, which leaves (c - z) 2^at, exactly, and the scale of the sum is 2^-at times the file's.

#include "vectors.h"

namespace {

constexpr int CHUNK = PANEL == PARTS ? 128 : 64;  // inputs expanded at a time: 32 or 16 KB in fp32
constexpr int ROWS = 128;   // rows of x that share an expanded block: 32 KB of sums
constexpr int AHEAD = 128;  // pairs of inputs between what is loaded and what is fetched

struct Problem : Weight {
    const uint32_t* x;  // as `arrange` leaves it
    bool pairs;
    float* y;
    long M;
};

// ---- codes to integers --------------------------------------------------------------------------

// Of symmetric codes of 2, 3 and 4 bits, c - z is looked up. An index may have anything above the
// code: tables repeat.
#if defined(__AVX512BW__)
constexpr bool LOOKUP = true;
inline ints look_up(ints table, ints at) {  // fp32: entry at % 16
    return (ints)_mm512_permutexvar_epi32((__m512i)at, (__m512i)table);
}
inline ints look_up_pairs(ints table, ints at) {  // bf16, each half of a lane: entry at % 32
    return (ints)_mm512_permutexvar_epi16((__m512i)at, (__m512i)table);
}
#else
constexpr bool LOOKUP = false;  // and these are never called
inline ints look_up(ints table, ints) { return table; }
inline ints look_up_pairs(ints table, ints) { return table; }
#endif

// Where in the part of its input the code of field f begins, 16 outputs side by side. Of 8 bits, two
// fields are moved to where the first two are.
template <int BITS>
constexpr int lowest(int f) {
    return BITS == 8 ? f % 2 * 8 : f * BITS;
}

// The numbers of LANES outputs, whole; of 8 bits those of one input.
template <int BITS>
inline ints load(const uint8_t* from, int part) {
    if constexpr (BITS == 2) return widen_pairs(from + 2 * LANES * part);
    if constexpr (BITS == 3)
        return widen_pairs(from + 2 * LANES * part) | widen(from + 2 * FIELD + LANES * part) << 16;
    ints v;
    std::memcpy(&v, from + 4 * LANES * part, sizeof v);
    return v;
}

template <int BITS>
constexpr int32_t mask(int f) {
    return ((1 << BITS) - 1) << lowest<BITS>(f);
}

constexpr int32_t ABOVE = 0x4b000000;  // 2^23 in fp32: the lowest bit of its mantissa is 1

// Calls use(k, f, v) for two inputs k and the PARTS vectors f of their outputs, where v are the floats
// (c - z) 2^at, and z[f] holds 2^23 + z 2^at. Each is used as soon as it is there: together they would
// not fit the registers.
template <int BITS, class Use>
inline void each_integer(const uint8_t* from, const ints* z, Use use) {
    ints whole[SPAN];
    for (int part = 0; part < SPAN; part++) whole[part] = load<BITS>(from, part);
    for (int k = 0; k < 2; k++)
        for (int part = 0; part < SPAN; part++) {
            if (BITS == 8 && k == 1) whole[part] = load<BITS>(from + 4 * FIELD, part);
            for (int first = 0; first < 4; first += BITS == 8 ? 2 : 4) {
                const int down = BITS == 8 ? 8 * first : 4 * BITS * k;
                ints b = (down ? whole[part] >> down : whole[part]) | ABOVE;
                in_register(b);  // or the compiler would do this again for each field
                for (int f = first; f < first + (BITS == 8 ? 2 : 4); f++) {
                    const int to = f * SPAN + part;
                    use(k, to, as_floats(b & (mask<BITS>(f) | ABOVE)) - as_floats(z[to]));
                }
            }
        }
}

// Codes of up to 4 bits as an index of a lookup: at the lowest bits, anything above them.
template <int BITS>
inline void indices(const uint8_t* from, ints (*c)[PARTS]) {
    const ints b = load<BITS>(from, 0);
    for (int k = 0; k < 2; k++)
        for (int f = 0; f < PARTS; f++) c[k][f] = b >> (4 * BITS * k + lowest<BITS>(f));
}

// The same of two inputs, the earlier one's in the low half of a lane.
template <int BITS>
inline void index_pairs(const uint8_t* from, ints* c) {
    ints b = load<BITS>(from, 0);
    if constexpr (BITS < 4) b = (b & 0xffff) | (b << (16 - 4 * BITS) & ~0xffff);
    for (int f = 0; f < PARTS; f++) c[f] = b >> lowest<BITS>(f);
}

// What turns the codes of 64 outputs in a group into integers: a table of fp32 and one of bf16 if
// TABLE, else 2^23 + z 2^at.
template <int BITS, bool TABLE>
inline void group_zero(const Problem& p, long g, long n, ints* v) {
    if constexpr (TABLE) {
        alignas(BYTES) uint32_t whole[LANES];
        alignas(BYTES) uint16_t upper[2 * LANES];
        for (int i = 0; i < 2 * LANES; i++) {
            const float value = float((i & ((1 << BITS) - 1)) - p.middle);
            std::memcpy(whole + i % LANES, &value, sizeof value);
            upper[i] = whole[i % LANES] >> 16;
        }
        std::memcpy(v, whole, sizeof whole);
        std::memcpy(v + 1, upper, sizeof upper);
    } else {
        p.zeros(g, n, v);
        for (int f = 0; f < PARTS; f++) v[f] = (v[f] << lowest<BITS>(f / SPAN)) | ABOVE;
    }
}

// The scales of 64 outputs in a group, for sums of (c - z) 2^at.
template <int BITS, bool TABLE>
inline void group_scales(const Problem& p, long g, long n, floats* s) {
    p.scales(g, n, s);
    if constexpr (!TABLE)
        for (int f = 0; f < PARTS; f++) s[f] *= 1.0f / (1 << lowest<BITS>(f / SPAN));
}

// c - z, or (c - z) 2^at, of two inputs, 64 outputs each, as the bits of fp32.
template <int BITS, bool TABLE>
inline void integers(const uint8_t* from, const ints* z, ints (*v)[PARTS]) {
    if constexpr (TABLE) {
        indices<BITS>(from, v);
        for (int k = 0; k < 2; k++)
            for (int f = 0; f < PARTS; f++) v[k][f] = look_up(z[0], v[k][f]);
    } else {
        each_integer<BITS>(from, z, [&](int k, int f, floats c) { v[k][f] = (ints)c; });
    }
}

// The same as pairs of bf16, the earlier input in the low half.
template <int BITS, bool TABLE>
inline void integer_pairs(const uint8_t* from, const ints* z, ints* v) {
    if constexpr (TABLE) {
        ints c[PARTS];
        index_pairs<BITS>(from, c);
        for (int f = 0; f < PARTS; f++) v[f] = look_up_pairs(z[1], c[f]);
    } else {
        ints w[2][PARTS];
        integers<BITS, false>(from, z, w);
        for (int f = 0; f < PARTS; f++)  // up to 8 bits are whole in the upper half of an fp32
            v[f] = ((w[0][f] >> 16) & 0xffff) | (w[1][f] & int32_t(0xffff0000));
    }
}

// ---- rows of x ----------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
constexpr bool BF16_PAIRS = true;
#else
constexpr bool BF16_PAIRS = false;
#endif

// Rows [m, m + rows) of x as `multiply` reads them: for each two inputs all rows, pairs of bf16 or
// fp32, those of the first input first. An odd last input has a partner of 0.
void arrange(const void* x, bool pairs, long m, int rows, long K, uint32_t* out) {
    const uint16_t* halves = static_cast<const uint16_t*>(x) + (pairs ? m * K : 0);
    const uint32_t* words = static_cast<const uint32_t*>(x) + (pairs ? 0 : m * K);
    for (long k = 0; k < K; k += 2) {
        const bool both = k + 1 < K;
        if (pairs) {
            for (long at = k; at < rows * K; at += K)
                *out++ = halves[at] | (both ? uint32_t(halves[at + 1]) << 16 : 0);
        } else {
            for (long at = k; at < rows * K; at += K) *out++ = words[at];
            for (long at = k + 1; at < rows * K + 1; at += K) *out++ = both ? words[at] : 0;
        }
    }
}

void arrange_all(const void* x, bool pairs, long M, long K, uint32_t* out, int threads) {
    const long width = (K + 1) / 2 * (pairs ? 1 : 2);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long m0 = 0; m0 < M; m0 += ROWS) {
        const Blocks blocks(M - m0 < ROWS ? M - m0 : ROWS);
        long m = m0;
        for (int block = 0; block < blocks.count; m += blocks.size(block++))
            arrange(x, pairs, m, blocks.size(block), K, out + m * width);
    }
}

// to[64] += the two products of a pair of x and pairs of weights, all bf16
inline void add_pairs(floats* to, uint32_t x, const ints* w) {
#if defined(__AVX512BF16__)
    const __m512bh xs = (__m512bh)_mm512_set1_epi32(int(x));
    for (int f = 0; f < PARTS; f++)
        to[f] = (floats)_mm512_dpbf16_ps((__m512)to[f], xs, (__m512bh)w[f]);
#endif
}

// ---- one row of x -------------------------------------------------------------------------------

// Sums of even and odd inputs apart, where there are too few vectors of outputs to hide how long a
// product takes.
constexpr int CHAINS = PARTS < 8 ? 2 : 1;

template <int BITS, bool TABLE, bool PAIRS>
void one_row(const Problem& p, long tile) {
    const uint32_t* x = p.x;
    const uint8_t* from = p.packed + tile * ((p.K + 1) / 2) * FIELD * BITS;
    floats total[PARTS] = {};
    ints z[PARTS];
    for (long start = 0; start < p.K; start += p.group) {
        const long stop = start + p.group < p.K ? start + p.group : p.K;
        floats part[CHAINS][PARTS] = {}, s[PARTS];
        if (start == 0 || p.zero) group_zero<BITS, TABLE>(p, start / p.group, tile * WIDE, z);
        for (long k = start; k < stop; k += 2, from += FIELD * BITS) {
            if constexpr (PAIRS) {
                ints w[PARTS];
                integer_pairs<BITS, TABLE>(from, z, w);
                add_pairs(part[0], *x++, w);
            } else if constexpr (TABLE) {
                ints w[2][PARTS];
                integers<BITS, TABLE>(from, z, w);
                for (int i = 0; i < 2; i++, x++)
                    for (int f = 0; f < PARTS; f++)
                        part[i % CHAINS][f] += as_float(*x) * as_floats(w[i][f]);
            } else {
                each_integer<BITS>(from, z, [&](int i, int f, floats c) {
                    part[i % CHAINS][f] += as_float(x[i]) * c;
                });
                x += 2;
            }
        }
        group_scales<BITS, TABLE>(p, start / p.group, tile * WIDE, s);
        for (int f = 0; f < PARTS; f++)
            total[f] += (CHAINS == 1 ? part[0][f] : part[0][f] + part[CHAINS - 1][f]) * s[f];
    }
    std::memcpy(p.y + tile * WIDE, total, inside(tile * WIDE, p.N) * sizeof(float));
}

// ---- several rows -------------------------------------------------------------------------------

// Where the weights of a block are: packed at `from`, expanded in `block`, a panel after the other.
struct Weights {
    const uint8_t* from;
    const ints* z;
    ints* block;
};

// The weights of two inputs, `step` times two inputs into the block.
template <int BITS, bool TABLE, bool PAIRS>
inline void expand(const Weights& weights, int step) {
    const uint8_t* from = weights.from + long(step) * FIELD * BITS;
    for (int line = 0; line < FIELD * BITS; line += 64)
        __builtin_prefetch(from + AHEAD * FIELD * BITS + line);
    if constexpr (PAIRS) {
        integer_pairs<BITS, TABLE>(from, weights.z, weights.block + step * PARTS);
    } else {
        const auto put = [&](int i, int f, ints v) {
            weights.block[(f / PANEL * CHUNK + 2 * step + i) * PANEL + f % PANEL] = v;
        };
        if constexpr (TABLE) {
            ints w[2][PARTS];
            integers<BITS, TABLE>(from, weights.z, w);
            for (int i = 0; i < 2; i++)
                for (int f = 0; f < PARTS; f++) put(i, f, w[i][f]);
        } else {
            each_integer<BITS>(from, weights.z, [&](int i, int f, floats v) { put(i, f, (ints)v); });
        }
    }
}

// sums[MR][PARTS] += scale * (MR rows of x times a panel of the weights of 2 * `steps` inputs). The
// weights are expanded on the way, which takes a panel of all; with BITS 0 they are there already.
template <int MR, int BITS, bool TABLE, bool PAIRS>
void multiply(const uint32_t* x, int steps, const Weights& weights, const floats* s, floats* sums) {
    floats part[MR][PANEL] = {};
    constexpr int EACH = PAIRS ? 1 : 2;
    for (int step = 0; step < steps; step++) {
        if constexpr (BITS > 0) expand<BITS, TABLE, PAIRS>(weights, step);
        for (int i = 0; i < EACH; i++, x += MR) {
            ints once[PANEL];
            for (int f = 0; f < PANEL; f++)
                in_register(once[f] = weights.block[(EACH * step + i) * PANEL + f]);
            for (int r = 0; r < MR; r++) {
                if constexpr (PAIRS)
                    add_pairs(part[r], x[r], once);
                else
                    for (int f = 0; f < PANEL; f++)
                        part[r][f] += as_float(x[r]) * as_floats(once[f]);
            }
        }
    }
    for (int r = 0; r < MR; r++)
        for (int f = 0; f < PANEL; f++) sums[r * PARTS + f] += part[r][f] * s[f];
}

// `multiply` for a number of rows that is known only now.
template <int BITS, bool TABLE, bool PAIRS>
void multiply_rows(int rows, const uint32_t* x, int steps, const Weights& from, const floats* s,
                   floats* sums) {
    switch (rows) {
        case 1: return multiply<1, BITS, TABLE, PAIRS>(x, steps, from, s, sums);
        case 2: return multiply<2, BITS, TABLE, PAIRS>(x, steps, from, s, sums);
        case 3: return multiply<3, BITS, TABLE, PAIRS>(x, steps, from, s, sums);
        case 4: return multiply<4, BITS, TABLE, PAIRS>(x, steps, from, s, sums);
        case 5: return multiply<5, BITS, TABLE, PAIRS>(x, steps, from, s, sums);
        case MOST: return multiply<MOST, BITS, TABLE, PAIRS>(x, steps, from, s, sums);
    }
}

template <int BITS, bool TABLE, bool PAIRS>
void many_rows(const Problem& p, long tile) {
    constexpr bool ON_THE_WAY = PANEL == PARTS;
    const long n = tile * WIDE, bytes = inside(n, p.N) * sizeof(float);
    const uint8_t* packed = p.packed + tile * ((p.K + 1) / 2) * FIELD * BITS;
    alignas(64) ints block[CHUNK * PARTS];
    alignas(64) floats sums[ROWS * PARTS];
    const long each = PAIRS ? 1 : 2, width = (p.K + 1) / 2 * each;  // words of x: two inputs, a row
    for (long m0 = 0; m0 < p.M; m0 += ROWS) {
        const Blocks blocks(p.M - m0 < ROWS ? p.M - m0 : ROWS);
        std::memset(sums, 0, blocks.rows * PARTS * sizeof(floats));
        ints z[PARTS];
        for (long start = 0; start < p.K; start += p.group) {
            const long stop = start + p.group < p.K ? start + p.group : p.K;
            floats s[PARTS];
            group_scales<BITS, TABLE>(p, start / p.group, n, s);
            if (start == 0 || p.zero) group_zero<BITS, TABLE>(p, start / p.group, n, z);
            for (long k = start; k < stop; k += CHUNK) {
                const int steps = int((stop - k < CHUNK ? stop - k + 1 : CHUNK) / 2);
                const Weights from{packed + k / 2 * FIELD * BITS, z, block};
                if constexpr (!ON_THE_WAY)
                    for (int step = 0; step < steps; step++) expand<BITS, TABLE, PAIRS>(from, step);
                for (int b = 0, m = 0; b < blocks.count; m += blocks.size(b++)) {
                    const int rows = blocks.size(b);
                    const uint32_t* x = p.x + (m0 + m) * width + k / 2 * each * rows;
                    floats* to = sums + m * PARTS;
                    if (ON_THE_WAY && b == 0) {
                        multiply_rows<BITS, TABLE, PAIRS>(rows, x, steps, from, s, to);
                        continue;
                    }
                    for (int f = 0; f < PARTS; f += PANEL) {
                        const Weights panel{nullptr, nullptr, block + f * CHUNK};
                        multiply_rows<0, false, PAIRS>(rows, x, steps, panel, s + f, to + f);
                    }
                }
            }
        }
        for (long m = 0; m < blocks.rows; m++)
            std::memcpy(p.y + (m0 + m) * p.N + n, sums + m * PARTS, bytes);
    }
}

template <int BITS, bool TABLE, bool PAIRS>
void run(const Problem& p, int threads) {
    const long tiles = (p.N + WIDE - 1) / WIDE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long tile = 0; tile < tiles; tile++) {
        if (p.M == 1)
            one_row<BITS, TABLE, PAIRS>(p, tile);
        else
            many_rows<BITS, TABLE, PAIRS>(p, tile);
    }
}

template <int BITS>
void choose(const Problem& p, int threads) {
    constexpr bool TABLE = LOOKUP && BITS <= 4;
    const bool symmetric = p.zero == nullptr;
    if (p.pairs)
        symmetric ? run<BITS, TABLE, BF16_PAIRS>(p, threads)
                  : run<BITS, false, BF16_PAIRS>(p, threads);
    else
        symmetric ? run<BITS, TABLE, false>(p, threads) : run<BITS, false, false>(p, threads);
}

}  // namespace

// What of the processor products are compiled for.
extern "C" const char* modelpress_instructions() {
#if defined(__AVX512BF16__)
    return "AVX-512 with bf16";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__aarch64__)
    return "NEON";
#elif defined(__x86_64__)
    return "x86-64's first instructions";
#else
    return "this processor";
#endif
}

// Whether bf16 is taken as it is; otherwise x must come as fp32.
extern "C" int modelpress_takes_bf16() { return BF16_PAIRS; }

// group is even, or there is one; middle is the zero point of all outputs where `zero` is null.
// work holds [M, ceil(K / 2)] words for bf16, twice as many for fp32.
extern "C" void modelpress_tiles_matmul(const void* x, int x_kind, uint32_t* work,
                                        const uint8_t* packed, const void* scale, int scale_kind,
                                        const uint8_t* zero, float* y, long M, long N, long K,
                                        long group, int bits, int middle, int threads) {
    const bool pairs = x_kind == BF16;
    arrange_all(x, pairs, M, K, work, threads);
    const Weight weight{packed, scale, scale_kind, zero, N, K, group, middle};
    const Problem p{weight, work, pairs, y, M};
    if (bits == 2) choose<2>(p, threads);
    if (bits == 3) choose<3>(p, threads);
    if (bits == 4) choose<4>(p, threads);
    if (bits == 8) choose<8>(p, threads);
}
