// CUDA's functions on the bytes and halves of a 32-bit word. Part of simt.h.
#pragma once

namespace simt {

// Element i of type T, in an int.
template <class T> inline int lane_of(unsigned word, int i) { return T(word >> (8 * sizeof(T) * i)); }

// f on each element of type T.
template <class T, class F>
inline unsigned each(unsigned a, unsigned b, unsigned c, F f) {
    unsigned result = 0;
    for (int i = 0; i < int(4 / sizeof(T)); i++) {
        const unsigned element = unsigned(f(lane_of<T>(a, i), lane_of<T>(b, i), lane_of<T>(c, i)));
        result |= (element & (0xffffffffu >> (32 - 8 * sizeof(T)))) << (8 * sizeof(T) * i);
    }
    return result;
}

template <class T>
inline int clamped(int x) {
    return x < std::numeric_limits<T>::min() ? std::numeric_limits<T>::min() : x > std::numeric_limits<T>::max() ? std::numeric_limits<T>::max() : x;
}

template <class A, class B> inline int dot(A a, B b, int count, int first, int c) {
    for (int i = 0; i < count; i++) c = int(unsigned(c) + unsigned(a(i)) * unsigned(b(first + i)));
    return c;
}
template <class A, class B> inline int dot(unsigned a, unsigned b, int first, int c) {
    return dot([=](int i) { return lane_of<A>(a, i); }, [=](int i) { return lane_of<B>(b, i); }, int(4 / sizeof(A)), first, c);
}

}  // namespace simt

// x and y are elements, T their type.
#define SIMT_LANES(name, Element, expression)                           \
    inline unsigned name(unsigned a, unsigned b) {                      \
        using T = Element;                                              \
        (void)sizeof(T);                                                \
        return simt::each<T>(a, b, 0, [](int x, [[maybe_unused]] int y, int) { return expression; }); \
    }
#define SIMT_LANES_U(name, expression) SIMT_LANES(name##2, uint16_t, expression) SIMT_LANES(name##4, uint8_t, expression)
#define SIMT_LANES_S(name, expression) SIMT_LANES(name##2, int16_t, expression) SIMT_LANES(name##4, int8_t, expression)
#define SIMT_LANES_1(name, expression)                                   \
    SIMT_LANES(name##2_, int16_t, expression)                            \
    SIMT_LANES(name##4_, int8_t, expression)                             \
    inline unsigned name##2(unsigned a) { return name##2_(a, 0); }       \
    inline unsigned name##4(unsigned a) { return name##4_(a, 0); }
SIMT_LANES_1(__vabs, x < 0 ? -x : x)
SIMT_LANES_1(__vabsss, simt::clamped<T>(x < 0 ? -x : x))
SIMT_LANES_1(__vneg, -x)
SIMT_LANES_1(__vnegss, simt::clamped<T>(-x))
SIMT_LANES_S(__vabsdiffs, x < y ? y - x : x - y)
SIMT_LANES_U(__vabsdiffu, x < y ? y - x : x - y)
SIMT_LANES_U(__vadd, x + y)
SIMT_LANES_S(__vaddss, simt::clamped<T>(x + y))
SIMT_LANES_U(__vaddus, simt::clamped<T>(x + y))
SIMT_LANES_U(__vsub, x - y)
SIMT_LANES_S(__vsubss, simt::clamped<T>(x - y))
SIMT_LANES_U(__vsubus, simt::clamped<T>(x - y))
SIMT_LANES_S(__vavgs, (x + y + (x + y >= 0)) >> 1)
SIMT_LANES_U(__vavgu, (x + y + 1) >> 1)
SIMT_LANES_U(__vhaddu, (x + y) >> 1)
SIMT_LANES_S(__vmaxs, x < y ? y : x)
SIMT_LANES_U(__vmaxu, x < y ? y : x)
SIMT_LANES_S(__vmins, x < y ? x : y)
SIMT_LANES_U(__vminu, x < y ? x : y)
#define SIMT_LANES_COMPARE(name, op, sign) \
    SIMT_LANES_##sign(__vcmp##name, x op y ? -1 : 0) SIMT_LANES_##sign(__vset##name, x op y)
SIMT_LANES_COMPARE(eq, ==, U) SIMT_LANES_COMPARE(ne, !=, U)
SIMT_LANES_COMPARE(ges, >=, S) SIMT_LANES_COMPARE(geu, >=, U) SIMT_LANES_COMPARE(gts, >, S) SIMT_LANES_COMPARE(gtu, >, U)
SIMT_LANES_COMPARE(les, <=, S) SIMT_LANES_COMPARE(leu, <=, U) SIMT_LANES_COMPARE(lts, <, S) SIMT_LANES_COMPARE(ltu, <, U)
#undef SIMT_LANES_COMPARE
#undef SIMT_LANES_1
#undef SIMT_LANES_U
#undef SIMT_LANES_S
#undef SIMT_LANES

#define SIMT_SADS(name, T2, T4)                                                                                     \
    inline unsigned name##2(unsigned a, unsigned b) { return simt::sum_of_differences<T2>(a, b); }                  \
    inline unsigned name##4(unsigned a, unsigned b) { return simt::sum_of_differences<T4>(a, b); }
namespace simt {
template <class T> inline unsigned sum_of_differences(unsigned a, unsigned b) {
    unsigned sum = 0;
    for (int i = 0; i < int(4 / sizeof(T)); i++) sum += unsigned(abs(lane_of<T>(a, i) - lane_of<T>(b, i)));
    return sum;
}
}  // namespace simt
SIMT_SADS(__vsads, int16_t, int8_t)
SIMT_SADS(__vsadu, uint16_t, uint8_t)
#undef SIMT_SADS

// Of three, or with 0 (relu): on words and on their halves, where a sum wraps around.
#define SIMT_DPX(name, R, T, E, expression)                                                       \
    inline R name##32(R a, R b, R c) { using V = R; const R x = a, y = b, z = c; return V(expression); } \
    inline unsigned name##16x2(unsigned a, unsigned b, unsigned c) {                              \
        using V = E;                                                                              \
        return simt::each<E>(a, b, c, [](int x, int y, int z) { return V(expression); });         \
    }
#define SIMT_DPX_RELU(name, expression)                                                           \
    inline int name##32_relu(int x, int y, int z) { using V = int; return expression; }           \
    inline unsigned name##16x2_relu(unsigned a, unsigned b, unsigned c) {                         \
        using V = int16_t;                                                                        \
        return simt::each<V>(a, b, c, [](int x, int y, int z) { return expression; });            \
    }
