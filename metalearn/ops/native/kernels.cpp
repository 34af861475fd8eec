// Kernels over task-batched, channels-last activations. One source, compiled once for float and once for double.
//
// An activation [tasks, n, channels, H, W] lies in memory with the channels of a pixel side by side; tasks may be the
// slowest axis or lie beside the channels (`Layout` says where). Each call works on a range of units, one unit being
// one task and set of examples (or some of its channels), so that callers may split a call among threads: no two units
// share an output. Every call returns 0, or 1 when there was no memory for scratch space.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef REAL vec __attribute__((vector_size(64)));
constexpr int LANES = 64 / sizeof(REAL);
// integers as wide as REAL, for masks and choices by lane
template <int bytes> struct Integer;
template <> struct Integer<4> { typedef int32_t type; };
template <> struct Integer<8> { typedef int64_t type; };
typedef Integer<sizeof(REAL)>::type integer;
typedef integer ivec __attribute__((vector_size(64)));
constexpr uint8_t DEAD = 4;  // choice of a pooled pixel that ReLU set to zero

struct Layout {
    int64_t task, example, pixel;  // strides in elements; one row of W pixels follows the other
};

// What a batch-norm, ReLU and pooling layer looks like. `m` examples make a set with statistics of its own.
struct Block {
    int64_t tasks, sets, m, channels, height, width, pool, parts;
    Layout full, pooled;
};

// Which channels a unit has: each task and set in `parts` parts of whole vectors.
struct Unit {
    int64_t task, set, first, last;

    template <class S> Unit(const S &s, int64_t unit) {
        const int64_t part = unit % s.parts, vectors = (s.channels + LANES - 1) / LANES;
        task = unit / s.parts / s.sets;
        set = unit / s.parts % s.sets;
        first = vectors * part / s.parts * LANES;
        last = vectors * (part + 1) / s.parts * LANES;
        if (last > s.channels) last = s.channels;
    }
};

#define ALWAYS static inline __attribute__((always_inline))

// The first k lanes; all of them wherever k is a constant.
#ifdef __AVX512F__
#include <immintrin.h>
ALWAYS __m512 load_part(const float *p, unsigned mask) { return _mm512_maskz_loadu_ps((__mmask16)mask, p); }
ALWAYS __m512d load_part(const double *p, unsigned mask) { return _mm512_maskz_loadu_pd((__mmask8)mask, p); }
ALWAYS void store_part(float *p, __m512 v, unsigned mask) { _mm512_mask_storeu_ps(p, (__mmask16)mask, v); }
ALWAYS void store_part(double *p, __m512d v, unsigned mask) { _mm512_mask_storeu_pd(p, (__mmask8)mask, v); }
ALWAYS vec load(const REAL *p, int k) {
    vec v;
    if (k != LANES) return (vec)load_part(p, (1u << k) - 1);
    std::memcpy(&v, p, sizeof v);
    return v;
}
ALWAYS void store(REAL *p, vec v, int k) {
    if (k != LANES)
        store_part(p, v, (1u << k) - 1);
    else
        std::memcpy(p, &v, sizeof v);
}
#else
ALWAYS vec load(const REAL *p, int k) {
    vec v = {};
    std::memcpy(&v, p, k * sizeof(REAL));
    return v;
}
ALWAYS void store(REAL *p, vec v, int k) { std::memcpy(p, &v, k * sizeof(REAL)); }
#endif
#ifdef __AVX512F__
ALWAYS __m512i widen(__m128i v, int32_t) { return _mm512_cvtepu8_epi32(v); }
ALWAYS __m512i widen(__m128i v, int64_t) { return _mm512_cvtepu8_epi64(v); }
ALWAYS __m128i narrow(__m512i v, int32_t) { return _mm512_cvtepi32_epi8(v); }
ALWAYS __m128i narrow(__m512i v, int64_t) { return _mm512_cvtepi64_epi8(v); }
ALWAYS ivec load_choice(const uint8_t *p, int k) {
    __m128i v = _mm_setzero_si128();
    std::memcpy(&v, p, k);
    return (ivec)widen(v, integer());
}
ALWAYS void store_choice(uint8_t *p, ivec v, int k) {
    __m128i b = narrow((__m512i)v, integer());
    std::memcpy(p, &b, k);
}
#else
ALWAYS ivec load_choice(const uint8_t *p, int k) {
    integer wide[LANES] = {};
    for (int l = 0; l < k; l++) wide[l] = p[l];
    ivec v;
    std::memcpy(&v, wide, sizeof v);
    return v;
}
ALWAYS void store_choice(uint8_t *p, ivec v, int k) {
    integer wide[LANES];
    std::memcpy(wide, &v, sizeof v);
    for (int l = 0; l < k; l++) p[l] = (uint8_t)wide[l];
}
#endif
ALWAYS vec splat(REAL a) { return a - vec{}; }
ALWAYS vec only(ivec mask, vec v) { return (vec)(mask & (ivec)v); }


// ---- forward: y = pool(relu(gamma (x - mean) r + beta)) ------------------------------------------------------------

