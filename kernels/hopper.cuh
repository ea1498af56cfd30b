// What only Hopper has (sm_90a): mbarriers, bulk tensor copies, wgmma, register reallocation. As in ptx.cuh, each piece of
// inline PTX has its twin for the emulator beside it. A kernel that uses any of it is exported by KERNEL_EXPORT_HOPPER.
//
// A PIPELINE. Stages in shared memory, each with two mbarriers. A producer is one thread of a warp of its own
// (conv_hopper.cu has two producers, one for each operand). It waits until a stage is empty, expects its bytes on `full`,
// and starts bulk copies that count down those bytes. Consumers, warp groups of 128 threads, wait for `full`, multiply by
// wgmma, and arrive at `empty` when a wait says that the products which read the stage are over.
//
//     producer                                     consumer
//     mbarrier_wait(empty[s], parity ^ 1);         mbarrier_wait(full[s], parity);
//     mbarrier_expect(full[s], bytes);             wgmma_hold(acc); wgmma_fence();
//     tma_load_2d(stage, map, full[s], x, y);      wgmma<T, N, false>(acc, a, b);  // and more
//                                                  wgmma_commit(); wgmma_hold(acc);
//                                                  wgmma_wait<1>(); mbarrier_arrive(empty[previous]);
//
// PHASES. An mbarrier is in phase 0 at first. Its phase is over when all arrivals and all expected bytes have come. Then
// the next phase begins, which awaits as many arrivals. mbarrier_wait(bar, parity) returns when the phase of that parity is
// over: a stage's k-th use waits with k % 2. On a fresh barrier parity 1 returns at once, as if a phase -1 were over, which
// is how a producer finds its stages empty at first.
//
// SWIZZLE. Tiles in shared memory are rows of 128 bytes; 16-byte chunk c of row r lies at chunk
// c ^ (r % 8), as swizzle<128>(r, c) says, if the tile begins at a multiple of 1024. Bulk copies write
// so and wgmma reads so. Dynamic shared memory is aligned to 128 bytes only: round up by hand.
//
// OPERANDS of wgmma, D[64][N] += A[64][16] * B[16][N], both from shared memory by descriptors:
//
//     K-major (A[m][k], B as B^T[n][k]): row m or n of 128 bytes holds 64 k. `stride_bytes` is from eight
//         rows to the next eight: 1024 where rows follow each other. `leading_bytes` is not used: 16.
//         The next 16 k are 32 bytes further on.
//     MN-major (A as A^T[k][m], B[k][n]): row k of 128 bytes holds 64 m or n. `stride_bytes` is from eight
//         k to the next eight: 1024. `leading_bytes` is from 64 m or n to the next 64: rows of a block
//         times 128. The next 16 k are 2048 bytes further on.
//
// ACCUMULATORS. With w = warp % 4, g = lane / 4 and t = lane % 4 (the fragments of ptx.cuh, a warp 16 rows):
//
//     d[4j], d[4j + 1] = D[16w + g][8j + 2t, 2t+1]     d[4j + 2], d[4j + 3] = D[16w + g + 8][8j + 2t, 2t+1]
#pragma once
#include "ptx.cuh"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "hopper.cuh is for sm_90a alone"
#endif

#ifndef SIMT_EMULATOR
// After `extern "C" __global__ void kernel(...) {...}`: it may have 227 KB of shared memory.
#define KERNEL_EXPORT_HOPPER(kernel) static_assert(true, "")
#endif

// What tells a bulk copy where its tile lies. The host makes it (Runtime::tensor_map). It lies in a params struct that the
// kernel takes as `const __grid_constant__`, and is passed between functions by reference only.
struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

// ---- mbarriers: 8 bytes of shared memory, aligned to 8 ------------------------------------------

#ifdef SIMT_EMULATOR

inline void mbarrier_init(smem_addr bar, uint32_t arrivals, SIMT_WHERE) { simt::mbarrier_init(bar, arrivals, at); }
inline void fence_mbarrier_init(SIMT_WHERE) { simt::mbarrier_init_fence(at); }
inline void mbarrier_arrive(smem_addr bar, SIMT_WHERE) { simt::mbarrier_arrive(bar, 0, at); }
inline void mbarrier_expect(smem_addr bar, uint32_t bytes, SIMT_WHERE) { simt::mbarrier_arrive(bar, bytes, at); }
inline void mbarrier_wait(smem_addr bar, uint32_t parity, SIMT_WHERE) { simt::mbarrier_wait(bar, parity, at); }
inline void named_barrier(int id, int threads, SIMT_WHERE) { simt::named_barrier(id, threads, at); }
inline void fence_async_shared(SIMT_WHERE) { simt::async_fence(at); }

#else

