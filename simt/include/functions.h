// CUDA's device functions: warp collectives, atomics, arithmetic. Part of simt.h; half.h has those of 16-bit types.
#pragma once
#include <climits>
#include <ctime>

// ---- barriers, shuffles, votes --------------------------------------------------------------------

inline void __syncthreads(SIMT_WHERE) { simt::barrier(at); }
inline int __syncthreads_count(int predicate, SIMT_WHERE) { return simt::barrier_count(predicate != 0, at); }
inline int __syncthreads_or(int predicate, SIMT_WHERE) { return simt::barrier_count(predicate != 0, at) != 0; }
inline int __syncthreads_and(int predicate, SIMT_WHERE) { return simt::barrier_count(predicate == 0, at) == 0; }
void __syncwarp(uint32_t mask = 0xffffffffu, SIMT_WHERE);
inline void __trap(SIMT_WHERE) { simt::trap("__trap() was called", at); }
inline void __threadfence() { simt::fence(); }
inline void __threadfence_system() { simt::fence(); }
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}
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
inline int __all_sync(uint32_t mask, int predicate, SIMT_WHERE) { return simt::ballot(mask, !predicate, at) == 0; }
// Whoever happens to be converged: alone is a legal answer.
inline uint32_t __activemask() { return 1u << (simt::lane() & 31); }

// Over the lanes of the mask, the same in each.
#define SIMT_REDUCE(name, T, expression)                                                                           \
    inline T name(uint32_t mask, T value, SIMT_WHERE) {                                                            \
        simt::reduce(mask, &value, sizeof value,                                                                   \
                     [](void* to, const void* from) {                                                              \
                         const T a = *static_cast<T*>(to), b = *static_cast<const T*>(from);                       \
                         *static_cast<T*>(to) = expression;                                                        \
                     }, at);                                                                                       \
        return value;                                                                                              \
    }
SIMT_REDUCE(__reduce_add_sync, unsigned, a + b)
SIMT_REDUCE(__reduce_add_sync, int, a + b)
SIMT_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
SIMT_REDUCE(__reduce_min_sync, int, a < b ? a : b)
SIMT_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a)
SIMT_REDUCE(__reduce_max_sync, int, a < b ? b : a)
SIMT_REDUCE(__reduce_and_sync, unsigned, a & b)
SIMT_REDUCE(__reduce_or_sync, unsigned, a | b)
SIMT_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef SIMT_REDUCE

// ---- atomics: the types that CUDA has ---------------------------------------------------------------

// `expression` of what was there, `old`, and the operand, `value`.
#define SIMT_ATOMIC_SCOPE(name, T, expression)                                                  \
    inline T name(T* address, T value, SIMT_WHERE) {                                            \
        T before;                                                                               \
        simt::atomic(address, sizeof(T), &before, &value, [](void* word, const void* operand) { \
            const T old = *static_cast<T*>(word), value = *static_cast<const T*>(operand);      \
            (void)old, (void)value;                                                             \
            *static_cast<T*>(word) = expression;                                                \
        }, at);                                                                                 \
        return before;                                                                          \
    }
