/* On the CPU: batch norm in training with what follows it (residual, ReLU, 2x2 max-pool), forward and backward.
 *
 * Tensors are channels last: rows of C channels, C a multiple of 16, a row a pixel. Values are bf16 (-DBF16) or float;
 * arithmetic is float, sums over many rows double, added in an order that depends on nothing but the number of threads.
 * Compiled by kernels.py, called by fused.py. Vectors are GCC's and Clang's own (16 lanes).
 * Few channels would leave most of a loop's work in its edges, so several pixels are treated as one "wide" row of 64
 * values or more, with the per-channel constants repeated along it.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#if defined BF16 && defined __AVX512F__
#include <immintrin.h>
#endif

enum { LANES = 16, VECTORS = 4, GROUP = VECTORS * LANES, BLOCK = 64 };
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t mask __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1)));
typedef double doubles __attribute__((vector_size(8 * LANES), aligned(8)));

#ifdef BF16
typedef uint16_t value;
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
static inline vector get(const value *p) {
#ifdef __AVX512F__ /* which GCC does not find by itself */
    return (vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
#else
    return (vector)(__builtin_convertvector(*(const halves *)p, bits) << 16);
#endif
}
static inline void put(value *p, vector v) { /* to nearest, ties to even */
#ifdef __AVX512BF16__
    *(halves *)p = (halves)_mm512_cvtneps_pbh((__m512)v);
#else
    bits b = (bits)v;
    *(halves *)p = __builtin_convertvector((b + 0x7fff + ((b >> 16) & 1)) >> 16, halves);
#endif
}
static float get1(const value *p) {
    union { uint32_t bits; float number; } u = {(uint32_t)*p << 16};
    return u.number;
}
#else
typedef float value;
static inline vector get(const value *p) { return *(const vector *)p; }
static inline void put(value *p, vector v) { *(vector *)p = v; }
static float get1(const value *p) { return *p; }
#endif

static inline vector at(const float *p) { return *(const vector *)p; }
static inline vector keep(mask which, vector v) { return (vector)((mask)v & which); }
static inline mask above0(vector v) { return ~(v <= 0); } /* and NaN, which a ReLU must not hide */
static inline vector choose(mask m, vector yes, vector no) { return (vector)(((mask)yes & m) | ((mask)no & ~m)); }

static int wide(int channels) {
    int length = channels;
    while (length % GROUP) length += channels;
    return length;
}
static void repeat(float *to, const float *from, int channels, int length) {
    for (int j = 0; j < length; j++) to[j] = from[j % channels];
}
/* The first value of thread `t`'s part of `rows` rows. */
static long edge(long rows, int channels, int t, int threads) { return rows * t / threads * channels; }

/* The gradient before the ReLU at `i`: passed where y, or without a residual (y NULL) x's batch norm, is above 0. */
static inline vector behind(vector x, const value *y, const value *dy, long i, mask all, vector scale, vector offset) {
    return keep(above0(y ? get(y + i) : x * scale + offset) | all, get(dy + i));
}

static inline void flush(double *sums, int column, int channels, vector v) {
    doubles *to = (doubles *)(sums + column % channels); /* 16 divides the channels: a vector never wraps around */
    *to += __builtin_convertvector(v, doubles);
}

#define INLINE static inline __attribute__((always_inline)) /* so that `vectors` and NULL are constants in the loops */
/* What follows runs over values [begin, end), wide rows of `length`, `vectors` side by side down each block of rows:
 * constants and sums stay in registers, and no sum waits for the one before it. A last, shorter row runs with 1. */
#define WHOLE_THEN_REST(function, begin, end, ...) \
    do { \
        long whole = (end) - ((end) - (begin)) % length; \
        function(VECTORS, begin, whole, length, __VA_ARGS__); \
        function(1, whole, end, length, __VA_ARGS__); \
    } while (0)
#define BLOCKS(begin, end)                                                                                   \
    for (long start = begin, stop; start < end; start = stop)                                                \
        if ((stop = start + (long)BLOCK * length < end ? start + (long)BLOCK * length : end), 1)             \
            for (int j = 0; j < length && start + j < stop; j += vectors * LANES)
#define ROWS for (long i = start + j; i < stop; i += length)
#define EACH for (int u = 0; u < vectors; u++)

