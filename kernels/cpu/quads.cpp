// Products of integers: rows of x rounded to int8, weights in the "quads" layout of integers.py.
//
//     packed [tiles, ceil(K / 4), 32 * BITS bytes]: inputs k .. k + 3 of 64 outputs
//         lane i of a vector is four bytes, byte j is of input k + j
//         8 bits   four vectors; vector f holds outputs 16 f + i
//         4 bits   two vectors; the low half of a byte of vector h is of output 32 h + i, the high
//                  half of output 32 h + 16 + i
//         2 bits   one vector; bits 2 f, 2 f + 1 of a byte are of output 16 f + i
//     scale [G, N] fp32, bf16 or fp16; zero [G, N] bytes, or null and z = MIDDLE everywhere
//     y [M, N] = token_scale[m] * sum over g of scale_g * sum over k in g of x[m, k] * (c[k, n] - z)
//
// The inner sum is exact: codes, which have no sign, meet x in the processor's product of four bytes
// (VNNI, or ARM's dot product) or, with AVX2, in products of pairs; a sum starts at -z times the sum of
// x. It runs modulo 2^32, so that only its end has to fit.

#include "vectors.h"

namespace {

constexpr int AHEAD = 4096;  // bytes between what is loaded and what is fetched
constexpr int STEPS = 8;     // quads whose products may be summed in 16 bits

struct Integers : Weight {
    const uint32_t* x;    // as `arrange` leaves it
    const int32_t* sums;  // of x: [M, G]
    const float* token_scale;
    float* y;
    long M;
};

// ---- the product of four bytes ------------------------------------------------------------------

// PANEL vectors of sums for each of MR rows.
template <int MR>
struct Sums {
    ints sums[MR][PANEL];

    void set(int r, int f, ints start) { sums[r][f] = start; }
    ints get(int r, int f) const { return sums[r][f]; }
};

// `Fours` adds the products of four x and four codes to sums: `add`, between `start` and `stop`, one
// quad of x after another, STEPS at most.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool QUADS = true;
// Codes of 8 bits are c - 128 where both sides of a product have a sign.
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int LESS = 128;
#else
constexpr int LESS = 0;
#endif

inline ints dot(ints to, ints c, uint32_t x) {
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpbusd_epi32((__m512i)to, (__m512i)c, _mm512_set1_epi32(int(x)));
#elif defined(__AVXVNNI__)
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)to, (__m256i)c, _mm256_set1_epi32(int(x)));
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return (ints)vusdotq_s32((int32x4_t)to, (uint8x16_t)c, (int8x16_t)vdupq_n_u32(x));
#else
    return (ints)vdotq_s32((int32x4_t)to, (int8x16_t)c, (int8x16_t)vdupq_n_u32(x));
#endif
}

template <int BITS, int MR>
struct Fours : Sums<MR> {
    static constexpr int less = BITS == 8 ? LESS : 0;

    void start() {}
    void stop() {}
    void add(const uint32_t* x, const ints* c) {
        for (int r = 0; r < MR; r++)
            for (int f = 0; f < PANEL; f++)
                this->sums[r][f] =
                    dot(this->sums[r][f], less ? c[f] ^ int32_t(0x80808080) : c[f], x[r]);
    }
};

#elif defined(__AVX2__) && !defined(__AVX512F__)  // whose vectors are half as wide
constexpr bool QUADS = true;

// Of up to 4 bits, pairs of products are summed in 16 bits, STEPS quads long: 8 * 2 * 15 * 128 fits.
template <int BITS, int MR>
struct Fours : Sums<MR> {
    static constexpr int less = 0;
    typedef int16_t shorts __attribute__((vector_size(BYTES)));
    shorts pairs[MR][PANEL];

    void start() {
        for (int r = 0; r < MR; r++)
            for (int f = 0; f < PANEL; f++) pairs[r][f] = shorts{};
    }
    void stop() {
        const __m256i ones = _mm256_set1_epi16(1);
        for (int r = 0; r < MR; r++)
            for (int f = 0; f < PANEL; f++)
                this->sums[r][f] += (ints)_mm256_madd_epi16((__m256i)pairs[r][f], ones);
    }
    void add(const uint32_t* x, const ints* c) {
        for (int r = 0; r < MR; r++) {
            const __m256i xs = _mm256_set1_epi32(int(x[r]));
            for (int f = 0; f < PANEL; f++)
                pairs[r][f] += (shorts)_mm256_maddubs_epi16((__m256i)c[f], xs);
        }
    }
};

