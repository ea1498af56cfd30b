// Self-attention over the pixels of an image, flash style, with the pixel norm of q, k and v fused
// (EDM2, appendix B.5), and its gradient. The score matrix is never written.
//
//     q^ = q / (eps + rms(q)), likewise k^, v^        per token and head, over its C channels
//     out[i] = sum_j P[i][j] v^[j],   P = softmax_j(q^[i] . k^[j] / sqrt(C))
//
// Since |q^|, |k^| <= sqrt(C), scores are bounded by sqrt(C): exp(score) is within e^+-8 for C = 64 and
// needs no running maximum. exp(score) itself is a normal fp16 number (C = 128: half of it), and its
// sum over any number of tokens that fits memory is far from f32's limits. So a block passes over the
// keys once, divides by the sum at its end, and never rescales what it has.
//
// The gradient, with dP = dout v^T, D[i] = sum_j P[i][j] dP[i][j], dS = P (dP - D):
//
//     dq^ = dS k^ / sqrt(C)     dk^ = dS^T q^ / sqrt(C)     dv^ = P^T dout
//
// and each through its norm: dx = dx^ / (eps + r) - x^ (dx^ . x^) / (C r), r = rms(x). Nothing is kept
// from the forward pass. `grad_q` finds the sums of exp and D in a first pass over the keys and dq in
// a second one, and leaves the sums for `grad_kv`, which passes over the queries. No atomics: the
// same bits in every run. P and dS enter the products times 64: small probabilities (1/352) and small
// gradients stay normal numbers, and |64 dS| <= 128 C rms(dout) stays finite.
//
// LAYOUT  qkv, its gradient   [images, tokens, 3, heads, C]   16-bit, all of q, then k, then v
//         out, its gradient   [images, tokens, heads, C]      16-bit
//         sums                [images, heads, tokens] of {64 / sum_j exp(score), D}, f32, 8 bytes
// The official order of qkv's channels is (head * C + i) * 3 + {q,k,v}; whoever loads the weight of the
// conv before permutes its rows, so that a token's q is C consecutive elements, copied by cp.async.
//
// COST    with N = images * heads, T tokens:
//     forward  2 N T^2 C multiply-adds; reads 6 N T C bytes, writes 2 N T C (the floor)
//     grad_q   5 N T^2 C; reads 8 N T C, writes 2 N T C + 8 N T       (floor of the gradient: reads
//     grad_kv  4 N T^2 C; reads 8 N T C + 8 N T, writes 4 N T C        8 N T C, writes 6 N T C)
// Keys or queries are read again by every block of 64 rows, from L2: at T = 352 six times 90 KB a head.
//
// A block of 4 warps owns 64 rows of one head, a warp 16 of them; tiles of 32 rows of the other side
// stream through two stages of shared memory. Whoever copied a chunk normalises it in place.
// Scores stay in registers: the accumulators of one product are the A fragments of the next.
#include "math.cuh"

struct AttentionParams {
    const void* qkv;
    const void* grad_out;  // not read by forward
    void* out;             // forward: out; else the gradient of qkv
    float2* sums;          // not used by forward
    int32_t tokens;
    int32_t heads;
};
static_assert(sizeof(AttentionParams) == 40, "mirrored in src/backend/gpu/attention.rs");

// Grid: [tokens / kRows rounded up, heads, images].
constexpr int kThreads = 128;
constexpr int kRows = 64;    // of a block
constexpr int kStream = 32;  // rows of a streamed tile
constexpr float kLog2e = 1.44269504f;
constexpr float kGain = 64.0f;  // of P and dS

template <int C>
struct Head {
    static constexpr int kOwn = kRows * C * 2, kTile = kStream * C * 2;  // bytes
    static constexpr int kStep = C == 128 ? 16 : kStream;  // rows that a warp takes at a time: registers
    static constexpr int kWide = C < 64 ? C / 8 : 8;       // columns of 8 in one tile of products
    // q is normalised with this gain, so that q^ k^ is the exponent of 2.
    __device__ static float query_gain() { return kLog2e / sqrtf(float(C)); }
};

// 16 rows x C columns of a warp, in f32.
template <int C>
using Accumulator = float[C / 8 / Head<C>::kWide][1][Head<C>::kWide][4];

