// Sums over the blocks of a cluster through each other's shared memory. With BUG a block reads before the others have written. Then a
// histogram by atomics of other blocks, and what is wrong, by argument.
// expect normal: main() returned 1|ok
// expect checked: read of shared memory that nobody has written|race between blocks of a cluster: read
#include <cooperative_groups.h>
#include <cstdlib>
#include <cuda_runtime.h>
#include <vector>

namespace cg = cooperative_groups;

// Block r of a cluster adds elements r * part.. of all blocks' sums; several rounds in the same shared memory.
template <int WRONG>
__global__ void add(const float* in, float* out, int rounds) {
    extern __shared__ float sums[];
    __shared__ float scale;
    cg::cluster_group cluster = cg::this_cluster();
    const int rank = int(cluster.block_rank()), blocks = int(cluster.num_blocks()), n = int(blockDim.x), part = n / blocks, t = int(threadIdx.x);
    const bool leaves = WRONG == 3 && rank == 1;
    for (int round = 0; round < rounds; round++) {
        sums[t] = in[(round * gridDim.x + blockIdx.x) * n + t];
        if (t == 0) scale = float(rank + 1);
#ifndef BUG
        cluster.sync();
#endif
        if (t < part) {
            float sum = 0;
            for (int other = 0; other < blocks + (WRONG == 2); other++)
                sum += *cluster.map_shared_rank(&scale, other) * cluster.map_shared_rank(sums, other)[rank * part + t];
            out[round * gridDim.x / blocks * n + blockIdx.x / blocks * n + rank * part + t] = sum;
        }
        if (round + 1 == rounds && leaves) return;
        if (WRONG == 1) __syncthreads();
        if (WRONG == 1) continue;
        if (WRONG == 9 && rank == 2 && t >= 32) __syncthreads();
        // Who has read lets the others write; until they may it could do something else.
        auto token = cluster.barrier_arrive();
        if (WRONG == 4 && rank == 0 && t == 7) sums[(blocks - 1) * part] = 0;
        if (WRONG == 5 && t == 7) cluster.barrier_arrive();
        cluster.barrier_wait(std::move(token));
        if (WRONG == 6 && t == 7) cluster.barrier_wait();
    }
}

// Bins are dealt out over the blocks; global memory between the blocks of a cluster is ordered by its barrier too.
__global__ void histogram(const int* in, int n, int* out, int* seen) {
    __shared__ int bins[32];
    cg::cluster_group cluster = cg::this_cluster();
    const unsigned blocks = cluster.num_blocks(), next = (cluster.block_rank() + 1) % blocks;
    if (threadIdx.x < 32) bins[threadIdx.x] = 0;
    if (threadIdx.x == 0) seen[cluster.block_rank()] = int(cluster.block_rank());
    cluster.sync();
    for (int i = int(cluster.thread_rank()); i < n; i += int(cluster.num_threads()))
        atomicAdd(cluster.map_shared_rank(bins, in[i] / 32) + in[i] % 32, 1);
    cluster.sync();
    if (threadIdx.x < 32) out[cluster.block_rank() * 32 + threadIdx.x] = bins[threadIdx.x];
    if (threadIdx.x == 0 && seen[next] != int(next)) out[0] = -1;
    cluster.sync();
    // Threads that have left are not awaited.
    if (threadIdx.x >= 40) return;
    if (threadIdx.x == 3) *cluster.map_shared_rank(&bins[5], int(next)) = 77 + int(next);
    cluster.sync();
    if (bins[5] != 77 + int(cluster.block_rank())) out[0] = -2;
}

// With a cluster of its own.
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(64)
    swap(int* values) {
    __shared__ int value;
    cg::cluster_group cluster = cg::this_cluster();
    if (threadIdx.x == 0) value = values[blockIdx.x];
    cluster.sync();
    if (threadIdx.x == 0) values[blockIdx.x] = *cluster.map_shared_rank(&value, cluster.block_rank() ^ 1) + int(cluster.dim_blocks().x);
    cluster.sync();
}

