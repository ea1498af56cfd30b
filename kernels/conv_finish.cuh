// The parameters and the epilogues of the convolutions. They are common to the loop for every card (conv_fprop.cu,
// conv_dgrad.cu, conv_wgrad.cu and codec.cu, which explain them) and the one for Hopper (conv_hopper.cu).
#pragma once
#include "conv.cuh"

// ---- conv_fprop ---------------------------------------------------------------------------------

struct ConvFprop {
    const void *x, *skip, *weight;  // skip: null if cb = 0
    const void *main_x, *main_skip, *main_weight;  // of the main path's convolution; null: none
    const float* scale;             // null: none
    const void* residual;           // null: none
    void *y, *pre, *act;            // pre, act: null if not wanted
    float* partial;                 // null: one part, or a cluster adds
    unsigned* arrived;
    PixelTiles tiles;
    int pixels, ca, cb, cout, taps;
    int main_ca, main_cb;
    int scale_stride, steps_per_split, splits;
    float wa, gain, to_main, clip, act_scale;
    int padding;
};

// The epilogue for 8 channels of a pixel. `residual` is fetched before, and its line is prefetched. `scales` serves all
// pixels of these channels.
template <class T>
__device__ __forceinline__ uint4 fetch(const ConvFprop& p, int pixel, int channel) {
    if (!p.residual) return {};
    return load16(static_cast<const T*>(p.residual) + size_t(pixel) * p.cout + channel);
}
template <class T>
__device__ __forceinline__ void prefetch(const ConvFprop& p, int pixel, int channel) {
    if (p.residual) prefetch_line(static_cast<const T*>(p.residual) + size_t(pixel) * p.cout + channel);
}
template <class T>
__device__ __forceinline__ void finish(const ConvFprop& p, int pixel, int image, int channel, float (&v)[8],
                                       const uint4& residual, ImageScales& scales) {
    const size_t at = size_t(pixel) * p.cout + channel;
    if (p.scale) {
        if (p.pre) store16(static_cast<T*>(p.pre) + at, pack8<T>(v));
        scales.of(p.scale, p.scale_stride, image, channel);
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] = mp_silu(v[e] * scales.s[e]);
    } else {
        float r[8];
        unpack8<T>(residual, r);
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] = clipped(p.wa * r[e] + p.gain * v[e], p.clip);
    }
    store16(static_cast<T*>(p.y) + at, pack8<T>(v));
    if (p.act) {
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] = mp_silu(v[e] * p.act_scale);
        store16(static_cast<T*>(p.act) + at, pack8<T>(v));
    }
}

// ---- conv_dgrad ---------------------------------------------------------------------------------

struct ConvDgrad {
    const void *grad, *turned;
    const void *x, *skip;          // the input before mp_silu; null if there was none
    const void *acc_x, *acc_skip;  // null: nothing to add
    const float* scale;            // null: none
    void *gx, *gskip;
    float *scale_grad, *sums;  // with scale
    float* partial;            // null: one part, or a cluster adds
    unsigned* arrived;
    PixelTiles tiles;
    int pixels, ca, cb, cout, taps;
    int scale_stride, steps_per_split, splits;
    float x_scale, skip_scale, gain, acc_factor;
};

// What is fetched before the epilogue: 8 values of the input, and of the gradient to which the result is added; zeros where
// there is none.
struct DgradFetched {
    uint4 x = {}, acc = {};
};
// Where 8 channels of a pixel lie in the tensor to which they belong.
__device__ __forceinline__ size_t place(const ConvDgrad& p, int pixel, int channel) {
    return channel >= p.ca ? size_t(pixel) * p.cb + (channel - p.ca) : size_t(pixel) * p.ca + channel;
}
template <class T>
__device__ __forceinline__ DgradFetched fetch(const ConvDgrad& p, int pixel, int channel) {
    const bool second = channel >= p.ca;
    const size_t at = place(p, pixel, channel);
    const T* x = static_cast<const T*>(second ? p.skip : p.x);
    const T* acc = static_cast<const T*>(second ? p.acc_skip : p.acc_x);
    return {x ? load16(x + at) : uint4{}, acc ? load16(acc + at) : uint4{}};
}
template <class T>
__device__ __forceinline__ void prefetch(const ConvDgrad& p, int pixel, int channel) {
    const bool second = channel >= p.ca;
    const size_t at = place(p, pixel, channel);
    if (second ? p.skip : p.x) prefetch_line(static_cast<const T*>(second ? p.skip : p.x) + at);
    if (second ? p.acc_skip : p.acc_x) prefetch_line(static_cast<const T*>(second ? p.acc_skip : p.acc_x) + at);
}
// The epilogue for 8 channels of a pixel; adds gu x to `sums`.
template <class T>
__device__ __forceinline__ void finish(const ConvDgrad& p, int pixel, int image, int channel, float (&v)[8],
                                       const DgradFetched& fetched, ImageScales& scales, float (&sums)[8]) {
    const bool second = channel >= p.ca;
    const float input_scale = second ? p.skip_scale : p.x_scale;
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] *= p.gain * input_scale;
    if (second ? p.skip : p.x) {
        float in[8];
        unpack8<T>(fetched.x, in);
        if (p.scale) {
            scales.of(p.scale, p.scale_stride, image, channel);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const float gu = v[e] * mp_silu_grad(in[e] * scales.s[e]);
                sums[e] += gu * in[e], v[e] = gu * scales.s[e];
            }
        } else {
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] *= mp_silu_grad(in[e] * input_scale);
        }
    }
    float a[8];
    unpack8<T>(fetched.acc, a);
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] += a[e] * p.acc_factor;
    store16(static_cast<T*>(second ? p.gskip : p.gx) + place(p, pixel, channel), pack8<T>(v));
}

