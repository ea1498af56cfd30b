// The machine under the convolutions: an implicit matrix product on tensor cores.
//
//     D[m][n] = sum over k of A[m][k] B[n][k]        A, B 16-bit (f16 or bf16)
//
//     fprop   m = pixel          n = output channel      k = (tap, input channel)
//     dgrad   m = pixel          n = input channel       k = (tap, output channel)    weights transposed and turned
//     wgrad   m = output channel n = (tap, input ch.)    k = pixel
//
// A tap is a neighbour: tap t of 9 lies at dy = t / 3 - 1, dx = t % 3 - 1; a 1x1 convolution has the one tap 0.
// No matrix is ever built: each thread gathers 16-byte chunks (8 channels of one pixel) by cp.async, zeros for
// neighbours outside the image.
//
// THE LOOP is bound by the instructions that it issues, not by the tensor cores, unless it is lean:
//
//   * A step is 64 channels of one tap. So all rows of a step lie at one distance from where they lay for tap 0: an
//     address is one offset of the row plus one number of the step, and whether the neighbour is inside is one bit of a
//     mask of the row.
//   * All taps of 64 channels follow each other. The three of a row read almost the same pixels, BM + 2 rows of 128 bytes,
//     which L1 keeps beside the stages: it has 28 KB on a GeForce card. So L2 brings 21 KB a step (128x128) instead of 32: 10.7
//     instead of 16 bytes a cycle of each multiprocessor where sums are f16, and a step takes 2,048 cycles.
//   * 64 values are 128 bytes: the swizzle against bank conflicts is one xor, known before the loop.
//   * Taps and channels are counted once for the block, in uniform registers.
//
// That needs channels in multiples of 64. Others (the 5 channels of the first convolution, small networks) take the
// FLAT gather, where each thread counts its own taps and channels.
//
// SUMS are f32, or f16 in two levels: the 64 products of a step are summed in f16, which GeForce cards do at twice the
// rate, and each step's sum is added to f32 registers (docs/performance.md: error, and why nothing overflows).
//
// A block makes one tile of D, with STAGES - 1 steps in flight. In shared memory an operand lies as memory gives it: rows
// of m or n, 64 values of k each (KMajor); or rows of k, 64 values of m or n each, one block of 64 after the other (KRows;
// read by ldmatrix.trans). The result passes through shared memory once more, so that each thread reads and writes global
// memory 16 bytes, 8 channels of one pixel, at a time.
//
// Bytes a step through shared memory: 128 (BM + BN), read WARPS_N and WARPS_M times; operations: 128 BM BN.
// Instructions for each HMMA of the loop: counted by scripts/kernel-report, listed in docs/kernels.md.
#pragma once
#include "math.cuh"

constexpr int BK = 64;             // summands of a step
constexpr int ROW_BYTES = BK * 2;  // of a row in shared memory: all 32 banks
constexpr int CHUNKS = BK / 8;     // copies of a row

// Floats of a row in the epilogue's shared memory, such that 8 rows of float2 meet no bank twice.
template <int COLUMNS>
constexpr int OUT_ROW = COLUMNS + 8;

template <int BM_, int BN_, int STAGES_, int WARPS_M_, int WARPS_N_>
struct Tile {
    static constexpr int BM = BM_, BN = BN_, STAGES = STAGES_;
    static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, THREADS = WARPS_M * WARPS_N * 32;
    static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;  // a warp's part
    static constexpr int A_BYTES = BM * ROW_BYTES, STAGE_BYTES = A_BYTES + BN * ROW_BYTES;
    static_assert(WM % 16 == 0 && WN % 16 == 0 && WM <= 64 && WN <= 64, "a warp's part is made of 16 x 16 fragments");
    static_assert(WARPS_M * WARPS_N * 16 * OUT_ROW<WN> * 4 <= STAGES * STAGE_BYTES, "the epilogue fits the pipeline's memory");

    using Accumulators = float[WM / 16][WN / 8][4];
    static __device__ __forceinline__ int warp_m() { return threadIdx.x / 32 / WARPS_N * WM; }
    static __device__ __forceinline__ int warp_n() { return threadIdx.x / 32 % WARPS_N * WN; }
};

