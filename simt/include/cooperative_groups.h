// Cooperative groups: the grid, the cluster, the block, tiles of a warp, and whoever has come together.
#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

struct thread_block {
    static unsigned thread_rank() { return (simt::view()->thread.z * simt::view()->block_dim.y + simt::view()->thread.y) * simt::view()->block_dim.x + simt::view()->thread.x; }
    static unsigned size() { return simt::view()->block_dim.x * simt::view()->block_dim.y * simt::view()->block_dim.z; }
    static unsigned num_threads() { return size(); }
    static dim3 group_index() { return {simt::view()->block.x, simt::view()->block.y, simt::view()->block.z}; }
    static dim3 thread_index() { return {simt::view()->thread.x, simt::view()->thread.y, simt::view()->thread.z}; }
    static dim3 dim_threads() { return simt::view()->block_dim; }
    static dim3 group_dim() { return simt::view()->block_dim; }
    void sync(SIMT_WHERE) const { __syncthreads(at); }
};
inline thread_block this_thread_block() { return {}; }

// Of all blocks.
struct grid_group {
    static unsigned long long block_rank() { return (simt::view()->block.z * (unsigned long long)simt::view()->grid_dim.y + simt::view()->block.y) * simt::view()->grid_dim.x + simt::view()->block.x; }
    static unsigned long long thread_rank() { return block_rank() * thread_block::size() + thread_block::thread_rank(); }
    static unsigned long long size() { return (unsigned long long)simt::view()->grid_dim.x * simt::view()->grid_dim.y * simt::view()->grid_dim.z * thread_block::size(); }
    void sync(SIMT_WHERE) const { simt::grid_barrier(at); }
    static unsigned long long num_threads() { return size(); }
    static unsigned long long num_blocks() { return size() / thread_block::size(); }
    static dim3 group_dim() { return simt::view()->grid_dim; }
    static dim3 dim_blocks() { return simt::view()->grid_dim; }
    static dim3 block_index() { return thread_block::group_index(); }
    static bool is_valid() { return simt::is_cooperative(); }
};
inline grid_group this_grid() { return {}; }

// Of the blocks of a cluster. A pointer to another block's shared memory is one like others.
struct cluster_group {
    struct arrival_token {};
    static unsigned block_rank() { return simt::cluster_rank(); }
    static unsigned num_blocks() { return simt::cluster_size(); }
    static unsigned thread_rank() { return block_rank() * thread_block::size() + thread_block::thread_rank(); }
    static unsigned size() { return num_blocks() * thread_block::size(); }
    static unsigned num_threads() { return size(); }
    static dim3 dim_blocks() { return simt::cluster_dim(); }
    static dim3 block_index() {
        const dim3 size = dim_blocks();
        return {simt::view()->block.x % size.x, simt::view()->block.y % size.y, simt::view()->block.z % size.z};
    }
    static dim3 dim_threads() {
        const dim3 blocks = dim_blocks(), threads = thread_block::dim_threads();
        return {blocks.x * threads.x, blocks.y * threads.y, blocks.z * threads.z};
    }
    arrival_token barrier_arrive(SIMT_WHERE) const { return simt::cluster_arrive(at), arrival_token(); }
    void barrier_wait(SIMT_WHERE) const { simt::cluster_wait(at); }
    void barrier_wait(arrival_token&&, SIMT_WHERE) const { simt::cluster_wait(at); }
    void sync(SIMT_WHERE) const { simt::cluster_arrive(at), simt::cluster_wait(at); }
    template <class T> T* map_shared_rank(T* p, int rank, SIMT_WHERE) const { return (T*)simt::cluster_pointer((const void*)p, unsigned(rank), at); }
};
inline cluster_group this_cluster() { return {}; }

