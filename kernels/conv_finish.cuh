// The parameters and the epilogues of the convolutions. They are common to the loop for every card (conv_fprop.cu,
// conv_dgrad.cu, conv_wgrad.cu and codec.cu, which explain them) and the one for Hopper (conv_hopper.cu).
#pragma once
#include "conv.cuh"

// The channels from `channel` on, in a tensor of T: of its first pixel, or of any.
template <class T, class Tensor>
__device__ __forceinline__ auto channels_from(Tensor* tensor, int channel) {
    return static_cast<std::conditional_t<std::is_const_v<Tensor>, const T, T>*>(tensor) + channel;
}
template <class T, class Tensor>
__device__ __forceinline__ Tensor* channels_at(Tensor* tensor, int pixel, int channels, int channel) {
    return wide_at(channels_from<T>(tensor, channel), pixel, channels * int(sizeof(T)));
}

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

// The epilogue of 8 channels, see emit_rows.
template <class T>
struct FpropChannels {
    using Params = ConvFprop;
    using Fetched = uint4;  // the residual
    const ConvFprop& p;
    int channel;
    __device__ __forceinline__ FpropChannels(const ConvFprop& p, int channel) : p(p), channel(channel) {}
    static __device__ __forceinline__ int all(const ConvFprop& p) { return p.cout; }
    // Where they lie in a tensor.
    template <class Tensor>
    __device__ __forceinline__ Tensor* at(Tensor* tensor, int pixel) const {
        return channels_at<T>(tensor, pixel, p.cout, channel);
    }
    __device__ __forceinline__ Fetched fetch(int pixel, bool inside) const {
        return load16_if(inside && p.residual, at(p.residual, pixel));
    }
    __device__ __forceinline__ void prefetch(int pixel) const {
        if (p.residual) prefetch_line(at(p.residual, pixel));
    }
    template <class Tile, class Rows>
    __device__ __forceinline__ void finish(const Tile& tile, Rows&& rows) {
        auto add_residual = [&](float (&v)[8], const uint4& residual) {
            float r[8];
            unpack8<T>(residual, r);
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = clipped(p.wa * r[e] + p.gain * v[e], p.clip);
        };
        if (p.scale)
            rows([&](int row, float (&v)[8], const uint4&) {
                float scale[8];
                load8(p.scale + size_t(tile.image_inside(row)) * p.scale_stride + channel, scale);
                const int pixel = tile.pixel(row);
                store16_if(p.pre && tile.inside(row), at(p.pre, pixel), pack8<T>(v));
#pragma unroll
                for (int e = 0; e < 8; e++) v[e] = mp_silu(v[e] * scale[e]);
                store16_if(tile.inside(row), at(p.y, pixel), pack8<T>(v));
            });
        else if (p.act)
            rows([&](int row, float (&v)[8], const uint4& residual) {
                add_residual(v, residual);
                store16_if(tile.inside(row), at(p.y, tile.pixel(row)), pack8<T>(v));
#pragma unroll
                for (int e = 0; e < 8; e++) v[e] = mp_silu(v[e] * p.act_scale);
                store16_if(tile.inside(row), at(p.act, tile.pixel(row)), pack8<T>(v));
            });
        else
            rows([&](int row, float (&v)[8], const uint4& residual) {
                add_residual(v, residual);
                store16_if(tile.inside(row), at(p.y, tile.pixel(row)), pack8<T>(v));
            });
    }
};

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

// The epilogue of 8 channels, see emit_rows. They all belong to x, or all to skip.
template <class T>
struct DgradChannels {
    using Params = ConvDgrad;
    // Of the input, and of the gradient to which the result is added; zeros where there is none.
    struct Fetched {
        uint4 x, acc;
    };
    const ConvDgrad& p;
    int channel, row_bytes;  // of the tensor to which they belong
    const void *x, *acc;     // it, and what is added; null where there is none
    void* gx;
    float input_scale;
    __device__ __forceinline__ DgradChannels(const ConvDgrad& p, int column) : p(p) {
        const bool second = column >= p.ca;
        channel = second ? column - p.ca : column, row_bytes = (second ? p.cb : p.ca) * int(sizeof(T));
        x = second ? p.skip : p.x, acc = second ? p.acc_skip : p.acc_x, gx = second ? p.gskip : p.gx;
        input_scale = second ? p.skip_scale : p.x_scale;
    }
    static __device__ __forceinline__ int all(const ConvDgrad& p) { return p.ca + p.cb; }
    template <class Tensor>
    __device__ __forceinline__ Tensor* at(Tensor* tensor, int pixel) const {
        return wide_at(channels_from<T>(tensor, channel), pixel, row_bytes);
    }
    __device__ __forceinline__ Fetched fetch(int pixel, bool inside) const {
        return {load16_if(inside && x, at(x, pixel)), load16_if(inside && acc, at(acc, pixel))};
    }
    __device__ __forceinline__ void prefetch(int pixel) const {
        if (x) prefetch_line(at(x, pixel));
        if (acc) prefetch_line(at(acc, pixel));
    }
    template <class Tile, class Rows>
    __device__ __forceinline__ void finish(const Tile& tile, Rows&& rows) {
        auto add_and_store = [&](int row, float (&v)[8], const Fetched& fetched) {
            float a[8];
            unpack8<T>(fetched.acc, a);
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = fmaf(a[e], p.acc_factor, v[e]);
            store16_if(tile.inside(row), at(gx, tile.pixel(row)), pack8<T>(v));
        };
        const float factor = p.gain * input_scale;
        if (x)
            rows([&](int row, float (&v)[8], const Fetched& fetched) {
                float in[8];
                unpack8<T>(fetched.x, in);
#pragma unroll
                for (int e = 0; e < 8; e++) v[e] *= factor * (1.0f / SILU_MAGNITUDE) * silu_grad(in[e] * input_scale);
                add_and_store(row, v, fetched);
            });
        else
            rows([&](int row, float (&v)[8], const Fetched& fetched) {
#pragma unroll
                for (int e = 0; e < 8; e++) v[e] *= factor;
                add_and_store(row, v, fetched);
            });
    }
};