// Blocks of a multiprocessor for which the registers must suffice, for the launch bounds: those of tiles.cuh, or as many as
// find shared memory: 164 KB on cards of compute capability 8.0 (86 and 89 have 100, but share its code), 228 KB on 9.0,
// 100 KB on 12.0.
template <class Tile>
constexpr int blocks_at_once(int blocks) {
#if !defined(__CUDA_ARCH__)
    return blocks;
#else
    const int memory = __CUDA_ARCH__ >= 1200 ? 100 : __CUDA_ARCH__ >= 900 ? 228 : 164;
    const int fit = memory * 1024 / (Tile::STAGES * Tile::STAGE_BYTES + 1024);
    return blocks < fit ? blocks : fit;
#endif
}

// ---- the main loop ------------------------------------------------------------------------------

// A row in shared memory is 8 chunks of 16 bytes, and fills all 32 banks. Chunk c of row r lies at place c ^ (r & 7):
//
//     place     0 1 2 3 4 5 6 7
//     row 0     0 1 2 3 4 5 6 7      ldmatrix reads the same chunk of eight rows at once. Chunk 2, for instance, lies at
//     row 1     1 0 3 2 5 4 7 6      places 2 3 0 1 6 7 4 5 of rows 0 to 7: each bank is met once. Without the xor, all
//     row 2     2 3 0 1 6 7 4 5      eight would lie in the same four banks.
//     row 3     3 2 1 0 7 6 5 4
//     row 4     4 5 6 7 0 1 2 3      A copy writes whole rows: eight neighbouring lanes fill the eight places, in the
//     row 5     5 4 7 6 1 0 3 2      row's own order. From one k of 16 summands to the next, c grows by 2 and the place
//     row 6     6 7 4 5 2 3 0 1      changes by an xor of 32 bytes: rows and columns of a fragment keep one base address.
//     row 7     7 6 5 4 3 2 1 0

// Where a lane reads its rows of the 16 x 16 fragments i of an operand, from row `first` on, at summand 16 k of a step. It
// reads them as operand A, or as B, whose fragments are pairs (ptx.cuh).
template <bool B>
struct KMajor {
    static constexpr bool TRANS = false;
    int base, chunk;
    __device__ __forceinline__ explicit KMajor(int first) {
        const int lane = threadIdx.x % 32, row = first + (B ? lane / 16 * 8 + lane % 8 : lane % 16);
        base = row * ROW_BYTES, chunk = ((B ? lane / 8 % 2 : lane / 16) ^ (row & 7)) * 16;
    }
    __device__ __forceinline__ smem_addr at(smem_addr operand, int i, int k) const {
        return operand + (base + i * 16 * ROW_BYTES + (chunk ^ k * 32));
    }
};
template <bool B>
struct KRows {
    static constexpr bool TRANS = true;
    int base, chunk;
    __device__ __forceinline__ explicit KRows(int first) {
        const int lane = threadIdx.x % 32, row = B ? lane % 16 : lane / 16 * 8 + lane % 8;
        base = first / 64 * BK * 128 + row * 128;
        chunk = ((first / 8 % 8 + (B ? lane / 16 : lane / 8 % 2)) ^ (row & 7)) * 16;
    }
    __device__ __forceinline__ smem_addr at(smem_addr operand, int i, int k) const {
        return operand + (base + k * 16 * 128 + (chunk ^ i * 32));
    }
};

