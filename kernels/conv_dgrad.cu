// Gradient of a convolution with respect to its input: conv_fprop with the channels' roles exchanged.
//
//     g[p][c] = sum over t, co of turned[c][t][co] * grad[neighbour t of p][co]
//     turned[c][t][co] = w[co][taps - 1 - t][c]
//
// So it is conv_fprop on a copy of the weights, transposed and turned, which the optimizer's step writes (weights.cu). That
// costs 2 bytes a weight once a step, and the loop is the same for both. The columns c < ca belong to x, the others to
// skip. Then, with s = x_scale or skip_scale (1 where the scales are in the weights),
//
//     gx[p][c] = g gain s + acc_factor acc                                   a linear input
//     gx[p][c] = g gain s mp_silu'(s x[p][c]) + acc_factor acc               the input was mp_silu(s x)
//     gx[p][c] = gu scale[image][c],  gu = g gain mp_silu'(x scale)          it was mp_silu(x scale),
//     scale_grad[image][c] = sum over the image of gu x                      scaled by the embedding
//
// The last sum is deterministic. Tiles do not cross images; each writes one row of `sums` (on Hopper each block of the
// cluster that shares the tile's sum does), and conv_dgrad_scale_sums adds them in order. For few pixels k is cut into
// parts, as in fprop.
//
// grad [n, h, w, cout], turned [ca + cb][taps][cout], x, gx, acc_x [n, h, w, ca], skip, gskip, acc_skip [n, h, w, cb],
// all 16-bit; scale, scale_grad [n][scale_stride] f32; sums [tiles][ca] f32 ([tiles][splits][ca] of clusters); partial [splits][n h w][ca + cb] f32;
// arrived [tiles], zeros. Channels: multiples of 8.
//
// Operations: 2 n h w taps cin cout. Bytes: grad, turned, x, acc read once, gx written once (DRAM).
#include "conv_finish.cuh"

// The sums of a tile, made over the lanes with the same channels, then over the warps of a column.
template <class Tile>
__device__ __forceinline__ void add_up(const ConvDgrad& p, unsigned char* smem, float (&sums)[8]) {
    constexpr int CHUNKS = Tile::WN / 8;
    float* const of_warps = reinterpret_cast<float*>(smem);  // [WARPS_M][BN]
#pragma unroll
    for (int e = 0; e < 8; e++)
#pragma unroll
        for (int by = CHUNKS; by < 32; by *= 2) sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], by);
    __syncthreads();
    if (threadIdx.x % 32 < CHUNKS)
        store8(of_warps + Tile::warp_m() / Tile::WM * Tile::BN + Tile::warp_n() + threadIdx.x % 32 * 8, sums);
    __syncthreads();
    const int cin = p.ca + p.cb, channel = blockIdx.y * Tile::BN + threadIdx.x;
    if (threadIdx.x >= Tile::BN || channel >= cin) return;
    float sum = 0;
#pragma unroll
    for (int m = 0; m < Tile::WARPS_M; m++) sum += of_warps[m * Tile::BN + threadIdx.x];
    p.sums[size_t(blockIdx.x) * cin + channel] = sum;
}

// What the last block of a tile does. It is a function of its own, since its registers would be missing in the product.
template <class T, class Tile>
__device__ __attribute__((noinline)) void add_parts(const ConvDgrad& p, unsigned char* smem) {
    unsigned* const arrived = p.arrived + blockIdx.y * gridDim.x + blockIdx.x;
    if (!comes_last(arrived, p.splits, smem)) return;
    const size_t stride = size_t(p.pixels) * (p.ca + p.cb);
    if (!p.scale) return sum<Tile>(p.partial, stride, p.splits, own_columns<DgradChannels<T>, Tile, false>(p));
    auto columns = own_columns<ScaledDgradChannels<T>, Tile, false>(p);
    sum<Tile>(p.partial, stride, p.splits, columns);
    add_up<Tile>(p, smem, columns.channels.sums);
}