// The same where the input was scaled by the embedding: it is the only one, and nothing is added.
template <class T>
struct ScaledDgradChannels {
    using Params = ConvDgrad;
    using Fetched = uint4;  // of the input
    const ConvDgrad& p;
    int channel;
    float sums[8] = {};     // of gu x
    __device__ __forceinline__ ScaledDgradChannels(const ConvDgrad& p, int channel) : p(p), channel(channel) {}
    static __device__ __forceinline__ int all(const ConvDgrad& p) { return p.ca; }
    __device__ __forceinline__ Fetched fetch(int pixel, bool inside) const {
        return load16_if(inside, channels_at<T>(p.x, pixel, p.ca, channel));
    }
    template <class Tile, class Rows>
    __device__ __forceinline__ void finish(const Tile& tile, Rows&& rows) {
        float scale[8];  // tiles do not cross images
        load8(p.scale + size_t(tile.first_image) * p.scale_stride + channel, scale);
        const float factor = p.gain * (1.0f / SILU_MAGNITUDE);
        rows([&](int row, float (&v)[8], const uint4& x) {
            // In rows that are not inside it is 0, so that these add nothing to the sums, if their gradients are finite. If
            // not, all gradients of the embedding are lost in this step anyway: they are sums over the images.
            float in[8], slope[8];
            unpack8<T>(x, in);
#pragma unroll
            for (int e = 0; e < 8; e++) slope[e] = silu_grad(in[e] * scale[e]);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const float gu = v[e] * factor * slope[e];
                sums[e] = fmaf(gu, in[e], sums[e]), v[e] = gu * scale[e];
            }
            store16_if(tile.inside(row), channels_at<T>(p.gx, tile.pixel(row), p.ca, channel), pack8<T>(v));
        });
    }
};

// ---- a tile of either ---------------------------------------------------------------------------

// 8 columns of a tile of M pixels of the result: rows are counted from its first pixel. MAY_BE_PART: if there is p.partial,
// the sums are a part, of blockIdx.z, and go there.
template <class Channels, int M, bool MAY_BE_PART = false>
struct TileColumns : TilePixels<M>, TileImages {
    using Params = typename Channels::Params;
    using Fetched = typename Channels::Fetched;
    int column;  // the first of the 8 in the result, or beyond its last
    Channels channels;
    __device__ __forceinline__ TileColumns(const Params& p, const TilePixels<M>& tile, const TileImages& images, int column)
        : TilePixels<M>(tile), TileImages(images), column(column), channels(p, min(column, Channels::all(p) - 8)) {
        if (column >= Channels::all(p)) this->count = 0;
    }
    __device__ __forceinline__ bool inside(int row) const { return row < this->count; }
    __device__ __forceinline__ int pixel(int row) const { return this->first + row; }
    // Where a row lies in a part.
    __device__ __forceinline__ int index(int row) const { return pixel(row) * Channels::all(channels.p) + column; }
    // The image of a row, or of the last one that is inside.
    __device__ __forceinline__ int image_inside(int row) const { return image(min(row, max(this->count - 1, 0))); }
    __device__ __forceinline__ bool is_part() const { return MAY_BE_PART && channels.p.partial; }
    __device__ __forceinline__ Fetched fetch(int row) const { return channels.fetch(pixel(row), inside(row) && !is_part()); }
    template <class Rows>
    __device__ __forceinline__ void finish(Rows&& rows) {
        const Params& p = channels.p;
        if (this->count <= 0) return;
        if (is_part())
            rows([&](int row, float (&v)[8], const Fetched&) {
                if (inside(row)) store8(p.partial + size_t(blockIdx.z) * p.pixels * Channels::all(p) + index(row), v);
            });
        else
            finish_together(rows);
    }
    // The lanes of a warp stay together, also those whose columns are beyond the last.
    template <class Rows>
    __device__ __forceinline__ void finish_together(Rows&& rows) { channels.finish(*this, rows); }
};

