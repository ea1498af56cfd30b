// The optimizer step and the effective weights: one pass over memory, one block for each row.
//
// A row is the fan-in of one output channel, K values of the stored weight w with gradient g (with
// respect to the effective weight, summed over the micro-batches), Adam's moments m and v, and moving
// averages e. With normalize(w) = w / (eps + rms(w)) (EDM2 eq. 47, 66):
//
//     g  <- g * grad_scale, or 0 where that is not finite
//     x   = normalize(... normalize(w)), `rounds` times: forced weight normalisation, one factor of the row
//     g  <- d(normalize(x) / sqrt(K))/dx g = (g - x (g . x) / (K r d)) / (d sqrt(K)),   r = rms(x), d = eps + r
//     m  <- m + (g - m)(1 - beta1)
//     v  <- v beta2 + g^2 (1 - beta2)
//     w  <- x - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps_adam)
//     e  <- e + (w - e)(1 - beta_e), each average
//     effective <- s normalize(normalize^rounds(w)) / sqrt(K), in 16 bits: what the convolutions read
//
// and for the statistics g . g and the number of values that were not finite, one pair a row, which a
// second kernel adds up in a fixed order. Gains are rows that skip the normalisation and stay f32.
//
// s are the scales of mp_cat, of the channels before `split` and from there, 1 elsewhere. A third kernel copies effective
// convolution weights to turned[c][taps - 1 - t][co], what conv_dgrad reads (weight_turn: 4 bytes a weight).
//
// Layout: everything f32 is [cout][tap][cin] in arenas of equal offsets, and so is the effective copy; cin
// is padded with zeros so that a row is a multiple of 8 values. Padding stays zero if its gradient is.
//
// Bytes a value, the floor: reads w, g, m, v (16), writes w, g, m, v (16), averages 8 each, effective
// copy 2: 34 + 8 averages. g is read twice, the second time from L2: the w of a row stay in
// registers (V vectors of 4 a thread), so that both of its sums are at hand without storing it.
#include "math.cuh"

constexpr int MAX_EMAS = 4;

struct WeightRow {
    long long first;      // its first value in the f32 arenas
    long long effective;  // its first value in `effective`; of a gain or a buffer in `exact`
    int length;           // with padding, a multiple of 8
    int fan_in;           // K, without padding; 0: a gain or a buffer, used as it is stored
    int cin, split;       // of its channels, with padding, those from split on have another scale; multiples of 4
    float scales[2];
};

// The scalars of one step. They are in device memory, so that a captured graph serves every step.
struct StepScalars {
    float grad_scale;
    float rate;           // lr / (1 - beta1^t)
    float rest1;          // 1 - beta1
    float beta2, rest2;   // 1 - beta2
    float root;           // 1 / sqrt(1 - beta2^t)
    float eps;
    float ema_rest[MAX_EMAS];  // 1 - beta of each average
};

struct RowStats {
    float norm_squared;
    unsigned nonfinite;
};

struct WeightStep {
    const WeightRow* rows;       // [blocks]
    const StepScalars* scalars;
    float* weight;
    float* grad;                 // afterwards the g that Adam saw
    float* m;
    float* v;
    float* emas[MAX_EMAS];
    void* effective;
    float* exact;
    RowStats* stats;             // [blocks]
    int ema_count;
    int rounds;
};

struct WeightEffective {
    const WeightRow* rows;  // [blocks]
    const float* source;    // stored weights or an average
    void* effective;
    float* exact;
    int rounds;             // normalisations in all: 1, or for training those of the step + 1
    int padding;
};

// Factor of a row of this rms after `rounds` normalisations. `rms` becomes the row's rms after them.
__device__ __forceinline__ float normalized(float& rms, int rounds) {
    float factor = 1.0f;
    if (rms == 0.0f) return factor;  // zeros stay zeros, whereas the factor could overflow
    for (int i = 0; i < rounds; i++) {
        const float f = 1.0f / (NORM_EPS + rms);
        if (f == 1.0f) break;  // so are all that follow
        factor *= f, rms *= f;
    }
    return factor;
}

__device__ __forceinline__ bool finite(float x) { return fabsf(x) <= 3.402823466e38f; }

// Place of the first value of this thread's vector `v`.
__device__ __forceinline__ int vector_start(int v) { return 4 * (v * int(blockDim.x) + int(threadIdx.x)); }

