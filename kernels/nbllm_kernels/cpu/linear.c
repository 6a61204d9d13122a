/* Products of few rows with a weight: memory is what they take.
 *
 * oneDNN and MKL take these products too, but are made for more rows: they reach a third to two
 * thirds of the memory's bandwidth, and need a call of their own to add a residual.
 */
#include "vectors.h"

#define AHEAD 4096 /* bytes of a weight that are asked for before they are needed */

/* Outputs n and on, num_outputs of them, of rows `row` and on; both numbers are constants. */
INLINE void multiply_tile(void *out, const void *x, const void *weight, const void *bias,
                          const void *residual, int64_t row, int64_t n, int64_t in_features,
                          int64_t out_features, int num_rows, int num_outputs, int bf16) {
    const void *xs = at(x, row * in_features, bf16), *ws = at(weight, n * in_features, bf16);
    vec sums[4][4] = {0};
    for (int64_t i = 0; i < in_features; i += LANES) {
        vec weights[4];
        for (int o = 0; o < num_outputs; o++) {
            if (i % (bf16 ? 32 : 16) == 0)
                __builtin_prefetch((const char *)at(ws, o * in_features + i, bf16) + AHEAD);
            weights[o] = load(ws, o * in_features + i, bf16);
        }
        for (int r = 0; r < num_rows; r++) {
            vec inputs = load(xs, r * in_features + i, bf16);
            for (int o = 0; o < num_outputs; o++)
                sums[r][o] += inputs * weights[o];
        }
    }
    for (int r = 0; r < num_rows; r++)
        for (int o = 0; o < num_outputs; o++) {
            int64_t place = (row + r) * out_features + n + o;
            float sum = sum_lanes(sums[r][o]);
            sum += bias ? load_one(bias, n + o, bf16) : 0;
            sum += residual ? load_one(residual, place, bf16) : 0;
            store_one(out, place, sum, bf16);
        }
}

/* Outputs n .. stop - 1 of all rows: each number of the weight comes from memory once. */
INLINE void multiply_outputs(void *out, const void *x, const void *weight, const void *bias,
                             const void *residual, int64_t num_rows, int64_t in_features,
                             int64_t out_features, int64_t n, int64_t stop, int bf16) {
#define MULTIPLY(rows, outputs)                                                            \
    multiply_tile(out, x, weight, bias, residual, row, n, in_features, out_features, rows, \
                  outputs, bf16)
    for (int64_t row = 0; num_rows == 1 && n + 4 <= stop; n += 4)
        MULTIPLY(1, 4);
    for (; n + 2 <= stop; n += 2) {
        int64_t row = 0;
        for (; row + 4 <= num_rows; row += 4)
            MULTIPLY(4, 2);
        for (; row + 2 <= num_rows; row += 2)
            MULTIPLY(2, 2);
        for (; row < num_rows; row++)
            MULTIPLY(1, 2);
    }
    for (; n < stop; n++)
        for (int64_t row = 0; row < num_rows; row++)
            MULTIPLY(1, 1);
#undef MULTIPLY
}

/* out = x W^T + bias + residual; bias and residual may be null, `residual` may be `out`.
 * W: [out_features, in_features]. */
void multiply_rows(void *out, const void *x, const void *weight, const void *bias,
                   const void *residual, int64_t num_rows, int64_t in_features,
                   int64_t out_features, int bf16, int num_threads) {
    int64_t step = 32, num_tasks = (out_features + step - 1) / step;
    int is_parallel = in_features * out_features >= PARALLEL_NUMBERS;
#pragma omp parallel for num_threads(num_threads) if (is_parallel)
    for (int64_t task = 0; task < num_tasks; task++) {
        int64_t n = task * step, stop = min(n + step, out_features);
        if (bf16)
            multiply_outputs(out, x, weight, bias, residual, num_rows, in_features, out_features,
                             n, stop, 1);
        else
            multiply_outputs(out, x, weight, bias, residual, num_rows, in_features, out_features,
                             n, stop, 0);
    }
}

