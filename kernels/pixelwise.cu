// The operations between convolutions: pixel norm, resampling, activation, clip, linear combinations.
//
//     pixel_norm            y = x / (eps + rms(x)) over a pixel's channels (EDM2 eq. 30), x first averaged
//                           over 2x2 if `down`
//     pixel_norm_backward   gx = (gy - x (gy . x) / (C r d)) / d [/ 4 for each of the 2x2] [+ acc],  r = rms(x), d = eps + r
//     upsample              each pixel becomes 2x2; backward: their sum
//     dropout               x where a Philox number of its place is above a threshold, times a factor, else 0; as in src/rng.rs
//     clip_backward         gy where |y| < clip, else 0
//     activate              mp_silu(scale x), for skip connections
//     combine               sum of factor times tensor: solver steps, guidance (f32), gradients (16 bits)
//     narrow, widen         f32 [pixels, c] to 16 bits with c padded by zeros to a multiple of 8, and back
//
// Layout: NHWC, channels a multiple of 8, so that every access is 16 bytes. Arithmetic is f32. Forward operations write
// both y and mp_silu(y), the input of the residual branch, where `silu` is not null. In pixel_norm, 1 to 32 neighbouring
// lanes share a pixel. They read it twice, the second time from L1.
//
// Bytes a value, 16 bits, b = a value of the larger image (all operations are bound by these):
//     pixel_norm 2 + 2 (+ 2 with silu); down: 2 b + 1/2 b (+ 1/2 b); backward 2 + 2 + 2 (+ 2 with acc)
//     upsample 1/2 b + 2 b (+ 2 b); backward 2 b + 1/2 b; clip 6; activate, dropout 4; combine of k terms 2 (k + 1), f32 4 (k + 1)
//     narrow, widen 6; where c is not a multiple of 4, their f32 is read and written value by value
#include "math.cuh"

struct PixelNorm {
    const void* x;     // [n, h, w, c], or [n, 2h, 2w, c] if down
    void* y;           // [n, h, w, c]
    void* silu;        // [n, h, w, c] or null
    int pixels;        // n * h * w
    int width;         // w
    int vectors;       // c / 8
    int lanes;         // of each pixel: 1, 2, 4, 8, 16 or 32
    int down;
    int padding;
};

// Vector `i` of output pixel `pixel` before the norm, and where its (first) input begins.
struct NormInput {
    const void* x;
    size_t first;      // vector
    int row, vectors;  // vectors of an input row and of a pixel; row = 0: no averaging

    __device__ __forceinline__ NormInput(const void* x, int pixel, int width, int vectors, bool down)
        : x(x), first(size_t(pixel) * vectors), row(0), vectors(vectors) {
        if (!down) return;
        row = 2 * width * vectors;
        first = size_t(pixel / width) * 2 * row + size_t(pixel % width) * 2 * vectors;
    }
    template <class T>
    __device__ __forceinline__ void read(int i, float (&to)[8]) const {
        read8<T>(x, first + i, to);
        if (row == 0) return;
#pragma unroll
        for (int k = 1; k < 4; k++) {
            float other[8];
            read8<T>(x, first + (k & 1) * vectors + (k >> 1) * row + i, other);
#pragma unroll
            for (int j = 0; j < 8; j++) to[j] += other[j];
        }
#pragma unroll
        for (int j = 0; j < 8; j++) to[j] *= 0.25f;
    }
};

template <class T>
__device__ __forceinline__ void pixel_norm(const PixelNorm& p) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    const int pixel = thread / p.lanes, lane = thread % p.lanes;
    const bool here = pixel < p.pixels;
    const int vectors = here ? p.vectors : 0;
    const NormInput in(p.x, here ? pixel : 0, p.width, p.vectors, p.down);

    float squares = 0;
    for (int i = lane; i < vectors; i += p.lanes) {
        float x[8];
        in.read<T>(i, x);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += x[j] * x[j];
    }
    const float factor = norm_factor(group_sum(squares, p.lanes), 8 * p.vectors);
    for (int i = lane; i < vectors; i += p.lanes) {
        float x[8];
        in.read<T>(i, x);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] *= factor;
        write8<T>(p.y, size_t(pixel) * p.vectors + i, x);
        if (p.silu == nullptr) continue;
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = mp_silu(x[j]);
        write8<T>(p.silu, size_t(pixel) * p.vectors + i, x);
    }
}

struct PixelNormBackward {
    const void* x;     // as in PixelNorm
    const void* grad;  // [n, h, w, c]
    const void* acc;   // shape of x, or null; may be `out`
    void* out;         // shape of x
    int pixels, width, vectors, lanes, down;
    int padding;
};

