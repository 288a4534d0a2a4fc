/* merge_functions.py in one pass over memory: the same arithmetic, operation by operation, so the same bits.
 *
 * A pass of torch's over a block costs what its operation costs and a trip to the second-level cache; here 1,024 elements at a
 * time go through all operations in the first. Nothing else is different: compile without contraction (-ffp-contract=off) and
 * without fast-math, for a product and a sum must be rounded one after the other. kernels.py calls it; without a compiler there
 * is no library and torch does the work.
 */
#include <stdint.h>
#include <string.h>

#define VERSION 6
#define LANES 1024
#define HASH_BLOCK 65536
#define KEEP_ALL 65536

/* Levels of x86-64 are known as clones to GCC 12 and Clang 18 and later. */
#if defined(__clang__)
#define KNOWS_LEVELS (__clang_major__ >= 18)
#else
#define KNOWS_LEVELS (__GNUC__ >= 12)
#endif
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && KNOWS_LEVELS
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

enum { FP32 = 0, BF16 = 1 };

int32_t realign_version(void) { return VERSION; }

/* n elements of either type from element `at` on, in fp32. */
INLINE void widen(const void *values, int32_t type, int64_t at, int n, float *restrict out) {
    if (type == FP32) {
        memcpy(out, (const float *)values + at, sizeof(float) * n);
        return;
    }
    const uint16_t *restrict halves = (const uint16_t *)values + at;
    for (int i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)halves[i] << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
}

/* n fp32 values to element `at` and on of either type; bf16 to the nearest, ties to even, as torch does. */
INLINE void narrow(const float *restrict values, int32_t type, int64_t at, int n, void *out) {
    if (type == FP32) {
        memcpy((float *)out + at, values, sizeof(float) * n);
        return;
    }
    uint16_t *restrict halves = (uint16_t *)out + at;
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        halves[i] = (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
}

/* Finite only where all of them are. */
INLINE double seen(const float *restrict values, int n) {
    float lanes[16] = {0};
    double all = 0.0;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) lanes[j] += values[i + j];
    for (int j = 0; j < 16; j++) all += lanes[j];
    for (; i < n; i++) all += values[i];
    return all;
}

