// What is ordered without barriers: locks of atomics and fences, loops of atomicCAS, a look before an atomicMax; and what is
// no race: equal stores, padding. With BUG the lock between blocks is given back without a fence. An argument plants others.
// expect normal: ok
// expect checked: race between blocks: read
#include <cuda_runtime.h>
#include <cstring>
#include <vector>

struct Wide { double d; int i; };

__device__ double add_by_cas(double* address, double value) {
    unsigned long long *p = (unsigned long long*)address, old = *p, expected;
    do {
        expected = old;
        old = atomicCAS(p, expected, __double_as_longlong(value + __longlong_as_double(expected)));
    } while (expected != old);
    return __longlong_as_double(old);
}

__global__ void sums(int* lock, float* sum, double* cas, int* best, int* changed, int bug) {
    __shared__ int inner, count, any;
    const int t = threadIdx.x;
    if (t == 0) inner = count = any = 0;
    __syncthreads();
    if (t % 32 == 0) {
        while (atomicCAS(&inner, 0, 1) != 0) {}
        if (bug != 1) __threadfence_block();
        count += 1;
        if (bug != 1) __threadfence_block();
        atomicExch(&inner, 0);
    }
    any = bug == 2 ? t : 7;
    add_by_cas(cas, 0.5);
    if (t > *(volatile int*)best) atomicMax(best, t);
    *changed = bug == 3 ? int(blockIdx.x) : 1;
    if (bug == 4) sum[1] = float(*best);
    __syncthreads();
    if (t == 0) {
        while (atomicCAS(lock, 0, 1) != 0) {}
        __threadfence();
        *sum += count + any;
#ifndef BUG
        __threadfence();
#endif
        atomicExch(lock, 0);
    }
}

__global__ void copies(const int* in, int* out, int n, int bug) {
    __shared__ Wide a[32], b[32];
    __shared__ int bytes[64];
    const int t = threadIdx.x;
    Wide x;
    x.d = t, x.i = 7;
    a[t] = x;
    if (t == 0) memcpy(bytes, in, size_t(n) * 4 + (bug == 5 ? 4 : 0));
    __syncthreads();
    b[t] = a[31 - t];
    int* own = (int*)malloc(n);
    own[n / 4 - (bug == 6 ? 0 : 1)] = bytes[2 * t];
    out[t] = b[t].i + own[n / 4 - 1];
    free(own);
}

// Threads that wait for another warp's flag; and a value that no lane has given, which is not used.
__global__ void flags(volatile int* flag, int* out) {
    if (threadIdx.x == 32) *flag = 1;
    if (threadIdx.x == 0)
        while (*flag == 0) __nanosleep(10);
    __syncthreads();
    int sum = 1;
    if (threadIdx.x < 20)
        for (int i = 1, mask = 0xfffff; i < 32; i *= 2) {
            const int other = __shfl_down_sync(mask, sum, i);
            if (threadIdx.x + i < 20) sum += other;
        }
    if (threadIdx.x == 0) *out = sum;
}

#define EITHER(condition) if (condition) __syncthreads(); else __syncthreads()
__global__ void divergent() { EITHER(threadIdx.x < 32); }

// The host's memory, where the C library may take it from addresses that the device's just had.
static bool after_a_free() {
    for (const size_t n : {size_t(8) << 20, size_t(24) << 20}) {
        float *e, *d;
        cudaMalloc(&e, n), cudaMalloc(&d, n);
        cudaFree(d);
        std::vector<float> h(n / 4);
        if (cudaMemcpy(e, h.data(), n, cudaMemcpyHostToDevice) || cudaMemcpy(h.data(), e, n, cudaMemcpyDeviceToHost) || cudaFree(e)) return false;
    }
    return true;
}
// More than the emulator remembers.
static bool after_many_frees() {
    for (int i = 0; i < 20000; i++) {
        int* p;
        if (cudaMalloc(&p, 4) || cudaFree(p)) return false;
    }
    std::vector<std::vector<int>> h(200, std::vector<int>(100000));  // each with a mapping of its own
    int* p;
    cudaMalloc(&p, 400000);
    for (auto& one : h)
        if (cudaMemcpy(p, one.data(), 400000, cudaMemcpyHostToDevice)) return false;
    return true;
}

int main(int argc, char** argv) {
    const int bug = argc > 1 ? atoi(argv[1]) : 0;
    if (bug == 9) return !after_many_frees();
    if (!bug && !after_a_free()) return 1;
    int *words, *pinned, w[40] = {};
    double* cas;
    float *sum, s = 0;
    cudaMalloc(&words, sizeof w), cudaMalloc(&cas, 8), cudaMalloc(&sum, 8), cudaMallocHost(&pinned, 256 + 4);
    cudaMemset(words, 0, sizeof w), cudaMemset(cas, 0, 8), cudaMemset(sum, 0, 8);
    for (int i = 0; i < 65; i++) pinned[i] = i;
    sums<<<8, 96>>>(words, sum, cas, words + 1, words + 2, bug);
    if (cudaDeviceSynchronize()) return 0;
    cudaMemcpy(&s, sum, 4, cudaMemcpyDeviceToHost);
    if (s != 80) return 1;
    copies<<<1, 32>>>(pinned, words + 4, 64, bug);
    if (cudaDeviceSynchronize()) return 0;
    flags<<<1, 64>>>(words + 3, words + 1);
    cudaMemcpy(w, words, sizeof w, cudaMemcpyDeviceToHost);
    for (int i = 0; i < 32; i++)
        if (w[4 + i] != 7 + 2 * i) return 1;
    if (w[1] != 20 || w[2] != 1) return 1;
    if (bug == 7) divergent<<<1, 64>>>();
    if (bug == 8) cudaFree(sum), cudaMemcpy(&s, sum, 4, cudaMemcpyDeviceToHost);
    return 0;
}
