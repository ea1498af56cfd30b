// Lanes that find each other: matches, groups of those who came to a branch, scans, wide atomics. With BUG a scan is of a whole
// tile where half of it has gone elsewhere.
// expect normal: mixed collectives: shuffle
// expect checked: mixed collectives: shuffle
#include <cooperative_groups.h>
#include <cooperative_groups/scan.h>
#include <cuda_runtime.h>
#include <string>

namespace cg = cooperative_groups;

struct alignas(16) Pair { long long key, value; };
__device__ int counters[8];
__constant__ int eight = 8;

__global__ void lanes(int* out, int* failed) {
    auto expect = [=](bool right, int which) { if (!right) atomicMin_block(failed, which); };
    const unsigned t = threadIdx.x, lane = t % 32;
    const auto tile = cg::tiled_partition<32>(cg::this_thread_block());

    expect(__match_any_sync(~0u, lane % 3) == (lane % 3 == 0 ? 0x49249249u : lane % 3 == 1 ? 0x92492492u : 0x24924924u), 1);
    int all = -1;
    expect(__match_all_sync(~0u, 2.5f, &all) == ~0u && all == 1 && __match_all_sync(~0u, (long long)lane, &all) == 0 && all == 0, 2);

    // One atomic for all lanes that come here: each takes its own number.
    if (lane % 2) {
        const auto group = cg::coalesced_threads();
        int first = 0;
        if (group.thread_rank() == 0) first = atomicAdd_block(&counters[0], int(group.size()));
        out[t] = group.shfl(first, 0) + int(group.thread_rank());
        expect(group.size() == 16 && group.thread_rank() == lane / 2 && group.any(lane == 5) && !group.all(lane == 5) && group.ballot(lane < 8) == 0xf, 3);
        expect(cg::reduce(group, int(lane), cg::plus<int>()) == 256 && cg::inclusive_scan(group, 1) == int(lane / 2) + 1, 4);
        expect(__activemask() == 0xaaaaaaaau, 5);
    } else {
        out[t] = -1;
    }
#ifdef BUG
    if (lane < 16)
#endif
    expect(cg::inclusive_scan(tile, int(lane)) == int(lane * (lane + 1) / 2) && cg::exclusive_scan(tile, 2) == int(2 * lane), 6);
    expect(cg::inclusive_scan(tile, int(lane ^ 5), cg::greater<int>()) >= int(lane ^ 5) && cg::exclusive_scan(tile, int(lane), cg::greater<int>()) == max(int(lane) - 1, 0), 7);

    __shared__ int shared;
    int local = 0;
    expect(__isShared(&shared) && !__isGlobal(&shared) && __isGlobal(out) && __isGlobal(counters) && __isConstant(&eight) && !__isGlobal(&eight) && __isLocal(&local), 8);
    __prof_trigger(0);
}

__global__ void atomics(int* i, unsigned long long* u, float4* f, Pair* p, int* failed) {
    auto expect = [=](bool right, int which) { if (!right) atomicMin(failed, which); };
    atomicCAS_block(i, 0, 7), atomicCAS_system(i + 1, 1, 7), atomicCAS_system(u, 0ull, 9ull), atomicCAS_block((unsigned short*)(i + 2), (unsigned short)0, (unsigned short)3);
    atomicAdd(f, make_float4(1, 2, 3, 4)), atomicAdd((float2*)(f + 1), make_float2(0.5f, 0.25f));
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        const Pair old = atomicExch(p + 1, Pair{5, 6});
        expect(old.key == 0 && old.value == 0, 10);
    }
    // A pair grows in one piece.
    for (Pair seen = {0, 0};;) {
        const Pair old = atomicCAS(p, seen, Pair{seen.key + 1, seen.value + 2});
        if (old.key == seen.key && old.value == seen.value) break;
        seen = old;
    }
}

int main(int argc, char** argv) {
    int *out, *failed, o[64], bad = 1000;
    cudaMalloc(&out, sizeof o), cudaMalloc(&failed, 4);
    cudaMemcpy(failed, &bad, 4, cudaMemcpyHostToDevice);
    lanes<<<1, 64>>>(out, failed);
    if (cudaMemcpy(o, out, sizeof o, cudaMemcpyDeviceToHost)) return 1;
    bool taken[32] = {};
    for (int t = 0; t < 64; t++)
        if (o[t] >= 0) taken[o[t]] = true;
    for (bool t : taken)
        if (!t) return 1;

    int *i, got_i[4] = {0, 1, 0, 0};
    unsigned long long *u, got_u = 0;
    float4 *f, got_f[2] = {};
    Pair *p, got_p[2] = {};
    cudaMalloc(&i, sizeof got_i), cudaMalloc(&u, 8), cudaMalloc(&f, sizeof got_f), cudaMalloc(&p, sizeof got_p);
    cudaMemcpy(i, got_i, sizeof got_i, cudaMemcpyHostToDevice), cudaMemcpy(u, &got_u, 8, cudaMemcpyHostToDevice);
    cudaMemcpy(f, got_f, sizeof got_f, cudaMemcpyHostToDevice), cudaMemcpy(p, got_p, sizeof got_p, cudaMemcpyHostToDevice);
    atomics<<<4, 32>>>(i, u, argc > 1 ? (float4*)((char*)f + 8) : f, p, failed);
    if (cudaMemcpy(got_i, i, sizeof got_i, cudaMemcpyDeviceToHost)) return 1;
    cudaMemcpy(&got_u, u, 8, cudaMemcpyDeviceToHost), cudaMemcpy(got_f, f, sizeof got_f, cudaMemcpyDeviceToHost);
    cudaMemcpy(got_p, p, sizeof got_p, cudaMemcpyDeviceToHost), cudaMemcpy(&bad, failed, 4, cudaMemcpyDeviceToHost);
    if (bad != 1000) printf("check %d failed\n", bad);
    return !(bad == 1000 && got_i[0] == 7 && got_i[1] == 7 && got_i[2] == 3 && got_u == 9 && got_f[0].x == 128 && got_f[0].w == 512 && got_f[1].x == 64 &&
             got_f[1].y == 32 && got_p[0].key == 128 && got_p[0].value == 256 && got_p[1].key == 5 && got_p[1].value == 6);
}
