// Two kinds of names that CUDA overloads: maxima of mixed signs, atomics of mixed types, bits, conversions; and a static
// array of a helper. With BUG the helper's array overflows by one.
// expect normal: ok|main() returned 1
// expect checked: index out of the array's bounds|out of bounds
#include <cuda_runtime.h>

static __device__ int shared_sum(int x) {
    __shared__ int values[32];
#ifdef BUG
    values[threadIdx.x + 1] = x;
#else
    values[threadIdx.x] = x;
#endif
    __syncwarp();
    int sum = 0;
    for (int i = 0; i < int(blockDim.x); i++) sum += values[i];
    return sum;
}

__global__ void names(int* out, unsigned* bits, unsigned long long* wide, double* real) {
    const unsigned t = threadIdx.x;
    atomicAdd(out, t);  // int and unsigned
    atomicMax(bits, max(t, 5));
    atomicXor(bits + 1, 1 << t);
    atomicMin(wide, 1000ull + t);
    atomicAdd(real, 0.5f);
    atomicCAS(out + 1, 0, 7);
    atomicExch(bits + 2, __umul24(0x01000003, 5));
    const int sum = shared_sum(int(t));
    if (t == 0) {
        out[2] = sum;
        out[3] = __float2int_rz(-1e20f);
        out[4] = __popc(__brev(3)) + __clz(1) + __ffs(8);
        out[5] = isnan(__int_as_float(0x7fc00000)) && !isinf(1.0f) && clock64() > 0;
        bits[3] = __funnelshift_l(0x80000000u, 1, 1);
    }
}

int main() {
    int *out, o[6] = {};
    unsigned *bits, b[4] = {};
    unsigned long long *wide, w = ~0ull;
    double *real, r = 0;
    cudaMalloc(&out, sizeof o), cudaMalloc(&bits, sizeof b), cudaMalloc(&wide, 8), cudaMalloc(&real, 8);
    cudaMemcpy(out, o, sizeof o, cudaMemcpyHostToDevice), cudaMemcpy(bits, b, sizeof b, cudaMemcpyHostToDevice);
    cudaMemcpy(wide, &w, 8, cudaMemcpyHostToDevice), cudaMemcpy(real, &r, 8, cudaMemcpyHostToDevice);
    names<<<1, 32>>>(out, bits, wide, real);
    if (cudaDeviceSynchronize()) return 1;
    cudaMemcpy(o, out, sizeof o, cudaMemcpyDeviceToHost), cudaMemcpy(b, bits, sizeof b, cudaMemcpyDeviceToHost);
    cudaMemcpy(&w, wide, 8, cudaMemcpyDeviceToHost), cudaMemcpy(&r, real, 8, cudaMemcpyDeviceToHost);
    return !(o[0] == 496 && o[1] == 7 && o[2] == 496 && o[3] == INT_MIN && o[4] == 2 + 31 + 4 && o[5] == 1 && b[0] == 31 && b[1] == 0xffffffff &&
             b[2] == 15 && b[3] == 3 && w == 1000 && r == 16);
}
