// Greedy suppression of overlapping intervals: a thread for each. With BUG flags are read while others write them.
// expect normal: ok
// expect checked: race: 
#include <cuda_runtime.h>

#define COUNT 64
__global__ void suppress(const float2* intervals, int* kept) {
    __shared__ bool alive[COUNT];
    const int j = threadIdx.x;
    const float2 mine = intervals[j];
    alive[j] = true;
    __syncthreads();
    for (int i = 0; i < COUNT; i++) {
        const float2 other = intervals[i];
        const bool overlaps = fminf(mine.y, other.y) > fmaxf(mine.x, other.x);
        if (alive[i] && j > i && overlaps) alive[j] = false;
#ifndef BUG
        __syncthreads();
#endif
    }
    kept[j] = alive[j];
}

int main() {
    float2 intervals[COUNT];
    int got[COUNT];
    bool expected[COUNT];
    for (int i = 0; i < COUNT; i++) intervals[i] = make_float2(float(i * 29 % 64), float(i * 29 % 64 + 3)), expected[i] = true;
    for (int i = 0; i < COUNT; i++)
        for (int j = i + 1; j < COUNT; j++)
            if (expected[i] && min(intervals[i].y, intervals[j].y) > max(intervals[i].x, intervals[j].x)) expected[j] = false;
    float2* a;
    int* b;
    cudaMalloc(&a, sizeof intervals), cudaMalloc(&b, sizeof got);
    cudaMemcpy(a, intervals, sizeof intervals, cudaMemcpyHostToDevice);
    suppress<<<1, COUNT>>>(a, b);
    if (cudaDeviceSynchronize()) return 1;
    cudaMemcpy(got, b, sizeof got, cudaMemcpyDeviceToHost);
#ifndef BUG
    for (int i = 0; i < COUNT; i++)
        if (got[i] != int(expected[i])) return 1;
#endif
}
