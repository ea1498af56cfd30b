// Self-attention over the pixels of an image, flash style, with the pixel norm of q, k and v fused
// (EDM2, appendix B.5), and its gradient. The score matrix is never written.
//
//     q^ = q / (eps + rms(q)), likewise k^, v^        per token and head, over its C channels
//     out[i] = sum_j P[i][j] v^[j],   P = softmax_j(q^[i] . k^[j] / sqrt(C))
//
// Since |q^|, |k^| <= sqrt(C), scores are bounded by sqrt(C): exp(score) is within e^+-8 for C = 64 and needs no running
// maximum. exp(score) itself is a normal fp16 number (C = 128: half of it), and its sum over any number of tokens that fits
// memory is far from f32's limits. So a block passes over the keys once, divides by the sum at the end, and never rescales
// what it has. What several warps make of different keys is simply added.
//
// The gradient, with dP = dout v^T, D[i] = sum_j P[i][j] dP[i][j], dS = P (dP - D):
//
//     dq^ = dS k^ / sqrt(C)     dk^ = dS^T q^ / sqrt(C)     dv^ = P^T dout
//
// and each through its norm: dx = dx^ / (eps + r) - x^ (dx^ . x^) / (C r), r = rms(x). Nothing is kept from the forward
// pass. `grad_q` finds the sums of exp and D in a first pass over the keys and dq in a second one, and leaves the sums for
// `grad_kv`, which passes over the queries. No atomics: the same bits in every run. P and dS enter the products times 64:
// small probabilities (1/352) and small gradients stay normal numbers, and |64 dS| <= 128 C rms(dout) stays finite. The
// accumulators of the scores and of dP begin with log2(64 / sum) and -D, so that P = 2^s and dS = P dP.
//
// LAYOUT  qkv, its gradient   [images, tokens, 3, heads, C]   16-bit, all of q, then k, then v
//         out, its gradient   [images, tokens, heads, C]      16-bit
//         sums                [images, heads, tokens] of {log2(64 / sum_j exp(score)), -D}, f32, 8 bytes
// The official order of qkv's channels is (head * C + i) * 3 + {q,k,v}; whoever loads the weight of the
// conv before permutes its rows, so that a token's q is C consecutive elements, copied by cp.async.
//
// COST    with N = images * heads, T tokens:
//     forward  2 N T^2 C multiply-adds; reads 6 N T C bytes, writes 2 N T C (the floor)
//     grad_q   5 N T^2 C; reads 8 N T C, writes 2 N T C + 8 N T       (floor of the gradient: reads
//     grad_kv  4 N T^2 C; reads 8 N T C + 8 N T, writes 4 N T C        8 N T C, writes 6 N T C)
// Rows that a block does not own are read again by every block, from L2, and normalised again. This is why blocks are
// large.
//
// Scores stay in registers: the accumulators of one product are the A fragments of the next. The thread that copied a row
// normalises it in place. C = 64 in f16, counted in the machine code of sm_90, without the mask of columns behind the last
// token, which whole tiles skip; a tile is what lies between two barriers:
//
//                 a warp's   a block's  instructions an HMMA          ldmatrix   registers   blocks of a
//                 rows       rows       products alone   whole tile   an HMMA                multiprocessor
//     forward_6   32         192        3.0              4.9          1/4        167         2
//     grad_q      16         192        3.6, then 3.2    5.6, 3.3     1/2        168         1 (12 warps)
//     grad_kv     16         96         2.8              4.5          1/2        167         2
//
// An H100 takes 5.9 cycles an HMMA and processing unit, and 4 an ldmatrix.x4 and multiprocessor. So forward is
// bound by tensor cores and instructions about alike; the gradient by reading fragments from shared memory: 8 cycles
// an HMMA of each unit, 74 % of the rate of mma.sync at best. A GeForce card takes 32 cycles an HMMA with
// f32 sums, and is bound by them. By these numbers 40 images of 16x22 with 6 heads would take an H100 25 to 30 us forward (tensor
// cores 12, copies 18), the gradient 95 to 115 us (shared memory 80, tensor cores 54, copies 31). An H200 took 45 to 51
// and 166 to 206 us (docs/performance.md): why, has not been looked into.
#include "math.cuh"

struct AttentionParams {
    const void* qkv;
    const void* grad_out;  // not read by forward
    void* out;             // forward: out; else the gradient of qkv
    float2* sums;          // not used by forward
    int32_t tokens;
    int32_t heads;
};

// Grid: [tokens / rows of a block rounded up, heads, images].
constexpr float kLog2e = 1.44269504f;
constexpr float kGain = 64.0f;  // of P and dS

