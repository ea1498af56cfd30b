// The layers of the autoencoders (SD-VAE, TAESD; src/codec/): convolutions with bias, group norm, SiLU, and
// self-attention with one wide head. 16-bit storage, f32 sums; channels padded with zeros to multiples of 8.
//
// 1. CONVOLUTION, the implicit matrix product of conv.cuh:
//
//     y[p][co] = max(0?, residual[p][co] + bias[co] + sum over t, c of w[co][t][c] x[neighbour t of p][c])
//
//    The neighbour at tap (ty, tx) of the result at (y, x) lies at (stride y + ty - before, stride x + tx - before),
//    zero outside of the image. That is 1x1 (side 1), 3x3 with zeros around (side 3, before 1), and 3x3 with
//    stride 2 with zeros around or right and below only (before 1 or 0). The 3x3 on an image enlarged by two
//    (nearest neighbour) sees at each of the four places of an enlarged pixel 2x2 pixels of the small image: four
//    2x2 convolutions, whose weights are sums of the nine, each its own part of the grid (`phases`; before 1 or 0
//    by the place). The enlarged image is never there, and 4 products do the work of 9.
//    3 or 4 channels are padded to 8: with k flat over taps and channels, 72 products instead of 27 or 36, 2 steps
//    of 64. The 3 channels of an image come from a tile 16 wide: 16 products for 3, 0.4 % of a decode.
//
// 2. NORMALISE: silu(x scale + shift), or without silu, or 3 tanh(x / 3), as a pass of its own before the
//    convolution. The arithmetic, for an SD-VAE decoding to 512x704, whose norms have 0.63 G values together: the
//    pass reads and writes them, 2.5 GB, 2.5 ms at 1 TB/s. In the convolution's gather each would be activated
//    9 ceil(cout / 128) times, 9.8 G activations of two operations of the special function unit: 3.8 ms (128
//    multiprocessors, 16 a clock, 2.5 GHz), and the copies could not be cp.async. (Least of all would cost whole
//    patches of the image in shared memory, activated there; that is another main loop, not built.)
//
// 3. GROUP NORM's statistics, as the scale and shift of each image and channel, in two stages. `codec_sums`: mean
//    and sum of squared deviations of a chunk of pixels, of each channel; values are taken relative to the chunk's first
//    pixel, so that the squares of large means, which would cancel, never arise. `codec_scales`: those of a group
//    from those of its chunks and channels (Chan), first the mean, then the deviations about it. No atomics, the
//    same bits in every run. Reads each value once.
//
// 4. SELF-ATTENTION with one head of up to 512 channels: softmax(q k / sqrt(c)) v over the pixels, flash style with
//    a running maximum. A block has 64 queries, in 8 warps: 4 times 16 rows, 2 halves. Keys and values pass 16 at a
//    time, through one buffer each: values arrive during the scores, the next keys during the sums of values.
//    A warp makes the scores of 8 of the 16 keys; all are exchanged in the place of the keys. Its part
//    of the result, 16 rows by half of the channels, stays in registers: 128 of them in f32.
//    Shared memory: (64 + 2 * 16) rows: 96 KB at width 512, of 99 KB that sm_86, sm_89 and sm_120 allow.
//    2 T^2 c multiply-adds; reads 2 T c ceil(T / 64) values from L2: T = 5632, c = 512: 32 G, 1 GB.
//
// 5. BYTES: trunc(255 clamp(scale x + shift, 0, 1)) of a picture's three channels, so that an eighth of what the padded
//    16-bit picture takes crosses the bus, and the host only writes the file. Whether all was finite is told by block.
//    Reads 16 bytes a pixel and writes 3: 512x704: 6.8 MB, 7 us at 1 TB/s.
//
// LAYOUT  x [n, h, w, cin], y, residual [n, oh, ow, cout]    16-bit
//         w [phases][cout][taps][cin]                        16-bit; rows of padded outputs are zero
//         bias [cout], scales and weights of norms [n][2][c] f32; c is not padded there, cout is
//         qkv [n][T][3 c], out [n][T][c]                     16-bit, c a multiple of 8
//
// FLOOR   of an SD-VAE's decode to 512x704, on a card of 165 TFLOP/s and 1 TB/s: 1.5 T multiply-adds, 18 ms. Bytes, read
// and written once: 7.6 GB, 7.6 ms, of which the pass above is 2.5 and the statistics 1.3. (By the plan, which
// has 130 launches; tests/kernels/codec.rs prints it.)
#include "conv_finish.cuh"

