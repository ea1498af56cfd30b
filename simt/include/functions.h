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
inline void __threadfence_block() { simt::fence(false); }
inline void __nanosleep(unsigned) { simt::let_others_run(); }
inline void cudaGridDependencySynchronize() { simt::wait_for_launches(); }
inline void cudaTriggerProgrammaticLaunchCompletion() { simt::let_next_launch_begin(); }
inline void __prof_trigger(int) {}
// The source step looks for their names.
inline void __barrier_sync_count(unsigned id, unsigned threads, SIMT_WHERE) { simt::named_barrier(int(id), int(threads), at); }
inline void __barrier_sync(unsigned id, SIMT_WHERE) {
    if (id == 0) simt::barrier(at);
    else simt::named_barrier(int(id), int(simt::view()->block_dim.x * simt::view()->block_dim.y * simt::view()->block_dim.z), at);
}
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
inline uint32_t __activemask(SIMT_WHERE) { return simt::converged(at); }
#define SIMT_MATCH(T)                                                                                                             \
    inline uint32_t __match_any_sync(uint32_t mask, T value, SIMT_WHERE) { return simt::match(mask, simt::bits_of(value), false, at); } \
    inline uint32_t __match_all_sync(uint32_t mask, T value, int* all, SIMT_WHERE) {                                              \
        const uint32_t lanes = simt::match(mask, simt::bits_of(value), true, at);                                                 \
        *all = lanes != 0;                                                                                                        \
        return lanes;                                                                                                             \
    }
namespace simt {
template <class T> inline uint64_t bits_of(T value) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}
}  // namespace simt
SIMT_MATCH(int) SIMT_MATCH(unsigned) SIMT_MATCH(long) SIMT_MATCH(unsigned long) SIMT_MATCH(long long) SIMT_MATCH(unsigned long long)
SIMT_MATCH(float) SIMT_MATCH(double)
#undef SIMT_MATCH

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

// `desired` if what was there is `expected`; without a pair the new value.
#define SIMT_ATOMIC_PAIR(name)                                                                     \
    template <class T>                                                                             \
    inline std::enable_if_t<simt::has_atomic_cas<T>, T> name(T* address, simt::Plain<T> expected, simt::Plain<T> desired, SIMT_WHERE) { \
        T before;                                                                                  \
        const T operands[2] = {expected, desired};                                                 \
        simt::atomic(address, sizeof(T), &before, operands, [](void* word, const void* operand) { \
            if (!memcmp(word, operand, sizeof(T))) memcpy(word, static_cast<const T*>(operand) + 1, sizeof(T)); \
        }, at);                                                                                    \
        return before;                                                                             \
    }
#define SIMT_ATOMIC_WIDE(name)                                                                     \
    template <class T> inline std::enable_if_t<simt::is_16_bytes<T>, T> name(T* address, simt::Plain<T> value, SIMT_WHERE) { \
        T before;                                                                                  \
        simt::atomic(address, 16, &before, &value, [](void* word, const void* operand) { memcpy(word, operand, 16); }, at); \
        return before;                                                                             \
    }
// Each element by itself, as in CUDA; in global memory alone.
#define SIMT_ATOMIC_VECTOR(name)                                                                   \
    inline float2 name(float2* p, float2 v, SIMT_WHERE) {                                          \
        simt::require_global(p, sizeof *p, at);                                                    \
        return {atomicAdd(&p->x, v.x, at), atomicAdd(&p->y, v.y, at)};                             \
    }                                                                                              \
    inline float4 name(float4* p, float4 v, SIMT_WHERE) {                                          \
        simt::require_global(p, sizeof *p, at);                                                    \
        return {atomicAdd(&p->x, v.x, at), atomicAdd(&p->y, v.y, at), atomicAdd(&p->z, v.z, at), atomicAdd(&p->w, v.w, at)}; \
    }
