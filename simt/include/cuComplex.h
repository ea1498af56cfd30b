// Complex numbers as float2 and double2.
#pragma once
#include "cuda_runtime.h"

#define SIMT_COMPLEX(Name, T, V, f)                                                                            \
    typedef V Name;                                                                                                        \
    inline V make_##Name(T x, T y) { return {x, y}; }                                                                      \
    inline T cuCreal##f(V z) { return z.x; }                                                                               \
    inline T cuCimag##f(V z) { return z.y; }                                                                               \
    inline V cuConj##f(V z) { return {z.x, -z.y}; }                                                                        \
    inline V cuCadd##f(V a, V b) { return {a.x + b.x, a.y + b.y}; }                                                        \
    inline V cuCsub##f(V a, V b) { return {a.x - b.x, a.y - b.y}; }                                                        \
    inline V cuCmul##f(V a, V b) { return {a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x}; }                                \
    inline V cuCdiv##f(V a, V b) {                                                                                         \
        const T scale = 1 / (fabs##f(b.x) + fabs##f(b.y)); /* lest the squares overflow */                                 \
        const V p = {a.x * scale, a.y * scale}, q = {b.x * scale, b.y * scale};                                            \
        const T over = 1 / (q.x * q.x + q.y * q.y);                                                                        \
        return {(p.x * q.x + p.y * q.y) * over, (p.y * q.x - p.x * q.y) * over};                                           \
    }                                                                                                                      \
    inline T cuCabs##f(V z) { return hypot##f(z.x, z.y); }                                                                 \
    inline V cuCfma##f(V a, V b, V c) { return cuCadd##f(cuCmul##f(a, b), c); }
SIMT_COMPLEX(cuFloatComplex, float, float2, f)
SIMT_COMPLEX(cuDoubleComplex, double, double2, )
#undef SIMT_COMPLEX
typedef cuFloatComplex cuComplex;
inline cuComplex make_cuComplex(float x, float y) { return {x, y}; }
inline cuDoubleComplex cuComplexFloatToDouble(cuFloatComplex z) { return {z.x, z.y}; }
inline cuFloatComplex cuComplexDoubleToFloat(cuDoubleComplex z) { return {float(z.x), float(z.y)}; }
