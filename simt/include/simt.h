// CUDA C++ for the host compiler: what a .cu file sees instead of the CUDA headers when it is
// compiled for the CPU (`g++ -x c++ -include simt.h kernel.cu`). README.md tells the whole story.
//
// A block's threads are fibers of one OS thread. Device code runs as plain C++ until it meets a
// barrier or a warp collective; there a thread deposits pointers to its own variables and lets
// another run, and the last to arrive computes for all.
#pragma once
#include <cstddef>
// std::cyl_bessel_i and the like are two thirds of math.h. simt-check asks for them where a file names one.
#ifndef SIMT_SPECIAL_FUNCTIONS
#undef _GLIBCXX_USE_STD_SPEC_FUNCS
#endif
// Before math.h: a maximum must not hide a read of unwritten memory. Whoever calls one of these by whatever name calls what
// simt.cpp has under the name behind asm.
extern "C" {
float fmaxf(float, float) noexcept asm("simt_fmaxf");
float fminf(float, float) noexcept asm("simt_fminf");
double fmax(double, double) noexcept asm("simt_fmax");
double fmin(double, double) noexcept asm("simt_fmin");
}
#ifndef SIMT_RUNTIME
// Of a size that only the running kernel knows, they are checked as loads and stores are; malloc in a kernel is the device's.
extern "C" {
void* memcpy(void*, const void*, __SIZE_TYPE__) noexcept asm("simt_memcpy");
void* memmove(void*, const void*, __SIZE_TYPE__) noexcept asm("simt_memmove");
void* memset(void*, int, __SIZE_TYPE__) noexcept asm("simt_memset");
void* malloc(__SIZE_TYPE__) noexcept asm("simt_malloc");
void free(void*) noexcept asm("simt_free");
}
#endif
#include <math.h>  // not cmath: isnan and friends in the global namespace, as in CUDA
#include <stdlib.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#ifndef __x86_64__
#error "the emulator's context switch is written for x86-64"
#endif

#define SIMT_EMULATOR 1
#define __global__
#define __device__
#define __host__
// By this mark the source step knows them. Nothing else says it, and it changes nothing.
#define __constant__ __attribute__((aligned(sizeof(char))))
#define __managed__
// Each access asks __tls_get_addr where the variable is; that is a function of ours, simt.cpp.
#define __shared__ __attribute__((tls_model("global-dynamic"))) thread_local
#define __grid_constant__
#define __launch_bounds__(...)
#ifdef SIMT_SOURCE_STEP
#define __cluster_dims__(...) simt_cluster_dims(__VA_ARGS__)  // the source step takes it out
#endif
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __CUDACC__ 1
#define __CUDACC_VER_MAJOR__ 12
#define __CUDACC_VER_MINOR__ 4
#define CUDART_VERSION 12040
#define __align__(n) __attribute__((aligned(n)))

// ---- vector types ---------------------------------------------------------------------------

#define SIMT_VECTORS(T, name, align2, align4)                                                 \
    struct name##1 { T x; };                                                                  \
    struct alignas(align2) name##2 { T x, y; };                                               \
    struct name##3 { T x, y, z; };                                                            \
    struct alignas(align4) name##4 { T x, y, z, w; };                                         \
    inline name##1 make_##name##1(T x) { return {x}; }                                        \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                        \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(float, float, 8, 16)
SIMT_VECTORS(double, double, 16, 16)
SIMT_VECTORS(signed char, char, 2, 4)
SIMT_VECTORS(unsigned char, uchar, 2, 4)
SIMT_VECTORS(short, short, 4, 8)
SIMT_VECTORS(unsigned short, ushort, 4, 8)
SIMT_VECTORS(int, int, 8, 16)
SIMT_VECTORS(unsigned, uint, 8, 16)
SIMT_VECTORS(long, long, 16, 16)
SIMT_VECTORS(unsigned long, ulong, 16, 16)
SIMT_VECTORS(long long, longlong, 16, 16)
SIMT_VECTORS(unsigned long long, ulonglong, 16, 16)
#undef SIMT_VECTORS
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
    int nth;  // of several barriers on the line, as the source step counts them
    constexpr Where(const char* file = __builtin_FILE(), int line = __builtin_LINE(), int nth = 0) : file(file), line(line), nth(nth) {}
};
#define SIMT_WHERE simt::Where at = {}

