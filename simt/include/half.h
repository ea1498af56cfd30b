// __half and __nv_bfloat16 for the host compiler, under the names of cuda_fp16.h and
// cuda_bf16.h and with their bits.
//
// Conversions to 16 bits round to nearest even; every NaN becomes 0x7fff, as in cvt.rn, but for poison.
// Arithmetic is done in f32 and rounded once: for + - * that is correctly rounded, since
// f32 carries more than twice the bits (24 >= 2 * 11 + 2); fma needs round-to-odd first.
// tests/emulator/main.rs proves the conversions over all 65,536 halves, and over all floats that rounding can tell apart.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace simt {

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Memory that nobody has written holds NaNs with all the upper bits set, which no computation makes. They remain such.
inline bool is_poison(float x) { return bit_cast<uint32_t>(x) >= 0xffff0000u; }
inline bool is_poison(double x) { return bit_cast<uint64_t>(x) >= 0xffff000000000000u; }
// The compiler must not see that a value is NaN: of fmaxf it would leave the other operand.
inline uint32_t hidden(uint32_t bits) {
    asm("" : "+r"(bits));
    return bits;
}
inline float half_nan(uint16_t h) { return bit_cast<float>(hidden(h == 0xffff ? 0xffffffffu : 0x7fffffffu)); }
inline uint16_t nan_to_16_bits(float f) { return uint16_t(hidden(is_poison(f) ? 0xffff : 0x7fff)); }

// In integers, for processors without F16C.
inline float half_to_float_portable(uint16_t h) {
    if ((h & 0x7fff) > 0x7c00) return half_nan(h);
    uint32_t magnitude = (h & 0x7fffu) << 13, sign = (h & 0x8000u) << 16;
    // 2^112 moves the exponent from half's bias to float's, and normalises subnormals.
    uint32_t x = magnitude == 0x7c00u << 13
                     ? 0x7f800000u
                     : bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    return bit_cast<float>(x | sign);
}

inline uint16_t float_to_half_portable(float f) {
    if (f != f) return nan_to_16_bits(f);
    uint32_t x = bit_cast<uint32_t>(f), sign = x >> 16 & 0x8000;
    x &= 0x7fffffff;
    if (x >= 0x47800000) return sign | 0x7c00;  // 65536 and more
    // The last bit of 0.5f is half's smallest subnormal, so the adder rounds for us.
    if (x < 0x38800000) return sign | (bit_cast<uint32_t>(fabsf(f) + 0.5f) - 0x3f000000);
    return sign | (x - (112u << 23) + 0xfff + (x >> 13 & 1)) >> 13;
}

#ifdef __F16C__
// The compiler's own names: immintrin.h is two thirds of what a kernel's file would make it read.
typedef short short8 __attribute__((vector_size(16)));
typedef float float4_ __attribute__((vector_size(16)));
inline float half_to_float(uint16_t h) {
    return (h & 0x7fff) > 0x7c00 ? half_nan(h) : __builtin_ia32_vcvtph2ps(short8{short(h)})[0];
}
inline uint16_t float_to_half(float f) {
    return f != f ? nan_to_16_bits(f) : uint16_t(__builtin_ia32_vcvtps2ph(float4_{f}, 0 /* to nearest even */)[0]);
}
#else
inline float half_to_float(uint16_t h) { return half_to_float_portable(h); }
inline uint16_t float_to_half(float f) { return float_to_half_portable(f); }
#endif

inline float bfloat16_to_float(uint16_t b) { return bit_cast<float>(uint32_t(b) << 16); }

inline uint16_t float_to_bfloat16(float f) {
    if (f != f) return nan_to_16_bits(f);
    uint32_t x = bit_cast<uint32_t>(f);
    return (x + 0x7fff + (x >> 16 & 1)) >> 16;
}

// a * b + c for 16-bit inputs, rounded to odd: inexact results get an odd last bit, so that
// the later rounding to 16 bits sees on which side of a tie the exact value lies.
inline float fma_to_odd(float a, float b, float c) {
    double product = double(a) * b, sum = product + c;  // the product is exact
    if (!std::isfinite(sum)) return float(sum);
    double back = sum - product, error = (product - (sum - back)) + (c - back);
    if (error != 0 && !(bit_cast<uint64_t>(sum) & 1))
        sum = std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
    float f = float(sum);
    if (double(f) != sum && !(bit_cast<uint32_t>(f) & 1))
        f = std::nextafterf(f, double(f) < sum ? INFINITY : -INFINITY);
    return f;
}