// Of 8 bits they do not fit: even and odd bytes are multiplied as 16 bits.
template <int MR>
struct Fours<8, MR> : Sums<MR> {
    static constexpr int less = 0;

    void start() {}
    void stop() {}
    void add(const uint32_t* x, const ints* c) {
        __m256i even[PANEL], odd[PANEL];
        for (int f = 0; f < PANEL; f++) {
            even[f] = (__m256i)(c[f] & 0x00ff00ff);
            odd[f] = _mm256_srli_epi16((__m256i)c[f], 8);
        }
        for (int r = 0; r < MR; r++) {
            const __m256i xs = _mm256_set1_epi32(int(x[r])), odds = _mm256_srai_epi16(xs, 8);
            const __m256i evens = _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8);
            for (int f = 0; f < PANEL; f++)
                this->sums[r][f] += (ints)_mm256_madd_epi16(even[f], evens) +
                                    (ints)_mm256_madd_epi16(odd[f], odds);
        }
    }
};

#else
constexpr bool QUADS = false;  // and this is never called

template <int BITS, int MR>
struct Fours : Sums<MR> {
    static constexpr int less = 0;
    void start() {}
    void stop() {}
    void add(const uint32_t*, const ints*) {}
};
#endif

// ---- blocks of rows -----------------------------------------------------------------------------

// Vectors of outputs in the order of the bytes that hold them: vector v is part `place(v)` of a tile.
template <int BITS>
constexpr int place(int v) {
    constexpr int EACH = 8 / BITS;
    const int from = v / EACH;  // vector of bytes
    return (from / SPAN * EACH + v % EACH) * SPAN + from % SPAN;
}

// Codes of four inputs, vectors [v, v + PANEL) of outputs in that order.
template <int BITS>
inline void quads(const uint8_t* from, int v, ints* c) {
    constexpr int EACH = 8 / BITS, MASK = int(0x01010101u * ((1u << BITS) - 1));
    for (int f = 0; f < PANEL; f++) {
        ints bytes;
        std::memcpy(&bytes, from + (v + f) / EACH * BYTES, sizeof bytes);
        c[f] = BITS == 8 ? bytes : (bytes >> ((v + f) % EACH * BITS)) & MASK;
    }
}

// Rows [m, m + MR) of y, 64 outputs.
template <int BITS, int MR>
void block(const Integers& p, long tile, long m) {
    const long n = tile * WIDE, steps = (p.K + 3) / 4, groups = (p.K + p.group - 1) / p.group;
    floats total[MR][PARTS] = {};
    for (long g = 0; g < groups; g++) {
        const long first = g * p.group / 4, last = ((g + 1) * p.group + 3) / 4;
        const long stop = last < steps ? last : steps;
        ints z[PARTS];
        floats s[PARTS];
        p.zeros(g, n, z);
        p.scales(g, n, s);
        for (int v = 0; v < PARTS; v += PANEL) {
            const uint32_t* x = p.x + m * steps + first * MR;
            const uint8_t* from = p.packed + (tile * steps + first) * 32 * BITS;
            Fours<BITS, MR> fours;
            for (int r = 0; r < MR; r++)
                for (int f = 0; f < PANEL; f++)
                    fours.set(r, f, (fours.less - z[place<BITS>(v + f)]) * p.sums[(m + r) * groups + g]);
            for (long k = first; k < stop; k += STEPS) {
                fours.start();
                for (long end = k + STEPS < stop ? k + STEPS : stop, at = k; at < end; at++) {
                    for (int line = 0; line < 32 * BITS && v == 0; line += 64)
                        __builtin_prefetch(from + AHEAD + line);
                    ints c[PANEL];
                    quads<BITS>(from, v, c);
                    fours.add(x, c);
                    x += MR, from += 32 * BITS;
                }
                fours.stop();
            }
            for (int r = 0; r < MR; r++)
                for (int f = 0; f < PANEL; f++) {
                    const int to = place<BITS>(v + f);
                    total[r][to] += __builtin_convertvector(fours.get(r, f), floats) * s[to];
                }
        }
    }
    for (int r = 0; r < MR; r++) {
        for (int f = 0; f < PARTS; f++) total[r][f] *= p.token_scale[m + r];
        std::memcpy(p.y + (m + r) * p.N + n, total[r], inside(n, p.N) * sizeof(float));
    }
}

