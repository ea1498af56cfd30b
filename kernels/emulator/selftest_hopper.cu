// Kernels that test the emulator's Hopper and hopper.cuh; none of them is part of the product.
//
//   1. Probes, which tests/emulator/hopper.rs compares with plain loops: bulk copies, wgmma.
//   2. A pipeline of a producer warp and two warp groups that computes C = A B^T. PLANTS are its errors, each of
//      which a check must find; pipeline_ok is the same code without any. More plants behind it.
//   3. Real kernels in the manner of 2: the 3x3 convolution of a batch of images, and its weights' gradient.
#include "../hopper.cuh"

// Dynamic shared memory from its first multiple of 1024 on.
__device__ __forceinline__ smem_addr tiles(unsigned char* smem) { return (smem_address(smem) + 1023) & ~smem_addr(1023); }

// ---- 1. probes ----------------------------------------------------------------------------------

struct CopyProbe {
    TensorMap map;
    uint16_t* out;        // [rows][64], without the swizzle
    int rows, im2col;
    int at[4], offset[2];
};

__device__ void bulk_copy(const CopyProbe& p) {
    extern __shared__ __align__(128) unsigned char smem[];
    __shared__ uint64_t bar[1];
    const smem_addr full = smem_address(bar), tile = tiles(smem);
    const unsigned char* bytes = smem + (tile - smem_address(smem));
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
        tma_prefetch(p.map);
        mbarrier_expect(full, p.rows * 128);
        if (p.im2col) tma_load_im2col(tile, p.map, full, p.at[0], p.at[1], p.at[2], p.at[3], p.offset[0], p.offset[1]);
        else tma_load_2d(tile, p.map, full, p.at[0], p.at[1]);
    }
    __syncthreads();
    mbarrier_wait(full, 0);
    for (int i = threadIdx.x; i < p.rows * 8; i += 128)
        store16(p.out + i * 8, load16(bytes + swizzle<128>(i / 8, i % 8)));
}
extern "C" __global__ void probe_bulk_copy(const __grid_constant__ CopyProbe p) { bulk_copy(p); }  // 128 threads
KERNEL_EXPORT_HOPPER(probe_bulk_copy);

struct WgmmaProbe {
    TensorMap a, b;  // K-major: [64][64] and [N][64], k the second; MN-major: [64][64] and [64][N], k the first
    float* d;        // [64][N]
};

// d += A B of 64 x 64 and 64 x N, four instructions; 128 threads.
template <class T, int N, bool MN_MAJOR>
__device__ void probe_wgmma(const WgmmaProbe& p) {
    extern __shared__ __align__(128) unsigned char smem[];
    __shared__ uint64_t bar[1];
    constexpr int kBlock = 64 * 128;  // 64 rows
    const smem_addr full = smem_address(bar), a = tiles(smem), b = a + kBlock;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
        constexpr int kBlocks = MN_MAJOR ? (N + 63) / 64 : 1;
        mbarrier_expect(full, kBlock + (MN_MAJOR ? kBlocks * kBlock : N * 128));
        tma_load_2d(a, p.a, full, 0, 0);
        for (int i = 0; i < kBlocks; i++) tma_load_2d(b + i * kBlock, p.b, full, i * 64, 0);
    }
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float acc[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[i] = p.d[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2];
    mbarrier_wait(full, 0);
    wgmma_hold(acc);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const int step = MN_MAJOR ? k * 2048 : k * 32, leading = MN_MAJOR ? kBlock : 16;
        wgmma<T, N, MN_MAJOR>(acc, wgmma_descriptor(a + step, leading, 1024), wgmma_descriptor(b + step, leading, 1024));
    }
    wgmma_commit();
    wgmma_hold(acc);
    wgmma_wait<0>();
    wgmma_hold(acc);
