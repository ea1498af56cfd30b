// Inline PTX that the emulator does not know is an error where a thread comes there, and only there: with BUG one does.
// expect normal: inline PTX that the emulator does not know: tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32
// expect checked: inline PTX that the emulator does not know: tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32
#include <cuda_runtime.h>

__global__ void scale(float* x, int capability) {
    __shared__ unsigned place;
    if (capability >= 100)
        asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;"
                     :: "r"((unsigned)__cvta_generic_to_shared(&place)), "r"(32) : "memory");
    x[threadIdx.x] *= 2;
}

int main() {
    float x[64];
    for (int i = 0; i < 64; i++) x[i] = float(i);
    float* a;
    cudaMalloc(&a, sizeof x);
    cudaMemcpy(a, x, sizeof x, cudaMemcpyHostToDevice);
#ifdef BUG
    scale<<<1, 64>>>(a, 100);
#else
    scale<<<1, 64>>>(a, 90);
#endif
    if (cudaDeviceSynchronize()) return 1;
    cudaMemcpy(x, a, sizeof x, cudaMemcpyDeviceToHost);
    for (int i = 0; i < 64; i++)
        if (x[i] != float(2 * i)) return 1;
}
