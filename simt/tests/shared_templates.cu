// Dynamic shared memory in templates: the helper whose specialisations name it by type, and a template's own declaration; with
// static shared memory beside it. An argument chooses a bug; with BUG it is the overrun.
// expect normal: past the end of dynamic shared memory|ok
// expect checked: out of bounds: write of 4 bytes, 0 bytes past the end of dynamic shared memory of 256 bytes
#include <cuda_runtime.h>
#include <string>

template <class T> struct SharedMemory {
    __device__ inline operator T*() {
        extern __shared__ int __smem[];
        return (T*)__smem;
    }
    __device__ inline operator const T*() const {
        extern __shared__ int __smem[];
        return (T*)__smem;
    }
};
template <> struct SharedMemory<double> {
    __device__ inline operator double*() {
        extern __shared__ double __smem_d[];
        return (double*)__smem_d;
    }
};

enum Bug { none, race, overrun, unwritten };

template <class T> __global__ void reverse(T* x, Bug bug) {
    T* s = SharedMemory<T>();
    s[threadIdx.x + (bug == overrun)] = x[threadIdx.x];
    if (bug != race) __syncthreads();
    x[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}

template <int ROW> __global__ void transpose(float* x, Bug bug) {
    extern __shared__ __align__(16)
        float tile[][ROW];
    __shared__ float bias[4096];  // 16 KB
    const int row = threadIdx.x / ROW, column = threadIdx.x % ROW;
    bias[threadIdx.x] = 1;
    if (bug != unwritten || row) tile[row][column] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = tile[column][row] + bias[threadIdx.x ^ 1];
}

template <class T> static bool reversed(Bug bug) {
    T host[64], *x;
    for (int i = 0; i < 64; i++) host[i] = T(i);
    cudaMalloc(&x, sizeof host);
    cudaMemcpy(x, host, sizeof host, cudaMemcpyHostToDevice);
    reverse<T><<<1, 64, sizeof host>>>(x, bug);
    if (cudaMemcpy(host, x, sizeof host, cudaMemcpyDeviceToHost)) return false;
    for (int i = 0; i < 64; i++)
        if (host[i] != T(63 - i)) return false;
    return true;
}

static bool transposed(Bug bug, size_t dynamic) {
    float host[64], *x;
    for (int i = 0; i < 64; i++) host[i] = float(i);
    cudaMalloc(&x, sizeof host);
    cudaMemcpy(x, host, sizeof host, cudaMemcpyHostToDevice);
    transpose<8><<<1, 64, dynamic>>>(x, bug);
    if (cudaMemcpy(host, x, sizeof host, cudaMemcpyDeviceToHost)) return false;
    for (int i = 0; i < 64; i++)
        if (host[i] != float(i % 8 * 8 + i / 8) + 1) return false;
    return true;
}

int main(int argc, char** argv) {
    const std::string what = argc > 1 ? argv[1] : "";
#ifdef BUG
    return !reversed<float>(overrun);
#endif
    if (what == "race") return !reversed<double>(race);
    if (what == "unwritten") return !transposed(unwritten, 256);
    if (what == "48KB") return !transposed(none, 32 << 10);
    if (what == "too much") return !transposed(none, (32 << 10) + 4);
    if (what == "99KB") {  // more of it for another kernel is none for this one
        cudaFuncSetAttribute(reverse<float>, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
        cudaFuncSetAttribute(transpose<8>, cudaFuncAttributeMaxDynamicSharedMemorySize, 40 << 10);
        if (!transposed(none, 40 << 10) || cudaFuncSetAttribute(transpose<8>, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10) != cudaErrorInvalidValue) return 1;
        return !transposed(none, (40 << 10) + 4);
    }
    return !(reversed<float>(none) && reversed<double>(none) && reversed<char>(none) && transposed(none, 256));
}
