// A histogram: counts in shared memory, then in a __device__ array. With BUG a plain increment counts.
// expect normal: ok
// expect checked: race: 
#include <cuda_runtime.h>

__device__ unsigned int total[16];
__device__ unsigned int largest = 0;

__global__ void histogram(const unsigned char* data, int n) {
    __shared__ unsigned int counts[16];
    if (threadIdx.x < 16) counts[threadIdx.x] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x) {
#ifdef BUG
        counts[data[i] & 15]++;
#else
        atomicInc(&counts[data[i] & 15], 0xffffffff);
#endif
        atomicMax(&largest, data[i]);
    }
    __syncthreads();
    if (threadIdx.x < 16) atomicAdd(&total[threadIdx.x], counts[threadIdx.x]);
}

int main() {
    const int n = 2000;
    unsigned char data[n];
    unsigned expected[16] = {}, got[16], most, highest = 0;
    for (int i = 0; i < n; i++) data[i] = (unsigned char)(i * i % 251), expected[data[i] & 15]++, highest = max(highest, data[i]);
    unsigned char* d;
    cudaMalloc(&d, n);
    cudaMemcpy(d, data, n, cudaMemcpyHostToDevice);
    histogram<<<4, 64>>>(d, n);
    if (cudaDeviceSynchronize()) return 1;
    cudaMemcpyFromSymbol(got, total, sizeof got);
    cudaMemcpyFromSymbol(&most, largest, sizeof most);
    for (int i = 0; i < 16; i++)
        if (got[i] != expected[i]) return 1;
    return most != highest;
}