/* lowbias32, https://nullprogram.com/blog/2018/07/31/. */
INLINE uint32_t scramble(uint32_t x) {
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

/* Draws of positions [at, at + n), as masks/concrete.py has them: half a hashed word each. `keys` begin with those of the block
 * that holds `first`. */
INLINE void draw(const uint32_t (*keys)[2], int64_t first, int64_t at, int n, int16_t *restrict out) {
    uint32_t words[LANES / 2 + 1];
    int64_t word = at / 2, count = (at + n + 1) / 2 - word;
    for (int64_t done = 0; done < count;) {
        int64_t block = (word + done) / HASH_BLOCK;
        const uint32_t *key = keys[block - first / 2 / HASH_BLOCK];
        uint32_t begin = (uint32_t)(word + done - block * HASH_BLOCK), key_1 = key[0], key_2 = key[1];
        int run = (int)(HASH_BLOCK - begin < count - done ? HASH_BLOCK - begin : count - done);
        for (int i = 0; i < run; i++) {
            uint32_t x = begin + (uint32_t)i;
            x = scramble((x ^ (x >> 16)) * 0x7FEB352Du);
            words[done + i] = scramble((x ^ key_1) * 0x7FEB352Du + key_2);
        }
        done += run;
    }
    memcpy(out, (const char *)words + (at & 1) * sizeof(int16_t), sizeof(int16_t) * n);
}

/* Dropped to +0 where the draw is not below the limit, divided by `keep` elsewhere. */
INLINE void drop(float *restrict delta, const int16_t *restrict drawn, int32_t limit, float keep, int n) {
    for (int i = 0; i < n; i++) delta[i] = (drawn[i] < limit ? delta[i] : 0.0f) / keep;
}

/* Σ of `count` rows, one after the other. */
INLINE void sum(float (*restrict rows)[LANES], int32_t count, float *restrict out, int n) {
    memcpy(out, rows[0], sizeof(float) * n);
    for (int32_t t = 1; t < count; t++)
        for (int i = 0; i < n; i++) out[i] += rows[t][i];
}

/* Elect signs, join what agrees; rows are overwritten. */
INLINE void elect(float (*restrict rows)[LANES], int32_t count, const float *weights, int mean, float *restrict out, int n) {
    float sign[LANES];
    sum(rows, count, out, n);
    for (int i = 0; i < n; i++) sign[i] = (float)((out[i] > 0.0f) - (out[i] < 0.0f));
    for (int32_t t = 0; t < count; t++)
        for (int i = 0; i < n; i++) {
            float agreeing = rows[t][i] * sign[i];
            rows[t][i] = agreeing < 0.0f ? 0.0f : agreeing;
        }
    sum(rows, count, out, n);
    for (int i = 0; i < n; i++) out[i] *= sign[i];
    if (!mean) return;
    for (int32_t t = 0; t < count; t++) {
        float size = weights[t] < 0.0f ? -weights[t] : weights[t];
        for (int i = 0; i < n; i++) rows[t][i] = rows[t][i] > 0.0f ? size : 0.0f;
    }
    sum(rows, count, sign, n);
    for (int i = 0; i < n; i++) out[i] /= sign[i] < 1e-12f ? 1e-12f : sign[i];
}

#if defined(__clang__) || __GNUC__ >= 9 /* which convert vectors */
#define HAS_LINEAR 1
/* So many floats that the compiler can keep them in registers, whatever the processor has. */
#define WIDE 16
typedef float floats __attribute__((vector_size(4 * WIDE)));
typedef uint32_t words __attribute__((vector_size(4 * WIDE)));
typedef uint16_t shorts __attribute__((vector_size(2 * WIDE)));

INLINE void load(const void *values, int32_t type, int64_t at, floats *out) {
    if (type == FP32) {
        memcpy(out, (const float *)values + at, sizeof *out);
        return;
    }
    shorts halves;
    memcpy(&halves, (const uint16_t *)values + at, sizeof halves);
    words bits = __builtin_convertvector(halves, words) << 16;
    memcpy(out, &bits, sizeof bits);
}

INLINE void store(const floats *values, int32_t type, int64_t at, void *out) {
    if (type == FP32) {
        memcpy((float *)out + at, values, sizeof *values);
        return;
    }
    words bits;
    memcpy(&bits, values, sizeof bits);
    words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, no_number = (words)((bits & 0x7FFFFFFF) > 0x7F800000);
    shorts halves = __builtin_convertvector((no_number & 0x7FC0) | (~no_number & rounded), shorts);
    memcpy((uint16_t *)out + at, &halves, sizeof halves);
}

/* A weighted sum needs no row: elements go through all of it in registers, twice as fast (measured). `type`: that of all models,
 * or -1. `numel` is a multiple of WIDE. Returns a number that is finite only where the result is. */
INLINE double linear(int64_t numel, int32_t count, const void *aligned, const void *const *tuned, const int32_t *types,
                     int32_t type, const float *weights, float scale, void *out) {
    double all = 0.0;
    for (int64_t begin = 0; begin < numel; begin += LANES) {
        int64_t end = begin + LANES < numel ? begin + LANES : numel;
        floats lanes = {0};
        for (int64_t at = begin; at < end; at += WIDE) {
            floats base, total, one;
            load(aligned, type < 0 ? types[0] : type, at, &base);
            load(tuned[0], type < 0 ? types[1] : type, at, &total);
            total = (total - base) * weights[0];
            for (int32_t t = 1; t < count; t++) {
                load(tuned[t], type < 0 ? types[t + 1] : type, at, &one);
                total += (one - base) * weights[t];
            }
            total = total * scale + base;
            lanes += total;
            store(&total, type < 0 ? types[count + 1] : type, at, out);
        }
        for (int i = 0; i < WIDE; i++) all += lanes[i];
    }
    return all;
}

#endif

/* out = aligned + scale · merge of (tuned_t − aligned), `numel` elements.
 *
 * types: of aligned, of each tuned, of out. keys: NULL, or of each stream of draws; `start` is where in the tensor the slice
 * begins. Kept is what is drawn below limits[t], and divided by keeps[t] (nothing is done where limits[t] is KEEP_ALL).
 * below: |τ| up to it is trimmed, negative for none. signs: 0 a weighted sum, 1 TIES' sum, 2 TIES' mean. rows: room for
 * count × LANES floats. sums: of each τ before anything is dropped (with draws), last of the result, for the caller to see
 * whether all is finite.
 */
FOR_EACH_CPU
void realign_merge(int64_t numel, int32_t count, const void *aligned, const void *const *tuned, const int32_t *types,
                   const uint32_t (*const *keys)[2], int64_t start, const int32_t *limits, const float *keeps,
                   const float *weights, const float *below, int32_t signs, float scale, float (*restrict rows)[LANES],
                   void *out, double *sums) {
    float base[LANES], total[LANES];
    int64_t at = 0;
    for (int32_t t = 0; t <= count; t++) sums[t] = 0.0;
#ifdef HAS_LINEAR
    int plain = !keys && !signs, halves = types[count + 1] == BF16;
    for (int32_t t = 0; t <= count; t++) {
        plain &= t == count || below[t] < 0.0f;
        halves &= types[t] == BF16;
    }
    if (plain) {
        at = numel / WIDE * WIDE;
        sums[count] += halves ? linear(at, count, aligned, tuned, types, BF16, weights, scale, out)
                              : linear(at, count, aligned, tuned, types, -1, weights, scale, out);
    }
#endif
    for (; at < numel; at += LANES) {
        int n = numel - at < LANES ? (int)(numel - at) : LANES;
        widen(aligned, types[0], at, n, base);
        for (int32_t t = 0; t < count; t++) {
            float *restrict delta = rows[t];
            widen(tuned[t], types[t + 1], at, n, delta);
            for (int i = 0; i < n; i++) delta[i] -= base[i];
            if (keys) {
                int16_t drawn[LANES];
                sums[t] += seen(delta, n);
                if (limits[t] != KEEP_ALL) {
                    draw(keys[t], start, start + at, n, drawn);
                    drop(delta, drawn, limits[t], keeps[t], n);
                }
            }
            if (below[t] >= 0.0f) {
                float edge = below[t];
                for (int i = 0; i < n; i++) delta[i] = delta[i] >= -edge && delta[i] <= edge ? 0.0f : delta[i];
            }
            if (weights[t] != 1.0f) {
                float weight = weights[t];
                for (int i = 0; i < n; i++) delta[i] *= weight;
            }
        }
        if (signs)
            elect(rows, count, weights, signs == 2, total, n);
        else
            sum(rows, count, total, n);
        if (scale != 1.0f)
            for (int i = 0; i < n; i++) total[i] *= scale;
        for (int i = 0; i < n; i++) total[i] += base[i];
        sums[count] += seen(total, n);
        narrow(total, types[count + 1], at, n, out);
    }
}

/* Magnitudes of (tuned − aligned) in [low, high], written to `inside` in their order (room for all); their number. `above` is
 * how many are larger. */
FOR_EACH_CPU
int64_t realign_between(int64_t numel, const void *aligned, int32_t aligned_type, const void *tuned, int32_t tuned_type,
                        float low, float high, int64_t *above, float *restrict inside) {
    float base[LANES], size[LANES];
    uint8_t hit[LANES];
    int64_t found = 0, larger = 0;
    for (int64_t at = 0; at < numel; at += LANES) {
        int n = numel - at < LANES ? (int)(numel - at) : LANES;
        widen(aligned, aligned_type, at, n, base);
        widen(tuned, tuned_type, at, n, size);
        int32_t over = 0;
        for (int i = 0; i < n; i++) {
            size[i] = __builtin_fabsf(size[i] - base[i]);
            over += size[i] > high;
        }
        larger += over;
        for (int i = 0; i < n; i++) hit[i] = (size[i] >= low) & (size[i] <= high);
        memset(hit + n, 0, LANES - n);
        for (int i = 0; i < n; i += 8) {
            uint64_t any;
            memcpy(&any, hit + i, 8);
            if (any)
                for (int j = i; j < i + 8; j++)
                    if (hit[j]) inside[found++] = size[j];
        }
    }
    *above = larger;
    return found;
}
