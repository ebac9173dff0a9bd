/* Batch norm in training with what follows it (residual, ReLU, 2x2 max-pool), forward and backward, on the CPU.
 *
 * Tensors are channels last: rows of C channels, C a multiple of 16, a row a pixel. Values are bf16 (-DBF16) or float; arithmetic is
 * float, sums over many rows double, added in an order that depends on nothing but the number of threads.
 * Compiled and called by kernels.py, which says what each function computes. Vectors are GCC's and Clang's own (16 lanes).
 *
 * Few channels would leave most of a loop's work in its edges, so several pixels are treated as one "wide" row of 64 values or more,
 * with the per-channel constants repeated along it.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 16, WIDE = 64, BLOCK = 64 };
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t mask __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1)));

#ifdef BF16
typedef uint16_t value;
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
static inline vector get(const value *p) { return (vector)(__builtin_convertvector(*(const halves *)p, bits) << 16); }
static inline void put(value *p, vector v) { /* to nearest, ties to even */
    bits b = (bits)v;
    *(halves *)p = __builtin_convertvector((b + 0x7fff + ((b >> 16) & 1)) >> 16, halves);
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
static inline vector choose(mask which, vector yes, vector no) { return (vector)(((mask)yes & which) | ((mask)no & ~which)); }

static int wide(int channels) { return channels >= WIDE ? channels : (WIDE + channels - 1) / channels * channels; }

static void repeat(float *to, const float *from, int channels, int length) {
    for (int j = 0; j < length; j++) to[j] = from[j % channels];
}

/* The first value of thread `t`'s part of `rows` rows. */
static long edge(long rows, int channels, int t, int threads) { return rows * t / threads * channels; }

static void flush(double *sums, int column, int channels, vector v) {
    double *to = sums + column % channels; /* 16 divides the channels: a vector never wraps around */
    for (int i = 0; i < LANES; i++) to[i] += v[i];
}

/* Sums over values [begin, end) of x - shift and of its square. */
static void forward_sums(const value *x, long begin, long end, int channels, const float *shift, double *first, double *second) {
    int length = wide(channels);
    float k[length];
    repeat(k, shift, channels, length);
    for (long start = begin; start < end; start += (long)BLOCK * length) {
        long stop = start + (long)BLOCK * length < end ? start + (long)BLOCK * length : end;
        for (int j = 0; j < length; j += LANES) {
            vector kj = at(k + j), a = {0}, b = {0};
            for (long i = start + j; i < stop; i += length) {
                vector v = get(x + i) - kj;
                a += v;
                b += v * v;
            }
            flush(first, j, channels, a);
            flush(second, j, channels, b);
        }
    }
}

/* The gradient behind the ReLU: y tells where it let through, or without a residual (y NULL) x does, which is read anyway. */
static inline vector behind(vector x, const value *y, const value *dy, int relu, vector scale, vector offset) {
    vector g = get(dy);
    return !relu ? g : keep((y ? get(y) : x * scale + offset) > 0, g);
}

