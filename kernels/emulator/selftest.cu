// Kernels that test the emulator and ptx.cuh; none of them is part of the product. Hopper's are in
// selftest_hopper.cu.
//
//   1. Planted bugs: NAME_bug commits one error that a check must find, and NAME_ok is the same
//      code without it. All compute out[i] = 2 in[i], so that a bug that corrupts data shows.
//   2. Probes of ptx.cuh, which tests/emulator/main.rs compares with plain loops.
//   3. Two real kernels: a softmax, and a GEMM with mma, ldmatrix and a cp.async pipeline.
#include "../ptx.cuh"

// ---- 1. planted bugs: 4 blocks of 64 threads, n = 256 -------------------------------------------

struct Plant {
    float* out;        // [n]
    const float* in;   // [n]
    float* scratch;    // [n], fresh from the allocator; zeros for atomics in scratch[0]
    float* ticket;     // [1], zero
    int n, zero, one;  // zero and one, unknown to the compiler
};

#define PLANT(name)                                                                    \
    extern "C" __global__ void name##_bug(Plant p) { name<true>(p); }                  \
    KERNEL_EXPORT(name##_bug);                                                         \
    extern "C" __global__ void name##_ok(Plant p) { name<false>(p); }                  \
    KERNEL_EXPORT(name##_ok)

#define INDICES                                                       \
    [[maybe_unused]] const int t = threadIdx.x, lane = threadIdx.x % 32; \
    [[maybe_unused]] const int i = blockIdx.x * blockDim.x + threadIdx.x

template <bool BUG> __device__ void unwritten_shared(Plant p) {
    INDICES;
    __shared__ float s[64];
    if (!BUG || t != 5) s[t] = p.in[i];
    __syncthreads();
    p.out[i] = 2 * s[t];
}
PLANT(unwritten_shared);

template <bool BUG> __device__ void unwritten_global(Plant p) {
    INDICES;
    if (!BUG) p.scratch[i] = p.in[i];
    p.out[i] = 2 * p.scratch[i];
}
PLANT(unwritten_global);

template <bool BUG> __device__ void global_overrun(Plant p) {
    INDICES;
    if (BUG && i == 77) p.scratch[p.n + 64] = 1;
    p.out[i] = 2 * p.in[i];
}
PLANT(global_overrun);

// One element: the allocation of 1000 bytes has slack up to its guard page.
template <bool BUG> __device__ void global_overrun_by_one(Plant p) {
    INDICES;
    if (i < p.n) p.out[i] = 2 * p.in[i];
    if (BUG && i == p.n) p.out[i] = 0;
}
PLANT(global_overrun_by_one);

template <bool BUG> __device__ void global_underrun(Plant p) {
    INDICES;
    float x = p.in[BUG && i == 0 ? -p.one : i];
    p.out[i] = BUG && i == 0 ? 2 * p.in[0] + 0 * x : 2 * x;
}
PLANT(global_underrun);

template <bool BUG> __device__ void null_pointer(Plant p) {
    INDICES;
    const float* in = BUG && i == 130 ? p.in - (p.in - static_cast<const float*>(nullptr)) + p.zero : p.in;
    p.out[i] = 2 * in[i == 130 && BUG ? 3 : i];
}
PLANT(null_pointer);

template <bool BUG> __device__ void shared_overrun(Plant p) {
    INDICES;
    __shared__ float s[64];
    [[maybe_unused]] __shared__ float behind[64];
    s[t] = p.in[i];
    behind[t] = 0;
    if (BUG && t == 63) s[t + p.one] = p.in[i];
    __syncthreads();
    p.out[i] = 2 * s[t];
}
PLANT(shared_overrun);

// The same where the compiler cannot know the array.
template <bool BUG> __device__ void shared_overrun_by_pointer(Plant p) {
    INDICES;
    __shared__ float s[64];
    __shared__ float behind[64];
    float* unknown = p.zero ? behind : s;
    behind[t] = 0;
    unknown[BUG && t == 63 ? t + 1 : t] = p.in[i];
    __syncthreads();
    p.out[i] = 2 * (BUG && t == 63 ? p.in[i] : s[t]);
}
PLANT(shared_overrun_by_pointer);

template <bool BUG> __device__ void dynamic_shared_overrun(Plant p) {  // launched with 256 bytes
    INDICES;
    extern __shared__ __align__(128) unsigned char smem[];
    float* const s = reinterpret_cast<float*>(smem);
    s[t] = p.in[i];
    if (BUG && t == 63) s[t + p.one] = p.in[i];
    __syncthreads();
    p.out[i] = 2 * s[t];
}
PLANT(dynamic_shared_overrun);

template <bool BUG> __device__ void missing_barrier(Plant p) {
    INDICES;
    __shared__ float s[64];
    s[t] = p.in[i ^ 32];
    if (!BUG) __syncthreads();
    p.out[i] = 2 * s[t ^ 32];
}
PLANT(missing_barrier);

// The second write may overtake the other warp's first read.
template <bool BUG> __device__ void overwritten_too_early(Plant p) {
    INDICES;
    __shared__ float s[64];
    s[t] = p.in[i ^ 32];
    __syncthreads();
    float x = s[t ^ 32];
    if (!BUG) __syncthreads();
    s[t] = p.in[i ^ 32] + 1;
    __syncthreads();
    p.out[i] = x + s[t ^ 32] - 1;
}
PLANT(overwritten_too_early);

template <bool BUG> __device__ void missing_syncwarp(Plant p) {
    INDICES;
    __shared__ float s[64];
    s[t] = p.in[i ^ 1];
    if (!BUG) __syncwarp();
    p.out[i] = 2 * s[t ^ 1];
}
PLANT(missing_syncwarp);

template <bool BUG> __device__ void write_write_race(Plant p) {
    INDICES;
    __shared__ float s[64];
    s[BUG ? lane : t] = p.in[i];
    __syncthreads();
    p.out[i] = 2 * p.in[i] + 0 * s[lane];
}
PLANT(write_write_race);

// Some write what others read: by the thread order the write comes first, or the read.
template <bool BUG> __device__ void one_way_race(Plant p) {
    INDICES;
    __shared__ float s[64];
    s[t] = p.in[i];
    __syncthreads();
    if (t < 32) s[t] = p.in[i];
    if (!BUG) __syncthreads();
    p.out[i] = 2 * p.in[i] + (t < 32 ? 0 : 0 * s[t - 32]);
}
PLANT(one_way_race);

template <bool BUG> __device__ void one_way_race_in_warp(Plant p) {
    INDICES;
    __shared__ float s[64];
    s[t] = p.in[i];
    __syncthreads();
    if (lane < 16) s[t] = p.in[i];
    if (!BUG) __syncwarp();
    p.out[i] = 2 * p.in[i] + (lane < 16 ? 0 : 0 * s[t - 16]);
}
PLANT(one_way_race_in_warp);

template <bool BUG> __device__ void block_race(Plant p) {
    INDICES;
    if (t == 0) {
        if (BUG) p.scratch[0] += 1.0f;
        else atomicAdd(&p.scratch[0], 1.0f);
    }
    p.out[i] = 2 * p.in[i];
}
PLANT(block_race);

template <bool BUG> __device__ void atomic_race(Plant p) {  // atomic and plain on one word
    INDICES;
    __shared__ int count[1];
    if (t == 0) count[0] = 0;
    __syncthreads();
    atomicAdd(&count[0], 1);
    if (!BUG) __syncthreads();
    p.out[i] = 2 * p.in[i] + (count[0] < 0);
}
PLANT(atomic_race);

template <bool BUG> __device__ void missing_wait(Plant p) {
    INDICES;
    __shared__ float s[64];
    cp_async<4>(smem_address(&s[t]), &p.in[i]);
    cp_async_commit();
    if (!BUG) cp_async_wait<0>();
    __syncthreads();
    p.out[i] = 2 * s[t];
    if (BUG) cp_async_wait<0>();
}
PLANT(missing_wait);

template <bool BUG> __device__ void missing_commit(Plant p) {
    INDICES;
    __shared__ float s[64];
    cp_async<4>(smem_address(&s[t]), &p.in[i]);
    if (!BUG) cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    p.out[i] = 2 * s[t];
}
PLANT(missing_commit);

template <bool BUG> __device__ void copy_from_outside(Plant p) {
    INDICES;
    __shared__ float s[64];
    cp_async<4>(smem_address(&s[t]), &p.in[BUG && i == 255 ? p.n : i]);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    p.out[i] = 2 * s[t];
}
PLANT(copy_from_outside);

template <bool BUG> __device__ void misaligned_copy(Plant p) {
    INDICES;
    __shared__ float s[68];
    if (t < 16) cp_async<16>(smem_address(&s[4 * t]) + (BUG ? 4 * p.one : 0), &p.in[blockIdx.x * 64 + 4 * t]);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    p.out[i] = 2 * s[t];
}
PLANT(misaligned_copy);

template <bool BUG> __device__ void misaligned_ldmatrix(Plant p) {
    INDICES;
    extern __shared__ __align__(128) unsigned char smem[];
    unsigned char* const s = smem;
    for (int k = t; k < 64; k += 64) reinterpret_cast<float*>(s)[k] = 0;
    __syncthreads();
    uint32_t r[1];
    ldmatrix(r, smem_address(s) + lane % 8 * 16 + (BUG && lane == 3 ? 8 * p.one : 0));
    p.out[i] = 2 * p.in[i] + float(r[0]);
}
PLANT(misaligned_ldmatrix);

template <bool BUG> __device__ void misaligned_vector(Plant p) {
    INDICES;
    const float2 pair = *reinterpret_cast<const float2*>(&p.in[(i & ~1) + (BUG ? p.one : 0)]);
    p.out[i] = 2 * (i & 1 ? pair.y : pair.x);
}
PLANT(misaligned_vector);

template <bool BUG> __device__ void divergent_barrier(Plant p) {
    INDICES;
    if (!BUG || t < 32) __syncthreads();
    p.out[i] = 2 * p.in[i];
}
PLANT(divergent_barrier);

template <bool BUG> __device__ void mixed_barriers(Plant p) {
    INDICES;
    if (!BUG || t < 32)
        __syncthreads();
    else
        __syncthreads();
    p.out[i] = 2 * p.in[i];
}
PLANT(mixed_barriers);

template <bool BUG> __device__ void exited_thread(Plant p) {
    INDICES;
    p.out[i] = 2 * p.in[i];
    if (BUG && t == 63) return;
    __syncthreads();
}
PLANT(exited_thread);

// Lanes that have left need not come, but nobody can read them.
template <bool BUG> __device__ void exited_lanes(Plant p) {
    INDICES;
    p.out[i] = 2 * p.in[i];
    if (lane >= 24) return;
    const float x = __shfl_sync(0xffffffffu, p.in[i], BUG ? lane + 1 : lane);
    p.out[i] = 2 * x;
    __syncthreads();
}
PLANT(exited_lanes);

// Lanes of a warp may store to one place by one instruction; one of them wins.
template <bool BUG> __device__ void same_place_store(Plant p) {
    INDICES;
    __shared__ float s[2];
    s[t / 32] = BUG ? p.in[i] : 1;
    __syncthreads();
    p.out[i] = 2 * p.in[i] + s[t / 32] - 1 - float(BUG && t / 32 == 0 && p.in[0] == s[0]);
}
PLANT(same_place_store);

// The same instruction, but not at once.
template <bool BUG> __device__ void store_in_turns(Plant p) {
    INDICES;
    __shared__ float s[2][32];
    for (int k = 0; k < 32; k++) {
        s[t / 32][(lane + (BUG ? k : 0)) % 32] = p.in[i];
        if (p.zero) break;
    }
    __syncthreads();
    p.out[i] = 2 * p.in[i] + 0 * s[t / 32][lane];
}
PLANT(store_in_turns);

// "The last block reduces": what the others wrote is there if a fence is between their writes and their atomic.
template <bool BUG> __device__ __forceinline__ void reduce_in_last_block(Plant p, int* ticket, bool fence_by_one) {
    INDICES;
    __shared__ bool last[1];
    p.scratch[i] = p.in[i];
    if (!BUG && !fence_by_one) __threadfence();
    if (!(BUG && fence_by_one)) __syncthreads();
    if (t == 0) {
        if (fence_by_one) __threadfence();
        last[0] = atomicAdd(ticket, 1) == int(gridDim.x) - 1;
    }
    __syncthreads();
    if (!last[0]) return;
    for (int k = t; k < p.n; k += int(blockDim.x)) p.out[k] = 2 * p.scratch[k];
    if (t == 0) *ticket = 0;  // for the next launch
}
template <bool BUG> __device__ void no_fence(Plant p) { reduce_in_last_block<BUG>(p, reinterpret_cast<int*>(p.ticket), false); }
PLANT(no_fence);
template <bool BUG> __device__ void fence_too_early(Plant p) { reduce_in_last_block<BUG>(p, reinterpret_cast<int*>(p.ticket), true); }
PLANT(fence_too_early);

// A maximum prefers a number to NaN, yet not to what nobody has written.
template <bool BUG> __device__ void poison_in_maximum(Plant p) {
    INDICES;
    if (!BUG) p.scratch[i] = 0;
    p.out[i] = fmaxf(2 * p.in[i], p.scratch[i]);
}
PLANT(poison_in_maximum);

template <bool BUG> __device__ void half_poison_in_maximum(Plant p) {
    INDICES;
    __half* scratch = reinterpret_cast<__half*>(p.scratch);
    if (!BUG) scratch[i] = 0.0f;
    p.out[i] = max(2 * p.in[i], __half2float(scratch[i]));
}
PLANT(half_poison_in_maximum);

// Shows as poison only if each of them gives poison on, and a second one does not lose what the first gave.
template <bool BUG> __device__ void poison_in_every_extreme(Plant p) {
    INDICES;
    if (!BUG) p.scratch[i] = 0;
    const float x = p.scratch[i], y = p.in[i];
    bool kept = true;
    auto keep = [&](auto extreme, auto x, auto y) {
        const float a = extreme(extreme(x, y), y), b = extreme(y, extreme(y, x));
        kept = kept && a != a && b != b;
    };
    auto types = [&](auto extreme) {
        keep(extreme, x, y), keep(extreme, double(x), double(y)), keep(extreme, x, double(y)), keep(extreme, double(x), y);
    };
    types([](auto a, auto b) { return fmax(a, b); }), types([](auto a, auto b) { return fmin(a, b); });
    types([](auto a, auto b) { return max(a, b); }), types([](auto a, auto b) { return min(a, b); });
    types([](auto a, auto b) { return fmaxf(a, b); }), types([](auto a, auto b) { return fminf(a, b); });
    auto halves = [&](auto x, auto y) {
        keep([](auto a, auto b) { return __hmax(a, b); }, x, y), keep([](auto a, auto b) { return __hmin(a, b); }, x, y);
    };
    halves(__float2half(x), __float2half(y)), halves(__float2bfloat16(x), __float2bfloat16(y));
    keep([](__half a, __half b) { return __low2half(__hmax2(__half2half2(a), __half2half2(b))); }, __float2half(x), __float2half(y));
    keep([](__half a, __half b) { return __high2half(__hmin2(__half2half2(a), __half2half2(b))); }, __float2half(x), __float2half(y));
    p.out[i] = BUG && kept ? x : 2 * y;
}
PLANT(poison_in_every_extreme);

template <bool BUG> __device__ void missing_lanes(Plant p) {
    INDICES;
    float x = 0;
    if (!BUG || lane < 16) x = __shfl_xor_sync(0xffffffffu, p.in[i], 1);
    __syncthreads();
    p.out[i] = 2 * p.in[i] + 0 * x;
}
PLANT(missing_lanes);

template <bool BUG> __device__ void mixed_collectives(Plant p) {
    INDICES;
    int all = 0;
    if (!BUG || lane < 16) all = __all_sync(0xffffffffu, 1);
    else __syncwarp();
    p.out[i] = 2 * p.in[i] + 0 * float(all);
}
PLANT(mixed_collectives);

template <bool BUG> __device__ void lane_not_in_mask(Plant p) {
    INDICES;
    p.out[i] = 2 * __shfl_sync(BUG ? 0xfffffff7u : 0xffffffffu, p.in[i], lane);
}
PLANT(lane_not_in_mask);

template <bool BUG> __device__ void shuffle_from_absent_lane(Plant p) {
    INDICES;
    float x = p.in[i];
    if (lane < 16) x = __shfl_sync(0x0000ffffu, x, BUG ? lane + 8 : lane);
    p.out[i] = 2 * x;
}
PLANT(shuffle_from_absent_lane);

template <bool BUG> __device__ void shift_too_far(Plant p) {
    INDICES;
    p.out[i] = 2 * p.in[i] + 0 * float(1u << (BUG ? 32 * p.one : 31));
}
PLANT(shift_too_far);

template <bool BUG> __device__ void cast_out_of_range(Plant p) {
    INDICES;
    p.out[i] = 2 * p.in[i] + 0 * float(int(BUG ? 1e20f * float(p.one) : 1.5f));
}
PLANT(cast_out_of_range);

template <bool BUG> __device__ void division_by_zero(Plant p) {
    INDICES;
    p.out[i] = 2 * p.in[i] + 0 * float(p.n / (BUG ? p.zero : p.one));
}
PLANT(division_by_zero);

template <bool BUG> __device__ void stack_overflow(Plant p) {
    INDICES;
    volatile float local[BUG ? 20000 : 20];  // 80 KB
    for (int k = 0; k < (BUG ? 20000 : 20); k++) local[k] = p.in[i];
    p.out[i] = local[3] + local[p.one];
}
PLANT(stack_overflow);

template <bool BUG> __device__ void trap(Plant p) {
    INDICES;
    if (BUG && i == 100) __trap();
    p.out[i] = 2 * p.in[i];
}
PLANT(trap);

// A transpose through shared memory, with and without the padding against bank conflicts.
template <bool BUG> __device__ void bank_conflicts(Plant p) {
    INDICES;
    __shared__ float s[32][BUG ? 32 : 33];
    if (t < 32)
        for (int row = 0; row < 32; row++) s[row][t] = p.in[i] * float(row == t);
    __syncthreads();
    float sum = 0;
    if (t < 32)
        for (int column = 0; column < 32; column++) sum += s[t][column];
    p.out[i] = 2 * (t < 32 ? sum : p.in[i]);
}
PLANT(bank_conflicts);

// The same through ldmatrix: 8 rows of 128 bytes, with and without the swizzle.
template <bool BUG> __device__ void ldmatrix_bank_conflicts(Plant p) {
    INDICES;
    extern __shared__ __align__(128) unsigned char smem[];
    unsigned char* const s = smem;
    if (t < 64) store16(s + t * 16, make_uint4(0, 0, 0, 0));
    __syncthreads();
    uint32_t r[1];
    ldmatrix(r, smem_address(s) + (BUG ? lane % 8 * 128 : swizzle<128>(lane % 8, 0)));
    p.out[i] = 2 * p.in[i] + float(r[0]);
}
PLANT(ldmatrix_bank_conflicts);

// In clusters of four blocks: each has what the block of the rank before it needs.
__device__ __forceinline__ float for_the_one_before(const Plant& p) { return p.in[(cluster_rank() + 3) % 4 * 64 + threadIdx.x]; }
__device__ __forceinline__ float of_the_next(const float* s, unsigned rank, SIMT_WHERE) {
    float values[4];
    const uint4 bits = load16_of<0>(s + threadIdx.x / 4 * 4, rank, at);
    memcpy(values, &bits, 16);
    return values[threadIdx.x % 4];
}

template <bool BUG> __device__ void cluster_read_too_early(Plant p) {
    INDICES;
    alignas(16) __shared__ float s[64];
    s[t] = for_the_one_before(p);
    if (BUG) __syncthreads();
    else cluster_arrive(), cluster_wait();
    p.out[i] = 2 * of_the_next(s, (cluster_rank() + 1) % 4);
    cluster_arrive(), cluster_wait();
}
PLANT(cluster_read_too_early);

template <bool BUG> __device__ void cluster_overwritten_too_early(Plant p) {
    INDICES;
    alignas(16) __shared__ float s[64];
    s[t] = for_the_one_before(p);
    cluster_arrive(), cluster_wait();
    p.out[i] = 2 * of_the_next(s, (cluster_rank() + 1) % 4);
    cluster_arrive();
    if (BUG) s[t] = 0;
    cluster_wait();
    if (!BUG) s[t] = 0;
}
PLANT(cluster_overwritten_too_early);

// Threads that have left are not awaited.
template <bool BUG> __device__ void cluster_block_leaves(Plant p) {
    INDICES;
    alignas(16) __shared__ float s[64];
    s[t] = for_the_one_before(p);
    if (BUG && cluster_rank() == 1) {
        p.out[i] = 2 * p.in[i];
        return;
    }
    cluster_arrive(), cluster_wait();
    p.out[i] = 2 * of_the_next(s, (cluster_rank() + 1) % 4);
    cluster_arrive(), cluster_wait();
}
PLANT(cluster_block_leaves);

// The others have read when it leaves, but it does not know that.
template <bool BUG> __device__ void cluster_block_leaves_early(Plant p) {
    INDICES;
    alignas(16) __shared__ float s[64];
    s[t] = for_the_one_before(p);
    cluster_arrive(), cluster_wait();
    p.out[i] = 2 * of_the_next(s, (cluster_rank() + 1) % 4);
    cluster_arrive();
    if (!BUG) cluster_wait();
}
PLANT(cluster_block_leaves_early);

// Warp 1 has waited for the first meeting alone, even if warp 0 is on its way to the second.
template <bool BUG> __device__ void cluster_meeting_to_come(Plant p) {
    INDICES;
    __shared__ float s[64];
    cluster_arrive(), cluster_wait();
    if (t < 32) s[t] = p.in[i], s[t + 32] = p.in[i + 32];
    if (!BUG || t < 32) cluster_arrive(), cluster_wait();
    p.out[i] = 2 * s[t];
    if (BUG && t >= 32) cluster_arrive(), cluster_wait();
}
PLANT(cluster_meeting_to_come);

template <bool BUG> __device__ void cluster_rank_beyond(Plant p) {
    INDICES;
    alignas(16) __shared__ float s[64];
    s[t] = for_the_one_before(p);
    cluster_arrive(), cluster_wait();
    p.out[i] = 2 * of_the_next(s, (cluster_rank() + 1) % (cluster_size() + BUG));
    cluster_arrive(), cluster_wait();
}
PLANT(cluster_rank_beyond);

template <bool BUG> __device__ void cluster_load_beyond(Plant p) {
    INDICES;
    alignas(16) __shared__ float s[64];
    s[t] = for_the_one_before(p);
    cluster_arrive(), cluster_wait();
    p.out[i] = 2 * of_the_next(s + (BUG && t == 63 ? 4 : 0), (cluster_rank() + 1) % 4);
    cluster_arrive(), cluster_wait();
}
PLANT(cluster_load_beyond);

template <bool BUG> __device__ void cluster_misaligned_load(Plant p) {
    INDICES;
    alignas(16) __shared__ float s[64];
    s[t] = for_the_one_before(p);
    cluster_arrive(), cluster_wait();
    p.out[i] = 2 * of_the_next(s + (BUG && t == 5), (cluster_rank() + 1) % 4);
    cluster_arrive(), cluster_wait();
}
PLANT(cluster_misaligned_load);

template <bool BUG> __device__ void cluster_arrives_twice(Plant p) {
    INDICES;
    cluster_arrive();
    if (BUG && t >= 32) cluster_arrive();
    cluster_wait();
    p.out[i] = 2 * p.in[i];
}
PLANT(cluster_arrives_twice);

template <bool BUG> __device__ void cluster_wait_alone(Plant p) {
    INDICES;
    cluster_arrive(), cluster_wait();
    if (BUG && t >= 32) cluster_wait();
    p.out[i] = 2 * p.in[i];
}
PLANT(cluster_wait_alone);

template <bool BUG> __device__ void cluster_mixed_arrivals(Plant p) {
    INDICES;
    if (BUG && t == 9) cluster_arrive();
    else cluster_arrive();
    cluster_wait();
    p.out[i] = 2 * p.in[i];
}
PLANT(cluster_mixed_arrivals);

template <bool BUG> __device__ void cluster_exited_thread(Plant p) {
    INDICES;
    p.out[i] = 2 * p.in[i];
    if (BUG && i == 191) return;
    cluster_arrive(), cluster_wait();
}
PLANT(cluster_exited_thread);

template <bool BUG> __device__ void cluster_divergent(Plant p) {
    INDICES;
    p.out[i] = 2 * p.in[i];
    if (BUG && cluster_rank() == 2 && t >= 32) __syncthreads();
    cluster_arrive(), cluster_wait();
}
PLANT(cluster_divergent);

// ---- 2. probes ----------------------------------------------------------------------------------

// d[16][8] += a[16][16] * b[16][8], one warp; registers filled element by element as the PTX ISA
// says: element e of register a[r] is A[g + 8 (r % 2)][2t + 8 (r / 2) + e], and so on.
template <class T>
__device__ void probe_mma(const T* a, const T* b, float* d) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t fa[4], fb[2];
    float fd[4];
    for (int r = 0; r < 4; r++) {
        const T* p = &a[(g + 8 * (r % 2)) * 16 + 2 * t + 8 * (r / 2)];
        fa[r] = pack2<T>(to_float(p[0]), to_float(p[1]));
    }
    for (int r = 0; r < 2; r++) {
        const T* p = &b[(2 * t + 8 * r) * 8 + g];
        fb[r] = pack2<T>(to_float(p[0]), to_float(p[8]));
    }
    for (int i = 0; i < 4; i++) fd[i] = d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
    mma<T>(fd, fa, fb);
    for (int i = 0; i < 4; i++) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = fd[i];
}
extern "C" __global__ void probe_mma_f16(const __half* a, const __half* b, float* d) { probe_mma(a, b, d); }
KERNEL_EXPORT(probe_mma_f16);
extern "C" __global__ void probe_mma_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) { probe_mma(a, b, d); }
KERNEL_EXPORT(probe_mma_bf16);