// ---- 1. convolution -----------------------------------------------------------------------------

template <class T, class Tile, bool FLAT>
__device__ __forceinline__ void codec_conv(const CodecConv& p) {
    extern __shared__ __align__(128) unsigned char smem[];
    const int taps = p.side * p.side, phase = blockIdx.z, first = blockIdx.x * Tile::BM;
    // The upper and the left half of an enlarged pixel look back by one pixel, the other halves do not.
    const Window window = {p.height, p.width, p.rows, p.columns, p.side, p.stride, p.before - phase / 2, p.before - phase % 2};
    const T* weight = static_cast<const T*>(p.weight) + int64_t(phase) * p.cout * taps * p.cin;
    const ConvProduct<T, Window> product = {static_cast<const T*>(p.x), nullptr, weight, p.cin, 0, p.cout,
                                            window, first, min(Tile::BM, p.pixels - first)};
    typename Tile::Accumulators acc = {};
    multiply<T, Tile, false, FLAT>(acc, smem, product, 0, product.steps(p.cin), [&] {
        begin_kernel();
        for_lines<Tile::BM, Tile::BN, Tile::THREADS>([&](int row, int column) {
            CodecChannels<T>(p, first, phase, blockIdx.y * Tile::BN + column).prefetch(row);
        });
    });
    emit<Tile>(acc, smem, CodecChannels<T>(p, first, phase, blockIdx.y * Tile::BN + own_column<Tile>()));
}

#define CONV(name, T, flat, blocks, ...)                                                                         \
    extern "C" __global__ void __launch_bounds__(Tile<__VA_ARGS__>::THREADS, blocks_at_once<Tile<__VA_ARGS__>>(blocks)) \
        name(const __grid_constant__ CodecConv p) { codec_conv<T, Tile<__VA_ARGS__>, flat>(p); }                 \
    KERNEL_EXPORT(name);