namespace simt {
template <class T> constexpr bool is_16_bytes = sizeof(T) == 16 && alignof(T) >= 16 && std::is_trivially_copyable_v<T>;
template <class T> constexpr bool has_atomic_cas = is_16_bytes<T> || std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
    std::is_same_v<T, unsigned short> || std::is_same_v<T, unsigned long long>;
inline void require_global(const void* p, size_t bytes, Where at) {
    if (uintptr_t(p) % bytes) trap("atomic: the address is not a multiple of the vector's size", at);
    if (space_of(p) == Space::shared) trap("atomicAdd of a float2 or float4: only in global memory", at);
}
}  // namespace simt
SIMT_ATOMIC_PAIR(atomicCAS) SIMT_ATOMIC_PAIR(atomicCAS_block) SIMT_ATOMIC_PAIR(atomicCAS_system)
SIMT_ATOMIC_WIDE(atomicExch) SIMT_ATOMIC_WIDE(atomicExch_block) SIMT_ATOMIC_WIDE(atomicExch_system)
SIMT_ATOMIC_VECTOR(atomicAdd) SIMT_ATOMIC_VECTOR(atomicAdd_block) SIMT_ATOMIC_VECTOR(atomicAdd_system)
#undef SIMT_ATOMIC_PAIR
#undef SIMT_ATOMIC_WIDE
#undef SIMT_ATOMIC_VECTOR

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
inline unsigned __isShared(const void* p) { return simt::space_of(p) == simt::Space::shared; }
inline unsigned __isGlobal(const void* p) { return simt::space_of(p) == simt::Space::global; }
inline unsigned __isConstant(const void* p) { return simt::space_of(p) == simt::Space::constant; }
inline unsigned __isLocal(const void* p) { return simt::space_of(p) == simt::Space::local; }

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
inline long long llmin(long long a, long long b) { return min(a, b); }
inline long long llmax(long long a, long long b) { return max(a, b); }
inline unsigned long long ullmin(unsigned long long a, unsigned long long b) { return min(a, b); }
inline unsigned long long ullmax(unsigned long long a, unsigned long long b) { return max(a, b); }

// ---- floats ---------------------------------------------------------------------------------------

