// What a program may write as it likes: no header for the runtime, macros with the names of templates, constants of
// headers and null pointers as arguments, kernels behind pointers; and numbers at the edges. With BUG an element too many.
// expect normal: main() returned 1
// expect checked: past the end
#include <cmath>
#define N 16
#define T float
#include <cooperative_groups.h>
namespace cg = cooperative_groups;

inline __forceinline__ __device__ T twice(T x) { return x + x; }
__device__ __noinline__ T once(T x) { return x; }

template <bool WIDE, int BY> __global__ void scale(T* out, const T* bias, T limit) {
    const int t = threadIdx.x;
#ifdef BUG
    out[t + 1]
#else
    out[t]
#endif
        = fminf(limit, twice(once(T(BY))) + (bias ? bias[t] : WIDE));
}
typedef void (*Kernel)(T*, const T*, T);
struct Kernels { Kernel k; };

__global__ void numbers(int* out, double nan) {
    out[0] = __double2int_rn(nan);
    out[1] = __float2ll_rz(float(nan)) == LLONG_MIN;
    out[2] = __float2int_rn(float(nan));
    asm("shr.s32 %0, %1, 40;" : "=r"(out[3]) : "r"(-40));
    asm("{ .reg .pred p; /* of a NaN */ setp.ne.f32 p, %1, %1; selp.s32 %0, 1, 0, p; }" : "=r"(out[4]) : "f"(float(nan)));
    asm("prmt.b32 %0, %1, %2, 0x9810;" : "=r"(out[5]) : "r"(0x80ff), "r"(0));
    auto tile = cg::tiled_partition<8>(cg::tiled_partition<32>(cg::this_thread_block()));
    out[6] = tile.meta_group_size();
    cg::this_grid().sync();
    __barrier_sync(0);
    __barrier_sync_count(1, 32);
    if (out[0] == 5) asm("add.rz.f32 %0, %1, %2;" : "=f"(*(float*)out) : "f"(1.0f), "f"(2.0f));
}

int main() {
    T *out, h[N];
    cudaMalloc(&out, sizeof h);
    scale<(sizeof(T) > 2), 7><<<1, N>>>(out, NULL, INFINITY);
    Kernel kernel = scale<true, 7>, all[] = {kernel};
    Kernels kernels = {kernel};
    (*kernel)<<<1, N>>>(out, 0, INFINITY);
    all[0]<<<1, N>>>(out, nullptr, INFINITY);
    kernels.k<<<1, N>>>(out, NULL, INFINITY);
    T limit = INFINITY;
    const T* none = nullptr;
    void* arguments[] = {&out, &none, &limit};
    if (cudaLaunchKernel(kernel, dim3(1), dim3(N), arguments)) return 1;
    cudaMemcpy(h, out, sizeof h, cudaMemcpyDeviceToHost);
    for (T x : h)
        if (x != 15) return 1;
    int* d, n[7];
    double nan = NAN;
    cudaMalloc(&d, sizeof n);
    void* two[] = {&d, &nan};
    if (cudaLaunchCooperativeKernel(numbers, dim3(1), dim3(32), two)) return 1;
    cudaMemcpy(n, d, sizeof n, cudaMemcpyDeviceToHost);
    if (strcmp(cudaGetErrorName(cudaErrorNotReady), "cudaErrorNotReady")) return 1;
    return !(n[0] == INT_MIN && n[1] == 1 && n[2] == 0 && n[3] == -1 && n[4] == 0 && n[5] == int(0xffff80ff) && n[6] == 4);
}
