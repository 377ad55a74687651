/* A step's work on single elements, for a CPU: every element is read and written once.

   Each function does what a sequence of torch operations does in `sweep`, `neuron_norm` and `adamw`, with the same
   roundings in the same order, so that it makes no difference to the bits whether it ran; `native` compares both before
   it lets it. Hence fmaf where torch fuses, two operations where it does not (-ffp-contract=off), torch's order of
   summation in `row_norm`, and 1 / (1 / sqrt(x)) for a root, as `adamw.root_` has it.

   Rows and elements are independent of each other: the number of threads does not show in the result. Only the squared
   norms of the updates, which are metrics, are summed otherwise than torch would. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(32)));

typedef struct {
    float minus_decay, c, beta, last_beta; /* `sweep.Pace` */
    int32_t decays, threads;
} Pace;

static inline float wide(uint16_t b) {
    uint32_t bits = (uint32_t)b << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE float wide_at(const void *p, long i, int p16) {
    return p16 ? wide(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

/* To bfloat16, ties to even; torch's NaN has all bits set. */
static inline uint16_t narrow(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return f != f ? 0xffff : (uint16_t)rounded;
}

/* torch.lerp(start, end, weight) = base + coefficient (end - start), base and coefficient by the side of one half. */
static inline float lerp(float start, float end, float weight) {
    int low = fabsf(weight) < 0.5f;
    return fmaf(low ? weight : weight - 1.0f, end - start, low ? start : end);
}

static inline float root(float x) { return 1.0f / (1.0f / sqrtf(x)); }

/* --- one element after the rule has spoken: `sweep.sweep_` ------------------------------------------------------- */

enum { F32, BF16, LEAN }; /* of y: float32, bfloat16; float32 that holds the old y, from which x is recovered */

INLINE void element(long i, float *z, float *x, uint16_t *comp, void *y, int form, int moves, float direction,
                    float scale, Pace pace, int decays) {
    float before = z[i], now = before, average;
    if (moves) {
        if (decays) now = fmaf(now, pace.minus_decay, now);
        now = fmaf(-direction, scale, now);
        z[i] = now;
    }
    if (form == LEAN) {
        float recovered = before + (((float *)y)[i] - before) / pace.last_beta;
        average = lerp(recovered, now, pace.c);
    } else {
        float delta = fmaf(now - x[i], pace.c, wide(comp[i]));
        average = x[i] + delta;
        comp[i] = narrow(delta + (x[i] - average));
        x[i] = average;
    }
    float point = lerp(now, average, pace.beta);
    if (form == BF16)
        ((uint16_t *)y)[i] = narrow(point);
    else
        ((float *)y)[i] = point;
}

INLINE void row(long n, float *z, float *x, uint16_t *comp, void *y, int form, int moves, const void *p, int p16,
                float scale, Pace pace, int decays) {
#pragma GCC ivdep
    for (long i = 0; i < n; i++)
        element(i, z, x, comp, y, form, moves, moves ? wide_at(p, i, p16) : 0.0f, scale, pace, decays);
}

/* A loop of its own for every kind, or the compiler would ask in every element. */
#define BY_FORM(MOVES, P16, DECAYS)                                                                  \
    switch (form) {                                                                                  \
    case F32: row(n, z, x, comp, y, F32, MOVES, p, P16, scale, pace, DECAYS); break;                 \
    case BF16: row(n, z, x, comp, y, BF16, MOVES, p, P16, scale, pace, DECAYS); break;               \
    default: row(n, z, x, comp, y, LEAN, MOVES, p, P16, scale, pace, DECAYS);                        \
    }

static void sweep(long n, float *z, float *x, uint16_t *comp, void *y, int form, const void *p, int p16, float scale,
                  Pace pace) {
    if (!p) {
        BY_FORM(0, 0, 0)
    } else if (pace.decays) {
        if (p16) {
            BY_FORM(1, 1, 1)
        } else {
            BY_FORM(1, 0, 1)
        }
    } else if (p16) {
        BY_FORM(1, 1, 0)
    } else {
        BY_FORM(1, 0, 0)
    }
}

static void *at(void *start, long offset, int form) {
    return (char *)start + offset * (form == BF16 ? 2 : 4);
}

/* --- matrices ---------------------------------------------------------------------------------------------------- */

/* torch.linalg.vector_norm of float32: eight sums, then one after the other, then the remainder, of which what does not
   fill a group of four is fused: so torch's own compiler has it. */
typedef struct {
    lanes sums;
} Norm;

/* n: a multiple of 8. */
INLINE void take_in(Norm *norm, long n, const void *p, int p16) {
    for (long i = 0; i < n; i += 8) {
        lanes v;
        for (int j = 0; j < 8; j++) v[j] = wide_at(p, i + j, p16);
        norm->sums = norm->sums + v * v;
    }
}

/* n: the remainder, below 8. */
INLINE float ended(const Norm *norm, long n, const void *p, int p16) {
    float sum = norm->sums[0];
    for (int j = 1; j < 8; j++) sum += norm->sums[j];
    for (long i = 0; i < n; i++) {
        float v = wide_at(p, i, p16);
        sum = i < n / 4 * 4 ? sum + v * v : fmaf(v, v, sum);
    }
    return sqrtf(sum);
}

INLINE float norm_of(long n, const void *p, int p16) {
    Norm norm = {{0}};
    long whole = n / 8 * 8;
    take_in(&norm, whole, p, p16);
    return ended(&norm, n - whole, (const char *)p + whole * (p16 ? 2 : 4), p16);
}

static float row_norm(long n, const void *p, int p16) { return p16 ? norm_of(n, p, 1) : norm_of(n, p, 0); }

/* How many matrices go through all passes of a function before the next ones do: what stays in the caches nearby. */
static long together(long elements, int threads) {
    long group = threads * (1L << 16) / elements;
    return group > 0 ? group : 1;
}

enum { RUN = 1024, CHUNK = 16 * RUN }; /* what stays in the nearest cache; what a thread takes at a time */

/* What is orthogonalised of n elements: M or, under Nesterov, lerp(g, M, mu), for which there is room. */
INLINE const float *ahead_of(long n, const float *momentum, const float *g, float mu, int nesterov, float *room) {
    if (!nesterov) return momentum;
    for (long i = 0; i < n; i++) room[i] = lerp(g[i], momentum[i], mu);
    return room;
}

/* M <- lerp(M, g, weight) of one row; returns the norm of what is orthogonalised of it. */
INLINE float taken_in(long n, float *momentum, const float *g, float weight, float mu, int nesterov) {
    float room[RUN];
    Norm norm = {{0}};
    for (long start = 0;; start += RUN) {
        long count = start + RUN < n ? RUN : n - start, whole = count / 8 * 8;
        float *own = momentum + start;
        for (long i = 0; i < count; i++) own[i] = lerp(own[i], g[start + i], weight);
        const float *ahead = ahead_of(count, own, g + start, mu, nesterov, room);
        take_in(&norm, whole, ahead, 0);
        if (start + RUN >= n) return ended(&norm, count - whole, ahead + whole, 0);
    }
}

/* What is orthogonalised of one row times a factor, into `out` from element `first` on. */
INLINE void scaled_into(void *out, long first, int out16, long n, const float *momentum, const float *g, float mu,
                        int nesterov, float factor) {
    float room[RUN];
    for (long start = 0; start < n; start += RUN) {
        long count = start + RUN < n ? RUN : n - start;
        const float *ahead = ahead_of(count, momentum + start, g + start, mu, nesterov, room);
        if (out16)
            for (long i = 0; i < count; i++) ((uint16_t *)out)[first + start + i] = narrow(ahead[i] * factor);
        else
            for (long i = 0; i < count; i++) ((float *)out)[first + start + i] = ahead[i] * factor;
    }
}

/* M <- lerp(M, g, weight) for b matrices (m, n), and N = M or, under Nesterov, lerp(g, M, mu); N / (|N| safety + eps)
   goes into out, float32 or bfloat16, whose matrices lie `distance` elements apart. g: b pointers; norms: room for
   (b, m); by: room for (b,). N itself is not kept: making it again is quicker. */
void anytimed_momentum(long b, long m, long n, float *momentum, const float **g, float weight, float mu, int nesterov,
                       float safety, float eps, float *norms, float *by, void *out, int out16, long distance,
                       int threads) {
#pragma omp parallel num_threads(threads)
    for (long first = 0, group = together(m * n, threads); first < b; first += group) {
        long end = first + group < b ? first + group : b;
#pragma omp for schedule(static)
        for (long r = first * m; r < end * m; r++) {
            const float *given = g[r / m] + r % m * n;
            norms[r] = nesterov ? taken_in(n, momentum + r * n, given, weight, mu, 1)
                                : taken_in(n, momentum + r * n, given, weight, mu, 0);
        }
#pragma omp for schedule(static)
        for (long k = first; k < end; k++) by[k] = 1.0f / (row_norm(m, norms + k * m, 0) * safety + eps);
#pragma omp for schedule(static)
        for (long r = first * m; r < end * m; r++) {
            const float *given = g[r / m] + r % m * n;
            long start = r / m * distance + r % m * n;
            if (nesterov)
                scaled_into(out, start, out16, n, momentum + r * n, given, mu, 1, by[r / m]);
            else
                scaled_into(out, start, out16, n, momentum + r * n, given, mu, 0, by[r / m]);
        }
    }
}

/* The scale of every row of one matrix, from the norms of its rows (overwritten); returns the squared norm of the
   update. */
static float neuron_norm(float *norms, float *v, float *scale, long columns, float beta2_weight, float eps, long blocks,
                         const long *ends, const float *lengths) {
    float squares = 0;
    for (long block = 0, first = 0; block < blocks; first = ends[block++]) {
        for (long r = first; r < ends[block]; r++) {
            v[r] = lerp(v[r], norms[r] * norms[r] / columns, beta2_weight);
            scale[r] = 1.0f / (root(v[r]) + eps);
            norms[r] *= scale[r];
        }
        float norm = row_norm(ends[block] - first, norms + first, 0);
        float factor = norm > 0 ? lengths[block] / norm : 0.0f;
        for (long r = first; r < ends[block]; r++) scale[r] *= factor;
        if (norm > 0) squares += lengths[block] * lengths[block];
    }
    return squares;
}

/* The squared norm of the update of one matrix whose rows have these norms and scales. */
static float scaled(long m, const float *norms, const float *scale) {
    float squares = 0;
    for (long r = 0; r < m; r++) squares += norms[r] * scale[r] * (norms[r] * scale[r]);
    return squares;
}

/* One step of z, x, y of b matrices (m, n), which move against scale * p. p: (b, m, n); y: b pointers.
   v NULL: scale (m,) is given, the same for every matrix. Else scale, room for (b, m), follows from v (b, m) by the rule
   of `neuron_norm`: lengths, of every block of rows; ends, where these end. norms: room for (b, m); squares: gets the
   squared norm of each update, (b,). */
void anytimed_matrices(long b, long m, long n, float *z, float *x, uint16_t *comp, void **y, int form, const void *p,
                       int p16, float *v, float beta2_weight, float eps, long blocks, const long *ends,
                       const float *lengths, float *norms, float *scale, float *squares, const Pace *pace) {
    long size = p16 ? 2 : 4;
#pragma omp parallel num_threads(pace->threads)
    for (long first = 0, group = together(m * n, pace->threads); first < b; first += group) {
        long end = first + group < b ? first + group : b;
#pragma omp for schedule(static)
        for (long r = first * m; r < end * m; r++) norms[r] = row_norm(n, (const char *)p + r * n * size, p16);
#pragma omp for schedule(static)
        for (long k = first; k < end; k++)
            squares[k] = v ? neuron_norm(norms + k * m, v + k * m, scale + k * m, n, beta2_weight, eps, blocks, ends,
                                         lengths)
                           : scaled(m, norms + k * m, scale);
#pragma omp for schedule(static)
        for (long r = first * m; r < end * m; r++)
            sweep(n, z + r * n, x ? x + r * n : 0, comp ? comp + r * n : 0, at(y[r / m], r % m * n, form), form,
                  (const char *)p + r * n * size, p16, scale[v ? r : r % m], *pace);
    }
}

/* --- everything else: `adamw` ------------------------------------------------------------------------------------ */

/* A run of at most RUN elements: v, the direction g / D, the sweep; returns |g / D|^2. */
static double adamw_run(long n, float *z, float *x, uint16_t *comp, void *y, int form, float *v, const float *g,
                        float corrected_by, float beta2, float beta2_weight, float eps, float eta, int moved,
                        Pace pace) {
    float direction[RUN];
    if (!moved)
        for (long i = 0; i < n; i++) v[i] = fmaf(beta2_weight * g[i], g[i], v[i] * beta2);
    for (long i = 0; i < n; i++) direction[i] = g[i] / (root(v[i] * corrected_by) + eps);
    double norm = row_norm(n, direction, 0);
    sweep(n, z, x, comp, y, form, direction, 0, eta, pace);
    return norm * norm;
}

/* One step of z, x, y, v of n elements under the AdamW rule; returns the squared norm of g / D. moved: v has taken g
   in. */
double anytimed_flat(long n, float *z, float *x, uint16_t *comp, void *y, int form, float *v, const float *g,
                     float corrected_by, float beta2, float beta2_weight, float eps, float eta, int moved,
                     const Pace *pace) {
    double squares = 0;
#pragma omp parallel for schedule(static) num_threads(pace->threads) reduction(+ : squares)
    for (long chunk = 0; chunk < n; chunk += CHUNK)
        for (long i = chunk; i < chunk + CHUNK && i < n; i += RUN)
            squares += adamw_run(i + RUN < n ? RUN : n - i, z + i, x ? x + i : 0, comp ? comp + i : 0, at(y, i, form),
                                 form, v + i, g + i, corrected_by, beta2, beta2_weight, eps, eta, moved, *pace);
    return squares;
}

/* x averages and y is computed; z stays. */
void anytimed_still(long n, float *z, float *x, uint16_t *comp, void *y, int form, const Pace *pace) {
#pragma omp parallel for schedule(static) num_threads(pace->threads)
    for (long i = 0; i < n; i += CHUNK)
        sweep(i + CHUNK < n ? CHUNK : n - i, z + i, x ? x + i : 0, comp ? comp + i : 0, at(y, i, form), form, 0, 0, 0,
              *pace);
}