template <int C>
struct Head {
    static constexpr int kRow = C * 2;                 // bytes
    static constexpr int kWide = C < 64 ? C / 8 : 8;   // columns of 8 in one tile of products
    static constexpr int kHalves = C / 8 / kWide;      // such tiles
    static constexpr int kM = C == 128 ? 1 : 2;        // forward: a warp's rows in units of 16; registers
    static constexpr int kStep = C == 128 ? 16 : 32;   // columns of scores that a warp holds; registers
    static constexpr int kKeys = C == 128 ? 48 : 96;   // keys of a streamed tile
    static constexpr int kStage = 2 * kKeys * kRow;    // bytes of k and v of a tile
    // q is normalised with this gain, so that q^ k^ is the exponent of 2.
    __device__ static float query_gain() { return kLog2e / sqrtf(float(C)); }
};

constexpr int QUERIES = 48;  // of a streamed tile of grad_kv
constexpr int RESIDENT = 4;  // streamed tiles that grad_q keeps, if there are no more

// 16 M rows x C columns of a warp, in f32.
template <int C, int M>
using Accumulator = float[Head<C>::kHalves][M][Head<C>::kWide][4];
// The same rows, normalised, as A fragments. The lane that holds row g, columns 2t and 2t + 1 of an accumulator holds the
// same of the fragment.
template <int C, int M>
using Fragments = uint32_t[C / 16][M][4];

// Byte offset of a 16-byte chunk in a tile of rows of C elements, free of bank conflicts. Rows that
// differ by a multiple of 16 are permuted alike, and chunks differ by xor: at(16 i + row, 2 k + chunk)
// is at(row, chunk) ^ 32 k, plus 16 i rows.
template <int C>
__device__ __forceinline__ int at(int row, int chunk) {
    if constexpr (C == 16) return row * 32 + (chunk ^ (row >> 2 & 1)) * 16;
    else return swizzle<C * 2>(row, chunk);
}

// One head of one image, and the place of a thread in it.
template <class T, int C>
struct Block {
    int tokens, width, out_width;  // elements from one token to the next in qkv, in out
    int warp, lane;
    size_t qkv, out;               // offsets of the first token's q and out
    size_t sums;
    int rows, columns;             // this lane's offsets for ldmatrix, in tiles read by rows and by columns

    __device__ explicit Block(const AttentionParams& p) {
        tokens = p.tokens, width = 3 * p.heads * C, out_width = p.heads * C;
        warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        qkv = size_t(blockIdx.z) * tokens * width + blockIdx.y * C;
        out = size_t(blockIdx.z) * tokens * out_width + blockIdx.y * C;
        sums = (size_t(blockIdx.z) * p.heads + blockIdx.y) * tokens;
        rows = at<C>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
        columns = at<C>(lane % 16, lane / 16);
    }
};

// Calls f(row, chunk) for each row of a tile that `thread` of THREADS moves: it moves the chunks `chunk`
// and `chunk ^ C / 16` of it. C / 16 neighbours move one row; which half they begin with depends on the
// row so that eight lanes meet no bank twice.
template <int ROWS, int THREADS, int C, class F>
__device__ __forceinline__ void for_rows(int thread, F&& f) {
    constexpr int kLanes = C / 16, kPass = THREADS / kLanes;
    const int first = thread / kLanes;
    const int turn = C == 64 ? first % 2 * 4 : C == 32 ? first / 2 % 2 * 2 : 0;
#pragma unroll(C == 128 ? 1 : 4)
    for (int pass = 0; pass < (ROWS + kPass - 1) / kPass; pass++) {
        const int row = first + pass * kPass;
        if (ROWS % kPass == 0 || row < ROWS) f(row, thread % kLanes ^ turn);
    }
}

// Copies ROWS tokens from `first` on into a tile; behind the last token come zeros.
template <int ROWS, int THREADS, class T, int C>
__device__ __forceinline__ void fetch(smem_addr tile, const T* x, int stride, int first, int tokens, int thread) {
    for_rows<ROWS, THREADS, C>(thread, [&](int row, int chunk) {
        // In bytes, so that an address is one multiplication.
        const int64_t from = int64_t(min(first + row, tokens - 1)) * (stride * 2);
        const bool valid = first + row < tokens;
        const char* bytes = reinterpret_cast<const char*>(x);
        cp_async(tile + at<C>(row, chunk), bytes + chunk * 16 + from, valid);
        cp_async(tile + at<C>(row, chunk ^ C / 16), bytes + (chunk ^ C / 16) * 16 + from, valid);
    });
}

// Normalises the rows of a tile, times `gain`; each thread takes what it has fetched. `rms`, if given, receives the rms of
// each row.
template <int ROWS, int THREADS, class T, int C>
__device__ __forceinline__ void normalise(unsigned char* tile, float gain, int thread, float* rms = nullptr) {
    for_rows<ROWS, THREADS, C>(thread, [&](int row, int chunk) {
        unsigned char* const places[2] = {tile + at<C>(row, chunk), tile + at<C>(row, chunk ^ C / 16)};
        float x[2][8], sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            unpack8<T>(load16(places[i]), x[i]);
#pragma unroll
            for (int e = 0; e < 8; e++) sum = fmaf(x[i][e], x[i][e], sum);
        }
#pragma unroll
        for (int by = 1; by < C / 16; by *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
        const float r = sqrt_fast(sum * (1.0f / C)), factor = gain * reciprocal_fast(NORM_EPS + r);
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int e = 0; e < 8; e++) x[i][e] *= factor;
            store16(places[i], pack8<T>(x[i]));
        }
        if (rms) {
            if (thread % (C / 16) == 0) rms[row] = r;
            __syncwarp();  // the lanes go on together
        }
    });
}