/* Sums of x - shift and of its square. */
INLINE void forward_sums(int vectors, long begin, long end, int length, const value *x, int channels,
                         const float *shift, double *first, double *second) {
    BLOCKS(begin, end) {
        vector k[VECTORS], a[VECTORS] = {0}, b[VECTORS] = {0};
        EACH k[u] = at(shift + j + u * LANES);
        ROWS EACH {
            vector v = get(x + i + u * LANES) - k[u];
            a[u] += v;
            b[u] += v * v;
        }
        EACH flush(first, j + u * LANES, channels, a[u]);
        EACH flush(second, j + u * LANES, channels, b[u]);
    }
}

/* y = [relu](scale * x + offset [+ residual]); `all` passes everything where there is no ReLU. NaN passes it too. */
INLINE void normalise(int vectors, long begin, long end, int length, const value *x, const value *residual, value *y,
                      const float *scale, const float *offset, mask all) {
    BLOCKS(begin, end) {
        vector k[VECTORS], o[VECTORS];
        EACH k[u] = at(scale + j + u * LANES), o[u] = at(offset + j + u * LANES);
        ROWS EACH {
            vector v = get(x + i + u * LANES) * k[u] + o[u];
            if (residual) v += get(residual + i + u * LANES);
            put(y + i + u * LANES, keep(above0(v) | all, v));
        }
    }
}

/* Sums of the gradient behind the ReLU and of its product with x - mean. */
INLINE void backward_sums(int vectors, long begin, long end, int length, const value *x, const value *y,
                          const value *dy, int channels, const float *mean, const float *scale, const float *offset,
                          mask all, double *first, double *second) {
    BLOCKS(begin, end) {
        vector m[VECTORS], k[VECTORS], o[VECTORS], a[VECTORS] = {0}, b[VECTORS] = {0};
        EACH m[u] = at(mean + j + u * LANES), k[u] = at(scale + j + u * LANES), o[u] = at(offset + j + u * LANES);
        ROWS EACH {
            vector v = get(x + i + u * LANES), g = behind(v, y, dy, i + u * LANES, all, k[u], o[u]);
            a[u] += g;
            b[u] += g * (v - m[u]);
        }
        EACH flush(first, j + u * LANES, channels, a[u]);
        EACH flush(second, j + u * LANES, channels, b[u]);
    }
}

/* dx = scale g + slope x + base, g the gradient behind the ReLU, which is the residual's gradient. */
INLINE void gradients(int vectors, long begin, long end, int length, const value *x, const value *y, const value *dy,
                      value *dx, value *dresidual, const float *scale, const float *offset, const float *slope,
                      const float *base, mask all) {
    BLOCKS(begin, end) {
        vector k[VECTORS], o[VECTORS], s[VECTORS], c[VECTORS];
        EACH k[u] = at(scale + j + u * LANES), o[u] = at(offset + j + u * LANES);
        EACH s[u] = at(slope + j + u * LANES), c[u] = at(base + j + u * LANES);
        ROWS EACH {
            vector v = get(x + i + u * LANES), g = behind(v, y, dy, i + u * LANES, all, k[u], o[u]);
            put(dx + i + u * LANES, g * k[u] + (v * s[u] + c[u]));
            if (dresidual) put(dresidual + i + u * LANES, g);
        }
    }
}

static void total(const double *sums, int channels, int threads, int c, double *first, double *second) {
    *first = *second = 0;
    for (int t = 0; t < threads; t++) {
        *first += sums[(size_t)2 * t * channels + c];
        *second += sums[(size_t)(2 * t + 1) * channels + c];
    }
}

