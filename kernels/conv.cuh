// The machine under the three convolutions: an implicit matrix product on tensor cores.
//
//     D[m][n] = sum over k of A[m][k] B[k][n]        A, B 16-bit (f16 or bf16), sums f32
//
//     fprop   m = pixel          n = output channel      k = (tap, input channel)
//     dgrad   m = pixel          n = input channel       k = (tap, output channel)
//     wgrad   m = output channel n = (tap, input ch.)    k = pixel
//
// Tap t of 9 is the neighbour at dy = t / 3 - 1, dx = t % 3 - 1; a 1x1 convolution has the one tap 0.
// No matrix is ever built: each thread gathers 16-byte chunks (8 channels of one pixel) by cp.async,
// zeros for neighbours outside the image. That k (or n) is a flat index over taps and channels
// wastes nothing when there are 8 channels: 72 products are 3 steps of 32, not 9.
//
// A block makes one tile of D, in steps of BK, with STAGES - 1 steps in flight. In shared memory an
// operand lies as memory gives it: "K-major" (rows of m or n, BK values each; fprop's both) or
// "K-rows" (BK rows of m or n values; read by ldmatrix.trans), both swizzled so that neither
// cp.async nor ldmatrix meets a bank twice. The result passes through shared memory once more, so
// that global memory is touched 16 bytes a thread, 8 channels of one pixel at a time.
//
// Bytes a step through shared memory: 2 BK (BM + BN), read WARPS_N and WARPS_M times; operations:
// 2 BM BN BK.
#pragma once
#include "math.cuh"

template <int BM_, int BN_, int BK_, int STAGES_, int WARPS_M_, int WARPS_N_>
struct Tile {
    static constexpr int BM = BM_, BN = BN_, BK = BK_, STAGES = STAGES_;
    static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, THREADS = WARPS_M * WARPS_N * 32;
    static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;  // a warp's part
    static constexpr int A_BYTES = BM * BK * 2, STAGE_BYTES = A_BYTES + BN * BK * 2;
    static constexpr int OUT_ROW = WN + 8;  // floats of a row of the way out: 8 rows of float2 meet no bank twice
    static_assert(WM % 16 == 0 && WN % 16 == 0 && BK % 16 == 0, "a warp's part is made of 16 x 16 fragments");
    static_assert(WARPS_M * WARPS_N * 16 * OUT_ROW * 4 <= STAGES * STAGE_BYTES, "the way out fits the pipeline's memory");

    using Accumulators = float[WM / 16][WN / 8][4];
    static __device__ __forceinline__ int warp_m() { return threadIdx.x / 32 / WARPS_N * WM; }
    static __device__ __forceinline__ int warp_n() { return threadIdx.x / 32 % WARPS_N * WN; }
};

// ---- the main loop ------------------------------------------------------------------------------