// acc += A B over `steps` steps. `load(stage)` issues the copies of the next step into a stage, A first, B behind it;
// `load_first(stage)` does so for the first STAGES - 1 of them.
template <class T, class Tile, bool F16_SUMS, class A, class B, class LoadFirst, class Load>
__device__ __forceinline__ void multiply(typename Tile::Accumulators& acc, smem_addr shared, int steps, LoadFirst&& load_first,
                                         Load&& load) {
    static_assert(!F16_SUMS || is_half<T>, "sums in f16 are of f16 products");
    constexpr int M = Tile::WM / 16, N = Tile::WN / 16, END = Tile::STAGES * Tile::STAGE_BYTES;
    const A a(Tile::warp_m());
    const B b(Tile::warp_n());

    for (int s = 0; s < Tile::STAGES - 1; s++) {
        if (s < steps) load_first(shared + s * Tile::STAGE_BYTES);
        cp_async_commit();
    }
    int reading = 0, writing = END - Tile::STAGE_BYTES;
    uint32_t whole[M][2 * N][2] = {};  // the last step's sums, where they are f16
    auto promote = [&] {
#pragma unroll
        for (int i = 0; i < M; i++)
#pragma unroll
            for (int j = 0; j < 2 * N; j++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float2 sum = unpack2<__half>(whole[i][j][half]);
                    acc[i][j][2 * half] += sum.x, acc[i][j][2 * half + 1] += sum.y;
                }
    };
    for (int step = 0; step < steps; step++) {
        cp_async_wait<Tile::STAGES - 2>();
        __syncthreads();  // this stage is there for all, and all have left the one loaded next
        uint32_t part[M][2 * N][2];
#pragma unroll
        for (int k = 0; k < BK / 16; k++) {
            smem_addr a_rows[M], b_rows[N];
#pragma unroll
            for (int i = 0; i < M; i++) a_rows[i] = a.at(shared + reading, i, k);
#pragma unroll
            for (int j = 0; j < N; j++) b_rows[j] = b.at(shared + reading + Tile::A_BYTES, j, k);
            uint32_t fa[M][4], pairs[N][4], fb[2 * N][2];
            ldmatrix_n<A::TRANS>(fa, a_rows);
            ldmatrix_n<B::TRANS>(pairs, b_rows);
#pragma unroll
            for (int j = 0; j < 2 * N; j++) fb[j][0] = pairs[j / 2][j % 2 * 2], fb[j][1] = pairs[j / 2][j % 2 * 2 + 1];
            // All warps have just met, so that none hides what another does before its first product. So the next copies, and
            // the promotion of the last sums, come behind products, each behind its own.
            if constexpr (!F16_SUMS)
                mma_tile<T>(acc, fa, fb);
            else if (k == 0)
                mma_tile_f16(part, fa, fb);
            else
                mma_tile_f16(k + 1 < BK / 16 ? part : whole, fa, fb, part);
            if (k == 0) {
                if (step + Tile::STAGES - 1 < steps) load(shared + writing);
                cp_async_commit();
            }
            if (F16_SUMS && k == 1) promote();
        }
        reading = reading + Tile::STAGE_BYTES == END ? 0 : reading + Tile::STAGE_BYTES;
        writing = writing + Tile::STAGE_BYTES == END ? 0 : writing + Tile::STAGE_BYTES;
    }
    if constexpr (F16_SUMS) promote();
    cp_async_wait<0>();
}

// ---- gathering neighbours -----------------------------------------------------------------------

// Which neighbours a pixel of the result reads: tap (ty, tx) of side x side is the pixel at
// (stride y + ty - up, stride x + tx - left) of the same image.
struct Window {
    static constexpr bool KEEPS_SIZE = false;
    int height, width;   // of the input
    int rows, columns;   // of the result
    int side, stride, up, left;
    __device__ __forceinline__ int taps() const { return side * side; }
};
constexpr int MAX_SIDE = 3;  // of the windows here

// The window of a convolution that keeps the size. So what neighbouring pixels read lies as they do.
struct SameWindow {
    static constexpr bool KEEPS_SIZE = true;
    static constexpr int stride = 1;
    int height, width, rows, columns, side, up, left;
    __device__ __forceinline__ SameWindow(int height, int width, int taps)
        : height(height), width(width), rows(height), columns(width), side(taps == 9 ? 3 : 1), up(side / 2), left(side / 2) {}
    __device__ __forceinline__ int taps() const { return side * side; }
};

// The pixels that a row of tiles works on: tiles do not cross groups (all pixels; or one image).
struct PixelTiles {
    int height, width;           // of an image
    int group, tiles_per_group;  // pixels, and blocks along m
};
template <int BM>
struct TilePixels {
    int first, count;  // valid pixels first .. first + count of a tile, count <= BM
    TilePixels() = default;
    __device__ __forceinline__ TilePixels(const PixelTiles& t, int m) {
        const int in_group = m % t.tiles_per_group * BM;
        first = m / t.tiles_per_group * t.group + in_group, count = min(BM, t.group - in_group);
    }
};