template <class T>
__device__ __forceinline__ void pixel_norm_backward(const PixelNormBackward& p) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    const int pixel = thread / p.lanes, lane = thread % p.lanes;
    const bool here = pixel < p.pixels;
    const int vectors = here ? p.vectors : 0;
    const NormInput in(p.x, here ? pixel : 0, p.width, p.vectors, p.down);
    const size_t grads = size_t(pixel) * p.vectors;

    float squares = 0, dot = 0;
    for (int i = lane; i < vectors; i += p.lanes) {
        float x[8], g[8];
        in.read<T>(i, x);
        read8<T>(p.grad, grads + i, g);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += x[j] * x[j], dot += g[j] * x[j];
    }
    squares = group_sum(squares, p.lanes), dot = group_sum(dot, p.lanes);
    const float count = float(8 * p.vectors), rms = sqrtf(squares / count);
    const float share = (p.down ? 0.25f : 1.0f) / (NORM_EPS + rms);
    const float toward = rms > 0 ? dot / (count * rms * (NORM_EPS + rms)) : 0.0f;
    const int copies = p.down ? 4 : 1;
    for (int i = lane; i < vectors; i += p.lanes) {
        float x[8], g[8];
        in.read<T>(i, x);
        read8<T>(p.grad, grads + i, g);
#pragma unroll
        for (int j = 0; j < 8; j++) g[j] = (g[j] - x[j] * toward) * share;
        for (int k = 0; k < copies; k++) {
            const size_t at = in.first + (k & 1) * p.vectors + (k >> 1) * in.row + i;
            float sum[8] = {};
            if (p.acc != nullptr) read8<T>(p.acc, at, sum);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += g[j];
            write8<T>(p.out, at, sum);
        }
    }
}

struct Upsample {
    const void* from;  // forward [n, h, w, c]; backward: gradient of y, [n, 2h, 2w, c]
    void* y;           // forward [n, 2h, 2w, c]; backward [n, h, w, c]
    void* silu;        // forward: [n, 2h, 2w, c] or null
    int count;         // vectors of the small image, n * h * w * c / 8
    int width;         // w
    int vectors;       // c / 8
    int padding;
};

// Place of the first of the 2x2 vectors in the large image that belong to vector `i` of the small one.
__device__ __forceinline__ size_t large_index(const Upsample& p, int i) {
    const int pixel = i / p.vectors;
    return size_t(pixel / p.width) * 4 * p.width * p.vectors + size_t(pixel % p.width) * 2 * p.vectors + i % p.vectors;
}

template <class T>
__device__ __forceinline__ void upsample(const Upsample& p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    const uint4 x = load16(static_cast<const uint4*>(p.from) + i);
    const size_t first = large_index(p, i);
    const int row = 2 * p.width * p.vectors;
#pragma unroll
    for (int k = 0; k < 4; k++) store16(static_cast<uint4*>(p.y) + first + (k & 1) * p.vectors + (k >> 1) * row, x);
    if (p.silu == nullptr) return;
    float s[8];
    unpack8<T>(x, s);
#pragma unroll
    for (int j = 0; j < 8; j++) s[j] = mp_silu(s[j]);
#pragma unroll
    for (int k = 0; k < 4; k++) write8<T>(p.silu, first + (k & 1) * p.vectors + (k >> 1) * row, s);
}

template <class T>
__device__ __forceinline__ void upsample_backward(const Upsample& p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    const size_t first = large_index(p, i);
    const int row = 2 * p.width * p.vectors;
    float sum[8] = {};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        float g[8];
        read8<T>(p.from, first + (k & 1) * p.vectors + (k >> 1) * row, g);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += g[j];
    }
    write8<T>(p.y, i, sum);
}

struct Elementwise {
    const void* a;     // activate: x; clip_backward: the clipped values y
    const void* b;     // clip_backward: gradient of y; may be `out`
    void* out;
    int count;         // vectors
    float by;          // activate: scale; clip_backward: clip
};

template <class T>
__device__ __forceinline__ void activate(const Elementwise& p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    float x[8];
    read8<T>(p.a, i, x);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = mp_silu(x[j] * p.by);
    write8<T>(p.out, i, x);
}

template <class T>
__device__ __forceinline__ void clip_backward(const Elementwise& p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    float y[8], g[8];
    read8<T>(p.a, i, y);
    read8<T>(p.b, i, g);
#pragma unroll
    for (int j = 0; j < 8; j++) g[j] = fabsf(y[j]) < p.by ? g[j] : 0.0f;
    write8<T>(p.out, i, g);
}

struct Dropout {
    const void* x;
    void* out;
    const float* keys;  // [n, 2], whole numbers below 2^24
    int count;          // vectors
    int image;          // vectors of an image
    unsigned layer;
    unsigned threshold; // share of what is dropped, times 2^16
    float factor;
    int padding;
};

