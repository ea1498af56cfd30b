// The embedding of noise level and label, the scales that it gives to all blocks, and their gradients.
//
//     embed             features = sqrt(2) cos(ln(sigma)/4 freqs + phases)                     (EDM2 eq. 75)
//                       pre = wa W_noise features + wb sqrt(label_dim) W_label labels          (eq. 88)
//                       emb = mp_silu(pre);  without a label layer wa = 1, wb = 0
//     embed_backward    g = grad_emb mp_silu'(pre)
//                       dW_noise += wa g^T features,  dW_label += wb sqrt(label_dim) g^T labels
//     emb_scales        out = gain (W emb) + 1 for the rows W of all emb_linear layers, one product
//     its gradients     t = grad^T emb;  dW += gain t,  dgain += sum of W t            (emb_scales_wgrad)
//                       grad_emb = gain grad W                                         (emb_scales_dgrad)
//
// Layout: per-image vectors are f32 [n, channels] without padding; effective weights 16 bits and their
// gradients f32, rows of channels padded by zeros to a multiple of 8. A table cuts the emb_linear layers,
// which lie anywhere in the arenas, into tiles of up to 32 rows. Everywhere a lane has 4 neighbouring
// channels, so that a warp reads 256 bytes of a row of weights and 512 of x, and 8 images share a read of
// the weights. Sums are in a fixed order: sums over images in a thread; over rows first in a block, then
// in emb_scales_reduce, which also adds up the gains.
//
// Cost, n images, R = sum of the layers' channels, E = emb_channels (EDM2-XS: R = 10,000, E = 512, so R E = 5 M):
//     embed              n E (noise + label channels) MACs; 2 bytes a weight, for each 8 images
//     embed_backward     as many MACs; 8 bytes a weight
//     emb_scales         n R E MACs; 2 R E bytes for each 8 images, all but the first from L2
//     emb_scales_wgrad   n R E MACs; 10 R E bytes
//     emb_scales_dgrad   n R E MACs; 2 R E bytes as emb_scales, and 4 n E for each split, written and read
// The floor is reading the weights (10 MB) forward, and the gradients twice (40 MB) backward; at 40 images
// the f32 multiply-adds (0.2 G in each) take about as long. A training step has 7000 G.
#include "math.cuh"

constexpr int IMAGES = 8;  // that share a read of the weights
constexpr int TILE = 32;   // rows, at most
constexpr int CHUNK = 128; // channels of a warp, 4 for each lane

// Values of a weight's row.
__device__ __forceinline__ int padded(int channels) { return (channels + 7) / 8 * 8; }

// Values k .. k + 3, k < channels, of a row of f32 [channels]; zeros beyond its end.
__device__ __forceinline__ void read_row(const float* row, int k, int channels, float (&x)[4]) {
    if (channels % 4 == 0) {
        read4(row + k, x);
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = k + j < channels ? row[k + j] : 0.0f;
}

// Four weights, 8 bytes.
template <class T>
__device__ __forceinline__ void read_weights(const T* from, float (&w)[4]) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    const float2 low = unpack2<T>(v.x), high = unpack2<T>(v.y);
    w[0] = low.x, w[1] = low.y, w[2] = high.x, w[3] = high.y;
}

// ---- products with weights ----------------------------------------------------------------------------

// Rows of x one after the other, and those of `rows` in turn from row `first` on.
struct EachRow {
    __device__ __forceinline__ int operator()(int i) const { return i; }
};
struct InTurn {
    int first, rows;
    __device__ __forceinline__ int operator()(int i) const { return (first + i) % rows; }
};

// sums[r * IMAGES + i] += this lane's share of weight row `first + r` times row `at(i)` of x. Rows from `rows`
// on repeat the last.
template <class T, int ROWS, class At = EachRow>
__device__ __forceinline__ void add_products(float (&sums)[ROWS * IMAGES], const T* weight, int first, int rows,
                                             const float* x, int images, int channels, At at = {}) {
    const T* row[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) row[r] = weight + size_t(min(first + r, rows - 1)) * padded(channels);
    for (int k = 4 * (threadIdx.x % 32); k < channels; k += CHUNK) {
        float w[ROWS][4];
#pragma unroll
        for (int r = 0; r < ROWS; r++) read_weights(row[r] + k, w[r]);
#pragma unroll
        for (int i = 0; i < IMAGES; i++) {
            float v[4] = {};
            if (i < images) read_row(x + size_t(at(i)) * channels, k, channels, v);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[r * IMAGES + i] += w[r][j] * v[j];
        }
    }
}