template <int U, int P>
ALWAYS void forward(const Block &b, int64_t task, int64_t set, int64_t c, int k, const REAL *x, const REAL *gamma,
                    const REAL *beta, REAL eps, REAL *y, REAL *picked, uint8_t *choice, REAL *mean, REAL *scale) {
    const int64_t H = b.height, W = b.width, h = H / P, w = W / P, px = b.full.pixel, py = b.pooled.pixel;
    const int64_t at = (task * b.sets + set) * b.channels + c, tc = task * b.channels + c;
    const REAL *first = x + task * b.full.task + set * b.m * b.full.example + c;
    const REAL count = (REAL)(b.m * H * W);
    vec mu[U] = {}, var[U] = {};
    for (int64_t e = 0; e < b.m; e++)
        for (int64_t i = 0; i < H; i++) {
            const REAL *row = first + e * b.full.example + i * W * px;
            vec part[U] = {};
            for (int64_t j = 0; j < W; j++)
                for (int u = 0; u < U; u++) part[u] += load(row + j * px + u * LANES, k);
            for (int u = 0; u < U; u++) mu[u] += part[u];
        }
    for (int u = 0; u < U; u++) mu[u] /= count;
    for (int64_t e = 0; e < b.m; e++)
        for (int64_t i = 0; i < H; i++) {
            const REAL *row = first + e * b.full.example + i * W * px;
            vec part[U] = {};
            for (int64_t j = 0; j < W; j++)
                for (int u = 0; u < U; u++) {
                    vec d = load(row + j * px + u * LANES, k) - mu[u];
                    part[u] += d * d;
                }
            for (int u = 0; u < U; u++) var[u] += part[u];
        }
    vec slope[U], offset[U], sign[U];
    for (int u = 0; u < U; u++) {
        vec r, g = load(gamma + tc + u * LANES, k);
        for (int l = 0; l < LANES; l++) r[l] = 1 / std::sqrt(var[u][l] / count + eps);
        store(mean + at + u * LANES, mu[u], k);
        store(scale + at + u * LANES, r, k);
        slope[u] = g * r;
        offset[u] = load(beta + tc + u * LANES, k);
        sign[u] = only(g > 0, splat(1)) - only(g < 0, splat(1));
    }
    for (int64_t e = 0; e < b.m; e++)
        for (int64_t i = 0; i < h; i++)
            for (int64_t j = 0; j < w; j++) {
                const REAL *from = first + e * b.full.example + (i * P * W + j * P) * px;
                const int64_t to =
                    task * b.pooled.task + (set * b.m + e) * b.pooled.example + (i * w + j) * py + c;
                for (int u = 0; u < U; u++) {
                    vec best = load(from + u * LANES, k);
                    ivec index = {};
                    if (P == 2) {
                        vec key = best * sign[u];
                        for (int q = 1; q < 4; q++) {
                            vec v = load(from + ((q >> 1) * W + (q & 1)) * px + u * LANES, k), other = v * sign[u];
                            ivec larger = other > key;
                            key = (vec)((larger & (ivec)other) | (~larger & (ivec)key));
                            best = (vec)((larger & (ivec)v) | (~larger & (ivec)best));
                            index = (larger & (integer)q) | (~larger & index);
                        }
                    }
                    vec value = slope[u] * (best - mu[u]) + offset[u];
                    ivec off = value <= 0;  // false for NaN, which must go on
                    store(y + to + u * LANES, (vec)(~off & (ivec)value), k);
                    store(picked + to + u * LANES, best, k);
                    store_choice(choice + to + u * LANES, (off & (integer)DEAD) | (~off & index), k);
                }
            }
}

// ---- backward: dx = gamma r (g - M[g] - z M[g z]), dgamma = sum g z, dbeta = sum g, M the mean over the set ---------

template <int U, int P>
ALWAYS void backward(const Block &b, int64_t task, int64_t set, int64_t c, int k, const REAL *g, const REAL *x,
                     const REAL *picked, const uint8_t *choice, const REAL *gamma, const REAL *mean, const REAL *scale,
                     REAL *dx, REAL *dgamma, REAL *dbeta) {
    const int64_t H = b.height, W = b.width, h = H / P, w = W / P, px = b.full.pixel, py = b.pooled.pixel;
    const int64_t at = (task * b.sets + set) * b.channels + c, tc = task * b.channels + c;
    const int64_t full = task * b.full.task + set * b.m * b.full.example + c;
    const int64_t pooled = task * b.pooled.task + set * b.m * b.pooled.example + c;
    const REAL count = (REAL)(b.m * H * W);
    vec mu[U], r[U], sum_g[U] = {}, sum_gz[U] = {};
    for (int u = 0; u < U; u++) mu[u] = load(mean + at + u * LANES, k), r[u] = load(scale + at + u * LANES, k);
    for (int64_t e = 0; e < b.m; e++)
        for (int64_t i = 0; i < h; i++) {
            vec part_g[U] = {}, part_gz[U] = {};
            for (int64_t j = 0; j < w; j++) {
                const int64_t q = pooled + e * b.pooled.example + (i * w + j) * py;
                for (int u = 0; u < U; u++) {
                    ivec alive = load_choice(choice + q + u * LANES, k) < DEAD;
                    vec live = only(alive, load(g + q + u * LANES, k));
                    part_g[u] += live;
                    part_gz[u] += live * (load(picked + q + u * LANES, k) - mu[u]);
                }
            }
            for (int u = 0; u < U; u++) sum_g[u] += part_g[u], sum_gz[u] += part_gz[u];
        }
    vec by_g[U], by_x[U], constant[U];
    for (int u = 0; u < U; u++) {
        sum_gz[u] *= r[u];
        store(dgamma + at + u * LANES, sum_gz[u], k);
        store(dbeta + at + u * LANES, sum_g[u], k);
        by_g[u] = load(gamma + tc + u * LANES, k) * r[u];
        by_x[u] = -by_g[u] * r[u] * sum_gz[u] / count;
        constant[u] = -by_g[u] * sum_g[u] / count - by_x[u] * mu[u];
    }
    for (int64_t e = 0; e < b.m; e++)
        for (int64_t i = 0; i < h; i++)
            for (int64_t j = 0; j < w; j++) {
                const int64_t q = pooled + e * b.pooled.example + (i * w + j) * py;
                const int64_t p = full + e * b.full.example + (i * P * W + j * P) * px;
                for (int u = 0; u < U; u++) {
                    ivec chosen = load_choice(choice + q + u * LANES, k);
                    vec value = load(g + q + u * LANES, k) * by_g[u];
                    for (int s = 0; s < P * P; s++) {
                        const int64_t o = p + ((s >> 1) * W + (s & 1)) * px + u * LANES;
                        store(dx + o, load(x + o, k) * by_x[u] + constant[u] + only(chosen == (integer)s, value), k);
                    }
                }
            }
    for (int64_t e = 0; e < b.m; e++)  // rows and columns that no pooling window covers
        for (int64_t i = 0; i < H; i++)
            for (int64_t j = i < h * P ? w * P : 0; j < W; j++) {
                const int64_t o = full + e * b.full.example + (i * W + j) * px;
                for (int u = 0; u < U; u++)
                    store(dx + o + u * LANES, load(x + o + u * LANES, k) * by_x[u] + constant[u], k);
            }
}