extern "C" __global__ void probe_mma_f16_f16(const __half* a, const __half* b, __half* d) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t fa[4], fb[2], fd[2];
    for (int r = 0; r < 4; r++) {
        const __half* p = &a[(g + 8 * (r % 2)) * 16 + 2 * t + 8 * (r / 2)];
        fa[r] = pack2<__half>(to_float(p[0]), to_float(p[1]));
    }
    for (int r = 0; r < 2; r++) {
        const __half* p = &b[(2 * t + 8 * r) * 8 + g];
        fb[r] = pack2<__half>(to_float(p[0]), to_float(p[8]));
    }
    uint32_t* words = reinterpret_cast<uint32_t*>(d);
    for (int r = 0; r < 2; r++) fd[r] = words[(g + 8 * r) * 4 + t];
    mma_f16(fd, fa, fb);
    for (int r = 0; r < 2; r++) words[(g + 8 * r) * 4 + t] = fd[r];
}
KERNEL_EXPORT(probe_mma_f16_f16);

// out[lane][register] of ldmatrix over m[32][8] (four 8x8 matrices, one below the other).
template <int MATRICES, bool TRANS>
__device__ void probe_ldmatrix(const uint16_t* m, uint32_t* out) {
    __shared__ uint4 s[32];
    s[threadIdx.x] = load16(m + threadIdx.x * 8);
    __syncwarp();
    uint32_t r[MATRICES];
    ldmatrix<TRANS>(r, smem_address(&s[threadIdx.x % (8 * MATRICES)]));
    for (int i = 0; i < MATRICES; i++) out[threadIdx.x * MATRICES + i] = r[i];
}
#define PROBE_LDMATRIX(name, matrices, trans)                                                               \
    extern "C" __global__ void name(const uint16_t* m, uint32_t* out) { probe_ldmatrix<matrices, trans>(m, out); } \
    KERNEL_EXPORT(name)
