// Producers arrive at one named barrier and do not wait there; consumers wait, and arrive at another to give the buffer back.
// With BUG they give it back before they have read.
// expect normal: main() returned 1|ok
// expect checked: race: 
#include <cuda_runtime.h>

__device__ void wait(int id) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(128) : "memory"); }
__device__ void arrive(int id) { asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "n"(128) : "memory"); }
__device__ void arrive_there() { asm volatile("bar.arrive 2, 128;" ::: "memory"); }

enum { kFull = 1, kEmpty = 2 };

__global__ void pipeline(const float* in, float* out, int rounds) {
    __shared__ float buffer[64];
    const int t = threadIdx.x;
    // Who arrives goes on, to what the others wait for first.
    if (t < 64) arrive(4), wait(5);
    else wait(5), wait(4);
    for (int r = 0; r < rounds; r++) {
        if (t < 64) {
            if (r > 0) wait(kEmpty);
            buffer[t] = in[r * 64 + t];
            arrive(kFull);
        } else {
            wait(kFull);
#ifdef BUG
            if (r + 1 < rounds) arrive_there();
#endif
            out[r * 64 + t - 64] = 2 * buffer[(t - 64) ^ 63];
#ifndef BUG
            if (r + 1 < rounds) arrive_there();
#endif
        }
    }
    int all;
    asm volatile("{ .reg .pred p; setp.ge.s32 p, %1, 64; bar.red.popc.u32 %0, 0, p; }" : "=r"(all) : "r"(t));
    if (all != 64) out[0] = -1;
}

int main() {
    const int n = 4 * 64;
    float in[n], out[n];
    for (int i = 0; i < n; i++) in[i] = float(i);
    float *a, *b;
    cudaMalloc(&a, sizeof in), cudaMalloc(&b, sizeof out);
    cudaMemcpy(a, in, sizeof in, cudaMemcpyHostToDevice);
    pipeline<<<1, 128>>>(a, b, 4);
    if (cudaDeviceSynchronize()) return 1;
    cudaMemcpy(out, b, sizeof out, cudaMemcpyDeviceToHost);
    for (int i = 0; i < n; i++)
        if (out[i] != 2 * in[i ^ 63]) return 1;
}
