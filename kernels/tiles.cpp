// y = x W^T for weights in the "tiles" layout of cpu.py; native.py compiles it where it runs.
//
//     packed [tiles, ceil(K / 2), 16 * BITS bytes]: two inputs k, k + 1 of 64 outputs, low bits first
//         8 bits   64 bytes of k, then 64 of k + 1
//         4 bits   32 bytes of k: byte 16 h + i holds outputs 32 h + i and 32 h + 16 + i; then k + 1
//         2 bits   16 bytes of k: byte i holds outputs i, 16 + i, 32 + i, 48 + i; then k + 1
//         3 bits   the low two bits as above; then 16 bytes: bit f of byte i is the third bit of
//                  output 16 f + i of input k, bit 4 + f that of k + 1
//     scale [G, N] fp32, bf16 or fp16; zero [G, N] bytes, or null and z = MIDDLE everywhere
//     y [M, N] = sum over g of scale_g * sum over k in group g of x[m, k] * (c[k, n] - z_g[n])
//
// Codes meet x as the exact integers c - z, a scale meets the fp32 sum of its group: nothing that
// the file holds is rounded. Sums run in one order whatever the number of threads.
//
// One row of x: codes go from the load into registers. More rows: a block of CHUNK inputs and 64
// outputs is expanded once into the first-level cache, and all rows are multiplied by it; as pairs
// of bf16 where the processor multiplies those (AVX512-BF16), else as fp32.
//
// Vectors are those of GCC and Clang, which any processor has; only the bf16 product is by name.

#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16, WIDE = 64, PARTS = WIDE / LANES;
constexpr int CHUNK = 128;  // inputs expanded at a time: 32 KB in fp32
constexpr int ROWS = 128;   // rows of x that share an expanded block: 32 KB of sums

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));

enum Kind { FP32 = 0, BF16 = 1, FP16 = 2 };

struct Problem {
    const void* x;
    int x_kind;
    const uint8_t* packed;
    const void* scale;
    int scale_kind;
    const uint8_t* zero;
    float* y;
    long M, N, K, group;
    int middle;
};