PROBE_LDMATRIX(probe_ldmatrix_x1, 1, false);
PROBE_LDMATRIX(probe_ldmatrix_x2, 2, false);
PROBE_LDMATRIX(probe_ldmatrix_x4, 4, false);
PROBE_LDMATRIX(probe_ldmatrix_x1_trans, 1, true);
PROBE_LDMATRIX(probe_ldmatrix_x2_trans, 2, true);
PROBE_LDMATRIX(probe_ldmatrix_x4_trans, 4, true);

// Each thread copies BYTES, or zeros where its index is odd.
template <int BYTES>
__device__ void probe_cp_async(const unsigned char* in, unsigned char* out) {
    __shared__ uint4 s[32];
    unsigned char* bytes = reinterpret_cast<unsigned char*>(s) + threadIdx.x * BYTES;
    cp_async<BYTES>(smem_address(bytes), in + threadIdx.x * BYTES, threadIdx.x % 2 == 0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int i = 0; i < BYTES; i++) out[threadIdx.x * BYTES + i] = bytes[i];
}
extern "C" __global__ void probe_cp_async_16(const unsigned char* in, unsigned char* out) { probe_cp_async<16>(in, out); }
KERNEL_EXPORT(probe_cp_async_16);
extern "C" __global__ void probe_cp_async_8(const unsigned char* in, unsigned char* out) { probe_cp_async<8>(in, out); }
KERNEL_EXPORT(probe_cp_async_8);
extern "C" __global__ void probe_cp_async_4(const unsigned char* in, unsigned char* out) { probe_cp_async<4>(in, out); }
KERNEL_EXPORT(probe_cp_async_4);

