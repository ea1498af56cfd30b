// CUDA's mathematical functions that the host's library has not: arithmetic by rounding mode, and special functions. Not in
// the headers, which every kernel's file reads.
#include <xmmintrin.h>

#include "machine.h"

// ---- rounding modes -------------------------------------------------------------------------------

namespace simt {

static constexpr unsigned kNearest = 0, kDown = 1, kUp = 2, kZero = 3;  // as the processor numbers them

// The compiler knows nothing of rounding modes: it must neither compute before nor move it away.
template <class T> static T opaque(T x) {
    if constexpr (std::is_floating_point_v<T>) asm volatile("" : "+x"(x));
    else asm volatile("" : "+r"(x));
    return x;
}

template <class F, class... A>
static auto rounded(unsigned mode, F f, A... operands) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr((before & ~0x6000u) | mode << 13);
    const auto result = opaque(f(opaque(operands)...));
    _mm_setcsr(before);
    return result;
}

}  // namespace simt

using simt::rounded;

#define ROUNDED(suffix, mode)                                                                                                 \
    float __fadd_##suffix(float a, float b) { return rounded(mode, [](float a, float b) { return a + b; }, a, b); }           \
    float __fsub_##suffix(float a, float b) { return rounded(mode, [](float a, float b) { return a - b; }, a, b); }           \
    float __fmul_##suffix(float a, float b) { return rounded(mode, [](float a, float b) { return a * b; }, a, b); }           \
    float __fdiv_##suffix(float a, float b) { return rounded(mode, [](float a, float b) { return a / b; }, a, b); }           \
    float __fmaf_##suffix(float a, float b, float c) { return rounded(mode, [](float a, float b, float c) { return fmaf(a, b, c); }, a, b, c); } \
    float __frcp_##suffix(float a) { return __fdiv_##suffix(1, a); }                                                          \
    float __fsqrt_##suffix(float a) { return rounded(mode, [](float a) { return sqrtf(a); }, a); }                            \
    double __dadd_##suffix(double a, double b) { return rounded(mode, [](double a, double b) { return a + b; }, a, b); }      \
    double __dsub_##suffix(double a, double b) { return rounded(mode, [](double a, double b) { return a - b; }, a, b); }      \
    double __dmul_##suffix(double a, double b) { return rounded(mode, [](double a, double b) { return a * b; }, a, b); }      \
    double __ddiv_##suffix(double a, double b) { return rounded(mode, [](double a, double b) { return a / b; }, a, b); }      \
    double __fma_##suffix(double a, double b, double c) { return rounded(mode, [](double a, double b, double c) { return fma(a, b, c); }, a, b, c); } \
    double __drcp_##suffix(double a) { return __ddiv_##suffix(1, a); }                                                        \
    double __dsqrt_##suffix(double a) { return rounded(mode, [](double a) { return sqrt(a); }, a); }                          \
    float __double2float_##suffix(double x) { return rounded(mode, [](double x) { return float(x); }, x); }                   \
    float __int2float_##suffix(int x) { return __double2float_##suffix(x); }                                                  \
    float __uint2float_##suffix(unsigned x) { return __double2float_##suffix(x); }                                            \
    float __ll2float_##suffix(long long x) { return __double2float_##suffix(simt::to_odd(x)); }                               \
    float __ull2float_##suffix(unsigned long long x) { return __double2float_##suffix(simt::to_odd(x)); }                     \
    double __ll2double_##suffix(long long x) { return rounded(mode, [](long long x) { return double(x); }, x); }              \
    /* Its halves are exact, their sum rounds once. */                                                                        \
    double __ull2double_##suffix(unsigned long long x) { return __dadd_##suffix(double(x >> 32) * 0x1p32, double(unsigned(x))); }
ROUNDED(rz, simt::kZero)
ROUNDED(ru, simt::kUp)
ROUNDED(rd, simt::kDown)