// Byte offset of a 16-byte chunk in a tile of rows of C elements, free of bank conflicts.
template <int C>
__device__ __forceinline__ int at(int row, int chunk) {
    if constexpr (C == 16) return row * 32 + (chunk ^ (row >> 2 & 1)) * 16;
    else return swizzle<C * 2>(row, chunk);
}

// One head of one image.
template <class T, int C>
struct Block {
    int tokens, width, out_width;  // elements from one token to the next in qkv, in out
    int row0;                      // first token of this block
    int warp_row, lane;            // first row of this warp within the block
    size_t qkv, out;               // offsets of the first token's q and out
    size_t sums;

    __device__ explicit Block(const AttentionParams& p) {
        tokens = p.tokens, width = 3 * p.heads * C, out_width = p.heads * C;
        row0 = blockIdx.x * kRows, warp_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
        qkv = size_t(blockIdx.z) * tokens * width + blockIdx.y * C;
        out = size_t(blockIdx.z) * tokens * out_width + blockIdx.y * C;
        sums = (size_t(blockIdx.z) * p.heads + blockIdx.y) * tokens;
    }
    __device__ bool warp_is_idle() const { return row0 + warp_row >= tokens; }
    __device__ int tiles() const { return (tokens + kStream - 1) / kStream; }
};

// Copies ROWS tokens from `first` on into a tile; behind the last token come zeros.
template <int ROWS, class T, int C>
__device__ __forceinline__ void fetch(smem_addr tile, const T* x, int stride, int first, int tokens) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * C / 8; i += kThreads) {
        const int row = i / (C / 8), chunk = i % (C / 8);
        const bool valid = first + row < tokens;
        cp_async(tile + at<C>(row, chunk), x + (valid ? size_t(first + row) * stride + chunk * 8 : 0), valid);
    }
}

// Normalises the rows of a tile, times `gain`, each thread what it has fetched. `rms`, if given,
// receives each row's.
template <int ROWS, class T, int C>
__device__ __forceinline__ void normalise(unsigned char* tile, float gain, float* rms = nullptr) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * C / 8; i += kThreads) {
        const int row = i / (C / 8), chunk = i % (C / 8);
        unsigned char* place = tile + at<C>(row, chunk);
        float x[8], sum = 0.0f;
        unpack8<T>(load16(place), x);
#pragma unroll
        for (int e = 0; e < 8; e++) sum = fmaf(x[e], x[e], sum);
#pragma unroll
        for (int by = 1; by < C / 8; by *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
        const float r = sqrtf(sum * (1.0f / C)), factor = gain / (NORM_EPS + r);
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] *= factor;
        store16(place, pack8<T>(x));
        if (rms && chunk == 0) rms[row] = r;
    }
}

// The A fragments of 16 rows of a tile.
template <int C>
__device__ __forceinline__ void load_a(uint32_t (&a)[C / 16][4], smem_addr tile, int row, int lane) {
    smem_addr rows[C / 16];
#pragma unroll
    for (int k = 0; k < C / 16; k++) rows[k] = tile + at<C>(row + lane % 16, k * 2 + lane / 16);
    ldmatrix_n(a, rows);
}

// s[16][8 N] = a b^T, b the 8 N rows of a tile from `row` on.
template <class T, int C, int N>
__device__ __forceinline__ void times_rows(float (&s)[1][N][4], const uint32_t (&a)[C / 16][4], smem_addr tile,
                                           int row, int lane) {
#pragma unroll
    for (int j = 0; j < N; j++) s[0][j][0] = s[0][j][1] = s[0][j][2] = s[0][j][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < C / 16; k++) {
        smem_addr rows[N / 2];
        uint32_t pairs[N / 2][4], b[N][2];
#pragma unroll
        for (int j = 0; j < N / 2; j++)
            rows[j] = tile + at<C>(row + j * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2);
        ldmatrix_n(pairs, rows);
#pragma unroll
        for (int j = 0; j < N; j++) b[j][0] = pairs[j / 2][j % 2 * 2], b[j][1] = pairs[j / 2][j % 2 * 2 + 1];
        const uint32_t one[1][4] = {{a[k][0], a[k][1], a[k][2], a[k][3]}};
        mma_tile<T>(s, one, b);
    }
}

