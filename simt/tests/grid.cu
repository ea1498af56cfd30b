// Heat in a rod, all steps in one cooperative launch: blocks wait for each other between steps. With BUG they do not wait
// before they read what their neighbours have written. Then blocks that wait in a loop, and what is wrong, by argument.
// expect normal: main() returned 1
// expect checked: race between blocks
#include <cooperative_groups.h>
#include <cstdlib>
#include <cuda_runtime.h>
#include <utility>
#include <vector>

namespace cg = cooperative_groups;

struct Rod {
    const float* start;
    float* heat[2];
    int n, steps;
};

__global__ void diffuse(Rod rod, float scale, float* total) {
    cg::grid_group grid = cg::this_grid();
    const int i = int(grid.thread_rank());
    if (i == 0) *total = 0;
    if (i < rod.n) rod.heat[0][i] = rod.start[i];
    for (int step = 0; step < rod.steps; step++) {
#ifndef BUG
        grid.sync();
#endif
        const float *from = rod.heat[step % 2];
        if (i < rod.n) {
            const float left = i > 0 ? from[i - 1] : 0, right = i + 1 < rod.n ? from[i + 1] : 0;
            rod.heat[1 - step % 2][i] = scale * (left + 2 * from[i] + right);
        }
    }
    cg::sync(grid);
    const float last = i < rod.n ? rod.heat[rod.steps % 2][i] : 0;
    atomicAdd(total, last);
}

template <int LEAVES>
__global__ void leaves(int* out) {
    if (LEAVES == 1 ? blockIdx.x == 1 : LEAVES == 2 ? threadIdx.x == 0 : threadIdx.x > 40) return;
    out[blockIdx.x] = 1;
    cg::this_grid().sync();
}

// A block after the other, by a flag; and all by a count, as before there were cooperative launches.
__global__ void relay(volatile int* turn, int* count, int* order) {
    if (threadIdx.x == 0) {
        while (*turn != int(gridDim.x - 1 - blockIdx.x)) __nanosleep(20);
        __threadfence();
        order[blockIdx.x] = *turn;
        __threadfence();
        atomicAdd((int*)turn, 1);
        atomicAdd(count, 1);
        while (atomicAdd(count, 0) < int(gridDim.x)) {}
    }
    __syncthreads();
}

// A barrier of flags that asks for nothing but their values: block 1 waits for all, and all for block 1.
__global__ void by_hand(volatile int* here, volatile int* go, int* values, bool fences) {
    const int block = int(blockIdx.x), t = int(threadIdx.x), blocks = int(gridDim.x);
    values[block] = block * 3;
    __syncthreads();
    if (fences) __threadfence();
    if (t == 0) here[block] = 1;
    if (block == 1) {
        if (t < blocks)
            while (here[t] == 0) {}
        __syncthreads();
        if (fences) __threadfence();
        if (t < blocks) go[t] = 1;
    }
    if (t == 0)
        while (go[block] == 0) {}
    __syncthreads();
    if (t == 0) values[blocks + block] = values[(block + 1) % blocks];
}

int main(int argc, char** argv) {
    const int n = 1000, steps = 7, wrong = argc > 1 ? atoi(argv[1]) : 0;
    std::vector<float> heat(n), next(n), got(n);
    for (int i = 0; i < n; i++) heat[i] = float(i * 7919 % 101);
    float *start, *a, *b, *total, scale = 0.25f, sum = 0, sum_got;
    cudaMalloc(&start, n * 4), cudaMalloc(&a, n * 4), cudaMalloc(&b, n * 4), cudaMalloc(&total, 4);
    cudaMemcpy(start, heat.data(), n * 4, cudaMemcpyHostToDevice);
    Rod rod = {start, {a, b}, n, steps};
    void* arguments[] = {&rod, &scale, &total};
    const int blocks = (n + 63) / 64;
    if (wrong == 1) diffuse<<<blocks, 64>>>({start, {a, b}, n, steps}, scale, total);
    else if (wrong == 2) return cudaLaunchCooperativeKernel((void*)diffuse, 65, 64, arguments, 0, 0) != cudaErrorCooperativeLaunchTooLarge;
    else if (cudaLaunchCooperativeKernel((void*)diffuse, dim3(blocks), dim3(64), arguments, 0, 0)) return 2;
    for (int step = 0; step < steps; step++) {
        for (int i = 0; i < n; i++) next[i] = scale * ((i > 0 ? heat[i - 1] : 0) + 2 * heat[i] + (i + 1 < n ? heat[i + 1] : 0));
        std::swap(heat, next);
    }
    for (float h : heat) sum += h;
    cudaMemcpy(got.data(), steps % 2 ? b : a, n * 4, cudaMemcpyDeviceToHost);
    cudaMemcpy(&sum_got, total, 4, cudaMemcpyDeviceToHost);
    if (got != heat || fabs(sum_got - sum) > 1e-3f * sum) return 1;

    int *turn, *order, on_host[9];
    cudaMalloc(&turn, 8), cudaMalloc(&order, sizeof on_host);
    cudaMemset(turn, 0, 8);
    relay<<<9, 64>>>(turn, turn + 1, order);
    cudaMemcpy(on_host, order, sizeof on_host, cudaMemcpyDeviceToHost);
    for (int i = 0; i < 9; i++)
        if (on_host[i] != 8 - i) return 3;

    if (wrong >= 5) {
        int *flags, *values, on_host[10];
        cudaMalloc(&flags, 40), cudaMemset(flags, 0, 40), cudaMalloc(&values, 40);
        by_hand<<<5, 40>>>(flags, flags + 5, values, wrong == 5);
        if (cudaMemcpy(on_host, values, 40, cudaMemcpyDeviceToHost)) return 4;
        for (int i = 0; i < 5; i++)
            if (on_host[5 + i] != (i + 1) % 5 * 3) return 5;
    }

    void* out[] = {&order};
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeCooperative, attribute.val.cooperative = 1;
    config.gridDim = 3, config.blockDim = 64, config.attrs = &attribute, config.numAttrs = 1;
    if (wrong == 3) cudaLaunchCooperativeKernel((void*)leaves<1>, 3, 64, out, 0, 0);
    if (wrong == 4) cudaLaunchKernelExC(&config, (void*)leaves<2>, out);
    if (wrong == 0) cudaLaunchKernelEx(&config, leaves<3>, order);
    return cudaDeviceSynchronize() != cudaSuccess;
}
