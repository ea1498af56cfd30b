// A product by nvcuda::wmma, staged in shared memory. With BUG a warp reads its tile before it is there.
// expect normal: main() returned 1
// expect checked: shared memory|race: 
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

using namespace nvcuda;

__global__ void product(const half* a, const half* b, float* c, int n, int k) {
    __shared__ half tile[16][16];
    wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major> fa;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::col_major> fb;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc;
    wmma::fill_fragment(fc, 0.0f);
    const int warp = threadIdx.x / 32;
    for (int k0 = 0; k0 < k; k0 += 16) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) tile[i / 16][i % 16] = a[(blockIdx.y * 16 + i / 16) * k + k0 + i % 16];
#ifndef BUG
        __syncthreads();
#endif
        wmma::load_matrix_sync(fa, &tile[0][0], 16);
        wmma::load_matrix_sync(fb, b + (warp * 16) * k + k0, k);
        wmma::mma_sync(fc, fa, fb, fc);
        __syncthreads();
    }
    for (int i = 0; i < fc.num_elements; i++) fc.x[i] *= 0.5f;
    wmma::store_matrix_sync(c + blockIdx.y * 16 * n + warp * 16, fc, n, wmma::mem_row_major);
}

int main() {
    const int m = 32, n = 32, k = 48;
    static half a[m * k], b[n * k];
    static float c[m * n];
    for (int i = 0; i < m * k; i++) a[i] = half(float(i * 3 % 7 - 3));
    for (int i = 0; i < n * k; i++) b[i] = half(float(i * 5 % 9 - 4));
    half *da, *db;
    float* dc;
    cudaMalloc(&da, sizeof a), cudaMalloc(&db, sizeof b), cudaMalloc(&dc, sizeof c);
    cudaMemcpy(da, a, sizeof a, cudaMemcpyHostToDevice), cudaMemcpy(db, b, sizeof b, cudaMemcpyHostToDevice);
    product<<<dim3(1, m / 16), 64>>>(da, db, dc, n, k);
    if (cudaDeviceSynchronize() != cudaSuccess) return 1;
    cudaMemcpy(c, dc, sizeof c, cudaMemcpyDeviceToHost);
    for (int i = 0; i < m * n; i++) {
        float sum = 0;
        for (int x = 0; x < k; x++) sum += float(a[i / n * k + x]) * float(b[i % n * k + x]);
        if (c[i] != 0.5f * sum) return 1;
    }
}