#define PIXELS(m, n, stages, wm, wn, blocks, blocks_f16x2, speed)                               \
    CONV(codec_conv_f16_##m##x##n, __half, false, blocks, m, n, stages, wm, wn)                 \
    CONV(codec_conv_bf16_##m##x##n, __nv_bfloat16, false, blocks, m, n, stages, wm, wn)
#define FLAT(m, n, stages, wm, wn, blocks, blocks_f16x2, speed)                                 \
    CONV(codec_conv_f16_flat_##m##x##n, __half, true, blocks, m, n, stages, wm, wn)             \
    CONV(codec_conv_bf16_flat_##m##x##n, __nv_bfloat16, true, blocks, m, n, stages, wm, wn)
#define GRADIENT(...)
#define HOPPER(...)
#define HOPPER_GRADIENT(...)
#include "tiles.cuh"

// ---- 2. normalise -------------------------------------------------------------------------------

enum CodecBefore { AFFINE, AFFINE_SILU, SOFT_CLIP };

struct CodecNormalise {
    const void* x;        // [n, h, w, c]
    const float* affine;  // [n][2][channels]; not read for SOFT_CLIP
    void* y;              // shape of x
    int count;            // vectors of 8 of all images
    int image;            // of one image
    int vectors;          // of a pixel
    int channels;         // without padding
    int before;           // CodecBefore
    int padding;
};

// One thread works on one vector.
template <class T>
__device__ __forceinline__ void codec_normalise(const CodecNormalise& p) {
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= p.count) return;
    float x[8];
    read8<T>(p.x, i, x);
    if (p.before == SOFT_CLIP) {
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] = 3.0f * tanhf(x[e] * (1.0f / 3.0f));
    } else {
        const int first = i % p.vectors * 8;
        const float* scales = p.affine + size_t(i / p.image) * 2 * p.channels + first;
        float scale[8], shift[8];
        if (p.channels % 8 == 0) {
            load8(scales, scale), load8(scales + p.channels, shift);
        } else {
#pragma unroll
            for (int e = 0; e < 8; e++) {  // the padding stays zero
                const bool there = first + e < p.channels;
                scale[e] = there ? scales[e] : 0.0f, shift[e] = there ? scales[p.channels + e] : 0.0f;
            }
        }
#pragma unroll
        for (int e = 0; e < 8; e++) {
            x[e] = fmaf(x[e], scale[e], shift[e]);
            if (p.before == AFFINE_SILU) x[e] = x[e] / (1.0f + __expf(-x[e]));
        }
    }
    write8<T>(p.y, i, x);
}

// ---- 3. group norm ------------------------------------------------------------------------------

struct CodecNorm {
    const void* x;        // [n, h, w, c]
    const float* affine;  // [2][channels]: weight, bias
    float* sums;          // [n][chunks][2][8 vectors]: mean, sum of squared deviations
    float* scales;        // [n][2][channels]
    int pixels;           // of an image
    int chunk, chunks;    // pixels of one, and how many of an image
    int vectors, channels;
    int groups;
    float eps;
    int padding;
};

constexpr int NORM_THREADS = 256;
constexpr int NORM_VECTORS = 32;  // of a block, at most: 512 bytes of each pixel

// Grid: [chunks, vectors / NORM_VECTORS rounded up, n].
template <class T>
__device__ __forceinline__ void codec_sums(const CodecNorm& p) {
    __shared__ __align__(16) float parts[2][8][NORM_THREADS];
    const int first_vector = blockIdx.y * NORM_VECTORS, vectors = min(NORM_VECTORS, p.vectors - first_vector);
    const int rows = NORM_THREADS / vectors, row = threadIdx.x / vectors, vector = threadIdx.x % vectors;
    const int first = blockIdx.x * p.chunk, count = min(p.chunk, p.pixels - first);
    // In vectors, of the chunk's first pixel.
    const size_t at = (size_t(blockIdx.z) * p.pixels + first) * p.vectors + first_vector + vector;

    float origin[8], sum[8] = {}, squares[8] = {};
    read8<T>(p.x, at, origin);
    if (row < rows) {
        for (int pixel = row; pixel < count; pixel += rows) {
            float x[8];
            read8<T>(p.x, at + size_t(pixel) * p.vectors, x);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const float d = x[e] - origin[e];
                sum[e] += d, squares[e] = fmaf(d, d, squares[e]);
            }
        }
    }
#pragma unroll
    for (int e = 0; e < 8; e++) parts[0][e][threadIdx.x] = sum[e], parts[1][e][threadIdx.x] = squares[e];
    __syncthreads();
    // One thread works on one channel, and takes its rows in their order.
    if (int(threadIdx.x) >= vectors * 8) return;
    const int e = threadIdx.x / vectors;
    float s = 0.0f, q = 0.0f;
    for (int r = 0; r < rows; r++) s += parts[0][e][r * vectors + vector], q += parts[1][e][r * vectors + vector];
    const float mean = s / float(count);
    const float start = to_float(static_cast<const T*>(p.x)[at * 8 + e]);
    float* to = p.sums + (size_t(blockIdx.z) * p.chunks + blockIdx.x) * 16 * p.vectors + (first_vector + vector) * 8 + e;
    to[0] = start + mean;
    to[8 * p.vectors] = fmaxf(q - s * mean, 0.0f);
}

// One block works on one group of an image. Grid: [groups, n].
__device__ __forceinline__ void codec_scales(const CodecNorm& p) {
    __shared__ __align__(16) float scratch[1][32];
    const int per = p.channels / p.groups, first = blockIdx.x * per, parts = p.chunks * per;
    const float* sums = p.sums + size_t(blockIdx.y) * p.chunks * 16 * p.vectors + first;
    const float values = float(p.pixels) * float(per);
    auto pixels = [&](int chunk) { return float(min(p.chunk, p.pixels - chunk * p.chunk)); };

    float mean[1] = {};
    for (int i = threadIdx.x; i < parts; i += blockDim.x)
        mean[0] += sums[size_t(i / per) * 16 * p.vectors + i % per] * (pixels(i / per) / values);
    block_sum(mean, scratch);
    float squares[1] = {};
    for (int i = threadIdx.x; i < parts; i += blockDim.x) {
        const float* part = sums + size_t(i / per) * 16 * p.vectors + i % per;
        const float d = part[0] - mean[0];
        squares[0] += part[8 * p.vectors] + d * d * pixels(i / per);
    }
    block_sum(squares, scratch);
    const float inverse = 1.0f / sqrtf(squares[0] / values + p.eps);
    float* scales = p.scales + size_t(blockIdx.y) * 2 * p.channels;
    for (int c = first + threadIdx.x; c < first + per; c += blockDim.x) {
        const float scale = p.affine[c] * inverse;
        scales[c] = scale, scales[p.channels + c] = p.affine[p.channels + c] - mean[0] * scale;
    }
}

#define PLAIN(name, T, Params)                                                                 \
    extern "C" __global__ void __launch_bounds__(NORM_THREADS) name(Params p) { begin_kernel(); T(p); } \
    KERNEL_EXPORT(name);
PLAIN(codec_normalise_f16, codec_normalise<__half>, CodecNormalise)
PLAIN(codec_normalise_bf16, codec_normalise<__nv_bfloat16>, CodecNormalise)
PLAIN(codec_sums_f16, codec_sums<__half>, CodecNorm)
PLAIN(codec_sums_bf16, codec_sums<__nv_bfloat16>, CodecNorm)
PLAIN(codec_scales_f32, codec_scales, CodecNorm)

// ---- 4. self-attention --------------------------------------------------------------------------

struct CodecAttention {
    const void* qkv;  // [n][tokens][3 channels]
    void* out;        // [n][tokens][channels]
    int tokens;
    int channels;
    float scale;      // log2(e) / sqrt(channels)
    int padding;
};

constexpr int ATTENTION_THREADS = 256;
constexpr int QUERIES = 64;
constexpr int KEYS = 16;      // of a step
constexpr int SCORE_ROW = 24;  // floats of a row of exchanged scores: float2 of four rows meet no bank twice
constexpr int SCORE_BYTES = QUERIES * SCORE_ROW * 4;

// Copies ROWS tokens from `first` on into rows of WIDTH values; zeros behind the last token and channel.
template <int ROWS, int WIDTH, class T>
__device__ __forceinline__ void fetch_tokens(smem_addr to, const T* x, const CodecAttention& p, int first) {
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * WIDTH / 8; i += ATTENTION_THREADS) {
        const int row = i / (WIDTH / 8), chunk = i % (WIDTH / 8);
        const bool valid = first + row < p.tokens && chunk * 8 < p.channels;
        const T* from = x + (valid ? size_t(first + row) * 3 * p.channels + chunk * 8 : 0);
        cp_async(to + swizzle<WIDTH * 2>(row, chunk), from, valid);
    }
}