// Which images the tile's pixels are of. The loop for every card makes it after the product, which needs the registers.
struct TileImages {
    int first_image, before;  // the first pixel's image, and the pixels of it before the tile
    uint32_t of_half_pixel;   // 2^31 / pixels of an image, rounded up
    int second;               // the first row of the second image, if images are large
    TileImages() = default;
    __device__ __forceinline__ TileImages(const PixelTiles& t, int first) {
        const int pixels = t.height * t.width;
        first_image = first / pixels, before = first - first_image * pixels;
        const bool large = pixels >= 1 << 14;
        of_half_pixel = large ? 0 : ((1u << 31) - 1) / pixels + 1, second = large ? pixels - before : INT_MAX;
    }
    // The image of a row: floor((before + row + 1/2) / pixels), without a division or a branch, since these would take as
    // long as mp_silu. It is exact: n + 1/2 keeps a distance of 1/2 pixels from whole images, and the error of the
    // quotient, (2 n + 1) / 2^32 at most, is less as long as n pixels < 2^30. Tiles have at most 256 rows; so of large
    // images they meet two at most.
    __device__ __forceinline__ int image(int row) const {
        return first_image + int(__umulhi(2 * (before + row) + 1, of_half_pixel)) + (row >= second);
    }
};

// A product of neighbours by weights, both K-major. Where there is a second input, the window keeps the size.
template <class T, class Neighbours>
struct ConvProduct {
    const T *x, *skip;  // [pixels][ca], [pixels][cb]; skip is not read if cb = 0
    const T* weight;    // [columns][taps][ca + cb]
    int ca, cb, columns;
    Neighbours window;
    int first, count;   // the tile's pixels
    // k runs over all of x, then over all of skip, each padded to whole steps where k is flat.
    __device__ __forceinline__ int steps(int channels) const { return (window.taps() * channels + BK - 1) / BK; }
};

// Copies the steps of a ConvProduct one after the other. A thread has a fixed chunk of 8 channels of a step, and
// every STRIDE-th row.
template <class T, class Tile, bool FLAT, class Neighbours>
struct ConvLoad {
    using Product = ConvProduct<T, Neighbours>;
    static constexpr int STRIDE = Tile::THREADS / CHUNKS, ROWS = Tile::BM / STRIDE;
    static constexpr int COLUMNS = (Tile::BN + STRIDE - 1) / STRIDE;
    static_assert(Tile::BM % STRIDE == 0 && STRIDE % 8 == 0, "every thread copies as many rows, all in one place of the swizzle");
    static_assert(Tile::BN % STRIDE == 0 || Tile::BN < STRIDE, "and as many columns");

    const T *src, *weight;
    int offset[Neighbours::KEEPS_SIZE ? 1 : ROWS];  // of what tap 0 reads, in values; of the first row if the others follow
    uint32_t inside[ROWS];   // bit t: the neighbour at tap t is in the image
    int row_of[COLUMNS];     // the weight's rows, in values; rows beyond the last repeat it and are never stored
    int to;                  // place in a stage
    uint32_t tap;            // 1 << tap of the next step; of this thread's chunk where k is flat
    int channel;             // where k is flat: the chunk's first
    int delta, k;            // how far the step lies from tap 0, and from the beginning of the weight's rows
    int channels;            // of the input at hand
    int left;                // 64s of channels, or where k is flat steps, up to the second input; 0 or less: there is none

