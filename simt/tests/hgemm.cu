// C = A B^T in halves by inline PTX: cp.async in two stages, ldmatrix, mma. With BUG nobody waits for the copies.
// expect normal: main() returned 1
// expect checked: that a cp.async is still writing
#include <cstdint>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <vector>

#define COPY16(dst, src) asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], %2;\n" ::"r"(dst), "l"(src), "n"(16))
#define COMMIT() asm volatile("cp.async.commit_group;\n" ::)
#define WAIT(n) asm volatile("cp.async.wait_group %0;\n" ::"n"(n))
#define LDMATRIX4(r0, r1, r2, r3, address)                                         \
    asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];\n" \
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(address))
#define MMA(d0, d1, a0, a1, a2, a3, b0, b1, c0, c1)                                                            \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%8, %9};\n" \
                 : "=r"(d0), "=r"(d1) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c0), "r"(c1))

// 32 x 32 of C a block: four warps of 16 x 16, k in steps of 16.
__global__ void __launch_bounds__(128) hgemm(const half* __restrict__ A, const half* __restrict__ B, half* __restrict__ C, int n, int k) {
    __shared__ __align__(16) half a[2][32][16 + 8];
    __shared__ __align__(16) half b[2][32][16 + 8];
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    const int row0 = blockIdx.y * 32, column0 = blockIdx.x * 32;

    auto load = [&](int stage, int k0) {
        const int row = t / 2 % 32, part = t % 2 * 8;
        const half* from = t < 64 ? &A[(row0 + row) * k + k0 + part] : &B[(column0 + row) * k + k0 + part];
        uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(t < 64 ? &a[stage][row][part] : &b[stage][row][part]));
        COPY16(to, from);
        COMMIT();
    };
    uint32_t d[2][2] = {};
    load(0, 0);
    for (int step = 0; step < k / 16; step++) {
        if (step + 1 < k / 16) load((step + 1) % 2, (step + 1) * 16);
        else COMMIT();
#ifndef BUG
        WAIT(1);
#endif
        __syncthreads();
        uint32_t fa[4], fb[4];
        LDMATRIX4(fa[0], fa[1], fa[2], fa[3], (uint32_t)__cvta_generic_to_shared(&a[step % 2][warp / 2 * 16 + lane % 16][lane / 16 * 8]));
        LDMATRIX4(fb[0], fb[1], fb[2], fb[3], (uint32_t)__cvta_generic_to_shared(&b[step % 2][warp % 2 * 16 + lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]));
#pragma unroll
        for (int j = 0; j < 2; j++) MMA(d[j][0], d[j][1], fa[0], fa[1], fa[2], fa[3], fb[2 * j], fb[2 * j + 1], d[j][0], d[j][1]);
        __syncthreads();
    }
    for (int j = 0; j < 2; j++)
        for (int r = 0; r < 2; r++) {
            const int row = row0 + warp / 2 * 16 + lane / 4 + 8 * r, column = column0 + warp % 2 * 16 + j * 8 + lane % 4 * 2;
            *reinterpret_cast<uint32_t*>(&C[row * n + column]) = d[j][r];
        }
    WAIT(0);
}

int main() {
    const int m = 64, n = 32, k = 64;
    std::vector<half> a(m * k), b(n * k), c(m * n);
    for (int i = 0; i < m * k; i++) a[i] = half(float(i * 7 % 13 - 6));
    for (int i = 0; i < n * k; i++) b[i] = half(float(i * 5 % 11 - 5) / 4);
    half *da, *db, *dc;
    cudaMalloc(&da, 2 * a.size()), cudaMalloc(&db, 2 * b.size()), cudaMalloc(&dc, 2 * c.size());
    cudaMemcpy(da, a.data(), 2 * a.size(), cudaMemcpyHostToDevice), cudaMemcpy(db, b.data(), 2 * b.size(), cudaMemcpyHostToDevice);
    hgemm<<<dim3(n / 32, m / 32), 128>>>(da, db, dc, n, k);
    if (cudaDeviceSynchronize() != cudaSuccess) return 1;
    cudaMemcpy(c.data(), dc, 2 * c.size(), cudaMemcpyDeviceToHost);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            float sum = 0;
            for (int x = 0; x < k; x++) sum += float(a[i * k + x]) * float(b[j * k + x]);
            if (!(fabsf(float(c[i * n + j]) - sum) <= 0.5f)) return 1;
        }
}
