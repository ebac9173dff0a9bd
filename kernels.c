/* On the CPU: batch norm in training with what follows it (residual, ReLU, 2x2 max-pool), forward and backward; those gradients of
 * convolutions that oneDNN is slow at; normalising pixels.
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
static inline vector choose(mask which, vector yes, vector no) { return (vector)(((mask)yes & which) | ((mask)no & ~which)); }

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

/* The gradient behind the ReLU: y tells where it let through, or without a residual (y NULL) x does, which is read anyway. */
static inline vector behind(vector x, const value *y, const value *dy, mask all, vector scale, vector offset) {
    return keep(above0(y ? get(y) : x * scale + offset) | all, get(dy));
}

static inline void flush(double *sums, int column, int channels, vector v) {
    doubles *to = (doubles *)(sums + column % channels); /* 16 divides the channels: a vector never wraps around */
    *to += __builtin_convertvector(v, doubles);
}

#define INLINE static inline __attribute__((always_inline)) /* so that `vectors` and NULL are constants in the loops */

/* What follows runs over values [begin, end), whole pixels of a wide row of `length`, `vectors` side by side down each block of rows:
 * constants and sums stay in registers, and one vector's sum does not wait for its last. A last row that is not whole runs with 1. */
#define WHOLE_THEN_REST(function, begin, end, ...)                        \
    do {                                                                  \
        long whole = (end) - ((end) - (begin)) % length;                  \
        function(VECTORS, begin, whole, length, __VA_ARGS__);             \
        function(1, whole, end, length, __VA_ARGS__);                     \
    } while (0)
#define BLOCKS(begin, end)                                                                                   \
    for (long start = begin, stop; start < end; start = stop)                                                \
        if ((stop = start + (long)BLOCK * length < end ? start + (long)BLOCK * length : end), 1)             \
            for (int j = 0; j < length && start + j < stop; j += vectors * LANES)
#define ROWS for (long i = start + j; i < stop; i += length)
#define EACH for (int u = 0; u < vectors; u++)

