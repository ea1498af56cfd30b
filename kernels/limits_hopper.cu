// How fast Hopper's tensor cores are by wgmma (sm_90a); see limits.cu.
//
//     d += a b in m64n256k16, 16-bit inputs from shared memory, f32 sums: two groups of 128 threads, 64 rows each
//
// Multiply-adds: blocks * rounds * 128 * 256 * 64.
#include "hopper.cuh"
#include "math.cuh"

template <class T>
__device__ __forceinline__ void wgmma_rate(const Rate& p) {
    constexpr int ROW = 128, A_BYTES = 64 * ROW, B_BYTES = 256 * ROW, STRIDE = 8 * ROW;
    extern __shared__ __align__(128) unsigned char smem[];
    const smem_addr tiles = (smem_address(smem) + 1023) & ~smem_addr(1023);
    begin_kernel();
    uint4* const to = reinterpret_cast<uint4*>(smem + (tiles - smem_address(smem)));
    for (int i = threadIdx.x; i < (2 * A_BYTES + B_BYTES) / 16; i += 256) to[i] = random8<T>(i);
    fence_async_shared();
    __syncthreads();
    float d[128] = {};
    const smem_addr a = tiles + threadIdx.x / 128 * A_BYTES, b = tiles + 2 * A_BYTES;
    for (int round = 0; round < p.rounds; round++) {
        wgmma_hold(d);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++)
            wgmma<T, 256, false>(d, wgmma_descriptor(a + k * 32, 16, STRIDE), wgmma_descriptor(b + k * 32, 16, STRIDE));
        wgmma_commit();
        wgmma_hold(d);
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    wgmma_hold(d);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 128; i++) sum += d[i] * d[i];
    if (sum < 0.0f) p.out[0] = sum;
}

extern "C" __global__ void __launch_bounds__(256, 1) wgmma_rate_f16(Rate p) { wgmma_rate<__half>(p); }
KERNEL_EXPORT_HOPPER(wgmma_rate_f16);
extern "C" __global__ void __launch_bounds__(256, 1) wgmma_rate_bf16(Rate p) { wgmma_rate<__nv_bfloat16>(p); }
KERNEL_EXPORT_HOPPER(wgmma_rate_bf16);