#define SIMT_ATOMIC(name, T, expression)           \
    SIMT_ATOMIC_SCOPE(name, T, expression)         \
    SIMT_ATOMIC_SCOPE(name##_block, T, expression) \
    SIMT_ATOMIC_SCOPE(name##_system, T, expression)
#define SIMT_ATOMIC_INTEGERS(name, expression) \
    SIMT_ATOMIC(name, int, expression)         \
    SIMT_ATOMIC(name, unsigned, expression)    \
    SIMT_ATOMIC(name, unsigned long long, expression)
SIMT_ATOMIC_INTEGERS(atomicAdd, old + value)
SIMT_ATOMIC(atomicAdd, float, old + value)
SIMT_ATOMIC(atomicAdd, double, old + value)
SIMT_ATOMIC(atomicAdd, __half, __hadd(old, value))
SIMT_ATOMIC(atomicAdd, __half2, __hadd2(old, value))
SIMT_ATOMIC(atomicAdd, __nv_bfloat16, __hadd(old, value))
SIMT_ATOMIC(atomicAdd, __nv_bfloat162, __hadd2(old, value))
SIMT_ATOMIC(atomicSub, int, old - value)
SIMT_ATOMIC(atomicSub, unsigned, old - value)
SIMT_ATOMIC_INTEGERS(atomicExch, value)
SIMT_ATOMIC(atomicExch, float, value)
SIMT_ATOMIC_INTEGERS(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicMin, long long, value < old ? value : old)
SIMT_ATOMIC_INTEGERS(atomicMax, old < value ? value : old)
SIMT_ATOMIC(atomicMax, long long, old < value ? value : old)
SIMT_ATOMIC_INTEGERS(atomicAnd, old & value)
SIMT_ATOMIC_INTEGERS(atomicOr, old | value)
SIMT_ATOMIC_INTEGERS(atomicXor, old ^ value)
SIMT_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
#undef SIMT_ATOMIC_INTEGERS
#undef SIMT_ATOMIC
#undef SIMT_ATOMIC_SCOPE

#define SIMT_ATOMIC_CAS(T)                                                                                   \
    inline T atomicCAS(T* address, T expected, T desired, SIMT_WHERE) {                                      \
        T before;                                                                                            \
        const T operands[2] = {expected, desired};                                                           \
        simt::atomic(address, sizeof(T), &before, operands, [](void* word, const void* operand) {            \
            const T* pair = static_cast<const T*>(operand);                                                  \
            if (*static_cast<T*>(word) == pair[0]) *static_cast<T*>(word) = pair[1];                         \
        }, at);                                                                                              \
        return before;                                                                                       \
    }
SIMT_ATOMIC_CAS(int)
SIMT_ATOMIC_CAS(unsigned)
SIMT_ATOMIC_CAS(unsigned short)
SIMT_ATOMIC_CAS(unsigned long long)
#undef SIMT_ATOMIC_CAS

// ---- memory ---------------------------------------------------------------------------------------

#define SIMT_LOAD(name) template <class T> inline T name(const T* p) { return *p; }
SIMT_LOAD(__ldg) SIMT_LOAD(__ldcg) SIMT_LOAD(__ldca) SIMT_LOAD(__ldcs) SIMT_LOAD(__ldlu) SIMT_LOAD(__ldcv)
#undef SIMT_LOAD
#define SIMT_STORE(name) template <class T> inline void name(T* p, T v) { *p = v; }
SIMT_STORE(__stwb) SIMT_STORE(__stcg) SIMT_STORE(__stcs) SIMT_STORE(__stwt)
#undef SIMT_STORE

// A 32-bit address in shared memory, as PTX instructions take it; and back.
inline size_t __cvta_generic_to_shared(const void* p) { return simt::shared_offset(p); }
inline void* __cvta_shared_to_generic(size_t offset) { return simt::shared_pointer(uint32_t(offset)); }
inline size_t __cvta_generic_to_global(const void* p) { return size_t(p); }
inline void* __cvta_global_to_generic(size_t p) { return reinterpret_cast<void*>(p); }
inline unsigned __isShared(const void* p) { return simt::is_shared_address(p); }

// ---- min and max: the overloads of CUDA's headers, mixed signs become unsigned -----------------------

#define SIMT_MINMAX(T, A, B)                                                \
    constexpr T min(A a, B b) { return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a); } \
    constexpr T max(A a, B b) { return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a); }
#define SIMT_MINMAX_SIGNS(T)             \
    SIMT_MINMAX(T, T, T)                 \
    SIMT_MINMAX(unsigned T, unsigned T, unsigned T) \
    SIMT_MINMAX(unsigned T, T, unsigned T) \
    SIMT_MINMAX(unsigned T, unsigned T, T)
SIMT_MINMAX_SIGNS(int)
SIMT_MINMAX_SIGNS(long)
SIMT_MINMAX_SIGNS(long long)
#undef SIMT_MINMAX_SIGNS
#undef SIMT_MINMAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(double(a), b); }
inline double max(float a, double b) { return fmax(double(a), b); }
inline double min(double a, float b) { return fmin(a, double(b)); }
inline double max(double a, float b) { return fmax(a, double(b)); }
inline unsigned umin(unsigned a, unsigned b) { return min(a, b); }
inline unsigned umax(unsigned a, unsigned b) { return max(a, b); }

