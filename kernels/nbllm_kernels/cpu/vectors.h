/* Vectors of floats, as long as a register, in plain C: GCC's and Clang's, whatever the machine.
 *
 * (Longer ones, which either compiler takes, too, are kept in memory by GCC.)
 *
 * Decoding streams every weight once per step, which leaves nothing else in the caches: an operator
 * of PyTorch then costs 7 us instead of 1, and a model has a thousand of them. The functions beside
 * this file do the work of several in one pass over the data, and attention reads the pages where
 * they are.
 *
 * Numbers are bfloat16 or float32 (`bf16` says which; it is a constant where the loops are inlined)
 * and are computed in float32. Sums have one order, which depends on a row alone: not on its
 * neighbours, on alignment, or on the number of threads.
 *
 * All files are built without special instructions, with AVX2 and with AVX-512; `cpu_native.py`
 * loads the build that fits the machine, and checks shapes. Functions that take indices return 0,
 * or -1 if one is out of range.
 */
#pragma once
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#ifdef __AVX512F__
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define MAX_HEAD_DIM 256
#define PARALLEL_NUMBERS 262144 /* fewer take less time than to wake a thread and share them */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE vec fill(float x) { return (vec){} + x; }

INLINE vec choose(ints mask, vec a, vec b) {
    return (vec)((mask & (ints)a) | (~mask & (ints)b));
}

/* Numbers i .. i + 15 of an array. A bfloat16 is the upper half of a float. */
INLINE vec load(const void *array, int64_t i, int bf16) {
    if (bf16) {
        halves upper;
        memcpy(&upper, (const uint16_t *)array + i, sizeof upper);
        return (vec)(__builtin_convertvector(upper, words) << 16);
    }
    vec x;
    memcpy(&x, (const float *)array + i, sizeof x);
    return x;
}

/* To the nearest bfloat16, ties to even; a NaN stays one. */
INLINE words round_to_bf16(vec x) {
    words bits = (words)x;
    words rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return (words)choose(x != x, (vec)(bits | 0x400000), (vec)rounded) >> 16;
}

INLINE void store(void *array, int64_t i, vec x, int bf16) {
    if (bf16) {
        halves upper = __builtin_convertvector(round_to_bf16(x), halves);
        memcpy((uint16_t *)array + i, &upper, sizeof upper);
    } else {
        memcpy((float *)array + i, &x, sizeof x);
    }
}

INLINE float load_one(const void *array, int64_t i, int bf16) {
    if (!bf16)
        return ((const float *)array)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)array)[i] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE void store_one(void *array, int64_t i, float x, int bf16) {
    if (bf16)
        ((uint16_t *)array)[i] = round_to_bf16(fill(x))[0];
    else
        ((float *)array)[i] = x;
}

INLINE float sum_lanes(vec x) {
    float lanes[LANES];
    memcpy(lanes, &x, sizeof lanes);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] += lanes[half + i];
    return lanes[0];
}

/* 2^n * e^r for x = n ln 2 + r, |r| <= ln(2) / 2, by the series of e^r (relative error 2e-7). */
INLINE vec exp_vec(vec x) {
    const vec lowest = fill(-87.0f), highest = fill(88.0f), rounder = fill(12582912.0f);
    x = choose(x < lowest, lowest, choose(x > highest, highest, x));
    vec n = (x * 1.44269504f + rounder) - rounder; /* there are no fractions at 1.5 * 2^23 */
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec series = fill(1.0f / 5040);
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    return series * (vec)((__builtin_convertvector(n, ints) + 127) << 23);
}

/* Where number i of an array is. */
INLINE void *at(const void *array, int64_t i, int bf16) {
    return (char *)array + i * (bf16 ? 2 : 4);
}