/* Mean and 1/sqrt(var + eps) per channel; updates the running statistics; then the batch norm is scale * x + offset. */
static void measure(const value *x, long rows, int channels, int threads, const float *gamma, const float *beta,
                    float *running_mean, float *running_var, float momentum, float eps, float *mean, float *invstd,
                    float *scale, float *offset) {
    int length = wide(channels);
    double *sums = calloc((size_t)2 * threads * channels, sizeof *sums);
    float shift0[channels], shift[length];
    for (int c = 0; c < channels; c++) shift0[c] = get1(x + c); /* near the mean, so that squares don't cancel */
    repeat(shift, shift0, channels, length);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        WHOLE_THEN_REST(forward_sums, edge(rows, channels, t, threads), edge(rows, channels, t + 1, threads), x,
                        channels, shift, sums + (size_t)2 * t * channels, sums + (size_t)(2 * t + 1) * channels);
    for (int c = 0; c < channels; c++) {
        double first, second;
        total(sums, channels, threads, c, &first, &second);
        double away = first / rows, var = second / rows - away * away;
        if (var < 0) var = 0;
        mean[c] = shift0[c] + away;
        invstd[c] = 1 / sqrt(var + eps);
        running_mean[c] += momentum * (mean[c] - running_mean[c]);
        running_var[c] += momentum * (var * rows / (rows - 1) - running_var[c]);
        scale[c] = gamma[c] * invstd[c];
        offset[c] = beta[c] - mean[c] * scale[c];
    }
    free(sums);
}

/* y = [relu](batch_norm(x) [+ residual]) */
void forward(const value *x, const value *residual, value *y, long rows, int channels, const float *gamma,
             const float *beta, float *running_mean, float *running_var, float momentum, float eps, float *mean,
             float *invstd, int relu, int threads) {
    int length = wide(channels);
    float scale0[channels], offset0[channels], scale[length], offset[length];
    mask all = relu ? (mask){0} : ~(mask){0};
    measure(x, rows, channels, threads, gamma, beta, running_mean, running_var, momentum, eps, mean, invstd, scale0,
            offset0);
    repeat(scale, scale0, channels, length);
    repeat(offset, offset0, channels, length);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        long begin = edge(rows, channels, t, threads), end = edge(rows, channels, t + 1, threads);
        if (residual)
            WHOLE_THEN_REST(normalise, begin, end, x, residual, y, scale, offset, all);
        else
            WHOLE_THEN_REST(normalise, begin, end, x, NULL, y, scale, offset, all);
    }
}

/* dx = scale g + slope x + base, from the sums of g and of g (x - mean); also dgamma and dbeta. */
static void coefficients(const double *sums, long rows, int channels, int threads, const float *gamma,
                         const float *mean, const float *invstd, float *dgamma, float *dbeta, float *slope,
                         float *base) {
    for (int c = 0; c < channels; c++) {
        double first, second;
        total(sums, channels, threads, c, &first, &second);
        dbeta[c] = first;
        dgamma[c] = second * invstd[c];
        double scale = gamma[c] * invstd[c], fall = second / rows * invstd[c] * invstd[c];
        slope[c] = -scale * fall;
        base[c] = scale * (mean[c] * fall - first / rows);
    }
}

/* Gradients of `forward`; y is NULL without a residual, dresidual where it is not needed. */
void backward(const value *x, const value *y, const value *dy, value *dx, value *dresidual, long rows, int channels,
              const float *gamma, const float *beta, const float *mean, const float *invstd, float *dgamma,
              float *dbeta, int relu, int threads) {
    int length = wide(channels);
    float scale[length], offset[length], m[length];
    mask all = relu ? (mask){0} : ~(mask){0};
    for (int j = 0; j < length; j++) {
        int c = j % channels;
        m[j] = mean[c];
        scale[j] = gamma[c] * invstd[c];
        offset[j] = beta[c] - mean[c] * scale[j];
    }
    double *sums = calloc((size_t)2 * threads * channels, sizeof *sums);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        long begin = edge(rows, channels, t, threads), end = edge(rows, channels, t + 1, threads);
        double *first = sums + (size_t)2 * t * channels, *second = first + channels;
        if (y)
            WHOLE_THEN_REST(backward_sums, begin, end, x, y, dy, channels, m, scale, offset, all, first, second);
        else
            WHOLE_THEN_REST(backward_sums, begin, end, x, NULL, dy, channels, m, scale, offset, all, first, second);
    }
    float slope0[channels], base0[channels], slope[length], base[length];
    coefficients(sums, rows, channels, threads, gamma, mean, invstd, dgamma, dbeta, slope0, base0);
    free(sums);
    repeat(slope, slope0, channels, length);
    repeat(base, base0, channels, length);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        long begin = edge(rows, channels, t, threads), end = edge(rows, channels, t + 1, threads);
        if (y && dresidual)
            WHOLE_THEN_REST(gradients, begin, end, x, y, dy, dx, dresidual, scale, offset, slope, base, all);
        else if (y)
            WHOLE_THEN_REST(gradients, begin, end, x, y, dy, dx, NULL, scale, offset, slope, base, all);
        else
            WHOLE_THEN_REST(gradients, begin, end, x, NULL, dy, dx, NULL, scale, offset, slope, base, all);
    }
}

