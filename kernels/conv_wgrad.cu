// Gradient of a convolution with respect to its weight, added to what is there.
//
//     dw[co][t][c] += gain s * sum over p of grad[p][co] * in[neighbour t of p][c]
//
// in = x (s = x_scale) for c < ca, skip (s = skip_scale) from there. As a product: m = co, n = (t, c),
// k = pixel. Both operands lie in memory as rows of k, so ldmatrix.trans reads both.
//
// Pixels are cut into parts for several blocks, to fill the card. Each part writes its f32 sums, and conv_wgrad_reduce adds
// them to dw in a fixed order, so that every run gives the same bits.
//
// grad [n, h, w, cout], x [n, h, w, ca], skip [n, h, w, cb] 16-bit; dw [cout][taps][ca + cb] f32;
// partial [splits][cout][taps][ca + cb] f32. Channels: multiples of 8.
//
// Operations: 2 n h w taps cin cout. Bytes: grad, x, skip once from DRAM (from L2: grad
// ceil(taps cin / BN) times, x taps ceil(cout / BM) times), dw read and written, partial written and read.
#include "conv_finish.cuh"

// Copies the next BK pixels of grad and of the input's neighbours. A thread keeps its column of 8 channels, and with it its
// tap, and takes every STRIDE-th pixel. Whether a neighbour is inside is seen from two numbers. Each wraps around by
// itself, by one minimum of unsigned numbers. One is the pixel's x, which must not be the edge that the tap looks over. The
// other is its place in the image, counted from the first row that has such a neighbour, which must lie among those rows.
template <class T, class Tile>
struct WgradLoad {
    static constexpr int COLUMNS = Tile::BN / 8, STRIDE = Tile::THREADS / COLUMNS, ROWS = BK / STRIDE;
    static_assert(Tile::BM == Tile::BN && BK % STRIDE == 0 && STRIDE % 8 == 0, "every thread copies as many rows of both");
    const T *grad, *in;        // this thread's first pixel of the next step
    int grad_row, in_row;      // values from one pixel to the next
    int left;                  // pixels up to the last
    unsigned x[ROWS], at[ROWS];
    unsigned width, image, edge, inside;  // inside: pixels that have such a neighbour above or below
    unsigned step_x, step_at;
    int to;                    // place in a stage

    __device__ __forceinline__ WgradLoad(const ConvWgrad& p, int first_step) : width(p.width), image(p.width * p.height) {
        const int cin = p.ca + p.cb, chunk = threadIdx.x % COLUMNS, row = threadIdx.x / COLUMNS;
        const int co = blockIdx.x * Tile::BM + chunk * 8, n = blockIdx.y * Tile::BN + chunk * 8, c = n % cin;
        const bool second = c >= p.ca, in_valid = n < p.taps * cin;
        const int tap = in_valid ? n / cin : 0, pixel = first_step * BK + row;
        const int dy = p.taps == 1 ? 0 : tap / 3 - 1, dx = p.taps == 1 ? 0 : tap % 3 - 1;
        grad_row = p.cout, in_row = second ? p.cb : p.ca;
        // Output channels beyond the last repeat it and are never stored.
        grad = static_cast<const T*>(p.grad) + (int64_t(pixel) * grad_row + min(co, p.cout - 8));
        in = static_cast<const T*>(second ? p.skip : p.x) +
             (int64_t(pixel + dy * p.width + dx) * in_row + (second ? c - p.ca : c));
        left = p.pixels - pixel;
        edge = dx == 0 ? ~0u : dx < 0 ? 0 : width - 1;
        inside = !in_valid ? 0 : dy == 0 ? image : image - width;
        step_x = BK % width, step_at = BK % image;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            x[i] = (pixel + i * STRIDE) % width;
            at[i] = (pixel + i * STRIDE + (dy < 0 ? image - width : 0)) % image;
        }
        to = chunk / 8 * BK * ROW_BYTES + row * ROW_BYTES + (chunk % 8 ^ (row & 7)) * 16;
    }
    __device__ __forceinline__ void operator()(smem_addr stage) {
        const smem_addr a = stage + to;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const bool there = i * STRIDE < left;
            cp_async(a + i * STRIDE * ROW_BYTES, grad + i * STRIDE * grad_row, there);
            cp_async(a + Tile::A_BYTES + i * STRIDE * ROW_BYTES, in + i * STRIDE * in_row,
                     there && x[i] != edge && at[i] < inside);
            x[i] = min(x[i] + step_x, x[i] + step_x - width);
            at[i] = min(at[i] + step_at, at[i] + step_at - image);
        }
        grad += BK * grad_row, in += BK * in_row, left -= BK;
    }
};

template <class T, class Tile, bool F16_SUMS>
__device__ __forceinline__ void conv_wgrad(const ConvWgrad& p) {
    extern __shared__ __align__(128) unsigned char smem[];
    const int steps = (p.pixels + BK - 1) / BK, first = blockIdx.z * p.steps_per_split;
    const int last = min(first + p.steps_per_split, steps);

    typename Tile::Accumulators acc = {};
    WgradLoad<T, Tile> load(p, first);
    multiply<T, Tile, F16_SUMS, KRows<false>, KRows<true>>(acc, smem_address(smem), last - first, load, load);

    emit<Tile>(acc, smem, WgradColumns(p, blockIdx.x * Tile::BM, blockIdx.y * Tile::BN + own_column<Tile>(), blockIdx.z));
}

// Sum of partial[split][at .. at + 8] over the parts, in their order.
__device__ __forceinline__ void sum_splits(const float* partial, size_t at, size_t stride, int splits, float (&v)[8]) {
    load8(partial + at, v);
#pragma unroll 4
    for (int s = 1; s < splits; s++) {
        float u[8];
        load8(partial + s * stride + at, u);
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] += u[e];
    }
}

// One thread for 8 weights.
extern "C" __global__ void __launch_bounds__(256) conv_wgrad_reduce(const __grid_constant__ ConvWgrad p) {
    begin_kernel();
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

#define INSTANCE(name, T, f16_sums, blocks, ...)                                                                     \
    extern "C" __global__ void __launch_bounds__(Tile<__VA_ARGS__>::THREADS, blocks_at_once<Tile<__VA_ARGS__>>(blocks)) \
        name(const __grid_constant__ ConvWgrad p) { begin_kernel(); conv_wgrad<T, Tile<__VA_ARGS__>, f16_sums>(p); } \
    KERNEL_EXPORT(name);
#define PIXELS(...)
#define FLAT(...)
#define GRADIENT(m, n, stages, wm, wn, blocks, blocks_f16x2, speed)                             \
    INSTANCE(conv_wgrad_f16_##m##x##n, __half, false, blocks, m, n, stages, wm, wn)             \
    INSTANCE(conv_wgrad_bf16_##m##x##n, __nv_bfloat16, false, blocks, m, n, stages, wm, wn)     \
    INSTANCE(conv_wgrad_f16x2_##m##x##n, __half, true, blocks_f16x2, m, n, stages, wm, wn)
#define HOPPER(...)
#define HOPPER_GRADIENT(...)
#include "tiles.cuh"