// The A fragments of 16 M rows of a tile, from `tile` on.
template <class T, int C, int M>
__device__ __forceinline__ void load_a(Fragments<C, M>& a, smem_addr tile, const Block<T, C>& b) {
#pragma unroll
    for (int k = 0; k < C / 16; k++) {
        smem_addr rows[M];
#pragma unroll
        for (int m = 0; m < M; m++) rows[m] = tile + (b.columns ^ k * 32) + m * 16 * Head<C>::kRow;
        ldmatrix_n(a[k], rows);
    }
}

// s[16 M][8 N] += a b^T, b the 8 N rows from `tile` on.
template <class T, int C, int M, int N>
__device__ __forceinline__ void times_rows(float (&s)[M][N][4], const Fragments<C, M>& a, smem_addr tile,
                                           const Block<T, C>& block) {
#pragma unroll
    for (int k = 0; k < C / 16; k++) {
        smem_addr rows[N / 2];
        uint32_t pairs[N / 2][4], b[N][2];
#pragma unroll
        for (int j = 0; j < N / 2; j++) rows[j] = tile + (block.rows ^ k * 32) + j * 16 * Head<C>::kRow;
        ldmatrix_n(pairs, rows);
#pragma unroll
        for (int j = 0; j < N; j++) b[j][0] = pairs[j / 2][j % 2 * 2], b[j][1] = pairs[j / 2][j % 2 * 2 + 1];
        mma_tile<T>(s, a[k], b);
    }
}

// acc[16 M][C] += p b, b the 8 N rows from `tile` on; p are accumulators, rounded to 16 bits.
template <class T, int C, int M, int N>
__device__ __forceinline__ void times_columns(Accumulator<C, M>& acc, const float (&p)[M][N][4], smem_addr tile,
                                              const Block<T, C>& block) {
    constexpr int kWide = Head<C>::kWide;
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) a[m][i] = pack2<T>(p[m][2 * k + i / 2][i % 2 * 2], p[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int h = 0; h < Head<C>::kHalves; h++) {
            smem_addr rows[kWide / 2];
            uint32_t pairs[kWide / 2][4], b[kWide][2];
#pragma unroll
            for (int j = 0; j < kWide / 2; j++)
                rows[j] = tile + (block.columns ^ (h * kWide / 2 + j) * 32) + k * 16 * Head<C>::kRow;
            ldmatrix_n<true>(pairs, rows);
#pragma unroll
            for (int j = 0; j < kWide; j++) b[j][0] = pairs[j / 2][j % 2 * 2], b[j][1] = pairs[j / 2][j % 2 * 2 + 1];
            mma_tile<T>(acc[h], a, b);
        }
    }
}

// Sets every score of rows g to value[m][0], of rows g + 8 to value[m][1].
template <int M, int N>
__device__ __forceinline__ void fill_rows(float (&s)[M][N][4], const float (&value)[M][2]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[m][j][e] = value[m][e / 2];
}

// s = 2^s, and 0 in columns behind the last token; `first` is the token of column 0.
template <int M, int N>
__device__ __forceinline__ void exponentiate(float (&s)[M][N][4], int first, int tokens, int lane) {
    if (first + N * 8 > tokens) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int j = 0; j < N; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (first + j * 8 + lane % 4 * 2 + e % 2 >= tokens) s[m][j][e] = -1e30f;
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[m][j][e] = exp2_fast(s[m][j][e]);
}

// Over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// acc holds the gradient of normalised rows, divided by `gain`. This turns it into the gradient of the rows before the
// norm. `y` are the normalised rows times `y_gain`.
template <class T, int C>
__device__ __forceinline__ void norm_backward(Accumulator<C, 1>& acc, float gain, const Fragments<C, 1>& y,
                                              float y_gain, const float* rms, int lane) {
    constexpr int kWide = Head<C>::kWide;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < C / 8; j++) {
            const float2 pair = unpack2<T>(y[j / 2][0][j % 2 * 2 + half]);
            const float* g = acc[j / kWide][0][j % kWide] + half * 2;
            dot = fmaf(g[0], pair.x, fmaf(g[1], pair.y, dot));
        }
        dot = row_sum(dot);
        const float r = rms[half * 8 + lane / 4], across = gain / (NORM_EPS + r);
        // Where r = 0 the row is 0, and so is its part of the gradient.
        const float along = r > 0.0f ? dot * gain / (y_gain * y_gain * C * r) : 0.0f;