#pragma unroll
    for (int i = 0; i < N / 2; i++) p.d[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = acc[i];
}
#define PROBE_WGMMA_AS(type, T, n)                                                                                    \
    extern "C" __global__ void __launch_bounds__(128) probe_wgmma_##type##_k_##n(const __grid_constant__ WgmmaProbe p) {  \
        probe_wgmma<T, n, false>(p);                                                                                  \
    }                                                                                                                 \
    KERNEL_EXPORT_HOPPER(probe_wgmma_##type##_k_##n);                                                                 \
    extern "C" __global__ void __launch_bounds__(128) probe_wgmma_##type##_mn_##n(const __grid_constant__ WgmmaProbe p) { \
        probe_wgmma<T, n, true>(p);                                                                                   \
    }                                                                                                                 \
    KERNEL_EXPORT_HOPPER(probe_wgmma_##type##_mn_##n)
#define PROBE_WGMMA(n) PROBE_WGMMA_AS(f16, __half, n); PROBE_WGMMA_AS(bf16, __nv_bfloat16, n)
PROBE_WGMMA(8);
PROBE_WGMMA(16);
PROBE_WGMMA(32);
PROBE_WGMMA(64);
PROBE_WGMMA(96);
PROBE_WGMMA(128);
PROBE_WGMMA(192);
PROBE_WGMMA(256);

// ---- 2. a pipeline, and planted bugs --------------------------------------------------------------

struct Pipeline {
    TensorMap a, b;    // A [128][k] and B [64][k], boxes of 128 and 64 rows, f16 (memory_overrun: says A has 129)
    TensorMap images;  // any, for im2col
    float* c;          // [128][64] for each block
    int steps;         // k / 64
    int one;           // 1, unknown to the compiler
};

#define PLANTS(plant)                                                                             \
    plant(ok) plant(too_many_bytes) plant(too_few_bytes) plant(one_copy_expected)                 \
    plant(wrong_parity) plant(read_before_landing) plant(released_too_early)                      \
    plant(one_consumer_awaited) plant(one_warp_waits) plant(read_accumulators_too_early)          \
    plant(wrote_accumulators) plant(missing_wgmma_fence) plant(missing_wgmma_wait)                \
    plant(missing_commit) plant(divergent_products) plant(tile_overrun) plant(shared_overrun)     \
    plant(stride_of_512) plant(tile_at_128) plant(destination_at_128) plant(destination_at_64)    \
    plant(not_rounded_up) plant(copy_overrun) plant(wrong_map) plant(memory_overrun)              \
    plant(missing_init_fence) plant(missing_init) plant(use_before_init) plant(too_many_arrivals) \
    plant(nobody_waits) plant(plain_access_to_mbarrier) plant(named_barrier_lacks_warp)
enum class Planted {
#define NAME(name) name,
    PLANTS(NAME)
#undef NAME
};

// Two warp groups of 64 rows each, and one whose first thread is the producer: 384 threads.
template <Planted BUG>
__device__ void pipeline(const Pipeline& p) {
    constexpr int kStages = 2, kA = 128 * 128, kB = 64 * 128, kStage = kA + kB, kConsumers = 256;
    auto is = [](Planted bug) { return BUG == bug; };
    extern __shared__ __align__(128) unsigned char smem[];
    const smem_addr first = is(Planted::not_rounded_up) ? smem_address(smem) : tiles(smem);
    const smem_addr full = first + kStages * kStage, empty = full + kStages * 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; s++) {
            if (!is(Planted::missing_init) || s == 0) mbarrier_init(full + s * 8, 1);
            mbarrier_init(empty + s * 8, is(Planted::one_consumer_awaited) ? 4 : 8);
        }
        if (!is(Planted::missing_init_fence)) fence_mbarrier_init();
    }
    if (!is(Planted::use_before_init)) __syncthreads();

    if (threadIdx.x >= kConsumers) {
        registers_release<40>();
        if (threadIdx.x == kConsumers) {
            int stage = 0, parity = 0;
            for (int step = 0; step < p.steps; step++) {
                const smem_addr a = first + stage * kStage, b = a + kA, bar = full + stage * 8;
                mbarrier_wait(empty + stage * 8, parity ^ 1);
                mbarrier_expect(bar, is(Planted::too_many_bytes)    ? kStage + 128
                                     : is(Planted::too_few_bytes)   ? kStage - 128
                                     : is(Planted::one_copy_expected) ? kA
                                                                      : kStage);
                if (is(Planted::wrong_map)) tma_load_2d(a, p.images, bar, step * 64, 0);
                else tma_load_2d(a + (is(Planted::destination_at_128) ? 128 : is(Planted::destination_at_64) ? 64 : 0), p.a, bar,
                                 step * 64, is(Planted::memory_overrun) && step == 3 ? 1 : 0);
                tma_load_2d(is(Planted::copy_overrun) && step == 1 ? first + 2 * kStage - 1024 : b, p.b, bar, step * 64, 0);
                if (is(Planted::too_many_arrivals) && step == 2) mbarrier_arrive(bar);
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
            if (is(Planted::nobody_waits)) {
                mbarrier_wait(empty + stage * 8, parity ^ 1);
                mbarrier_expect(full + stage * 8, kB);
                tma_load_2d(first + stage * kStage, p.b, full + stage * 8, 0, 0);
            }
        }
        return;
    }

    registers_take<232>();
    const int group = threadIdx.x / 128;
    float acc[32] = {};
    int stage = 0, parity = 0, previous = 0;
    for (int step = 0; step < p.steps; step++) {
        const bool skip = (is(Planted::read_before_landing) && step > 2) || (is(Planted::one_warp_waits) && warp % 4 && step > 2);
        if (!skip) mbarrier_wait(full + stage * 8, is(Planted::wrong_parity) ? parity ^ 1 : parity);
        wgmma_hold(acc);
        if (!is(Planted::missing_wgmma_fence)) wgmma_fence();
        smem_addr a = first + stage * kStage + group * 64 * 128, b = first + stage * kStage + kA;
        if (is(Planted::tile_overrun) && step == 1) a += 32 * 128 * p.one;
        if (is(Planted::tile_at_128)) a += 128 * p.one;
        if (is(Planted::shared_overrun) && step == 1) b += (kB - 1024) * p.one;
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (!is(Planted::divergent_products) || warp != 3 || k < 3)
                wgmma<__half, 64, false>(acc, wgmma_descriptor(a + k * 32, 16, is(Planted::stride_of_512) ? 512 : 1024),
                                         wgmma_descriptor(b + k * 32, 16, 1024));
        if (is(Planted::released_too_early) && lane == 0) mbarrier_arrive(empty + stage * 8);
        if (!is(Planted::missing_commit) || step + 1 < p.steps) wgmma_commit();
        wgmma_hold(acc);
        if (is(Planted::wrote_accumulators) && step == 3) acc[5] = float(p.one);
        wgmma_wait<1>();
        if (!is(Planted::released_too_early) && step && lane == 0) mbarrier_arrive(empty + previous * 8);
        previous = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    if (is(Planted::plain_access_to_mbarrier) && threadIdx.x == 0) smem[full - smem_address(smem)] = 0;
    named_barrier(1, is(Planted::named_barrier_lacks_warp) ? kConsumers + 32 : kConsumers);
    if (is(Planted::plain_access_to_mbarrier)) mbarrier_wait(full, 0);
    const bool late = is(Planted::read_accumulators_too_early);
    if (!late && !is(Planted::missing_wgmma_wait)) wgmma_wait<0>();
    wgmma_hold(acc);
    float* c = p.c + blockIdx.x * 128 * 64 + (warp * 16 + lane / 4) * 64 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; i++) c[i / 2 % 2 * 8 * 64 + i / 4 * 8 + i % 2] = acc[i];
    if (late) wgmma_wait<0>();
}
#define PIPELINE(name)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(384, 1) pipeline_##name(const __grid_constant__ Pipeline p) {           \
        pipeline<Planted::name>(p);                                                                                      \
    }                                                                                                                    \
    KERNEL_EXPORT_HOPPER(pipeline_##name);
PLANTS(PIPELINE)

// wgmma on what ordinary stores wrote: C = A B^T, A [64][64] and B [64][64], one block of 128 threads.
struct Stored {
    const __half *a, *b;
    float* c;  // [64][64]
};
template <bool BUG>
__device__ void stored_operands(const Stored& p) {
    extern __shared__ __align__(128) unsigned char smem[];
    const smem_addr tile = tiles(smem);
    unsigned char* bytes = smem + (tile - smem_address(smem));
    for (int i = threadIdx.x; i < 512; i += 128) {
        store16(bytes + swizzle<128>(i / 8, i % 8), load16(p.a + i * 8));
        store16(bytes + 8192 + swizzle<128>(i / 8, i % 8), load16(p.b + i * 8));
    }
    if (!BUG) fence_async_shared();
    __syncthreads();
    float acc[32] = {};
    wgmma_hold(acc);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++)
        wgmma<__half, 64, false>(acc, wgmma_descriptor(tile + k * 32, 16, 1024), wgmma_descriptor(tile + 8192 + k * 32, 16, 1024));
    wgmma_commit();
    wgmma_hold(acc);
    wgmma_wait<0>();
    wgmma_hold(acc);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 32; i++) p.c[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = acc[i];
}
extern "C" __global__ void __launch_bounds__(128) stored_operands_bug(Stored p) { stored_operands<true>(p); }
KERNEL_EXPORT_HOPPER(stored_operands_bug);
extern "C" __global__ void __launch_bounds__(128) stored_operands_ok(Stored p) { stored_operands<false>(p); }
KERNEL_EXPORT_HOPPER(stored_operands_ok);