// ---- double backward: pull (c, c_gamma, c_beta), cotangents of (dx, dgamma, dbeta), back to (g, x, gamma) ------------
//
// to_g     = gamma r P c + c_gamma z + c_beta at the chosen pixels,
// to_x     = -gamma r M[g z] (r P c) + (c_gamma - gamma r M[c z]) (r P g) - gamma r^2 kappa z,  kappa = M[c P g],
// to_gamma = r n kappa,  with P v = v - M[v] - z M[v z] and n pixels in a set.

template <int U, int P>
ALWAYS void twice(const Block &b, int64_t task, int64_t set, int64_t c, int k, const REAL *cot, const REAL *cot_gamma,
                  const REAL *cot_beta, const REAL *g, const REAL *x, const REAL *picked, const uint8_t *choice,
                  const REAL *gamma, const REAL *mean, const REAL *scale, const REAL *dgamma, const REAL *dbeta,
                  REAL *to_g, REAL *to_x, REAL *to_gamma) {
    const int64_t H = b.height, W = b.width, h = H / P, w = W / P, px = b.full.pixel, py = b.pooled.pixel;
    const int64_t at = (task * b.sets + set) * b.channels + c, tc = task * b.channels + c;
    const int64_t full = task * b.full.task + set * b.m * b.full.example + c;
    const int64_t pooled = task * b.pooled.task + set * b.m * b.pooled.example + c;
    const REAL count = (REAL)(b.m * H * W);
    vec mu[U], r[U], sum_c[U] = {}, sum_cz[U] = {}, sum_cg[U] = {};
    for (int u = 0; u < U; u++) mu[u] = load(mean + at + u * LANES, k), r[u] = load(scale + at + u * LANES, k);
    for (int64_t e = 0; e < b.m; e++) {
        for (int64_t i = 0; i < h; i++) {
            vec part_c[U] = {}, part_cz[U] = {}, part_cg[U] = {};
            for (int64_t j = 0; j < w; j++) {
                const int64_t q = pooled + e * b.pooled.example + (i * w + j) * py;
                const int64_t p = full + e * b.full.example + (i * P * W + j * P) * px;
                for (int u = 0; u < U; u++) {
                    ivec chosen = load_choice(choice + q + u * LANES, k);
                    vec at_chosen = {};
                    for (int s = 0; s < P * P; s++) {
                        const int64_t o = p + ((s >> 1) * W + (s & 1)) * px + u * LANES;
                        vec v = load(cot + o, k);
                        part_c[u] += v;
                        part_cz[u] += v * (load(x + o, k) - mu[u]);
                        at_chosen += only(chosen == (integer)s, v);
                    }
                    store(to_g + q + u * LANES, at_chosen, k);  // waits there; zero where ReLU gave zero
                    part_cg[u] += at_chosen * load(g + q + u * LANES, k);
                }
            }
            for (int u = 0; u < U; u++) sum_c[u] += part_c[u], sum_cz[u] += part_cz[u], sum_cg[u] += part_cg[u];
        }
        for (int64_t i = 0; i < H; i++)
            for (int64_t j = i < h * P ? w * P : 0; j < W; j++) {
                const int64_t o = full + e * b.full.example + (i * W + j) * px;
                for (int u = 0; u < U; u++) {
                    vec v = load(cot + o + u * LANES, k);
                    sum_c[u] += v;
                    sum_cz[u] += v * (load(x + o + u * LANES, k) - mu[u]);
                }
            }
    }
    vec by_c[U], by_g[U], by_x[U], constant[U], g_c[U], g_x[U], g_constant[U];
    for (int u = 0; u < U; u++) {
        vec ga = load(gamma + tc + u * LANES, k), sg = load(dbeta + at + u * LANES, k),
            sgz = load(dgamma + at + u * LANES, k), cg = load(cot_gamma + at + u * LANES, k),
            cb = load(cot_beta + at + u * LANES, k), rz = sum_cz[u] * r[u];
        vec kappa = (sum_cg[u] - (sum_c[u] * sg + rz * sgz) / count) / count;
        store(to_gamma + at + u * LANES, r[u] * count * kappa, k);
        by_c[u] = -ga * r[u] * r[u] * sgz / count;
        by_g[u] = (cg - ga * r[u] * rz / count) * r[u];
        // z = r (x - mu): everything linear in z, gathered
        vec by_z = -by_c[u] * rz / count - by_g[u] * sgz / count - ga * r[u] * r[u] * kappa;
        by_x[u] = by_z * r[u];
        constant[u] = -by_c[u] * sum_c[u] / count - by_g[u] * sg / count - by_x[u] * mu[u];
        g_c[u] = ga * r[u];
        g_x[u] = (cg - ga * r[u] * rz / count) * r[u];
        g_constant[u] = cb - ga * r[u] * sum_c[u] / count - g_x[u] * mu[u];
    }
    for (int64_t e = 0; e < b.m; e++)
        for (int64_t i = 0; i < h; i++)
            for (int64_t j = 0; j < w; j++) {
                const int64_t q = pooled + e * b.pooled.example + (i * w + j) * py;
                const int64_t p = full + e * b.full.example + (i * P * W + j * P) * px;
                for (int u = 0; u < U; u++) {
                    ivec chosen = load_choice(choice + q + u * LANES, k);
                    vec value = load(g + q + u * LANES, k) * by_g[u];
                    vec tg = load(to_g + q + u * LANES, k) * g_c[u] +
                             load(picked + q + u * LANES, k) * g_x[u] + g_constant[u];
                    store(to_g + q + u * LANES, only(chosen < DEAD, tg), k);
                    for (int s = 0; s < P * P; s++) {
                        const int64_t o = p + ((s >> 1) * W + (s & 1)) * px + u * LANES;
                        vec v = load(cot + o, k) * by_c[u] + load(x + o, k) * by_x[u] + constant[u];
                        store(to_x + o, v + only(chosen == (integer)s, value), k);
                    }
                }
            }
    for (int64_t e = 0; e < b.m; e++)
        for (int64_t i = 0; i < H; i++)
            for (int64_t j = i < h * P ? w * P : 0; j < W; j++) {
                const int64_t o = full + e * b.full.example + (i * W + j) * px;
                for (int u = 0; u < U; u++)
                    store(to_x + o + u * LANES,
                          load(cot + o + u * LANES, k) * by_c[u] + load(x + o + u * LANES, k) * by_x[u] + constant[u], k);
            }
}