/* Sums over values [begin, end) of that gradient and of its product with x - mean. */
static void backward_sums(const value *x, const value *y, const value *dy, long begin, long end, int channels, int length,
                          const float *mean, const float *scale, const float *offset, int relu, double *first, double *second) {
    for (long start = begin; start < end; start += (long)BLOCK * length) {
        long stop = start + (long)BLOCK * length < end ? start + (long)BLOCK * length : end;
        for (int j = 0; j < length; j += LANES) {
            vector m = at(mean + j), k = at(scale + j), o = at(offset + j), a = {0}, b = {0};
            for (long i = start + j; i < stop; i += length) {
                vector v = get(x + i), g = behind(v, y ? y + i : NULL, dy + i, relu, k, o);
                a += g;
                b += g * (v - m);
            }
            flush(first, j, channels, a);
            flush(second, j, channels, b);
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

/* Mean and 1/sqrt(var + eps) per channel; updates the running statistics; y = scale * x + offset is then the batch norm. */
static void measure(const value *x, long rows, int channels, int threads, const float *gamma, const float *beta, float *running_mean,
                    float *running_var, float momentum, float eps, float *mean, float *invstd, float *scale, float *offset) {
    double *sums = calloc((size_t)2 * threads * channels, sizeof *sums);
    float shift[channels];
    for (int c = 0; c < channels; c++) shift[c] = get1(x + c); /* near the mean, so that squares don't cancel */
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        forward_sums(x, edge(rows, channels, t, threads), edge(rows, channels, t + 1, threads), channels, shift,
                     sums + (size_t)2 * t * channels, sums + (size_t)(2 * t + 1) * channels);
    for (int c = 0; c < channels; c++) {
        double first, second;
        total(sums, channels, threads, c, &first, &second);
        double away = first / rows, var = second / rows - away * away;
        if (var < 0) var = 0;
        mean[c] = shift[c] + away;
        invstd[c] = 1 / sqrt(var + eps);
        running_mean[c] += momentum * (mean[c] - running_mean[c]);
        running_var[c] += momentum * (var * rows / (rows - 1) - running_var[c]);
        scale[c] = gamma[c] * invstd[c];
        offset[c] = beta[c] - mean[c] * scale[c];
    }
    free(sums);
}

/* y = [relu](batch_norm(x) [+ residual]) */
void forward(const value *x, const value *residual, value *y, long rows, int channels, const float *gamma, const float *beta,
             float *running_mean, float *running_var, float momentum, float eps, float *mean, float *invstd, int relu, int threads) {
    int length = wide(channels);
    float scale0[channels], offset0[channels], scale[length], offset[length];
    measure(x, rows, channels, threads, gamma, beta, running_mean, running_var, momentum, eps, mean, invstd, scale0, offset0);
    repeat(scale, scale0, channels, length);
    repeat(offset, offset0, channels, length);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        long end = edge(rows, channels, t + 1, threads);
        for (long i = edge(rows, channels, t, threads); i < end; i += length)
            for (int j = 0; j < length && i + j < end; j += LANES) {
                vector v = get(x + i + j) * at(scale + j) + at(offset + j);
                if (residual) v += get(residual + i + j);
                put(y + i + j, relu ? keep(v > 0, v) : v);
            }
    }
}

/* dx = k (g - average - (x - mean) slope), g the gradient behind the ReLU; also dgamma and dbeta. */
static void coefficients(const double *sums, long rows, int channels, int threads, const float *gamma, const float *invstd,
                         float *dgamma, float *dbeta, float *k, float *average, float *slope) {
    for (int c = 0; c < channels; c++) {
        double first, second;
        total(sums, channels, threads, c, &first, &second);
        dbeta[c] = first;
        dgamma[c] = second * invstd[c];
        k[c] = gamma[c] * invstd[c];
        average[c] = first / rows;
        slope[c] = second / rows * invstd[c] * invstd[c];
    }
}

/* Gradients of `forward`; y is NULL without a residual, dresidual where nobody asks for it. */
void backward(const value *x, const value *y, const value *dy, value *dx, value *dresidual, long rows, int channels, const float *gamma,
              const float *beta, const float *mean, const float *invstd, float *dgamma, float *dbeta, int relu, int threads) {
    int length = wide(channels);
    float scale[length], offset[length], m[length];
    for (int j = 0; j < length; j++) {
        int c = j % channels;
        m[j] = mean[c];
        scale[j] = gamma[c] * invstd[c];
        offset[j] = beta[c] - mean[c] * scale[j];
    }
    double *sums = calloc((size_t)2 * threads * channels, sizeof *sums);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        backward_sums(x, y, dy, edge(rows, channels, t, threads), edge(rows, channels, t + 1, threads), channels, length, m, scale,
                      offset, relu, sums + (size_t)2 * t * channels, sums + (size_t)(2 * t + 1) * channels);
    float k[channels], average0[channels], slope0[channels], average[length], slope[length];
    coefficients(sums, rows, channels, threads, gamma, invstd, dgamma, dbeta, k, average0, slope0);
    free(sums);
    repeat(average, average0, channels, length);
    repeat(slope, slope0, channels, length);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        long end = edge(rows, channels, t + 1, threads);
        for (long i = edge(rows, channels, t, threads); i < end; i += length)
            for (int j = 0; j < length && i + j < end; j += LANES) {
                vector v = get(x + i + j), k = at(scale + j);
                vector g = behind(v, y ? y + i + j : NULL, dy + i + j, relu, k, at(offset + j));
                put(dx + i + j, k * (g - at(average + j) - (v - at(m + j)) * at(slope + j)));
                if (dresidual) put(dresidual + i + j, g);
            }
    }
}

/* y = max_pool_2x2(relu(batch_norm(x))), x of `images` x height x width pixels, both even. `place` says which of a pixel's four was
 * the largest, the first of equals as in PyTorch, and 4 where the ReLU let none through. */
void forward_pool(const value *x, value *y, uint8_t *place, long images, int height, int width, int channels, const float *gamma,
                  const float *beta, float *running_mean, float *running_var, float momentum, float eps, float *mean, float *invstd,
                  int threads) {
    float scale[channels], offset[channels];
    measure(x, images * height * width, channels, threads, gamma, beta, running_mean, running_var, momentum, eps, mean, invstd, scale,
            offset);
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
                    mask larger = v > best;
                    where = (where & ~larger) | (part & larger);
                    best = choose(larger, v, best);
                }
                mask through = best > 0;
                put(y + to + c, keep(through, best));
                *(bytes *)(place + to + c) = __builtin_convertvector((where & through) | (4 & ~through), bytes);
            }
        }
}

/* Gradients of `forward_pool`. */
void backward_pool(const value *x, const uint8_t *place, const value *dy, value *dx, long images, int height, int width, int channels,
                   const float *gamma, const float *mean, const float *invstd, float *dgamma, float *dbeta, int threads) {
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
    float k[channels], average[channels], slope[channels];
    coefficients(sums, images * height * width, channels, threads, gamma, invstd, dgamma, dbeta, k, average, slope);
    free(sums);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long line = 0; line < lines; line++)
        for (int column = 0; column < width / 2; column++) {
            long from = (line * (width / 2) + column) * channels;
            for (int c = 0; c < channels; c += LANES) {
                mask where = __builtin_convertvector(*(const bytes *)(place + from + c), mask);
                vector g = get(dy + from + c), kc = at(k + c), m = at(mean + c), s = at(slope + c), base = -at(average + c);
                for (int part = 0; part < 4; part++) {
                    long to = 2 * line * row + 2 * (long)column * channels + (part / 2) * row + (part % 2) * channels + c;
                    put(dx + to, kc * (keep(where == part, g) + base - (get(x + to) - m) * s));
                }
            }
        }
}
