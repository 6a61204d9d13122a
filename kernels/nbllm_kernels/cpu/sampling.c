/* The random numbers of sampling, see gumbel.py. */
#include "vectors.h"

#define MIX_1 0x7FEB352Du
#define MIX_2 0x846CA68Bu
#define SALT_POSITION 0x9E3779B9u
#define SALT_SEED 0x85EBCA6Bu
#define LARGEST_W 0.999999940395355224609375f /* 1 - 2^-24 */

INLINE uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * MIX_1;
    x = (x ^ (x >> 15)) * MIX_2;
    return x ^ (x >> 16);
}

/* -w of (seed, position, id) for ids[row, i], or id i where there are no ids: [num_rows, num_ids]. */
void negative_w(float *out, const int64_t *seeds, const int64_t *positions, const int64_t *ids,
                int64_t num_rows, int64_t num_ids) {
    for (int64_t row = 0; row < num_rows; row++, out += num_ids) {
        uint32_t position_key = mix((uint32_t)(positions[row] + SALT_POSITION));
        uint32_t key_0 = mix((uint32_t)seeds[row] ^ position_key);
        uint32_t key_1 = mix((uint32_t)(seeds[row] >> 32) ^ mix(key_0 + SALT_SEED));
        for (int64_t i = 0; i < num_ids; i++) {
            uint32_t id = ids ? ids[row * num_ids + i] : i;
            int32_t hash = mix(mix(id + key_0) ^ key_1) >> 1;
            float w = ((float)hash + 0.5f) * 0x1p-31f;
            out[i] = -(w < LARGEST_W ? w : LARGEST_W);
        }
    }
}