/* Sums of x - shift and of its square. */
INLINE void forward_sums(int vectors, long begin, long end, int length, const value *x, int channels, const float *shift, double *first,
                         double *second) {
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

/* y = [relu](scale * x + offset [+ residual]); `all` lets everything through where there is no ReLU. NaN goes through it. */
INLINE void normalise(int vectors, long begin, long end, int length, const value *x, const value *residual, value *y, const float *scale,
                      const float *offset, mask all) {
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
INLINE void backward_sums(int vectors, long begin, long end, int length, const value *x, const value *y, const value *dy, int channels,
                          const float *mean, const float *scale, const float *offset, mask all, double *first, double *second) {
    BLOCKS(begin, end) {
        vector m[VECTORS], k[VECTORS], o[VECTORS], a[VECTORS] = {0}, b[VECTORS] = {0};
        EACH m[u] = at(mean + j + u * LANES), k[u] = at(scale + j + u * LANES), o[u] = at(offset + j + u * LANES);
        ROWS EACH {
            vector v = get(x + i + u * LANES), g = behind(v, y ? y + i + u * LANES : NULL, dy + i + u * LANES, all, k[u], o[u]);
            a[u] += g;
            b[u] += g * (v - m[u]);
        }
        EACH flush(first, j + u * LANES, channels, a[u]);
        EACH flush(second, j + u * LANES, channels, b[u]);
    }
}

/* dx = scale g + slope x + base, g the gradient behind the ReLU, which is the residual's gradient. */
INLINE void gradients(int vectors, long begin, long end, int length, const value *x, const value *y, const value *dy, value *dx,
                      value *dresidual, const float *scale, const float *offset, const float *slope, const float *base, mask all) {
    BLOCKS(begin, end) {
        vector k[VECTORS], o[VECTORS], s[VECTORS], c[VECTORS];
        EACH k[u] = at(scale + j + u * LANES), o[u] = at(offset + j + u * LANES);
        EACH s[u] = at(slope + j + u * LANES), c[u] = at(base + j + u * LANES);
        ROWS EACH {
            vector v = get(x + i + u * LANES), g = behind(v, y ? y + i + u * LANES : NULL, dy + i + u * LANES, all, k[u], o[u]);
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

/* Mean and 1/sqrt(var + eps) per channel; updates the running statistics; y = scale * x + offset is then the batch norm. */
static void measure(const value *x, long rows, int channels, int threads, const float *gamma, const float *beta, float *running_mean,
                    float *running_var, float momentum, float eps, float *mean, float *invstd, float *scale, float *offset) {
    int length = wide(channels);
    double *sums = calloc((size_t)2 * threads * channels, sizeof *sums);
    float shift0[channels], shift[length];
    for (int c = 0; c < channels; c++) shift0[c] = get1(x + c); /* near the mean, so that squares don't cancel */
    repeat(shift, shift0, channels, length);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        WHOLE_THEN_REST(forward_sums, edge(rows, channels, t, threads), edge(rows, channels, t + 1, threads), x, channels, shift,
                        sums + (size_t)2 * t * channels, sums + (size_t)(2 * t + 1) * channels);
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
void forward(const value *x, const value *residual, value *y, long rows, int channels, const float *gamma, const float *beta,
             float *running_mean, float *running_var, float momentum, float eps, float *mean, float *invstd, int relu, int threads) {
    int length = wide(channels);
    float scale0[channels], offset0[channels], scale[length], offset[length];
    mask all = relu ? (mask){0} : ~(mask){0};
    measure(x, rows, channels, threads, gamma, beta, running_mean, running_var, momentum, eps, mean, invstd, scale0, offset0);
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
static void coefficients(const double *sums, long rows, int channels, int threads, const float *gamma, const float *mean,
                         const float *invstd, float *dgamma, float *dbeta, float *slope, float *base) {
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

/* Gradients of `forward`; y is NULL without a residual, dresidual where nobody asks for it. */
void backward(const value *x, const value *y, const value *dy, value *dx, value *dresidual, long rows, int channels, const float *gamma,
              const float *beta, const float *mean, const float *invstd, float *dgamma, float *dbeta, int relu, int threads) {
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
                    long to = 2 * line * row + 2 * (long)column * channels + (part / 2) * row + (part % 2) * channels + c;
                    put(dx + to, keep(where == part, g) * k + (get(x + to) * s + b));
                }
            }
        }
}

#if defined BF16 && defined __AVX512BF16__
/* Gradients of 3x3 convolutions (padding 1) and of strided 1x1 ones, without groups: bf16 in, sums in float.
 *
 * The processor multiplies pairs: lane l of a sum += a[2l] b[2l] + a[2l+1] b[2l+1]. One side is a vector of 16 channels' pairs, the
 * other one pair in all lanes. Enough sums stay in registers that none waits for its last. Packing makes the pairs adjacent, and what
 * an inner loop reads contiguous. Weights are (out, kernel, kernel, in), as channels last has them; in and out are multiples of 16.
 */
static inline __m512i pair(const value *a, const value *b) { /* a0 b0 a1 b1 ... of 16 channels each */
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)a)), high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)b));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
static inline __m512bh pairs_at(const value *p) { return (__m512bh)_mm512_loadu_si512(p); }
static inline __m512bh everywhere(const value *p) {
    int32_t two;
    memcpy(&two, p, sizeof two);
    return (__m512bh)_mm512_set1_epi32(two);
}
static void *room(long bytes) {
    void *memory;
    return posix_memalign(&memory, 64, bytes) ? NULL : memory;
}

enum { TAPS = 3, OUTS = 8, PAIRS = 256, TILE = 16 };

/* What one tile of the weights' gradient runs over: `strips` of images, each of `lines` lines of `pairs` pairs of pixels. */
struct strips {
    int count, lines, pairs;
    long strip, line; /* from one to the next in the packed input */
};

