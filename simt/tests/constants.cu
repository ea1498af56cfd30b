// A filter of a line with its taps in constant memory. With BUG one tap more than there are.
// expect normal: main() returned 1
// expect checked: index out of the array's bounds
#include <cuda_runtime.h>

#define RADIUS 3
struct Filter {
    float taps[2 * RADIUS + 1];
    int padding;
};
__constant__ Filter filter;
__constant__ float scale = 2.0f;
__device__ int rows_done;

template <int TILE>
__global__ void line(const float* in, float* out, int n) {
    __shared__ float tile[TILE + 2 * RADIUS];
    const int x = blockIdx.x * TILE + threadIdx.x;
    for (int i = threadIdx.x; i < TILE + 2 * RADIUS; i += TILE) {
        const int from = int(blockIdx.x) * TILE + i - RADIUS;
        tile[i] = from >= 0 && from < n ? in[from] : 0.0f;
    }
    __syncthreads();
    float sum = 0;
#ifdef BUG
    for (int k = -RADIUS; k <= RADIUS + 1; k++) sum += filter.taps[k + RADIUS] * tile[min(threadIdx.x + k + RADIUS, TILE + 2u * RADIUS - 1)];
#else
    for (int k = -RADIUS; k <= RADIUS; k++) sum += filter.taps[k + RADIUS] * tile[threadIdx.x + k + RADIUS];
#endif
    if (x < n) out[x] = scale * sum;
    if (threadIdx.x == 0) atomicAdd(&rows_done, 1);
}

int main() {
    const int n = 100;
    float in[n], out[n];
    Filter f = {{1, 2, 3, 4, 3, 2, 1}, 0x7fc00000};
    for (int i = 0; i < n; i++) in[i] = float(i % 5);
    float *a, *b, half = 0.5f;
    int done = 0;
    cudaMalloc(&a, sizeof in), cudaMalloc(&b, sizeof out);
    cudaMemcpy(a, in, sizeof in, cudaMemcpyHostToDevice);
    cudaMemcpyToSymbol(filter, &f, sizeof f);
    cudaMemcpyToSymbol(scale, &half, sizeof half);
    if (cudaMemcpyToSymbol(scale, &f, sizeof f) == cudaSuccess) return 2;  // larger than the symbol
    cudaGetLastError();
    line<32><<<(n + 31) / 32, 32>>>(a, b, n);
    if (cudaDeviceSynchronize() != cudaSuccess) return 1;
    cudaMemcpy(out, b, sizeof out, cudaMemcpyDeviceToHost);
    cudaMemcpyFromSymbol(&done, rows_done, sizeof done);
    for (int i = 0; i < n; i++) {
        float sum = 0;
        for (int k = -RADIUS; k <= RADIUS; k++) sum += i + k >= 0 && i + k < n ? f.taps[k + RADIUS] * in[i + k] : 0;
        if (out[i] != 0.5f * sum) return 1;
    }
    return done != 4;
}