typedef uint32_t Vector16 __attribute__((vector_size(16), may_alias));

// What the running thread sees of itself.
struct View {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
    mutable bool carry;  // of inline PTX: from `add.cc` to `addc`
};
// It lies where the reservation begins that holds the stacks of an OS thread's fibers, aligned to its size: the stack
// pointer says where.
constexpr uintptr_t kReservation = uintptr_t(128) << 20;
inline const View* view() {
    uintptr_t sp;
    asm("movq %%rsp, %0" : "=r"(sp));
    return reinterpret_cast<const View*>(sp & ~(kReservation - 1));
}

// A warp-wide operation. `lanes[i]` is what lane i deposited: a pointer into its own stack.
struct Op {
    const char* name;
    void (*run)(void* const* lanes, uint32_t mask, const void* imm);
    bool whole_warp = false;  // undefined if a lane has left the kernel
};
void collective(const Op& op, uint32_t mask, void* data, const void* imm, Where at);
void barrier(Where at);
int barrier_count(bool predicate, Where at);  // of the threads that came
void grid_barrier(Where at);
bool is_cooperative();  // the launch
// Clusters (clusters.cpp): the block's rank in its cluster and the number of blocks there, 0 and 1 without one; the barrier of
// all their threads, in two halves; 16 bytes of a block's shared memory, at the address that they have in this block's; and
// where that block has what `p` points to.
unsigned cluster_rank();
unsigned cluster_size();
void cluster_arrive(Where at);
void cluster_wait(Where at);
Vector16 cluster_load16(uintptr_t address, unsigned rank, Where at);
void* cluster_pointer(const void* p, unsigned rank, Where at);
dim3 cluster_dim();
bool add_cluster_dims(const char* kernel, dim3 dims);  // of a kernel that has __cluster_dims__
void let_others_run();
bool on_device();  // whether a kernel is running here
void fence(bool of_device = true);  // else of the block
// Programmatic dependent launch: returns when the launches before this one are over; lets the next one begin.
void wait_for_launches();
void let_next_launch_begin();
[[noreturn]] void trap(const char* message, Where at);

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
// The lanes that have this lane's bits; those of the mask if all have, else none.
uint32_t match(uint32_t mask, uint64_t bits, bool all, Where at);
// The lanes of the warp that come to this line before the others of the warp wait or leave.
uint32_t converged(Where at);

// `apply` changes the word by the operand; `before` receives what was there.
void atomic(void* address, size_t bytes, void* before, const void* operand, void (*apply)(void* word, const void* operand), Where at);
// Every lane's value becomes the one that `combine` makes of all.
void reduce(uint32_t mask, void* value, size_t bytes, void (*combine)(void* to, const void* from), Where at);
int lane();

// Addresses in shared memory as PTX has them, in 32 bits.
uint32_t shared_offset(const void* p);
void* shared_pointer(uint32_t offset);
void* dynamic_shared();
enum class Space { none, global, shared, constant, local };
Space space_of(const void* p);
// A __constant__ variable, which kernels may not write.
bool add_constant(const void* variable, size_t bytes);

// Hopper (hopper.cpp); ../hopper.cuh explains what each computes. Addresses are in shared memory.
void mbarrier_init(uintptr_t barrier, uint32_t arrivals, Where at);
void mbarrier_init_fence(Where at);
void mbarrier_arrive(uintptr_t barrier, uint32_t bytes, Where at);
void mbarrier_wait(uintptr_t barrier, uint32_t parity, Where at);
void named_barrier(int id, int threads, Where at);
void named_arrive(int id, int threads, Where at);
bool use_named_barriers();  // simt-check calls it where a file has any, before main
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

