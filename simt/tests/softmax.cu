// A softmax of rows: in shared memory the maximum, then the sum. With BUG the sums overwrite the maximum while others
// still read it.
// expect normal: ok
// expect checked: race: 
#include <cstdio>
#include <cuda_runtime.h>
#include <vector>

template <int THREADS>
__global__ void softmax(const float* x, float* y, int n) {
    __shared__ float shared[THREADS];
    const int t = threadIdx.x;
    x += blockIdx.x * n, y += blockIdx.x * n;
    float most = -INFINITY;
    for (int i = t; i < n; i += THREADS) most = fmaxf(most, x[i]);
    shared[t] = most;
    __syncthreads();
    for (int by = THREADS / 2; by > 0; by /= 2) {
        if (t < by) shared[t] = fmaxf(shared[t], shared[t + by]);
        __syncthreads();
    }
    most = shared[0];
#ifndef BUG
    __syncthreads();
#endif
    float sum = 0;
    for (int i = t; i < n; i += THREADS) sum += __expf(x[i] - most);
    shared[t] = sum;
    __syncthreads();
    for (int by = THREADS / 2; by > 0; by /= 2) {
        if (t < by) shared[t] += shared[t + by];
        __syncthreads();
    }
    for (int i = t; i < n; i += THREADS) y[i] = __expf(x[i] - most) / shared[0];
}

int main() {
    const int rows = 3, n = 100;
    std::vector<float> x(rows * n), y(rows * n);
    for (int i = 0; i < rows * n; i++) x[i] = float(i * 37 % 101) / 10;
    float *dx, *dy;
    cudaMalloc(&dx, 4 * x.size());
    cudaMalloc((void**)&dy, 4 * y.size());
    cudaMemcpy(dx, x.data(), 4 * x.size(), cudaMemcpyHostToDevice);
    softmax<64><<<rows, 64>>>(dx, dy, n);
    if (cudaDeviceSynchronize() != cudaSuccess) return 1;
    cudaMemcpy(y.data(), dy, 4 * y.size(), cudaMemcpyDeviceToHost);
    for (int r = 0; r < rows; r++) {
        float sum = 0;
        for (int i = 0; i < n; i++) sum += y[r * n + i];
        #ifdef WRONG_TEST
        sum = 0;
#endif
        if (!(fabsf(sum - 1) < 1e-4f)) { printf("row %d: %g\n", r, sum); return 1; }
    }
    cudaFree(dx), cudaFree(dy);
}
