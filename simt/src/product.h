// Products of 16-bit matrices with AVX2, or plain loops: what mma and wgmma share.
#pragma once
#include <immintrin.h>

#include "simt.h"

namespace simt {

// 8x8 matrix of 16-bit elements, rows to columns.
static inline void transpose8x8(__m128i r[8]) {
    __m128i s[8], t[8];
    for (int i = 0; i < 4; i++) {
        s[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
    }
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 2; i++) {
            t[4 * h + 2 * i] = _mm_unpacklo_epi32(s[4 * h + i], s[4 * h + 2 + i]);
            t[4 * h + 2 * i + 1] = _mm_unpackhi_epi32(s[4 * h + i], s[4 * h + 2 + i]);
        }
    for (int i = 0; i < 4; i++) {
        r[2 * i] = _mm_unpacklo_epi64(t[i], t[4 + i]);
        r[2 * i + 1] = _mm_unpackhi_epi64(t[i], t[4 + i]);
    }
}

// Eight 16-bit values to f32.
static inline void widen(__m128i v, bool bf16, float* out) {
#ifdef __AVX2__
    _mm256_storeu_ps(out, bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16))
                               : _mm256_cvtph_ps(v));
#else
    uint16_t h[8];
    memcpy(h, &v, sizeof h);
    for (int i = 0; i < 8; i++) out[i] = bf16 ? bfloat16_to_float(h[i]) : half_to_float(h[i]);
#endif
}

// Four rows of COLUMNS tiles of 8 columns side by side, `stride` floats from row to row, += a[4][16] *
// b[COLUMNS][16][8]: with 8 accumulators the adders stay busy.
template <int COLUMNS>
static inline void multiply(const float (*a)[16], const float (*b)[16][8], float* d, size_t stride) {
#ifdef __AVX2__
    // Unrolled, or g++ -O2 keeps the sums in memory.
    __m256 sum[4][COLUMNS];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; c++) sum[r][c] = _mm256_loadu_ps(d + r * stride + c * 8);
    for (int k = 0; k < 16; k++)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
#pragma GCC unroll 2
            for (int c = 0; c < COLUMNS; c++)
                sum[r][c] = _mm256_fmadd_ps(_mm256_broadcast_ss(&a[r][k]), _mm256_load_ps(b[c][k]), sum[r][c]);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; c++) _mm256_storeu_ps(d + r * stride + c * 8, sum[r][c]);
#else
    for (int k = 0; k < 16; k++)
        for (int r = 0; r < 4; r++)
            for (int c = 0; c < COLUMNS; c++)
                for (int i = 0; i < 8; i++) d[r * stride + c * 8 + i] += a[r][k] * b[c][k][i];
#endif
}

}  // namespace simt