template <class T, int V>
__device__ __forceinline__ void write_effective(const WeightRow& row, const float (&w)[V][4], float squares, int rounds,
                                                void* effective, float* exact) {
    const float count = float(max(row.fan_in, 1));
    float rms = sqrtf(squares / count);
    const float factor = normalized(rms, rounds) / sqrtf(count);
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int i = vector_start(v);
        if (i >= row.length) break;
        if (row.fan_in == 0) {
            write4(exact + row.effective + i, w[v]);
        } else {
            const float f = factor * (i % row.cin < row.split ? row.scales[0] : row.scales[1]);
            uint2 packed = make_uint2(pack2<T>(w[v][0] * f, w[v][1] * f), pack2<T>(w[v][2] * f, w[v][3] * f));
            *reinterpret_cast<uint2*>(static_cast<T*>(effective) + row.effective + i) = packed;
        }
    }
}

template <class T, int V>
__device__ __forceinline__ void weight_step(const WeightStep& p) {
    __shared__ __align__(16) float scratch[3][32];
    const WeightRow row = p.rows[blockIdx.x];
    const StepScalars s = *p.scalars;

    float w[V][4];
    float before[2] = {};  // w . w, w . g
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int i = vector_start(v);
        if (i >= row.length) break;
        float g[4];
        read4(p.weight + row.first + i, w[v]);
        read4(p.grad + row.first + i, g);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float scaled = g[j] * s.grad_scale;
            before[0] += w[v][j] * w[v][j];
            before[1] += finite(scaled) ? w[v][j] * scaled : 0.0f;
        }
    }
    block_sum(before, scratch);

    // g of the stored weight is across * g - along * x, x = forced * w.
    float forced = 1.0f, across = 1.0f, along = 0.0f;
    if (row.fan_in > 0) {
        const float count = float(row.fan_in);
        float r = sqrtf(before[0] / count);
        forced = normalized(r, p.rounds);
        const float d = NORM_EPS + r;
        across = 1.0f / (d * sqrtf(count));
        along = r > 0.0f ? across * forced * before[1] / (count * r * d) : 0.0f;
    }

    float after[3] = {};  // g . g, values not finite, new w . w
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int i = vector_start(v);
        if (i >= row.length) break;
        const long long at = row.first + i;
        float g[4], m[4], square[4];
        read4(p.grad + at, g);
        read4(p.m + at, m);
        read4(p.v + at, square);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float scaled = g[j] * s.grad_scale;
            const bool good = finite(scaled);
            const float x = w[v][j] * forced;
            const float grad = across * (good ? scaled : 0.0f) - along * x;
            m[j] += (grad - m[j]) * s.rest1;
            square[j] = square[j] * s.beta2 + grad * grad * s.rest2;
            w[v][j] = x - s.rate * m[j] / (sqrtf(square[j]) * s.root + s.eps);
            after[0] += grad * grad;
            after[1] += good ? 0.0f : 1.0f;
            after[2] += w[v][j] * w[v][j];
            g[j] = grad;
        }
        write4(p.weight + at, w[v]);
        write4(p.grad + at, g);
        write4(p.m + at, m);
        write4(p.v + at, square);
#pragma unroll
        for (int k = 0; k < MAX_EMAS; k++) {
            if (k >= p.ema_count) break;
            float e[4];
            read4(p.emas[k] + at, e);
#pragma unroll
            for (int j = 0; j < 4; j++) e[j] += (w[v][j] - e[j]) * s.ema_rest[k];
            write4(p.emas[k] + at, e);
        }
    }
    block_sum(after, scratch);
    if (threadIdx.x == 0) p.stats[blockIdx.x] = {after[0], unsigned(after[1])};
    write_effective<T>(row, w, after[2], p.rounds + 1, p.effective, p.exact);
}

template <class T, int V>
__device__ __forceinline__ void weight_effective(const WeightEffective& p) {
    __shared__ __align__(16) float scratch[1][32];
    const WeightRow row = p.rows[blockIdx.x];
    float w[V][4];
    float squares[1] = {};
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int i = vector_start(v);
        if (i >= row.length) break;
        read4(p.source + row.first + i, w[v]);
#pragma unroll
        for (int j = 0; j < 4; j++) squares[0] += w[v][j] * w[v][j];
    }
    block_sum(squares, scratch);
    write_effective<T>(row, w, squares[0], p.rounds, p.effective, p.exact);
}