// ---- a tile of either ---------------------------------------------------------------------------

__device__ __forceinline__ int columns_of(const ConvFprop& p) { return p.cout; }
__device__ __forceinline__ int columns_of(const ConvDgrad& p) { return p.ca + p.cb; }

// A tile of M pixels of the result, from `channel` on; rows and columns are counted from its first value.
template <class T, class P, int M>
struct ConvTile : TilePixels<M> {
    using Fetched = decltype(::fetch<T>(*static_cast<const P*>(nullptr), 0, 0));
    const P& p;
    int channel;
    __device__ __forceinline__ explicit ConvTile(const P& p) : p(p) {}
    __device__ __forceinline__ ConvTile(const P& p, int m, int n) : p(p) { at(m, n); }
    __device__ __forceinline__ void at(int m, int n) {
        static_cast<TilePixels<M>&>(*this) = TilePixels<M>(p.tiles, m), channel = n;
    }
    __device__ __forceinline__ bool inside(int row, int column) const {
        return row < this->count && channel + column < columns_of(p);
    }
    // Where a value lies in the result, if nothing divides its columns.
    __device__ __forceinline__ int index(int row, int column) const {
        return (this->first + row) * columns_of(p) + channel + column;
    }
    __device__ __forceinline__ Fetched fetch(int row, int column) const {
        return inside(row, column) ? ::fetch<T>(p, this->first + row, channel + column) : Fetched{};
    }
    __device__ __forceinline__ void prefetch(int row, int column) const {
        if (inside(row, column)) ::prefetch<T>(p, this->first + row, channel + column);
    }
};

// ---- conv_wgrad ---------------------------------------------------------------------------------

struct ConvWgrad {
    const void *x, *skip, *grad;  // skip: null if cb = 0
    float *dw, *partial;          // partial: null if one part
    int height, width, pixels, ca, cb, cout, taps;
    int steps_per_split, splits;
    float x_scale, skip_scale, gain;
};

// The epilogue for 8 weights of a row: adds them to dw, or stores them as a part of the sum.
__device__ __forceinline__ void finish(const ConvWgrad& p, int co, int n, int split, float (&v)[8]) {
    const int cin = p.ca + p.cb, columns = p.taps * cin;
    if (co >= p.cout || n >= columns) return;
    const float factor = p.gain * (n % cin >= p.ca ? p.skip_scale : p.x_scale);
    float* const to = (p.partial ? p.partial + size_t(split) * p.cout * columns : p.dw) + (co * columns + n);
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] *= factor;
    if (!p.partial) {
        float sum[8];
        load8(to, sum);
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] += sum[e];
    }
    store8(to, v);
}

// ---- codec_conv ---------------------------------------------------------------------------------

struct CodecConv {
    const void *x, *weight;
    const float* bias;
    const void* residual;  // or null; may be y
    void* y;
    int pixels;            // of all images; of an enlarged image those of the small one
    int height, width;     // of the input
    int rows, columns;     // of the result; of an enlarged image those of the small one
    int cin, cout;
    int side, stride, before;
    int phases;            // 1, or 4 for an enlarged image
    int relu;
    int phase;             // of a launch for one of four
    int padding;
};

// Where 8 channels of a pixel lie; in an enlarged image, those of one of its four places.
__device__ __forceinline__ size_t place(const CodecConv& p, int pixel, int phase, int channel) {
    if (p.phases == 4)  // pixel = image rows + y, and twice that is the enlarged image's
        pixel = (pixel / p.columns * 2 + phase / 2) * 2 * p.columns + pixel % p.columns * 2 + phase % 2;
    return size_t(pixel) * p.cout + channel;
}
// The epilogue for 8 channels of a pixel; `residual` is fetched before.
template <class T>
__device__ __forceinline__ uint4 fetch(const CodecConv& p, int pixel, int phase, int channel) {
    if (!p.residual || pixel >= p.pixels || channel >= p.cout) return {};
    return load16(static_cast<const T*>(p.residual) + place(p, pixel, phase, channel));
}
template <class T>
__device__ __forceinline__ void prefetch(const CodecConv& p, int pixel, int phase, int channel) {
    if (p.residual && pixel < p.pixels && channel < p.cout)
        prefetch_line(static_cast<const T*>(p.residual) + place(p, pixel, phase, channel));
}
template <class T>
__device__ __forceinline__ void finish(const CodecConv& p, int pixel, int phase, int channel, float (&v)[8],
                                       const uint4& residual) {
    if (pixel >= p.pixels || channel >= p.cout) return;
    float bias[8], r[8];
    load8(p.bias + channel, bias);
    unpack8<T>(residual, r);
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const float sum = r[e] + (v[e] + bias[e]);
        v[e] = p.relu && sum < 0.0f ? 0.0f : sum;  // NaN passes
    }
    store16(static_cast<T*>(p.y) + place(p, pixel, phase, channel), pack8<T>(v));
}