// Of a double, so that a rounding to 16 bits that follows is the only one.
inline float double_to_odd(double x) {
    float f = float(x);
    if (double(f) != x && x == x && !(bit_cast<uint32_t>(f) & 1)) f = std::nextafterf(f, double(f) < x ? INFINITY : -INFINITY);
    return f;
}

// Of 64 bits, likewise: more than a double holds.
inline double to_odd(long long i) { return double(i >> 53 && ~i >> 53 ? (i & ~0xfffll) | ((i & 0xfff) ? 0x800 : 0) : i); }
inline double to_odd(unsigned long long i) { return double(i >> 53 ? (i & ~0xfffull) | ((i & 0xfff) ? 0x800 : 0) : i); }
inline double to_odd(double x) { return x; }
inline double to_odd(float x) { return x; }
inline double to_odd(int i) { return i; }
inline double to_odd(unsigned i) { return i; }

enum class Round { rn, rz, ru, rd };
uint16_t to_half(double x, Round round);
uint16_t to_bfloat16(double x, Round round);

}  // namespace simt

#define SIMT_HALF_TYPE(T, narrow, widen)                                                       \
    struct T##_raw { uint16_t x; };                                                            \
    struct T {                                                                                 \
        uint16_t bits;                                                                         \
        T() = default;                                                                         \
        T(T##_raw raw) : bits(raw.x) {}                                                        \
        operator T##_raw() const { return {bits}; }                                            \
        T(float f) : bits(simt::narrow(f)) {}                                                  \
        T(double f) : bits(simt::narrow(simt::double_to_odd(f))) {}                            \
        T(int i) : T(double(i)) {}                                                             \
        T(unsigned i) : T(double(i)) {}                                                        \
        T(short i) : T(float(i)) {}                                                            \
        T(unsigned short i) : T(float(i)) {}                                                   \
        T(long i) : T((long long)i) {}                                                         \
        T(unsigned long i) : T((unsigned long long)i) {}                                       \
        T(long long i) : T(simt::to_odd(i)) {}                                                 \
        T(unsigned long long i) : T(simt::to_odd(i)) {}                                        \
        operator float() const { return simt::widen(bits); }                                   \
        explicit operator bool() const { return bits & 0x7fff; }                               \
        explicit operator double() const { return double(float(*this)); }                      \
        explicit operator int() const { return int(float(*this)); }                            \
        explicit operator unsigned() const { return unsigned(float(*this)); }                  \
        explicit operator short() const { return short(float(*this)); }                        \
        explicit operator unsigned short() const { return (unsigned short)(float(*this)); }    \
        explicit operator long() const { return long(float(*this)); }                          \
        explicit operator unsigned long() const { return (unsigned long)(float(*this)); }      \
        explicit operator long long() const { return (long long)(float(*this)); }              \
        explicit operator unsigned long long() const { return (unsigned long long)(float(*this)); } \
    }
SIMT_HALF_TYPE(__half, float_to_half, half_to_float);
SIMT_HALF_TYPE(__nv_bfloat16, float_to_bfloat16, bfloat16_to_float);
#undef SIMT_HALF_TYPE
struct alignas(4) __half2 {
    __half x, y;
    __half2() = default;
    __half2(__half x, __half y) : x(x), y(y) {}
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
    __nv_bfloat162() = default;
    __nv_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) : x(x), y(y) {}
};
typedef __half half;
typedef __half2 half2;
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

// ---- conversions ----------------------------------------------------------------------------------

inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline short __half_as_short(__half h) { return short(h.bits); }
inline __half __ushort_as_half(uint16_t bits) { return simt::bit_cast<__half>(bits); }
inline __half __short_as_half(short bits) { return simt::bit_cast<__half>(bits); }
inline short __bfloat16_as_short(__nv_bfloat16 b) { return short(b.bits); }
inline __nv_bfloat16 __short_as_bfloat16(short bits) { return simt::bit_cast<__nv_bfloat16>(bits); }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return simt::bit_cast<__nv_bfloat16>(bits); }

inline float __half2float(__half h) { return h; }
inline float __bfloat162float(__nv_bfloat16 b) { return b; }
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {b.x, b.y}; }
inline __half __high2half(__half2 h) { return h.y; }
inline __half __low2half(__half2 h) { return h.x; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 b) { return b.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 b) { return b.y; }
inline __half2 __half2half2(__half h) { return {h, h}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 b) { return {b, b}; }
inline float __low2float(__half2 h) { return h.x; }
inline float __high2float(__half2 h) { return h.y; }
inline float __low2float(__nv_bfloat162 b) { return b.x; }
inline float __high2float(__nv_bfloat162 b) { return b.y; }