// A line is an instance of both kernels in each 16-bit type: how many vectors of 4 values a thread has, and how many
// threads there are at most. The lines are also the table from which src/backend/gpu/weights.rs takes the first whose
// threads hold a row.
#define INSTANCE(name, Params, T, type, vectors, threads)                                       \
    extern "C" __global__ void __launch_bounds__(threads) name##_##vectors##_##type(Params p) { \
        begin_kernel();                                                                         \
        name<T, vectors>(p);                                                                    \
    }                                                                                           \
    KERNEL_EXPORT(name##_##vectors##_##type);
#define ROWS(vectors, threads)                                                                                             \
    INSTANCE(weight_step, WeightStep, __half, f16, vectors, threads)                                                       \
    INSTANCE(weight_step, WeightStep, __nv_bfloat16, bf16, vectors, threads)                                               \
    INSTANCE(weight_effective, WeightEffective, __half, f16, vectors, threads)                                                 \
    INSTANCE(weight_effective, WeightEffective, __nv_bfloat16, bf16, vectors, threads)

ROWS(8, 512)
ROWS(16, 512)

struct StepTotals {
    double grad_norm;
    unsigned long long nonfinite;
};

struct ReduceStats {
    const RowStats* rows;
    StepTotals* totals;
    int count;
    int padding;
};

// Adds up the statistics of all rows, by one block of 1024 threads, so that every run gives the same bits.
extern "C" __global__ void __launch_bounds__(1024) weight_stats(ReduceStats p) {
    begin_kernel();
    __shared__ __align__(16) StepTotals warps[32];
    StepTotals sum = {0.0, 0};
    for (int i = threadIdx.x; i < p.count; i += blockDim.x) {
        sum.grad_norm += double(p.rows[i].norm_squared);
        sum.nonfinite += p.rows[i].nonfinite;
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int pass = 0; pass < 2; pass++) {  // within each warp, then over the warps' sums
        for (int by = 16; by; by /= 2) {
            sum.grad_norm += __shfl_xor_sync(0xffffffffu, sum.grad_norm, by);
            sum.nonfinite += __shfl_xor_sync(0xffffffffu, sum.nonfinite, by);
        }
        if (pass == 1) break;
        if (lane == 0) warps[warp] = sum;
        __syncthreads();
        sum = warps[lane];
    }
    if (threadIdx.x == 0) *p.totals = {sqrt(sum.grad_norm), sum.nonfinite};
}
KERNEL_EXPORT(weight_stats);

// ---- the copy for conv_dgrad ------------------------------------------------------------------

// A tile of 64 x 64 weights of one tap.
struct TurnTile {
    long long from, to;      // the weight's first value among the effective and the turned ones
    int cout, cin, taps;     // with padding
    int tap, co, c;          // the tile's
};

struct WeightTurn {
    const TurnTile* tiles;  // [blocks]
    const void* effective;
    void* turned;
};

// For 256 threads. It serves both 16-bit types, as values are only moved.
extern "C" __global__ void __launch_bounds__(256) weight_turn(const __grid_constant__ WeightTurn p) {
    begin_kernel();
    __shared__ __align__(16) uint4 rows[64 * 8];  // [co][8 chunks of c], swizzled
    const TurnTile t = p.tiles[blockIdx.x];
    const uint16_t* from = static_cast<const uint16_t*>(p.effective) + t.from;
    uint16_t* to = static_cast<uint16_t*>(p.turned) + t.to;
    for (int i = threadIdx.x; i < 64 * 8; i += 256) {
        const int co = i / 8, chunk = i % 8;
        const bool valid = t.co + co < t.cout && t.c + chunk * 8 < t.cin;
        const uint16_t* at = from + (int64_t(t.co + co) * t.taps + t.tap) * t.cin + t.c + chunk * 8;
        rows[co * 8 + (chunk ^ (co & 7))] = valid ? load16(at) : make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    // Each warp turns 8 channels of 64 rows: register j holds channel lane / 4 of the rows 8 j + 2 (lane % 4) and the next.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = t.c + warp * 8 + lane / 4;
    const smem_addr at = smem_address(rows);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t columns[4];
        const int co = half * 32 + lane;
        ldmatrix<true>(columns, at + co * 128 + (warp ^ (co & 7)) * 16);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int row = t.co + half * 32 + j * 8 + lane % 4 * 2;
            if (c < t.cin && row < t.cout)
                *reinterpret_cast<uint32_t*>(to + (int64_t(c) * t.taps + t.taps - 1 - t.tap) * t.cout + row) = columns[j];
        }
    }
}
KERNEL_EXPORT(weight_turn);
