// What tiles.cpp, quads.cpp and rounding.cpp share: vectors, numbers as files hold them, rows in blocks.
//
// Vectors are those of GCC and Clang, as wide as this processor has them.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// A vector is a register of this processor. PANEL of them are multiplied by MOST rows of x at a time:
// 24 registers of sums of 32, or 12 of 16.
#if defined(__AVX512F__)
constexpr int BYTES = 64, PANEL = 4;
#elif defined(__AVX__)
constexpr int BYTES = 32, PANEL = 2;
#elif defined(__aarch64__)
constexpr int BYTES = 16, PANEL = 4;
#else
constexpr int BYTES = 16, PANEL = 2;
#endif
constexpr int MOST = 6;
constexpr int WIDE = 64;                                       // outputs of a tile
constexpr int FIELD = 16;                                      // of them, side by side in the layouts
constexpr int LANES = BYTES / 4, PARTS = WIDE / LANES, SPAN = FIELD / LANES;

typedef float floats __attribute__((vector_size(BYTES)));
typedef int32_t ints __attribute__((vector_size(BYTES)));

enum Kind { FP32 = 0, BF16 = 1, FP16 = 2 };

inline float as_float(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// An fp16 is an fp32 whose exponent is 112 too small; of infinity and NaN, 224; a subnormal one is
// what it adds to 2^-14, so that it is kept where a process flushes subnormal floats to 0.
template <int KIND>
inline float number(const void* from, long i) {
    if constexpr (KIND == FP32) return static_cast<const float*>(from)[i];
    const uint32_t bits = static_cast<const uint16_t*>(from)[i];
    if constexpr (KIND == BF16) return as_float(bits << 16);
    const uint32_t one = bits & 0x7c00 ? 0 : 1u << 23;
    const uint32_t more = (bits & 0x7c00) == 0x7c00 ? 224u << 23 : 112u << 23;
    const float size = as_float(((bits & 0x7fff) << 13) + more + one);
    const float rest = size - as_float(one * 113);
    return bits & 0x8000 ? -rest : rest;
}

inline floats as_floats(ints v) {
    floats f;
    std::memcpy(&f, &v, sizeof f);
    return f;
}

// Loads a vector once: a compiler would read it again for each product, and run out of loads.
inline void in_register(ints& v) {
#if defined(__AVX2__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
}

// Bytes as lanes.
inline ints widen(const uint8_t* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else  // a plain loop becomes one instruction, where GCC 12 takes a vector conversion apart
    alignas(BYTES) int32_t wide[LANES];
    for (int i = 0; i < LANES; i++) wide[i] = from[i];
    ints v;
    std::memcpy(&v, wide, sizeof v);
    return v;
#endif
}

// Pairs of bytes as lanes, the first one below.
inline ints widen_pairs(const uint8_t* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
    alignas(BYTES) int32_t wide[LANES];
    uint16_t pairs[LANES];
    std::memcpy(pairs, from, sizeof pairs);
    for (int i = 0; i < LANES; i++) wide[i] = pairs[i];
    ints v;
    std::memcpy(&v, wide, sizeof v);
    return v;
#endif
}

// `count` numbers of an array; a count known to the compiler becomes vectors.
template <int KIND>
inline void convert(const void* from, long at, long count, float* to) {
    if (count == WIDE) {
        for (long i = 0; i < WIDE; i++) to[i] = number<KIND>(from, at + i);
    } else {
        for (long i = 0; i < count; i++) to[i] = number<KIND>(from, at + i);
    }
}

// Numbers [at, at + count) of an array, then zeros: 64 in all.
inline void numbers(const void* from, int kind, long at, long count, floats* v) {
    alignas(64) float values[WIDE];
    if (kind == BF16) convert<BF16>(from, at, count, values);
    if (kind == FP16) convert<FP16>(from, at, count, values);
    if (kind == FP32) convert<FP32>(from, at, count, values);
    for (long i = count; i < WIDE; i++) values[i] = 0;
    std::memcpy(v, values, sizeof values);
}

// Zero points [at, at + count), then `middle`, which all of them are if there is no array.
inline void zero_points(const uint8_t* from, int middle, long at, long count, ints* v) {
    alignas(64) int32_t values[WIDE];
    if (from == nullptr) count = 0;
    for (long i = 0; i < count; i++) values[i] = from[at + i];
    for (long i = count; i < WIDE; i++) values[i] = middle;
    std::memcpy(v, values, sizeof values);
}

inline long inside(long n, long N) { return N - n < WIDE ? N - n : WIDE; }

// A packed weight [N, K]; scale and zero [G, N], `zero` null where all zero points are `middle`.
struct Weight {
    const uint8_t* packed;
    const void* scale;
    int scale_kind;
    const uint8_t* zero;
    long N, K, group;
    int middle;

    // Scales of outputs [n, n + 64) in group g, 0 beyond N.
    void scales(long g, long n, floats* v) const {
        numbers(scale, scale_kind, g * N + n, inside(n, N), v);
    }

    // Their zero points.
    void zeros(long g, long n, ints* v) const {
        zero_points(zero, middle, g * N + n, inside(n, N), v);
    }
};

// How rows are multiplied: blocks of up to MOST of them, whose sizes differ by one at most, the
// smaller ones first.
struct Blocks {
    long rows, count;

    explicit Blocks(long rows) : rows(rows), count((rows + MOST - 1) / MOST) {}

    int size(long block) const { return int(rows / count + (block >= small())); }
    long before(long block) const {  // rows
        return block * (rows / count) + (block > small() ? block - small() : 0);
    }
    long small() const { return count - rows % count; }
};

}  // namespace
