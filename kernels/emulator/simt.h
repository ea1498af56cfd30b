// CUDA C++ for the host compiler: what a .cu file sees instead of the CUDA headers when it is
// compiled for the CPU (`g++ -x c++ -include simt.h kernel.cu`). README.md tells the whole story.
//
// A block's threads are fibers of one OS thread. Device code runs as plain C++ until it meets a
// barrier or a warp collective; there a thread deposits pointers to its own variables and lets
// another run, and the last to arrive computes for all.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifndef __x86_64__
#error "the emulator's context switch is written for x86-64"
#endif

#define SIMT_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

// ---- vector types ---------------------------------------------------------------------------

#define SIMT_VECTORS(T, name, align2, align4)                                                 \
    struct alignas(align2) name##2 { T x, y; };                                               \
    struct name##3 { T x, y, z; };                                                            \
    struct alignas(align4) name##4 { T x, y, z, w; };                                         \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                        \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(float, float, 8, 16)
SIMT_VECTORS(int, int, 8, 16)
SIMT_VECTORS(unsigned, uint, 8, 16)
SIMT_VECTORS(unsigned short, ushort, 4, 8)
SIMT_VECTORS(unsigned char, uchar, 2, 4)
#undef SIMT_VECTORS
struct alignas(16) double2 { double x, y; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#include "half.h"

// ---- the runtime's interface ----------------------------------------------------------------

namespace simt {

// Where in the kernel's source something was called: two calls are the same instruction if and
// only if these agree. As a default argument it names the caller's line.
struct Where {
    const char* file;
    int line;
    constexpr Where(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
};
#define SIMT_WHERE simt::Where at = {}

typedef uint32_t Vector16 __attribute__((vector_size(16), may_alias));

// What the running thread sees of itself.
struct View {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
};
extern __thread View* view __attribute__((tls_model("initial-exec")));

// A warp-wide operation. `lanes[i]` is what lane i deposited: a pointer into its own stack.
struct Op {
    const char* name;
    void (*run)(void* const* lanes, uint32_t mask, const void* imm);
};
void collective(const Op& op, uint32_t mask, void* data, const void* imm, Where at);
void barrier(Where at);
[[noreturn]] void trap(const char* message, Where at);

void* static_shared(const void* site, size_t bytes, size_t align);
void* dynamic_shared(size_t align);

void cp_async(void* dst, const void* src, int bytes, int copied, Where at);
void cp_async_commit();
void cp_async_wait(int groups_left);

enum class Element { f16, bf16 };
enum class Accumulator { f32, f16 };
// Tile of m x n products m16n8k16; fragments as in ptx.cuh, one after the other.
struct MmaShape {
    int m, n;
    Element element;
    Accumulator accumulator;
};
void mma(void* d, const uint32_t* a, const uint32_t* b, const MmaShape& shape, Where at);
// `count` ldmatrix instructions of `matrices` 8x8 tiles; `rows` holds one address for each.
void ldmatrix(uint32_t* registers, const uintptr_t* rows, int count, int matrices, bool trans, Where at);
float warp_reduce(float value, bool maximum, Where at);

enum class Shuffle { index, up, down, lane_xor };
void shuffle(Shuffle kind, uint32_t mask, void* value, size_t size, int operand, int width, Where at);
uint32_t ballot(uint32_t mask, bool predicate, Where at);

enum class Atomic { add, min, max, exchange };
template <class T>
T atomic(Atomic op, T* address, T value, Where at);
template <class T>
T atomic_cas(T* address, T expected, T desired, Where at);

// Hopper (hopper.cpp); ../hopper.cuh explains what each computes. Addresses are in shared memory.
void mbarrier_init(uintptr_t barrier, uint32_t arrivals, Where at);
void mbarrier_init_fence(Where at);
void mbarrier_arrive(uintptr_t barrier, uint32_t bytes, Where at);
void mbarrier_wait(uintptr_t barrier, uint32_t parity, Where at);
void named_barrier(int id, int threads, Where at);
void async_fence(Where at);
struct Box {  // where a bulk copy begins: x, y, or c, w, h, n with offsets
    bool im2col;
    int at[4], offset[2];
};
void bulk_load(uintptr_t to, const void* map, uintptr_t barrier, const Box& box, Where at);
uint64_t wgmma_descriptor(uintptr_t address, uint32_t leading, uint32_t stride, Where at);
struct WgmmaShape {
    int n;
    Element element;
    bool mn_major;
};
void wgmma(float* d, uint64_t a, uint64_t b, const WgmmaShape& shape, Where at);
void wgmma_fence(Where at);
void wgmma_commit(Where at);
void wgmma_wait(int groups_left, Where at);

// Kernels register themselves by name before main; the argument types come from the signature.
struct Kernel {
    const char* name;
    bool hopper;  // may use what only sm_90a has
    void (*thunk)(const Kernel&, const unsigned char* params);
    void (*function)();
    int nargs;
    const size_t* sizes;
    const size_t* offsets;
};
void add_kernel(const Kernel&);

template <class... A>
struct Signature {
    static constexpr size_t sizes[sizeof...(A) + 1] = {sizeof(A)..., 0};
    struct Offsets {
        size_t at[sizeof...(A) + 1];
        constexpr Offsets() : at() {
            constexpr size_t aligns[] = {alignof(A)..., 1};
            size_t end = 0;
            for (size_t i = 0; i < sizeof...(A); i++) {
                at[i] = (end + aligns[i] - 1) / aligns[i] * aligns[i];
                end = at[i] + sizes[i];
            }
            at[sizeof...(A)] = end;
        }
    };
    static constexpr Offsets offsets{};

