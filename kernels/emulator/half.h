// __half and __nv_bfloat16 for the host compiler, under the names of cuda_fp16.h and
// cuda_bf16.h and with their bits.
//
// Conversions to 16 bits round to nearest even; every NaN becomes 0x7fff, as in cvt.rn.
// Arithmetic is done in f32 and rounded once: for + - * that is correctly rounded, since
// f32 carries more than twice the bits (24 >= 2 * 11 + 2); fma needs round-to-odd first.
// tests/emulator.rs proves the conversions over all 65,536 and all 2^32 inputs.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace simt {

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// In integers, for processors without F16C.
inline float half_to_float_portable(uint16_t h) {
    if ((h & 0x7fff) > 0x7c00) return bit_cast<float>(0x7fffffffu);
    uint32_t magnitude = (h & 0x7fffu) << 13, sign = (h & 0x8000u) << 16;
    // 2^112 moves the exponent from half's bias to float's, and normalises subnormals.
    uint32_t x = magnitude == 0x7c00u << 13
                     ? 0x7f800000u
                     : bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    return bit_cast<float>(x | sign);
}

inline uint16_t float_to_half_portable(float f) {
    if (f != f) return 0x7fff;
    uint32_t x = bit_cast<uint32_t>(f), sign = x >> 16 & 0x8000;
    x &= 0x7fffffff;
    if (x >= 0x47800000) return sign | 0x7c00;  // 65536 and more
    // The last bit of 0.5f is half's smallest subnormal, so the adder rounds for us.
    if (x < 0x38800000) return sign | (bit_cast<uint32_t>(fabsf(f) + 0.5f) - 0x3f000000);
    return sign | (x - (112u << 23) + 0xfff + (x >> 13 & 1)) >> 13;
}

#ifdef __F16C__
inline float half_to_float(uint16_t h) {
    return (h & 0x7fff) > 0x7c00 ? bit_cast<float>(0x7fffffffu) : _cvtsh_ss(h);
}
inline uint16_t float_to_half(float f) { return f != f ? 0x7fff : _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float half_to_float(uint16_t h) { return half_to_float_portable(h); }
inline uint16_t float_to_half(float f) { return float_to_half_portable(f); }
#endif

inline float bfloat16_to_float(uint16_t b) { return bit_cast<float>(uint32_t(b) << 16); }

inline uint16_t float_to_bfloat16(float f) {
    if (f != f) return 0x7fff;
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

}  // namespace simt

struct __half {
    uint16_t bits;
    __half() = default;
    __half(float f) : bits(simt::float_to_half(f)) {}
    operator float() const { return simt::half_to_float(bits); }
};
struct alignas(4) __half2 {
    __half x, y;
};
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f) : bits(simt::float_to_bfloat16(f)) {}
    operator float() const { return simt::bfloat16_to_float(bits); }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
typedef __half half;
typedef __half2 half2;
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

inline __half __float2half(float f) { return f; }
inline __half __float2half_rn(float f) { return f; }
inline float __half2float(__half h) { return h; }
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(uint16_t bits) { return simt::bit_cast<__half>(bits); }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float2half2_rn(float f) { return {f, f}; }
inline __half2 __half2half2(__half h) { return {h, h}; }
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }

inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
inline float __bfloat162float(__nv_bfloat16 b) { return b; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return simt::bit_cast<__nv_bfloat16>(bits); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float2bfloat162_rn(float f) { return {f, f}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 b) { return {b, b}; }
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {b.x, b.y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }

inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 b) { return b.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 b) { return b.y; }

// The arithmetic, once for each type and its pair.
#define SIMT_HALF_OP(name, expression)                                                              \
    inline __half name(__half a, __half b) { return __half(expression); }                           \
    inline __nv_bfloat16 name(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat16(expression); } \
    inline __half2 name##2(__half2 a, __half2 b) { return {name(a.x, b.x), name(a.y, b.y)}; }       \
    inline __nv_bfloat162 name##2(__nv_bfloat162 a, __nv_bfloat162 b) {                             \
        return {name(a.x, b.x), name(a.y, b.y)};                                                    \
    }
SIMT_HALF_OP(__hadd, float(a) + float(b))
SIMT_HALF_OP(__hsub, float(a) - float(b))
SIMT_HALF_OP(__hmul, float(a) * float(b))
SIMT_HALF_OP(__hmax, fmaxf(a, b))
SIMT_HALF_OP(__hmin, fminf(a, b))
#undef SIMT_HALF_OP

inline __half __hfma(__half a, __half b, __half c) { return simt::fma_to_odd(a, b, c); }
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
    return simt::fma_to_odd(a, b, c);
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
inline float __low2float(__half2 h) { return h.x; }
inline float __high2float(__half2 h) { return h.y; }
inline float __low2float(__nv_bfloat162 b) { return b.x; }
inline float __high2float(__nv_bfloat162 b) { return b.y; }