#define SIMT_HALF_CONVERSIONS(T, T2, name)                                             \
    inline T __float2##name(float f) { return f; }                                     \
    inline T __float2##name##_rn(float f) { return f; }                                \
    inline T __double2##name(double f) { return f; }                                   \
    inline T __int2##name##_rn(int i) { return i; }                                    \
    inline T __uint2##name##_rn(unsigned i) { return i; }                              \
    inline T __short2##name##_rn(short i) { return i; }                                \
    inline T __ushort2##name##_rn(unsigned short i) { return i; }                      \
    inline T __ll2##name##_rn(long long i) { return i; }                               \
    inline T __ull2##name##_rn(unsigned long long i) { return i; }                     \
    inline T2 __float2##name##2_rn(float f) { return {f, f}; }                         \
    inline T2 __floats2##name##2_rn(float x, float y) { return {x, y}; }               \
    inline T2 __float22##name##2_rn(float2 f) { return {f.x, f.y}; }                   \
    inline T2 __low2##name##2(T2 h) { return {h.x, h.x}; }                             \
    inline T2 __high2##name##2(T2 h) { return {h.y, h.y}; }                            \
    inline T2 __lows2##name##2(T2 a, T2 b) { return {a.x, b.x}; }                      \
    inline T2 __highs2##name##2(T2 a, T2 b) { return {a.y, b.y}; }
SIMT_HALF_CONVERSIONS(__half, __half2, half)
SIMT_HALF_CONVERSIONS(__nv_bfloat16, __nv_bfloat162, bfloat16)
#undef SIMT_HALF_CONVERSIONS
#define SIMT_HALF_ROUNDED(T, narrow, name, from, From, mode) \
    inline T __##from##2##name##_##mode(From x) { return simt::bit_cast<T>(simt::narrow(simt::to_odd(x), simt::Round::mode)); }
#define SIMT_HALF_ROUNDINGS(from, From)                                                                                                \
    SIMT_HALF_ROUNDED(__half, to_half, half, from, From, rz) SIMT_HALF_ROUNDED(__nv_bfloat16, to_bfloat16, bfloat16, from, From, rz) \
    SIMT_HALF_ROUNDED(__half, to_half, half, from, From, ru) SIMT_HALF_ROUNDED(__nv_bfloat16, to_bfloat16, bfloat16, from, From, ru) \
    SIMT_HALF_ROUNDED(__half, to_half, half, from, From, rd) SIMT_HALF_ROUNDED(__nv_bfloat16, to_bfloat16, bfloat16, from, From, rd)
SIMT_HALF_ROUNDINGS(float, float)
SIMT_HALF_ROUNDINGS(short, short)
SIMT_HALF_ROUNDINGS(ushort, unsigned short)
SIMT_HALF_ROUNDINGS(int, int)
SIMT_HALF_ROUNDINGS(uint, unsigned)
SIMT_HALF_ROUNDINGS(ll, long long)
SIMT_HALF_ROUNDINGS(ull, unsigned long long)
#undef SIMT_HALF_ROUNDINGS
#undef SIMT_HALF_ROUNDED
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
inline __half2 __lowhigh2highlow(__half2 h) { return {h.y, h.x}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }

// ---- arithmetic: each operation rounds to 16 bits -------------------------------------------------------

inline __half __hfma(__half a, __half b, __half c) { return simt::fma_to_odd(a, b, c); }
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) { return simt::fma_to_odd(a, b, c); }

#define SIMT_HALF_BINARY(T, T2, name, name2, expression)       \
    inline T name(T a, T b) { return T(expression); }          \
    inline T2 name2(T2 a, T2 b) { return {name(a.x, b.x), name(a.y, b.y)}; }
#define SIMT_HALF_UNARY(T, T2, name, name2, expression) \
    inline T name(T a) { return T(expression); }        \
    inline T2 name2(T2 a) { return {name(a.x), name(a.y)}; }
// A name with u is true of NaN, the others are not.
#define SIMT_HALF_COMPARISON(T, T2, name, expression)                                                                         \
    inline bool __h##name(T x, T y) { const float a = x, b = y; return expression; }                                          \
    inline T2 __h##name##2(T2 a, T2 b) { return {T(float(__h##name(a.x, b.x))), T(float(__h##name(a.y, b.y)))}; }             \
    inline bool __hb##name##2(T2 a, T2 b) { return __h##name(a.x, b.x) && __h##name(a.y, b.y); }                              \
    inline unsigned __h##name##2_mask(T2 a, T2 b) { return (__h##name(a.x, b.x) ? 0xffffu : 0) | (__h##name(a.y, b.y) ? 0xffff0000u : 0); }
