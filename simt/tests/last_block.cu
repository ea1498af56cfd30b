// A sum whose last block adds the others' parts. With BUG there is no fence before a block says that it is done.
// expect normal: ok
// expect checked: race between blocks: read
#include <cuda_runtime.h>

__device__ unsigned int finished = 0;

__global__ void sum(const float* in, volatile float* parts, float* out, int n) {
    __shared__ float shared[64];
    __shared__ bool last;
    float mine = 0;
    for (int i = blockIdx.x * 64 + threadIdx.x; i < n; i += gridDim.x * 64) mine += in[i];
    shared[threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
        float all = 0;
        for (int i = 0; i < 64; i++) all += shared[i];
        parts[blockIdx.x] = all;
#ifndef BUG
        __threadfence();
#endif
        last = atomicInc(&finished, gridDim.x) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float all = 0;
        for (unsigned b = 0; b < gridDim.x; b++) all += parts[b];
        *out = all;
        finished = 0;
    }
}

int main() {
    const int n = 5000;
    static float in[n];
    float expected = 0, got;
    for (int i = 0; i < n; i++) in[i] = float(i % 3), expected += in[i];
    float *a, *b, *c;
    cudaMalloc(&a, sizeof in), cudaMalloc(&b, 8 * 4), cudaMalloc(&c, 4);
    cudaMemcpy(a, in, sizeof in, cudaMemcpyHostToDevice);
    for (int twice = 0; twice < 2; twice++) {
        sum<<<8, 64>>>(a, b, c, n);
        if (cudaDeviceSynchronize()) return 1;
        cudaMemcpy(&got, c, 4, cudaMemcpyDeviceToHost);
        if (got != expected) return 1;
    }
}