// Sums N values (a power of two up to 32) of each lane over the warp. Lane l gets the sum of value l / (32 / N). In each
// step a lane gives half of its values away, which takes 31 shuffles for N = 32 instead of 160.
template <int N, int BY = 16>
__device__ __forceinline__ float scattered_sums(const float (&x)[N]) {
    float kept[N > 1 ? N / 2 : 1];
    if constexpr (N > 1) {
        const bool upper = threadIdx.x & BY;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float given = upper ? x[i] : x[i + N / 2];
            kept[i] = (upper ? x[i + N / 2] : x[i]) + __shfl_xor_sync(0xffffffffu, given, BY);
        }
    } else {
        kept[0] = x[0] + __shfl_xor_sync(0xffffffffu, x[0], BY);
    }
    if constexpr (BY == 1)
        return kept[0];
    else
        return scattered_sums<(N > 1 ? N / 2 : 1), BY / 2>(kept);
}

// ---- embed --------------------------------------------------------------------------------------------

constexpr int EMBED_ROWS = 2;     // of a warp
constexpr int EMBED_WARPS = 4;

struct EmbedParams {
    const float* sigma;    // [n]
    const float* freqs;    // [noise_channels]
    const float* phases;   // [noise_channels]
    const void* noise;     // effective, [emb_channels, padded noise_channels]
    const void* label;     // effective, [emb_channels, padded label_channels]; unread where `labels` is null
    const float* labels;   // [label_rows, label_channels], taken in turn, or null
    float* features;       // [n, noise_channels]
    float* pre;            // [n, emb_channels]
    float* emb;            // [n, emb_channels]
    int images, noise_channels, label_channels, emb_channels;
    float noise_factor;    // wa
    float label_factor;    // wb sqrt(label_channels)
    int label_rows;
    int padding;
};

// A block has 8 rows and 8 images. It computes the images' features itself, and block 0 of the rows writes them.
template <class T>
__device__ __forceinline__ void embed(const EmbedParams& p) {
    extern __shared__ __align__(128) unsigned char smem[];
    float* const features = reinterpret_cast<float*>(smem);  // [IMAGES, width]
    const int first = blockIdx.y * IMAGES, images = min(IMAGES, p.images - first);
    const int width = (p.noise_channels + 3) / 4 * 4;  // zeros at the end, for 16-byte reads
    for (int i = threadIdx.x; i < images * width; i += blockDim.x) {
        const int image = first + i / width, k = i % width;
        float feature = 0;
        if (k < p.noise_channels) {
            feature = fourier_feature(logf(p.sigma[image]) / 4.0f, p.freqs[k], p.phases[k]);
            if (blockIdx.x == 0) p.features[size_t(image) * p.noise_channels + k] = feature;
        }
        features[i] = feature;
    }
    __syncthreads();

    const int row = (blockIdx.x * EMBED_WARPS + threadIdx.x / 32) * EMBED_ROWS;
    float sums[EMBED_ROWS * IMAGES] = {}, label_sums[EMBED_ROWS * IMAGES] = {};
    add_products<T, EMBED_ROWS>(sums, static_cast<const T*>(p.noise), row, p.emb_channels, features, images, width);
    if (p.labels != nullptr)
        add_products<T, EMBED_ROWS>(label_sums, static_cast<const T*>(p.label), row, p.emb_channels,
                                    p.labels, images, p.label_channels, InTurn{first, p.label_rows});
#pragma unroll
    for (int i = 0; i < EMBED_ROWS * IMAGES; i++) sums[i] = p.noise_factor * sums[i] + p.label_factor * label_sums[i];

    const float pre = scattered_sums(sums);
    const int value = threadIdx.x % 32 * EMBED_ROWS * IMAGES / 32;
    const int c = row + value / IMAGES, image = value % IMAGES;
    if (threadIdx.x % (32 / (EMBED_ROWS * IMAGES)) != 0 || c >= p.emb_channels || image >= images) return;
    const size_t at = size_t(first + image) * p.emb_channels + c;
    p.pre[at] = pre;
    p.emb[at] = mp_silu(pre);
}