/* sums[o][k] += dy[o] x_k over all pairs: the gradient of a kernel's row, 16 inputs to 8 outputs. */
static void weight_tile(struct strips over, const value *x0, const value *x1, const value *x2, const value *dy, float *to, long row, long tap) {
    __m512 sums[OUTS][TAPS];
    for (int o = 0; o < OUTS; o++)
        for (int k = 0; k < TAPS; k++) sums[o][k] = _mm512_loadu_ps(to + o * row + k * tap);
    for (int s = 0; s < over.count; s++)
        for (int l = 0; l < over.lines; l++) {
            long i = s * over.strip + l * over.line;
            for (int p = 0; p < over.pairs; p++, i += 2 * LANES, dy += 2 * OUTS) {
                __m512bh a = pairs_at(x0 + i), b = pairs_at(x1 + i), c = pairs_at(x2 + i);
                for (int o = 0; o < OUTS; o++) {
                    __m512bh g = everywhere(dy + 2 * o);
                    sums[o][0] = _mm512_dpbf16_ps(sums[o][0], a, g);
                    sums[o][1] = _mm512_dpbf16_ps(sums[o][1], b, g);
                    sums[o][2] = _mm512_dpbf16_ps(sums[o][2], c, g);
                }
            }
        }
    for (int o = 0; o < OUTS; o++)
        for (int k = 0; k < TAPS; k++) _mm512_storeu_ps(to + o * row + k * tap, sums[o][k]);
}

/* One line of 16 channels as pairs: what the kernel's columns 0, 1 and 2 see of pixels 2p and 2p + 1 of the output. At stride 1 column
 * 2 sees what column 0 sees a pair later, and there is one pair more. */
static void pack_line(const value *line, value *to, long column, int pairs, int channels, int stride) {
    static const value zeros[LANES];
    for (int p = 0; p < pairs; p++, to += 2 * LANES) {
        const value *x = line + (long)2 * stride * p * channels;
        _mm512_storeu_si512(to, pair(p ? x - channels : zeros, x + (stride - 1) * channels));
        _mm512_storeu_si512(to + column, pair(x, x + stride * channels));
        if (stride == 2) _mm512_storeu_si512(to + 2 * column, pair(x + channels, x + 3 * channels));
    }
    if (stride == 1) _mm512_storeu_si512(to, pair(line + (2L * pairs - 1) * channels, zeros));
}

/* dw of a 3x3 convolution of stride 1 or 2: x (images, height, width, in), dy (images, height / stride, width / stride, out), both even.
 * Large images are packed in strips of lines, small ones several at once, so that what a tile reads stays in the nearest cache. */
void conv_weight_gradient(const value *x, const value *dy, float *dw, long images, int height, int width, int in, int out, int stride,
                          int threads) {
    int tall = height / stride, wide = width / stride, pairs = wide / 2, split = 1, group = 1;
    while (tall / split * pairs > PAIRS && tall % (2 * split) == 0) split *= 2;
    while (split == 1 && 2 * group * tall * pairs <= PAIRS) group *= 2;
    int lines = tall / split, seen = (lines - 1) * stride + TAPS;
    long line = (pairs + 1) * 2 * LANES, strip = seen * line, column = group * strip, block = (stride == 1 ? 2 : 3) * column;
    long outs = 2L * OUTS * group * lines * pairs, size = (long)TAPS * TAPS * in * out;
    float *all = room(threads * size * sizeof *all);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        float *sums = memset(all + t * size, 0, size * sizeof *sums);
        value *xs = room((in / LANES * block + out / OUTS * outs) * sizeof *xs), *dys = xs + in / LANES * block;
        long end = images * (t + 1) / threads * split;
        for (long first = images * t / threads * split; first < end; first += group) {
            struct strips over = {first + group < end ? group : end - first, lines, pairs, strip, stride * line};
            for (int s = 0; s < over.count; s++) {
                long image = (first + s) / split, top = (first + s) % split * lines;
                for (int l = 0; l < seen; l++) {
                    long h = top * stride + l - 1;
                    for (int i = 0; i < in; i += LANES) {
                        value *to = xs + i / LANES * block + s * strip + l * line;
                        if (h >= 0 && h < height)
                            pack_line(x + ((image * height + h) * width) * in + i, to, column, pairs, in, stride);
                        else
                            for (long k = 0; k < block; k += column) memset(to + k, 0, line * sizeof *to);
                    }
                }
                const value *g = dy + (image * tall + top) * wide * out;
                for (long p = 0; p < (long)lines * pairs; p++)
                    for (int o = 0; o < out; o += LANES) {
                        __m512i two = pair(g + 2 * p * out + o, g + (2 * p + 1) * out + o);
                        value *to = dys + o / OUTS * outs + 2 * OUTS * ((long)s * lines * pairs + p);
                        _mm256_storeu_si256((void *)to, _mm512_castsi512_si256(two));
                        _mm256_storeu_si256((void *)(to + outs), _mm512_extracti64x4_epi64(two, 1));
                    }
            }
            for (int i = 0; i < in; i += LANES)
                for (int k = 0; k < TAPS; k++)
                    for (int o = 0; o < out; o += OUTS) {
                        const value *from = xs + i / LANES * block + k * line;
                        weight_tile(over, from, from + column, from + (stride == 1 ? 2 * LANES : 2 * column), dys + o / OUTS * outs,
                                    sums + ((long)o * TAPS + k) * TAPS * in + i, (long)TAPS * TAPS * in, in);
                    }
        }
        free(xs);
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < size; i++) {
        dw[i] = all[i];
        for (int t = 1; t < threads; t++) dw[i] += all[t * size + i];
    }
    free(all);
}