#define SIMT_HALF_COMPARE(T, T2, name, ordered)      \
    SIMT_HALF_COMPARISON(T, T2, name, ordered)       \
    SIMT_HALF_COMPARISON(T, T2, name##u, __builtin_isunordered(a, b) || (ordered))
#define SIMT_HALF_OPERATOR(T, T2, op, name)                                      \
    inline T operator op(T a, T b) { return name(a, b); }                        \
    inline T& operator op##=(T& a, T b) { return a = name(a, b); }               \
    inline T2 operator op(T2 a, T2 b) { return {name(a.x, b.x), name(a.y, b.y)}; } \
    inline T2& operator op##=(T2& a, T2 b) { return a = a op b; }
#define SIMT_HALF_ARITHMETIC(T, T2)                                         \
    SIMT_HALF_BINARY(T, T2, __hadd, __hadd2, float(a) + float(b))                \
    SIMT_HALF_BINARY(T, T2, __hsub, __hsub2, float(a) - float(b))                \
    SIMT_HALF_BINARY(T, T2, __hmul, __hmul2, float(a) * float(b))                \
    SIMT_HALF_BINARY(T, T2, __hadd_rn, __hadd2_rn, float(a) + float(b))          \
    SIMT_HALF_BINARY(T, T2, __hsub_rn, __hsub2_rn, float(a) - float(b))          \
    SIMT_HALF_BINARY(T, T2, __hmul_rn, __hmul2_rn, float(a) * float(b))          \
    SIMT_HALF_BINARY(T, T2, __hdiv, __h2div, float(a) / float(b))                \
    SIMT_HALF_BINARY(T, T2, __hadd_sat, __hadd2_sat, fminf(fmaxf(__hadd(a, b), 0.0f), 1.0f)) \
    SIMT_HALF_BINARY(T, T2, __hsub_sat, __hsub2_sat, fminf(fmaxf(__hsub(a, b), 0.0f), 1.0f)) \
    SIMT_HALF_BINARY(T, T2, __hmul_sat, __hmul2_sat, fminf(fmaxf(__hmul(a, b), 0.0f), 1.0f)) \
    SIMT_HALF_BINARY(T, T2, __hmax, __hmax2, fmaxf(a, b))                        \
    SIMT_HALF_BINARY(T, T2, __hmin, __hmin2, fminf(a, b))                        \
    SIMT_HALF_BINARY(T, T2, __hmax_nan, __hmax2_nan, a != a || b != b ? NAN : fmaxf(a, b)) \
    SIMT_HALF_BINARY(T, T2, __hmin_nan, __hmin2_nan, a != a || b != b ? NAN : fminf(a, b)) \
    inline T __hneg(T a) { a.bits ^= 0x8000; return a; }                         \
    inline T2 __hfma2(T2 a, T2 b, T2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; } \
    inline T __hfma_relu(T a, T b, T c) { return __hmax_nan(__hfma(a, b, c), T(0.0f)); } \
    inline T __hfma_sat(T a, T b, T c) { return fminf(fmaxf(__hfma(a, b, c), 0.0f), 1.0f); } \
    inline T2 __hfma2_relu(T2 a, T2 b, T2 c) { return {__hfma_relu(a.x, b.x, c.x), __hfma_relu(a.y, b.y, c.y)}; } \
    inline T2 __hfma2_sat(T2 a, T2 b, T2 c) { return {__hfma_sat(a.x, b.x, c.x), __hfma_sat(a.y, b.y, c.y)}; } \
    inline T2 __hcmadd(T2 a, T2 b, T2 c) {  /* complex numbers: a b + c */           \
        return {__hfma(__hneg(a.y), b.y, __hfma(a.x, b.x, c.x)), __hfma(a.y, b.x, __hfma(a.x, b.y, c.y))}; \
    }                                                                            \
    inline T __habs(T a) { a.bits &= 0x7fff; return a; }                         \
    inline T2 __hneg2(T2 a) { return {__hneg(a.x), __hneg(a.y)}; }               \
    inline T2 __habs2(T2 a) { return {__habs(a.x), __habs(a.y)}; }               \
    SIMT_HALF_COMPARE(T, T2, eq, a == b)                                         \
    SIMT_HALF_COMPARE(T, T2, ne, a < b || a > b)                                 \
    SIMT_HALF_COMPARE(T, T2, lt, a < b)                                          \
    SIMT_HALF_COMPARE(T, T2, le, a <= b)                                         \
    SIMT_HALF_COMPARE(T, T2, gt, a > b)                                          \
    SIMT_HALF_COMPARE(T, T2, ge, a >= b)                                         \
    inline bool __hisnan(T a) { return float(a) != float(a); }                   \
    inline T2 __hisnan2(T2 a) { return {T(float(__hisnan(a.x))), T(float(__hisnan(a.y)))}; } \
    inline int __hisinf(T a) { return std::isinf(float(a)) ? (float(a) < 0 ? -1 : 1) : 0; } \
    SIMT_HALF_OPERATOR(T, T2, +, __hadd)                                         \
    SIMT_HALF_OPERATOR(T, T2, -, __hsub)                                         \
    SIMT_HALF_OPERATOR(T, T2, *, __hmul)                                         \
    SIMT_HALF_OPERATOR(T, T2, /, __hdiv)                                         \
    inline T operator-(T a) { return __hneg(a); }                                \
    inline T operator+(T a) { return a; }                                        \
    inline T2 operator-(T2 a) { return __hneg2(a); }                             \
    inline T& operator++(T& a) { return a = __hadd(a, T(1.0f)); }                \
    inline T& operator--(T& a) { return a = __hsub(a, T(1.0f)); }                \
    inline T operator++(T& a, int) { const T was = a; ++a; return was; }         \
    inline T operator--(T& a, int) { const T was = a; --a; return was; }         \
    inline bool operator==(T a, T b) { return __heq(a, b); }                     \
    inline bool operator!=(T a, T b) { return __hneu(a, b); }                    \
    inline bool operator<(T a, T b) { return __hlt(a, b); }                      \
    inline bool operator<=(T a, T b) { return __hle(a, b); }                     \
    inline bool operator>(T a, T b) { return __hgt(a, b); }                      \
    inline bool operator>=(T a, T b) { return __hge(a, b); }                     \
    inline bool operator==(T2 a, T2 b) { return __hbeq2(a, b); }                 \
    inline bool operator!=(T2 a, T2 b) { return __hbneu2(a, b); }                \
    inline bool operator<(T2 a, T2 b) { return __hblt2(a, b); }                  \
    inline bool operator<=(T2 a, T2 b) { return __hble2(a, b); }                 \
    inline bool operator>(T2 a, T2 b) { return __hbgt2(a, b); }                  \
    inline bool operator>=(T2 a, T2 b) { return __hbge2(a, b); }                 \
    SIMT_HALF_UNARY(T, T2, hexp, h2exp, expf(a))                                 \
    SIMT_HALF_UNARY(T, T2, hexp2, h2exp2, exp2f(a))                              \
    SIMT_HALF_UNARY(T, T2, hexp10, h2exp10, exp10f(a))                           \
    SIMT_HALF_UNARY(T, T2, hlog, h2log, logf(a))                                 \
    SIMT_HALF_UNARY(T, T2, hlog2, h2log2, log2f(a))                              \
    SIMT_HALF_UNARY(T, T2, hlog10, h2log10, log10f(a))                           \
    SIMT_HALF_UNARY(T, T2, hsqrt, h2sqrt, sqrtf(a))                              \
    SIMT_HALF_UNARY(T, T2, hrsqrt, h2rsqrt, simt::double_to_odd(1.0 / sqrt(double(a)))) \
    SIMT_HALF_UNARY(T, T2, hrcp, h2rcp, 1.0f / float(a))                         \
    SIMT_HALF_UNARY(T, T2, hsin, h2sin, sinf(a))                                 \
    SIMT_HALF_UNARY(T, T2, hcos, h2cos, cosf(a))                                 \
    SIMT_HALF_UNARY(T, T2, htanh, h2tanh, tanhf(a))                              \
    SIMT_HALF_UNARY(T, T2, htanh_approx, h2tanh_approx, tanhf(a))                \
    SIMT_HALF_UNARY(T, T2, hceil, h2ceil, ceilf(a))                              \
    SIMT_HALF_UNARY(T, T2, hfloor, h2floor, floorf(a))                           \
    SIMT_HALF_UNARY(T, T2, htrunc, h2trunc, truncf(a))                           \
    SIMT_HALF_UNARY(T, T2, hrint, h2rint, nearbyintf(a))
SIMT_HALF_ARITHMETIC(__half, __half2)
SIMT_HALF_ARITHMETIC(__nv_bfloat16, __nv_bfloat162)
#undef SIMT_HALF_ARITHMETIC
#undef SIMT_HALF_OPERATOR
#undef SIMT_HALF_COMPARE
#undef SIMT_HALF_COMPARISON
#undef SIMT_HALF_UNARY
#undef SIMT_HALF_BINARY