// Channels in groups of 4 and of 1 vectors, and a part of a vector at the end.
#define EACH_CHANNEL(KERNEL, P, ...)                                                                  \
    for (int64_t unit = first; unit < last; unit++) {                                                 \
        const Unit at(*b, unit);                                                                      \
        int64_t c = at.first;                                                                         \
        for (; c + 4 * LANES <= at.last; c += 4 * LANES)                                              \
            KERNEL<4, P>(*b, at.task, at.set, c, LANES, __VA_ARGS__);                                 \
        for (; c + LANES <= at.last; c += LANES) KERNEL<1, P>(*b, at.task, at.set, c, LANES, __VA_ARGS__); \
        if (c < at.last) KERNEL<1, P>(*b, at.task, at.set, c, (int)(at.last - c), __VA_ARGS__);       \
    }
#define EACH_UNIT(KERNEL, ...)                       \
    if (b->pool == 2) {                              \
        EACH_CHANNEL(KERNEL, 2, __VA_ARGS__)         \
    } else {                                         \
        EACH_CHANNEL(KERNEL, 1, __VA_ARGS__)         \
    }

extern "C" int block_forward(const Block *b, int64_t first, int64_t last, const REAL *x, const REAL *gamma,
                              const REAL *beta, double eps, REAL *y, REAL *picked, uint8_t *choice, REAL *mean,
                              REAL *scale) {
    EACH_UNIT(forward, x, gamma, beta, (REAL)eps, y, picked, choice, mean, scale)
    return 0;
}

extern "C" int block_backward(const Block *b, int64_t first, int64_t last, const REAL *g, const REAL *x,
                               const REAL *picked, const uint8_t *choice, const REAL *gamma, const REAL *mean,
                               const REAL *scale, REAL *dx, REAL *dgamma, REAL *dbeta) {
    EACH_UNIT(backward, g, x, picked, choice, gamma, mean, scale, dx, dgamma, dbeta)
    return 0;
}

extern "C" int block_twice(const Block *b, int64_t first, int64_t last, const REAL *cot, const REAL *cot_gamma,
                            const REAL *cot_beta, const REAL *g, const REAL *x, const REAL *picked,
                            const uint8_t *choice, const REAL *gamma, const REAL *mean, const REAL *scale,
                            const REAL *dgamma, const REAL *dbeta, REAL *to_g, REAL *to_x, REAL *to_gamma) {
    EACH_UNIT(twice, cot, cot_gamma, cot_beta, g, x, picked, choice, gamma, mean, scale, dgamma, dbeta, to_g, to_x,
              to_gamma)
    return 0;
}

// ---- a network's first layer: 3x3 convolution of few channels of data (stride 1, zero padding), affine, ReLU, pooling
//
// y = relu(a v + b), v = conv(x, w) at the pixel of each 2x2 window where a v is largest. The full convolution is never
// stored. With the chosen pixels fixed, v is linear in w: `push` is that map, `pull` its adjoint.

struct Stem {
    int64_t tasks, sets, m, inputs, channels, height, width, parts;
    int64_t x_task, x_example;  // strides of x, whose pictures are [inputs][height][width]
    int64_t w_task;             // stride of the filters, [9 inputs][channels]; 0 when all tasks share them
    Layout pooled;
};

struct Scratch {
    REAL *memory;
    explicit Scratch(int64_t size) : memory((REAL *)std::malloc(size * sizeof(REAL))) {}
    ~Scratch() { std::free(memory); }
};

ALWAYS int64_t area(const Stem &s) { return s.inputs * (s.height + 2) * (s.width + 2); }

ALWAYS void pad(const Stem &s, const REAL *picture, const REAL *shift, REAL *out) {
    const int64_t H = s.height, W = s.width, row = W + 2;
    for (int64_t i = 0; i < s.inputs; i++) {
        REAL *plane = out + i * (H + 2) * row;
        const REAL minus = shift ? shift[i] : 0;
        for (int64_t o = 0; o < (H + 2) * row; o++) plane[o] = -minus;
        for (int64_t y = 0; y < H; y++)
            for (int64_t j = 0; j < W; j++) plane[(y + 1) * row + j + 1] = picture[(i * H + y) * W + j] - minus;
    }
}

ALWAYS int64_t tap_offset(const Stem &s, int64_t tap) {
    return (tap / 9 * (s.height + 2) + tap % 9 / 3) * (s.width + 2) + tap % 3;
}

ALWAYS vec ones(int k) {
    vec v = {};
    for (int l = 0; l < k; l++) v[l] = 1;
    return v;
}