namespace simt {

// To a format of so many bits behind the point, whose smallest normal number is 2^low.
static uint16_t narrow(double x, Round round, int bits, int low) {
    if (x != x) return nan_to_16_bits(float(x));
    const bool negative = std::signbit(x);
    const int infinity = (3 - 2 * low) << bits;
    int magnitude = infinity;
    if (!std::isinf(x)) {
        const double a = fabs(x);
        const int exponent = a == 0 ? low : std::max(ilogb(a), low);
        const double scaled = ldexp(a, bits - exponent), whole = floor(scaled), rest = scaled - whole;
        const bool odd = fmod(whole, 2) == 1;
        const bool up = round == Round::rn ? rest > 0.5 || (rest == 0.5 && odd) : rest > 0 && round != Round::rz && (round == Round::rd) == negative;
        // The hidden bit counts as one in the exponent, a carry out of the mantissa as well.
        const bool beyond = exponent > 1 - low;
        if (!beyond) magnitude = ((exponent - low) << bits) + int(whole) + up;
        const bool to_infinity = round == Round::rn || (round != Round::rz && (round == Round::rd) == negative);
        if (magnitude >= infinity) magnitude = to_infinity ? infinity : infinity - 1;
    }
    return uint16_t(magnitude | negative << 15);
}
uint16_t to_half(double x, Round round) { return narrow(x, round, 10, -14); }
uint16_t to_bfloat16(double x, Round round) { return narrow(x, round, 7, -126); }

}  // namespace simt

// ---- special functions -----------------------------------------------------------------------------

// Exact reduction to at most half a turn before pi comes in, as on the device: zeros are zeros.
double sinpi(double x) {
    const double turn = x - 2 * floor(x / 2 + 0.5);  // [-1, 1)
    return sin(M_PI * (turn > 0.5 ? 1 - turn : turn < -0.5 ? -1 - turn : turn));
}
double cospi(double x) {
    const double turn = fabs(x - 2 * floor(x / 2 + 0.5));
    return turn < 0.25 ? cos(M_PI * turn) : sin(M_PI * (0.5 - turn));
}

double normcdf(double x) { return 0.5 * erfc(-x / M_SQRT2); }

double erfcx(double x) {
    if (x < 25) return exp(x * x) * erfc(x);
    const double r = 1 / (x * x);
    double sum = 1;
    for (int k = 13; k > 0; k -= 2) sum = 1 - r * k / 2 * sum;
    return sum / (x * sqrt(M_PI));
}

double erfcinv(double y) {
    if (!(y >= 0 && y <= 2)) return NAN;
    if (y == 0) return INFINITY;
    if (y > 1) return y == 2 ? -INFINITY : -erfcinv(2 - y);
    if (y > 0.9375) return erfinv(1 - y);
    // From a beginning that is right to a few percent, by Newton's method on the logarithm.
    double x = sqrt(std::max(-log(y * sqrt(M_PI) * std::max(sqrt(-log(y)), 0.5)), 1e-3));
    for (int i = 0; i < 8; i++) x += (log(erfc(x)) - log(y)) * erfcx(x) * sqrt(M_PI) / 2;
    return x;
}

double erfinv(double y) {
    if (fabs(y) > 0.5) return y < 0 ? -erfinv(-y) : erfcinv(1 - y);
    if (y != y) return y;
    double x = y * sqrt(M_PI) / 2;
    for (int i = 0; i < 5; i++) x -= (erf(x) - y) * exp(x * x) * sqrt(M_PI) / 2;
    return y == 0 ? y : x;
}

double normcdfinv(double p) { return -M_SQRT2 * erfcinv(2 * p); }

// The modified Bessel functions of order 0 and 1.
static double bessel_i(int order, double x) {
    const double a = fabs(x);
    double term = 1, sum = 1;
    if (a < 30) {
        for (int k = 1; term > sum * 1e-18; k++) term *= a * a / 4 / k / (k + order), sum += term;
        return order ? x / 2 * sum : sum;
    }
    if (std::isinf(a)) return order ? x : a;
    for (int k = 1; k < 30 && fabs(term) > 1e-18; k++) term *= -(4 * order * order - (2 * k - 1) * (2 * k - 1)) / (8.0 * k * a), sum += term;
    const double root = exp(a / 2);  // its square may be too large where the result is not
    return (order && x < 0 ? -1 : 1) * (root / sqrt(2 * M_PI * a)) * sum * root;
}
double cyl_bessel_i0(double x) { return bessel_i(0, x); }
double cyl_bessel_i1(double x) { return bessel_i(1, x); }