// acc[16][C] += p b, b the 8 N rows of a tile from `row` on; p are accumulators, rounded to 16 bits.
template <class T, int C, int N>
__device__ __forceinline__ void times_columns(Accumulator<C>& acc, const float (&p)[1][N][4], smem_addr tile, int row,
                                              int lane) {
    constexpr int kWide = Head<C>::kWide;
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        const float *low = p[0][2 * k], *high = p[0][2 * k + 1];
        const uint32_t a[1][4] = {{pack2<T>(low[0], low[1]), pack2<T>(low[2], low[3]), pack2<T>(high[0], high[1]),
                                   pack2<T>(high[2], high[3])}};
#pragma unroll
        for (int h = 0; h < C / 8 / kWide; h++) {
            smem_addr rows[kWide / 2];
            uint32_t pairs[kWide / 2][4], b[kWide][2];
#pragma unroll
            for (int j = 0; j < kWide / 2; j++)
                rows[j] = tile + at<C>(row + k * 16 + lane % 16, h * kWide + j * 2 + lane / 16);
            ldmatrix_n<true>(pairs, rows);
#pragma unroll
            for (int j = 0; j < kWide; j++) b[j][0] = pairs[j / 2][j % 2 * 2], b[j][1] = pairs[j / 2][j % 2 * 2 + 1];
            mma_tile<T>(acc[h], a, b);
        }
    }
}

// s = 2^(s - shift), and 0 in columns behind the last token; `first` is the token of column 0.
template <int N>
__device__ __forceinline__ void exponentiate(float (&s)[1][N][4], float shift, int first, int tokens, int lane) {
    const bool whole = first + N * 8 <= tokens;
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const bool inside = whole || first + j * 8 + lane % 4 * 2 + e % 2 < tokens;
            s[0][j][e] = inside ? exp2f(s[0][j][e] - shift) : 0.0f;
        }
}

// Over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// acc holds the gradient of normalised rows over `gain`; makes of it the gradient of the rows before.
// The tile holds the normalised rows times `tile_gain`.
template <class T, int C>
__device__ __forceinline__ void norm_backward(Accumulator<C>& acc, float gain, const unsigned char* tile,
                                              float tile_gain, const float* rms, int warp_row, int lane) {
    constexpr int kWide = Head<C>::kWide;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = warp_row + half * 8 + lane / 4;
        auto y = [&](int j) {
            return unpack2<T>(*reinterpret_cast<const uint32_t*>(tile + at<C>(row, j) + lane % 4 * 4));
        };
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < C / 8; j++) {
            const float2 pair = y(j);
            const float* g = acc[j / kWide][0][j % kWide] + half * 2;
            dot = fmaf(g[0], pair.x, fmaf(g[1], pair.y, dot));
        }
        dot = row_sum(dot);
        const float r = rms[row], across = gain / (NORM_EPS + r);
        // Where r = 0 the row is 0, and so is its part of the gradient.
        const float along = r > 0.0f ? dot * gain / (tile_gain * tile_gain * C * r) : 0.0f;
#pragma unroll
        for (int j = 0; j < C / 8; j++) {
            const float2 pair = y(j);
            float* g = acc[j / kWide][0][j % kWide] + half * 2;
            g[0] = g[0] * across - pair.x * along, g[1] = g[1] * across - pair.y * along;
        }
    }
}

// Writes a warp's 16 rows to memory through its own rows of a tile, 16 bytes a lane. `x` is token 0.
template <class T, int C>
__device__ __forceinline__ void write_rows(const Accumulator<C>& acc, unsigned char* tile, T* x, int stride,
                                           const Block<T, C>& b) {
    constexpr int kWide = Head<C>::kWide;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < C / 8; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float* v = acc[j / kWide][0][j % kWide] + half * 2;
            unsigned char* place = tile + at<C>(b.warp_row + half * 8 + b.lane / 4, j) + b.lane % 4 * 4;
            *reinterpret_cast<uint32_t*>(place) = pack2<T>(v[0], v[1]);
        }
    __syncwarp();
#pragma unroll
    for (int i = b.lane; i < 16 * C / 8; i += 32) {
        const int row = b.warp_row + i / (C / 8), chunk = i % (C / 8), token = b.row0 + row;
        if (token < b.tokens) store16(x + size_t(token) * stride + chunk * 8, load16(tile + at<C>(row, chunk)));
    }
}

// ---- forward ------------------------------------------------------------------------------------