#pragma unroll
        for (int j = 0; j < C / 8; j++) {
            const float2 pair = unpack2<T>(y[j / 2][0][j % 2 * 2 + half]);
            float* g = acc[j / kWide][0][j % kWide] + half * 2;
            g[0] = g[0] * across - pair.x * along, g[1] = g[1] * across - pair.y * along;
        }
    }
}

// Writes a warp's 16 M rows, tokens from `first` on, to memory through a tile of its own, 16 bytes a lane.
// `x` is token 0.
template <class T, int C, int M>
__device__ __forceinline__ void write_rows(const Accumulator<C, M>& acc, unsigned char* tile, T* x, int stride,
                                           int first, const Block<T, C>& b) {
    constexpr int kWide = Head<C>::kWide;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < C / 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float* v = acc[j / kWide][m][j % kWide] + half * 2;
                unsigned char* place = tile + at<C>(m * 16 + half * 8 + b.lane / 4, j) + b.lane % 4 * 4;
                *reinterpret_cast<uint32_t*>(place) = pack2<T>(v[0], v[1]);
            }
    __syncwarp();
#pragma unroll
    for (int i = b.lane; i < 16 * M * C / 8; i += 32) {
        const int row = i / (C / 8), chunk = i % (C / 8);
        const uint4 v = load16(tile + at<C>(row, chunk));
        if (first + row < b.tokens) store16(x + size_t(first + row) * stride + chunk * 8, v);
    }
}

// ---- forward ------------------------------------------------------------------------------------

// exp(sqrt(128)) is above fp16's 65504: half of it is not.
template <int C>
constexpr float kShift = C == 128 ? 1.0f : 0.0f;

// acc += exp(q k^T) v and sum += exp(q k^T) for 16 keys, of which `first` is the first.
template <class T, int C, int M>
__device__ __forceinline__ void attend(Accumulator<C, M>& acc, float (&sum)[M][2], const Fragments<C, M>& q,
                                       smem_addr keys, smem_addr values, int first, const Block<T, C>& b) {
    constexpr int N = 2;
    float s[M][N][4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < N; j++) s[m][j][0] = s[m][j][1] = s[m][j][2] = s[m][j][3] = -kShift<C>;
    times_rows<T, C>(s, q, keys, b);
    exponentiate(s, first, b.tokens, b.lane);
    // The smallest ones, 6e-6, have 7 bits in fp16. Where a row has only such, the sum must be of the rounded values that
    // are multiplied.
    if constexpr (C == 128 && is_half<T>)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int j = 0; j < N; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[m][j][e] = __half2float(__float2half_rn(s[m][j][e]));
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < N; j++) sum[m][0] += s[m][j][0] + s[m][j][1], sum[m][1] += s[m][j][2] + s[m][j][3];
    times_columns<T, C>(acc, s, values, b);
}

// A block owns WARPS * 16 M queries. All keys pass through two stages of shared memory, k then v. The queries come first
// into the place of the second stage, and are in registers before its first tile comes.
template <class T, int C, int WARPS>
__device__ void attention_forward(const AttentionParams& p) {
    using H = Head<C>;
    constexpr int M = H::kM, kThreads = WARPS * 32, kRows = WARPS * 16 * M, kTile = H::kStage / 2;
    extern __shared__ __align__(128) unsigned char smem[];
    const Block<T, C> b(p);
    const T* q = static_cast<const T*>(p.qkv) + b.qkv;
    const int row0 = blockIdx.x * kRows, own = b.warp * 16 * M, tiles = (b.tokens + H::kKeys - 1) / H::kKeys;

    auto fetch_tile = [&](int tile) {
        const smem_addr stage = smem_address(smem) + tile % 2 * H::kStage;
        fetch<H::kKeys, kThreads, T, C>(stage, q + b.out_width, b.width, tile * H::kKeys, b.tokens, threadIdx.x);
        fetch<H::kKeys, kThreads, T, C>(stage + kTile, q + 2 * b.out_width, b.width, tile * H::kKeys, b.tokens, threadIdx.x);
        cp_async_commit();
    };
    fetch<kRows, kThreads, T, C>(smem_address(smem) + H::kStage, q, b.width, row0, b.tokens, threadIdx.x);
    cp_async_commit();
    fetch_tile(0);
    cp_async_wait<1>();
    normalise<kRows, kThreads, T, C>(smem + H::kStage, H::query_gain(), threadIdx.x);
    __syncthreads();
    Fragments<C, M> a;
    load_a<T, C, M>(a, smem_address(smem) + H::kStage + own * H::kRow, b);

    Accumulator<C, M> acc = {};
    float sum[M][2] = {};
    const bool idle = row0 + own >= b.tokens;
    for (int tile = 0; tile < tiles; tile++) {
        unsigned char* const stage = smem + tile % 2 * H::kStage;
        cp_async_wait<0>();
        normalise<H::kKeys, kThreads, T, C>(stage, 1.0f, threadIdx.x);
        normalise<H::kKeys, kThreads, T, C>(stage + kTile, 1.0f, threadIdx.x);
        __syncthreads();  // this stage is there for all, and all have left the one loaded next
        if (tile + 1 < tiles) fetch_tile(tile + 1);
        const int first = tile * H::kKeys, end = idle ? 0 : min(H::kKeys, b.tokens - first);
#pragma unroll
        for (int key = 0; key < H::kKeys; key += 16) {
            if (key >= end) break;
            const smem_addr keys = smem_address(stage) + key * H::kRow;
            attend<T, C, M>(acc, sum, a, keys, keys + kTile, first + key, b);
        }
    }
    __syncthreads();  // the results leave through the stages
    if (idle) return;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float inverse = 1.0f / row_sum(sum[m][half]);
#pragma unroll
            for (int j = 0; j < C / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) acc[j / H::kWide][m][j % H::kWide][half * 2 + e] *= inverse;
        }
    write_rows<T, C, M>(acc, smem + own * H::kRow, static_cast<T*>(p.out) + b.out, b.out_width, row0 + own, b);
}