// WIDTH: channels, rounded up to 128, 256 or 512. Grid: [tokens / QUERIES rounded up, n].
// Shared memory: queries [64][WIDTH]; keys [16][WIDTH] or scores [64][SCORE_ROW]; values [16][WIDTH].
template <class T, int WIDTH>
__device__ __forceinline__ void codec_attention(const CodecAttention& p) {
    constexpr int COLUMNS = WIDTH / 2;          // of a warp's part of the result
    constexpr int WIDE = 8, PARTS = COLUMNS / 8 / WIDE;
    constexpr int KEY_BYTES = KEYS * WIDTH * 2 > SCORE_BYTES ? KEYS * WIDTH * 2 : SCORE_BYTES;
    extern __shared__ __align__(128) unsigned char smem[];
    const smem_addr queries = smem_address(smem), keys = queries + QUERIES * WIDTH * 2, values = keys + KEY_BYTES;
    float* const scores = reinterpret_cast<float*>(smem + QUERIES * WIDTH * 2);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp / 2 * 16, half = warp % 2;
    const int first_query = blockIdx.x * QUERIES;
    const T* q = static_cast<const T*>(p.qkv) + size_t(blockIdx.y) * p.tokens * 3 * p.channels;
    const T *k = q + p.channels, *v = k + p.channels;

    fetch_tokens<QUERIES, WIDTH>(queries, q, p, first_query);
    fetch_tokens<KEYS, WIDTH>(keys, k, p, 0);
    cp_async_commit();

    float acc[PARTS][1][WIDE][4] = {};
    float most[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // of rows lane / 4 and lane / 4 + 8
    for (int first = 0; first < p.tokens; first += KEYS) {
        cp_async_wait<0>();
        __syncthreads();  // the keys are there for all, and all have left the values
        fetch_tokens<KEYS, WIDTH>(values, v, p, first);
        cp_async_commit();

        // Scores of 16 rows with 8 keys. There are two sums, so that one product need not wait for the other.
        float s[2][1][1][4] = {};
#pragma unroll 4
        for (int c = 0; c < WIDTH / 32; c++) {
            smem_addr a_rows[2], b_rows[1];
            uint32_t a[2][4], b[1][4];
#pragma unroll
            for (int j = 0; j < 2; j++)
                a_rows[j] = queries + swizzle<WIDTH * 2>(warp_row + lane % 16, c * 4 + j * 2 + lane / 16);
            b_rows[0] = keys + swizzle<WIDTH * 2>(half * 8 + lane % 8, c * 4 + lane / 8);
            ldmatrix_n(a, a_rows);
            ldmatrix_n(b, b_rows);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint32_t one[1][4] = {{a[j][0], a[j][1], a[j][2], a[j][3]}};
                const uint32_t other[1][2] = {{b[0][2 * j], b[0][2 * j + 1]}};
                mma_tile<T>(s[j], one, other);
            }
        }
        __syncthreads();  // all have left the keys
#pragma unroll
        for (int r = 0; r < 2; r++)
            *reinterpret_cast<float2*>(scores + (warp_row + r * 8 + lane / 4) * SCORE_ROW + half * 8 + lane % 4 * 2) =
                make_float2(s[0][0][0][2 * r] + s[1][0][0][2 * r], s[0][0][0][2 * r + 1] + s[1][0][0][2 * r + 1]);
        __syncthreads();
        float e[2][2][2];  // [row][8 keys][key]
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float2 pair = *reinterpret_cast<const float2*>(
                    scores + (warp_row + r * 8 + lane / 4) * SCORE_ROW + h * 8 + lane % 4 * 2);
                e[r][h][0] = pair.x, e[r][h][1] = pair.y;
            }
        cp_async_wait<0>();
        __syncthreads();  // the scores have been read, and the values are there for all
        if (first + KEYS < p.tokens) fetch_tokens<KEYS, WIDTH>(keys, k, p, first + KEYS);
        cp_async_commit();

        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float largest = most[r];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const bool inside = first + i / 2 * 8 + lane % 4 * 2 + i % 2 < p.tokens;
                float& x = e[r][i / 2][i % 2];
                x = inside ? x * p.scale : -INFINITY;
                largest = fmaxf(largest, x);
            }
            // Over the four lanes that share a row; each step has a key, so the maximum is finite.
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
            factor[r] = exp2f(most[r] - largest), most[r] = largest;
            sum[r] *= factor[r];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& x = e[r][i / 2][i % 2];
                x = exp2f(x - largest), sum[r] += x;
            }
        }