// Shared memory: q [64][C], then two stages of k [32][C], v [32][C].
template <class T, int C>
__device__ void attention_forward(const AttentionParams& p) {
    using H = Head<C>;
    constexpr int N = H::kStep / 8;
    constexpr float kShift = C == 128 ? 1.0f : 0.0f;  // exp(sqrt(128)) is above fp16's 65504
    DYN_SMEM(unsigned char, smem);
    const Block<T, C> b(p);
    const T* q = static_cast<const T*>(p.qkv) + b.qkv;
    const int lane = b.lane;

    auto fetch_tile = [&](int tile) {
        const smem_addr stage = smem_address(smem) + H::kOwn + tile % 2 * 2 * H::kTile;
        fetch<kStream, T, C>(stage, q + b.out_width, b.width, tile * kStream, b.tokens);
        fetch<kStream, T, C>(stage + H::kTile, q + 2 * b.out_width, b.width, tile * kStream, b.tokens);
        cp_async_commit();
    };
    fetch<kRows, T, C>(smem_address(smem), q, b.width, b.row0, b.tokens);
    cp_async_commit();
    fetch_tile(0);
    cp_async_wait<1>();
    normalise<kRows, T, C>(smem, H::query_gain());
    __syncthreads();
    uint32_t a[C / 16][4];
    load_a<C>(a, smem_address(smem), b.warp_row, lane);

    Accumulator<C> acc = {};
    float sum[2] = {};
    for (int tile = 0; tile < b.tiles(); tile++) {
        unsigned char* stage = smem + H::kOwn + tile % 2 * 2 * H::kTile;
        const smem_addr keys = smem_address(stage);
        cp_async_wait<0>();
        normalise<kStream, T, C>(stage, 1.0f);
        normalise<kStream, T, C>(stage + H::kTile, 1.0f);
        __syncthreads();  // this stage is there for all, and all have left the one loaded next
        if (tile + 1 < b.tiles()) fetch_tile(tile + 1);
        if (b.warp_is_idle()) continue;
#pragma unroll
        for (int row = 0; row < kStream; row += H::kStep) {
            const int first = tile * kStream + row;
            if (first >= b.tokens) break;
            float s[1][N][4];
            times_rows<T, C>(s, a, keys, row, lane);
            exponentiate(s, kShift, first, b.tokens, lane);
#pragma unroll
            for (int j = 0; j < N; j++) sum[0] += s[0][j][0] + s[0][j][1], sum[1] += s[0][j][2] + s[0][j][3];
            times_columns<T, C>(acc, s, keys + H::kTile, row, lane);
        }
    }
    if (b.warp_is_idle()) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float inverse = 1.0f / row_sum(sum[half]);
#pragma unroll
        for (int j = 0; j < C / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) acc[j / H::kWide][0][j % H::kWide][half * 2 + e] *= inverse;
    }
    write_rows<T, C>(acc, smem, static_cast<T*>(p.out) + b.out, b.out_width, b);
}

// ---- gradient -----------------------------------------------------------------------------------

// dq, and the sums. Shared memory: q [64][C], dout [64][C], two stages of k [32][C], v [32][C], rms of
// q [64].
template <class T, int C>
__device__ void attention_grad_q(const AttentionParams& p) {
    using H = Head<C>;
    constexpr int N = H::kStep / 8;
    DYN_SMEM(unsigned char, smem);
    const Block<T, C> b(p);
    const T* q = static_cast<const T*>(p.qkv) + b.qkv;
    const T* grad = static_cast<const T*>(p.grad_out) + b.out;
    float* const rms = reinterpret_cast<float*>(smem + 2 * H::kOwn + 4 * H::kTile);
    const int lane = b.lane, tiles = b.tiles();

    auto fetch_tile = [&](int turn) {  // all tiles, twice
        const smem_addr stage = smem_address(smem) + 2 * H::kOwn + turn % 2 * 2 * H::kTile;
        const int first = turn % tiles * kStream;
        fetch<kStream, T, C>(stage, q + b.out_width, b.width, first, b.tokens);
        fetch<kStream, T, C>(stage + H::kTile, q + 2 * b.out_width, b.width, first, b.tokens);
        cp_async_commit();
    };
    fetch<kRows, T, C>(smem_address(smem), q, b.width, b.row0, b.tokens);
    fetch<kRows, T, C>(smem_address(smem) + H::kOwn, grad, b.out_width, b.row0, b.tokens);
    cp_async_commit();
    fetch_tile(0);
    cp_async_wait<1>();
    normalise<kRows, T, C>(smem, H::query_gain(), rms);
    __syncthreads();
    uint32_t a[C / 16][4], g[C / 16][4];
    load_a<C>(a, smem_address(smem), b.warp_row, lane);
    load_a<C>(g, smem_address(smem) + H::kOwn, b.warp_row, lane);

    Accumulator<C> acc = {};
    float sum[2] = {}, mean[2] = {};  // of exp(score); of dP, weighted with it
    for (int turn = 0; turn < 2 * tiles; turn++) {
        unsigned char* stage = smem + 2 * H::kOwn + turn % 2 * 2 * H::kTile;
        const smem_addr keys = smem_address(stage);
        cp_async_wait<0>();
        normalise<kStream, T, C>(stage, 1.0f);
        normalise<kStream, T, C>(stage + H::kTile, 1.0f);
        __syncthreads();
        if (turn + 1 < 2 * tiles) fetch_tile(turn + 1);
        if (b.warp_is_idle()) continue;
        if (turn == tiles) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float inverse = 1.0f / row_sum(sum[half]);
                sum[half] = kGain * inverse, mean[half] = row_sum(mean[half]) * inverse;
                const int token = b.row0 + b.warp_row + half * 8 + lane / 4;
                if (lane % 4 == 0 && token < b.tokens) p.sums[b.sums + token] = make_float2(sum[half], mean[half]);
            }
        }
