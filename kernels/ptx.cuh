// All inline PTX of the project, and beside each piece its twin for the emulator
// (simt/README.md). Every kernel includes this file, and no CUDA header.
//
// FRAGMENTS of mma.sync.m16n8k16, D[16][8] += A[16][16] * B[16][8] (PTX ISA, "Matrix Fragments
// for mma.m16n8k16 with floating point type"). With g = lane / 4 and t = lane % 4; a register of
// 32 bits holds two 16-bit elements, the one of lower index in the lower half:
//
//     a[0] = A[g    ][2t, 2t+1]     a[2] = A[g    ][2t+8, 2t+9]
//     a[1] = A[g + 8][2t, 2t+1]     a[3] = A[g + 8][2t+8, 2t+9]
//     b[0] = B[2t, 2t+1][g]         b[1] = B[2t+8, 2t+9][g]
//     f32 accumulators:  d[0], d[1] = D[g][2t, 2t+1]    d[2], d[3] = D[g + 8][2t, 2t+1]
//     f16 accumulators:  d[0] = D[g][2t, 2t+1]          d[1] = D[g + 8][2t, 2t+1]
//
// ldmatrix reads 8x8 matrices of 16-bit elements from shared memory. Lane 8j + r gives the address
// of row r of matrix j (16 bytes, aligned to 16); register j receives M_j[g][2t, 2t+1], and with
// .trans M_j[2t, 2t+1][g]. So with matrices stored as below, one x4 loads
//
//     A fragment from A[m][k]:            row = lane % 16,                  column = lane / 16 * 8
//     two B fragments from B^T[n][k]:     row = lane / 16 * 8 + lane % 8,   column = lane / 8 % 2 * 8
//     two B fragments from B[k][n] with .trans:  row = lane % 16,           column = lane / 16 * 8
//
// where the two B fragments, b[0] b[1] of n 0..7 and b[0] b[1] of n 8..15, are registers 0..3.
#pragma once
#ifndef SIMT_EMULATOR
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

// ---- exported kernels (the emulator has its own in simt.h) -------------------------------------

#ifndef SIMT_EMULATOR
// After `extern "C" __global__ void kernel(...) {...}`
#define KERNEL_EXPORT(kernel) static_assert(true, "")
#endif