// One warp: out[i][lane] of warp_sum, warp_max, and the shuffles by 3 in segments of 16.
extern "C" __global__ void probe_warp(const float* in, float* out) {
    const int lane = threadIdx.x;
    const float x = in[lane];
    out[lane] = warp_sum(x);
    out[32 + lane] = warp_max(x);
    out[64 + lane] = __shfl_sync(0xffffffffu, x, 3, 16);
    out[96 + lane] = __shfl_up_sync(0xffffffffu, x, 3, 16);
    out[128 + lane] = __shfl_down_sync(0xffffffffu, x, 3, 16);
    out[160 + lane] = __shfl_xor_sync(0xffffffffu, x, 3, 16);
    out[192 + lane] = float(__popc(__ballot_sync(0xffffffffu, x > 0)));
}
KERNEL_EXPORT(probe_warp);

// Conversions of floats.
extern "C" __global__ void probe_narrow(const float* floats, uint16_t* half_bits, uint16_t* bf16_bits, int per_thread) {
    const int begin = (blockIdx.x * blockDim.x + threadIdx.x) * per_thread;
    for (int i = begin; i < begin + per_thread; i++) {
        half_bits[i] = __half_as_ushort(__float2half_rn(floats[i]));
        bf16_bits[i] = __bfloat16_as_ushort(__float2bfloat16_rn(floats[i]));
    }
}
KERNEL_EXPORT(probe_narrow);

