// A gated activation on pairs of halves. With BUG a thread too many works, beyond the end.
// expect normal: main() returned 1|past the end of an allocation|ok
// expect checked: out of bounds: read of 4 bytes, 0 bytes past the end of an allocation of 100 bytes|out of bounds: 
#include <cuda_fp16.h>
#include <cuda_runtime.h>

__device__ __forceinline__ half2 gate(half2 x, half2 y) {
    const half2 one = __float2half2_rn(1.0f);
    half2 s = one / (one + h2exp(-x));
    s *= x;
    return s * y + __half2half2(__float2half(0.5f));
}

__global__ void gated(const half2* x, const half2* y, half2* out, int pairs) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
#ifdef BUG
    if (i <= pairs) out[i] = gate(x[i], y[i]);
#else
    if (i < pairs) out[i] = gate(x[i], y[i]);
#endif
}

int main() {
    const int pairs = 25;
    half2 x[pairs], y[pairs], got[pairs];
    for (int i = 0; i < pairs; i++) x[i] = make_half2(half(i * 0.125f - 1.0f), half(0.25f)), y[i] = make_half2(half(2), half(-i));
    half2 *dx, *dy, *dout;
    cudaMalloc(&dx, sizeof x), cudaMalloc(&dy, sizeof y), cudaMalloc(&dout, sizeof got);
    cudaMemcpy(dx, x, sizeof x, cudaMemcpyHostToDevice), cudaMemcpy(dy, y, sizeof y, cudaMemcpyHostToDevice);
    gated<<<1, 32>>>(dx, dy, dout, pairs);
    if (cudaDeviceSynchronize()) return 1;
    cudaMemcpy(got, dout, sizeof got, cudaMemcpyDeviceToHost);
    for (int i = 0; i < pairs; i++) {
        const float a = __low2float(x[i]), g = a / (1 + expf(-a)) * 2 + 0.5f;
        if (!(fabsf(__low2float(got[i]) - g) < 4e-3f)) return 1;
    }
    cudaFree(dx), cudaFree(dy), cudaFree(dout);
}
