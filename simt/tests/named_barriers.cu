// A warp produces, two consume; they meet in named barriers. With BUG the consumers do not wait.
// expect normal: main() returned 1|ok
// expect checked: race: |read of shared memory that nobody has written
#include <cuda_runtime.h>

__device__ void meet(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

__global__ void relay(const float* in, float* out, int rounds) {
    __shared__ float buffer[64];
    const int warp = threadIdx.x / 32;
    for (int r = 0; r < rounds; r++) {
        if (warp == 0) {
            buffer[threadIdx.x] = in[r * 64 + threadIdx.x], buffer[threadIdx.x + 32] = in[r * 64 + threadIdx.x + 32];
            meet(1, 96);
        } else {
#ifndef BUG
            meet(1, 96);
#endif
            out[r * 64 + threadIdx.x - 32] = 2 * buffer[threadIdx.x - 32];
#ifdef BUG
            meet(1, 96);
#endif
        }
        meet(2, 96);
    }
}

int main() {
    const int n = 3 * 64;
    float in[n], out[n];
    for (int i = 0; i < n; i++) in[i] = float(i);
    float *a, *b;
    cudaMalloc(&a, sizeof in), cudaMalloc(&b, sizeof out);
    cudaMemcpy(a, in, sizeof in, cudaMemcpyHostToDevice);
    relay<<<1, 96>>>(a, b, 3);
    if (cudaDeviceSynchronize()) return 1;
    cudaMemcpy(out, b, sizeof out, cudaMemcpyDeviceToHost);
    for (int i = 0; i < n; i++)
        if (out[i] != 2 * in[i]) return 1;
}