#pragma unroll
        for (int h = 0; h < PARTS; h++)
#pragma unroll
            for (int j = 0; j < WIDE; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[h][0][j][i] *= factor[i / 2];
        const uint32_t a[1][4] = {{pack2<T>(e[0][0][0], e[0][0][1]), pack2<T>(e[1][0][0], e[1][0][1]),
                                   pack2<T>(e[0][1][0], e[0][1][1]), pack2<T>(e[1][1][0], e[1][1][1])}};
#pragma unroll
        for (int h = 0; h < PARTS; h++) {
            smem_addr rows[WIDE / 2];
            uint32_t pairs[WIDE / 2][4], b[WIDE][2];
#pragma unroll
            for (int j = 0; j < WIDE / 2; j++)
                rows[j] = values + swizzle<WIDTH * 2>(lane % 16, half * COLUMNS / 8 + h * WIDE + j * 2 + lane / 16);
            ldmatrix_n<true>(pairs, rows);
#pragma unroll
            for (int j = 0; j < WIDE; j++) b[j][0] = pairs[j / 2][j % 2 * 2], b[j][1] = pairs[j / 2][j % 2 * 2 + 1];
            mma_tile<T>(acc[h], a, b);
        }
    }

    // The result leaves through the queries' rows, 16 bytes a lane. Once all have left these, a warp has its half of its
    // rows for itself.
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = sum[r] + __shfl_xor_sync(0xffffffffu, sum[r], 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const float inverse = 1.0f / total;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) {
            const float* x = acc[j / WIDE][0][j % WIDE] + r * 2;
            unsigned char* place =
                smem + swizzle<WIDTH * 2>(warp_row + r * 8 + lane / 4, half * COLUMNS / 8 + j) + lane % 4 * 4;
            *reinterpret_cast<uint32_t*>(place) = pack2<T>(x[0] * inverse, x[1] * inverse);
        }
    }
    __syncthreads();
    T* out = static_cast<T*>(p.out) + size_t(blockIdx.y) * p.tokens * p.channels;
    for (int i = threadIdx.x; i < QUERIES * WIDTH / 8; i += ATTENTION_THREADS) {
        const int row = i / (WIDTH / 8), chunk = i % (WIDTH / 8), token = first_query + row;
        if (token < p.tokens && chunk * 8 < p.channels)
            store16(out + size_t(token) * p.channels + chunk * 8, load16(smem + swizzle<WIDTH * 2>(row, chunk)));
    }
}