// Mean [taps] and covariance [taps][taps] of the patches around all pixels of a set.
extern "C" int stem_moments(const Stem *p, int64_t first, int64_t last, const REAL *x, REAL *mean, REAL *covariance) {
    const Stem &s = *p;
    const int64_t H = s.height, W = s.width, row = W + 2, taps = 9 * s.inputs;
    const double count = (double)(s.m * H * W);
    Scratch padded(area(s) + LANES), shift(s.inputs);
    double *sums = (double *)std::malloc(taps * (taps + 1) * sizeof(double));
    if (!padded.memory || !shift.memory || !sums) {
        std::free(sums);
        return 1;
    }
    std::memset(padded.memory + area(s), 0, LANES * sizeof(REAL));  // read, and multiplied by zero
    for (int64_t unit = first; unit < last; unit++) {
        const REAL *pictures = x + unit / s.sets * s.x_task + unit % s.sets * s.m * s.x_example;
        for (int64_t i = 0; i < s.inputs; i++) {  // any shift will do; the mean leaves nothing to cancel
            double sum = 0;
            for (int64_t e = 0; e < s.m; e++)
                for (int64_t o = 0; o < H * W; o++) sum += pictures[e * s.x_example + i * H * W + o];
            shift.memory[i] = (REAL)(sum / count);
        }
        std::memset(sums, 0, taps * (taps + 1) * sizeof(double));
        for (int64_t e = 0; e < s.m; e++) {
            pad(s, pictures + e * s.x_example, shift.memory, padded.memory);
            for (int64_t a = 0; a < taps; a += 3)
                for (int64_t b = a; b < taps; b += 3) {
                    vec products[3][3] = {}, values[3] = {};
                    for (int64_t y = 0; y < H; y++) {
                        const REAL *fa = padded.memory + tap_offset(s, a) + y * row;
                        const REAL *fb = padded.memory + tap_offset(s, b) + y * row;
                        for (int64_t j = 0; j < W; j += LANES) {
                            const int k = W - j < LANES ? (int)(W - j) : LANES;
                            const vec valid = ones(k);
                            for (int d = 0; d < 3; d++) {
                                vec v = load(fa + j + d, LANES) * valid;
                                values[d] += v;
                                for (int f = 0; f < 3; f++) products[d][f] += v * load(fb + j + f, LANES);
                            }
                        }
                    }
                    for (int d = 0; d < 3; d++)
                        for (int l = 0; l < LANES; l++) {
                            for (int f = 0; f < 3; f++) sums[(a + d) * (taps + 1) + b + f] += products[d][f][l];
                            if (a == b) sums[(a + d) * (taps + 1) + taps] += values[d][l];
                        }
                }
        }
        for (int64_t a = 0; a < taps; a++) {
            const double ma = sums[a * (taps + 1) + taps] / count;
            mean[unit * taps + a] = (REAL)(ma + shift.memory[a / 9]);
            for (int64_t b = 0; b < taps; b++) {
                const double sum = a / 3 <= b / 3 ? sums[a * (taps + 1) + b] : sums[b * (taps + 1) + a];
                const double mb = sums[b * (taps + 1) + taps] / count;
                covariance[(unit * taps + a) * taps + b] = (REAL)(sum / count - ma * mb);
            }
        }
    }
    std::free(sums);
    return 0;
}

template <int U>  // the four pixels of one window
ALWAYS void window(const Stem &s, const REAL *corner, const REAL *w, int k, vec (&v)[4][U]) {
    const int64_t row = s.width + 2;
    for (int q = 0; q < 4; q++)
        for (int u = 0; u < U; u++) v[q][u] = vec{};
    for (int64_t i = 0; i < s.inputs; i++)
        for (int tap = 0; tap < 9; tap++) {
            const REAL *from = corner + (i * (s.height + 2) + tap / 3) * row + tap % 3;
            vec f[U];
            for (int u = 0; u < U; u++) f[u] = load(w + (i * 9 + tap) * s.channels + u * LANES, k);
            for (int q = 0; q < 4; q++)
                for (int u = 0; u < U; u++) v[q][u] += from[(q >> 1) * row + (q & 1)] * f[u];
        }
}

template <int U>
ALWAYS void pick(const Stem &s, const REAL *padded, const REAL *w, const REAL *a, const REAL *b, int k, REAL *y,
                 REAL *picked, uint8_t *choice) {
    const int64_t h = s.height / 2, wide = s.width / 2;
    vec slope[U], offset[U], sign[U];
    for (int u = 0; u < U; u++) {
        slope[u] = load(a + u * LANES, k), offset[u] = load(b + u * LANES, k);
        sign[u] = only(slope[u] > 0, splat(1)) - only(slope[u] < 0, splat(1));
    }
    for (int64_t i = 0; i < h; i++)
        for (int64_t j = 0; j < wide; j++) {
            vec v[4][U];
            window<U>(s, padded + 2 * i * (s.width + 2) + 2 * j, w, k, v);
            const int64_t to = (i * wide + j) * s.pooled.pixel;
            for (int u = 0; u < U; u++) {
                vec best = v[0][u], key = best * sign[u];
                ivec index = {};
                for (int q = 1; q < 4; q++) {
                    vec other = v[q][u] * sign[u];
                    ivec larger = other > key;
                    key = (vec)((larger & (ivec)other) | (~larger & (ivec)key));
                    best = (vec)((larger & (ivec)v[q][u]) | (~larger & (ivec)best));
                    index = (larger & (integer)q) | (~larger & index);
                }
                vec value = slope[u] * best + offset[u];
                ivec off = value <= 0;  // false for NaN, which must go on
                store(y + to + u * LANES, (vec)(~off & (ivec)value), k);
                store(picked + to + u * LANES, best, k);
                store_choice(choice + to + u * LANES, (off & (integer)DEAD) | (~off & index), k);
            }
        }
}

// to_g = a push(c_w) + c_a v + c_b at the pixels chosen before
template <int U>
ALWAYS void push(const Stem &s, const REAL *padded, const REAL *cw, const REAL *ca, const REAL *cb, const REAL *a, int k,
                 const REAL *picked, const uint8_t *choice, REAL *to_g) {
    const int64_t h = s.height / 2, wide = s.width / 2;
    for (int64_t i = 0; i < h; i++)
        for (int64_t j = 0; j < wide; j++) {
            vec v[4][U];
            window<U>(s, padded + 2 * i * (s.width + 2) + 2 * j, cw, k, v);
            const int64_t at = (i * wide + j) * s.pooled.pixel;
            for (int u = 0; u < U; u++) {
                ivec chosen = load_choice(choice + at + u * LANES, k);
                vec value = {};
                for (int q = 0; q < 4; q++) value += only(chosen == (integer)q, v[q][u]);
                value = load(a + u * LANES, k) * value + load(ca + u * LANES, k) * load(picked + at + u * LANES, k) +
                        load(cb + u * LANES, k);
                store(to_g + at + u * LANES, only(chosen < DEAD, value), k);
            }
        }
}