/* `width` vectors of outputs from one block of packed rows; num_rows is a constant where this is
 * inlined. A 32-bit word holds two neighbours of the inner dimension. */
INLINE void multiply_block(uint16_t *out, const uint16_t *x, const uint32_t *block,
                           const uint16_t *bias, const uint16_t *residual, int64_t block_rows,
                           int64_t in_features, int64_t out_features, int64_t num_outputs,
                           int num_rows, int width) {
    vec sums[4][4] = {0};
    for (int64_t i = 0; i < in_features / 2; i++, block += block_rows) {
        vec even[4], odd[4];
        for (int row = 0; row < num_rows; row++) {
            uint32_t pair;
            memcpy(&pair, x + row * in_features + 2 * i, sizeof pair);
            words pairs = (words){} + pair;
            even[row] = (vec)(pairs << 16);
            odd[row] = (vec)(pairs & 0xffff0000);
        }
        for (int w = 0; w < width; w++) {
            words weights;
            memcpy(&weights, block + w * LANES, sizeof weights);
            for (int row = 0; row < num_rows; row++) {
                sums[row][w] += even[row] * (vec)(weights << 16);
                sums[row][w] += odd[row] * (vec)(weights & 0xffff0000);
            }
        }
    }
    for (int row = 0; row < num_rows; row++)
        for (int64_t n = 0; n < num_outputs; n += LANES) {
            uint16_t sum[LANES] = {0}; /* the last block may be padded */
            int64_t num = num_outputs - n < LANES ? num_outputs - n : LANES;
            vec total = sums[row][n / LANES];
            if (bias) {
                memcpy(sum, bias + n, num * sizeof *sum);
                total += load(sum, 0, 1);
            }
            if (residual) {
                memcpy(sum, residual + row * out_features + n, num * sizeof *sum);
                total += load(sum, 0, 1);
            }
            store(sum, 0, total, 1);
            memcpy(out + row * out_features + n, sum, num * sizeof *sum);
        }
}

/* out = x W^T + bias + residual, bfloat16; bias and residual may be null. W is packed as
 * [ceil(out_features / block_rows), in_features / 2, block_rows, 2]. */
void multiply_packed(uint16_t *out, const uint16_t *x, const uint32_t *packed, const uint16_t *bias,
                     const uint16_t *residual, int64_t num_rows, int64_t in_features,
                     int64_t out_features, int64_t block_rows, int num_threads) {
    int64_t step = block_rows % 64 ? LANES : 4 * LANES;
    int64_t num_tasks = (out_features + step - 1) / step;
    int is_parallel = in_features * out_features >= PARALLEL_NUMBERS;
#pragma omp parallel for num_threads(num_threads) if (is_parallel)
    for (int64_t task = 0; task < num_tasks; task++) {
        int64_t n = task * step;
        const uint32_t *block = packed + n / block_rows * block_rows * (in_features / 2);
        block += n % block_rows;
        int64_t num = out_features - n < step ? out_features - n : step;
        const uint16_t *b = bias ? bias + n : 0, *r = residual ? residual + n : 0;
#define MULTIPLY(rows, width)                                                                 \
    multiply_block(out + n, x, block, b, r, block_rows, in_features, out_features, num, rows, \
                   width)
        if (step == LANES)
            switch (num_rows) {
            case 1: MULTIPLY(1, 1); break;
            case 2: MULTIPLY(2, 1); break;
            case 3: MULTIPLY(3, 1); break;
            default: MULTIPLY(4, 1);
            }
        else
            switch (num_rows) {
            case 1: MULTIPLY(1, 4); break;
            case 2: MULTIPLY(2, 4); break;
            case 3: MULTIPLY(3, 4); break;
            default: MULTIPLY(4, 4);
            }
#undef MULTIPLY
    }
}