// Makes a barrier whose phases await so many arrivals. One thread does so and calls fence_mbarrier_init. All threads then
// meet at __syncthreads before any other uses the barrier.
__device__ __forceinline__ void mbarrier_init(smem_addr bar, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(arrivals) : "memory");
}
// Makes barriers that this thread has made visible to the bulk copies.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// One arrival. Whoever waits for the phase sees what this thread did before.
__device__ __forceinline__ void mbarrier_arrive(smem_addr bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}
// One arrival. The phase also awaits so many more bytes of bulk copies.
__device__ __forceinline__ void mbarrier_expect(smem_addr bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is over, see above.
__device__ __forceinline__ void mbarrier_wait(smem_addr bar, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@over bra DONE;\n"
        "bra AGAIN;\n"
        "DONE:\n"
        "}" :: "r"(bar), "r"(parity) : "memory");
}
// __syncthreads for `threads` threads, whole warps; id from 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
// Makes this thread's stores to shared memory (and its finished cp.async) visible to wgmma and bulk copies that come after.
// Call it before the barrier that the others wait at.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif

// ---- bulk tensor copies: by one thread, their bytes arrive at `bar` ------------------------------

#ifdef SIMT_EMULATOR

inline void tma_prefetch(const TensorMap&) {}
inline void tma_load_2d(smem_addr dst, const TensorMap& map, smem_addr bar, int x, int y, SIMT_WHERE) {
    simt::bulk_load(dst, &map, bar, {false, {x, y}, {}}, at);
}
inline void tma_load_im2col(smem_addr dst, const TensorMap& map, smem_addr bar, int c, int w, int h, int n, int off_w,
                            int off_h, SIMT_WHERE) {
    simt::bulk_load(dst, &map, bar, {true, {c, w, h, n}, {off_w, off_h}}, at);
}

#else

// Prefetches the map itself.
__device__ __forceinline__ void tma_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
}
// The box of a matrix whose first element is column x of row y; zeros outside the matrix. `dst` is
// aligned to 1024 bytes; all bytes of the box count, zeros too.
__device__ __forceinline__ void tma_load_2d(smem_addr dst, const TensorMap& map, smem_addr bar, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 :: "r"(dst), "l"(&map), "r"(bar), "r"(x), "r"(y) : "memory");
}
// Pixels of an image batch [n][h][w][c], a row of 64 channels from c on for each. The first has its base at
// (w, h) of image n; bases walk along w, h and n within the map's bounding box; what is read lies
// (off_w, off_h) from the base, zeros outside the image. A 3x3 convolution whose map has corners -1 and
// -1 begins at (x - 1, y - 1), and its taps are the offsets 0..2.
__device__ __forceinline__ void tma_load_im2col(smem_addr dst, const TensorMap& map, smem_addr bar, int c, int w, int h,
                                                int n, int off_w, int off_h) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};"
        :: "r"(dst), "l"(&map), "r"(bar), "r"(c), "r"(w), "r"(h), "r"(n), "h"(uint16_t(off_w)), "h"(uint16_t(off_h))
        : "memory");
}

#endif

// ---- wgmma: by the 128 threads of a warp group ---------------------------------------------------

#ifdef SIMT_EMULATOR

inline uint64_t wgmma_descriptor(smem_addr tile, uint32_t leading_bytes, uint32_t stride_bytes, SIMT_WHERE) {
    return simt::wgmma_descriptor(tile, leading_bytes, stride_bytes, at);
}
template <class T, int N, bool MN_MAJOR>
inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, SIMT_WHERE) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma has 8 to 256 columns");
    simt::wgmma(d, a, b, {N, is_half<T> ? simt::Element::f16 : simt::Element::bf16, MN_MAJOR}, at);
}
inline void wgmma_fence(SIMT_WHERE) { simt::wgmma_fence(at); }
inline void wgmma_commit(SIMT_WHERE) { simt::wgmma_commit(at); }
template <int GROUPS_LEFT>
inline void wgmma_wait(SIMT_WHERE) { simt::wgmma_wait(GROUPS_LEFT, at); }
template <int N>
inline void wgmma_hold(float (&)[N]) {}
template <int M, int N>
inline void wgmma_hold(float (&)[M][N]) {}

#else