// ---- emb_scales ---------------------------------------------------------------------------------------

constexpr int SCALES_ROWS = 4;  // of a warp; a block has a tile

// Rows of one layer.
struct ScaleTile {
    long long weight;     // first value among the effective weights
    long long grad;       // and in the arena of gradients
    long long gain;       // the layer's gain among the exact values
    long long gain_grad;  // and its gradient
    int channel;          // of the first row in the joint product
    int rows;             // 1..TILE
    int layer_tiles;      // in the first tile of a layer: how many it has; else 0
    int padding;
};

struct EmbScales {
    const ScaleTile* tiles;
    const void* weights;  // effective
    const float* exact;   // gains
    const float* emb;     // [n, emb_channels]
    float* out;           // [n, channels]
    int images, emb_channels, channels;
    int padding;
};

template <class T>
__device__ __forceinline__ void emb_scales(const EmbScales& p) {
    const ScaleTile tile = p.tiles[blockIdx.x];
    const int first = blockIdx.y * IMAGES, images = min(IMAGES, p.images - first);
    const int row = threadIdx.x / 32 * SCALES_ROWS;
    if (row >= tile.rows) return;
    float sums[SCALES_ROWS * IMAGES] = {};
    add_products<T, SCALES_ROWS>(sums, static_cast<const T*>(p.weights) + tile.weight, row, tile.rows,
                                 p.emb + size_t(first) * p.emb_channels, images, p.emb_channels);
    const float sum = scattered_sums(sums);
    const int c = row + threadIdx.x % 32 / IMAGES, image = threadIdx.x % IMAGES;
    if (c < tile.rows && image < images)
        p.out[size_t(first + image) * p.channels + tile.channel + c] = p.exact[tile.gain] * sum + 1.0f;
}

// ---- gradients ----------------------------------------------------------------------------------------

constexpr int GRAD_WARPS = 4;                  // of the blocks below
constexpr int GRAD_ROWS = TILE / GRAD_WARPS;   // of a warp
constexpr int STAGED = 32;                     // images whose gradients are in shared memory at a time