// And of the 16-bit patterns i.
extern "C" __global__ void probe_widen(float* from_half, float* from_bf16) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    from_half[i] = __half2float(__ushort_as_half(uint16_t(i)));
    from_bf16[i] = __bfloat162float(__ushort_as_bfloat16(uint16_t(i)));
}
KERNEL_EXPORT(probe_widen);

#ifdef SIMT_EMULATOR
// Where the emulator's conversions in integers differ from the processor's.
extern "C" void probe_portable(const float* floats, uint32_t* differ, int per_thread) {
    const int begin = (blockIdx.x * blockDim.x + threadIdx.x) * per_thread;
    uint32_t count = 0;
    for (int i = begin; i < begin + per_thread; i++) count += simt::float_to_half_portable(floats[i]) != simt::float_to_half(floats[i]);
    if (count) atomicAdd(differ, count);
}
KERNEL_EXPORT(probe_portable);
extern "C" void probe_portable_halves(uint32_t* differ) {
    const uint16_t i = uint16_t(blockIdx.x * blockDim.x + threadIdx.x);
    if (__float_as_uint(simt::half_to_float_portable(i)) != __float_as_uint(simt::half_to_float(i))) atomicAdd(differ, 1);
}
KERNEL_EXPORT(probe_portable_halves);
#endif