    template <size_t... I>
    __attribute__((no_sanitize("thread"), always_inline)) static inline void call(
        void (*f)(A...), const unsigned char* params, std::index_sequence<I...>) {
        f(*reinterpret_cast<const A*>(params + offsets.at[I])...);
    }
    // Not instrumented: it reads the launch's parameters, which are host memory.
    __attribute__((no_sanitize("thread"))) static void thunk(const Kernel& k, const unsigned char* params) {
        call(reinterpret_cast<void (*)(A...)>(k.function), params, std::index_sequence_for<A...>());
    }
};

struct Register {
    template <class... A>
    Register(const char* name, bool hopper, void (*function)(A...)) {
        using S = Signature<std::remove_const_t<A>...>;
        add_kernel({name, hopper, S::thunk, reinterpret_cast<void (*)()>(function), int(sizeof...(A)), S::sizes,
                    S::offsets.at});
    }
};

}  // namespace simt

#define KERNEL_EXPORT(kernel) static const simt::Register simt_register_##kernel(#kernel, false, kernel)
#define KERNEL_EXPORT_HOPPER(kernel) static const simt::Register simt_register_##kernel(#kernel, true, kernel)

// The address of the static names the array, also in each instance of a template.
#define SHARED(type, name, dims)              \
    static const char simt_site_##name = 0;   \
    typedef type simt_type_##name dims;       \
    auto& name = *static_cast<simt_type_##name*>( \
        simt::static_shared(&simt_site_##name, sizeof(simt_type_##name), alignof(simt_type_##name)))
#define DYN_SMEM(type, name) type* const name = static_cast<type*>(simt::dynamic_shared(alignof(type)))

// ---- built-in variables and functions -------------------------------------------------------

#define threadIdx (simt::view->thread)
#define blockIdx (simt::view->block)
#define blockDim (simt::view->block_dim)
#define gridDim (simt::view->grid_dim)
#define warpSize 32

inline void __syncthreads(SIMT_WHERE) { simt::barrier(at); }
void __syncwarp(uint32_t mask = 0xffffffffu, SIMT_WHERE);
inline void __trap(SIMT_WHERE) { simt::trap("__trap() was called", at); }
inline void __threadfence() {}
inline void __threadfence_block() {}
#undef assert
#define assert(condition) ((condition) ? void(0) : simt::trap("assertion failed: " #condition, {__FILE__, __LINE__}))

#define SIMT_SHUFFLE(name, kind, operand_type)                                                         \
    template <class T>                                                                                 \
    inline T name(uint32_t mask, T value, operand_type operand, int width = 32, SIMT_WHERE) {          \
        static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2, "2, 4 or 8 bytes a lane"); \
        simt::shuffle(simt::Shuffle::kind, mask, &value, sizeof value, int(operand), width, at);       \
        return value;                                                                                  \
    }
SIMT_SHUFFLE(__shfl_sync, index, int)
SIMT_SHUFFLE(__shfl_up_sync, up, unsigned)
SIMT_SHUFFLE(__shfl_down_sync, down, unsigned)
SIMT_SHUFFLE(__shfl_xor_sync, lane_xor, int)
#undef SIMT_SHUFFLE
inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_WHERE) { return simt::ballot(mask, predicate, at); }
inline int __any_sync(uint32_t mask, int predicate, SIMT_WHERE) { return simt::ballot(mask, predicate, at) != 0; }
inline int __all_sync(uint32_t mask, int predicate, SIMT_WHERE) { return simt::ballot(mask, predicate, at) == mask; }

// float: add, exchange; int, unsigned, unsigned long long: all.
template <class T> inline T atomicAdd(T* p, T v, SIMT_WHERE) { return simt::atomic(simt::Atomic::add, p, v, at); }
template <class T> inline T atomicMin(T* p, T v, SIMT_WHERE) { return simt::atomic(simt::Atomic::min, p, v, at); }
template <class T> inline T atomicMax(T* p, T v, SIMT_WHERE) { return simt::atomic(simt::Atomic::max, p, v, at); }
template <class T> inline T atomicExch(T* p, T v, SIMT_WHERE) { return simt::atomic(simt::Atomic::exchange, p, v, at); }
template <class T> inline T atomicCAS(T* p, T e, T v, SIMT_WHERE) { return simt::atomic_cas(p, e, v, at); }

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcg(T* p, T v) { *p = v; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }

template <class T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T> constexpr T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }  // NaN gives 0
// Exact reduction to [-1, 1) before pi comes in, as on the device.
inline float sinpif(float x) { return float(sin(M_PI * (x - 2.0 * floor(x / 2.0 + 0.5)))); }
inline float cospif(float x) { return float(cos(M_PI * (x - 2.0 * floor(x / 2.0 + 0.5)))); }
inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }

inline int __float_as_int(float x) { return simt::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return simt::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return simt::bit_cast<float>(x); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline int __float2int_rd(float x) { return int(floorf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