/* 16 inputs (vectors 1) of 16 pixels, or 32 (vectors 2) of 8: the sum over `taps` of the outputs' gradient times weights. */
INLINE void input_tile(int vectors, int taps, const value **dy, const value **weights, int in, int out, value *to, long step) {
    int pixels = TILE / vectors;
    __m512 sums[TILE] = {0};
    for (int k = 0; k < taps; k++) {
        const value *g = dy[k], *w = weights[k];
        for (int o = 0; o < out; o += 2, w += 2 * in) {
            __m512bh a[2];
            for (int v = 0; v < vectors; v++) a[v] = pairs_at(w + 2 * LANES * v);
            for (int p = 0; p < pixels; p++) {
                __m512bh two = everywhere(g + (long)p * out + o);
                for (int v = 0; v < vectors; v++) sums[p * vectors + v] = _mm512_dpbf16_ps(sums[p * vectors + v], a[v], two);
            }
        }
    }
    for (int p = 0; p < pixels; p++)
        for (int v = 0; v < vectors; v++) put(to + p * step + LANES * v, (vector)sums[p * vectors + v]);
}

/* dx of a 1x1 or 3x3 convolution of stride 2, height and width even. A pixel of even line and column is seen by the kernel's middle
 * alone, others by two or four of its places: each kind is a dense sum of its own. width / 2 is a multiple of 16, or of 8 where `in` is
 * one of 32. */