// acc += A B over `steps` steps. `load(stage)` issues the copies of the next step into a stage, A
// first, B behind it; `before(step)` runs before a step's product.
template <class T, class Tile, bool A_K_ROWS, bool B_K_ROWS, class Load, class Before>
__device__ __forceinline__ void multiply(typename Tile::Accumulators& acc, smem_addr shared, int steps, Load& load,
                                         Before&& before) {
    constexpr int M = Tile::WM / 16, N = Tile::WN / 16;
    constexpr int A_ROW = (A_K_ROWS ? Tile::BM : Tile::BK) * 2, B_ROW = (B_K_ROWS ? Tile::BN : Tile::BK) * 2;
    const int lane = threadIdx.x % 32, m0 = Tile::warp_m(), n0 = Tile::warp_n();

    for (int s = 0; s < Tile::STAGES - 1; s++) {
        if (s < steps) load(shared + s * Tile::STAGE_BYTES);
        cp_async_commit();
    }
    int reading = 0, writing = Tile::STAGES - 1;
    for (int step = 0; step < steps; step++) {
        cp_async_wait<Tile::STAGES - 2>();
        __syncthreads();  // this stage is there for all, and all have left the one loaded next
        if (step + Tile::STAGES - 1 < steps) load(shared + writing * Tile::STAGE_BYTES);
        cp_async_commit();
        before(step);
        const smem_addr a = shared + reading * Tile::STAGE_BYTES, b = a + Tile::A_BYTES;
#pragma unroll
        for (int k = 0; k < Tile::BK; k += 16) {
            smem_addr a_rows[M], b_rows[N];
#pragma unroll
            for (int i = 0; i < M; i++)
                a_rows[i] = a + (A_K_ROWS ? swizzle<A_ROW>(k + lane / 16 * 8 + lane % 8, m0 / 8 + i * 2 + lane / 8 % 2)
                                          : swizzle<A_ROW>(m0 + i * 16 + lane % 16, k / 8 + lane / 16));
#pragma unroll
            for (int j = 0; j < N; j++)
                b_rows[j] = b + (B_K_ROWS ? swizzle<B_ROW>(k + lane % 16, n0 / 8 + j * 2 + lane / 16)
                                          : swizzle<B_ROW>(n0 + j * 16 + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
            uint32_t fa[M][4], pairs[N][4], fb[2 * N][2];
            ldmatrix_n<A_K_ROWS>(fa, a_rows);
            ldmatrix_n<B_K_ROWS>(pairs, b_rows);
#pragma unroll
            for (int j = 0; j < 2 * N; j++) fb[j][0] = pairs[j / 2][j % 2 * 2], fb[j][1] = pairs[j / 2][j % 2 * 2 + 1];
            mma_tile<T>(acc, fa, fb);
        }
        reading = reading + 1 == Tile::STAGES ? 0 : reading + 1;
        writing = writing + 1 == Tile::STAGES ? 0 : writing + 1;
    }
    cp_async_wait<0>();
}

// ---- gathering ----------------------------------------------------------------------------------

// The tap and channel of a flat index that moves on by steps.
struct Walk {
    int tap, channel;
    __device__ __forceinline__ void start(int k, int channels) { tap = k / channels, channel = k % channels; }
    __device__ __forceinline__ void advance(int by, int channels) {
        for (channel += by; channel >= channels; channel -= channels) tap++;
    }
};

// How far the neighbour at a tap lies, in pixels.
__device__ __forceinline__ int tap_shift(int tap, int taps, int width) {
    return taps == 1 ? 0 : (tap / 3 - 1) * width + tap % 3 - 1;
}
__device__ __forceinline__ bool tap_inside(int tap, int taps, int y, int x, int height, int width) {
    if (taps == 1) return true;
    y += tap / 3 - 1, x += tap % 3 - 1;
    return unsigned(y) < unsigned(height) && unsigned(x) < unsigned(width);
}

// The pixels that a row of tiles works on: tiles do not cross groups (all pixels; or one image).
struct PixelTiles {
    int height, width;    // of an image
    int group;            // pixels of a group
    int tiles_per_group;  // tiles of BM pixels
};

template <int BM>
struct TilePixels {
    int first, count;  // valid pixels first .. first + count of a tile, count <= BM
    __device__ __forceinline__ explicit TilePixels(const PixelTiles& t) {
        const int in_group = blockIdx.x % t.tiles_per_group * BM;
        first = blockIdx.x / t.tiles_per_group * t.group + in_group, count = min(BM, t.group - in_group);
    }
};

// Operand A of fprop and dgrad: K-major rows of neighbours of the tile's pixels. A thread has a
// fixed chunk of the step and every (THREADS / chunks)-th row.
template <class T, class Tile>
struct PixelRows {
    static constexpr int CHUNKS = Tile::BK / 8, STRIDE = Tile::THREADS / CHUNKS, ROWS = Tile::BM / STRIDE;
    static_assert(Tile::BM % STRIDE == 0, "every thread copies as many rows");
    int pixel[ROWS];
    uint32_t inside[ROWS];  // bit t: the neighbour at tap t is in the image

    __device__ __forceinline__ PixelRows(const PixelTiles& t, int taps) {
        const TilePixels<Tile::BM> tile(t);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = threadIdx.x / CHUNKS + i * STRIDE;
            const bool valid = row < tile.count;
            pixel[i] = valid ? tile.first + row : 0, inside[i] = 0;
            const int x = pixel[i] % t.width, y = pixel[i] / t.width % t.height;
            for (int tap = 0; tap < taps; tap++)
                inside[i] |= uint32_t(valid && tap_inside(tap, taps, y, x, t.height, t.width)) << tap;
        }
    }
    // src [pixels][channels]; a tap beyond the last copies zeros.
    __device__ __forceinline__ void load(smem_addr to, const T* src, int channels, Walk k, int taps, int width) const {
        const int shift = tap_shift(k.tap, taps, width);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const bool valid = k.tap < taps && (inside[i] >> k.tap & 1);
            const T* from = src + (int64_t(pixel[i] + shift) * channels + k.channel);
            cp_async(to + swizzle<Tile::BK * 2>(threadIdx.x / CHUNKS + i * STRIDE, threadIdx.x % CHUNKS),
                     valid ? from : src, valid);
        }
    }
};