// The descriptor of an operand, see above. Adding BYTES / 16 to it moves it by BYTES.
__device__ __forceinline__ uint64_t wgmma_descriptor(smem_addr tile, uint32_t leading_bytes, uint32_t stride_bytes) {
    return uint64_t((tile & 0x3ffff) >> 4) | uint64_t(leading_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 |
           uint64_t(1) << 62;  // the 128-byte swizzle
}

// The text "%0, %1, ..." and the operands d[0], d[1], ...
#define HOPPER_TEN(tens) \
    "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens "6, %" #tens "7, %" #tens "8, %" #tens "9, "
#define HOPPER_4 "%0, %1, %2, %3"
#define HOPPER_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define HOPPER_16 HOPPER_TEN() "%10, %11, %12, %13, %14, %15"
#define HOPPER_32 HOPPER_TEN() HOPPER_TEN(1) HOPPER_TEN(2) "%30, %31"
#define HOPPER_48 HOPPER_TEN() HOPPER_TEN(1) HOPPER_TEN(2) HOPPER_TEN(3) "%40, %41, %42, %43, %44, %45, %46, %47"
#define HOPPER_60 HOPPER_TEN() HOPPER_TEN(1) HOPPER_TEN(2) HOPPER_TEN(3) HOPPER_TEN(4) HOPPER_TEN(5)
#define HOPPER_64 HOPPER_60 "%60, %61, %62, %63"
#define HOPPER_96 HOPPER_60 HOPPER_TEN(6) HOPPER_TEN(7) HOPPER_TEN(8) "%90, %91, %92, %93, %94, %95"
#define HOPPER_128                                                                                            \
    HOPPER_60 HOPPER_TEN(6) HOPPER_TEN(7) HOPPER_TEN(8) HOPPER_TEN(9) HOPPER_TEN(10) HOPPER_TEN(11) "%120, %121, %122, " \
    "%123, %124, %125, %126, %127"
#define HOPPER_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HOPPER_D8(i) HOPPER_D4(i), HOPPER_D4(i + 4)
#define HOPPER_D16(i) HOPPER_D8(i), HOPPER_D8(i + 8)
#define HOPPER_D32(i) HOPPER_D16(i), HOPPER_D16(i + 16)
#define HOPPER_D48(i) HOPPER_D32(i), HOPPER_D16(i + 32)
#define HOPPER_D64(i) HOPPER_D32(i), HOPPER_D32(i + 32)
#define HOPPER_D96(i) HOPPER_D64(i), HOPPER_D32(i + 64)
#define HOPPER_D128(i) HOPPER_D64(i), HOPPER_D64(i + 64)
// n columns are `regs` registers; the descriptors are operands %regs and %next.
#define HOPPER_ISSUE(n, regs, next, types, majors)                                                            \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" HOPPER_##regs "}, %" #regs ", %" #next \
                 ", 1, 1, 1, " majors ";"                                                                     \
                 : HOPPER_D##regs(0) : "l"(a), "l"(b))
#define HOPPER_WGMMA(n, regs, next)                                                      \
    if constexpr (N == n) {                                                              \
        if constexpr (is_half<T> && !MN_MAJOR) HOPPER_ISSUE(n, regs, next, "f16.f16", "0, 0");   \
        if constexpr (is_half<T> && MN_MAJOR) HOPPER_ISSUE(n, regs, next, "f16.f16", "1, 1");    \
        if constexpr (!is_half<T> && !MN_MAJOR) HOPPER_ISSUE(n, regs, next, "bf16.bf16", "0, 0"); \
        if constexpr (!is_half<T> && MN_MAJOR) HOPPER_ISSUE(n, regs, next, "bf16.bf16", "1, 1");  \
    }

// D[64][N] += A[64][16] * B[16][N], T = __half or __nv_bfloat16, both operands K-major or both MN-major. It is
// asynchronous: between here and the wgmma_wait after its commit nobody may touch d, or write what a and b point to.
template <class T, int N, bool MN_MAJOR>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {
    static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256,
                  "add a line for this number of columns");
    HOPPER_WGMMA(8, 4, 5)
    HOPPER_WGMMA(16, 8, 9)
    HOPPER_WGMMA(32, 16, 17)
    HOPPER_WGMMA(64, 32, 33)
    HOPPER_WGMMA(96, 48, 49)
    HOPPER_WGMMA(128, 64, 65)
    HOPPER_WGMMA(192, 96, 97)
    HOPPER_WGMMA(256, 128, 129)
}

// Orders registers. Needed before the first wgmma, and whenever the accumulators were touched since the last one.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of the products issued since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most GROUPS_LEFT groups are still in flight.
template <int GROUPS_LEFT>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(GROUPS_LEFT) : "memory"); }
// Keeps the compiler from moving accumulators across this place. Call it before wgmma_fence, after wgmma_commit, and after
// the wait that precedes their use. It costs no instruction.
template <int N>
__device__ __forceinline__ void wgmma_hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}
template <int M, int N>
__device__ __forceinline__ void wgmma_hold(float (&d)[M][N]) {
#pragma unroll
    for (int i = 0; i < M; i++) wgmma_hold(d[i]);
}

#endif

// ---- registers ----------------------------------------------------------------------------------

// By all warps of a warp group: from now on each thread has N registers, fewer or more than before. The consumers' groups
// take what the producer's group gives up. Needs __launch_bounds__.
template <int N>
__device__ __forceinline__ void registers_release() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "a multiple of 8 from 24 to 256");
#ifndef SIMT_EMULATOR
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N));
#endif
}
template <int N>
__device__ __forceinline__ void registers_take() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "a multiple of 8 from 24 to 256");
#ifndef SIMT_EMULATOR
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N));
#endif
}
