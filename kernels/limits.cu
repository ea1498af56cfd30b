// How fast a card's tensor cores and its memory are: what the other kernels are measured against.
//
//     mma_rate    d += a b in m16n8k16, 16-bit inputs, f32 sums; a warp keeps CHAINS independent sums, all in registers.
//                 Multiply-adds: warps * rounds * CHAINS * 16 * 8 * 16. Bytes: none to speak of.
//     copy_rate   to[i] = from[i], 16 bytes each, COPIES by each thread. cuMemcpy reaches two thirds of it on an H200.
#include "ptx.cuh"

constexpr int CHAINS = 8;
constexpr int COPIES = 8;

struct MmaRate {
    float* out;  // written only if a sum is what none can be, so that the compiler keeps the loop
    int rounds;
    int padding;
};

template <class T>
__device__ __forceinline__ void mma_rate(const MmaRate& p) {
    float d[1][CHAINS][4] = {};
    uint32_t a[1][4], b[CHAINS][2];
    // Small values: the sums stay finite. 0x0400 is the least normal number of f16.
#pragma unroll
    for (int i = 0; i < 4; i++) a[0][i] = 0x04000400u + threadIdx.x % 2;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) b[i][0] = b[i][1] = 0x04000400u;
    for (int round = 0; round < p.rounds; round++) mma_tile<T>(d, a, b);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) sum += d[0][i][0] + d[0][i][1] + d[0][i][2] + d[0][i][3];
    if (sum < 0.0f) p.out[0] = sum;
}

extern "C" __global__ void __launch_bounds__(256) mma_rate_f16(MmaRate p) {
    begin_kernel();
    mma_rate<__half>(p);
}
KERNEL_EXPORT(mma_rate_f16);
extern "C" __global__ void __launch_bounds__(256) mma_rate_bf16(MmaRate p) {
    begin_kernel();
    mma_rate<__nv_bfloat16>(p);
}
KERNEL_EXPORT(mma_rate_bf16);

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