// Operand B of a forward convolution: K-major rows of weight [cout][row], 8 values of each from `at` on; zeros
// unless `inside`. As for A, a thread has a fixed chunk of the step.
template <class T, class Tile>
__device__ __forceinline__ void load_weights(smem_addr stage, const T* weight, int cout, int row, int at, bool inside) {
    constexpr int CHUNKS = Tile::BK / 8, STRIDE = Tile::THREADS / CHUNKS;
#pragma unroll
    for (int i = 0; i < (Tile::BN + STRIDE - 1) / STRIDE; i++) {
        const int n = threadIdx.x / CHUNKS + i * STRIDE, co = blockIdx.y * Tile::BN + n;
        if (Tile::BN % STRIDE != 0 && n >= Tile::BN) break;
        const bool valid = co < cout && inside;
        cp_async(stage + Tile::A_BYTES + swizzle<Tile::BK * 2>(n, threadIdx.x % CHUNKS),
                 valid ? weight + (int64_t(co) * row + at) : weight, valid);
    }
}

// ---- the way out --------------------------------------------------------------------------------

// Calls sink(row, column, v) for the tile's values, v those of columns column .. column + 8; a
// thread's column is the same in all its calls.
template <class Tile, class Sink>
__device__ __forceinline__ void emit(const typename Tile::Accumulators& acc, unsigned char* smem, Sink&& sink) {
    constexpr int CHUNKS = Tile::WN / 8, ROWS = 32 / CHUNKS;
    const int lane = threadIdx.x % 32, chunk = lane % CHUNKS;
    float* const out = reinterpret_cast<float*>(smem) + threadIdx.x / 32 * 16 * Tile::OUT_ROW;
    __syncthreads();  // all have left the pipeline's last stage
#pragma unroll
    for (int i = 0; i < Tile::WM / 16; i++) {
#pragma unroll
        for (int j = 0; j < Tile::WN / 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *reinterpret_cast<float2*>(out + (lane / 4 + half * 8) * Tile::OUT_ROW + j * 8 + lane % 4 * 2) =
                    make_float2(acc[i][j][half * 2], acc[i][j][half * 2 + 1]);
        __syncwarp();
#pragma unroll
        for (int pass = 0; pass < 16 / ROWS; pass++) {
            const int row = lane / CHUNKS + pass * ROWS;
            // Half of the lanes read their upper four first: 8 lanes then meet no bank twice.
            const int upper = CHUNKS == 8 ? chunk / 4 : row % 2;
            const float* from = out + row * Tile::OUT_ROW + chunk * 8;
            const uint4 p = load16(from + upper * 4), q = load16(from + 4 - upper * 4);
            const uint4 low = upper ? q : p, high = upper ? p : q;
            float v[8] = {__uint_as_float(low.x),  __uint_as_float(low.y),  __uint_as_float(low.z),  __uint_as_float(low.w),
                          __uint_as_float(high.x), __uint_as_float(high.y), __uint_as_float(high.z), __uint_as_float(high.w)};
            sink(Tile::warp_m() + i * 16 + row, Tile::warp_n() + chunk * 8, v);
        }
        __syncwarp();
    }
}

__device__ __forceinline__ void load8(const float* from, float (&v)[8]) {
    const uint4 a = load16(from), b = load16(from + 4);
    v[0] = __uint_as_float(a.x), v[1] = __uint_as_float(a.y), v[2] = __uint_as_float(a.z), v[3] = __uint_as_float(a.w);
    v[4] = __uint_as_float(b.x), v[5] = __uint_as_float(b.y), v[6] = __uint_as_float(b.z), v[7] = __uint_as_float(b.w);
}
__device__ __forceinline__ void store8(float* to, const float (&v)[8]) {
    store16(to, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])));
    store16(to + 4, make_uint4(__float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]), __float_as_uint(v[7])));
}

// Sum over splits of partial[split][at .. at + 8], in their order.
__device__ __forceinline__ void sum_splits(const float* partial, size_t at, size_t stride, int splits, float (&v)[8]) {
    load8(partial + at, v);
    for (int s = 1; s < splits; s++) {
        float u[8];
        load8(partial + s * stride + at, u);
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] += u[e];
    }
}
