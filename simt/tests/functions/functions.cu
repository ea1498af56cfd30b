// CUDA's mathematical functions, each against another way to compute it, on every value where there are few and densely where
// there are many. main() calls them: they are the ones that kernels call.
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

static int wrong = 0;
static std::mt19937_64 engine(1);

static void expect(bool right, const char* name, double x = 0, double y = 0, double got = 0) {
    if (!right && wrong++ < 20) printf("%s(%.17g, %.17g) is %.17g\n", name, x, y, got);
}
template <class T> static bool same(T a, T b) { return (a != a && b != b) || !memcmp(&a, &b, sizeof a); }

// ---- to 16 bits by rounding mode: against the sorted list of what there is ----------------------------

template <class T> struct Format;
template <> struct Format<__half> { static constexpr int infinity = 0x7c00; };
template <> struct Format<__nv_bfloat16> { static constexpr int infinity = 0x7f80; };

// |x| rounded down in magnitude, as bits.
template <class T> static int below(long double x) {
    int low = 0, high = Format<T>::infinity;  // in the order of magnitudes
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if ((long double)float(simt::bit_cast<T>(uint16_t(middle))) <= x) low = middle;
        else high = middle;
    }
    return low;
}

enum Mode { rn, rz, ru, rd };
template <class T> static int rounded(long double x, Mode mode) {
    const bool negative = std::signbit(x);
    const long double a = fabsl(x);
    const int down = below<T>(a), infinity = Format<T>::infinity;
    const long double lower = float(simt::bit_cast<T>(uint16_t(down)));
    // Beyond the last the next would be at the same distance.
    const long double upper = down + 1 < infinity ? (long double)float(simt::bit_cast<T>(uint16_t(down + 1))) : 2 * lower - (long double)float(simt::bit_cast<T>(uint16_t(down - 1)));
    int bits = down;
    if (a != lower) {
        if (mode == rn) bits += a - lower > upper - a || (a - lower == upper - a && down % 2);
        else if (mode != rz) bits += (mode == rd) == negative;
    }
    return bits | negative << 15;
}