    __device__ __forceinline__ ConvLoad(const Product& p, int first_step) {
        const int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
        const Neighbours w = p.window;
        const int steps_x = p.steps(p.ca);
        begin(p, first_step >= steps_x, first_step >= steps_x ? first_step - steps_x : first_step);
        if (FLAT) left = first_step >= steps_x || p.cb == 0 ? 0 : steps_x - first_step;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const bool valid = row + i * STRIDE < p.count;
            const int pixel = p.first + (valid ? row + i * STRIDE : 0);
            const int y = pixel / w.columns % w.rows * w.stride - w.up, x = pixel % w.columns * w.stride - w.left;
            uint32_t across = 0;  // the neighbours in the image of one row of taps
            inside[i] = 0;
#pragma unroll
            for (int t = 0; t < MAX_SIDE; t++) across |= uint32_t(t < w.side && unsigned(x + t) < unsigned(w.width)) << t;
#pragma unroll
            for (int t = 0; t < MAX_SIDE; t++)
                if (valid && t < w.side && unsigned(y + t) < unsigned(w.height)) inside[i] |= across << t * w.side;
            const int base = (pixel / (w.rows * w.columns) * w.height + y) * w.width + x;
            if constexpr (!Neighbours::KEEPS_SIZE) offset[i] = base * channels + (FLAT ? 0 : chunk * 8);
        }
        if constexpr (Neighbours::KEEPS_SIZE) offset[0] = first_row(p);
        const int row_values = w.taps() * (p.ca + p.cb);
#pragma unroll
        for (int j = 0; j < COLUMNS; j++)
            row_of[j] = min(int(blockIdx.y) * Tile::BN + row + j * STRIDE, p.columns - 1) * row_values + (FLAT ? 0 : chunk * 8);
        keep(row_of);
        to = row * ROW_BYTES + (chunk ^ (row & 7)) * 16;
        weight = p.weight;
    }
    // Goes to a step of one of the inputs.
    __device__ __forceinline__ void begin(const Product& p, bool second, int step) {
        src = second ? p.skip : p.x, channels = second ? p.cb : p.ca;
        const int at = step * BK + (FLAT ? threadIdx.x % CHUNKS * 8 : 0), side = p.window.side;
        const int t = FLAT ? at / channels : step % p.window.taps();
        tap = 1u << t, channel = FLAT ? at % channels : step / p.window.taps() * BK;
        delta = (t / side * p.window.width + t % side) * channels + channel;
        k = t * (p.ca + p.cb) + (second ? p.ca : 0) + channel;
        left = second || p.cb == 0 ? 0 : (channels - channel) / BK;
    }
    // Where the first row of this thread lies in the input at hand.
    __device__ __forceinline__ int first_row(const Product& p) const {
        const int pixel = p.first + threadIdx.x / CHUNKS - p.window.up * p.window.width - p.window.left;
        return pixel * channels + (FLAT ? 0 : threadIdx.x % CHUNKS * 8);
    }
    __device__ __forceinline__ void second_input(const Product& p) {
        if constexpr (FLAT)
            begin(p, true, 0);
        else
            src = p.skip, channels = p.cb, delta = 0;  // k has come to its first channel by itself
        offset[0] = first_row(p);
    }
    // Whether the tap is one of the window's. Where k is flat, the last step's rest is beyond them.
    __device__ __forceinline__ bool there(const Product& p) const { return tap >> p.window.taps() == 0; }
    __device__ __forceinline__ void copy_pixels(smem_addr stage) const {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const T* const row = src + (offset[Neighbours::KEEPS_SIZE ? 0 : i] + delta);
            cp_async<16, true>(stage + to + i * STRIDE * ROW_BYTES, row + (Neighbours::KEEPS_SIZE ? i * STRIDE * channels : 0),
                               inside[i] & tap);
        }
    }
    __device__ __forceinline__ void copy_weights(const Product& p, smem_addr stage) const {
        if (Tile::BN < STRIDE && threadIdx.x / CHUNKS >= Tile::BN) return;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++)
            cp_async(stage + to + Tile::A_BYTES + j * STRIDE * ROW_BYTES, weight + (row_of[j] + k), !FLAT || there(p));
    }
    __device__ __forceinline__ void advance(const Product& p) {
        if constexpr (FLAT) {
            channel += BK, delta += BK, k += BK;
            if (Neighbours::KEEPS_SIZE && --left == 0) return second_input(p);
            for (; channel >= channels; channel -= channels) next_tap(p), delta -= channels, k -= channels;
        } else {
            next_tap(p);
            if (there(p)) return;
            tap = 1, delta += BK - p.window.side * p.window.width * channels, k += BK - p.window.taps() * (p.ca + p.cb);
            if (Neighbours::KEEPS_SIZE && --left == 0) second_input(p);
        }
    }
    // Goes to the same channels of the next tap.
    __device__ __forceinline__ void next_tap(const Product& p) {
        const int side = p.window.side;
        const uint32_t ends_row = side == 3 ? 0b100100100 : side == 2 ? 0b1010 : 1;
        delta += tap & ends_row ? (p.window.width - side + 1) * channels : channels;
        tap <<= 1, k += p.ca + p.cb;
    }
};