// Registers of inline PTX have a size, and no type but that of the instruction.
template <class T, class From>
inline T register_as(From value) {
    if constexpr (std::is_pointer_v<From>) return T(uintptr_t(value));
    else if constexpr (std::is_floating_point_v<T> != std::is_floating_point_v<From> && sizeof(T) == sizeof(From)) return bit_cast<T>(value);
    else if constexpr (std::is_floating_point_v<T> && !std::is_floating_point_v<From>) return bit_cast<T>(std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>(value));
    else return T(value);
}
template <class To, class T>
inline void set_register(To& to, T value) {
    if constexpr (std::is_pointer_v<To>) to = reinterpret_cast<To>(uintptr_t(value));
    else to = register_as<To>(value);
}

// PTX with a carry, or a borrow: `takes` it in, `sets` it.
template <class T>
inline T added(T a, T b, bool takes, bool sets) {
    std::make_unsigned_t<T> x = a, y = b, all;
    const bool one = takes && view()->carry, over = __builtin_add_overflow(x, y, &all), more = __builtin_add_overflow(all, one, &all);
    if (sets) view()->carry = over || more;
    return T(all);
}
template <class T>
inline T subtracted(T a, T b, bool takes, bool sets) {
    std::make_unsigned_t<T> x = a, y = b, all;
    const bool one = takes && view()->carry, under = __builtin_sub_overflow(x, y, &all), more = __builtin_sub_overflow(all, one, &all);
    if (sets) view()->carry = under || more;
    return T(all);
}
template <class T> inline T product_lo(T a, T b) { return T(std::make_unsigned_t<T>(a) * std::make_unsigned_t<T>(b)); }
template <class T> inline T product_hi(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return T(Wide(a) * Wide(b) >> sizeof(T) * 8);
}

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

// kernel<<<grid, block, shared, stream>>>(arguments), as simt-check writes it: `call` is a lambda that calls the kernel.
struct Config {
    dim3 grid, block;
    size_t shared;
    bool cooperative;
    dim3 cluster;  // blocks of one
    template <class Stream = void*>
    Config(dim3 grid, dim3 block, size_t shared = 0, Stream = {}, bool cooperative = false) : grid(grid), block(block), shared(shared), cooperative(cooperative) {}
};
void run(const char* name, const Config& config, void (*thunk)(const Kernel&, const unsigned char* params), const void* params, size_t bytes);

template <class T> struct Same { using type = T; };
template <class T> using Plain = typename Same<T>::type;  // of which no T is deduced

// A literal 0 among a launch's arguments.
struct Zero {
    template <class T> operator T() const { return T(0); }
};

template <class F, class... A>
struct Call {
    F call;
    std::tuple<A...> arguments;
    static void thunk(const Kernel&, const unsigned char* params) {
        const Call& self = *reinterpret_cast<const Call*>(params);
        std::apply(self.call, self.arguments);
    }
};
template <class F, class... A>
void launch(const char* name, const Config& config, F call, A&&... arguments) {
    using C = Call<F, std::decay_t<A>...>;
    static_assert(sizeof(C) <= 32764, "at most 32764 bytes of arguments");
    const C packed = {call, std::tuple<std::decay_t<A>...>(arguments...)};
    run(name, config, C::thunk, &packed, sizeof packed);
}

// Of a kernel that is no template's: its parameters say what an argument in braces is.
template <class... P>
void launch_as(const char* name, const Config& config, void (*kernel)(P...), Plain<std::decay_t<P>>... arguments) {
    launch(name, config, [=](auto... a) { kernel(a...); }, arguments...);
}

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

// ---- built-in variables and functions -------------------------------------------------------

// simt-check's source step puts these in their places, so that a program's own variables may have the names.
#if !defined(SIMT_SOURCE_STEP) && !defined(SIMT_RUNTIME)
#define threadIdx (simt::view()->thread)
#define blockIdx (simt::view()->block)
#define blockDim (simt::view()->block_dim)
#define gridDim (simt::view()->grid_dim)
#endif
constexpr int warpSize = 32;

#include "functions.h"