// For few images: a block owns 16 M queries, and each of its warps takes different keys, kStep at a time, into a slot of
// its own. No running maximum is needed, so the warps' products and sums are simply added. Shared memory: a slot of k, v
// for each warp, which later holds its product; q; the sums [warp][query].
template <class T, int C, int WARPS>
__device__ void attention_forward_split(const AttentionParams& p) {
    using H = Head<C>;
    constexpr int M = H::kM, kThreads = WARPS * 32, kRows = 16 * M, kHalf = H::kStep * H::kRow, kSlot = 2 * kHalf;
    static_assert(kSlot == kRows * C * 4, "a product in f32 fits where the keys and values were");
    extern __shared__ __align__(128) unsigned char smem[];
    const Block<T, C> b(p);
    const T* q = static_cast<const T*>(p.qkv) + b.qkv;
    unsigned char* const slot = smem + b.warp * kSlot;
    unsigned char* const queries = smem + WARPS * kSlot;
    float* const sums = reinterpret_cast<float*>(queries + kRows * H::kRow);
    const int row0 = blockIdx.x * kRows, lane = b.lane;

    auto fetch_slot = [&](int first) {
        const smem_addr keys = smem_address(slot);
        if (first < b.tokens) {
            fetch<H::kStep, 32, T, C>(keys, q + b.out_width, b.width, first, b.tokens, lane);
            fetch<H::kStep, 32, T, C>(keys + kHalf, q + 2 * b.out_width, b.width, first, b.tokens, lane);
        }
        cp_async_commit();
    };
    fetch<kRows, kThreads, T, C>(smem_address(queries), q, b.width, row0, b.tokens, threadIdx.x);
    cp_async_commit();
    fetch_slot(b.warp * H::kStep);
    cp_async_wait<1>();
    normalise<kRows, kThreads, T, C>(queries, H::query_gain(), threadIdx.x);
    __syncthreads();
    Fragments<C, M> a;
    load_a<T, C, M>(a, smem_address(queries), b);

    Accumulator<C, M> acc = {};
    float sum[M][2] = {};
#pragma unroll 1
    for (int first = b.warp * H::kStep; first < b.tokens; first += WARPS * H::kStep) {
        cp_async_wait<0>();
        normalise<H::kStep, 32, T, C>(slot, 1.0f, lane);
        normalise<H::kStep, 32, T, C>(slot + kHalf, 1.0f, lane);
        __syncwarp();
#pragma unroll
        for (int key = 0; key < H::kStep; key += 16) {
            if (first + key >= b.tokens) break;
            const smem_addr keys = smem_address(slot) + key * H::kRow;
            attend<T, C, M>(acc, sum, a, keys, keys + kHalf, first + key, b);
        }
        __syncwarp();
        fetch_slot(first + WARPS * H::kStep);
    }
    auto place = [&](int warp, int tile) { return smem + warp * kSlot + tile * 512 + lane * 16; };
#pragma unroll
    for (int h = 0; h < H::kHalves; h++)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int j = 0; j < H::kWide; j++) {
                const float* v = acc[h][m][j];
                store16(place(b.warp, (h * M + m) * H::kWide + j), make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])));
            }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float all = row_sum(sum[m][half]);
            if (lane % 4 == 0) sums[b.warp * kRows + m * 16 + half * 8 + lane / 4] = all;
        }
    __syncthreads();
    // Each warp adds up some 16 x 8 tiles of the product.
    const int warps = min(WARPS, (b.tokens + H::kStep - 1) / H::kStep);
    for (int tile = b.warp; tile < M * C / 8; tile += WARPS) {
        const int j = tile % H::kWide, m = tile / H::kWide % M, h = tile / H::kWide / M;
        float v[4] = {}, total[2] = {};
        for (int warp = 0; warp < warps; warp++) {
            const uint4 part = load16(place(warp, tile));
            v[0] += __uint_as_float(part.x), v[1] += __uint_as_float(part.y);
            v[2] += __uint_as_float(part.z), v[3] += __uint_as_float(part.w);
#pragma unroll
            for (int half = 0; half < 2; half++) total[half] += sums[warp * kRows + m * 16 + half * 8 + lane / 4];
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int token = row0 + m * 16 + half * 8 + lane / 4;
            if (token >= b.tokens) continue;
            const float inverse = 1.0f / total[half];
            T* out = static_cast<T*>(p.out) + b.out + size_t(token) * b.out_width + (h * H::kWide + j) * 8 + lane % 4 * 2;
            *reinterpret_cast<uint32_t*>(out) = pack2<T>(v[half * 2] * inverse, v[half * 2 + 1] * inverse);
        }
    }
}