#pragma unroll
        for (int row = 0; row < kStream; row += H::kStep) {
            const int first = turn % tiles * kStream + row;
            if (first >= b.tokens) break;
            float s[1][N][4], dp[1][N][4];
            times_rows<T, C>(s, a, keys, row, lane);
            exponentiate(s, 0.0f, first, b.tokens, lane);
            times_rows<T, C>(dp, g, keys + H::kTile, row, lane);
            if (turn < tiles) {
#pragma unroll
                for (int j = 0; j < N; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        sum[e / 2] += s[0][j][e];
                        mean[e / 2] = fmaf(s[0][j][e], dp[0][j][e], mean[e / 2]);
                    }
            } else {
#pragma unroll
                for (int j = 0; j < N; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) s[0][j][e] *= sum[e / 2] * (dp[0][j][e] - mean[e / 2]);
                times_columns<T, C>(acc, s, keys, row, lane);
            }
        }
    }
    if (b.warp_is_idle()) return;
    norm_backward<T, C>(acc, 1.0f / (kGain * sqrtf(float(C))), smem, H::query_gain(), rms, b.warp_row, lane);
    write_rows<T, C>(acc, smem, static_cast<T*>(p.out) + b.qkv, b.width, b);
}

// dk and dv: the block's rows are keys. Shared memory: k [64][C], v [64][C], two stages of q [32][C],
// dout [32][C], sums [32] of 8 bytes; then rms of k [64], of v [64].
template <class T, int C>
__device__ void attention_grad_kv(const AttentionParams& p) {
    using H = Head<C>;
    constexpr int N = H::kStep / 8, kStage = 2 * H::kTile + kStream * 8;
    DYN_SMEM(unsigned char, smem);
    const Block<T, C> b(p);
    const T* q = static_cast<const T*>(p.qkv) + b.qkv;
    const T* grad = static_cast<const T*>(p.grad_out) + b.out;
    const smem_addr own = smem_address(smem);
    float* const rms = reinterpret_cast<float*>(smem + 2 * H::kOwn + 2 * kStage);
    const int lane = b.lane;

    auto fetch_tile = [&](int tile) {
        const smem_addr stage = own + 2 * H::kOwn + tile % 2 * kStage;
        const int first = tile * kStream;
        fetch<kStream, T, C>(stage, q, b.width, first, b.tokens);
        fetch<kStream, T, C>(stage + H::kTile, grad, b.out_width, first, b.tokens);
        if (threadIdx.x < kStream) {
            const int token = first + threadIdx.x;
            // Behind the last token the sums are 0, and so are P and dS.
            const bool valid = token < b.tokens;
            cp_async<8>(stage + 2 * H::kTile + threadIdx.x * 8, p.sums + b.sums + (valid ? token : 0), valid);
        }
        cp_async_commit();
    };
    fetch<kRows, T, C>(own, q + b.out_width, b.width, b.row0, b.tokens);
    fetch<kRows, T, C>(own + H::kOwn, q + 2 * b.out_width, b.width, b.row0, b.tokens);
    cp_async_commit();
    fetch_tile(0);
    cp_async_wait<1>();
    normalise<kRows, T, C>(smem, 1.0f, rms);
    normalise<kRows, T, C>(smem + H::kOwn, 1.0f, rms + kRows);
    __syncthreads();
    // Two accumulators of 128 columns leave no registers for these: there they are loaded each time.
    constexpr bool kKeep = C < 128;
    uint32_t k[C / 16][4], v[C / 16][4];
    if constexpr (kKeep) {
        load_a<C>(k, own, b.warp_row, lane);
        load_a<C>(v, own + H::kOwn, b.warp_row, lane);
    }

    Accumulator<C> dk = {}, dv = {};
    for (int tile = 0; tile < b.tiles(); tile++) {
        unsigned char* stage = smem + 2 * H::kOwn + tile % 2 * kStage;
        const smem_addr queries = smem_address(stage);
        cp_async_wait<0>();
        normalise<kStream, T, C>(stage, H::query_gain());
        __syncthreads();
        if (tile + 1 < b.tiles()) fetch_tile(tile + 1);
        if (b.warp_is_idle()) continue;
#pragma unroll
        for (int row = 0; row < kStream; row += H::kStep) {
            if (tile * kStream + row >= b.tokens) break;
            float s[1][N][4], dp[1][N][4];
            if constexpr (!kKeep) load_a<C>(k, own, b.warp_row, lane);
            times_rows<T, C>(s, k, queries, row, lane);
            if constexpr (!kKeep) load_a<C>(v, own + H::kOwn, b.warp_row, lane);
            times_rows<T, C>(dp, v, queries + H::kTile, row, lane);
#pragma unroll
            for (int j = 0; j < N; j++) {
                const uint4 two = load16(stage + 2 * H::kTile + (row + j * 8 + lane % 4 * 2) * 8);
                const float sum[2] = {__uint_as_float(two.x), __uint_as_float(two.z)};
                const float mean[2] = {__uint_as_float(two.y), __uint_as_float(two.w)};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[0][j][e] = exp2f(s[0][j][e]) * sum[e % 2];
                    dp[0][j][e] = s[0][j][e] * (dp[0][j][e] - mean[e % 2]);
                }
            }
            times_columns<T, C>(dv, s, queries + H::kTile, row, lane);
            times_columns<T, C>(dk, dp, queries, row, lane);
        }
    }
    if (b.warp_is_idle()) return;
    T* const out = static_cast<T*>(p.out) + b.qkv;
    norm_backward<T, C>(dk, 1.0f / (kGain * kLog2e), smem, 1.0f, rms, b.warp_row, lane);
    norm_backward<T, C>(dv, 1.0f / kGain, smem + H::kOwn, 1.0f, rms + kRows, b.warp_row, lane);
    write_rows<T, C>(dk, smem, out + b.out_width, b.width, b);
    write_rows<T, C>(dv, smem + H::kOwn, out + 2 * b.out_width, b.width, b);
}

// ---- instances ----------------------------------------------------------------------------------

// `blocks` of a multiprocessor share its registers (64 K). The compiler left to itself spills in grad_kv
// of 32 channels.
#define KERNEL(operation, type, T, C, blocks)                                                        \
    extern "C" __global__ void __launch_bounds__(kThreads, blocks)                                   \
        attention_##operation##_##type##_c##C(AttentionParams p) { attention_##operation<T, C>(p); } \
    KERNEL_EXPORT(attention_##operation##_##type##_c##C)
#define KERNELS(operation, C, blocks)                \
    KERNEL(operation, f16, __half, C, blocks);       \
    KERNEL(operation, bf16, __nv_bfloat16, C, blocks)

KERNELS(forward, 16, 8);
KERNELS(forward, 32, 6);
KERNELS(forward, 64, 4);
KERNELS(forward, 128, 3);
KERNELS(grad_q, 16, 6);
KERNELS(grad_q, 32, 5);
KERNELS(grad_q, 64, 4);
KERNELS(grad_q, 128, 2);
KERNELS(grad_kv, 16, 6);
KERNELS(grad_kv, 32, 4);
KERNELS(grad_kv, 64, 3);
KERNELS(grad_kv, 128, 2);
