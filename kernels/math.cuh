// What several kernels share: EDM2's elementary functions, reductions, vectorised reads.
#pragma once
#include "ptx.cuh"

// eps of every normalisation, added to the root mean square (EDM2 eq. 30 and 66).
constexpr float NORM_EPS = 1e-4f;

// SiLU divided by the magnitude of its output for unit normal input (EDM2 eq. 81).
__device__ __forceinline__ float mp_silu(float x) { return x / ((1.0f + __expf(-x)) * 0.596f); }

// Its derivative.
__device__ __forceinline__ float mp_silu_grad(float x) {
    float s = 1.0f / (1.0f + __expf(-x));
    return s * (1.0f + x * (1.0f - s)) * (1.0f / 0.596f);
}

// 1 / (eps + rms) from a sum of squares of `count` values.
__device__ __forceinline__ float norm_factor(float sum_of_squares, int count) {
    return 1.0f / (NORM_EPS + sqrtf(sum_of_squares / float(count)));
}