#define SIMT_DPX_ALL(name, expression)                                                            \
    SIMT_DPX(name##_s, int, int, int16_t, expression) SIMT_DPX(name##_u, unsigned, unsigned, uint16_t, expression) \
    SIMT_DPX_RELU(name##_s, max(V(expression), V(0)))
SIMT_DPX_ALL(__viaddmax, max(V(x + y), V(z)))
SIMT_DPX_ALL(__viaddmin, min(V(x + y), V(z)))
SIMT_DPX_ALL(__vimax3, max(max(V(x), V(y)), V(z)))
SIMT_DPX_ALL(__vimin3, min(min(V(x), V(y)), V(z)))
#undef SIMT_DPX_ALL
#undef SIMT_DPX_RELU
#undef SIMT_DPX
inline int __vimax_s32_relu(int a, int b) { return __vimax3_s32(a, b, 0); }
inline int __vimin_s32_relu(int a, int b) { return max(min(a, b), 0); }
inline unsigned __vimax_s16x2_relu(unsigned a, unsigned b) { return __vmaxs2(__vmaxs2(a, b), 0); }
inline unsigned __vimin_s16x2_relu(unsigned a, unsigned b) { return __vmaxs2(__vmins2(a, b), 0); }
// Which also say whether the first was it.
#define SIMT_DPX_WHICH(name, op, suffix, R, E, extreme, extremes)                                 \
    inline R name##suffix##32(R a, R b, bool* first) { return *first = a op b, extreme(a, b); }   \
    inline unsigned name##suffix##16x2(unsigned a, unsigned b, bool* high, bool* low) {           \
        *high = simt::lane_of<E>(a, 1) op simt::lane_of<E>(b, 1), *low = simt::lane_of<E>(a, 0) op simt::lane_of<E>(b, 0); \
        return extremes(a, b);                                                                    \
    }
SIMT_DPX_WHICH(__vibmax, >=, _s, int, int16_t, max, __vmaxs2) SIMT_DPX_WHICH(__vibmax, >=, _u, unsigned, uint16_t, max, __vmaxu2)
SIMT_DPX_WHICH(__vibmin, <=, _s, int, int16_t, min, __vmins2) SIMT_DPX_WHICH(__vibmin, <=, _u, unsigned, uint16_t, min, __vminu2)
#undef SIMT_DPX_WHICH

// Products of elements, added up; _lo and _hi: halves with the two lower or upper bytes.
#define SIMT_DOT(name, A, B, first, W, VA, VB)                                                    \
    inline W name(W a, W b, W c) { return W(simt::dot<A, B>(unsigned(a), unsigned(b), first, int(c))); } \
    inline W name(VA a, VB b, W c) { return name(simt::bit_cast<W>(a), simt::bit_cast<W>(b), c); }
SIMT_DOT(__dp4a, int8_t, int8_t, 0, int, char4, char4) SIMT_DOT(__dp4a, uint8_t, uint8_t, 0, unsigned, uchar4, uchar4)
SIMT_DOT(__dp2a_lo, int16_t, int8_t, 0, int, short2, char4) SIMT_DOT(__dp2a_lo, uint16_t, uint8_t, 0, unsigned, ushort2, uchar4)
SIMT_DOT(__dp2a_hi, int16_t, int8_t, 2, int, short2, char4) SIMT_DOT(__dp2a_hi, uint16_t, uint8_t, 2, unsigned, ushort2, uchar4)
#undef SIMT_DOT