inline float as_float(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// A finite scale. An fp16 is an fp32 whose exponent is 112 too small, subnormal ones included.
inline float number(const void* from, long i, int kind) {
    if (kind == FP32) return static_cast<const float*>(from)[i];
    const uint32_t bits = static_cast<const uint16_t*>(from)[i];
    if (kind == BF16) return as_float(bits << 16);
    const float size = as_float((bits & 0x7fff) << 13) * 0x1p112f;
    return bits & 0x8000 ? -size : size;
}

// A plain loop becomes one instruction, where GCC 12 takes a vector conversion apart.
inline ints widen(const uint8_t* from) {
    alignas(64) int32_t wide[LANES];
    for (int i = 0; i < LANES; i++) wide[i] = from[i];
    ints v;
    std::memcpy(&v, wide, sizeof v);
    return v;
}

inline floats as_floats(ints v) {
    floats f;
    std::memcpy(&f, &v, sizeof f);
    return f;
}

// The codes of two inputs, 64 outputs each, in the order of the outputs.
template <int BITS>
inline void codes(const uint8_t* from, ints (*c)[PARTS]) {
    for (int k = 0; k < 2; k++) {
        if constexpr (BITS == 8) {
            for (int f = 0; f < PARTS; f++) c[k][f] = widen(from + WIDE * k + LANES * f);
        } else if constexpr (BITS == 4) {
            for (int h = 0; h < 2; h++) {
                const ints b = widen(from + 32 * k + LANES * h);
                c[k][2 * h] = b & 15, c[k][2 * h + 1] = b >> 4;
            }
        } else {
            const ints b = widen(from + LANES * k);
            for (int f = 0; f < PARTS; f++) c[k][f] = (b >> (2 * f)) & 3;
        }
    }
    if constexpr (BITS == 3) {
        const ints b = widen(from + 2 * LANES);
        for (int k = 0; k < 2; k++)
            for (int f = 0; f < PARTS; f++) {
                const int at = 4 * k + f;
                c[k][f] |= (at < 2 ? b << (2 - at) : b >> (at - 2)) & 4;
            }
    }
}

// Scales of outputs [n, n + 64) in group g, 0 beyond N.
inline void group_scale(const Problem& p, long g, long n, floats* v) {
    alignas(64) float values[WIDE] = {};
    const long at = g * p.N + n, inside = p.N - n < WIDE ? p.N - n : WIDE;
    if (p.scale_kind == BF16) {
        for (long i = 0; i < inside; i++) values[i] = number(p.scale, at + i, BF16);
    } else if (p.scale_kind == FP16) {
        for (long i = 0; i < inside; i++) values[i] = number(p.scale, at + i, FP16);
    } else {
        for (long i = 0; i < inside; i++) values[i] = number(p.scale, at + i, FP32);
    }
    std::memcpy(v, values, sizeof values);
}

inline void group_zero(const Problem& p, long g, long n, ints* v) {
    alignas(64) int32_t values[WIDE];
    const long inside = p.zero == nullptr ? 0 : p.N - n < WIDE ? p.N - n : WIDE;
    for (long i = 0; i < inside; i++) values[i] = p.zero[g * p.N + n + i];
    for (long i = inside; i < WIDE; i++) values[i] = p.middle;
    std::memcpy(v, values, sizeof values);
}

// ---- one row of x, fp32 -------------------------------------------------------------------------

template <int BITS>
void one_row(const Problem& p, long tile) {
    const float* x = static_cast<const float*>(p.x);
    const uint8_t* from = p.packed + tile * ((p.K + 1) / 2) * LANES * BITS;
    floats total[PARTS] = {};
    for (long start = 0; start < p.K; start += p.group) {
        const long stop = start + p.group < p.K ? start + p.group : p.K;
        floats part[2][PARTS] = {}, s[PARTS];
        ints z[PARTS], c[2][PARTS];
        group_zero(p, start / p.group, tile * WIDE, z);
        long k = start;
        for (; k + 1 < stop; k += 2, from += LANES * BITS) {
            codes<BITS>(from, c);
            for (int i = 0; i < 2; i++)
                for (int f = 0; f < PARTS; f++)
                    part[i][f] += x[k + i] * __builtin_convertvector(c[i][f] - z[f], floats);
        }
        if (k < stop) {
            codes<BITS>(from, c);
            for (int f = 0; f < PARTS; f++)
                part[0][f] += x[k] * __builtin_convertvector(c[0][f] - z[f], floats);
        }
        group_scale(p, start / p.group, tile * WIDE, s);
        for (int f = 0; f < PARTS; f++) total[f] += (part[0][f] + part[1][f]) * s[f];
    }
    const long inside = p.N - tile * WIDE < WIDE ? p.N - tile * WIDE : WIDE;
    std::memcpy(p.y + tile * WIDE, total, inside * sizeof(float));
}

// ---- several rows -------------------------------------------------------------------------------

// The next `count` inputs of 64 outputs as the integers c - z: fp32 [count][64], or, for bf16 x,
// pairs of bf16 [ceil(count / 2)][64], the earlier input in the low half.
template <int BITS, bool PAIRS>
void expand(const uint8_t* from, int count, const ints* z, ints* out) {
    for (int i = 0; i < count; i += 2, from += LANES * BITS) {
        for (int line = 0; line < LANES * BITS; line += 64)  // of the next block, while this one
            __builtin_prefetch(from + CHUNK / 2 * LANES * BITS + line);  // is multiplied
        ints c[2][PARTS];
        codes<BITS>(from, c);
        for (int f = 0; f < PARTS; f++) {
            const ints low = (ints)__builtin_convertvector(c[0][f] - z[f], floats);
            const ints high = (ints)__builtin_convertvector(c[1][f] - z[f], floats);
            if (PAIRS) {  // integers of up to 8 bits are whole in the upper half of an fp32
                out[f] = ((low >> 16) & 0xffff) | (high & int32_t(0xffff0000));
            } else {
                out[f] = low, out[PARTS + f] = high;
            }
        }
        out += PAIRS ? PARTS : 2 * PARTS;
    }
}

// sums[MR][64] += scale * (rows [m, m + MR) of x times an expanded block of `count` inputs)
template <int MR, bool PAIRS>
void multiply(const Problem& p, long m, long k, int count, const ints* w, const floats* s,
              floats* sums) {
    floats part[MR][PARTS] = {};
    if constexpr (PAIRS) {
#if defined(__AVX512BF16__)
        const uint16_t* x = static_cast<const uint16_t*>(p.x) + m * p.K + k;
        const auto step = [&](int r, uint32_t pair) {
            const __m512bh xs = (__m512bh)_mm512_set1_epi32(int(pair));
            for (int f = 0; f < PARTS; f++)
                part[r][f] = (floats)_mm512_dpbf16_ps((__m512)part[r][f], xs, (__m512bh)w[f]);
        };
        int i = 0;
        for (; i + 1 < count; i += 2, w += PARTS)
            for (int r = 0; r < MR; r++) {
                uint32_t pair;
                std::memcpy(&pair, x + r * p.K + i, sizeof pair);
                step(r, pair);
            }
        if (i < count)  // the last of an odd number: its partner is 0
            for (int r = 0; r < MR; r++) step(r, x[r * p.K + i]);
#endif
    } else {
        const float* x = static_cast<const float*>(p.x) + m * p.K + k;
        for (int i = 0; i < count; i++, w += PARTS)
            for (int r = 0; r < MR; r++)
                for (int f = 0; f < PARTS; f++) part[r][f] += x[r * p.K + i] * as_floats(w[f]);
    }
    for (int r = 0; r < MR; r++)
        for (int f = 0; f < PARTS; f++) sums[r * PARTS + f] += part[r][f] * s[f];
}

template <int BITS, bool PAIRS>
void many_rows(const Problem& p, long tile) {
    const long n = tile * WIDE, inside = p.N - n < WIDE ? p.N - n : WIDE;
    const uint8_t* packed = p.packed + tile * ((p.K + 1) / 2) * LANES * BITS;
    alignas(64) ints block[CHUNK * PARTS];
    alignas(64) floats sums[ROWS * PARTS];
    for (long m0 = 0; m0 < p.M; m0 += ROWS) {
        const long rows = p.M - m0 < ROWS ? p.M - m0 : ROWS;
        std::memset(sums, 0, rows * PARTS * sizeof(floats));
        for (long start = 0; start < p.K; start += p.group) {
            const long stop = start + p.group < p.K ? start + p.group : p.K;
            floats s[PARTS];
            ints z[PARTS];
            group_scale(p, start / p.group, n, s);
            group_zero(p, start / p.group, n, z);
            for (long k = start; k < stop; k += CHUNK) {
                const int count = int(stop - k < CHUNK ? stop - k : CHUNK);
                expand<BITS, PAIRS>(packed + k / 2 * LANES * BITS, count, z, block);
                for (long m = 0; m < rows; m += 6) {
                    floats* to = sums + m * PARTS;
                    switch (rows - m) {
                        case 1: multiply<1, PAIRS>(p, m0 + m, k, count, block, s, to); break;
                        case 2: multiply<2, PAIRS>(p, m0 + m, k, count, block, s, to); break;
                        case 3: multiply<3, PAIRS>(p, m0 + m, k, count, block, s, to); break;
                        case 4: multiply<4, PAIRS>(p, m0 + m, k, count, block, s, to); break;
                        case 5: multiply<5, PAIRS>(p, m0 + m, k, count, block, s, to); break;
                        default: multiply<6, PAIRS>(p, m0 + m, k, count, block, s, to);
                    }
                }
            }
        }
        for (long m = 0; m < rows; m++)
            std::memcpy(p.y + (m0 + m) * p.N + n, sums + m * PARTS, inside * sizeof(float));
    }
}

template <int BITS>
void run(const Problem& p, int threads) {
    const long tiles = (p.N + WIDE - 1) / WIDE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long tile = 0; tile < tiles; tile++) {
        if (p.x_kind == BF16) {
            many_rows<BITS, true>(p, tile);
        } else if (p.M == 1) {
            one_row<BITS>(p, tile);
        } else {
            many_rows<BITS, false>(p, tile);
        }
    }
}

}  // namespace

// Whether several rows of bf16 are taken as they are; otherwise x must come as fp32.
extern "C" int modelpress_takes_bf16() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

// group is at least 1; middle is the zero point of all outputs where `zero` is null.
extern "C" void modelpress_tiles_matmul(const void* x, int x_kind, const uint8_t* packed,
                                        const void* scale, int scale_kind, const uint8_t* zero,
                                        float* y, long M, long N, long K, long group, int bits,
                                        int middle, int threads) {
    const Problem p{x, x_kind, packed, scale, scale_kind, zero, y, M, N, K, group, middle};
    if (bits == 2) run<2>(p, threads);
    if (bits == 3) run<3>(p, threads);
    if (bits == 4) run<4>(p, threads);
    if (bits == 8) run<8>(p, threads);
}
