// What a solver does with single weights: it tries scales, and rounds in order.
//
// Weights are fp32 and columns-first, [K, N]: the N outputs of one input lie side by side, and a
// vector holds some of them, each alone. So neither threads nor the width of vectors change a sum.

#include "vectors.h"

namespace {

// Scales whose sums are in registers together, beside what a weight needs.
constexpr int TRIED = BYTES == 64 ? 12 : 4;
// Rows of an order that are summed together, each of so many vectors.
constexpr int ROWS = 4, ACROSS = BYTES == 64 ? 4 : 2, SPREAD = ACROSS * LANES;
constexpr float HALVES = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction

// `count` numbers of an array, then zeros.
inline floats some(const float* from, long count) {
    floats v{};
    if (count < LANES)
        std::memcpy(&v, from, count * sizeof(float));
    else
        std::memcpy(&v, from, sizeof v);
    return v;
}

inline void put(floats v, float* to, long count) {
    if (count < LANES)
        std::memcpy(to, &v, count * sizeof(float));
    else
        std::memcpy(to, &v, sizeof v);
}

inline floats clamped(floats v, floats low, floats high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

// To the nearest integer, ties to even, of numbers far below 2^22.
inline floats nearest(floats v) { return (v + HALVES) - HALVES; }

// v^1.2 for v >= 0, to a few parts in a million: 2^(1.2 log2 v). 0 for what is below 2^-126.
inline floats to_the_1_2(floats v) {
    ints bits;
    std::memcpy(&bits, &v, sizeof v);
    // v = 2^e m with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(t), t = (m - 1) / (m + 1).
    ints e = (bits - 0x3f3504f3) >> 23;
    const floats m = as_floats(bits - (e << 23)), t = (m - 1) / (m + 1), u = t * t;
    const floats series = ((u * (1.0f / 9) + 1.0f / 7) * u + 0.2f) * u + 1.0f / 3;
    const floats log2 = __builtin_convertvector(e, floats) + t * (series * u + 1) * 2.88539008f;
    const floats power = clamped(log2 * 1.2f, floats{} - 126, floats{} + 127);
    const floats whole = nearest(power), x = (power - whole) * 0.693147181f;
    floats rest = x * (1.0f / 720) + 1.0f / 120;
    rest = ((rest * x + 1.0f / 24) * x + 1.0f / 6) * x + 0.5f;
    rest = (rest * x + 1) * x + 1;
    ints shift = __builtin_convertvector(whole, ints) << 23;
    std::memcpy(&bits, &rest, sizeof rest);
    return v < 1.17549435e-38f ? floats{} : as_floats(bits + shift);
}

struct Trial {
    const float* W;           // [K, N]
    const float* scale;       // [S, N]
    const float* zero;        // [S, N], or null for all zero
    const float* importance;  // [K]
    int64_t* best;            // [N]
    long K, N, S;
    float low, high;
};

// The least error of each output in a vector, and the first scale that has it.
struct Best {
    floats error;
    ints scale;
};

// Tries COUNT scales from `first` on for the outputs from n on.
template <bool MAGNITUDE, int COUNT>
void tried(const Trial& p, long first, long n, Best& best) {
    const long count = p.N - n;
    floats inverse[COUNT], low[COUNT], high[COUNT], sum[COUNT];
    for (int s = 0; s < COUNT; s++) {
        const long at = (first + s) * p.N + n;
        const floats zero = p.zero ? some(p.zero + at, count) : floats{};
        inverse[s] = 1 / some(p.scale + at, count);
        low[s] = p.low - zero;
        high[s] = p.high - zero;
        sum[s] = floats{};
    }
    for (long k = 0; k < p.K; k++) {
        const floats w = some(p.W + k * p.N + n, count);
        const float importance = MAGNITUDE ? 1 : p.importance[k];
        for (int s = 0; s < COUNT; s++) {
            const floats wanted = w * inverse[s];
            const floats e = nearest(clamped(wanted, low[s], high[s])) - wanted;
            const floats square = e * e;
            sum[s] += MAGNITUDE ? to_the_1_2(square) : importance * square;
        }
    }
    for (int s = 0; s < COUNT; s++) {
        // Over the first scale, so that no power of it is too small or too large for a float.
        const floats scale = some(p.scale + (first + s) * p.N + n, count) / some(p.scale + n, count);
        const floats square = scale * scale;
        const floats error = sum[s] * (MAGNITUDE ? to_the_1_2(square) : square);
        const ints better = error < best.error;
        best.error = better ? error : best.error;
        best.scale = better ? ints{} + int(first + s) : best.scale;
    }
}

template <bool MAGNITUDE>
void search(const Trial& p, long n) {
    Best best{floats{} + __builtin_inff(), ints{}};
    long s = 0;
    for (; s + TRIED <= p.S; s += TRIED) tried<MAGNITUDE, TRIED>(p, s, n, best);
    for (; s < p.S; s++) tried<MAGNITUDE, 1>(p, s, n, best);
    for (int i = 0; i < LANES && n + i < p.N; i++) p.best[n + i] = best.scale[i];
}

struct Order {
    float* base;            // [B, N], becomes x
    const float* coupling;  // [B, B]
    const float* low;       // number of bound [j, n] at j * step + n
    const float* high;
    const float* scale;  // [B, N], or null
    long B, N, step;
};

// Vector a of row j of x [B, SPREAD].
inline floats part(const float* x, long j, int a) { return some(x + j * SPREAD + a * LANES, LANES); }

// Rows [start, start + R) of SPREAD outputs in `x` [B, SPREAD], all rows before them done.
template <int R>
void follow(const Order& p, float* x, long start, long n) {
    floats sum[R][ACROSS];
    for (int r = 0; r < R; r++)
        for (int a = 0; a < ACROSS; a++) sum[r][a] = part(x, start + r, a);
    for (long i = 0; i < start; i++) {
        floats done[ACROSS];
        for (int a = 0; a < ACROSS; a++) done[a] = part(x, i, a);
        for (int r = 0; r < R; r++)
            for (int a = 0; a < ACROSS; a++)
                sum[r][a] -= p.coupling[(start + r) * p.B + i] * done[a];
    }
    for (int r = 0; r < R; r++) {
        const long j = start + r;
        for (int a = 0; a < ACROSS; a++) {
            const long at = n + a * LANES, count = p.N - at;
            if (count <= 0) break;
            floats v = sum[r][a];
            for (int i = 0; i < r; i++) v -= p.coupling[j * p.B + start + i] * sum[i][a];
            const floats low = some(p.low + j * p.step + at, count);
            const floats high = some(p.high + j * p.step + at, count);
            if (p.scale == nullptr) {
                sum[r][a] = nearest(clamped(v, low, high));
            } else {
                const floats scale = some(p.scale + j * p.N + at, count);
                sum[r][a] = nearest(clamped(v / scale, low, high)) * scale;
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int a = 0; a < ACROSS; a++) put(sum[r][a], x + (start + r) * SPREAD + a * LANES, LANES);
}

}  // namespace

// For each output the first scale whose error is least, 0 where none is a number. An error is scale^2
// sum_k importance_k e^2, or with `magnitude` sum_k |scale e|^2.4, where e is what rounding leaves of a
// weight over its scale, and the scale is taken over the first one.
extern "C" void modelpress_best_scale(const float* W, const float* scale, const float* zero,
                                      const float* importance, int64_t* best, long K, long N, long S,
                                      float low, float high, int magnitude, int threads) {
    const Trial p{W, scale, zero, importance, best, K, N, S, low, high};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < N; n += LANES) magnitude ? search<true>(p, n) : search<false>(p, n);
}

// Rounds the rows of base [B, N] in turn: x_j = clamp(round(base_j - sum_{i<j} coupling_ji x_i)), and
// with `scale` the same of what is divided by it, times it. low and high: [N] where step is 0, [B, N]
// where it is N.
extern "C" void modelpress_round_in_order(float* base, const float* coupling, const float* low,
                                          const float* high, const float* scale, long B, long N,
                                          long step, int threads) {
    const Order p{base, coupling, low, high, scale, B, N, step};
#pragma omp parallel num_threads(threads)
    {
        float* x = new float[B * SPREAD];
#pragma omp for schedule(static)
        for (long n = 0; n < N; n += SPREAD) {
            const long count = N - n < SPREAD ? N - n : SPREAD;
            if (count < SPREAD) std::memset(x, 0, B * SPREAD * sizeof(float));
            for (long j = 0; j < B; j++)
                std::memcpy(x + j * SPREAD, base + j * N + n, count * sizeof(float));
            long j = 0;
            for (; j + ROWS <= B; j += ROWS) follow<ROWS>(p, x, j, n);
            for (; j < B; j++) follow<1>(p, x, j, n);
            for (j = 0; j < B; j++)
                std::memcpy(base + j * N + n, x + j * SPREAD, count * sizeof(float));
        }
        delete[] x;
    }
}