void strided_conv_input_gradient(const value *weight, const value *dy, value *dx, long images, int height, int width, int in, int out,
                                 int kernel, int threads) {
    int tall = height / 2, wide = width / 2, taps = kernel * kernel, vectors = in % (2 * LANES) ? 1 : 2;
    long line = (wide + 1L) * out;
    value *packed = room((long)taps * in * out * sizeof *packed);
    for (int k = 0; k < taps; k++)
        for (int o = 0; o < out; o += 2)
            for (int i = 0; i < in; i += LANES)
                _mm512_storeu_si512(packed + ((long)k * out + o) * in + 2 * i,
                                    pair(weight + ((long)o * taps + k) * in + i, weight + ((o + 1L) * taps + k) * in + i));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        long bytes = (tall + 1) * line * sizeof(value);
        value *padded = memset(room(bytes), 0, bytes); /* one line and one column more, for the kernel's last places */
        for (long image = images * t / threads; image < images * (t + 1) / threads; image++) {
            for (int r = 0; r < tall; r++) memcpy(padded + r * line, dy + (image * tall + r) * wide * out, (size_t)wide * out * sizeof *dy);
            for (int h = 0; h < height; h++)
                for (int odd = 0; odd < 2; odd++) {
                    const value *from[4], *weights[4];
                    int n = 0;
                    for (int kh = 0; kh < kernel; kh++)
                        for (int kw = 0; kw < kernel; kw++) {
                            int r = h + kernel / 2 - kh, c = odd + kernel / 2 - kw;
                            if (r % 2 || c % 2) continue;
                            from[n] = padded + r / 2 * line + (long)(c / 2) * out;
                            weights[n++] = packed + (long)(kh * kernel + kw) * in * out;
                        }
                    for (int w = 0; w < wide; w += TILE / vectors)
                        for (int i = 0; i < in; i += LANES * vectors) {
                            value *to = dx + ((image * height + h) * width + 2 * w + odd) * in + i;
                            const value *g[4], *a[4];
                            for (int k = 0; k < n; k++) g[k] = from[k] + (long)w * out, a[k] = weights[k] + 2 * i;
                            if (vectors == 2)
                                input_tile(2, n, g, a, in, out, to, 2 * in);
                            else
                                input_tile(1, n, g, a, in, out, to, 2 * in);
                        }
                }
        }
        free(padded);
    }
    free(packed);
}
/* A residual stage of a frozen network. An image goes through all of its blocks in two padded buffers that stay in the second cache;
 * each thread has its own images and waits for nobody. Weights are packed by kernels.py: for each of the kernel's places and each pair
 * of inputs, the outputs' pairs. */
struct padded { /* a map with a border of zeros */
    value *data;
    int height, width, channels;
    long line;
};

static struct padded padded_map(int height, int width, int channels) {
    long line = (width + 2L) * channels, bytes = (height + 2L) * line * sizeof(value);
    struct padded map = {memset(room(bytes), 0, bytes), height, width, channels, line};
    return map;
}

static value *pixel(struct padded map, int h, int w) { return map.data + (h + 1) * map.line + (w + 1L) * map.channels; }

/* 16 outputs of 16 pixels, 3x3 at stride 1: a pair of inputs is loaded once for the three outputs in its line that it goes to. */
INLINE void line_of_16(const value *x, long line, int in, const value *weights, __m512 *sums) {
    for (int kh = 0; kh < TAPS; kh++)
        for (int i = 0; i < in; i += 2) {
            const value *w = weights + (long)(kh * TAPS * in + i) * LANES;
            __m512bh left = pairs_at(w), middle = pairs_at(w + in * LANES), right = pairs_at(w + 2 * in * LANES);
#pragma GCC unroll 18 /* so that the sums stay in registers */
            for (int q = 0; q < TILE + 2; q++) {
                __m512bh two = everywhere(x + kh * line + (long)q * in + i);
                if (q > 1) sums[q - 2] = _mm512_dpbf16_ps(sums[q - 2], right, two);
                if (q > 0 && q <= TILE) sums[q - 1] = _mm512_dpbf16_ps(sums[q - 1], middle, two);
                if (q < TILE) sums[q] = _mm512_dpbf16_ps(sums[q], left, two);
            }
        }
}

/* 16 outputs (vectors 1) of 16 pixels, or 32 (vectors 2) of 8. */
INLINE void output_tile(int vectors, int kernel, int stride, const value *x, long line, int in, int out, const value *weights, __m512 *sums) {
    for (int kh = 0; kh < kernel; kh++)
        for (int kw = 0; kw < kernel; kw++) {
            const value *from = x + kh * line + (long)kw * in, *w = weights + (long)(kh * kernel + kw) * in * out;
            for (int i = 0; i < in; i += 2, w += 2 * out) {
                __m512bh a[2];
                for (int v = 0; v < vectors; v++) a[v] = pairs_at(w + 2 * LANES * v);
                for (int p = 0; p < TILE / vectors; p++) {
                    __m512bh two = everywhere(from + (long)p * stride * in + i);
                    for (int v = 0; v < vectors; v++) sums[p * vectors + v] = _mm512_dpbf16_ps(sums[p * vectors + v], a[v], two);
                }
            }
        }
}