// sums over a picture of g, g v, and g times the patch at the chosen pixel
template <int U>
ALWAYS void pull(const Stem &s, const REAL *padded, const REAL *g, const REAL *picked, const uint8_t *choice, int k,
                 REAL *dw, REAL *sum_gv, REAL *sum_g) {
    const int64_t h = s.height / 2, wide = s.width / 2, row = s.width + 2;
    for (int64_t i = 0; i < s.inputs; i++) {
        vec acc[9][U] = {}, gv[U] = {}, gs[U] = {};
        for (int64_t y = 0; y < h; y++)
            for (int64_t j = 0; j < wide; j++) {
                const int64_t at = (y * wide + j) * s.pooled.pixel;
                const REAL *corner = padded + (i * (s.height + 2) + 2 * y) * row + 2 * j;
                ivec chosen[U];
                vec live[U];
                for (int u = 0; u < U; u++) {
                    chosen[u] = load_choice(choice + at + u * LANES, k);
                    live[u] = only(chosen[u] < DEAD, load(g + at + u * LANES, k));
                    if (i == 0) gs[u] += live[u], gv[u] += live[u] * load(picked + at + u * LANES, k);
                }
                for (int q = 0; q < 4; q++) {
                    const REAL *from = corner + (q >> 1) * row + (q & 1);
                    for (int u = 0; u < U; u++) {
                        const vec v = only(chosen[u] == (integer)q, live[u]);
                        for (int tap = 0; tap < 9; tap++) acc[tap][u] += from[(tap / 3) * row + tap % 3] * v;
                    }
                }
            }
        for (int u = 0; u < U; u++) {
            for (int tap = 0; tap < 9; tap++) {
                REAL *to = dw + (i * 9 + tap) * s.channels + u * LANES;
                store(to, load(to, k) + acc[tap][u], k);
            }
            if (i == 0) {
                store(sum_g + u * LANES, load(sum_g + u * LANES, k) + gs[u], k);
                store(sum_gv + u * LANES, load(sum_gv + u * LANES, k) + gv[u], k);
            }
        }
    }
}

// Runs BODY(U, k) for the channels c, ... of each picture, padded, of each unit.
#define EACH_PICTURE(MOST, BODY)                                                                \
    const Stem &s = *p;                                                                         \
    Scratch scratch(area(s));                                                                   \
    const REAL *padded = scratch.memory;                                                        \
    if (!padded) return 1;                                                                      \
    for (int64_t unit = first; unit < last; unit++) {                                           \
        const Unit who(s, unit);                                                                \
        const int64_t task = who.task, set = who.set, own = task * s.sets + set, row = own * s.channels; \
        for (int64_t e = 0; e < s.m; e++) {                                                     \
            pad(s, x + task * s.x_task + (set * s.m + e) * s.x_example, nullptr, scratch.memory); \
            const int64_t at = task * s.pooled.task + (set * s.m + e) * s.pooled.example;       \
            int64_t c = who.first;                                                              \
            for (; c + MOST * LANES <= who.last; c += MOST * LANES) BODY(MOST, LANES)           \
            for (; c + LANES <= who.last; c += LANES) BODY(1, LANES)                            \
            if (c < who.last) BODY(1, (int)(who.last - c))                                      \
        }                                                                                       \
    }                                                                                           \
    return 0;

extern "C" int stem_pick(const Stem *p, int64_t first, int64_t last, const REAL *x, const REAL *w, const REAL *a,
                         const REAL *b, REAL *y, REAL *picked, uint8_t *choice) {
#define PICK(U, K) \
    pick<U>(s, padded, w + task * s.w_task + c, a + row + c, b + row + c, K, y + at + c, picked + at + c, choice + at + c);
    EACH_PICTURE(4, PICK)
}

extern "C" int stem_push(const Stem *p, int64_t first, int64_t last, const REAL *x, const REAL *cw, const REAL *ca,
                         const REAL *cb, const REAL *a, const REAL *picked, const uint8_t *choice, REAL *to_g) {
#define PUSH(U, K)                                                                                                     \
    push<U>(s, padded, cw + task * s.w_task + c, ca + row + c, cb + row + c, a + row + c, K, picked + at + c, choice + at + c, \
            to_g + at + c);
    EACH_PICTURE(4, PUSH)
}

// dw [units][9 inputs][channels] and the sums [units][channels] must be zero before.
extern "C" int stem_pull(const Stem *p, int64_t first, int64_t last, const REAL *x, const REAL *g, const REAL *picked,
                         const uint8_t *choice, REAL *dw, REAL *sum_gv, REAL *sum_g) {
#define PULL(U, K)                                                                                                  \
    pull<U>(s, padded, g + at + c, picked + at + c, choice + at + c, K, dw + own * 9 * s.inputs * s.channels + c,  \
            sum_gv + row + c, sum_g + row + c);
    EACH_PICTURE(2, PULL)
}

// ---- 3x3 convolution with filters of each task's own, stride 1, one pixel of zero padding -----------------------------
//
// Filters lie as [9][inputs][outputs]. For each of the 9 taps, one after the other, the pairs of an output pixel and the
// input pixel that the tap sees are multiplied; pairs outside the picture are not in the list, so no work is spent on
// the padding.

struct Conv {
    int64_t tasks, n, inputs, outputs, height, width;
    Layout x, y;
    int64_t w_task;  // stride of the filters; 0 when all tasks share them
};

struct Pair {
    int32_t x, y;  // offsets of the pixels from the first picture's
};

// Accumulators are rows (pixels, or inputs) by U vectors of outputs: with U vectors of filters, at most 32 registers.
constexpr int rows(int U) { return U == 4 ? 7 : 12; }
constexpr int weight_rows(int U) { return U == 4 ? 7 : U == 2 ? 11 : 12; }

// The pairs of each tap for a group of whole pictures, picture after picture, so that fewer pictures have a prefix.
struct Pairs {
    int64_t pictures, each[9];
    Pair *list[9];
    Pair *memory;

