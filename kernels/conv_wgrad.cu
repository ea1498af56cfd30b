// Gradient of a convolution with respect to its weight, added to what is there.
//
//     dw[co][t][c] += gain s * sum over p of grad[p][co] * in[neighbour t of p][c]
//
// in = x (s = x_scale) for c < ca, skip (s = skip_scale) from there. As a product: m = co, n = (t, c),
// k = pixel. Both operands lie in memory as rows of k, so ldmatrix.trans reads both.
//
// Pixels are split over blocks to fill the card; each split writes its f32 sums, and conv_wgrad_reduce
// adds them to dw in a fixed order: the same bits in every run.
//
// grad [n, h, w, cout], x [n, h, w, ca], skip [n, h, w, cb] 16-bit; dw [cout][taps][ca + cb] f32;
// partial [splits][cout][taps][ca + cb] f32. Channels: multiples of 8.
//
// Operations: 2 n h w taps cin cout. Bytes: grad, x, skip once from DRAM (from L2: grad
// ceil(taps cin / BN) times, x taps ceil(cout / BM) times), dw read and written, partial written and read.
#include "conv.cuh"

struct ConvWgrad {
    const void *x, *skip, *grad;  // skip: null if cb = 0
    float *dw, *partial;          // partial: null if one split
    int height, width, pixels, ca, cb, cout, taps;
    int steps_per_split, splits;
    float x_scale, skip_scale, gain;
};
static_assert(sizeof(ConvWgrad) == 88, "mirrored by WgradParams in src/backend/gpu/conv.rs");

// Copies the next BK pixels of grad and of the input's neighbours. A thread keeps its column.
template <class T, class Tile>
struct WgradLoad {
    static constexpr int COLUMNS = Tile::BN / 8, STRIDE = Tile::THREADS / COLUMNS, ROWS = Tile::BK / STRIDE;
    static_assert(Tile::BM == Tile::BN && Tile::BK % STRIDE == 0, "every thread copies as many rows of both");
    const ConvWgrad& p;
    const T *grad, *in;
    int channels;  // of the input in this column
    int tap, shift;
    bool grad_valid, in_valid;
    int pixel[ROWS], x[ROWS], y[ROWS], step_x, step_y;

    __device__ __forceinline__ WgradLoad(const ConvWgrad& p, int first_step) : p(p) {
        const int cin = p.ca + p.cb, column = threadIdx.x % COLUMNS * 8;
        const int co = blockIdx.x * Tile::BM + column, n = blockIdx.y * Tile::BN + column, c = n % cin;
        const bool second = c >= p.ca;
        grad_valid = co < p.cout, in_valid = n < p.taps * cin;
        grad = static_cast<const T*>(p.grad) + (grad_valid ? co : 0);
        in = static_cast<const T*>(second ? p.skip : p.x) + (second ? c - p.ca : c), channels = second ? p.cb : p.ca;
        tap = in_valid ? n / cin : 0, shift = tap_shift(tap, p.taps, p.width);
        step_x = Tile::BK % p.width, step_y = Tile::BK / p.width % p.height;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            pixel[i] = first_step * Tile::BK + threadIdx.x / COLUMNS + i * STRIDE;
            x[i] = pixel[i] % p.width, y[i] = pixel[i] / p.width % p.height;
        }
    }
    __device__ __forceinline__ void operator()(smem_addr stage) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const smem_addr to = stage + swizzle<Tile::BN * 2>(threadIdx.x / COLUMNS + i * STRIDE, threadIdx.x % COLUMNS);
            const bool valid = pixel[i] < p.pixels;
            const bool of_grad = valid && grad_valid;
            const bool of_in = valid && in_valid && tap_inside(tap, p.taps, y[i], x[i], p.height, p.width);
            cp_async(to, of_grad ? grad + int64_t(pixel[i]) * p.cout : grad, of_grad);
            cp_async(to + Tile::A_BYTES, of_in ? in + int64_t(pixel[i] + shift) * channels : in, of_in);
            pixel[i] += Tile::BK, x[i] += step_x, y[i] += step_y;
            if (x[i] >= p.width) x[i] -= p.width, y[i]++;
            if (y[i] >= p.height) y[i] -= p.height;
        }
    }
};

template <class T, class Tile>
__device__ __forceinline__ void conv_wgrad(const ConvWgrad& p) {
    DYN_SMEM(unsigned char, smem);
    const int steps = (p.pixels + Tile::BK - 1) / Tile::BK, first = blockIdx.z * p.steps_per_split;
    const int last = min(first + p.steps_per_split, steps), cin = p.ca + p.cb, columns = p.taps * cin;

    typename Tile::Accumulators acc = {};
    WgradLoad<T, Tile> load(p, first);
    multiply<T, Tile, true, true>(acc, smem_address(smem), last - first, load, [](int) {});

    emit<Tile>(acc, smem, [&](int row, int column, float (&v)[8]) {
        const int co = blockIdx.x * Tile::BM + row, n = blockIdx.y * Tile::BN + column;
        if (co >= p.cout || n >= columns) return;
        const float factor = p.gain * (n % cin >= p.ca ? p.skip_scale : p.x_scale);
        const size_t at = size_t(co) * columns + n;
        if (p.partial) {
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] *= factor;
            store8(p.partial + size_t(blockIdx.z) * p.cout * columns + at, v);
        } else {
            float sum[8];
            load8(p.dw + at, sum);
#pragma unroll
            for (int e = 0; e < 8; e++) sum[e] += v[e] * factor;
            store8(p.dw + at, sum);
        }
    });
}

// One thread for 8 weights.
extern "C" __global__ void __launch_bounds__(256) conv_wgrad_reduce(const __grid_constant__ ConvWgrad p) {
    const size_t at = (size_t(blockIdx.x) * 256 + threadIdx.x) * 8, values = size_t(p.cout) * p.taps * (p.ca + p.cb);
    if (at >= values) return;
    float v[8], sum[8];
    sum_splits(p.partial, at, values, p.splits, v);
    load8(p.dw + at, sum);
#pragma unroll
    for (int e = 0; e < 8; e++) sum[e] += v[e];
    store8(p.dw + at, sum);
}
KERNEL_EXPORT(conv_wgrad_reduce);

#define INSTANCE(name, T, blocks, ...)                                                          \
    extern "C" __global__ void __launch_bounds__(Tile<__VA_ARGS__>::THREADS, blocks)            \
        name(const __grid_constant__ ConvWgrad p) { conv_wgrad<T, Tile<__VA_ARGS__>>(p); }      \
    KERNEL_EXPORT(name);

INSTANCE(conv_wgrad_f16_128x128x32_s3, __half, 2, 128, 128, 32, 3, 2, 4)
INSTANCE(conv_wgrad_f16_64x64x32_s4, __half, 3, 64, 64, 32, 4, 2, 2)
INSTANCE(conv_wgrad_bf16_128x128x32_s3, __nv_bfloat16, 2, 128, 128, 32, 3, 2, 4)
INSTANCE(conv_wgrad_bf16_64x64x32_s4, __nv_bfloat16, 3, 64, 64, 32, 4, 2, 2)
