// Sums of rows: a block for each row of x [rows, width], a tree of sums in shared memory.
#include "ptx.cuh"

extern "C" __global__ void row_sums(const float* x, float* sums, int width) {
    __shared__ float part[128];
    float sum = 0;
    for (int i = threadIdx.x; i < width; i += 128) sum += x[size_t(blockIdx.x) * width + i];
    part[threadIdx.x] = sum;
    for (int half = 64; half > 0; half /= 2) {
        __syncthreads();  // the other half is there
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = part[0];
}
KERNEL_EXPORT(row_sums);