#ifdef SIMT_EMULATOR
// Not a Hopper kernel.
extern "C" void hopper_on_ampere(int) { fence_async_shared(); }
KERNEL_EXPORT(hopper_on_ampere);
#endif

// ---- 3. real kernels -----------------------------------------------------------------------------

struct Conv {
    TensorMap x;  // [n][h][w][cin] by im2col, corners -1 and -1, 128 pixels
    TensorMap w;  // [cout][9 cin], boxes of N rows
    __half* y;    // [n][h][w][cout]
    int height, width, cin, cout, pixels;
};

// y = 3x3 convolution of x with zero padding; 128 pixels by N channels a block, cin a multiple of 64, cout of N.
// Two warp groups of 64 pixels, a producer warp, S stages.
template <class T, int N, int S>
__device__ void conv3x3(const Conv& p, T* y) {
    constexpr int kA = 128 * 128, kStage = kA + N * 128;
    extern __shared__ __align__(128) unsigned char smem[];
    const smem_addr first = tiles(smem), full = first + S * kStage, empty = full + S * 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int pixel0 = blockIdx.x * 128, channel0 = blockIdx.y * N, steps = 9 * (p.cin / 64);
    if (threadIdx.x == 0) {
        for (int s = 0; s < S; s++) mbarrier_init(full + s * 8, 1), mbarrier_init(empty + s * 8, 8);
        fence_mbarrier_init();
    }
    __syncthreads();

    if (warp == 8) {
        if (lane == 0) {
            const int x = pixel0 % p.width, row = pixel0 / p.width;
            int stage = 0, parity = 1, tap = 0, c = 0;
            for (int step = 0; step < steps; step++) {
                mbarrier_wait(empty + stage * 8, parity);
                mbarrier_expect(full + stage * 8, kStage);
                tma_load_im2col(first + stage * kStage, p.x, full + stage * 8, c, x - 1, row % p.height - 1, row / p.height, tap % 3, tap / 3);
                tma_load_2d(first + stage * kStage + kA, p.w, full + stage * 8, tap * p.cin + c, channel0);
                if ((c += 64) == p.cin) c = 0, tap++;
                if (++stage == S) stage = 0, parity ^= 1;
            }
        }
        return;
    }

    float acc[N / 2] = {};
    int stage = 0, parity = 0, previous = 0;
    for (int step = 0; step < steps; step++) {
        mbarrier_wait(full + stage * 8, parity);
        wgmma_hold(acc);
        wgmma_fence();
        const smem_addr a = first + stage * kStage + warp / 4 * 64 * 128, b = first + stage * kStage + kA;
#pragma unroll
        for (int k = 0; k < 4; k++)
            wgmma<T, N, false>(acc, wgmma_descriptor(a + k * 32, 16, 1024), wgmma_descriptor(b + k * 32, 16, 1024));
        wgmma_commit();
        wgmma_hold(acc);
        wgmma_wait<1>();
        if (step && lane == 0) mbarrier_arrive(empty + previous * 8);
        previous = stage;
        if (++stage == S) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    wgmma_hold(acc);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int pixel = pixel0 + warp * 16 + lane / 4 + half * 8;
        if (pixel < p.pixels)
#pragma unroll
            for (int j = 0; j < N / 8; j++)
                *reinterpret_cast<uint32_t*>(y + size_t(pixel) * p.cout + channel0 + j * 8 + lane % 4 * 2) =
                    pack2<T>(acc[j * 4 + half * 2], acc[j * 4 + half * 2 + 1]);
    }
}
extern "C" __global__ void __launch_bounds__(288, 1) hopper_conv3x3_f16_128x64_s3(const __grid_constant__ Conv p) {
    conv3x3<__half, 64, 3>(p, p.y);
}
KERNEL_EXPORT_HOPPER(hopper_conv3x3_f16_128x64_s3);
extern "C" __global__ void __launch_bounds__(288, 1) hopper_conv3x3_bf16_128x192_s3(const __grid_constant__ Conv p) {
    conv3x3<__nv_bfloat16, 192, 3>(p, reinterpret_cast<__nv_bfloat16*>(p.y));
}
KERNEL_EXPORT_HOPPER(hopper_conv3x3_bf16_128x192_s3);