// x op y by operators of halves: sum, difference, product, quotient, and x * y + z, which rounds twice.
template <class T>
__device__ void probe_operators(const T* x, const T* y, const T* z, T* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    out[i] = x[i] + y[i];
    out[n + i] = x[i] - y[i];
    out[2 * n + i] = x[i] * y[i];
    out[3 * n + i] = x[i] / y[i];
    out[4 * n + i] = x[i] * y[i] + z[i];
}
extern "C" __global__ void probe_operators_f16(const __half* x, const __half* y, const __half* z, __half* out) { probe_operators(x, y, z, out); }
KERNEL_EXPORT(probe_operators_f16);
extern "C" __global__ void probe_operators_bf16(const __nv_bfloat16* x, const __nv_bfloat16* y, const __nv_bfloat16* z, __nv_bfloat16* out) { probe_operators(x, y, z, out); }
KERNEL_EXPORT(probe_operators_bf16);

// min and max are overloaded as the CUDA Math API lists them; what is ambiguous there does not compile.
template <class R, class A, class B>
constexpr bool overload = std::is_same_v<decltype(min(A(), B())), R>&& std::is_same_v<decltype(max(A(), B())), R>;
static_assert(overload<int, int, int> && overload<int, short, char> && overload<unsigned, unsigned, unsigned>);
static_assert(overload<unsigned, int, unsigned> && overload<unsigned, unsigned, int>);
static_assert(overload<long, long, long> && overload<unsigned long, long, unsigned long> && overload<unsigned long, unsigned long, long>);
static_assert(overload<long long, long long, long long> && overload<unsigned long long, long long, unsigned long long>);
static_assert(overload<unsigned long long, unsigned long long, unsigned long long>);
static_assert(overload<float, float, float> && overload<double, double, double> && overload<double, float, double> && overload<double, double, float>);
static_assert(min(-1, 1u) == 1u && max(-1, 1u) == 0xffffffffu && min(16777217, 16777219u) == 16777217u);
#ifdef SIMT_EMULATOR
template <class A, class B, class = void> constexpr bool has_min = false;
template <class A, class B> constexpr bool has_min<A, B, std::void_t<decltype(min(A(), B()))>> = true;
static_assert(has_min<int, unsigned> && !has_min<int, float> && !has_min<unsigned, double> && !has_min<int, size_t>);
#endif