// ---- gradient -----------------------------------------------------------------------------------

// Makes dq, and the sums. A block owns WARPS * 16 queries. Shared memory: min(tiles, 4) stages of k, v; q and dout of the
// block come first into the place of the second; then rms of q. Where all tiles fit, the second pass finds them there.
template <class T, int C, int WARPS>
__device__ void attention_grad_q(const AttentionParams& p) {
    using H = Head<C>;
    constexpr int N = H::kStep / 8, kThreads = WARPS * 32, kRows = WARPS * 16, kTile = H::kStage / 2;
    extern __shared__ __align__(128) unsigned char smem[];
    const Block<T, C> b(p);
    const T* q = static_cast<const T*>(p.qkv) + b.qkv;
    const T* grad = static_cast<const T*>(p.grad_out) + b.out;
    const int row0 = blockIdx.x * kRows, own = b.warp * 16, tiles = (b.tokens + H::kKeys - 1) / H::kKeys;
    const int lane = b.lane, fetches = tiles <= RESIDENT ? tiles : 2 * tiles;
    unsigned char* const queries = smem + H::kStage;
    __shared__ __align__(16) float rms[kRows];

    // The tile of a turn (all tiles, twice), after which the next one is on its way.
    auto fetch_tile = [&](int turn) {
        const smem_addr stage = smem_address(smem) + turn % RESIDENT * H::kStage;
        const int first = (turn < tiles ? turn : turn - tiles) * H::kKeys;
        fetch<H::kKeys, kThreads, T, C>(stage, q + b.out_width, b.width, first, b.tokens, threadIdx.x);
        fetch<H::kKeys, kThreads, T, C>(stage + kTile, q + 2 * b.out_width, b.width, first, b.tokens, threadIdx.x);
        cp_async_commit();
    };
    auto arrive = [&](int turn) {
        unsigned char* const stage = smem + turn % RESIDENT * H::kStage;
        cp_async_wait<0>();
        normalise<H::kKeys, kThreads, T, C>(stage, 1.0f, threadIdx.x);
        normalise<H::kKeys, kThreads, T, C>(stage + kTile, 1.0f, threadIdx.x);
        __syncthreads();
        if (turn + 1 < fetches) fetch_tile(turn + 1);
        return smem_address(stage);
    };
    fetch<kRows, kThreads, T, C>(smem_address(queries), q, b.width, row0, b.tokens, threadIdx.x);
    fetch<kRows, kThreads, T, C>(smem_address(queries) + kRows * H::kRow, grad, b.out_width, row0, b.tokens, threadIdx.x);
    cp_async_commit();
    fetch_tile(0);
    cp_async_wait<1>();
    normalise<kRows, kThreads, T, C>(queries, H::query_gain(), threadIdx.x, rms);
    __syncthreads();
    Fragments<C, 1> a, g;
    load_a<T, C, 1>(a, smem_address(queries) + own * H::kRow, b);
    load_a<T, C, 1>(g, smem_address(queries) + (kRows + own) * H::kRow, b);

    const bool idle = row0 + own >= b.tokens;
    float sum[2] = {}, mean[2] = {};  // of exp(score); of dP, weighted with it
    for (int turn = 0; turn < tiles; turn++) {
        const smem_addr stage = arrive(turn);
        const int first = turn * H::kKeys, end = idle ? 0 : min(H::kKeys, b.tokens - first);
#pragma unroll
        for (int key = 0; key < H::kKeys; key += H::kStep) {
            if (key >= end) break;
            const smem_addr keys = stage + key * H::kRow;
            float s[1][N][4] = {}, dp[1][N][4] = {};
            times_rows<T, C>(s, a, keys, b);
            times_rows<T, C>(dp, g, keys + kTile, b);
            exponentiate(s, first + key, b.tokens, lane);
#pragma unroll
            for (int j = 0; j < N; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    sum[e / 2] += s[0][j][e];
                    mean[e / 2] = fmaf(s[0][j][e], dp[0][j][e], mean[e / 2]);
                }
        }
    }

    float start[1][2], offset[1][2];  // log2(64 / sum); -D
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float all = row_sum(sum[half]);
        start[0][half] = log2f(kGain / all), offset[0][half] = -row_sum(mean[half]) / all;
        const int token = row0 + own + half * 8 + lane / 4;
        if (lane % 4 == 0 && token < b.tokens) p.sums[b.sums + token] = make_float2(start[0][half], offset[0][half]);
    }
    Accumulator<C, 1> acc = {};
    for (int turn = tiles; turn < 2 * tiles; turn++) {
        const int first = (turn - tiles) * H::kKeys, end = idle ? 0 : min(H::kKeys, b.tokens - first);
        const smem_addr stage = turn < fetches ? arrive(turn) : smem_address(smem) + (turn - tiles) * H::kStage;
#pragma unroll
        for (int key = 0; key < H::kKeys; key += H::kStep) {
            if (key >= end) break;
            const smem_addr keys = stage + key * H::kRow;
            float s[1][N][4], dp[1][N][4];
            fill_rows(s, start);
            fill_rows(dp, offset);
            times_rows<T, C>(s, a, keys, b);
            times_rows<T, C>(dp, g, keys + kTile, b);
            exponentiate(s, first + key, b.tokens, lane);
#pragma unroll
            for (int j = 0; j < N; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[0][j][e] *= dp[0][j][e];
            times_columns<T, C>(acc, s, keys, b);
        }
    }
    __syncthreads();
    if (idle) return;
    norm_backward<T, C>(acc, 1.0f / (kGain * sqrtf(float(C))), a, H::query_gain(), rms + own, lane);
    write_rows<T, C, 1>(acc, smem + own * H::kRow, static_cast<T*>(p.out) + b.qkv, b.width, row0 + own, b);
}