    Pairs(const Conv &p, int64_t pixels) {
        pictures = pixels / (p.height * p.width);
        if (pictures < 1) pictures = 1;
        if (pictures > p.n) pictures = p.n;
        const int64_t area = pictures * p.height * p.width;
        memory = (Pair *)std::malloc(9 * area * sizeof(Pair));
        if (!memory) return;
        for (int tap = 0; tap < 9; tap++) {
            Pair *to = list[tap] = memory + tap * area;
            const int64_t dy = tap / 3 - 1, dx = tap % 3 - 1;
            for (int64_t e = 0; e < pictures; e++) {
                for (int64_t i = 0; i < p.height; i++)
                    for (int64_t j = 0; j < p.width; j++) {
                        const int64_t y = i + dy, x = j + dx;
                        if (y < 0 || y >= p.height || x < 0 || x >= p.width) continue;
                        to->x = (int32_t)(e * p.x.example + (y * p.width + x) * p.x.pixel);
                        to->y = (int32_t)(e * p.y.example + (i * p.width + j) * p.y.pixel);
                        to++;
                    }
                if (e == 0) each[tap] = to - list[tap];
            }
        }
    }
    ~Pairs() { std::free(memory); }
};

// y += x w for R pairs and U vectors of outputs; `flip` exchanges the roles of the pair's pixels.
template <int R, int U>
ALWAYS void multiply(const Pair *pairs, bool flip, const REAL *x, const REAL *w, int64_t inputs, int64_t outputs, REAL *y,
                     int k, bool zero) {
    const REAL *from[R];
    REAL *to[R];
    vec acc[R][U];
    for (int r = 0; r < R; r++) {
        from[r] = x + (flip ? pairs[r].y : pairs[r].x);
        to[r] = y + (flip ? pairs[r].x : pairs[r].y);
        for (int u = 0; u < U; u++) acc[r][u] = zero ? vec{} : load(to[r] + u * LANES, k);
    }
    constexpr int STEP = U == 2 ? 2 : 1;  // there are more pixels than registers for their addresses
    int64_t i = 0;
    for (; i + STEP <= inputs; i += STEP) {
        vec f[STEP][U];
        for (int s = 0; s < STEP; s++)
            for (int u = 0; u < U; u++) f[s][u] = load(w + (i + s) * outputs + u * LANES, k);
        for (int r = 0; r < R; r++)
            for (int s = 0; s < STEP; s++)
                for (int u = 0; u < U; u++) acc[r][u] += from[r][i + s] * f[s][u];
    }
    for (; i < inputs; i++)
        for (int r = 0; r < R; r++)
            for (int u = 0; u < U; u++) acc[r][u] += from[r][i] * load(w + i * outputs + u * LANES, k);
    for (int r = 0; r < R; r++)
        for (int u = 0; u < U; u++) store(to[r] + u * LANES, acc[r][u], k);
}

template <int U>
ALWAYS void multiply_all(const Pairs &pairs, int64_t pictures, bool flip, const REAL *x, const REAL *w, int64_t inputs,
                         int64_t outputs, REAL *y, int k) {
    static const int order[9] = {4, 0, 1, 2, 3, 5, 6, 7, 8};  // the centre first: it sees every pixel
    for (int t = 0; t < 9; t++) {
        const int tap = order[t];
        const int64_t count = pictures * pairs.each[tap];
        const REAL *filters = w + tap * inputs * outputs;
        int64_t i = 0;
        for (; i + rows(U) <= count; i += rows(U))
            multiply<rows(U), U>(pairs.list[tap] + i, flip, x, filters, inputs, outputs, y, k, t == 0);
        for (; i + 2 <= count; i += 2)
            multiply<2, U>(pairs.list[tap] + i, flip, x, filters, inputs, outputs, y, k, t == 0);
        for (; i < count; i++)
            multiply<1, U>(pairs.list[tap] + i, flip, x, filters, inputs, outputs, y, k, t == 0);
    }
}

ALWAYS void convolve(const Conv &p, const Pairs &pairs, bool flip, const REAL *x, const REAL *w, int64_t inputs,
                     int64_t outputs, REAL *y) {
    const int64_t x_example = flip ? p.y.example : p.x.example, y_example = flip ? p.x.example : p.y.example;
    for (int64_t e = 0; e < p.n; e += pairs.pictures) {
        const int64_t pictures = p.n - e < pairs.pictures ? p.n - e : pairs.pictures;
        const REAL *from = x + e * x_example;
        REAL *to = y + e * y_example;
        int64_t c = 0;
        for (; c + 4 * LANES <= outputs; c += 4 * LANES)
            multiply_all<4>(pairs, pictures, flip, from, w + c, inputs, outputs, to + c, LANES);
        for (; c + 2 * LANES <= outputs; c += 2 * LANES)
            multiply_all<2>(pairs, pictures, flip, from, w + c, inputs, outputs, to + c, LANES);
        for (; c + LANES <= outputs; c += LANES)
            multiply_all<1>(pairs, pictures, flip, from, w + c, inputs, outputs, to + c, LANES);
        if (c < outputs) multiply_all<1>(pairs, pictures, flip, from, w + c, inputs, outputs, to + c, (int)(outputs - c));
    }
}

constexpr int64_t PIXELS = 256;  // of a group of pictures, whose inputs and outputs should stay in the nearest caches

extern "C" int conv_forward(const Conv *p, int64_t first, int64_t last, const REAL *x, const REAL *w, REAL *y) {
    Pairs pairs(*p, PIXELS);
    if (!pairs.memory) return 1;
    for (int64_t t = first; t < last; t++)
        convolve(*p, pairs, false, x + t * p->x.task, w + t * p->w_task, p->inputs, p->outputs, y + t * p->y.task);
    return 0;
}

