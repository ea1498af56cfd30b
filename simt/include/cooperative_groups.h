// Cooperative groups: the block, tiles of a warp, and whoever has come together.
#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

struct thread_block {
    static unsigned thread_rank() { return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; }
    static unsigned size() { return blockDim.x * blockDim.y * blockDim.z; }
    static unsigned num_threads() { return size(); }
    static dim3 group_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
    static dim3 thread_index() { return {threadIdx.x, threadIdx.y, threadIdx.z}; }
    static dim3 dim_threads() { return blockDim; }
    static dim3 group_dim() { return blockDim; }
    void sync(SIMT_WHERE) const { __syncthreads(at); }
};
inline thread_block this_thread_block() { return {}; }

// Of all blocks; only its indices, since blocks that wait for each other need a cooperative launch.
struct grid_group {
    static unsigned long long block_rank() { return (blockIdx.z * (unsigned long long)gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x; }
    static unsigned long long thread_rank() { return block_rank() * thread_block::size() + thread_block::thread_rank(); }
    static unsigned long long size() { return (unsigned long long)gridDim.x * gridDim.y * gridDim.z * thread_block::size(); }
    void sync(SIMT_WHERE) const { simt::trap("grid.sync(): the emulator runs blocks one after the other", at); }
};
inline grid_group this_grid() { return {}; }

template <unsigned N, class Parent = void>
struct thread_block_tile {
    static_assert(N >= 1 && N <= 32 && (N & (N - 1)) == 0, "a tile has 1, 2, 4, 8, 16 or 32 threads");
    static unsigned thread_rank() { return thread_block::thread_rank() % N; }
    static unsigned meta_group_rank() { return thread_block::thread_rank() / N; }
    static unsigned meta_group_size() { return (thread_block::size() + N - 1) / N; }
    static constexpr unsigned size() { return N; }
    static constexpr unsigned num_threads() { return N; }
    static uint32_t mask() { return (N == 32 ? ~0u : (1u << N % 32) - 1) << thread_block::thread_rank() % 32 / N * N; }
    void sync(SIMT_WHERE) const { __syncwarp(mask(), at); }
    template <class T> T shfl(T v, int i, SIMT_WHERE) const { return __shfl_sync(mask(), v, i, N, at); }
    template <class T> T shfl_xor(T v, unsigned i, SIMT_WHERE) const { return __shfl_xor_sync(mask(), v, int(i), N, at); }
    template <class T> T shfl_down(T v, unsigned i, SIMT_WHERE) const { return __shfl_down_sync(mask(), v, i, N, at); }
    template <class T> T shfl_up(T v, unsigned i, SIMT_WHERE) const { return __shfl_up_sync(mask(), v, i, N, at); }
    int any(int predicate, SIMT_WHERE) const { return __any_sync(mask(), predicate, at); }
    int all(int predicate, SIMT_WHERE) const { return __all_sync(mask(), predicate, at); }
    unsigned ballot(int predicate, SIMT_WHERE) const { return __ballot_sync(mask(), predicate, at) >> thread_block::thread_rank() % 32 / N * N; }
};
template <unsigned N, class Group> thread_block_tile<N> tiled_partition(const Group&) { return {}; }

// Alone is a legal answer.
struct coalesced_group {
    static unsigned thread_rank() { return 0; }
    static unsigned size() { return 1; }
    static unsigned num_threads() { return 1; }
    void sync() const {}
    template <class T> T shfl(T v, int) const { return v; }
    template <class T> T shfl_down(T v, unsigned) const { return v; }
    int any(int predicate) const { return predicate != 0; }
    int all(int predicate) const { return predicate != 0; }
    unsigned ballot(int predicate) const { return predicate != 0; }
};
inline coalesced_group coalesced_threads() { return {}; }

template <class Group> void sync(const Group& g, SIMT_WHERE) { g.sync(at); }

template <class T = void> struct plus { T operator()(T a, T b) const { return a + b; } };
template <class T = void> struct less { T operator()(T a, T b) const { return b < a ? b : a; } };
template <class T = void> struct greater { T operator()(T a, T b) const { return a < b ? b : a; } };
template <class T = void> struct bit_and { T operator()(T a, T b) const { return a & b; } };
template <class T = void> struct bit_or { T operator()(T a, T b) const { return a | b; } };
template <class T = void> struct bit_xor { T operator()(T a, T b) const { return a ^ b; } };

template <unsigned N, class P, class T, class F>
T reduce(const thread_block_tile<N, P>& g, T v, F f, SIMT_WHERE) {
    for (unsigned i = N / 2; i; i /= 2) v = f(v, g.shfl_xor(v, i, at));
    return v;
}
template <class T, class F> T reduce(const coalesced_group&, T v, F) { return v; }
template <unsigned N, class P, class T, class F>
T inclusive_scan(const thread_block_tile<N, P>& g, T v, F f, SIMT_WHERE) {
    for (unsigned i = 1; i < N; i *= 2) {
        const T before = g.shfl_up(v, i, at);
        if (g.thread_rank() >= i) v = f(before, v);
    }
    return v;
}

}  // namespace cooperative_groups