// acc += the product's steps first .. last. `begin` is called when the first weights are under way and no pixels are: a kernel
// waits there for the launch before it, which does not write weights.
template <class T, class Tile, bool F16_SUMS, bool FLAT, class Neighbours, class Begin>
__device__ __forceinline__ void multiply(typename Tile::Accumulators& acc, unsigned char* smem, const ConvProduct<T, Neighbours>& p,
                                         int first, int last, Begin&& begin) {
    const smem_addr shared = smem_address(smem);
    ConvLoad<T, Tile, FLAT, Neighbours> at(p, first), ahead = at;
#pragma unroll
    for (int s = 0; s < Tile::STAGES - 1; s++)
        if (s < last - first) ahead.copy_weights(p, shared + s * Tile::STAGE_BYTES), ahead.advance(p);
    begin();
    multiply<T, Tile, F16_SUMS, KMajor<false>, KMajor<true>>(
        acc, shared, last - first, [&](smem_addr stage) { at.copy_pixels(stage), at.advance(p); },
        [&](smem_addr stage) { at.copy_pixels(stage), at.copy_weights(p, stage), at.advance(p); });
}

// Multiplies sums in an array of any rank.
__device__ __forceinline__ void scale_sums(float& sum, float factor) { sum *= factor; }
template <class Sums, int N>
__device__ __forceinline__ void scale_sums(Sums (&sums)[N], float factor) {
#pragma unroll
    for (int i = 0; i < N; i++) scale_sums(sums[i], factor);
}

// ---- the epilogue -------------------------------------------------------------------------------

// What a warp holds of 16 rows by the 8 columns j, two values in each lane, and how it lies in `out`, in rows of COLUMNS +
// 8 floats:
//
//     column   8j + 0 1    2 3    4 5    6 7        With 64 columns, rows are 72 floats apart, so that row r begins in bank
//     row 0     lane  0      1      2      3        8 r % 32. Half a warp writes at once, four rows of eight floats: banks
//     row 1           4      5      6      7        0-7, 8-15, 16-23 and 24-31.
//     ...
//     row 7          28     29     30     31        Then lane l reads the eight floats of chunk c = l % 8 in row l / 8, in
//     row 8 to 15    the same again                 two loads of four. Eight lanes read at once, and chunks c and c + 4 begin
//                                                   in one bank; so those from 4 on have their two halves exchanged:
//
//     chunk       0      1      2      3      4      5      6      7
//     lower half  0-3    8-11   16-19  24-27  4-7    12-15  20-23  28-31      (banks, in row 0)
//     upper half  4-7    12-15  20-23  28-31  0-3    8-11   16-19  24-27
//
// Narrower parts have them exchanged in every other row. So the values come in their order, without moves.
template <int COLUMNS>
__device__ __forceinline__ int out_at(int row, int column) {
    return row * OUT_ROW<COLUMNS> + (column ^ (COLUMNS >= 64 ? column / 32 % 2 : row % 2) * 4);
}

// Which of a warp's 16 rows of COLUMNS belong to this lane: 8 columns in each of PASSES rows, always the same columns.
template <int COLUMNS>
struct OutRows {
    static constexpr int CHUNKS = COLUMNS / 8, ROWS = 32 / CHUNKS, PASSES = 16 / ROWS;  // ROWS are even, see out_at
    static __device__ __forceinline__ int row(int pass) { return threadIdx.x % 32 / CHUNKS + pass * ROWS; }
    static __device__ __forceinline__ int column() { return threadIdx.x % CHUNKS * 8; }
};

