/* Attention of single queries over the pages of a KV cache, where they are.
 *
 * The softmax is a running one (Milakov & Gimelshein 2018, arXiv:1805.02867), tile by tile:
 * each key and value comes from memory once. A tile lies in one page, and parts of a long sequence
 * begin at multiples of PART: the order of a row's sums follows from its length and window.
 */
#include <math.h>

#include "vectors.h"

#define MAX_GROUP 8 /* query heads that share one reading of keys and values */
#define TILE 64     /* keys between two updates of the softmax, at most */
#define PART 512    /* keys of a task; longer sequences are merged from parts */
#define WIDTH (LANES == 16 ? 4 : 2) /* vectors of sums for each query, as far as registers go */

typedef struct {
    const void *query;         /* [num_rows, num_heads, head_dim], rows query_stride apart */
    const void *keys, *values; /* [num_blocks, num_kv_heads, block_size, head_dim] */
    void *out;                 /* [num_rows, num_heads, head_dim] */
    float *parts;              /* [num_rows, num_heads, max_parts, head_dim + 2] */
    const int32_t *block_tables, *sequences, *lens;
    int64_t num_rows, num_heads, num_kv_heads, head_dim, num_blocks, block_size;
    int64_t query_stride, table_stride, max_parts, window;
    float scale, softcap;
    int32_t bf16, num_threads;
} Attention;

/* What is known of up to MAX_GROUP queries after some of their keys. */
typedef struct {
    float query[MAX_GROUP * MAX_HEAD_DIM];       /* scaled */
    float sums[MAX_GROUP * MAX_HEAD_DIM];        /* of exp(score - highest) * value */
    float highest[MAX_GROUP], totals[MAX_GROUP]; /* totals: of exp(score - highest) */
    float scores[MAX_GROUP * TILE];
} State;

/* Ask for row j of a tile that is needed soon: pages lie anywhere, and the machine, which foresees
 * rows of the same page, can't foresee them. */
INLINE void prefetch_row(const void *tile, int64_t j, int64_t head_dim, int bf16) {
    for (int64_t d = 0; tile && d < head_dim; d += bf16 ? 32 : 16)
        __builtin_prefetch(at(tile, j * head_dim + d, bf16));
}

/* scores[g, j] = query[g] . keys[j] for queries `first` and on; `group` is a constant, and `next`
 * a tile to prefetch, or null. */
INLINE void score(State *state, int64_t first, const void *keys, const void *next, int64_t num_keys,
                  int64_t head_dim, int group, int bf16) {
    for (int64_t j = 0; j < num_keys; j++) {
        prefetch_row(next, j, head_dim, bf16);
        vec sums[4] = {0};
        for (int64_t d = 0; d < head_dim; d += LANES) {
            vec key = load(keys, j * head_dim + d, bf16);
            for (int g = 0; g < group; g++)
                sums[g] += key * load(state->query, (first + g) * head_dim + d, 0);
        }
        for (int g = 0; g < group; g++)
            state->scores[(first + g) * TILE + j] = sum_lanes(sums[g]);
    }
}

/* Scores to exp(score - highest); what was summed under a lower highest score is scaled down. */
INLINE void soften(State *state, int64_t g, int64_t num_keys, int64_t head_dim, float softcap) {
    float *scores = state->scores + g * TILE, *sums = state->sums + g * head_dim;
    float highest = state->highest[g];
    int64_t end = (num_keys + LANES - 1) / LANES * LANES;
    for (int64_t j = num_keys; j < end; j++)
        scores[j] = 0; /* a finite number, for now */
    if (softcap > 0) /* softcap * tanh(score / softcap) */
        for (int64_t j = 0; j < end; j += LANES) {
            vec power = exp_vec(load(scores, j, 0) * (2.0f / softcap));
            store(scores, j, softcap - 2.0f * softcap / (power + 1.0f), 0);
        }
    for (int64_t j = 0; j < num_keys; j++)
        highest = scores[j] > highest ? scores[j] : highest;
    if (highest > state->highest[g]) {
        float factor = exp_vec(fill(state->highest[g] - highest))[0];
        state->totals[g] *= factor;
        for (int64_t d = 0; d < head_dim; d += LANES)
            store(sums, d, load(sums, d, 0) * factor, 0);
        state->highest[g] = highest;
    }
    for (int64_t j = 0; j < end; j += LANES)
        store(scores, j, exp_vec(load(scores, j, 0) - highest), 0);
    for (int64_t j = num_keys; j < end; j++)
        scores[j] = 0;
    vec total = fill(0);
    for (int64_t j = 0; j < end; j += LANES)
        total += load(scores, j, 0);
    state->totals[g] += sum_lanes(total);
}