// sums[r][j] = sum over images of gradient(image, row) x[image][k + j], row = the warp's GRAD_ROWS rows
// of TILE. The whole block calls it; `staged` is shared.
template <class Gradient>
__device__ __forceinline__ void outer_products(float (&sums)[GRAD_ROWS][4], float (*staged)[TILE], Gradient gradient,
                                               const float* x, int images, int channels, int k) {
    const int warp = threadIdx.x / 32;
    for (int first = 0; first < images; first += STAGED) {
        const int count = min(STAGED, images - first);
        if (first > 0) __syncthreads();  // the last images may still be read
        for (int i = threadIdx.x; i < count * TILE; i += blockDim.x)
            staged[i / TILE][i % TILE] = gradient(first + i / TILE, i % TILE);
        __syncthreads();
        if (k >= channels) continue;
        for (int i = 0; i < count; i++) {
            float v[4], g[GRAD_ROWS / 4][4];
            read_row(x + size_t(first + i) * channels, k, channels, v);
#pragma unroll
            for (int q = 0; q < GRAD_ROWS / 4; q++) read4(&staged[i][warp * GRAD_ROWS + 4 * q], g[q]);
#pragma unroll
            for (int r = 0; r < GRAD_ROWS; r++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[r][j] += g[r / 4][r % 4] * v[j];
        }
    }
}

__device__ __forceinline__ void add4(float* to, const float (&x)[4], float factor) {
    float sum[4];
    read4(to, sum);
#pragma unroll
    for (int j = 0; j < 4; j++) sum[j] += factor * x[j];
    write4(to, sum);
}

struct EmbedBackward {
    const float* grad_emb;  // [n, emb_channels]
    const float* pre;       // [n, emb_channels]
    const float* features;  // [n, noise_channels]
    const float* labels;    // [n, label_channels]; unread where there are no label chunks
    float* grad_noise;      // [emb_channels, padded noise_channels], added to
    float* grad_label;      // [emb_channels, padded label_channels], added to
    int images, noise_channels, label_channels, emb_channels;
    float noise_factor, label_factor;  // as in EmbedParams
    int noise_chunks;       // ceil(noise_channels / CHUNK); those of the label follow
    int padding;
};

// A block has 32 rows and 128 channels of one of the weights.
extern "C" __global__ void __launch_bounds__(128) embed_backward(EmbedBackward p) {
    begin_kernel();
    __shared__ __align__(16) float staged[STAGED][TILE];
    const bool noise = int(blockIdx.y) < p.noise_chunks;
    const int chunk = noise ? blockIdx.y : blockIdx.y - p.noise_chunks;
    const int channels = noise ? p.noise_channels : p.label_channels;
    const int k = chunk * CHUNK + 4 * (threadIdx.x % 32);
    auto gradient = [&](int image, int row) {
        const int c = blockIdx.x * TILE + row;
        if (c >= p.emb_channels) return 0.0f;
        const size_t at = size_t(image) * p.emb_channels + c;
        return p.grad_emb[at] * silu_grad(p.pre[at]) * (1.0f / SILU_MAGNITUDE);
    };
    float sums[GRAD_ROWS][4] = {};
    outer_products(sums, staged, gradient, noise ? p.features : p.labels, p.images, channels, k);
    if (k >= channels) return;
#pragma unroll
    for (int r = 0; r < GRAD_ROWS; r++) {
        const int c = blockIdx.x * TILE + threadIdx.x / 32 * GRAD_ROWS + r;
        if (c < p.emb_channels)
            add4((noise ? p.grad_noise : p.grad_label) + size_t(c) * padded(channels) + k, sums[r],
                 noise ? p.noise_factor : p.label_factor);
    }
}
KERNEL_EXPORT(embed_backward);

struct EmbScalesBackward {
    const ScaleTile* tiles;  // [count]
    const void* weights;     // effective
    const float* exact;      // gains
    const float* emb;        // [n, emb_channels]
    const float* grad;       // of the scales, [n, channels]
    float* grads;            // arena of the parameters' gradients, added to
    float* grad_emb;         // [n, emb_channels]
    float* gain_sums;        // [count, chunks]: parts of the gains' gradients
    float* partial;          // [splits, n, 4 vectors]: parts of grad_emb
    int images, emb_channels, channels, count;
    int chunks;              // ceil(emb_channels / CHUNK)
    int vectors;             // ceil(emb_channels / 4)
    int splits;              // of the tiles
    int padding;
};

// A block has one tile and 128 channels.
template <class T>
__device__ __forceinline__ void emb_scales_wgrad(const EmbScalesBackward& p) {
    __shared__ __align__(16) float staged[STAGED][TILE];
    __shared__ __align__(16) float scratch[1][32];
    const ScaleTile tile = p.tiles[blockIdx.x];
    const float gain = p.exact[tile.gain];
    const int k = blockIdx.y * CHUNK + 4 * (threadIdx.x % 32);
    auto gradient = [&](int image, int row) {
        return row < tile.rows ? p.grad[size_t(image) * p.channels + tile.channel + row] : 0.0f;
    };
    float sums[GRAD_ROWS][4] = {};
    outer_products(sums, staged, gradient, p.emb, p.images, p.emb_channels, k);
    float dot[1] = {};
#pragma unroll
    for (int r = 0; r < GRAD_ROWS; r++) {
        const int row = threadIdx.x / 32 * GRAD_ROWS + r;
        if (row >= tile.rows || k >= p.emb_channels) break;
        const size_t at = size_t(row) * padded(p.emb_channels) + k;
        float w[4];
        read_weights(static_cast<const T*>(p.weights) + tile.weight + at, w);
#pragma unroll
        for (int j = 0; j < 4; j++) dot[0] += w[j] * sums[r][j];
        add4(p.grads + tile.grad + at, sums[r], gain);
    }
    block_sum(dot, scratch);
    if (threadIdx.x == 0) p.gain_sums[blockIdx.x * p.chunks + blockIdx.y] = dot[0];
}

// A block has every `splits`-th tile, 128 channels and 8 images; of each tile a warp has 8 rows.
template <class T>
__device__ __forceinline__ void emb_scales_dgrad(const EmbScalesBackward& p) {
    __shared__ __align__(16) float staged[IMAGES][TILE];
    __shared__ __align__(16) float warps[GRAD_WARPS][IMAGES][CHUNK];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int k = blockIdx.y * CHUNK + 4 * lane;
    const int first = blockIdx.z * IMAGES, images = min(IMAGES, p.images - first);
    float sums[IMAGES][4] = {};
    for (int t = blockIdx.x; t < p.count; t += p.splits) {
        const ScaleTile tile = p.tiles[t];
        const float gain = p.exact[tile.gain];
        if (t >= p.splits) __syncthreads();  // the last tile's gradients may still be read
#pragma unroll
        for (int i = warp; i < IMAGES; i += GRAD_WARPS) {
            const bool here = i < images && lane < tile.rows;
            staged[i][lane] = here ? gain * p.grad[size_t(first + i) * p.channels + tile.channel + lane] : 0.0f;
        }
        __syncthreads();
        if (k >= p.emb_channels) continue;
#pragma unroll
        for (int q = 0; q < GRAD_ROWS; q += 4) {
            const int row = warp * GRAD_ROWS + q;
            float w[4][4];
#pragma unroll
            for (int r = 0; r < 4; r++)  // beyond the tile's rows, where the gradients are zero, the last one
                read_weights(static_cast<const T*>(p.weights) + tile.weight +
                                 size_t(min(row + r, tile.rows - 1)) * padded(p.emb_channels) + k, w[r]);
#pragma unroll
            for (int i = 0; i < IMAGES; i++) {
                float g[4];
                read4(&staged[i][row], g);
#pragma unroll
                for (int r = 0; r < 4; r++)
#pragma unroll
                    for (int j = 0; j < 4; j++) sums[i][j] += g[r] * w[r][j];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < IMAGES; i++) write4(&warps[warp][i][4 * lane], sums[i]);
    __syncthreads();
    if (k >= p.emb_channels) return;
    for (int i = warp; i < images; i += GRAD_WARPS) {
        float sum[4] = {};
#pragma unroll
        for (int other = 0; other < GRAD_WARPS; other++) {
            float part[4];
            read4(&warps[other][i][4 * lane], part);
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] += part[j];
        }
        write4(p.partial + ((size_t(blockIdx.x) * p.images + first + i) * p.vectors * 4 + k), sum);
    }
}

// A thread adds up 4 channels of an image, and also the gain of a layer, in the order of the tiles.
extern "C" __global__ void __launch_bounds__(128) emb_scales_reduce(EmbScalesBackward p) {
    begin_kernel();
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    if (thread < p.count && p.tiles[thread].layer_tiles > 0) {
        float sum = 0;
        for (int i = 0; i < p.tiles[thread].layer_tiles * p.chunks; i++) sum += p.gain_sums[thread * p.chunks + i];
        p.grads[p.tiles[thread].gain_grad] += sum;
    }
    if (thread >= p.images * p.vectors) return;
    float sum[4] = {};
    for (int split = 0; split < p.splits; split++) {
        float part[4];
        read4(p.partial + (size_t(split) * p.images * p.vectors + thread) * 4, part);
#pragma unroll
        for (int j = 0; j < 4; j++) sum[j] += part[j];
    }
    const int image = thread / p.vectors, k = thread % p.vectors * 4;
    float* out = p.grad_emb + size_t(image) * p.emb_channels + k;
    if (p.emb_channels % 4 == 0) {
        write4(out, sum);
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (k + j < p.emb_channels) out[j] = sum[j];
}
KERNEL_EXPORT(emb_scales_reduce);

#define KERNEL(name, Params, threads)                                                                               \
    extern "C" __global__ void __launch_bounds__(threads) name##_f16(Params p) { begin_kernel(); name<__half>(p); } \
    KERNEL_EXPORT(name##_f16);                                                                                      \
    extern "C" __global__ void __launch_bounds__(threads) name##_bf16(Params p) {                                   \
        begin_kernel();                                                                                             \
        name<__nv_bfloat16>(p);                                                                                     \
    }                                                                                                               \
    KERNEL_EXPORT(name##_bf16)
KERNEL(embed, EmbedParams, 128);
KERNEL(emb_scales, EmbScales, 256);
KERNEL(emb_scales_wgrad, EmbScalesBackward, 128);
KERNEL(emb_scales_dgrad, EmbScalesBackward, 128);