// Makes dk and dv. A block owns 16 keys for each warp. Shared memory: two stages of q [48][C], dout [48][C], {log2(64 /
// sum)} [48], {-D} [48]; k and v of the block come first into the place of the second.
template <class T, int C, int WARPS>
__device__ void attention_grad_kv(const AttentionParams& p) {
    using H = Head<C>;
    constexpr int N = 2, kThreads = WARPS * 32, kRows = WARPS * 16, kTile = QUERIES * H::kRow, kStage = 2 * kTile + QUERIES * 8;
    extern __shared__ __align__(128) unsigned char smem[];
    const Block<T, C> b(p);
    const T* q = static_cast<const T*>(p.qkv) + b.qkv;
    const T* grad = static_cast<const T*>(p.grad_out) + b.out;
    const int row0 = blockIdx.x * kRows, own = b.warp * 16, tiles = (b.tokens + QUERIES - 1) / QUERIES;
    const int lane = b.lane;
    unsigned char* const keys = smem + kStage;
    __shared__ __align__(16) float rms[2][kRows];

    auto fetch_tile = [&](int tile) {
        const smem_addr stage = smem_address(smem) + tile % 2 * kStage;
        const int first = tile * QUERIES;
        fetch<QUERIES, kThreads, T, C>(stage, q, b.width, first, b.tokens, threadIdx.x);
        fetch<QUERIES, kThreads, T, C>(stage + kTile, grad, b.out_width, first, b.tokens, threadIdx.x);
        if (threadIdx.x < 2 * QUERIES) {
            const int which = threadIdx.x / QUERIES, row = threadIdx.x % QUERIES;
            // Behind the last token q and dout are 0, so that P = 1 is multiplied by 0.
            const float2* from = p.sums + b.sums + min(first + row, b.tokens - 1);
            cp_async<4>(stage + 2 * kTile + threadIdx.x * 4, reinterpret_cast<const float*>(from) + which, first + row < b.tokens);
        }
        cp_async_commit();
    };
    fetch<kRows, kThreads, T, C>(smem_address(keys), q + b.out_width, b.width, row0, b.tokens, threadIdx.x);
    fetch<kRows, kThreads, T, C>(smem_address(keys) + kRows * H::kRow, q + 2 * b.out_width, b.width, row0, b.tokens, threadIdx.x);
    cp_async_commit();
    fetch_tile(0);
    cp_async_wait<1>();
    normalise<kRows, kThreads, T, C>(keys, 1.0f, threadIdx.x, rms[0]);
    normalise<kRows, kThreads, T, C>(keys + kRows * H::kRow, 1.0f, threadIdx.x, rms[1]);
    __syncthreads();
    Fragments<C, 1> k, v;
    load_a<T, C, 1>(k, smem_address(keys) + own * H::kRow, b);
    load_a<T, C, 1>(v, smem_address(keys) + (kRows + own) * H::kRow, b);

    Accumulator<C, 1> dk = {}, dv = {};
    const bool idle = row0 + own >= b.tokens;
    for (int tile = 0; tile < tiles; tile++) {
        unsigned char* const stage = smem + tile % 2 * kStage;
        cp_async_wait<0>();
        normalise<QUERIES, kThreads, T, C>(stage, H::query_gain(), threadIdx.x);
        __syncthreads();
        if (tile + 1 < tiles) fetch_tile(tile + 1);
        const int end = idle ? 0 : min(QUERIES, b.tokens - tile * QUERIES);
#pragma unroll(C == 128 ? 1 : QUERIES)
        for (int query = 0; query < QUERIES; query += N * 8) {
            if (query >= end) break;
            const smem_addr queries = smem_address(stage) + query * H::kRow;
            const float* sums = reinterpret_cast<const float*>(stage + 2 * kTile) + query + lane % 4 * 2;
            float s[1][N][4], dp[1][N][4];
#pragma unroll
            for (int j = 0; j < N; j++) {
                const float2 start = *reinterpret_cast<const float2*>(sums + j * 8);
                const float2 offset = *reinterpret_cast<const float2*>(sums + QUERIES + j * 8);
                s[0][j][0] = s[0][j][2] = start.x, s[0][j][1] = s[0][j][3] = start.y;
                dp[0][j][0] = dp[0][j][2] = offset.x, dp[0][j][1] = dp[0][j][3] = offset.y;
            }
            times_rows<T, C>(s, k, queries, b);
            times_rows<T, C>(dp, v, queries + kTile, b);
#pragma unroll
            for (int j = 0; j < N; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[0][j][e] = exp2_fast(s[0][j][e]);
                    dp[0][j][e] *= s[0][j][e];
                }
            times_columns<T, C>(dv, s, queries + kTile, b);
            times_columns<T, C>(dk, dp, queries, b);
        }
    }
    __syncthreads();
    if (idle) return;
    T* const out = static_cast<T*>(p.out) + b.qkv;
    unsigned char* const way = smem + own * 2 * H::kRow;
    norm_backward<T, C>(dk, 1.0f / (kGain * kLog2e), k, 1.0f, rms[0] + own, lane);
    norm_backward<T, C>(dv, 1.0f / kGain, v, 1.0f, rms[1] + own, lane);
    write_rows<T, C, 1>(dk, way, out + b.out_width, b.width, row0 + own, b);
    write_rows<T, C, 1>(dv, way + 16 * H::kRow, out + 2 * b.out_width, b.width, row0 + own, b);
}