/* sums[g] += scores[g, j] * values[j], in `width` vectors from dimension d on; `group` and `width`
 * are constants. */
INLINE void add_values(State *state, int64_t first, const void *values, const void *next,
                       int64_t num_keys, int64_t head_dim, int64_t d, int group, int width,
                       int bf16) {
    vec sums[4][4];
    for (int g = 0; g < group; g++)
        for (int w = 0; w < width; w++)
            sums[g][w] = load(state->sums, (first + g) * head_dim + d + w * LANES, 0);
    for (int64_t j = 0; j < num_keys; j++) {
        prefetch_row(next, j, head_dim, bf16);
        for (int w = 0; w < width; w++) {
            vec value = load(values, j * head_dim + d + w * LANES, bf16);
            for (int g = 0; g < group; g++)
                sums[g][w] += value * state->scores[(first + g) * TILE + j];
        }
    }
    for (int g = 0; g < group; g++)
        for (int w = 0; w < width; w++)
            store(state->sums, (first + g) * head_dim + d + w * LANES, sums[g][w], 0);
}

/* Keys and values of some positions that follow each other in a page. */
typedef struct {
    const void *keys, *values;
    int64_t num_keys;
} Tile;

INLINE Tile tile_at(const Attention *a, const int32_t *block_table, int64_t kv_head, int64_t key,
                    int64_t stop, int bf16) {
    if (key >= stop)
        return (Tile){0, 0, 0};
    int64_t offset = key % a->block_size;
    int64_t page = block_table[key / a->block_size] * a->num_kv_heads + kv_head;
    int64_t place = (page * a->block_size + offset) * a->head_dim;
    return (Tile){at(a->keys, place, bf16), at(a->values, place, bf16),
                  min(min(a->block_size - offset, stop - key), TILE)};
}

/* Add a tile to queries `first` and on. The first ones fetch for all: keys are already here, values
 * come while they are scored, the next tile's keys while values are added. */
INLINE void add_tile(State *state, int64_t first, Tile tile, Tile next, const Attention *a,
                     int group, int bf16) {
    int64_t head_dim = a->head_dim, d = 0;
    const void *soon = first ? 0 : next.keys;
    score(state, first, tile.keys, first ? 0 : tile.values, tile.num_keys, head_dim, group, bf16);
    for (int g = 0; g < group; g++)
        soften(state, first + g, tile.num_keys, head_dim, a->softcap);
    for (; d + WIDTH * LANES <= head_dim; d += WIDTH * LANES, soon = 0)
        add_values(state, first, tile.values, soon, tile.num_keys, head_dim, d, group, WIDTH, bf16);
    for (; d < head_dim; d += LANES, soon = 0)
        add_values(state, first, tile.values, soon, tile.num_keys, head_dim, d, group, 1, bf16);
}

/* `group` queries over the keys start .. stop - 1 of one sequence. */
INLINE void attend(State *state, const Attention *a, const int32_t *block_table, int64_t kv_head,
                   int64_t start, int64_t stop, int64_t group, int bf16) {
    for (int64_t g = 0; g < group; g++) {
        state->highest[g] = -INFINITY;
        state->totals[g] = 0;
    }
    memset(state->sums, 0, group * a->head_dim * sizeof(float));
    Tile tile = tile_at(a, block_table, kv_head, start, stop, bf16), next;
    for (int64_t key = start; key < stop; tile = next) {
        key += tile.num_keys;
        next = tile_at(a, block_table, kv_head, key, stop, bf16);
        int64_t g = 0;
        for (; g + 4 <= group; g += 4)
            add_tile(state, g, tile, next, a, 4, bf16);
        for (; g + 2 <= group; g += 2)
            add_tile(state, g, tile, next, a, 2, bf16);
        for (; g < group; g++)
            add_tile(state, g, tile, next, a, 1, bf16);
    }
}

/* The keys that a row sees, first .. last, and the parts that they lie in. */
typedef struct {
    int64_t first, stop, first_part, num_parts;
} Range;

INLINE Range seen_by(const Attention *a, int64_t row) {
    Range range = {0, a->lens[row], 0, 0};
    if (a->window && range.stop > a->window)
        range.first = range.stop - a->window;
    range.first_part = range.first / PART;
    range.num_parts = (range.stop + PART - 1) / PART - range.first_part;
    return range;
}

