/* Products of one to four rows with a weight that oneDNN packed: memory is what they take.
 *
 * oneDNN takes these products too, but is made for more rows: it reaches two thirds of the memory's
 * bandwidth, and needs a call of its own to add a residual of a padded row.
 */
#include "vectors.h"

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
    }
}
