// What several kernels share: EDM2's elementary functions, reductions, vectorised reads.
#pragma once
#include "ptx.cuh"

// Four random words from a counter and a key (Salmon et al. 2011), as in src/rng.rs.
__device__ __forceinline__ uint4 philox4x32_10(uint4 c, unsigned k0, unsigned k1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        if (round > 0) k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        c = make_uint4(__umulhi(c.z, 0xCD9E8D57u) ^ c.y ^ k0, c.z * 0xCD9E8D57u,
                       __umulhi(c.x, 0xD2511F53u) ^ c.w ^ k1, c.x * 0xD2511F53u);
    }
    return c;
}

// What kernels that measure a rate take (limits.cu, limits_hopper.cu).
struct Rate {
    float* out;  // written only if a sum is what none can be, so that the compiler keeps the loop
    int rounds;
    int padding;
};

// Eight random values of T, of either sign and magnitudes from 0.5 to 2.
template <class T>
__device__ __forceinline__ uint4 random8(unsigned number) {
    const uint4 bits = philox4x32_10(make_uint4(number, 0, 0, 0), 0, 0);
    const uint32_t exponent = is_half<T> ? 0x38003800u : 0x3f003f00u;
    return make_uint4((bits.x & 0x83ff83ffu) | exponent, (bits.y & 0x83ff83ffu) | exponent,
                      (bits.z & 0x83ff83ffu) | exponent, (bits.w & 0x83ff83ffu) | exponent);
}

// eps of every normalisation, added to the root mean square (EDM2 eq. 30 and 66).
constexpr float NORM_EPS = 1e-4f;

constexpr float LOG2_E = 1.44269504f;

// SiLU divided by the magnitude of its output for unit normal input (EDM2 eq. 81).
// Five instructions, right to a few units in the last place: the exact division alone would be a function of its own.
constexpr float SILU_MAGNITUDE = 0.596f;
__device__ __forceinline__ float mp_silu(float x) {
    return x * reciprocal_fast(fmaf(exp2_fast(x * -LOG2_E), SILU_MAGNITUDE, SILU_MAGNITUDE));
}

// Its derivative times SILU_MAGNITUDE: s + x s (1 - s), s the sigmoid of x.
__device__ __forceinline__ float silu_grad(float x) {
    const float s = reciprocal_fast(1.0f + exp2_fast(x * -LOG2_E));
    return fmaf(x, fmaf(-s, s, s), s);
}

// 1 / (eps + rms) from a sum of squares of `count` values.
__device__ __forceinline__ float norm_factor(float sum_of_squares, int count) {
    return 1.0f / (NORM_EPS + sqrtf(sum_of_squares / float(count)));
}

// Eight values of T, 16 bytes, as floats.
template <class T>
__device__ __forceinline__ void read8(const void* from, size_t vector, float (&x)[8]) {
    unpack8<T>(load16(static_cast<const uint4*>(from) + vector), x);
}
template <class T>
__device__ __forceinline__ void write8(void* to, size_t vector, const float (&x)[8]) {
    store16(static_cast<uint4*>(to) + vector, pack8<T>(x));
}

// Four floats.
__device__ __forceinline__ void read4(const float* from, float (&x)[4]) {
    const uint4 v = load16(from);
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
}
__device__ __forceinline__ void write4(float* to, const float (&x)[4]) {
    store16(to, make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])));
}

// Sum over the `lanes` (a power of two) neighbours that a lane belongs to, the same in each; the
// whole warp calls it.
__device__ __forceinline__ float group_sum(float x, int lanes) {
    for (int by = lanes / 2; by; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
    return x;
}

// Sums over the block (a multiple of 32 threads, at most 1024) of N values of each thread, the
// same bits in every thread and every run. `scratch` is shared, N rows of 32.
template <int N>
__device__ __forceinline__ void block_sum(float (&x)[N], float (*scratch)[32]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = warp_sum(x[i]);
    if (warps == 1) return;
    __syncthreads();  // the scratch may still be read from the last sum
    if (lane == 0)
#pragma unroll
        for (int i = 0; i < N; i++) scratch[i][warp] = x[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = warp_sum(lane < warps ? scratch[i][lane] : 0.0f);
}

// Fourier feature sqrt(2) cos(c_noise freq + phase) (EDM2 eq. 75). In half turns, whose reduction is
// exact and needs no local memory.
__device__ __forceinline__ float fourier_feature(float c_noise, float freq, float phase) {
    return 1.41421356f * cospif((c_noise * freq + phase) * 0.318309886f);
}