// Writes a warp's 16 rows of COLUMNS to `out`, 16 rows of OUT_ROW floats that are the warp's own. The warp holds them as
// fragments of accumulators, four for each 8 columns.
template <int COLUMNS>
__device__ __forceinline__ void stage_rows(const float (&acc)[COLUMNS / 8][4], float* out) {
    // Two addresses serve all of them, since 8 columns more are 8 floats more.
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    float* const even = out + out_at<COLUMNS>(row, column);
    float* const odd = out + out_at<COLUMNS>(row, column + 32) - 32;  // from 64 columns on
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            store8_shared((COLUMNS >= 64 && j / 4 % 2 ? odd : even) + half * 8 * OUT_ROW<COLUMNS> + j * 8,
                          make_float2(acc[j][half * 2], acc[j][half * 2 + 1]));
}

__device__ __forceinline__ void floats8(const uint4& a, const uint4& b, float (&v)[8]) {
    v[0] = __uint_as_float(a.x), v[1] = __uint_as_float(a.y), v[2] = __uint_as_float(a.z), v[3] = __uint_as_float(a.w);
    v[4] = __uint_as_float(b.x), v[5] = __uint_as_float(b.y), v[6] = __uint_as_float(b.z), v[7] = __uint_as_float(b.w);
}

// What an epilogue fetches if it needs nothing.
struct Nothing {};

// Calls f(row, column) for the first of each 64 columns in each row, which are 128 bytes of 16-bit values, of a tile that
// THREADS threads share. It serves to prefetch, before the product, what is fetched after it.
template <int ROWS, int COLUMNS, int THREADS, class F>
__device__ __forceinline__ void for_lines(F&& f) {
    constexpr int LINES = (COLUMNS + 63) / 64;
    for (int i = threadIdx.x % THREADS; i < ROWS * LINES; i += THREADS) f(i / LINES, i % LINES * 64);
}

// Gives the rows that `stage` puts in `out`, from row `first` of the tile on, to `columns`, which stands for 8 columns:
//     fetch(row)    what it needs of a row
//     finish(rows)  calls rows(take) with the take(row, v, fetched) that finishes 8 values of a row. There may be several, and
//                   each has a loop of its own, so that no row has to ask.
// What several rows need is asked for before the first of them is taken: the memory is a thousand cycles away, and the
// stores of one row would hold up the loads of the next. At most BYTES bytes are fetched at once, since they take registers.
// ROWS at a time are finished where there are registers for it: the instructions of one fill the waits of the other.
template <int COLUMNS, int BYTES, int ROWS, class Stage, class Columns>
__device__ __forceinline__ void emit_rows(float* out, int first, Stage&& stage, Columns&& columns) {
    using Rows = OutRows<COLUMNS>;
    using Fetched = decltype(columns.fetch(0));
    constexpr int AT_ONCE = Rows::PASSES * sizeof(Fetched) <= BYTES ? Rows::PASSES : Rows::PASSES / 2;
    Fetched fetched[AT_ONCE];
    auto fetch_from = [&](int pass) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) fetched[i] = columns.fetch(first + Rows::row(pass + i));
    };
    fetch_from(0);
    stage();
    __syncwarp();
    const float* const low = out + out_at<COLUMNS>(Rows::row(0), Rows::column());
    const float* const high = out + out_at<COLUMNS>(Rows::row(0), Rows::column() + 4);
    columns.finish([&](auto&& take) {
#pragma unroll(ROWS)
        for (int pass = 0; pass < Rows::PASSES; pass++) {
            if (pass > 0 && pass % AT_ONCE == 0) fetch_from(pass);
            const int at = pass * Rows::ROWS * OUT_ROW<COLUMNS>;
            float v[8];
            floats8(load16(low + at), load16(high + at), v);
            take(first + Rows::row(pass), v, fetched[0]);
            // Registers cannot be indexed, so what was fetched for the next row moves to the front.
#pragma unroll
            for (int i = 1; i < AT_ONCE; i++) fetched[i - 1] = fetched[i];
        }
    });
    __syncwarp();
}