// Every kernel calls this before it touches global memory that a kernel writes. (Weights no kernel of a plan writes.) On sm_90
// and newer a launch of a plan may begin while the one before it ends (programmatic dependent launch). Here it waits until
// that one is over and its writes are there. Only then may the next one begin, so that at most two are under way.
__device__ __forceinline__ void begin_kernel() {
#ifdef SIMT_EMULATOR
    simt::wait_for_launches(), simt::let_next_launch_begin();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// An address in shared memory as ldmatrix and cp.async take it. Offsets in bytes may be added; the
// low 7 bits are those of the offset into `extern __shared__ __align__(128)` memory, so that a swizzle may be xor'ed in.
#ifdef SIMT_EMULATOR
using smem_addr = uintptr_t;
inline smem_addr smem_address(const void* p) { return smem_addr(p); }
#else
using smem_addr = uint32_t;
__device__ __forceinline__ smem_addr smem_address(const void* p) { return smem_addr(__cvta_generic_to_shared(p)); }
#endif

// Byte offset of the 16-byte chunk `chunk` of row `row`, in rows of ROW_BYTES (64 or a multiple of
// 128) whose chunks are permuted so that ldmatrix and 16-byte copies of eight rows, or of one row,
// meet no bank twice.
template <int ROW_BYTES>
__device__ __forceinline__ int swizzle(int row, int chunk) {
    static_assert(ROW_BYTES == 64 || ROW_BYTES % 128 == 0, "a row is 64 bytes or a multiple of 128");
    return row * ROW_BYTES + (ROW_BYTES == 64 ? chunk ^ (row >> 1 & 3) : chunk ^ (row & 7)) * 16;
}

// ---- 16-bit floats: T is __half or __nv_bfloat16 ------------------------------------------------

__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// Two elements in one register, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
    struct alignas(4) { T x, y; } pair;
    from_float(pair.x, low), from_float(pair.y, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t bits) {
    struct alignas(4) { T x, y; } pair;
    memcpy(&pair, &bits, 4);
    return make_float2(to_float(pair.x), to_float(pair.y));
}

// 16 bytes of global or shared memory, aligned to 16. store16_if and load16_if, which gives zeros if not `wanted`, are of
// global memory and no branches, so that what surrounds them stays one sequence to the compiler: the instructions of one row
// can then fill the waits of another.
#ifdef SIMT_EMULATOR
// A vector register: a copy of the struct may be split in parts, which the count of bank conflicts would see.
inline uint4 load16(const void* p) { return simt::bit_cast<uint4>(*static_cast<const simt::Vector16*>(p)); }
inline void store16(void* p, uint4 v) { *static_cast<simt::Vector16*>(p) = simt::bit_cast<simt::Vector16>(v); }
inline uint4 load16_if(bool wanted, const void* p) { return wanted ? load16(p) : uint4{}; }
inline void store16_if(bool wanted, void* p, uint4 v) {
    if (wanted) store16(p, v);
}
inline void store8_shared(void* p, float2 v) { *static_cast<float2*>(p) = v; }
template <class T>
inline T* wide_at(T* p, int a, int b) { return (T*)((const char*)p + int64_t(a) * b); }
inline void prefetch_line(const void*) {}
template <class T, int N>
inline void keep(T (&)[N]) {}
inline float at_least(float x, float least) { return x < least ? least : x; }
inline float clipped(float x, float limit) { return x > limit ? limit : at_least(x, -limit); }
#else
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
// This and store16_if are written as instructions, since the compiler takes float2 and uint4 for several values: it wrote the
// gradients of inputs 4 bytes at a time.
__device__ __forceinline__ void store8_shared(void* p, float2 v) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(smem_address(p)), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ uint4 load16_if(bool wanted, const void* p) {
    uint4 v;
    asm volatile("{ .reg .pred wanted; setp.ne.u32 wanted, %5, 0;\n"
                 "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
                 "@wanted ld.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
                 : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
                 : "l"(__cvta_generic_to_global(p)), "r"(int(wanted)) : "memory");
    return v;
}
__device__ __forceinline__ void store16_if(bool wanted, void* p, uint4 v) {
    asm volatile("{ .reg .pred wanted; setp.ne.u32 wanted, %5, 0; @wanted st.global.v4.b32 [%0], {%1, %2, %3, %4}; }"
                 :: "l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(int(wanted)) : "memory");
}
// p + a b bytes. The compiler widens what does not change before a loop, and then multiplies by five instructions.
template <class T>
__device__ __forceinline__ T* wide_at(T* p, int a, int b) {
    int64_t bytes;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(bytes) : "r"(a), "r"(b));
    return (T*)((const char*)p + bytes);
}
// Brings the 128 bytes around p, in global memory, into the L2 cache.
__device__ __forceinline__ void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }
// Makes the compiler keep these 32-bit numbers in registers, where it might compute them again in a loop; and compute anew
// what depends on them, where it might take it out of the loop.
template <class T, int N>
__device__ __forceinline__ void keep(T (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i]));
}
// The larger of both, and x clipped to +-limit; NaN stays NaN.
__device__ __forceinline__ float at_least(float x, float least) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(least));
    return x;
}
__device__ __forceinline__ float clipped(float x, float limit) {
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(limit));
    return at_least(x, -limit);
}
#endif

template <class T>
__device__ __forceinline__ void unpack8(uint4 v, float (&x)[8]) {
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 f = unpack2<T>(w[i]);
        x[2 * i] = f.x, x[2 * i + 1] = f.y;
    }
}

template <class T>
__device__ __forceinline__ uint4 pack8(const float (&x)[8]) {
    return make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
}

// ---- clusters: blocks of a launch that run together (Launch::in_clusters_of), from sm_90 on ------
//
// Without one a block is a cluster by itself. cluster_arrive and cluster_wait are the two halves of a barrier for all
// threads of all blocks: what was done before the arrival is there after the wait, in shared memory of other blocks too.
// Each half is one instruction for the whole warp. Before a block reads another's shared memory, all must have met once,
// since the other may not have begun. They must meet again after the last read, since the other may end. There
// cluster_arrive_relaxed will do if all that was read has been used: it has no writes wait to be seen, which takes as long as
// a store to global memory.

