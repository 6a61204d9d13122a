/* The ops between the products: norms, gated activations, and what attention starts from. */
#include <math.h>

#include "vectors.h"

INLINE float inverse_rms(const void *row, int64_t size, float eps, int bf16) {
    vec sum = fill(0);
    for (int64_t i = 0; i < size; i += LANES) {
        vec x = load(row, i, bf16);
        sum += x * x;
    }
    return 1.0f / sqrtf(sum_lanes(sum) / (float)size + eps);
}

/* x / sqrt(mean(x^2) + eps) * (weight + offset); x and out: [num_rows, size]. */
INLINE void rms_norm_row(void *out, const void *x, const void *weight, int64_t size, float eps,
                         float offset, int bf16) {
    float scale = inverse_rms(x, size, eps, bf16);
    for (int64_t i = 0; i < size; i += LANES)
        store(out, i, load(x, i, bf16) * scale * (load(weight, i, bf16) + offset), bf16);
}

void rms_norm(void *out, const void *x, const void *weight, int64_t num_rows, int64_t size,
              float eps, float offset, int bf16, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * size >= PARALLEL_NUMBERS)
    for (int64_t row = 0; row < num_rows; row++) {
        void *to = at(out, row * size, bf16);
        const void *from = at(x, row * size, bf16);
        if (bf16)
            rms_norm_row(to, from, weight, size, eps, offset, 1);
        else
            rms_norm_row(to, from, weight, size, eps, offset, 0);
    }
}

/* act(gate) * up for rows [gate | up] of x: [num_rows, 2 * size]. Both activations are
 * gate * sigmoid(z): z = gate is silu, z = sqrt(8 / pi) (gate + 0.044715 gate^3) is gelu's tanh
 * form, since 1 + tanh(z / 2) = 2 sigmoid(z). */
INLINE void gate_row(void *out, const void *x, int64_t size, int is_gelu, int bf16) {
    for (int64_t i = 0; i < size; i += LANES) {
        vec gate = load(x, i, bf16), up = load(x, size + i, bf16), z = gate;
        if (is_gelu)
            z = 1.59576912f * (gate + 0.044715f * gate * gate * gate);
        store(out, i, gate / (1.0f + exp_vec(-z)) * up, bf16);
    }
}

void gate_and_mul(void *out, const void *x, int64_t num_rows, int64_t size, int is_gelu, int bf16,
                  int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * size >= PARALLEL_NUMBERS)
    for (int64_t row = 0; row < num_rows; row++) {
        void *to = at(out, row * size, bf16);
        const void *from = at(x, 2 * row * size, bf16);
        if (bf16)
            gate_row(to, from, size, is_gelu, 1);
        else
            gate_row(to, from, size, is_gelu, 0);
    }
}

/* Norm and rotate one head, [head_dim]; `from` may be `to`. Without a weight there is no norm;
 * angles are rotary_dim / 2 cosines, then as many sines, of pairs (i, i + rotary_dim / 2). */
INLINE void norm_and_rotate(void *to, const void *from, const void *weight, const float *angles,
                            int64_t head_dim, int64_t rotary_dim, float eps, float offset,
                            int bf16) {
    float head[MAX_HEAD_DIM];
    float scale = weight ? inverse_rms(from, head_dim, eps, bf16) : 1.0f;
    for (int64_t i = 0; i < head_dim; i += LANES) {
        vec x = load(from, i, bf16);
        store(head, i, weight ? x * scale * (load(weight, i, bf16) + offset) : x, 0);
    }
    int64_t half = rotary_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float cosine = angles[i], sine = angles[half + i], a = head[i], b = head[half + i];
        head[i] = a * cosine - b * sine;
        head[half + i] = b * cosine + a * sine;
    }
    for (int64_t i = 0; i < head_dim; i += LANES)
        store(to, i, load(head, i, 0), bf16);
}

/* qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim]. Queries are normed and rotated in
 * place, keys on their way to the cache, where the values go, too.
 * angles: [num_angles, rotary_dim], a row for each token at `angle_rows`; a negative slot is not
 * stored. */
int attention_inputs(void *qkv, void *key_cache, void *value_cache, const int64_t *slots,
                     const void *query_weight, const void *key_weight, const float *angles,
                     const int64_t *angle_rows, int64_t num_tokens, int64_t num_heads,
                     int64_t num_kv_heads, int64_t head_dim, int64_t rotary_dim, int64_t num_angles,
                     int64_t num_blocks, int64_t block_size, float eps, float offset, int bf16,
                     int num_threads) {
    int64_t width = (num_heads + 2 * num_kv_heads) * head_dim;
    for (int64_t t = 0; t < num_tokens; t++)
        if (slots[t] >= num_blocks * block_size ||
            (rotary_dim && (angle_rows[t] < 0 || angle_rows[t] >= num_angles)))
            return -1;
#pragma omp parallel for num_threads(num_threads) if (num_tokens * width >= PARALLEL_NUMBERS)
    for (int64_t t = 0; t < num_tokens; t++) {
        const float *row = rotary_dim ? angles + angle_rows[t] * rotary_dim : 0;
        for (int64_t h = 0; h < num_heads + 2 * num_kv_heads; h++) {
            void *from = at(qkv, t * width + h * head_dim, bf16), *to = from;
            int64_t kv_head = h < num_heads ? -1 : (h - num_heads) % num_kv_heads;
            int is_value = h >= num_heads + num_kv_heads;
            if (kv_head >= 0) {
                if (slots[t] < 0)
                    continue;
                int64_t page = slots[t] / block_size * num_kv_heads + kv_head;
                int64_t place = (page * block_size + slots[t] % block_size) * head_dim;
                to = at(is_value ? value_cache : key_cache, place, bf16);
            }
            if (is_value)
                memcpy(to, from, head_dim * (bf16 ? 2 : 4));
            else if (bf16)
                norm_and_rotate(to, from, h < num_heads ? query_weight : key_weight, row, head_dim,
                                rotary_dim, eps, offset, 1);
            else
                norm_and_rotate(to, from, h < num_heads ? query_weight : key_weight, row, head_dim,
                                rotary_dim, eps, offset, 0);
        }
    }
    return 0;
}