// The same for a block's tile. There is one copy of the code for all, not one for each 16 rows. Code comes from memory too,
// and with a small product that was most of the time.
template <class Tile, class Columns>
__device__ __forceinline__ void emit(const typename Tile::Accumulators& acc, unsigned char* smem, Columns&& columns) {
    float* const out = reinterpret_cast<float*>(smem) + threadIdx.x / 32 * 16 * OUT_ROW<Tile::WN>;
    __syncthreads();  // all have left the pipeline's last stage
#pragma unroll 1
    for (int part = 0; part < Tile::WM / 16; part++) {
        auto stage = [&] {
#pragma unroll
            for (int i = 0; i < Tile::WM / 16; i++)  // registers have no index
                if (i == part) stage_rows<Tile::WN>(acc[i], out);
        };
        emit_rows<Tile::WN, 64, 1>(out, Tile::warp_m() + part * 16, stage, columns);
    }
}
// The first of the 8 columns of a block's tile that this thread finishes.
template <class Tile>
__device__ __forceinline__ int own_column() { return Tile::warp_n() + OutRows<Tile::WN>::column(); }

__device__ __forceinline__ void load8(const float* from, float (&v)[8]) { floats8(load16(from), load16(from + 4), v); }
__device__ __forceinline__ void store8(float* to, const float (&v)[8]) {
    store16(to, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])));
    store16(to + 4, make_uint4(__float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]), __float_as_uint(v[7])));
}

// Whether this is the last of `count` blocks that each store a part of the same sums. If so, it sees what all of them have
// stored. `arrived` is 0 before the first block and after the last. `flag` is shared memory that nobody else uses.
__device__ __forceinline__ bool comes_last(unsigned* arrived, int count, void* flag) {
    volatile int* const last = static_cast<int*>(flag);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *last = atomicAdd(arrived, 1u) == unsigned(count - 1);
        if (*last) atomicAdd(arrived, 0u - count);
    }
    __syncthreads();
    if (!*last) return false;
    __threadfence();
    return true;
}

// As emit_rows, for sums in parts: the sum over `splits` parts of partial[split stride + columns.index(row)], in their
// order. The parts of all rows are fetched at a time.
template <int COLUMNS, class Columns>
__device__ __forceinline__ void sum_rows(const float* partial, size_t stride, int splits, int first, Columns&& columns) {
    using Rows = OutRows<COLUMNS>;
    decltype(columns.fetch(0)) fetched[Rows::PASSES];
    int at[Rows::PASSES];
    float v[Rows::PASSES][8] = {};
#pragma unroll
    for (int pass = 0; pass < Rows::PASSES; pass++) {
        const int row = first + Rows::row(pass);
        fetched[pass] = columns.fetch(row);
        at[pass] = columns.inside(row) ? columns.index(row) : -1;
    }
#pragma unroll 2
    for (int s = 0; s < splits; s++) {
        float u[Rows::PASSES][8] = {};
#pragma unroll
        for (int pass = 0; pass < Rows::PASSES; pass++)
            if (at[pass] >= 0) load8(partial + s * stride + at[pass], u[pass]);
#pragma unroll
        for (int pass = 0; pass < Rows::PASSES; pass++)
#pragma unroll
            for (int e = 0; e < 8; e++) v[pass][e] += u[pass][e];
    }
    columns.finish([&](auto&& take) {
#pragma unroll 1
        for (int pass = 0; pass < Rows::PASSES; pass++) {
            take(first + Rows::row(pass), v[0], fetched[0]);
#pragma unroll
            for (int i = 1; i < Rows::PASSES; i++) {
                fetched[i - 1] = fetched[i];
#pragma unroll
                for (int e = 0; e < 8; e++) v[i - 1][e] = v[i][e];
            }
        }
    });
}

// The same for a block's tile.
template <class Tile, class Columns>
__device__ __forceinline__ void sum(const float* partial, size_t stride, int splits, Columns&& columns) {
#pragma unroll 1
    for (int part = 0; part < Tile::WM / 16; part++)
        sum_rows<Tile::WN>(partial, stride, splits, Tile::warp_m() + part * 16, columns);
}