// pack8(unpack8(x)) and x * y + z in 16 bits, one element a thread for the latter.
extern "C" __global__ void probe_half_math(const __half* x, const __half* y, const __half* z, __half* fma, __half* sum,
                                           __half* product, __half* copy) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    fma[i] = __hfma(x[i], y[i], z[i]);
    sum[i] = __hadd(x[i], y[i]);
    product[i] = __hmul(x[i], y[i]);
    if (i % 8 == 0) {
        float f[8];
        unpack8<__half>(load16(x + i), f);
        store16(copy + i, pack8<__half>(f));
    }
}
KERNEL_EXPORT(probe_half_math);

extern "C" __global__ void probe_bf16_fma(const __nv_bfloat16* x, const __nv_bfloat16* y, const __nv_bfloat16* z, __nv_bfloat16* fma) {
    fma[threadIdx.x] = __hfma(x[threadIdx.x], y[threadIdx.x], z[threadIdx.x]);
}
KERNEL_EXPORT(probe_bf16_fma);

// ---- 3. real kernels ----------------------------------------------------------------------------

// y[row] = softmax(x[row]) over n columns; one block of 128 threads a row. Reads x three times.
extern "C" __global__ void softmax(const __half* x, __half* y, int n) {
    __shared__ float partial[2][4];
    x += size_t(blockIdx.x) * n, y += size_t(blockIdx.x) * n;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float most = -INFINITY, sum = 0;
    for (int i = threadIdx.x; i < n; i += 128) most = fmaxf(most, to_float(x[i]));
    most = warp_max(most);
    if (lane == 0) partial[0][warp] = most;
    __syncthreads();
    most = fmaxf(fmaxf(partial[0][0], partial[0][1]), fmaxf(partial[0][2], partial[0][3]));
    for (int i = threadIdx.x; i < n; i += 128) sum += __expf(to_float(x[i]) - most);
    sum = warp_sum(sum);
    if (lane == 0) partial[1][warp] = sum;
    __syncthreads();
    sum = partial[1][0] + partial[1][1] + partial[1][2] + partial[1][3];
    for (int i = threadIdx.x; i < n; i += 128) from_float(y[i], __expf(to_float(x[i]) - most) / sum);
}
KERNEL_EXPORT(softmax);