// Where a block's tile lies in the result, and the 8 columns of it that this thread finishes.
template <class Tile, class P>
__device__ __forceinline__ TilePixels<Tile::BM> tile_of_block(const P& p) { return {p.tiles, int(blockIdx.x)}; }
template <class Channels, class Tile, bool MAY_BE_PART>
__device__ __forceinline__ TileColumns<Channels, Tile::BM, MAY_BE_PART> own_columns(const typename Channels::Params& p) {
    const auto tile = tile_of_block<Tile>(p);
    return {p, tile, TileImages(p.tiles, tile.first), int(blockIdx.y) * Tile::BN + own_column<Tile>()};
}

// Prefetches what the epilogue of a block's tile fetches.
template <class Channels, class Tile>
__device__ __forceinline__ void prefetch_tile(const typename Channels::Params& p, const TilePixels<Tile::BM>& tile) {
    for_lines<Tile::BM, Tile::BN, Tile::THREADS>([&](int row, int column) {
        column += blockIdx.y * Tile::BN;
        if (row < tile.count && column < Channels::all(p)) Channels(p, column).prefetch(tile.first + row);
    });
}

// ---- conv_wgrad ---------------------------------------------------------------------------------

struct ConvWgrad {
    const void *x, *skip, *grad;  // skip: null if cb = 0
    float *dw, *partial;          // partial: null if one part
    int height, width, pixels, ca, cb, cout, taps;
    int steps_per_split, splits;
    float x_scale, skip_scale, gain;
};

// The epilogue of 8 columns of a tile of weights, whose rows begin at `co`, see emit_rows: adds them to dw, or stores them as
// a part of the sum.
struct WgradColumns {
    const ConvWgrad& p;
    int rows_n;    // that are inside
    int columns;   // of all weights
    float factor;
    float* to;     // of the first row
    __device__ __forceinline__ WgradColumns(const ConvWgrad& p, int co, int n, int split) : p(p) {
        const int cin = p.ca + p.cb;
        columns = p.taps * cin, rows_n = n < columns ? p.cout - co : 0;
        factor = p.gain * (n % cin >= p.ca ? p.skip_scale : p.x_scale);
        to = (p.partial ? p.partial + size_t(split) * p.cout * columns : p.dw) + (co * columns + n);
    }
    __device__ __forceinline__ Nothing fetch(int) const { return {}; }
    template <class Rows>
    __device__ __forceinline__ void finish(Rows&& rows) {
        if (p.partial)
            rows([&](int row, float (&v)[8], Nothing) {
#pragma unroll
                for (int e = 0; e < 8; e++) v[e] *= factor;
                if (row < rows_n) store8(to + row * columns, v);
            });
        else
            rows([&](int row, float (&v)[8], Nothing) {
                if (row >= rows_n) return;
                float sum[8];
                load8(to + row * columns, sum);
#pragma unroll
                for (int e = 0; e < 8; e++) v[e] = sum[e] + v[e] * factor;
                store8(to + row * columns, v);
            });
    }
};

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

// The epilogue of 8 channels of a tile of pixels, see emit_rows.
template <class T>
struct CodecChannels {
    const CodecConv& p;
    int first, phase, channel;  // the tile's first pixel; which of the four places of a pixel of an enlarged image
    __device__ __forceinline__ CodecChannels(const CodecConv& p, int first, int phase, int channel)
        : p(p), first(first), phase(phase), channel(channel) {}
    __device__ __forceinline__ bool inside(int row) const { return first + row < p.pixels && channel < p.cout; }
    template <class Tensor>
    __device__ __forceinline__ Tensor* at(Tensor* tensor, int row) const {
        int pixel = first + row;
        if (p.phases == 4)  // pixel = image rows + y, and twice that is the enlarged image's
            pixel = (pixel / p.columns * 2 + phase / 2) * 2 * p.columns + pixel % p.columns * 2 + phase % 2;
        return channels_at<T>(tensor, pixel, p.cout, channel);
    }
    __device__ __forceinline__ uint4 fetch(int row) const {
        return load16_if(p.residual && inside(row), at(p.residual, row));
    }
    __device__ __forceinline__ void prefetch(int row) const {
        if (p.residual && inside(row)) prefetch_line(at(p.residual, row));
    }
    template <class Rows>
    __device__ __forceinline__ void finish(Rows&& rows) {
        if (channel >= p.cout) return;
        float bias[8];
        load8(p.bias + channel, bias);
        const float least = p.relu ? 0.0f : -INFINITY;
        rows([&](int row, float (&v)[8], const uint4& residual) {
            float r[8];
            unpack8<T>(residual, r);
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = at_least(r[e] + (v[e] + bias[e]), least);
            store16_if(inside(row), at(p.y, row), pack8<T>(v));
        });
    }
};