// What the host's library has not; math.cpp.
#define SIMT_MATH_OF_1(name) \
    double name(double x);   \
    inline float name##f(float x) { return float(name(double(x))); } \
    inline float name(float x) { return name##f(x); }
SIMT_MATH_OF_1(erfinv) SIMT_MATH_OF_1(erfcinv) SIMT_MATH_OF_1(erfcx) SIMT_MATH_OF_1(normcdf) SIMT_MATH_OF_1(normcdfinv)
SIMT_MATH_OF_1(cyl_bessel_i0) SIMT_MATH_OF_1(cyl_bessel_i1) SIMT_MATH_OF_1(sinpi) SIMT_MATH_OF_1(cospi)
#undef SIMT_MATH_OF_1
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline double rcbrt(double x) { return 1.0 / cbrt(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float rcbrtf(float x) { return 1.0f / cbrtf(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float rcbrt(float x) { return rcbrtf(x); }
inline double rhypot(double x, double y) { return 1.0 / hypot(x, y); }
inline double norm3d(double x, double y, double z) { return hypot(hypot(x, y), z); }
inline double norm4d(double x, double y, double z, double w) { return hypot(hypot(x, y), hypot(z, w)); }
inline double rnorm3d(double x, double y, double z) { return 1.0 / norm3d(x, y, z); }
inline double rnorm4d(double x, double y, double z, double w) { return 1.0 / norm4d(x, y, z, w); }
inline float rhypotf(float x, float y) { return float(rhypot(double(x), y)); }
inline float rhypot(float x, float y) { return rhypotf(x, y); }
inline float norm3df(float x, float y, float z) { return float(norm3d(x, y, z)); }
inline float norm4df(float x, float y, float z, float w) { return float(norm4d(x, y, z, w)); }
inline float rnorm3df(float x, float y, float z) { return float(rnorm3d(x, y, z)); }
inline float rnorm4df(float x, float y, float z, float w) { return float(rnorm4d(x, y, z, w)); }
inline double norm(int n, const double* p) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum = hypot(sum, p[i]);
    return sum;
}
inline float normf(int n, const float* p) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += double(p[i]) * p[i];
    return float(sqrt(sum));
}
inline double rnorm(int n, const double* p) { return 1.0 / norm(n, p); }
inline float rnormf(int n, const float* p) { return 1.0f / normf(n, p); }
inline void sincospi(double x, double* s, double* c) { *s = sinpi(x), *c = cospi(x); }
inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }
inline float fdividef(float a, float b) { return a / b; }
inline float fdivide(float a, float b) { return a / b; }
inline double fdivide(double a, double b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return exp10f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline float __tanhf(float x) { return tanhf(x); }
inline void __sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frsqrt_rn(float x) { return float(1.0 / sqrt(double(x))); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }  // NaN gives 0

// By rounding mode; math.cpp has those that are not to nearest.
#define SIMT_ROUNDED(mode)                                                                                           \
    float __fadd_##mode(float, float); float __fsub_##mode(float, float); float __fmul_##mode(float, float);         \
    float __fdiv_##mode(float, float); float __fmaf_##mode(float, float, float); float __frcp_##mode(float);         \
    float __fsqrt_##mode(float); double __dadd_##mode(double, double); double __dsub_##mode(double, double);         \
    double __dmul_##mode(double, double); double __ddiv_##mode(double, double); double __fma_##mode(double, double, double); \
    double __drcp_##mode(double); double __dsqrt_##mode(double); float __int2float_##mode(int);                      \
    float __uint2float_##mode(unsigned); float __ll2float_##mode(long long); float __ull2float_##mode(unsigned long long); \
    double __ll2double_##mode(long long); double __ull2double_##mode(unsigned long long); float __double2float_##mode(double); \
    inline float __fmaf_ieee_##mode(float a, float b, float c) { return __fmaf_##mode(a, b, c); }
SIMT_ROUNDED(rz) SIMT_ROUNDED(ru) SIMT_ROUNDED(rd)
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmaf_ieee_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __drcp_rn(double x) { return 1.0 / x; }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }
inline float __ull2float_rn(unsigned long long x) { return float(x); }
inline double __int2double_rn(int x) { return double(x); }
inline double __uint2double_rn(unsigned x) { return double(x); }
inline double __ll2double_rn(long long x) { return double(x); }
inline double __ull2double_rn(unsigned long long x) { return double(x); }
inline float __double2float_rn(double x) { return float(x); }

// ---- conversions: they saturate; NaN gives 0, but the top bit from a double or to 64 bits --------------

namespace simt {
template <class T, class From>
inline T saturate(double x) {
    constexpr double low = double(std::numeric_limits<T>::min()), high = double(std::numeric_limits<T>::max());
    if (x != x) return sizeof(From) == 8 || sizeof(T) == 8 ? T(1ull << (sizeof(T) * 8 - 1)) : T(0);
    return x <= low ? std::numeric_limits<T>::min() : x >= high ? std::numeric_limits<T>::max() : T(x);
}
}  // namespace simt
#define SIMT_TO_INTEGER(from, From, to, To)                                                   \
    inline To __##from##2##to##_rn(From x) { return simt::saturate<To, From>(nearbyint(double(x))); } \
    inline To __##from##2##to##_rz(From x) { return simt::saturate<To, From>(trunc(double(x))); }     \
    inline To __##from##2##to##_rd(From x) { return simt::saturate<To, From>(floor(double(x))); }     \
    inline To __##from##2##to##_ru(From x) { return simt::saturate<To, From>(ceil(double(x))); }
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
SIMT_TO_INTEGER(bfloat16, __nv_bfloat16, short, short)
SIMT_TO_INTEGER(bfloat16, __nv_bfloat16, ushort, unsigned short)
inline signed char __half2char_rz(__half x) { return simt::saturate<signed char, __half>(trunc(double(x))); }
inline unsigned char __half2uchar_rz(__half x) { return simt::saturate<unsigned char, __half>(trunc(double(x))); }
inline signed char __bfloat162char_rz(__nv_bfloat16 x) { return simt::saturate<signed char, __nv_bfloat16>(trunc(double(x))); }
inline unsigned char __bfloat162uchar_rz(__nv_bfloat16 x) { return simt::saturate<unsigned char, __nv_bfloat16>(trunc(double(x))); }
#undef SIMT_TO_INTEGERS
#undef SIMT_TO_INTEGER

// ---- bits -----------------------------------------------------------------------------------------

inline int __float_as_int(float x) { return simt::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return simt::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return simt::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return simt::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bit_cast<double>(x); }
inline int __double2hiint(double x) { return int(simt::bit_cast<uint64_t>(x) >> 32); }
inline int __double2loint(double x) { return int(simt::bit_cast<uint64_t>(x)); }
inline double __hiloint2double(int high, int low) { return simt::bit_cast<double>(uint64_t(unsigned(high)) << 32 | unsigned(low)); }
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
namespace simt {
// As PTX has it: bit 3 of a selection repeats the byte's sign.
inline unsigned prmt(unsigned x, unsigned y, unsigned selector) {
    const unsigned bytes = __byte_perm(x, y, selector);
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned byte = bytes >> 8 * i & 0xff;
        result |= (selector >> 4 * i & 8 ? byte & 0x80 ? 0xffu : 0u : byte) << 8 * i;
    }
    return result;
}
// `length` bits from `begin` on: of a, with the sign of the last; and of b those of a.
template <class T>
inline T extracted(T a, unsigned begin, unsigned length) {
    constexpr unsigned size = sizeof(T) * 8;
    begin &= 255, length &= 255;
    using U = std::make_unsigned_t<T>;
    const U sign = std::is_signed_v<T> && length ? U(a) >> (begin + length > size ? size - 1 : begin + length - 1) & 1 : 0;
    U result = 0;
    for (unsigned i = 0; i < size; i++) result |= (i < length && begin + i < size ? U(a) >> (begin + i) & 1 : sign) << i;
    return T(result);
}
template <class T>
inline T inserted(T a, T b, unsigned begin, unsigned length) {
    constexpr unsigned size = sizeof(T) * 8;
    begin &= 255, length &= 255;
    for (unsigned i = 0; i < length && begin + i < size; i++) b = (b & ~(T(1) << (begin + i))) | (a >> i & 1) << (begin + i);
    return b;
}
// The nearest whole number of type T.
template <class T, class From>
inline T clamped(From x) {
    using L = std::numeric_limits<T>;
    if constexpr (std::is_signed_v<From>) {
        if (x < 0 && (!std::is_signed_v<T> || int64_t(x) < int64_t(L::min()))) return L::min();
    }
    return x > 0 && uint64_t(x) > uint64_t(L::max()) ? L::max() : T(x);
}
inline unsigned lop3(unsigned a, unsigned b, unsigned c, unsigned table) {
    unsigned result = 0;
    for (unsigned i = 0; i < 8; i++)
        if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}
}  // namespace simt
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return unsigned(((uint64_t(high) << 32 | low) << (by & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return unsigned((uint64_t(high) << 32 | low) >> (by & 31));
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned by) {
    return by >= 32 ? low : __funnelshift_l(low, high, by);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned by) {
    return by >= 32 ? high : __funnelshift_r(low, high, by);
}
inline unsigned short __nv_bswap16(unsigned short x) { return __builtin_bswap16(x); }
inline unsigned __nv_bswap32(unsigned x) { return __builtin_bswap32(x); }
inline unsigned long long __nv_bswap64(unsigned long long x) { return __builtin_bswap64(x); }
// The offset-th bit that is set from `base` on, or back if it is negative.
inline unsigned __fns(unsigned mask, unsigned base, int offset) {
    if (offset == 0) return base < 32 && (mask >> base & 1) ? base : 0xffffffffu;
    const int step = offset < 0 ? -1 : 1;
    for (int i = int(base); i >= 0 && i < 32; i += step)
        if ((mask >> i & 1) && !(offset -= step)) return unsigned(i);
    return 0xffffffffu;
}
// Averages whose sum does not overflow.
inline int __hadd(int a, int b) { return int((int64_t(a) + b) >> 1); }
inline int __rhadd(int a, int b) { return int((int64_t(a) + b + 1) >> 1); }
inline unsigned __uhadd(unsigned a, unsigned b) { return unsigned((uint64_t(a) + b) >> 1); }
inline unsigned __urhadd(unsigned a, unsigned b) { return unsigned((uint64_t(a) + b + 1) >> 1); }
inline unsigned __sad(int a, int b, unsigned c) { return c + unsigned(a > b ? a - b : b - a); }
inline unsigned __usad(unsigned a, unsigned b, unsigned c) { return c + (a > b ? a - b : b - a); }

// Of no meaning here but that it grows; clock() is the host's.
inline long long clock64() { return (long long)__builtin_ia32_rdtsc(); }

#ifndef SIMT_RUNTIME
#include "simd.h"
#endif