struct Wgrad {
    TensorMap g;            // [pixels][cout], boxes of 64 pixels
    TensorMap x[2];         // [n][h][w][cin[i]] by im2col, corners -1 and -1, 64 pixels: the two inputs side by side
    float* dw;              // [cout][9 (cin[0] + cin[1])]
    int height, width, cin[2], cout, pixels;
};

// dw[co][tap][c] = sum over pixels of g[p][co] x[p + tap][c]; both operands MN-major, k = pixels. 128 by 128 a
// block, all counts of channels multiples of 64. Persistent: a block goes on to the next tile while its last
// products are stored through shared memory, which its producer must not overtake.
__device__ void wgrad3x3(const Wgrad& p) {
    constexpr int S = 3, kBlock = 64 * 128, kStage = 4 * kBlock;
    extern __shared__ __align__(128) unsigned char smem[];
    const smem_addr first = tiles(smem), full = first + S * kStage, empty = full + S * 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int cin = p.cin[0] + p.cin[1], columns = 9 * cin, steps = (p.pixels + 63) / 64;
    const int across = (columns + 127) / 128, all = (p.cout + 127) / 128 * across;
    if (threadIdx.x == 0) {
        for (int s = 0; s < S; s++) mbarrier_init(full + s * 8, 1), mbarrier_init(empty + s * 8, 2);
        fence_mbarrier_init();
    }
    __syncthreads();

    if (warp >= 8) {
        registers_release<40>();
        int stage = 0, parity = 1;
        for (int tile = blockIdx.x; tile < all && threadIdx.x == 256; tile += gridDim.x)
            for (int step = 0; step < steps; step++) {
                const int pixel = step * 64, row = pixel / p.width;
                const smem_addr a = first + stage * kStage, b = a + 2 * kBlock, bar = full + stage * 8;
                mbarrier_wait(empty + stage * 8, parity);
                mbarrier_expect(bar, kStage);
                for (int i = 0; i < 2; i++) tma_load_2d(a + i * kBlock, p.g, bar, tile / across * 128 + i * 64, pixel);
                for (int i = 0; i < 2; i++) {
                    const int column = min(tile % across * 128 + i * 64, columns - 64), tap = column / cin, c = column % cin;
                    const int which = c >= p.cin[0];
                    tma_load_im2col(b + i * kBlock, p.x[which], bar, which ? c - p.cin[0] : c, pixel % p.width - 1,
                                    row % p.height - 1, row / p.height, tap % 3, tap / 3);
                }
                if (++stage == S) stage = 0, parity ^= 1;
            }
        return;
    }

    registers_take<232>();
    const int group = warp / 4;
    int stage = 0, parity = 0;
    for (int tile = blockIdx.x; tile < all; tile += gridDim.x) {
        float acc[64] = {};
        for (int step = 0; step < steps; step++) {
            mbarrier_wait(full + stage * 8, parity);
            wgmma_hold(acc);
            wgmma_fence();
            const smem_addr a = first + stage * kStage + group * kBlock, b = first + stage * kStage + 2 * kBlock;
#pragma unroll
            for (int k = 0; k < 4; k++)
                wgmma<__half, 128, true>(acc, wgmma_descriptor(a + k * 2048, kBlock, 1024), wgmma_descriptor(b + k * 2048, kBlock, 1024));
            wgmma_commit();
            wgmma_hold(acc);
            if (step) {
                wgmma_wait<1>();
                if (threadIdx.x % 128 == 0) mbarrier_arrive(empty + (stage + S - 1) % S * 8);
            }
            if (++stage == S) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        wgmma_hold(acc);
        // The stage of the last step, which is free but for this group's half: rows of 128 floats go through it.
        const int last = (stage + S - 1) % S;
        unsigned char* bytes = smem + (first - smem_address(smem)) + last * kStage + group * 2 * kBlock;
        named_barrier(1, 256);  // both groups have left it
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float* rows = reinterpret_cast<float*>(bytes) + (warp % 4 * 8 + lane / 4) * 128;
#pragma unroll
            for (int j = 0; j < 16; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) rows[j * 8 + lane % 4 * 2 + e] = acc[j * 4 + half * 2 + e];
            __syncwarp();
            for (int i = 0; i < 8; i++) {
                const int co = tile / across * 128 + warp * 16 + half * 8 + i;
                const float* row = reinterpret_cast<float*>(bytes) + (warp % 4 * 8 + i) * 128;
                for (int j = lane; j < 128; j += 32) {
                    const int column = tile % across * 128 + j;
                    if (co < p.cout && column < columns) p.dw[size_t(co) * columns + column] = row[j];
                }
            }
            __syncwarp();
        }
        fence_async_shared();
        named_barrier(2 + group, 128);
        if (threadIdx.x % 128 == 0) mbarrier_arrive(empty + last * 8);
    }
}
extern "C" __global__ void __launch_bounds__(384, 1) hopper_wgrad3x3_f16_128x128_s3(const __grid_constant__ Wgrad p) { wgrad3x3(p); }
KERNEL_EXPORT_HOPPER(hopper_wgrad3x3_f16_128x128_s3);