/* y = max_pool_2x2(relu(batch_norm(x))), x of `images` x height x width pixels, both even. `place` is which of a
 * pixel's four was the largest, the first of equals as in PyTorch, and 4 where the ReLU let none through. */
void forward_pool(const value *x, value *y, uint8_t *place, long images, int height, int width, int channels,
                  const float *gamma, const float *beta, float *running_mean, float *running_var, float momentum,
                  float eps, float *mean, float *invstd, int threads) {
    float scale[channels], offset[channels];
    measure(x, images * height * width, channels, threads, gamma, beta, running_mean, running_var, momentum, eps, mean,
            invstd, scale, offset);
    long lines = images * (height / 2), row = (long)width * channels;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long line = 0; line < lines; line++)
        for (int column = 0; column < width / 2; column++) {
            const value *p = x + 2 * line * row + 2 * (long)column * channels;
            long to = (line * (width / 2) + column) * channels;
            for (int c = 0; c < channels; c += LANES) {
                vector a = at(scale + c), b = at(offset + c), best = get(p + c) * a + b;
                mask where = {0};
                for (int part = 1; part < 4; part++) {
                    vector v = get(p + (part / 2) * row + (part % 2) * channels + c) * a + b;
                    mask larger = ~(v <= best);
                    where = (where & ~larger) | (part & larger);
                    best = choose(larger, v, best);
                }
                mask through = above0(best);
                put(y + to + c, keep(through, best));
                *(bytes *)(place + to + c) = __builtin_convertvector((where & through) | (4 & ~through), bytes);
            }
        }
}

/* Gradients of `forward_pool`. */
void backward_pool(const value *x, const uint8_t *place, const value *dy, value *dx, long images, int height, int width,
                   int channels, const float *gamma, const float *mean, const float *invstd, float *dgamma,
                   float *dbeta, int threads) {
    double *sums = calloc((size_t)2 * threads * channels, sizeof *sums);
    long lines = images * (height / 2), row = (long)width * channels;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        for (long line = lines * t / threads; line < lines * (t + 1) / threads; line++)
            for (int c = 0; c < channels; c += LANES) {
                vector m = at(mean + c), a = {0}, b = {0};
                for (int column = 0; column < width / 2; column++) {
                    const value *p = x + 2 * line * row + 2 * (long)column * channels + c;
                    long from = (line * (width / 2) + column) * channels + c;
                    mask where = __builtin_convertvector(*(const bytes *)(place + from), mask);
                    vector g = keep(where < 4, get(dy + from));
                    vector v = choose(where < 2, choose(where == 0, get(p), get(p + channels)),
                                      choose(where == 2, get(p + row), get(p + row + channels)));
                    a += g;
                    b += g * (v - m);
                }
                flush(sums + (size_t)2 * t * channels, c, channels, a);
                flush(sums + (size_t)(2 * t + 1) * channels, c, channels, b);
            }
    float scale[channels], slope[channels], base[channels];
    for (int c = 0; c < channels; c++) scale[c] = gamma[c] * invstd[c];
    coefficients(sums, images * height * width, channels, threads, gamma, mean, invstd, dgamma, dbeta, slope, base);
    free(sums);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long line = 0; line < lines; line++)
        for (int column = 0; column < width / 2; column++) {
            long from = (line * (width / 2) + column) * channels;
            for (int c = 0; c < channels; c += LANES) {
                mask where = __builtin_convertvector(*(const bytes *)(place + from + c), mask);
                vector g = get(dy + from + c), k = at(scale + c), s = at(slope + c), b = at(base + c);
                for (int part = 0; part < 4; part++) {
                    long to = 2 * (line * row + (long)column * channels) + part / 2 * row + part % 2 * channels + c;
                    put(dx + to, keep(where == part, g) * k + (get(x + to) * s + b));
                }
            }
        }
}
