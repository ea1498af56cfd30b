// nvcuda::wmma on mma.m16n8k16: a fragment holds the registers of one or several of those. Shapes 16x16x16, 32x8x16 and
// 8x32x16 of __half and __nv_bfloat16.
#pragma once
#include "cuda_runtime.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

namespace detail {
// Which row and column element e of a lane has: of A (pairs along k), of B (the same, transposed), of D.
template <class Use, int M, int N>
inline void place(int e, int& row, int& column) {
    const int lane = simt::lane(), g = lane / 4, t = lane % 4;
    if constexpr (std::is_same_v<Use, matrix_a>) row = e / 8 * 16 + g + 8 * (e / 2 % 2), column = 2 * t + e % 2 + 8 * (e / 4 % 2);
    else if constexpr (std::is_same_v<Use, matrix_b>) row = 2 * t + e % 2 + 8 * (e / 2 % 2), column = e / 4 * 8 + g;
    else row = e / 4 / (N / 8) * 16 + g + 8 * (e / 2 % 2), column = e / 4 % (N / 8) * 8 + 2 * t + e % 2;
}
}  // namespace detail

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
    static_assert(K == 16 && ((M == 16 && N == 16) || (M == 32 && N == 8) || (M == 8 && N == 32)), "wmma: this shape is not in the emulator");
    static constexpr int rows = (M + 15) / 16, columns = N / 8;
    static constexpr int num_elements = std::is_same_v<Use, matrix_a> ? rows * 8 : std::is_same_v<Use, matrix_b> ? columns * 4 : rows * columns * 4;
    T x[num_elements];
};

template <class Use, int M, int N, int K, class T, class L>
inline void fill_fragment(fragment<Use, M, N, K, T, L>& f, const T& value) {
    for (T& x : f.x) x = value;
}

template <class Use, int M, int N, int K, class T, class L>
inline void load_matrix_sync(fragment<Use, M, N, K, T, L>& f, const T* p, unsigned stride, SIMT_WHERE) {
    __syncwarp(0xffffffffu, at);
    for (int e = 0; e < f.num_elements; e++) {
        int row, column;
        detail::place<Use, M, N>(e, row, column);
        if (row >= M && !std::is_same_v<Use, matrix_b>) f.x[e] = T(0.0f);
        else f.x[e] = p[std::is_same_v<L, row_major> ? row * stride + column : column * stride + row];
    }
}
template <int M, int N, int K, class T>
inline void load_matrix_sync(fragment<accumulator, M, N, K, T>& f, const T* p, unsigned stride, layout_t layout, SIMT_WHERE) {
    __syncwarp(0xffffffffu, at);
    for (int e = 0; e < f.num_elements; e++) {
        int row, column;
        detail::place<accumulator, M, N>(e, row, column);
        f.x[e] = row < M ? p[layout == mem_row_major ? row * stride + column : column * stride + row] : T(0.0f);
    }
}
template <int M, int N, int K, class T>
inline void store_matrix_sync(T* p, const fragment<accumulator, M, N, K, T>& f, unsigned stride, layout_t layout, SIMT_WHERE) {
    for (int e = 0; e < f.num_elements; e++) {
        int row, column;
        detail::place<accumulator, M, N>(e, row, column);
        if (row < M) p[layout == mem_row_major ? row * stride + column : column * stride + row] = f.x[e];
    }
    __syncwarp(0xffffffffu, at);
}

template <int M, int N, int K, class T, class LA, class LB, class S>
inline void mma_sync(fragment<accumulator, M, N, K, S>& d, const fragment<matrix_a, M, N, K, T, LA>& a, const fragment<matrix_b, M, N, K, T, LB>& b,
                     const fragment<accumulator, M, N, K, S>& c, SIMT_WHERE) {
    static_assert(std::is_same_v<S, float> || std::is_same_v<S, __half>, "wmma: sums in float or __half");
    using Fragment = fragment<accumulator, M, N, K, S>;
    uint32_t fa[sizeof a.x / 4], fb[sizeof b.x / 4];
    memcpy(fa, a.x, sizeof fa), memcpy(fb, b.x, sizeof fb);
    d = c;
    simt::mma(d.x, fa, fb, {Fragment::rows, Fragment::columns, std::is_same_v<T, __half> ? simt::Element::f16 : simt::Element::bf16,
                            std::is_same_v<S, float> ? simt::Accumulator::f32 : simt::Accumulator::f16}, at);
}

}  // namespace nvcuda::wmma