template <unsigned N, class Parent = void>
struct thread_block_tile {
    static_assert(N >= 1 && N <= 32 && (N & (N - 1)) == 0, "a tile has 1, 2, 4, 8, 16 or 32 threads");
    static unsigned thread_rank() { return thread_block::thread_rank() % N; }
    static unsigned meta_group_rank() {
        if constexpr (std::is_void_v<Parent>) return thread_block::thread_rank() / N;
        else return Parent::thread_rank() / N;
    }
    static unsigned meta_group_size() {
        if constexpr (std::is_void_v<Parent>) return (thread_block::size() + N - 1) / N;
        else return Parent::size() / N;
    }
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
    template <class T> unsigned match_any(T v, SIMT_WHERE) const { return __match_any_sync(mask(), v, at) >> thread_block::thread_rank() % 32 / N * N; }
    template <class T> unsigned match_all(T v, int& all, SIMT_WHERE) const { return __match_all_sync(mask(), v, &all, at) >> thread_block::thread_rank() % 32 / N * N; }
    unsigned ballot(int predicate, SIMT_WHERE) const { return __ballot_sync(mask(), predicate, at) >> thread_block::thread_rank() % 32 / N * N; }
};
template <unsigned N, class Group> thread_block_tile<N> tiled_partition(const Group&) { return {}; }
template <unsigned N, unsigned M, class P> thread_block_tile<N, thread_block_tile<M>> tiled_partition(const thread_block_tile<M, P>&) { return {}; }

// The lanes of a warp that came to one coalesced_threads() before the others of the warp wait or leave.
struct coalesced_group {
    uint32_t lanes;
    unsigned part = 0, parts = 1;  // of the group that it is a part of
    unsigned meta_group_rank() const { return part; }
    unsigned meta_group_size() const { return parts; }
    uint32_t mask() const { return lanes; }
    unsigned thread_rank() const { return unsigned(__popc(lanes & ((1u << simt::lane()) - 1))); }
    unsigned size() const { return unsigned(__popc(lanes)); }
    unsigned num_threads() const { return size(); }
    void sync(SIMT_WHERE) const { __syncwarp(lanes, at); }
    template <class T> T shfl(T v, int rank, SIMT_WHERE) const { return __shfl_sync(lanes, v, int(__fns(lanes, 0, rank % int(size()) + 1)), 32, at); }
    template <class T> T shfl_down(T v, unsigned by, SIMT_WHERE) const { return shfl(v, int(thread_rank() + by < size() ? thread_rank() + by : thread_rank()), at); }
    template <class T> T shfl_up(T v, unsigned by, SIMT_WHERE) const { return shfl(v, int(thread_rank() < by ? thread_rank() : thread_rank() - by), at); }
    int any(int predicate, SIMT_WHERE) const { return __any_sync(lanes, predicate, at); }
    int all(int predicate, SIMT_WHERE) const { return __all_sync(lanes, predicate, at); }
    unsigned ballot(int predicate, SIMT_WHERE) const { return by_rank(__ballot_sync(lanes, predicate, at)); }
    template <class T> unsigned match_any(T v, SIMT_WHERE) const { return by_rank(__match_any_sync(lanes, v, at)); }
    template <class T> unsigned match_all(T v, int& all, SIMT_WHERE) const { return by_rank(__match_all_sync(lanes, v, &all, at)); }

private:
    unsigned by_rank(uint32_t votes) const {
        unsigned ranks = 0;
        for (unsigned i = 0; i < size(); i++) ranks |= (votes >> __fns(lanes, 0, int(i) + 1) & 1) << i;
        return ranks;
    }
};
inline coalesced_group coalesced_threads(SIMT_WHERE) { return {simt::converged(at)}; }

