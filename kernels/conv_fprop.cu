// Convolution, 3x3 with zero padding or 1x1, of one tensor or of the mp_cat of two (EDM2 eq. 103).
//
//     y[p][co] = sum over t, c of w[co][t][c] * in[neighbour t of p][c]
//     in[.][c] = x_scale * x[.][c]  for c < ca,   skip_scale * skip[.][c - ca]  from there
//
// and then one of (wb, clip: 1 and infinity where there is none)
//
//     y <- wb y                                   a gain
//     y <- mp_silu(y scale[image][co])            the modulation by the embedding; pre = y before
//     y <- clip(wa residual + wb y)               mp_sum (eq. 88)
//
// and optionally act = mp_silu(act_scale y) beside it, which the next convolution reads: mp_silu is
// never applied on the way in.
//
// The scales of the two inputs commute with the product: k runs over all of x, then over all of
// skip, and in between the sums are multiplied by x_scale / skip_scale, at the end by skip_scale.
//
// Small maps split k over blocks; each writes its f32 sums, and conv_fprop_reduce_* adds
// them in a fixed order and does the same rest.
//
// x [n, h, w, ca], skip [n, h, w, cb], w [cout][taps][ca + cb], y, pre, act, residual [n, h, w, cout], all
// 16-bit; scale [n][scale_stride] f32; partial [splits][n h w][cout] f32. Channels: multiples of 8.
//
// Operations: 2 n h w taps cin cout. Bytes: x, skip, w, residual once, y (pre, act) once from DRAM; a
// pixel comes 9 ceil(cout / BN) times from L2.
#include "conv.cuh"

struct ConvFprop {
    const void *x, *skip, *weight;  // skip: null if cb = 0
    const float* scale;             // null: none
    const void* residual;           // null: none
    void *y, *pre, *act;            // pre, act: null if not wanted
    float* partial;                 // null: one split
    PixelTiles tiles;
    int pixels, ca, cb, cout, taps;
    int scale_stride, steps_per_split, splits;
    float x_scale, skip_scale, wa, wb, clip, act_scale;
};
static_assert(sizeof(ConvFprop) == 144, "mirrored by FpropParams in src/backend/gpu/conv.rs");

// What follows the product, for 8 channels of a pixel.
template <class T>
__device__ __forceinline__ void finish(const ConvFprop& p, int pixel, int channel, float (&v)[8]) {
    const size_t at = size_t(pixel) * p.cout + channel;
    if (p.scale) {
        if (p.pre) store16(static_cast<T*>(p.pre) + at, pack8<T>(v));
        float s[8];
        load8(p.scale + size_t(pixel / (p.tiles.height * p.tiles.width)) * p.scale_stride + channel, s);
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] = mp_silu(v[e] * s[e]);
    } else {
        float r[8] = {};
        if (p.residual) unpack8<T>(load16(static_cast<const T*>(p.residual) + at), r);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const float sum = p.wa * r[e] + p.wb * v[e];
            v[e] = sum > p.clip ? p.clip : sum < -p.clip ? -p.clip : sum;  // NaN passes
        }
    }
    store16(static_cast<T*>(p.y) + at, pack8<T>(v));
    if (p.act) {
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] = mp_silu(v[e] * p.act_scale);
        store16(static_cast<T*>(p.act) + at, pack8<T>(v));
    }
}

// Copies the next step of both operands; a thread's chunk of k is the same for both.
template <class T, class Tile>
struct FpropLoad {
    const ConvFprop& p;
    PixelRows<T, Tile> rows;
    Walk k;
    const T* src;
    int channels, offset, steps_left;  // of the input at hand; `offset` of its channels in the weight's rows

    static constexpr int CHUNKS = Tile::BK / 8;

