// Dot products with cooperative groups: tiles of a warp, then the tiles' sums in dynamic shared memory. With BUG the
// first warp does not wait for the others' sums.
// expect normal: main() returned 1|ok
// expect checked: of dynamic shared memory|read of shared memory that nobody has written
#include <cooperative_groups.h>
#include <cooperative_groups/memcpy_async.h>
#include <cooperative_groups/reduce.h>
#include <cuda_runtime.h>
#include <vector>

namespace cg = cooperative_groups;

extern __shared__ alignas(16) float sums[];

__global__ void dot(const float* __restrict__ a, const float* __restrict__ b, float* out, int n) {
    cg::thread_block block = cg::this_thread_block();
    cg::thread_block_tile<32> warp = cg::tiled_partition<32>(block);
    float sum = 0;
    for (int i = block.group_index().x * block.size() + block.thread_rank(); i < n; i += gridDim.x * block.size()) sum += a[i] * b[i];
    sum = cg::reduce(warp, sum, cg::plus<float>());
    if (warp.thread_rank() == 0) sums[warp.meta_group_rank()] = sum;
#ifndef BUG
    cg::sync(block);
#endif
    if (warp.meta_group_rank() == 0) {
        sum = warp.thread_rank() < warp.meta_group_size() ? sums[warp.thread_rank()] : 0.0f;
        sum = cg::reduce(warp, sum, cg::plus<float>());
        if (warp.thread_rank() == 0) atomicAdd(out, sum);
    }
}

// A function of any group.
__device__ int sum_of_ranks(const cg::thread_group& g, int* values) {
    values[threadIdx.x] = int(g.thread_rank());
    g.sync();
    int sum = 0;
    const int first = int(threadIdx.x - g.thread_rank());
    for (unsigned i = 0; i < g.size(); i++) sum += values[first + int(i)];
    g.sync();
    return sum;
}

__global__ void partitions(const int* in, int* wrong, int tile_size) {
    __shared__ int values[64], copied[64];
    auto expect = [=](bool right, int which) { if (!right) atomicMax(wrong, which); };
    const cg::thread_block block = cg::this_thread_block();
    const int t = int(block.thread_rank());
    const cg::thread_group tile = cg::tiled_partition(block, tile_size), half = cg::tiled_partition(tile, tile_size / 2);
    expect(sum_of_ranks(block, values) == 63 * 32, 1);
    block.sync();
    expect(tile.size() == 8 && int(tile.thread_rank()) == t % 8 && sum_of_ranks(tile, values) == 28 && half.size() == 4 && sum_of_ranks(half, values) == 6, 2);
    const auto warp = cg::tiled_partition<32>(block);
    const auto odd = cg::binary_partition(warp, t % 2), same = cg::labeled_partition(warp, t % 4);
    expect(odd.size() == 16 && cg::thread_rank(odd) == unsigned(t % 32 / 2) && cg::reduce(same, 1, cg::plus<int>()) == 8, 3);
    if (t % 2) {
        const auto quarter = cg::tiled_partition(cg::coalesced_threads(), 4);
        expect(quarter.size() == 4 && int(quarter.meta_group_rank()) == t % 32 / 8 && quarter.meta_group_size() == 4 && quarter.shfl(t, 0) == t / 8 * 8 + 1, 4);
    }
    cg::memcpy_async(block, copied, in, sizeof copied);
    cg::wait(block);
    expect(copied[63 - t] == 63 - t, 5);
    const auto grid = cg::this_grid();
    expect(grid.num_blocks() == 1 && grid.num_threads() == 64, 6);
    grid.sync();
}

// The last tile has 16 threads.
__global__ void short_tile(int* wrong) {
    __shared__ int values[48];
    const cg::thread_group tile = cg::tiled_partition(cg::this_thread_block(), 32);
    const bool last = threadIdx.x >= 32;
    if (tile.size() != (last ? 16 : 32) || tile.thread_rank() != threadIdx.x % 32 || sum_of_ranks(tile, values) != (last ? 120 : 496)) *wrong = 7;
}

int main() {
    int numbers[64], *in, *wrong, which = 0;
    for (int i = 0; i < 64; i++) numbers[i] = i;
    cudaMalloc(&in, sizeof numbers), cudaMalloc(&wrong, 4);
    cudaMemcpy(in, numbers, sizeof numbers, cudaMemcpyHostToDevice), cudaMemset(wrong, 0, 4);
    int tile = 8;
    void* arguments[] = {&in, &wrong, &tile};
    cudaLaunchCooperativeKernel((void*)partitions, 1, 64, arguments, 0, 0);
    short_tile<<<1, 48>>>(wrong);
    cudaMemcpy(&which, wrong, 4, cudaMemcpyDeviceToHost);
    if (which) return printf("check %d failed\n", which), 1;

    const int n = 1000;
    std::vector<float> a(n), b(n, 2.0f);
    float expected = 0, got = 0;
    for (int i = 0; i < n; i++) a[i] = float(i % 7), expected += 2 * a[i];
    float *da, *db, *dout;
    cudaMalloc(&da, 4 * n), cudaMalloc(&db, 4 * n), cudaMalloc(&dout, 4);
    cudaMemcpy(da, a.data(), 4 * n, cudaMemcpyHostToDevice), cudaMemcpy(db, b.data(), 4 * n, cudaMemcpyHostToDevice);
    cudaMemset(dout, 0, 4);
    dot<<<dim3(3), dim3(128), 4 * sizeof(float)>>>(da, db, dout, n);
    if (cudaGetLastError() != cudaSuccess) return 1;
    cudaMemcpy(&got, dout, 4, cudaMemcpyDeviceToHost);
    return got != expected;
}