// Any of these: the block, or lanes of a warp.
struct thread_group {
    uint32_t lanes;  // 0: the block
    thread_group(const thread_block&) : lanes(0) {}
    thread_group(const coalesced_group& g) : lanes(g.lanes) {}
    template <unsigned N, class P> thread_group(const thread_block_tile<N, P>& g) : lanes(g.mask()) {}
    unsigned thread_rank() const { return lanes ? coalesced_group{lanes}.thread_rank() : thread_block::thread_rank(); }
    unsigned size() const { return lanes ? coalesced_group{lanes}.size() : thread_block::size(); }
    unsigned num_threads() const { return size(); }
    static bool is_valid() { return true; }
    void sync(SIMT_WHERE) const {
        if (lanes) __syncwarp(lanes, at);
        else __syncthreads(at);
    }
};
// Of `n` threads, which the running program chooses, by their ranks in the group.
inline coalesced_group tiled_partition(const coalesced_group& g, unsigned n, SIMT_WHERE) {
    if (n < 1 || n > 32 || (n & (n - 1))) simt::trap("tiled_partition: a tile has 1, 2, 4, 8, 16 or 32 threads", at);
    coalesced_group tile = {0, g.thread_rank() / n, (g.size() + n - 1) / n};
    for (unsigned i = 0, rank = 0; i < 32; i++)
        if (g.lanes >> i & 1 && rank++ / n == tile.part) tile.lanes |= 1u << i;
    return tile;
}
// Of a block, the lanes of the warp that it has.
inline thread_group tiled_partition(const thread_group& g, unsigned n, SIMT_WHERE) {
    const unsigned here = thread_block::size() - thread_block::thread_rank() / 32 * 32;
    return tiled_partition(coalesced_group{g.lanes ? g.lanes : here < 32 ? (1u << here) - 1 : ~0u}, n, at);
}
inline thread_group tiled_partition(const thread_block& g, unsigned n, SIMT_WHERE) { return tiled_partition(thread_group(g), n, at); }
// Those that have the same.
template <class Group> coalesced_group binary_partition(const Group& g, bool predicate, SIMT_WHERE) {
    const uint32_t yes = __ballot_sync(g.mask(), predicate, at);
    return {predicate ? yes : g.mask() & ~yes};
}
template <class Group, class T> coalesced_group labeled_partition(const Group& g, T label, SIMT_WHERE) { return {__match_any_sync(g.mask(), label, at)}; }

template <class Group> unsigned thread_rank(const Group& g) { return unsigned(g.thread_rank()); }
template <class Group> unsigned group_size(const Group& g) { return unsigned(g.size()); }

// Copies by cp.async where they may be; wait() is for all of them.
template <class Group>
void memcpy_async(const Group& g, void* to, const void* from, size_t bytes, SIMT_WHERE) {
    const size_t all = uintptr_t(to) | uintptr_t(from) | bytes, unit = all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1;
    const bool shared = simt::space_of(to) == simt::Space::shared;
    for (size_t i = g.thread_rank() * unit; i < bytes; i += g.size() * unit) {
        unsigned char* at_to = static_cast<unsigned char*>(to) + i;
        const unsigned char* at_from = static_cast<const unsigned char*>(from) + i;
        if (shared && unit > 1) simt::cp_async(at_to, at_from, int(unit), int(unit), at);
        else memcpy(at_to, at_from, unit);
    }
    simt::cp_async_commit();
}
template <unsigned N, class Group> void wait_prior(const Group& g, SIMT_WHERE) {
    simt::cp_async_wait(int(N));
    g.sync(at);
}
template <class Group> void wait(const Group& g, SIMT_WHERE) { wait_prior<0>(g, at); }

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
template <class T, class F>
T reduce(const coalesced_group& g, T v, F f, SIMT_WHERE) {
    T sum = g.shfl(v, 0, at);
    for (unsigned i = 1; i < g.size(); i++) sum = f(sum, g.shfl(v, int(i), at));
    return sum;
}
template <class Group, class T, class F = plus<T>>
T inclusive_scan(const Group& g, T v, F f = {}, SIMT_WHERE) {
    for (unsigned i = 1; i < g.size(); i *= 2) {
        const T before = g.shfl_up(v, i, at);
        if (g.thread_rank() >= i) v = f(before, v);
    }
    return v;
}
// The first thread has T().
template <class Group, class T, class F = plus<T>>
T exclusive_scan(const Group& g, T v, F f = {}, SIMT_WHERE) {
    const T before = g.shfl_up(inclusive_scan(g, v, f, at), 1, at);
    return g.thread_rank() == 0 ? T() : before;
}

}  // namespace cooperative_groups