    __device__ __forceinline__ FpropLoad(const ConvFprop& p, int first_step, int steps_x) : p(p), rows(p.tiles, p.taps) {
        first_step < steps_x ? begin(false, first_step, steps_x) : begin(true, first_step - steps_x, 1 << 30);
    }
    __device__ __forceinline__ void begin(bool second, int step, int steps) {
        src = static_cast<const T*>(second ? p.skip : p.x);
        channels = second ? p.cb : p.ca, offset = second ? p.ca : 0, steps_left = steps - step;
        k.start(step * Tile::BK + threadIdx.x % CHUNKS * 8, channels);
    }
    __device__ __forceinline__ void operator()(smem_addr stage) {
        if (steps_left == 0) begin(true, 0, 1 << 30);
        rows.load(stage, src, channels, k, p.taps, p.tiles.width);
        const int cin = p.ca + p.cb;
        load_weights<T, Tile>(stage, static_cast<const T*>(p.weight), p.cout, p.taps * cin,
                              k.tap * cin + offset + k.channel, k.tap < p.taps);
        k.advance(Tile::BK, channels), steps_left--;
    }
};

template <class T, class Tile>
__device__ __forceinline__ void conv_fprop(const ConvFprop& p) {
    DYN_SMEM(unsigned char, smem);
    const int steps_x = (p.taps * p.ca + Tile::BK - 1) / Tile::BK, steps_skip = (p.taps * p.cb + Tile::BK - 1) / Tile::BK;
    const int first = blockIdx.z * p.steps_per_split, last = min(first + p.steps_per_split, steps_x + steps_skip);
    const float ratio = p.x_scale / p.skip_scale;

    typename Tile::Accumulators acc = {};
    FpropLoad<T, Tile> load(p, first, steps_x);
    multiply<T, Tile, false, false>(acc, smem_address(smem), last - first, load, [&](int step) {
        if (first + step != steps_x) return;
#pragma unroll
        for (int i = 0; i < Tile::WM / 16; i++)
#pragma unroll
            for (int j = 0; j < Tile::WN / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[i][j][e] *= ratio;
    });

    const float factor = last <= steps_x ? p.x_scale : p.skip_scale;
    const TilePixels<Tile::BM> tile(p.tiles);
    emit<Tile>(acc, smem, [&](int row, int column, float (&v)[8]) {
        const int pixel = tile.first + row, channel = blockIdx.y * Tile::BN + column;
        if (row >= tile.count || channel >= p.cout) return;
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] *= factor;
        if (p.partial)
            store8(p.partial + (size_t(blockIdx.z) * p.pixels + pixel) * p.cout + channel, v);
        else
            finish<T>(p, pixel, channel, v);
    });
}

// One thread for 8 channels of a pixel.
template <class T>
__device__ __forceinline__ void conv_fprop_reduce(const ConvFprop& p) {
    const size_t at = (size_t(blockIdx.x) * 256 + threadIdx.x) * 8, values = size_t(p.pixels) * p.cout;
    if (at >= values) return;
    float v[8];
    sum_splits(p.partial, at, values, p.splits, v);
    finish<T>(p, int(at / p.cout), int(at % p.cout), v);
}

#define INSTANCE(name, T, blocks, ...)                                                          \
    extern "C" __global__ void __launch_bounds__(Tile<__VA_ARGS__>::THREADS, blocks)            \
        name(const __grid_constant__ ConvFprop p) { conv_fprop<T, Tile<__VA_ARGS__>>(p); }      \
    KERNEL_EXPORT(name);
#define REDUCE(name, T)                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                           \
        name(const __grid_constant__ ConvFprop p) { conv_fprop_reduce<T>(p); }                  \
    KERNEL_EXPORT(name);

INSTANCE(conv_fprop_f16_128x128x32_s3, __half, 2, 128, 128, 32, 3, 2, 4)
INSTANCE(conv_fprop_f16_64x64x32_s4, __half, 3, 64, 64, 32, 4, 2, 2)
INSTANCE(conv_fprop_f16_128x16x32_s4, __half, 2, 128, 16, 32, 4, 4, 1)
INSTANCE(conv_fprop_bf16_128x128x32_s3, __nv_bfloat16, 2, 128, 128, 32, 3, 2, 4)
INSTANCE(conv_fprop_bf16_64x64x32_s4, __nv_bfloat16, 3, 64, 64, 32, 4, 2, 2)
INSTANCE(conv_fprop_bf16_128x16x32_s4, __nv_bfloat16, 2, 128, 16, 32, 4, 4, 1)
REDUCE(conv_fprop_reduce_f16, __half)
REDUCE(conv_fprop_reduce_bf16, __nv_bfloat16)