/* One part of one row, for heads of the query that share a head of the cache. */
INLINE void attend_part(const Attention *a, int64_t row, int64_t head, int64_t group, int64_t part,
                        int bf16) {
    Range range = seen_by(a, row);
    int64_t start = (range.first_part + part) * PART, head_dim = a->head_dim;
    if (part >= range.num_parts)
        return;
    State state;
    for (int64_t i = 0; i < group * head_dim; i += LANES) {
        vec query = load(a->query, row * a->query_stride + head * head_dim + i, bf16);
        store(state.query, i, query * a->scale, 0);
    }
    attend(&state, a, a->block_tables + a->sequences[row] * a->table_stride,
           head / (a->num_heads / a->num_kv_heads), max(start, range.first),
           min(start + PART, range.stop), group, bf16);
    for (int64_t g = 0; g < group; g++) {
        const float *sums = state.sums + g * head_dim;
        int64_t place = row * a->num_heads + head + g;
        if (range.num_parts == 1) {
            for (int64_t d = 0; d < head_dim; d += LANES)
                store(a->out, place * head_dim + d, load(sums, d, 0) / state.totals[g], bf16);
            continue;
        }
        float *to = a->parts + (place * a->max_parts + part) * (head_dim + 2);
        memcpy(to, sums, head_dim * sizeof(float));
        to[head_dim] = state.highest[g];
        to[head_dim + 1] = state.totals[g];
    }
}

/* The parts of one row and head, by log-sum-exp. */
static void merge_parts(const Attention *a, int64_t row, int64_t head) {
    int64_t num_parts = seen_by(a, row).num_parts, head_dim = a->head_dim;
    int64_t place = row * a->num_heads + head, size = head_dim + 2;
    const float *parts = a->parts + place * a->max_parts * size;
    float highest = -INFINITY, total = 0, sums[MAX_HEAD_DIM] = {0};
    for (int64_t i = 0; i < num_parts; i++)
        highest = fmaxf(highest, parts[i * size + head_dim]);
    for (int64_t i = 0; i < num_parts; i++) {
        const float *part = parts + i * size;
        float factor = exp_vec(fill(part[head_dim] - highest))[0];
        total += factor * part[head_dim + 1];
        for (int64_t d = 0; d < head_dim; d += LANES)
            store(sums, d, load(sums, d, 0) + load(part, d, 0) * factor, 0);
    }
    for (int64_t d = 0; d < head_dim; d += LANES)
        store(a->out, place * head_dim + d, load(sums, d, 0) / total, a->bf16);
}

/* One query a row: row r sees the last `window` (0: all) of the first lens[r] keys of the sequence
 * whose pages are block_tables[sequences[r]]. */
int paged_attention(const Attention *a) {
    int64_t num_keys = 0, group = a->num_heads / a->num_kv_heads;
    int64_t pieces = (group + MAX_GROUP - 1) / MAX_GROUP;
    for (int64_t row = 0; row < a->num_rows; row++) {
        const int32_t *table = a->block_tables + a->sequences[row] * a->table_stride;
        for (int64_t i = 0; i * a->block_size < a->lens[row]; i++)
            if (table[i] < 0 || table[i] >= a->num_blocks)
                return -1;
        num_keys += a->lens[row];
    }
    int is_parallel = num_keys * a->num_kv_heads * a->head_dim >= PARALLEL_NUMBERS;
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(a->num_threads) if (is_parallel)
    for (int64_t row = 0; row < a->num_rows; row++)
        for (int64_t piece = 0; piece < a->num_kv_heads * pieces; piece++)
            for (int64_t part = 0; part < a->max_parts; part++) {
                int64_t skipped = piece % pieces * MAX_GROUP, num = min(group - skipped, MAX_GROUP);
                int64_t head = piece / pieces * group + skipped;
                if (a->bf16)
                    attend_part(a, row, head, num, part, 1);
                else
                    attend_part(a, row, head, num, part, 0);
            }
    if (a->max_parts == 1)
        return 0;
#pragma omp parallel for collapse(2) num_threads(a->num_threads) if (is_parallel)
    for (int64_t row = 0; row < a->num_rows; row++)
        for (int64_t head = 0; head < a->num_heads; head++)
            if (seen_by(a, row).num_parts > 1)
                merge_parts(a, row, head);
    return 0;
}