// ---- floats ---------------------------------------------------------------------------------------

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rcbrtf(float x) { return 1.0f / cbrtf(x); }
inline float rhypotf(float x, float y) { return 1.0f / hypotf(x, y); }
inline float norm3df(float x, float y, float z) { return sqrtf(x * x + y * y + z * z); }
inline float norm4df(float x, float y, float z, float w) { return sqrtf(x * x + y * y + z * z + w * w); }
inline float normcdff(float x) { return float(0.5 * erfc(-double(x) / M_SQRT2)); }
inline double normcdf(double x) { return 0.5 * erfc(-x / M_SQRT2); }
inline float fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return exp10f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline void __sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return float(1.0 / sqrt(double(x))); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }  // NaN gives 0
// Exact reduction to [-1, 1) before pi comes in, as on the device.
inline double sinpi(double x) { return sin(M_PI * (x - 2.0 * floor(x / 2.0 + 0.5))); }
inline double cospi(double x) { return cos(M_PI * (x - 2.0 * floor(x / 2.0 + 0.5))); }
inline float sinpif(float x) { return float(sinpi(x)); }
inline float cospif(float x) { return float(cospi(x)); }
inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }

// ---- conversions: they saturate, and NaN gives 0 ------------------------------------------------------

namespace simt {
template <class T>
inline T saturate(double x) {
    constexpr double low = double(std::numeric_limits<T>::min()), high = double(std::numeric_limits<T>::max());
    if (x != x) return 0;
    return x <= low ? std::numeric_limits<T>::min() : x >= high ? std::numeric_limits<T>::max() : T(x);
}
}  // namespace simt
#define SIMT_TO_INTEGER(from, From, to, To)                                                   \
    inline To __##from##2##to##_rn(From x) { return simt::saturate<To>(nearbyint(double(x))); } \
    inline To __##from##2##to##_rz(From x) { return simt::saturate<To>(trunc(double(x))); }     \
    inline To __##from##2##to##_rd(From x) { return simt::saturate<To>(floor(double(x))); }     \
    inline To __##from##2##to##_ru(From x) { return simt::saturate<To>(ceil(double(x))); }
#define SIMT_TO_INTEGERS(from, From)                     \
    SIMT_TO_INTEGER(from, From, int, int)                \
    SIMT_TO_INTEGER(from, From, uint, unsigned)          \
    SIMT_TO_INTEGER(from, From, ll, long long)           \
    SIMT_TO_INTEGER(from, From, ull, unsigned long long)
SIMT_TO_INTEGERS(float, float)
SIMT_TO_INTEGERS(double, double)
SIMT_TO_INTEGERS(half, __half)
SIMT_TO_INTEGER(half, __half, short, short)
SIMT_TO_INTEGER(half, __half, ushort, unsigned short)
SIMT_TO_INTEGERS(bfloat16, __nv_bfloat16)
#undef SIMT_TO_INTEGERS
#undef SIMT_TO_INTEGER
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }
inline float __ull2float_rn(unsigned long long x) { return float(x); }
inline double __int2double_rn(int x) { return double(x); }
inline double __uint2double_rn(unsigned x) { return double(x); }
inline double __ll2double_rn(long long x) { return double(x); }
inline float __double2float_rn(double x) { return float(x); }

// ---- bits -----------------------------------------------------------------------------------------

inline int __float_as_int(float x) { return simt::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return simt::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return simt::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bit_cast<double>(x); }
inline int __mul24(int a, int b) { return int(unsigned(a << 8 >> 8) * unsigned(b << 8 >> 8)); }
inline unsigned __umul24(unsigned a, unsigned b) { return (a & 0xffffff) * (b & 0xffffff); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline long long __mul64hi(long long a, long long b) { return (long long)((__int128)a * b >> 64); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned long long __brevll(unsigned long long x) {
    unsigned long long y = 0;
    for (int i = 0; i < 64; i++) y |= (x >> i & 1) << (63 - i);
    return y;
}
inline unsigned __brev(unsigned x) { return unsigned(__brevll(x) >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = x | uint64_t(y) << 32;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return unsigned(((uint64_t(high) << 32 | low) << (by & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return unsigned((uint64_t(high) << 32 | low) >> (by & 31));
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += int(int8_t(unsigned(a) >> 8 * i)) * int(int8_t(unsigned(b) >> 8 * i));
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++) c += (a >> 8 * i & 0xff) * (b >> 8 * i & 0xff);
    return c;
}
inline unsigned __sad(int a, int b, unsigned c) { return c + unsigned(a > b ? a - b : b - a); }
inline unsigned __usad(unsigned a, unsigned b, unsigned c) { return c + (a > b ? a - b : b - a); }

// Of no meaning here but that it grows; clock() is the host's.
inline long long clock64() { return (long long)__builtin_ia32_rdtsc(); }