#ifdef SIMT_EMULATOR

inline unsigned cluster_rank() { return simt::cluster_rank(); }
inline unsigned cluster_size() { return simt::cluster_size(); }
inline void cluster_arrive(SIMT_WHERE) { simt::cluster_arrive(at); }
inline void cluster_arrive_relaxed(SIMT_WHERE) { simt::cluster_arrive(at); }
inline void cluster_wait(SIMT_WHERE) { simt::cluster_wait(at); }
template <int OFFSET>
inline uint4 load16_of(const void* p, unsigned rank, SIMT_WHERE) {
    return simt::bit_cast<uint4>(simt::cluster_load16(smem_address(p) + OFFSET, rank, at));
}

#elif __CUDA_ARCH__ >= 900

// The block's number in its cluster, from 0 on along x, and how many blocks the cluster has.
__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
    unsigned size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Reads 16 bytes, aligned to 16, of the shared memory of the block with this rank, OFFSET bytes behind where p points to in
// this block's. The address is a generic one: with one of shared memory, each load would read a special register.
template <int OFFSET>
__device__ __forceinline__ uint4 load16_of(const void* p, unsigned rank) {
    uint64_t there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
    uint4 v;
    asm volatile("ld.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(there), "n"(OFFSET) : "memory");
    return v;
}

#endif

// ---- mma.sync.m16n8k16 --------------------------------------------------------------------------

template <class T> constexpr bool is_half = false;
template <> constexpr bool is_half<__half> = true;

#ifdef SIMT_EMULATOR

// On the emulator, a call for a tile meets once for the whole tile. The other branch shows what it computes.
template <class T, int M, int N>
inline void mma_tile(float (&d)[M][N][4], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2], SIMT_WHERE) {
    simt::mma(d, a[0], b[0], {M, N, is_half<T> ? simt::Element::f16 : simt::Element::bf16, simt::Accumulator::f32}, at);
}
template <int M, int N>
inline void mma_tile_f16(uint32_t (&d)[M][N][2], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2], const uint32_t (&c)[M][N][2],
                         SIMT_WHERE) {
    memmove(d, c, sizeof d);
    simt::mma(d, a[0], b[0], {M, N, simt::Element::f16, simt::Accumulator::f16}, at);
}
template <int M, int N>
inline void mma_tile_f16(uint32_t (&d)[M][N][2], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2], SIMT_WHERE) {
    memset(d, 0, sizeof d);
    simt::mma(d, a[0], b[0], {M, N, simt::Element::f16, simt::Accumulator::f16}, at);
}
template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_WHERE) {
    simt::mma(d, a, b, {1, 1, is_half<T> ? simt::Element::f16 : simt::Element::bf16, simt::Accumulator::f32}, at);
}
inline void mma_f16(uint32_t (&d)[2], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_WHERE) {
    simt::mma(d, a, b, {1, 1, simt::Element::f16, simt::Accumulator::f16}, at);
}

#else

// d += a * b, T = __half or __nv_bfloat16, f32 accumulators.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (is_half<T>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d = a * b + c in f16 with f16 accumulators: twice the rate on GeForce cards.
__device__ __forceinline__ void mma_f16(uint32_t (&d)[2], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t c0,
                                        uint32_t c1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%9};"
        : "=r"(d[0]), "=r"(d[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c0), "r"(c1));
}
__device__ __forceinline__ void mma_f16(uint32_t (&d)[2], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_f16(d, a, b, d[0], d[1]);
}

// d[i][j] += a[i] * b[j]: a warp's tile of 16 M x 8 N.
template <class T, int M, int N>
__device__ __forceinline__ void mma_tile(float (&d)[M][N][4], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2]) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < N; j++) mma<T>(d[i][j], a[i], b[j]);
}
// d[i][j] = a[i] * b[j] + c[i][j] with sums in f16; c may be d. Without c nothing is added, and no zero moved into a register.
template <int M, int N>
__device__ __forceinline__ void mma_tile_f16(uint32_t (&d)[M][N][2], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2],
                                             const uint32_t (&c)[M][N][2]) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < N; j++) mma_f16(d[i][j], a[i], b[j], c[i][j][0], c[i][j][1]);
}
template <int M, int N>
__device__ __forceinline__ void mma_tile_f16(uint32_t (&d)[M][N][2], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2]) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < N; j++) mma_f16(d[i][j], a[i], b[j], 0u, 0u);
}

