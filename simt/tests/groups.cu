// Dot products with cooperative groups: tiles of a warp, then the tiles' sums in dynamic shared memory. With BUG the
// first warp does not wait for the others' sums.
// expect normal: main() returned 1|ok
// expect checked: of dynamic shared memory|read of shared memory that nobody has written
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_runtime.h>
#include <vector>

namespace cg = cooperative_groups;

extern __shared__ float sums[];

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

int main() {
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