// C[m][n] = A[m][k] * B[n][k]^T, f32 accumulators. k a multiple of 8, any m and n.
// 64 x 64 of C a block, four warps of 32 x 32, three stages of k = 32 in 24 KB of shared memory.
template <class T>
__device__ void gemm(const T* a, const T* b, T* c, int m, int n, int k) {
    constexpr int kTile = 64, kDepth = 32, kStages = 3, kRow = kDepth * 2, kOperand = kTile * kRow;
    extern __shared__ __align__(128) unsigned char smem[];
    const smem_addr shared = smem_address(smem);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;
    const int steps = (k + kDepth - 1) / kDepth;

    auto load = [&](int step) {
        const smem_addr stage = shared + step % kStages * 2 * kOperand;
        for (int i = threadIdx.x; i < kTile * 4; i += 128) {
            const int row = i / 4, chunk = i % 4, at_k = step * kDepth + chunk * 8;
            const bool a_valid = row0 + row < m && at_k < k, b_valid = column0 + row < n && at_k < k;
            cp_async(stage + swizzle<kRow>(row, chunk), a_valid ? a + size_t(row0 + row) * k + at_k : a, a_valid);
            cp_async(stage + kOperand + swizzle<kRow>(row, chunk), b_valid ? b + size_t(column0 + row) * k + at_k : b,
                     b_valid);
        }
    };

    float acc[2][4][4] = {};
    for (int s = 0; s < kStages - 1; s++) {
        if (s < steps) load(s);
        cp_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // this stage is there for all, and all have left the one loaded next
        if (step + kStages - 1 < steps) load(step + kStages - 1);
        cp_async_commit();
        const smem_addr stage = shared + step % kStages * 2 * kOperand;
#pragma unroll
        for (int kk = 0; kk < kDepth / 8; kk += 2) {
            smem_addr a_rows[2], b_rows[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                a_rows[i] = stage + swizzle<kRow>(warp / 2 * 32 + i * 16 + lane % 16, kk + lane / 16);
                b_rows[i] = stage + kOperand +
                            swizzle<kRow>(warp % 2 * 32 + i * 16 + lane / 16 * 8 + lane % 8, kk + lane / 8 % 2);
            }
            uint32_t fa[2][4], pairs[2][4], fb[4][2];
            ldmatrix_n(fa, a_rows);
            ldmatrix_n(pairs, b_rows);
#pragma unroll
            for (int j = 0; j < 4; j++) fb[j][0] = pairs[j / 2][j % 2 * 2], fb[j][1] = pairs[j / 2][j % 2 * 2 + 1];
            mma_tile<T>(acc, fa, fb);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int row = row0 + warp / 2 * 32 + i * 16 + lane / 4 + e / 2 * 8;
                const int column = column0 + warp % 2 * 32 + j * 8 + lane % 4 * 2 + e % 2;
                if (row < m && column < n) from_float(c[size_t(row) * n + column], acc[i][j][e]);
            }
}
extern "C" __global__ void __launch_bounds__(128)
gemm_f16_64x64x32_s3(const __half* a, const __half* b, __half* c, int m, int n, int k) { gemm(a, b, c, m, n, k); }
KERNEL_EXPORT(gemm_f16_64x64x32_s3);
extern "C" __global__ void __launch_bounds__(128)
gemm_bf16_64x64x32_s3(const __nv_bfloat16* a, const __nv_bfloat16* b, __nv_bfloat16* c, int m, int n, int k) { gemm(a, b, c, m, n, k); }
KERNEL_EXPORT(gemm_bf16_64x64x32_s3);