// Eight values use one Philox block, 16 bits each.
template <class T>
__device__ __forceinline__ void dropout(const Dropout& p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    const int n = i / p.image;
    const uint4 r = philox4x32_10(make_uint4(unsigned(i - n * p.image), p.layer, 0, 0), unsigned(p.keys[2 * n]),
                                  unsigned(p.keys[2 * n + 1]));
    const unsigned words[4] = {r.x, r.y, r.z, r.w};
    float x[8];
    read8<T>(p.x, i, x);
#pragma unroll
    for (int j = 0; j < 8; j++)
        x[j] = ((words[j / 2] >> (16 * (j % 2))) & 0xffffu) < p.threshold ? 0.0f : x[j] * p.factor;
    write8<T>(p.out, i, x);
}

constexpr int MAX_TERMS = 6;

struct Combine {
    const void* terms[MAX_TERMS];
    void* out;         // may be one of the terms
    float factors[MAX_TERMS];
    int count;         // of terms, 1..MAX_TERMS
    int padding;
    long long values;  // of each tensor; a multiple of 8 in 16 bits
};

template <class T>
__device__ __forceinline__ void combine(const Combine& p) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size_t(p.values) / 8) return;
    float sum[8] = {};
#pragma unroll
    for (int k = 0; k < MAX_TERMS; k++) {
        if (k >= p.count) break;
        float x[8];
        read8<T>(p.terms[k], i, x);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += x[j] * p.factors[k];
    }
    write8<T>(p.out, i, sum);
}

extern "C" __global__ void combine_f32(Combine p) {
    begin_kernel();
    const size_t first = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    const size_t values = size_t(p.values);
    if (first >= values) return;
    const bool whole = first + 4 <= values;
    const int left = whole ? 4 : int(values - first);
    float sum[4] = {};
#pragma unroll
    for (int k = 0; k < MAX_TERMS; k++) {
        if (k >= p.count) break;
        const float* x = static_cast<const float*>(p.terms[k]) + first;
        float four[4] = {};
        if (whole) {
            read4(x, four);
        } else {
#pragma unroll
            for (int j = 0; j < 3; j++)
                if (j < left) four[j] = x[j];
        }
#pragma unroll
        for (int j = 0; j < 4; j++) sum[j] += four[j] * p.factors[k];
    }
    float* out = static_cast<float*>(p.out) + first;
    if (whole) {
        write4(out, sum);
    } else {
#pragma unroll
        for (int j = 0; j < 3; j++)
            if (j < left) out[j] = sum[j];
    }
}
KERNEL_EXPORT(combine_f32);

struct Cast {
    const void* from;  // narrow: f32 [pixels, channels]; widen: 16 bits [pixels, 8 vectors]
    void* to;          // the other
    int count;         // vectors, pixels * vectors
    int vectors;       // channels / 8, rounded up
    int channels;
    int padding;
};

template <class T>
__device__ __forceinline__ void narrow(const Cast& p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    const int first = i % p.vectors * 8;
    const float* from = static_cast<const float*>(p.from) + size_t(i / p.vectors) * p.channels;
    float x[8] = {};
    if (p.channels % 4 == 0) {
#pragma unroll
        for (int half = 0; half < 8; half += 4) {
            float four[4] = {};
            if (first + half < p.channels) read4(from + first + half, four);
#pragma unroll
            for (int j = 0; j < 4; j++) x[half + j] = four[j];
        }
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (first + j < p.channels) x[j] = from[first + j];
    }
    write8<T>(p.to, i, x);
}

template <class T>
__device__ __forceinline__ void widen(const Cast& p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    const int first = i % p.vectors * 8;
    float* to = static_cast<float*>(p.to) + size_t(i / p.vectors) * p.channels;
    float x[8];
    read8<T>(p.from, i, x);
    if (p.channels % 4 == 0) {
#pragma unroll
        for (int half = 0; half < 8; half += 4) {
            const float four[4] = {x[half], x[half + 1], x[half + 2], x[half + 3]};
            if (first + half < p.channels) write4(to + first + half, four);
        }
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (first + j < p.channels) to[first + j] = x[j];
    }
}

#define KERNEL(name, Params)                                                                     \
    extern "C" __global__ void name##_f16(Params p) { begin_kernel(); name<__half>(p); }         \
    KERNEL_EXPORT(name##_f16);                                                                   \
    extern "C" __global__ void name##_bf16(Params p) { begin_kernel(); name<__nv_bfloat16>(p); } \
    KERNEL_EXPORT(name##_bf16)
KERNEL(pixel_norm, PixelNorm);
KERNEL(pixel_norm_backward, PixelNormBackward);
KERNEL(upsample, Upsample);
KERNEL(upsample_backward, Upsample);
KERNEL(activate, Elementwise);
KERNEL(clip_backward, Elementwise);
KERNEL(dropout, Dropout);
KERNEL(combine, Combine);
KERNEL(narrow, Cast);
KERNEL(widen, Cast);