template <int BITS>
void run(const Integers& p, int threads) {
    const long tiles = (p.N + WIDE - 1) / WIDE;
    const Blocks blocks(p.M);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long tile = 0; tile < tiles; tile++) {
        long m = 0;
        for (long b = 0; b < blocks.count; m += blocks.size(b++)) {
            switch (blocks.size(b)) {
                case 1: block<BITS, 1>(p, tile, m); break;
                case 2: block<BITS, 2>(p, tile, m); break;
                case 3: block<BITS, 3>(p, tile, m); break;
                case 4: block<BITS, 4>(p, tile, m); break;
                case 5: block<BITS, 5>(p, tile, m); break;
                case MOST: block<BITS, MOST>(p, tile, m); break;
            }
        }
    }
}

// Rows [m, m + rows) of x as `block` reads them: for each four inputs all rows; 0 beyond K.
void arrange(const int8_t* x, long rows, long K, uint32_t* out) {
    for (long k = 0; k < K; k += 4) {
        const long bytes = K - k < 4 ? K - k : 4;
        for (long r = 0; r < rows; r++, out++) {
            *out = 0;
            std::memcpy(out, x + r * K + k, bytes);
        }
    }
}

void arrange_all(const int8_t* x, const Blocks& blocks, long K, long group, uint32_t* out,
                 int32_t* sums, int threads) {
    const long groups = (K + group - 1) / group, steps = (K + 3) / 4;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long b = 0; b < blocks.count; b++) {
        const long m = blocks.before(b);
        arrange(x + m * K, blocks.size(b), K, out + m * steps);
        for (long r = m; r < m + blocks.size(b); r++)
            for (long g = 0; g < groups; g++) {
                const long stop = (g + 1) * group < K ? (g + 1) * group : K;
                int32_t sum = 0;
                for (long k = g * group; k < stop; k++) sum += x[r * K + k];
                sums[r * groups + g] = sum;
            }
    }
}

// ---- rounding -----------------------------------------------------------------------------------

template <int KIND>
inline uint32_t bits_of(const void* x, long i) {
    const float f = number<KIND>(x, i);
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    return bits;
}

// One token: its scale, largest / steps, and x / scale to the nearest integer in [-half, half).
// As integers, sizes are in the order of the floats, with infinities and NaN above all others. A
// token that holds one of these becomes zeros: times its scale, they make every product NaN.
template <int KIND>
void round_token(const void* x, long at, long K, float steps, float half, int8_t* q, float* scale) {
    uint32_t largest = 0;
    for (long k = at; k < at + K; k++) {
        const uint32_t size = bits_of<KIND>(x, k) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    *scale = as_float(largest) / steps;
    if (largest >= 0x7f800000) {
        std::memset(q + at, 0, K);
        return;
    }
    const float divisor = *scale < 1e-30f ? 1e-30f : *scale;
    for (long k = at; k < at + K; k++) {
        float v = __builtin_rintf(number<KIND>(x, k) / divisor);
        v = v > -half ? v : -half;
        q[k] = int8_t(int32_t(v < half - 1 ? v : half - 1));
    }
}

}  // namespace

// Whether this processor multiplies quads.
extern "C" int modelpress_takes_quads() { return QUADS; }

// x int8 [M, K]; group is a multiple of 4, or there is one; work holds [M, ceil(K / 4)] words, then
// [M, G] sums.
extern "C" void modelpress_quads_matmul(const int8_t* x, const float* token_scale, uint32_t* work,
                                        const uint8_t* packed, const void* scale, int scale_kind,
                                        const uint8_t* zero, float* y, long M, long N, long K,
                                        long group, int bits, int middle, int threads) {
    int32_t* sums = reinterpret_cast<int32_t*>(work + M * ((K + 3) / 4));
    arrange_all(x, Blocks(M), K, group, work, sums, threads);
    const Weight weight{packed, scale, scale_kind, zero, N, K, group, middle};
    const Integers p{weight, work, sums, token_scale, y, M};
    if (bits == 2) run<2>(p, threads);
    if (bits == 4) run<4>(p, threads);
    if (bits == 8) run<8>(p, threads);
}

// x [M, K] to int8 [M, K] and one scale for each row.
extern "C" void modelpress_round_tokens(const void* x, int kind, long M, long K, float steps,
                                        float half, int8_t* q, float* scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long m = 0; m < M; m++) {
        if (kind == FP32) round_token<FP32>(x, m * K, K, steps, half, q, scale + m);
        if (kind == BF16) round_token<BF16>(x, m * K, K, steps, half, q, scale + m);
        if (kind == FP16) round_token<FP16>(x, m * K, K, steps, half, q, scale + m);
    }
}