template <class... P, class... A>
cudaError_t launch(dim3 cluster, dim3 grid, int threads, size_t shared, void (*kernel)(P...), A... arguments) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster.x, attribute.val.clusterDim.y = cluster.y, attribute.val.clusterDim.z = cluster.z;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.attrs = &attribute, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

int main(int argc, char** argv) {
    const int wrong = argc > 1 ? atoi(argv[1]) : 0, blocks = 12, size = 4, n = 64, rounds = 3;
    std::vector<float> in(rounds * blocks * n), expected(rounds * blocks / size * n), got(expected.size());
    for (size_t i = 0; i < in.size(); i++) in[i] = float(i * 7919 % 101);
    for (int r = 0; r < rounds; r++)
        for (int b = 0; b < blocks; b++)
            for (int i = 0; i < n; i++) expected[(r * blocks / size + b / size) * n + i] += float(b % size + 1) * in[(r * blocks + b) * n + i];
    float *a, *b;
    cudaMalloc(&a, in.size() * 4), cudaMalloc(&b, got.size() * 4);
    cudaMemcpy(a, in.data(), in.size() * 4, cudaMemcpyHostToDevice);
    const dim3 grid(blocks), cluster(size);
    const auto run = [&](auto kernel) { launch(cluster, grid, n, n * 4, kernel, (const float*)a, b, rounds); };
    if (wrong == 1) run(add<1>);
    else if (wrong == 2) run(add<2>);
    else if (wrong == 3) run(add<3>);
    else if (wrong == 4) run(add<4>);
    else if (wrong == 5) run(add<5>);
    else if (wrong == 6) run(add<6>);
    else if (wrong == 7) return launch(5, grid, n, n * 4, add<0>, (const float*)a, b, rounds) != cudaErrorInvalidClusterSize;
    else if (wrong == 8) return launch(dim3(2, 2, 4), dim3(4, 4, 4), n, n * 4, add<0>, (const float*)a, b, rounds) != cudaErrorInvalidClusterSize;
    else if (wrong == 9) run(add<9>);
    else run(add<0>);
    if (cudaMemcpy(got.data(), b, got.size() * 4, cudaMemcpyDeviceToHost) || got != expected) return 1;

    const int values = 1000;
    std::vector<int> list(values), counts(128), right(128);
    for (int i = 0; i < values; i++) list[i] = i * i % 127, right[list[i]]++;
    int *numbers, *bins, *seen;
    cudaMalloc(&numbers, values * 4), cudaMalloc(&bins, 128 * 4), cudaMalloc(&seen, 4 * 4);
    cudaMemcpy(numbers, list.data(), values * 4, cudaMemcpyHostToDevice);
    // Of any shape; and a block by itself is a cluster too.
    if (launch(dim3(1, 2, 2), dim3(1, 2, 2), 70, 0, histogram, (const int*)numbers, values, bins, seen)) return 2;
    cudaMemcpy(counts.data(), bins, 128 * 4, cudaMemcpyDeviceToHost);
    if (counts != right) return 3;
    for (int& x : list) x %= 32;
    cudaMemcpy(numbers, list.data(), values * 4, cudaMemcpyHostToDevice);
    histogram<<<1, 100>>>(numbers, values, bins, seen);
    cudaMemcpy(counts.data(), bins, 32 * 4, cudaMemcpyDeviceToHost);
    for (int i = 0; i < 32; i++)
        if (counts[i] != right[i] + right[i + 32] + right[i + 64] + right[i + 96]) return 4;
    swap<<<4, 64>>>(bins);
    cudaMemcpy(right.data(), bins, 16, cudaMemcpyDeviceToHost);
    for (int i = 0; i < 4; i++)
        if (right[i] != counts[i ^ 1] + 2) return 5;
    return cudaDeviceSynchronize() != cudaSuccess;
}