#define EXPECT_IN_MODE(T, name, from, mode, x) \
    expect(simt::bit_cast<uint16_t>(__##from##2##name##_##mode(x)) == rounded<T>(x, mode), "__" #from "2" #name "_" #mode, double(x))
#define EXPECT_ROUNDED(T, name, from, x) \
    (EXPECT_IN_MODE(T, name, from, rn, x), EXPECT_IN_MODE(T, name, from, rz, x), EXPECT_IN_MODE(T, name, from, ru, x), EXPECT_IN_MODE(T, name, from, rd, x))
#define EXPECT_BOTH(from, x) (EXPECT_ROUNDED(__half, half, from, x), EXPECT_ROUNDED(__nv_bfloat16, bfloat16, from, x))

template <class T> static float value(int bits) { return float(simt::bit_cast<T>(uint16_t(bits))); }

static void to_16_bits() {
    for (int bits = 0; bits < 0x7c00; bits++)  // each, the middle to the next, and what is beside the two
        for (float sign : {1.0f, -1.0f}) {
            const float at = sign * value<__half>(bits), next = bits + 1 < 0x7c00 ? sign * value<__half>(bits + 1) : sign * 65536, middle = at / 2 + next / 2;
            for (float x : {at, middle, nextafterf(middle, at), nextafterf(middle, next), nextafterf(at, next)}) EXPECT_ROUNDED(__half, half, float, x);
        }
    for (int bits = 0; bits < 0x7f80; bits += 3)
        for (float sign : {1.0f, -1.0f}) {
            const float at = sign * value<__nv_bfloat16>(bits), middle = simt::bit_cast<float>(simt::bit_cast<uint32_t>(at) + 0x8000);
            for (float x : {at, middle, nextafterf(middle, at), nextafterf(middle, 2 * middle), nextafterf(at, middle)}) EXPECT_ROUNDED(__nv_bfloat16, bfloat16, float, x);
        }
    for (int i = -32768; i < 65536; i++) {
        const short s = short(i);
        const unsigned short u = (unsigned short)i;
        EXPECT_BOTH(short, s);
        EXPECT_BOTH(ushort, u);
    }
    for (int i = 0; i < 20000; i++) {
        const uint64_t r = engine();
        long long l = (long long)(r >> (r % 60)), near = (l >> 9 | 1) << 8;  // a tie of bfloat16 for small ones
        for (long long x : {l, -l, near, near + 1, near - 1, l & ~((1ll << r % 50) - 1), (3ll << 40) + (1ll << 32), (257ll << 52) + 1, (257ll << 52) - 1, 257ll << 52}) {
            EXPECT_BOTH(ll, x);
            const unsigned long long u = (unsigned long long)x;
            EXPECT_BOTH(ull, u);
            const int n = int(x);
            EXPECT_BOTH(int, n);
            const unsigned un = unsigned(x);
            EXPECT_BOTH(uint, un);
        }
    }
    expect(__half2char_rz(half(200)) == 127 && __half2char_rz(half(-3.9f)) == -3 && __half2uchar_rz(half(-1)) == 0 && __half2uchar_rz(half(300)) == 255, "__half2char_rz");
    expect(__bfloat162char_rz(200) == 127 && __bfloat162uchar_rz(200.0f) == 200 && __bfloat162short_rn(2.5f) == 2 && __bfloat162ushort_ru(2.5f) == 3, "__bfloat162char_rz");
    expect(__half2float(__half(__half_raw{0x3c00})) == 1 && __half_raw(__half(2.0f)).x == 0x4000, "__half_raw");
}

// ---- arithmetic by rounding mode: against the processor's own mode ------------------------------------

template <class T> static T arbitrary() {  // any bits, and also numbers that are near each other
    const uint64_t r = engine();
    if constexpr (sizeof(T) == 4) return r >> 62 ? simt::bit_cast<float>(uint32_t(r)) : 1 + float(r & 0xffff) / 3;
    else return r >> 62 ? simt::bit_cast<double>(r) : 1 + double(r & 0xffffffff) / 3;
}
// A value of which the compiler knows nothing, so that it computes with it in its place.
template <class T> static T hidden(T x) {
    volatile T y = x;
    return y;
}
template <class T, class F, class... A> static T in_mode(int mode, F f, A... a) {
    fesetround(mode);
    const T result = hidden(T(f(hidden(a)...)));
    fesetround(FE_TONEAREST);
    return result;
}
#define EXPECT_MODE(T, call, expression, mode, host_mode)                                               \
    {                                                                                                   \
        const T got = call##_##mode ARGUMENTS, right = in_mode<T>(host_mode, [](auto... p) { return expression(p...); } PLAIN); \
        expect(same(got, right), #call "_" #mode, double(a), double(b), double(got));                   \
    }
#define EXPECT_MODES(T, call, expression) \
    EXPECT_MODE(T, call, expression, rz, FE_TOWARDZERO) EXPECT_MODE(T, call, expression, ru, FE_UPWARD) EXPECT_MODE(T, call, expression, rd, FE_DOWNWARD) \
    EXPECT_MODE(T, call, expression, rn, FE_TONEAREST)
template <class T> static T plus(T a, T b) { return a + b; }
template <class T> static T minus(T a, T b) { return a - b; }
template <class T> static T times(T a, T b) { return a * b; }
template <class T> static T over(T a, T b) { return a / b; }
template <class T> static T inverse(T a) { return 1 / a; }
template <class T> static T root(T a) { return sqrt(a); }
template <class T> static T multiply_add(T a, T b, T c) { return fma(a, b, c); }
template <class T> static float narrowed(T a) { return float(a); }
template <class T> static double widened(T a) { return double(a); }

static void arithmetic() {
    for (int i = 0; i < 30000; i++) {
        {
            const float a = arbitrary<float>(), b = arbitrary<float>(), c = arbitrary<float>();
#define ARGUMENTS (a, b)
#define PLAIN , a, b
            EXPECT_MODES(float, __fadd, plus) EXPECT_MODES(float, __fsub, minus) EXPECT_MODES(float, __fmul, times) EXPECT_MODES(float, __fdiv, over)
#undef ARGUMENTS
#undef PLAIN
#define ARGUMENTS (a)
#define PLAIN , a
            EXPECT_MODES(float, __frcp, inverse) EXPECT_MODES(float, __fsqrt, root)
#undef ARGUMENTS
#undef PLAIN
#define ARGUMENTS (a, b, c)
#define PLAIN , a, b, c
            EXPECT_MODES(float, __fmaf, multiply_add) EXPECT_MODES(float, __fmaf_ieee, multiply_add)
        }
        const double a = arbitrary<double>(), b = arbitrary<double>(), c = arbitrary<double>();
        EXPECT_MODES(double, __fma, multiply_add)
#undef ARGUMENTS
#undef PLAIN
#define ARGUMENTS (a, b)
#define PLAIN , a, b
        EXPECT_MODES(double, __dadd, plus) EXPECT_MODES(double, __dsub, minus) EXPECT_MODES(double, __dmul, times) EXPECT_MODES(double, __ddiv, over)
#undef ARGUMENTS
#undef PLAIN
#define ARGUMENTS (a)
#define PLAIN , a
        EXPECT_MODES(double, __drcp, inverse) EXPECT_MODES(double, __dsqrt, root) EXPECT_MODES(float, __double2float, narrowed)
        {
            const uint64_t r = engine();
            const long long a = (long long)r >> (r % 60);
            EXPECT_MODES(float, __ll2float, narrowed) EXPECT_MODES(double, __ll2double, widened)
        }
        {
            const uint64_t r = engine();
            const int a = int(r) >> (r % 30);
            EXPECT_MODES(float, __int2float, narrowed)
        }
        {
            const uint64_t r = engine();
            const unsigned a = unsigned(r) >> (r % 30);
            EXPECT_MODES(float, __uint2float, narrowed)
        }
        {  // the processor has no instruction for these: from a long double, which holds them
            const uint64_t r = engine();
            const unsigned long long u = r >> (r % 60);
            const long double a = u;
#undef ARGUMENTS
#define ARGUMENTS (u)
            EXPECT_MODES(float, __ull2float, narrowed) EXPECT_MODES(double, __ull2double, widened)
        }
    }
}

// ---- bytes and halves of a word: against long long -----------------------------------------------------

typedef long long (*Element)(long long x, long long y, long long low, long long high);  // of a type with these bounds
struct Simd {
    const char* name;
    unsigned (*on_2)(unsigned, unsigned);
    unsigned (*on_4)(unsigned, unsigned);
    bool is_signed;
    Element element;
};
static long long limit(long long x, long long low, long long high) { return x < low ? low : x > high ? high : x; }
#define SIMD(name, is_signed, expression) \
    {#name, name##2, name##4, is_signed, [](long long x, long long y, long long low, long long high) -> long long { (void)y, (void)low, (void)high; return expression; }}
#define SIMD_1(name, expression)                                                                                                \
    {#name, [](unsigned a, unsigned) { return name##2(a); }, [](unsigned a, unsigned) { return name##4(a); }, true,             \
     [](long long x, long long, long long low, long long high) -> long long { (void)low, (void)high; return expression; }}
#define SIMD_COMPARE(name, is_signed, op) SIMD(__vcmp##name, is_signed, x op y ? ~0ll : 0ll), SIMD(__vset##name, is_signed, x op y ? 1ll : 0ll)
static const Simd kSimd[] = {
    SIMD_1(__vabs, std::llabs(x)), SIMD_1(__vabsss, limit(std::llabs(x), low, high)), SIMD_1(__vneg, 0 - x), SIMD_1(__vnegss, limit(0 - x, low, high)),
    SIMD(__vabsdiffs, true, std::llabs(x - y)), SIMD(__vabsdiffu, false, std::llabs(x - y)), SIMD(__vadd, true, x + y), SIMD(__vsub, true, x - y),
    SIMD(__vaddss, true, limit(x + y, low, high)), SIMD(__vaddus, false, limit(x + y, low, high)), SIMD(__vsubss, true, limit(x - y, low, high)),
    SIMD(__vsubus, false, limit(x - y, low, high)), SIMD(__vavgu, false, (long long)ceil((x + y) / 2.0)), SIMD(__vhaddu, false, (long long)floor((x + y) / 2.0)),
    SIMD(__vavgs, true, (long long)(x + y >= 0 ? floor((x + y + 1) / 2.0) : floor((x + y) / 2.0))),
    SIMD(__vmaxs, true, std::max(x, y)), SIMD(__vmaxu, false, std::max(x, y)), SIMD(__vmins, true, std::min(x, y)), SIMD(__vminu, false, std::min(x, y)),
    SIMD_COMPARE(eq, true, ==), SIMD_COMPARE(ne, true, !=), SIMD_COMPARE(ges, true, >=), SIMD_COMPARE(geu, false, >=), SIMD_COMPARE(gts, true, >),
    SIMD_COMPARE(gtu, false, >), SIMD_COMPARE(les, true, <=), SIMD_COMPARE(leu, false, <=), SIMD_COMPARE(lts, true, <), SIMD_COMPARE(ltu, false, <),
};

static long long element(unsigned word, int bits, int i, bool is_signed) {
    const long long x = (long long)((uint64_t(word) / (1ull << bits * i)) % (1ull << bits));
    return is_signed && x >= 1ll << (bits - 1) ? x - (1ll << bits) : x;
}
template <class F> static unsigned elements(int bits, F f) {
    uint64_t word = 0;
    for (int i = 0; i < 32 / bits; i++) word += ((uint64_t)f(i) & ((1ull << bits) - 1)) << bits * i;
    return unsigned(word);
}

static void simd(unsigned a, unsigned b, unsigned c) {
    for (const Simd& s : kSimd)
        for (int bits : {16, 8}) {
            const long long low = s.is_signed ? -(1ll << (bits - 1)) : 0, high = low + (1ll << bits) - 1;
            const unsigned right = elements(bits, [&](int i) { return s.element(element(a, bits, i, s.is_signed), element(b, bits, i, s.is_signed), low, high); });
            expect((bits == 16 ? s.on_2 : s.on_4)(a, b) == right, s.name, a, b);
        }
    auto sum = [&](int bits, bool is_signed) {
        long long total = 0;
        for (int i = 0; i < 32 / bits; i++) total += std::llabs(element(a, bits, i, is_signed) - element(b, bits, i, is_signed));
        return unsigned(total);
    };
    expect(__vsads2(a, b) == sum(16, true) && __vsads4(a, b) == sum(8, true) && __vsadu2(a, b) == sum(16, false) && __vsadu4(a, b) == sum(8, false), "__vsad", a, b);

    // Of three. A sum wraps around.
    auto of_3 = [&](int bits, bool is_signed, auto f) {
        return elements(bits, [&](int i) {
            return f(element(a, bits, i, is_signed), element(b, bits, i, is_signed), element(c, bits, i, is_signed), [=](long long x) { return element(unsigned(x), bits, 0, is_signed); });
        });
    };
#define DPX(name, expression)                                                                                                            \
    {                                                                                                                                    \
        auto f = [](long long x, long long y, long long z, auto wrap) -> long long { (void)wrap; return expression; };                   \
        auto relu = [](long long x, long long y, long long z, auto wrap) -> long long { (void)wrap; return std::max(0ll, (long long)(expression)); }; \
        expect(unsigned(name##_s32(a, b, c)) == of_3(32, true, f), #name "_s32", a, b);                                                  \
        expect(name##_u32(a, b, c) == of_3(32, false, f), #name "_u32", a, b);                                                           \
        expect(name##_s16x2(a, b, c) == of_3(16, true, f), #name "_s16x2", a, b);                                                        \
        expect(name##_u16x2(a, b, c) == of_3(16, false, f), #name "_u16x2", a, b);                                                       \
        expect(unsigned(name##_s32_relu(a, b, c)) == of_3(32, true, relu), #name "_s32_relu", a, b);                                     \
        expect(name##_s16x2_relu(a, b, c) == of_3(16, true, relu), #name "_s16x2_relu", a, b);                                           \
    }
    DPX(__viaddmax, std::max(wrap(x + y), z))
    DPX(__viaddmin, std::min(wrap(x + y), z))
    DPX(__vimax3, std::max(std::max(x, y), z))
    DPX(__vimin3, std::min(std::min(x, y), z))
    auto max_relu = [](long long x, long long y, long long, auto) { return std::max(std::max(x, y), 0ll); };
    auto min_relu = [](long long x, long long y, long long, auto) { return std::max(std::min(x, y), 0ll); };
    expect(unsigned(__vimax_s32_relu(a, b)) == of_3(32, true, max_relu) && __vimax_s16x2_relu(a, b) == of_3(16, true, max_relu), "__vimax_relu", a, b);
    expect(unsigned(__vimin_s32_relu(a, b)) == of_3(32, true, min_relu) && __vimin_s16x2_relu(a, b) == of_3(16, true, min_relu), "__vimin_relu", a, b);
    bool high = false, low = false;
    expect(__vibmax_s16x2(a, b, &high, &low) == __vmaxs2(a, b) && high == (short(a >> 16) >= short(b >> 16)) && low == (short(a) >= short(b)), "__vibmax_s16x2", a, b);
    expect(__vibmin_u16x2(a, b, &high, &low) == __vminu2(a, b) && high == (a >> 16 <= b >> 16) && low == ((a & 0xffff) <= (b & 0xffff)), "__vibmin_u16x2", a, b);
    expect(__vibmax_s32(a, b, &high) == max(int(a), int(b)) && high == (int(a) >= int(b)), "__vibmax_s32", a, b);
    expect(__vibmin_u32(a, b, &high) == min(a, b) && high == (a <= b), "__vibmin_u32", a, b);

    auto dot = [&](int count, int bits, int first, bool is_signed) {
        long long total = c;
        for (int i = 0; i < count; i++) total += element(a, bits, i, is_signed) * element(b, 8, first + i, is_signed);
        return unsigned(total);
    };
    expect(unsigned(__dp4a(int(a), int(b), int(c))) == dot(4, 8, 0, true) && __dp4a(a, b, c) == dot(4, 8, 0, false), "__dp4a", a, b);
    expect(unsigned(__dp2a_lo(int(a), int(b), int(c))) == dot(2, 16, 0, true) && __dp2a_lo(a, b, c) == dot(2, 16, 0, false), "__dp2a_lo", a, b);
    expect(unsigned(__dp2a_hi(int(a), int(b), int(c))) == dot(2, 16, 2, true) && __dp2a_hi(a, b, c) == dot(2, 16, 2, false), "__dp2a_hi", a, b);
    expect(__dp4a(simt::bit_cast<char4>(a), simt::bit_cast<char4>(b), int(c)) == __dp4a(int(a), int(b), int(c)), "__dp4a of char4", a, b);
}

// ---- integers ------------------------------------------------------------------------------------------

static void integers(unsigned a, unsigned b) {
    const long long x = int(a), y = int(b);
    expect(__hadd(int(a), int(b)) == (long long)floor((x + y) / 2.0) && __rhadd(int(a), int(b)) == (long long)floor((x + y + 1) / 2.0), "__hadd", double(x), double(y));
    expect(__uhadd(a, b) == uint64_t((double(a) + b) / 2) && __urhadd(a, b) == uint64_t((double(a) + b + 1) / 2), "__uhadd", a, b);
    const unsigned by = a % 40, kept = by < 32 ? by : 32;
    const unsigned __int128 both = (unsigned __int128)(uint64_t(b) << 32 | a);
    expect(__funnelshift_lc(a, b, by) == unsigned(both << kept >> 32) && __funnelshift_rc(a, b, by) == unsigned(both >> kept), "__funnelshift_lc", a, b);
    expect(llmin(x, y) == std::min(x, y) && llmax(x, y) == std::max(x, y) && umin(a, b) == std::min(a, b) && umax(a, b) == std::max(a, b), "llmin", double(x), double(y));
    expect(ullmin(uint64_t(x), uint64_t(y)) == std::min(uint64_t(x), uint64_t(y)) && ullmax(uint64_t(x), uint64_t(y)) == std::max(uint64_t(x), uint64_t(y)), "ullmin");
    const double d = simt::bit_cast<double>(uint64_t(a) << 32 | b);
    expect(unsigned(__double2hiint(d)) == a && unsigned(__double2loint(d)) == b && same(__hiloint2double(int(a), int(b)), d), "__hiloint2double", a, b);
    expect(__nv_bswap32(a) == __byte_perm(a, 0, 0x0123) && __nv_bswap16((unsigned short)a) == (unsigned short)(a << 8 | (a >> 8 & 0xff)), "__nv_bswap32", a);
    expect(__nv_bswap64(uint64_t(a) << 32 | b) == (uint64_t(__nv_bswap32(b)) << 32 | __nv_bswap32(a)), "__nv_bswap64", a, b);
    for (int offset = -33; offset <= 33; offset += 3) {  // by a list of the bits that are set
        const unsigned base = b % 32;
        std::vector<unsigned> set;
        for (unsigned i = 0; i < 32; i++) {
            const unsigned at = offset < 0 ? 31 - i : i;
            if ((a >> at & 1) && (offset < 0 ? at <= base : at >= base)) set.push_back(at);
        }
        const size_t n = size_t(abs(offset));
        const unsigned right = offset == 0 ? (a >> base & 1 ? base : ~0u) : n <= set.size() ? set[n - 1] : ~0u;
        expect(__fns(a, base, offset) == right, "__fns", a, offset, __fns(a, base, offset));
    }
}

// ---- halves: comparisons, fused operations -------------------------------------------------------------

#define EXPECT_COMPARES(name, op)                                                                                            \
    expect(__h##name(x, y) == (ordered && a op b) && __h##name##u(x, y) == (!ordered || a op b), "__h" #name, a, b);         \
    expect(float(__low2float(__h##name##2(xy, yx))) == (ordered && a op b) && float(__high2float(__h##name##u2(xy, yx))) == (!ordered || b op a), "__h" #name "2", a, b); \
    expect(__h##name##2_mask(xy, yx) == ((ordered && a op b ? 0xffffu : 0) | (ordered && b op a ? 0xffff0000u : 0)), "__h" #name "2_mask", a, b); \
    expect(__h##name##u2_mask(xy, yx) == ((!ordered || a op b ? 0xffffu : 0) | (!ordered || b op a ? 0xffff0000u : 0)), "__h" #name "u2_mask", a, b); \
    expect(__hb##name##2(xy, yx) == (ordered && a op b && b op a) && __hb##name##u2(xy, yx) == (!ordered || (a op b && b op a)), "__hb" #name "2", a, b)

template <class T, class T2> static void halves() {
    std::vector<int> bits = {0, 0x8000, 1, 0x8001, 0x3c00, 0x3c01, 0xbc00, 0x3f80, 0xbf80, 0x7bff, Format<T>::infinity, Format<T>::infinity | 0x8000, 0x7fff, 0x7e00, 0xfe00};
    for (int i = 0; i < 150; i++) bits.push_back(int(engine() & 0xffff));
    for (int i : bits)
        for (int j : bits) {
            const T x = simt::bit_cast<T>(uint16_t(i)), y = simt::bit_cast<T>(uint16_t(j));
            const T2 xy = {x, y}, yx = {y, x};
            const float a = x, b = y;
            const bool ordered = a == a && b == b;
            EXPECT_COMPARES(eq, ==);
            expect(__hne(x, y) == (ordered && a != b) && __hneu(x, y) == (a != b) && (x != y) == (a != b), "__hne", a, b);
            EXPECT_COMPARES(lt, <);
            EXPECT_COMPARES(le, <=);
            EXPECT_COMPARES(gt, >);
            EXPECT_COMPARES(ge, >=);
            expect((xy < yx) == __hblt2(xy, yx) && (xy != yx) == __hbneu2(xy, yx), "operator< of two", a, b);
            expect(__low2float(__hisnan2(xy)) == (a != a) && __high2float(__hisnan2(xy)) == (b != b), "__hisnan2", a, b);

            const T z = simt::bit_cast<T>(uint16_t(bits[size_t(i * 31 + j) % bits.size()]));
            const T plain = __hfma(x, y, z);
            const float sum = plain;
            const float sat = sum != sum ? 0.0f : sum < 0 ? 0.0f : sum > 1 ? 1.0f : sum, relu = sum < 0 ? 0.0f : sum;
            const bool poison = i == 0xffff || j == 0xffff;
            if (poison) continue;
            expect(float(__hfma_sat(x, y, z)) == sat && __high2float(__hfma2_sat(xy, yx, T2(z, z))) == sat, "__hfma_sat", a, b, __hfma_sat(x, y, z));
            const float got = __hfma_relu(x, y, z), two = __low2float(__hfma2_relu(xy, yx, T2(z, z)));
            expect((got == relu && two == relu) || (sum != sum && got != got && two != two), "__hfma_relu", a, b, got);
            const float sums[] = {a + b, a - b, a * b}, sats[] = {__hadd_sat(x, y), __hsub_sat(x, y), __hmul_sat(x, y)};
            for (int k = 0; k < 3; k++) {
                const float s = float(T(sums[k]));
                expect(sats[k] == (s != s || s < 0 ? 0.0f : s > 1 ? 1.0f : s), "__hadd_sat", a, b, sats[k]);
            }
        }
    for (int p = -8; p < 8; p++)
        for (int q = -8; q < 8; q++) {
            const T2 r = __hcmadd(T2(T(p), T(q)), T2(T(q), T(3)), T2(T(1), T(2)));
            expect(__low2float(r) == p * q - q * 3 + 1 && __high2float(r) == p * 3 + q * q + 2, "__hcmadd", p, q);
        }
}

// ---- special functions -----------------------------------------------------------------------------------

static void near(double got, long double right, double bound, const char* name, double x) {
    expect(same(got, double(right)) || fabsl(got - right) <= bound * fabsl(right), name, x, double(right), got);
}

static void special() {
    for (int i = -4000; i <= 4000; i++) {
        const double x = i / 1000.0;
        if (fabs(x) < 3) near(erfinv(erf(x)), x, 1e-15 + 1e-16 * exp(x * x), "erfinv", x);
        near(erfcinv(erfc(x)), x, 1e-13 + (x < 0 ? 1e-15 * exp(x * x) : 0), "erfcinv", x);
        near(normcdf(normcdfinv(normcdf(x))), normcdf(x), 1e-14, "normcdfinv", x);
        const long double w = (long double)x * 25;
        near(erfcx(double(w)), w < -26 ? INFINITY : expl(w * w) * erfcl(w), 2e-13 + (w < 0 ? 1e-15 * double(w * w) : 0), "erfcx", double(w));
        near(cyl_bessel_i0(x * 20), std::cyl_bessel_i(0.0, fabs(x * 20)), 1e-13, "cyl_bessel_i0", x * 20);
        near(cyl_bessel_i1(x * 20), copysign(std::cyl_bessel_i(1.0, fabs(x * 20)), x), 1e-13, "cyl_bessel_i1", x * 20);
        if (i % 500 == 0) {
            const int quarter = ((i / 500) % 4 + 4) % 4;
            expect(sinpi(x) == (quarter % 2 ? 2 - quarter : 0) && cospi(x) == (quarter % 2 ? 0 : 1 - quarter), "sinpi, cospi", x, 0, sinpi(x));
        } else {
            near(sinpi(x), sinl(M_PIl * (long double)x), 1e-12, "sinpi", x);
            near(cospi(x), cosl(M_PIl * (long double)x), 1e-12, "cospi", x);
        }
    }
    for (double y : {1e-300, 1e-100, 1e-20, 1e-5}) near(erfc(erfcinv(y)), y, 1e-12, "erfcinv", y);
    expect(erfinv(1.0) == INFINITY && erfinv(-1.0) == -INFINITY && isnan(erfinv(1.5)) && erfcinv(0.0) == INFINITY && erfcinv(2.0) == -INFINITY && erfinvf(0.0f) == 0, "erfinv at its ends");
    expect(normcdfinvf(0.5f) == 0 && normcdff(0.0f) == 0.5f, "normcdfinvf");
    expect(isinf(cyl_bessel_i0f(100)) && cyl_bessel_i1f(-0.0f) == 0 && cyl_bessel_i0f(0) == 1, "cyl_bessel_i0f");
    for (int i = 0; i < 10000; i++) {
        const float p[4] = {float(int(engine() % 2001) - 1000) * 1e17f, float(int(engine() % 2001) - 1000) * 1e17f, 3e18f, float(i)};
        const long double s2 = sqrtl((long double)p[0] * p[0] + (long double)p[1] * p[1]), s3 = sqrtl(s2 * s2 + (long double)p[2] * p[2]), s4 = sqrtl(s3 * s3 + (long double)p[3] * p[3]);
        near(rhypotf(p[0], p[1]), s2 == 0 ? INFINITY : 1 / s2, 1e-7, "rhypotf", p[0]);
        near(norm3df(p[0], p[1], p[2]), s3, 1e-7, "norm3df", p[0]);
        near(rnorm3df(p[0], p[1], p[2]), 1 / s3, 1e-7, "rnorm3df", p[0]);
        near(norm4df(p[0], p[1], p[2], p[3]), s4, 1e-7, "norm4df", p[0]);
        near(rnorm4df(p[0], p[1], p[2], p[3]), 1 / s4, 1e-7, "rnorm4df", p[0]);
        near(normf(4, p), s4, 1e-7, "normf", p[0]);
        near(rnormf(4, p), 1 / s4, 2e-7, "rnormf", p[0]);
        near(norm3d(p[0], p[1], p[2]), s3, 1e-15, "norm3d", p[0]);
        near(rcbrt(double(i + 1)), 1 / cbrtl(i + 1), 1e-15, "rcbrt", i + 1);
    }
}

int main() {
    to_16_bits();
    arithmetic();
    for (unsigned i = 0; i < 65536; i++) simd((i & 0xff) << 8 | (i & 0xff) << 24 | 0x7f0080, (i >> 8) << 8 | (i >> 8) << 16 | 0x80000001, i * 2654435761u);  // all pairs of bytes
    for (int i = 0; i < 10000; i++) {
        const uint64_t r = engine(), s = engine();
        simd(unsigned(r), unsigned(r >> 32), unsigned(s));
        integers(unsigned(r), unsigned(r >> 32));
        integers(unsigned(r) | 0x80000000u, 0x7fffffff - unsigned(i));
    }
    halves<__half, __half2>();
    halves<__nv_bfloat16, __nv_bfloat162>();
    special();
    return wrong != 0;
}