// The transpose of a rows x columns part of a LANES x LANES square, by exchanging ever smaller parts of pairs of rows.
ALWAYS void transpose_square(const REAL *from, int64_t from_row, REAL *to, int64_t to_row, int rows, int columns) {
#ifdef __clang__
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) to[c * to_row + r] = from[r * from_row + c];
#else
    vec v[LANES];
    for (int r = 0; r < LANES; r++) v[r] = r < rows ? load(from + r * from_row, columns) : vec{};
    for (int half = LANES / 2; half; half /= 2) {
        ivec low, high;
        for (int l = 0; l < LANES; l++) {
            low[l] = l & half ? LANES + l - half : l;
            high[l] = l & half ? LANES + l : l + half;
        }
        for (int r = 0; r < LANES; r++)
            if (!(r & half)) {
                vec a = v[r], b = v[r + half];
                v[r] = __builtin_shuffle(a, b, low);
                v[r + half] = __builtin_shuffle(a, b, high);
            }
    }
    for (int r = 0; r < LANES; r++)
        if (r < columns) store(to + r * to_row, v[r], rows);
#endif
}

// [rows][columns] to [columns][rows]
static void transpose(const REAL *from, int64_t rows, int64_t columns, REAL *to) {
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t o = 0; o < columns; o += LANES) {
            if (i + LANES <= rows && o + LANES <= columns)
                transpose_square(from + i * columns + o, columns, to + o * rows + i, rows, LANES, LANES);
            else
                transpose_square(from + i * columns + o, columns, to + o * rows + i, rows,
                                 (int)(rows - i < LANES ? rows - i : LANES), (int)(columns - o < LANES ? columns - o : LANES));
        }
}

extern "C" int conv_data(const Conv *p, int64_t first, int64_t last, const REAL *g, const REAL *w, REAL *dx) {
    Pairs pairs(*p, PIXELS);
    Scratch turned(9 * p->inputs * p->outputs);
    if (!pairs.memory || !turned.memory) return 1;
    for (int64_t t = first; t < last; t++) {
        const int64_t size = p->inputs * p->outputs;
        if (t == first || p->w_task)
            for (int tap = 0; tap < 9; tap++)
                transpose(w + t * p->w_task + tap * size, p->inputs, p->outputs, turned.memory + tap * size);
        convolve(*p, pairs, true, g + t * p->y.task, turned.memory, p->outputs, p->inputs, dx + t * p->x.task);
    }
    return 0;
}

// dw += x' g for R inputs and U vectors of outputs, over some pairs
template <int R, int U>
ALWAYS void correlate(const Pair *pairs, int64_t count, const REAL *x, const REAL *g, REAL *dw, int64_t outputs, int k) {
    vec acc[R][U];
    for (int r = 0; r < R; r++)
        for (int u = 0; u < U; u++) acc[r][u] = load(dw + r * outputs + u * LANES, k);
    for (int64_t i = 0; i < count; i++) {
        const REAL *a = x + pairs[i].x, *b = g + pairs[i].y;
        vec v[U];
        for (int u = 0; u < U; u++) v[u] = load(b + u * LANES, k);
        for (int r = 0; r < R; r++)
            for (int u = 0; u < U; u++) acc[r][u] += a[r] * v[u];
    }
    for (int r = 0; r < R; r++)
        for (int u = 0; u < U; u++) store(dw + r * outputs + u * LANES, acc[r][u], k);
}

template <int U>
ALWAYS void correlate_all(const Pair *pairs, int64_t count, const REAL *x, const REAL *g, REAL *dw, int64_t inputs,
                          int64_t outputs, int k) {
    constexpr int R = weight_rows(U);
    const int64_t blocks = (inputs + R - 1) / R, short_ones = blocks * R - inputs;
    int64_t i = 0;
    if (short_ones <= blocks)  // as even as can be: blocks of R and of R - 1
        for (; i < short_ones * (R - 1); i += R - 1)
            correlate<R - 1, U>(pairs, count, x + i, g, dw + i * outputs, outputs, k);
    for (; i + R <= inputs; i += R) correlate<R, U>(pairs, count, x + i, g, dw + i * outputs, outputs, k);
    for (; i + 3 <= inputs; i += 3) correlate<3, U>(pairs, count, x + i, g, dw + i * outputs, outputs, k);
    for (; i < inputs; i++) correlate<1, U>(pairs, count, x + i, g, dw + i * outputs, outputs, k);
}

extern "C" int conv_weight(const Conv *p, int64_t first, int64_t last, const REAL *x, const REAL *g, REAL *dw) {
    constexpr int64_t RUN = 64;
    Pairs pairs(*p, PIXELS);
    if (!pairs.memory) return 1;
    const int64_t size = 9 * p->inputs * p->outputs;
    for (int64_t t = first; t < last; t++) {
        REAL *out = dw + t * size;
        std::memset(out, 0, size * sizeof(REAL));
        for (int64_t e = 0; e < p->n; e += pairs.pictures) {
            const int64_t pictures = p->n - e < pairs.pictures ? p->n - e : pairs.pictures;
            const REAL *a = x + t * p->x.task + e * p->x.example, *b = g + t * p->y.task + e * p->y.example;
            for (int64_t run = 0; run < pictures * pairs.each[4]; run += RUN)
                for (int tap = 0; tap < 9; tap++) {
                    const int64_t all = pictures * pairs.each[tap], count = all - run < RUN ? all - run : RUN;
                    if (count <= 0) continue;
                    const Pair *from = pairs.list[tap] + run;
                    REAL *to = out + tap * p->inputs * p->outputs;
                    int64_t c = 0;
                    for (; c + 4 * LANES <= p->outputs; c += 4 * LANES)
                        correlate_all<4>(from, count, a, b + c, to + c, p->inputs, p->outputs, LANES);
                    for (; c + 2 * LANES <= p->outputs; c += 2 * LANES)
                        correlate_all<2>(from, count, a, b + c, to + c, p->inputs, p->outputs, LANES);
                    for (; c + LANES <= p->outputs; c += LANES)
                        correlate_all<1>(from, count, a, b + c, to + c, p->inputs, p->outputs, LANES);
                    if (c < p->outputs)
                        correlate_all<1>(from, count, a, b + c, to + c, p->inputs, p->outputs, (int)(p->outputs - c));
                }
        }
    }
    return 0;
}

// Whether the convolutions were written for this processor: without AVX-512 the library's are faster.
extern "C" int conv_worthwhile() {
#ifdef __AVX512F__
    return 1;
#else
    return 0;
#endif
}