// ---- instances ----------------------------------------------------------------------------------

// A line is an instance in each 16-bit type, and a line of the tables from which src/backend/gpu/attention.rs chooses:
//
//   C          channels of a head
//   warps      of a block; several of one C from the fewest on
//   blocks     that share the registers (64 K) of a multiprocessor
#define INSTANCE(name, call, warps, blocks)                                                                \
    extern "C" __global__ void __launch_bounds__(warps * 32, blocks) attention_##name(AttentionParams p) { \
        begin_kernel();                                                                                    \
        call(p);                                                                                           \
    }                                                                                                      \
    KERNEL_EXPORT(attention_##name);
#define FORWARD(C, warps, blocks)                                                                                       \
    INSTANCE(forward_##warps##_f16_c##C, (attention_forward<__half, C, warps>), warps, blocks)                          \
    INSTANCE(forward_##warps##_bf16_c##C, (attention_forward<__nv_bfloat16, C, warps>), warps, blocks)
#define SPLIT(C, warps, blocks)                                                                                         \
    INSTANCE(forward_split_f16_c##C, (attention_forward_split<__half, C, warps>), warps, blocks)                        \
    INSTANCE(forward_split_bf16_c##C, (attention_forward_split<__nv_bfloat16, C, warps>), warps, blocks)
#define GRAD_Q(C, warps, blocks)                                                                                        \
    INSTANCE(grad_q_##warps##_f16_c##C, (attention_grad_q<__half, C, warps>), warps, blocks)                            \
    INSTANCE(grad_q_##warps##_bf16_c##C, (attention_grad_q<__nv_bfloat16, C, warps>), warps, blocks)
#define GRAD_KV(C, warps, blocks)                                                                                       \
    INSTANCE(grad_kv_f16_c##C, (attention_grad_kv<__half, C, warps>), warps, blocks)                                    \
    INSTANCE(grad_kv_bf16_c##C, (attention_grad_kv<__nv_bfloat16, C, warps>), warps, blocks)

FORWARD(16, 3, 3)
FORWARD(16, 6, 2)
SPLIT(16, 11, 1)
GRAD_Q(16, 6, 2)
GRAD_Q(16, 12, 1)
GRAD_KV(16, 6, 2)

FORWARD(32, 3, 3)
FORWARD(32, 6, 2)
SPLIT(32, 11, 1)
GRAD_Q(32, 6, 2)
GRAD_Q(32, 12, 1)
GRAD_KV(32, 6, 2)

FORWARD(64, 3, 3)
FORWARD(64, 6, 2)
SPLIT(64, 11, 1)
GRAD_Q(64, 6, 2)
GRAD_Q(64, 12, 1)
GRAD_KV(64, 6, 2)

FORWARD(128, 3, 3)
FORWARD(128, 6, 2)
SPLIT(128, 11, 1)
GRAD_Q(128, 6, 1)
GRAD_KV(128, 6, 1)
