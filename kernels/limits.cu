// How fast a card's tensor cores and its memory are: what the other kernels are measured against.
//
//     mma_rate    d += a b in m16n8k16, 16-bit inputs; sums in f32, or in f16 (mma_rate_f16x2), where a GeForce is twice as
//                 fast. A warp keeps CHAINS independent sums, all in registers. The numbers are random: a card at its limit
//                 of power is faster on zeros. Multiply-adds: warps * rounds * CHAINS * 16 * 8 * 16. Bytes: none to speak of.
//     copy_rate   to[i] = from[i], 16 bytes each, COPIES by each thread. cuMemcpy reaches two thirds of it on an H200.
#include "math.cuh"

constexpr int CHAINS = 8;
constexpr int COPIES = 8;

// Sums in f32 of T, or in f16 if F16_SUMS.
template <class T, bool F16_SUMS>
__device__ __forceinline__ void mma_rate(const Rate& p) {
    begin_kernel();
    uint32_t a[1][4], b[CHAINS][2];
    const uint4 first = random8<T>(threadIdx.x);
    a[0][0] = first.x, a[0][1] = first.y, a[0][2] = first.z, a[0][3] = first.w;
#pragma unroll
    for (int i = 0; i < CHAINS; i += 2) {
        const uint4 next = random8<T>((i + 1) * 256 + threadIdx.x);
        b[i][0] = next.x, b[i][1] = next.y, b[i + 1][0] = next.z, b[i + 1][1] = next.w;
    }
    float sum = 0.0f;
    if constexpr (F16_SUMS) {
        // Sums of 64 products, as in the convolutions: larger ones would soon be too large to change.
        float all[4 * CHAINS] = {};
        for (int round = 0; round < p.rounds; round += 4) {
            uint32_t d[1][CHAINS][2];
            keep(a[0]);  // These products do not depend on those of the rounds before.
            mma_tile_f16(d, a, b);
#pragma unroll
            for (int i = 1; i < 4; i++) mma_tile_f16(d, a, b, d);
#pragma unroll
            for (int i = 0; i < CHAINS; i += 2) {
                float x[8];
                unpack8<T>(make_uint4(d[0][i][0], d[0][i][1], d[0][i + 1][0], d[0][i + 1][1]), x);
#pragma unroll
                for (int j = 0; j < 8; j++) all[4 * i + j] += x[j];
            }
        }
#pragma unroll
        for (int i = 0; i < 4 * CHAINS; i++) sum += all[i] * all[i];
    } else {
        float d[1][CHAINS][4] = {};
        for (int round = 0; round < p.rounds; round++) mma_tile<T>(d, a, b);
#pragma unroll
        for (int i = 0; i < 4 * CHAINS; i++) sum += d[0][i / 4][i % 4] * d[0][i / 4][i % 4];
    }
    if (sum < 0.0f) p.out[0] = sum;
}

extern "C" __global__ void __launch_bounds__(256) mma_rate_f16(Rate p) { mma_rate<__half, false>(p); }
KERNEL_EXPORT(mma_rate_f16);
extern "C" __global__ void __launch_bounds__(256) mma_rate_bf16(Rate p) { mma_rate<__nv_bfloat16, false>(p); }
KERNEL_EXPORT(mma_rate_bf16);
extern "C" __global__ void __launch_bounds__(256) mma_rate_f16x2(Rate p) { mma_rate<__half, true>(p); }
KERNEL_EXPORT(mma_rate_f16x2);

struct CopyRate {
    const void* from;
    void* to;
};

extern "C" __global__ void __launch_bounds__(256) copy_rate(CopyRate p) {
    begin_kernel();
    const size_t first = size_t(blockIdx.x) * 256 * COPIES + threadIdx.x;
    uint4 v[COPIES];
#pragma unroll
    for (int i = 0; i < COPIES; i++) v[i] = load16(static_cast<const uint4*>(p.from) + first + i * 256);
#pragma unroll
    for (int i = 0; i < COPIES; i++) store16(static_cast<uint4*>(p.to) + first + i * 256, v[i]);
}
KERNEL_EXPORT(copy_rate);