template <class T, class Tile, bool F16_SUMS, bool FLAT>
__device__ __forceinline__ void conv_dgrad(const ConvDgrad& p) {
    extern __shared__ __align__(128) unsigned char smem[];
    const auto tile = tile_of_block<Tile>(p);
    const SameWindow window(p.tiles.height, p.tiles.width, p.taps);
    const ConvProduct<T, SameWindow> product = {static_cast<const T*>(p.grad), nullptr, static_cast<const T*>(p.turned), p.cout, 0,
                                                p.ca + p.cb, window, tile.first, tile.count};
    const int first = blockIdx.z * p.steps_per_split, last = min(first + p.steps_per_split, product.steps(p.cout));
    typename Tile::Accumulators acc = {};
    multiply<T, Tile, F16_SUMS, FLAT>(acc, smem, product, first, last,
                                      [&] { begin_kernel(), prefetch_tile<DgradChannels<T>, Tile>(p, tile); });

    if (p.scale && !p.partial) {
        auto columns = own_columns<ScaledDgradChannels<T>, Tile, false>(p);
        emit<Tile>(acc, smem, columns);
        return add_up<Tile>(p, smem, columns.channels.sums);
    }
    emit<Tile>(acc, smem, own_columns<DgradChannels<T>, Tile, true>(p));
    if (p.partial) add_parts<T, Tile>(p, smem);
}

// scale_grad from sums: one thread a channel, blockIdx.y the image.
extern "C" __global__ void __launch_bounds__(128) conv_dgrad_scale_sums(const __grid_constant__ ConvDgrad p) {
    begin_kernel();
    const int channel = blockIdx.x * 128 + threadIdx.x;
    if (channel >= p.ca) return;
    // There is a row of sums for each tile, or for each block of a tile's cluster.
    const int rows = p.tiles.tiles_per_group * (p.partial ? 1 : p.splits);
    float sum = 0;
    for (int row = 0; row < rows; row++) sum += p.sums[(size_t(blockIdx.y) * rows + row) * p.ca + channel];
    p.scale_grad[size_t(blockIdx.y) * p.scale_stride + channel] = sum;
}
KERNEL_EXPORT(conv_dgrad_scale_sums);

#define INSTANCE(name, T, f16_sums, flat, blocks, ...)                               \
    extern "C" __global__ void __launch_bounds__(Tile<__VA_ARGS__>::THREADS, blocks_at_once<Tile<__VA_ARGS__>>(blocks)) \
        name(const __grid_constant__ ConvDgrad p) {                                  \
        conv_dgrad<T, Tile<__VA_ARGS__>, f16_sums, flat>(p);                         \
    }                                                                                \
    KERNEL_EXPORT(name);
#define PIXELS(m, n, stages, wm, wn, blocks, blocks_f16x2, speed)                               \
    INSTANCE(conv_dgrad_f16_##m##x##n, __half, false, false, blocks, m, n, stages, wm, wn)      \
    INSTANCE(conv_dgrad_bf16_##m##x##n, __nv_bfloat16, false, false, blocks, m, n, stages, wm, wn) \
    INSTANCE(conv_dgrad_f16x2_##m##x##n, __half, true, false, blocks_f16x2, m, n, stages, wm, wn)
#define FLAT(m, n, stages, wm, wn, blocks, blocks_f16x2, speed)                                 \
    INSTANCE(conv_dgrad_f16_flat_##m##x##n, __half, false, true, blocks, m, n, stages, wm, wn)  \
    INSTANCE(conv_dgrad_bf16_flat_##m##x##n, __nv_bfloat16, false, true, blocks, m, n, stages, wm, wn) \
    INSTANCE(conv_dgrad_f16x2_flat_##m##x##n, __half, true, true, blocks_f16x2, m, n, stages, wm, wn)
#define GRADIENT(...)
#define HOPPER(...)
#define HOPPER_GRADIENT(...)
#include "tiles.cuh"
