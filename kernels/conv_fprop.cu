// Convolution, 3x3 with zero padding or 1x1, of one tensor or of the mp_cat of two (EDM2 eq. 103).
//
//     y[p][co] = sum over t, c of w[co][t][c] * in[neighbour t of p][c]
//     in[.][c] = x[.][c]  for c < ca,   skip[.][c - ca]  from there
//
// (the scales of the two inputs are in w, or in what mp_silu made of the inputs)
//
// and then one of (gain, clip: 1 and infinity where there is none)
//
//     y <- gain y
//     y <- mp_silu(y scale[image][co])            the modulation by the embedding; pre = y before
//     y <- clip(wa residual + gain y)             mp_sum (eq. 88)
//     y <- clip(gain (main + to_main y))          the same, where the main path is a 1x1 convolution: gain is then mp_sum's wa,
//                                                 and to_main its wb / wa
//
// and optionally, except after the modulation, act = mp_silu(act_scale y) beside it, which the next convolution reads: mp_silu
// is never applied on the way in.
//
// The main path's products are further steps of k, after the others. So they are neither rounded to 16 bits nor written and
// read, and need no launch of their own. In the other order the 3x3 loop would issue 0.5 more instructions for each HMMA.
//
// On small maps k is cut into parts for several blocks. Each writes its f32 sums, and whichever block of a tile comes last
// adds them all in their order, so that every run gives the same bits. That block then runs the epilogue.
//
// x [n, h, w, ca], skip [n, h, w, cb], w [cout][taps][ca + cb]; main_x [n, h, w, main_ca], main_skip [n, h, w, main_cb],
// main_weight [cout][main_ca + main_cb]; y, pre, act, residual [n, h, w, cout], all
// 16-bit; scale [n][scale_stride] f32; partial [splits][n h w][cout] f32; arrived [tiles], zeros. Channels:
// multiples of 8.
//
// Operations: 2 n h w (taps cin + main_cin) cout. Bytes: x, skip, w, residual once, y (pre, act) once from DRAM; a
// pixel comes 3 ceil(cout / BN) times from L2 if L1 keeps a row of taps, else 9.
#include "conv_finish.cuh"

// What the last block of a tile does. It is a function of its own, since its registers would be missing in the product.
template <class T, class Tile>
__device__ __attribute__((noinline)) void add_parts(const ConvFprop& p, unsigned char* smem) {
    unsigned* const arrived = p.arrived + blockIdx.y * gridDim.x + blockIdx.x;
    if (!comes_last(arrived, p.splits, smem)) return;
    sum<Tile>(p.partial, size_t(p.pixels) * p.cout, p.splits, own_columns<FpropChannels<T>, Tile, false>(p));
}

template <class T, class Tile, bool F16_SUMS, bool FLAT>
__device__ __forceinline__ void conv_fprop(const ConvFprop& p) {
    extern __shared__ __align__(128) unsigned char smem[];
    const auto tile = tile_of_block<Tile>(p);
    auto product = [&](const void* x, const void* skip, const void* weight, int ca, int cb, int taps) {
        return ConvProduct<T, SameWindow>{
            static_cast<const T*>(x), static_cast<const T*>(skip), static_cast<const T*>(weight), ca, cb, p.cout,
            SameWindow(p.tiles.height, p.tiles.width, taps), tile.first, tile.count};
    };
    const ConvProduct<T, SameWindow> own = product(p.x, p.skip, p.weight, p.ca, p.cb, p.taps);
    const int steps = own.steps(p.ca) + own.steps(p.cb);
    int first = blockIdx.z * p.steps_per_split, last = first + p.steps_per_split;
    auto begin = [&] { begin_kernel(), prefetch_tile<FpropChannels<T>, Tile>(p, tile); };

    typename Tile::Accumulators acc = {};
    if (first < steps)
        multiply<T, Tile, F16_SUMS, FLAT>(acc, smem, own, first, min(last, steps), begin);
    else
        begin();
    if (p.main_weight) {
        const ConvProduct<T, SameWindow> main = product(p.main_x, p.main_skip, p.main_weight, p.main_ca, p.main_cb, 1);
        first = max(first - steps, 0), last = min(last - steps, main.steps(p.main_ca) + main.steps(p.main_cb));
        scale_sums(acc, p.to_main);
        if (first < last) {
            __syncthreads();  // all have left the pipeline's last stage
            multiply<T, Tile, F16_SUMS, FLAT>(acc, smem, main, first, last, [] {});
        }
    }

    emit<Tile>(acc, smem, own_columns<FpropChannels<T>, Tile, true>(p));
    if (p.partial) add_parts<T, Tile>(p, smem);
}

#define INSTANCE(name, T, f16_sums, flat, blocks, ...)                               \
    extern "C" __global__ void __launch_bounds__(Tile<__VA_ARGS__>::THREADS, blocks_at_once<Tile<__VA_ARGS__>>(blocks)) \
        name(const __grid_constant__ ConvFprop p) {                                  \
        conv_fprop<T, Tile<__VA_ARGS__>, f16_sums, flat>(p);                         \
    }                                                                                \
    KERNEL_EXPORT(name);
#define PIXELS(m, n, stages, wm, wn, blocks, blocks_f16x2, speed)                               \
    INSTANCE(conv_fprop_f16_##m##x##n, __half, false, false, blocks, m, n, stages, wm, wn)      \
    INSTANCE(conv_fprop_bf16_##m##x##n, __nv_bfloat16, false, false, blocks, m, n, stages, wm, wn) \
    INSTANCE(conv_fprop_f16x2_##m##x##n, __half, true, false, blocks_f16x2, m, n, stages, wm, wn)
#define FLAT(m, n, stages, wm, wn, blocks, blocks_f16x2, speed)                                 \
    INSTANCE(conv_fprop_f16_flat_##m##x##n, __half, false, true, blocks, m, n, stages, wm, wn)  \
    INSTANCE(conv_fprop_bf16_flat_##m##x##n, __nv_bfloat16, false, true, blocks, m, n, stages, wm, wn) \
    INSTANCE(conv_fprop_f16x2_flat_##m##x##n, __half, true, true, blocks_f16x2, m, n, stages, wm, wn)
#define GRADIENT(...)
#define HOPPER(...)
#define HOPPER_GRADIENT(...)
#include "tiles.cuh"
