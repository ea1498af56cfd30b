// Kernels without a main(): driver.cpp runs them by name.
template <class T>
__global__ void scale(const T* in, T* out, T by, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
#ifndef BUG
    if (i >= n) return;
#endif
    out[i] = by * in[i];
    __syncthreads();
}
template __global__ void scale<float>(const float*, float*, float, int);

__global__ void copy(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x]; }