#endif

// ---- ldmatrix -----------------------------------------------------------------------------------

// r[0..MATRICES] of one ldmatrix.x1, .x2 or .x4; `row` as explained above.
#ifdef SIMT_EMULATOR

template <bool TRANS = false, int MATRICES>
inline void ldmatrix(uint32_t (&r)[MATRICES], smem_addr row, SIMT_WHERE) {
    simt::ldmatrix(r, &row, 1, MATRICES, TRANS, at);
}
template <bool TRANS = false, int N, int MATRICES>
inline void ldmatrix_n(uint32_t (&r)[N][MATRICES], const smem_addr (&rows)[N], SIMT_WHERE) {
    simt::ldmatrix(r[0], rows, N, MATRICES, TRANS, at);
}

#else

template <bool TRANS = false, int MATRICES>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[MATRICES], smem_addr row) {
    static_assert(MATRICES == 1 || MATRICES == 2 || MATRICES == 4, "ldmatrix is x1, x2 or x4");
    if constexpr (MATRICES == 1 && !TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row) : "memory");
    if constexpr (MATRICES == 1 && TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row) : "memory");
    if constexpr (MATRICES == 2 && !TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
    if constexpr (MATRICES == 2 && TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
    if constexpr (MATRICES == 4 && !TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
    if constexpr (MATRICES == 4 && TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

// N of them.
template <bool TRANS = false, int N, int MATRICES>
__device__ __forceinline__ void ldmatrix_n(uint32_t (&r)[N][MATRICES], const smem_addr (&rows)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) ldmatrix<TRANS>(r[i], rows[i]);
}

#endif

// ---- cp.async -----------------------------------------------------------------------------------

// Copies BYTES (16, 8 or 4) from global to shared memory, both aligned to BYTES, or fills
// with zeros if not `valid`; then nothing is read, and `src` may be any address. 16 bytes go past L1 unless they are KEPT there. The
// bytes are there for this thread after a cp_async_wait, for others after a barrier that follows it.
#ifdef SIMT_EMULATOR

template <int BYTES = 16, bool KEPT = false>
inline void cp_async(smem_addr dst, const void* src, bool valid = true, SIMT_WHERE) {
    simt::cp_async(reinterpret_cast<void*>(dst), src, BYTES, valid ? BYTES : 0, at);
}
inline void cp_async_commit() { simt::cp_async_commit(); }
template <int GROUPS_LEFT>
inline void cp_async_wait() { simt::cp_async_wait(GROUPS_LEFT); }

#else

template <int BYTES = 16, bool KEPT = false>
__device__ __forceinline__ void cp_async(smem_addr dst, const void* src, bool valid = true) {
    static_assert(BYTES == 16 || BYTES == 8 || BYTES == 4, "cp.async copies 16, 8 or 4 bytes");
    size_t global = __cvta_generic_to_global(src);
    if constexpr (BYTES == 16 && !KEPT)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(dst), "l"(global), "r"(valid ? 16 : 0) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :: "r"(dst), "l"(global), "n"(BYTES), "r"(valid ? BYTES : 0) : "memory");
}
// Closes a group of the copies issued since the last commit; it may be empty.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most GROUPS_LEFT of this thread's groups are still in flight.
template <int GROUPS_LEFT>
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(GROUPS_LEFT) : "memory"); }

#endif

// ---- approximate functions ----------------------------------------------------------------------

// One instruction each, wrong by at most 2 units in the last place. Denormals count as zero.
#ifdef SIMT_EMULATOR

inline float exp2_fast(float x) { return exp2f(x); }
inline float sqrt_fast(float x) { return sqrtf(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }

#else

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float sqrt_fast(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif

// ---- warp reductions ----------------------------------------------------------------------------

// Reductions over all 32 lanes, with the same result in each.
#ifdef SIMT_EMULATOR

inline float warp_sum(float x, SIMT_WHERE) { return simt::warp_reduce(x, false, at); }
inline float warp_max(float x, SIMT_WHERE) { return simt::warp_reduce(x, true, at); }

#else

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int by = 16; by; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int by = 16; by; by /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, by));
    return x;
}

#endif