/* y = [relu](conv(x) + bias [+ y]) */
static void convolve(struct padded x, struct padded y, int kernel, const value *weights, const float *bias, int add, int relu) {
    int stride = x.height / y.height, vectors = y.channels % (2 * LANES) ? 1 : 2, pixels = TILE / vectors;
    mask all = relu ? (mask){0} : ~(mask){0};
    for (int h = 0; h < y.height; h++)
        for (int w = 0; w < y.width; w += pixels)
            for (int o = 0; o < y.channels; o += LANES * vectors) {
                const value *from = pixel(x, h * stride - kernel / 2, w * stride - kernel / 2), *a = weights + 2 * o;
                value *to = pixel(y, h, w) + o;
                __m512 sums[TILE];
                for (int j = 0; j < TILE; j++) sums[j] = (__m512)at(bias + o + LANES * (j % vectors));
                if (y.channels == LANES && kernel == TAPS && stride == 1)
                    line_of_16(from, x.line, x.channels, a, sums);
                else if (vectors == 1)
                    output_tile(1, kernel, stride, from, x.line, x.channels, y.channels, a, sums);
                else
                    output_tile(2, kernel, stride, from, x.line, x.channels, y.channels, a, sums);
                for (int p = 0; p < pixels; p++, to += y.channels)
                    for (int v = 0; v < vectors; v++) {
                        vector sum = (vector)sums[p * vectors + v];
                        if (add) sum += get(to + LANES * v);
                        put(to + LANES * v, keep(above0(sum) | all, sum));
                    }
            }
}

static void copy_lines(struct padded map, value *dense, int inwards) {
    size_t values = (size_t)map.width * map.channels;
    for (int h = 0; h < map.height; h++, dense += values) {
        value *inside = pixel(map, h, 0);
        memcpy(inwards ? inside : dense, inwards ? dense : inside, values * sizeof *dense);
    }
}

/* `blocks` times x = relu(conv(relu(conv(x))) + x); in the first, a 1x1 convolution of x takes the place of the last x where `shortcut`
 * is given. x (images, height, width, in), y (images, height / stride, width / stride, out). Its width is a multiple of 16, or of 8
 * where `out` is one of 32. */
void residual_stage(const value *x, value *y, long images, int height, int width, int in, int out, int stride, int blocks,
                    const value *weights, const float *biases, const value *shortcut, const float *shortcut_bias, int threads) {
    int tall = height / stride, wide = width / stride;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        struct padded state = padded_map(tall, wide, out), middle = padded_map(tall, wide, out);
        struct padded given = shortcut ? padded_map(height, width, in) : state;
        for (long image = images * t / threads; image < images * (t + 1) / threads; image++) {
            const value *w = weights;
            const float *b = biases;
            copy_lines(given, (value *)x + image * height * width * in, 1);
            for (int block = 0; block < blocks; block++, b += 2 * out) {
                struct padded from = block ? state : given;
                convolve(from, middle, TAPS, w, b, 0, 1);
                if (shortcut && !block) convolve(from, state, 1, shortcut, shortcut_bias, 0, 0);
                w += (long)TAPS * TAPS * from.channels * out;
                convolve(middle, state, TAPS, w, b + out, 1, 1);
                w += (long)TAPS * TAPS * out * out;
            }
            copy_lines(state, y + image * tall * wide * out, 0);
        }
        if (shortcut) free(given.data);
        free(state.data);
        free(middle.data);
    }
}
#endif

/* uint8 planes (images, 3, pixels) -> channels last (images, pixels, 3) through a table (3, 256) of what each value becomes. */
void look_up(const uint8_t *in, value *out, long images, long pixels, const value *table, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long image = 0; image < images; image++) {
        const uint8_t *red = in + 3 * image * pixels, *green = red + pixels, *blue = green + pixels;
        value *to = out + 3 * image * pixels;
        for (long i = 0; i < pixels; i++, to += 3) {
            to[0] = table[red[i]];
            to[1] = table[256 + green[i]];
            to[2] = table[512 + blue[i]];
        }
    }
}