// A line is an instance in each 16-bit type, for so many channels at most. The lines are also the table from which
// src/backend/gpu/codec.rs takes the first that is wide enough.
#define INSTANCE(name, T, width)                                                             \
    extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS) name(CodecAttention p) { \
        begin_kernel();                                                                      \
        codec_attention<T, width>(p);                                                        \
    }                                                                                        \
    KERNEL_EXPORT(name);
#define ATTENTION(width)                                                                        \
    INSTANCE(codec_attention_f16_c##width, __half, width)                                       \
    INSTANCE(codec_attention_bf16_c##width, __nv_bfloat16, width)

ATTENTION(128)
ATTENTION(256)
ATTENTION(512)

// ---- 5. bytes -----------------------------------------------------------------------------------

struct CodecBytes {
    const void* x;      // [pixels][3], padded to 8
    uint32_t* words;    // the bytes, [pixels][3], four to a word; those behind the last pixel are 0
    uint32_t* strange;  // of each block: whether it met what is no finite number
    int pixels;
    float scale, shift;
    int padding;
};

constexpr int BYTES_THREADS = 256;
constexpr int BYTES_PIXELS = 4;  // of a thread: three words

template <class T>
__device__ __forceinline__ void codec_bytes(const CodecBytes& p) {
    const int first = (blockIdx.x * BYTES_THREADS + threadIdx.x) * BYTES_PIXELS;
    uint32_t words[3] = {};
    bool strange = false;
#pragma unroll
    for (int i = 0; i < BYTES_PIXELS; i++) {
        if (first + i >= p.pixels) break;
        float x[8];
        read8<T>(p.x, first + i, x);
#pragma unroll
        for (int c = 0; c < 3; c++) {
            strange |= !(fabsf(x[c]) < INFINITY);
            const float y = fminf(fmaxf(fmaf(x[c], p.scale, p.shift), 0.0f), 1.0f);  // 0 for a NaN
            words[(i * 3 + c) / 4] |= uint32_t(255.0f * y) << (i * 3 + c) % 4 * 8;
        }
    }
    if (first < p.pixels) {
        uint32_t* to = p.words + size_t(first) / BYTES_PIXELS * 3;
#pragma unroll
        for (int i = 0; i < 3; i++) to[i] = words[i];
    }
    const int any = __syncthreads_or(strange);
    if (threadIdx.x == 0) p.strange[blockIdx.x] = any;
}

PLAIN(codec_bytes_f16, codec_bytes<__half>, CodecBytes)
PLAIN(codec_bytes_bf16, codec_bytes<__nv_bfloat16>, CodecBytes)
