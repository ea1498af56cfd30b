// The convolutions of conv_fprop.cu, conv_dgrad.cu, conv_wgrad.cu and codec.cu on Hopper's tensor cores (sm_90a), which
// mma.sync reaches at two thirds of their rate: operands come by bulk tensor copies and are multiplied by wgmma from shared
// memory. Parameters, results and epilogues are the same, and so are the words fprop, dgrad, wgrad.
//
// PIXELS BY CHANNELS (fprop, dgrad, codec): D[pixel][channel], k = (tap, channel of the input), and in fprop then the channels
// of the main path.
//     A  64 to 256 pixels by 64 channels of one tap: one im2col copy walks over row and image ends by itself and fills
//        zeros; for 1x1 a box of the matrix [pixels][channels]. Both inputs of a concatenation have a map of their own.
//     B  rows of 64 values of the weight [channels][taps][input channels]: a box of that matrix.
//     A block lives as long as there are tiles: tile i, i + blocks, ... Two producer threads, of A and of B, run ahead through
//     the steps of all of them. Two groups of 128 threads multiply:
//       IN TURN   each a tile of its own: while one writes out its result, the other multiplies, so that the tensor cores see
//                 neither prologue nor epilogue. A group that came early would take the barriers of its stages, which know
//                 phases by their parity only, for those of one round before: so it waits for its turn.
//       TOGETHER  each half the rows of a larger tile, which reads less of the L2 cache and of shared memory for a product.
//     SPLITS: the steps of a tile's sum are shared by a cluster of up to 8 blocks, a tile and cluster. Each leaves its sums in
//     its shared memory, and each takes its share of the rows: adds what all have of them, its own first, and goes on.
// WEIGHTS (wgrad): D[output channel][(tap, channel)], k = pixel; both operands lie as rows of k ("MN-major").
//     A  64 pixels by 128 output channels of grad, two boxes; B 64 pixels by 128 columns, two im2col copies, each of one tap.
//     The two groups share a tile, 64 rows each; two blocks a multiprocessor overlap. Pixels are split to fill the card.
//
// A tile that is cut off by the last pixel or channel needs care only in the epilogue, since copies fill zeros there.
// Channels of inputs are multiples of 64, of results multiples of 8. Accumulators are f32, 128 registers a thread at most.
//
// FLOOR  of a step of 64 by tile m x n: 64 m n / 2048 cycles of the tensor cores (a multiprocessor, 2048 multiply-adds a
// cycle); its 128 (m + n) bytes come from the L2 cache at 64 bytes a cycle, and wgmma reads 128 (m + n m / 64) from shared
// memory at 128. 128 x 128: 512 cycles, 512 and 384. 64 x 128: 256, 384 and 192. 128 x 256: 1024, 768 and 640. On an H200 a
// step of 128 x 128 took some 570, of 64 x 128 385, of 64 x 64 330 (docs/performance.md). Where a sum is short, the
// epilogue is the bound. Of 16 bytes of each thread, the 16 functions in mp_silu or its derivative take a warp 128 cycles, and
// all instructions about as many. Where groups take turns, one warp of each quarter has an epilogue at a time, so rows must
// fill each other's waits.
#include "conv_finish.cuh"
#include "hopper.cuh"

constexpr int GROUP = 128;        // threads of a warp group
constexpr int GROUP_WARPS = 4;
constexpr int OUT_COLUMNS = 64;   // of a warp's epilogue
constexpr int OUT_BYTES = GROUP_WARPS * 16 * OUT_ROW<OUT_COLUMNS> * 4;  // of a group

// Stages in shared memory and their barriers: `full` when a step's bytes are there, `empty` when all readers are done with
// it.
template <int STAGES, int STAGE_BYTES>
struct Pipeline {
    static constexpr int BYTES = STAGES * (STAGE_BYTES + 16) + 16;

    smem_addr first;
    int stage = 0;
    uint32_t parity = 0;

    // Called by all threads of the block. So many producers fill a stage, and `readers` arrivals empty it.
    __device__ __forceinline__ Pipeline(smem_addr first, int producers, int readers) : first(first) {
        if (threadIdx.x == 0) {
            for (int s = 0; s < STAGES; s++) mbarrier_init(full(s), producers), mbarrier_init(empty(s), readers);
            for (int g = 0; g < 2; g++) mbarrier_init(turn(g), GROUP_WARPS);
            fence_mbarrier_init();
        }
        __syncthreads();
    }
    __device__ __forceinline__ smem_addr full(int s) const { return first + STAGES * STAGE_BYTES + s * 16; }
    __device__ __forceinline__ smem_addr empty(int s) const { return full(s) + 8; }
    // For two groups that take turns: passed when the other group's products are all under way.
    __device__ __forceinline__ smem_addr turn(int group) const { return full(STAGES) + group * 8; }
    __device__ __forceinline__ smem_addr at() const { return first + stage * STAGE_BYTES; }
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    // Skips steps that another group reads.
    __device__ __forceinline__ void skip(int steps) {
        const int to = stage + steps;
        stage = to % STAGES, parity ^= to / STAGES & 1;
    }
    // Waits for a producer's next stage and expects so many bytes there. Returns the barrier at which its copies are to
    // arrive.
    __device__ __forceinline__ smem_addr begin(int bytes) {
        mbarrier_wait(empty(stage), parity ^ 1);
        mbarrier_expect(full(stage), bytes);
        return full(stage);
    }
};

__device__ __forceinline__ smem_addr rounded_to_1024(const unsigned char* smem) {
    return (smem_address(smem) + 1023) & ~smem_addr(1023);
}

// acc[i] += the group's tiles of 64 x N over `steps` steps; A tile i begins `a + i * a_tile` bytes into a stage, B at `b`.
// MN_MAJOR: tiles of 64 columns of B follow each other at BK rows of 128 bytes. `issued` is called when all products are
// under way.
template <class T, int N, bool MN_MAJOR, int TILES, class Pipe, class Issued>
__device__ __forceinline__ void consume(float (&acc)[TILES][N / 2], Pipe& pipe, int a, int a_tile, int b, int steps,
                                        Issued&& issued) {
    constexpr int NEXT_K = MN_MAJOR ? 16 * ROW_BYTES : 32;
    constexpr uint32_t LEADING = MN_MAJOR ? BK * ROW_BYTES : 16, STRIDE = 8 * ROW_BYTES;
    const int lane = threadIdx.x % 32;
    smem_addr previous = 0;
    for (int step = 0; step < steps; step++) {
        mbarrier_wait(pipe.full(pipe.stage), pipe.parity);
        const uint64_t of_a = wgmma_descriptor(pipe.at() + a, LEADING, STRIDE);
        const uint64_t of_b = wgmma_descriptor(pipe.at() + b, LEADING, STRIDE);
        wgmma_hold(acc);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < BK / 16; k++)
#pragma unroll
            for (int i = 0; i < TILES; i++)
                wgmma<T, N, MN_MAJOR>(acc[i], of_a + (i * a_tile + k * NEXT_K) / 16, of_b + k * NEXT_K / 16);
        wgmma_commit();
        wgmma_hold(acc);
        // The products of the step before are over, while those of this one run on.
        wgmma_wait<1>();
        if (step > 0 && lane == 0) mbarrier_arrive(previous);
        previous = pipe.empty(pipe.stage);
        pipe.advance();
    }
    issued();
    wgmma_wait<0>();
    wgmma_hold(acc);
    if (lane == 0) mbarrier_arrive(previous);
}

// Puts a warp's 16 rows by OUT_COLUMNS of piece `at`, see emit_group, into `out`.
template <int TILES, int N>
__device__ __forceinline__ void stage_part(const float (&acc)[TILES][N / 2], int at, float* out) {
#pragma unroll
    for (int i = 0; i < TILES * N / OUT_COLUMNS; i++) {  // registers have no index
        if (i != at) continue;
        float part[OUT_COLUMNS / 8][4];
#pragma unroll
        for (int j = 0; j < OUT_COLUMNS / 2; j++)
            part[j / 4][j % 4] = acc[i / (N / OUT_COLUMNS)][i % (N / OUT_COLUMNS) * (OUT_COLUMNS / 2) + j];
        stage_rows<OUT_COLUMNS>(part, out);
    }
}

// Gives a group's TILES tiles of 64 x N, whose rows begin at `first`, to `epilogue`, in pieces of a warp's 16 rows by
// OUT_COLUMNS. `columns(column)` are its 8 columns from there on, see emit_rows, and `end(columns, sums)` is called when
// all rows of OUT_COLUMNS have been finished. `out` is the group's own, `sums` the warp's. There is one copy of the code for
// all pieces, see emit. BYTES and ROWS are those of emit_rows.
template <int TILES, int N, int BYTES, int ROWS, class Epilogue>
__device__ __forceinline__ void emit_group(const float (&acc)[TILES][N / 2], int first, float* out, float* sums,
                                           Epilogue&& epilogue) {
    constexpr int PARTS = N / OUT_COLUMNS;
    const int warp = threadIdx.x / 32 % GROUP_WARPS;
    float* const rows = out + warp * 16 * OUT_ROW<OUT_COLUMNS>;
#pragma unroll 1
    for (int part = 0; part < PARTS; part++) {
        auto columns = epilogue.columns(part * OUT_COLUMNS + OutRows<OUT_COLUMNS>::column());
#pragma unroll 1
        for (int i = 0; i < TILES; i++)
            emit_rows<OUT_COLUMNS, BYTES, ROWS>(rows, first + i * 64 + warp * 16,
                                        [&] { stage_part<TILES, N>(acc, i * PARTS + part, rows); }, columns);
        epilogue.end(columns, sums);
    }
}

constexpr int MAX_CLUSTER = 8;  // blocks

// Adds up the parts that the blocks of a cluster have of a tile of M x N, this block's own in `out`, and gives its share of
// the rows to `epilogue`. All 8 warps of both groups call it.
//
// Shared memory of other blocks is slow, so all parts of a row are under way at once. A block begins with its own part and
// goes on with those of the blocks after it: did all begin with the first, they would wait for that one's multiprocessor.
// Eight lanes read 128 bytes in one piece, columns 0 to 31 of a row's 64 and then 32 to 63. So a lane has four columns of
// chunk lane / 2, and four of chunk 4 + lane / 2; and since from column 32 on halves of chunks are exchanged (out_at), one
// exchange between neighbours gives even lanes the first chunk and odd ones the second.
template <int M, int N, class Epilogue>
__device__ __forceinline__ void emit_cluster(const float* out, float* sums, Epilogue&& epilogue) {
    constexpr int PARTS = N / OUT_COLUMNS;  // a warp takes four rows of one of them at a time
    const int blocks = cluster_size(), rank = cluster_rank(), lane = threadIdx.x % 32, odd = lane % 2;
    // In turn a warp of each block, so that blocks have equal shares where there are fewer pieces than warps.
    const int workers = blocks * 2 * GROUP_WARPS, worker = (threadIdx.x / 32 - GROUP_WARPS) * blocks + rank;
    const int first = worker % PARTS * OUT_COLUMNS;  // the same each time
    static_assert(2 * GROUP_WARPS % PARTS == 0, "workers are a multiple of it");
    auto row_of = [&](int at) { return at / PARTS * 4 + lane / 8; };
    // What does not need the others comes before they are waited for, and loads after the arrival, which waits for loads.
    epilogue.clear(sums);
    auto columns = epilogue.columns(first + (odd * 4 + lane % 8 / 2) * 8);
    int from[MAX_CLUSTER];
#pragma unroll
    for (int i = 0; i < MAX_CLUSTER; i++) from[i] = rank + i < blocks ? rank + i : rank + i - blocks;
    keep(from);
    __syncwarp();  // a warp arrives as one
    cluster_arrive();
    auto fetched = columns.fetch(row_of(worker));
    __syncwarp();
    cluster_wait();
    // Lane 0 has the first of a warp's columns.
    if (__shfl_sync(0xffffffffu, columns.count, 0) > 0) columns.finish_together([&](auto&& take) {
#pragma unroll 1
        for (int at = worker; at < M / 4 * PARTS; at += workers) {
            const int row = row_of(at);
            const float* const values = out + (row * OUT_ROW<N> + first + lane % 8 * 4);
            uint4 parts[MAX_CLUSTER][2];
#pragma unroll
            for (int i = 0; i < MAX_CLUSTER; i++)
                if (i == 0 || i < blocks) parts[i][0] = load16_of<0>(values, from[i]), parts[i][1] = load16_of<128>(values, from[i]);
            float sum[8];
            floats8(parts[0][0], parts[0][1], sum);
#pragma unroll
            for (int i = 1; i < MAX_CLUSTER; i++)
                if (i < blocks) {
                    float u[8];
                    floats8(parts[i][0], parts[i][1], u);
#pragma unroll
                    for (int e = 0; e < 8; e++) sum[e] += u[e];
                }
            float v[8];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                v[e] = odd ? sum[4 + e] : sum[e];
                v[4 + e] = __shfl_xor_sync(0xffffffffu, odd ? sum[e] : sum[4 + e], 1);
            }
            take(row, v, fetched);
            fetched = columns.fetch(row_of(at + workers));
        }
    });
    epilogue.end(columns, sums);
    __syncwarp();
    cluster_arrive_relaxed();
    cluster_wait();  // the others have read this block's
}

// ---- pixels by channels ---------------------------------------------------------------------------

// What the copies read.
struct HopperPixels {
    TensorMap x, skip;      // im2col, or for one tap boxes of [pixels][channels], tiles of m pixels; skip: not read if cb = 0
    TensorMap weight;       // boxes of 64 by n of [columns][taps (ca + cb)]
    TensorMap main_x, main_skip, main_weight;  // of the main path's convolution, of one tap; not read if main_ca = 0, main_cb = 0
    int ca, cb, taps;
    int main_ca, main_cb;
    int side;               // taps of a row
    int up, left;           // where tap 0 lies from the pixel
    int pixels_n;           // tiles along n
    int tiles, splits;      // all tiles with their splits, and these of one
    int steps_per_split, steps;  // of the whole sum
    int own_steps;          // before those of the main path
    float to_main;          // what the sums are multiplied by before those
};

// A copy waits for its map.
__device__ __forceinline__ void prefetch_maps(const HopperPixels& p) {
    tma_prefetch(p.weight), tma_prefetch(p.x);
    if (p.cb) tma_prefetch(p.skip);
    if (p.main_ca) tma_prefetch(p.main_weight), tma_prefetch(p.main_x);
    if (p.main_cb) tma_prefetch(p.main_skip);
}

// Where a step of 64 summands lies: first all taps of x, then those of skip, then the channels of main_x and of main_skip.
// It is counted on from step to step and not divided anew, as a producer has no longer than a step's products take: from
// 128 cycles for 64 x 64 to 1024 for 128 x 256.
struct StepWalk {
    const HopperPixels& p;
    int segment, channels;  // which of the four inputs, and its channels
    int c, off_w, off_h;    // channel and tap
    int k;                  // column of the weights

    __device__ __forceinline__ StepWalk(const HopperPixels& p, int step) : p(p), segment(0) {
        int at = step * BK;
        for (; segment < 3 && at >= length(segment); segment++) at -= length(segment);
        channels = channels_of(segment);
        const int tap = channels ? at / channels : 0;
        c = at - tap * channels, off_w = tap % p.side, off_h = tap / p.side;
        k = first_column() + tap * (p.ca + p.cb) + c;
    }
    __device__ __forceinline__ int channels_of(int s) const {
        return s == 0 ? p.ca : s == 1 ? p.cb : s == 2 ? p.main_ca : p.main_cb;
    }
    __device__ __forceinline__ int length(int s) const { return channels_of(s) * (s < 2 ? p.taps : 1); }
    __device__ __forceinline__ int first_column() const { return segment == 1 ? p.ca : segment == 3 ? p.main_ca : 0; }
    __device__ __forceinline__ bool neighbours() const { return segment < 2 && p.taps > 1; }
    __device__ __forceinline__ const TensorMap* input() const {
        return segment == 0 ? &p.x : segment == 1 ? &p.skip : segment == 2 ? &p.main_x : &p.main_skip;
    }
    __device__ __forceinline__ const TensorMap* weights() const { return segment < 2 ? &p.weight : &p.main_weight; }
    __device__ __forceinline__ void next() {
        c += BK, k += BK;
        if (c < channels) return;
        c = 0;
        if (segment < 2) {
            k += p.ca + p.cb - channels;
            if (++off_w < p.side) return;
            off_w = 0;
            if (++off_h < p.side) return;
            off_h = 0;
        }
        do segment++;
        while (segment < 3 && channels_of(segment) == 0);
        channels = channels_of(segment), k = first_column();
    }
};

// Runs through the block's tiles. `Work` says where a row of tiles begins, and takes the results:
//     SPLITS      whether sums may be in parts
//     pixel(m) -> first pixel, in the order of the images;  at(m, n) before a tile;  with_epilogue(f) calls f with what
//     emit_group and emit_cluster take; its over(...) comes after the tile, with what the warps first .. last left in `sums`, a
//     row of N each, for a row of the kernel's sums: by so many threads, which meet at a barrier
template <class T, int M, int N, int STAGES, bool TOGETHER, class Work>
__device__ __forceinline__ void hopper_pixels(const HopperPixels& p, Work&& work) {
    constexpr int GROUP_M = TOGETHER ? M / 2 : M, TILES = GROUP_M / 64, A_BYTES = M * ROW_BYTES;
    using Pipe = Pipeline<STAGES, A_BYTES + N * ROW_BYTES>;
    static_assert(M * OUT_ROW<N> * 4 <= STAGES * (A_BYTES + N * ROW_BYTES), "a tile's sums fit the pipeline's memory");
    extern __shared__ __align__(128) unsigned char smem[];
    if (threadIdx.x == 32) prefetch_maps(p);  // while another thread makes the barriers
    Pipe pipe(rounded_to_1024(smem), 2, TOGETHER ? 2 * GROUP_WARPS : GROUP_WARPS);
    auto first_step = [&](int t) { return t % p.splits * p.steps_per_split; };  // of a tile's part of the sum
    auto steps_of = [&](int t) { return min(p.steps_per_split, p.steps - first_step(t)); };

    // It is the same in all lanes, which the shuffle tells the compiler.
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / GROUP, 0);
    if (group == 0) {
        registers_release<40>();
        const int warp = threadIdx.x / 32;
        if (threadIdx.x % 32 != 0 || warp > 1) return;
        // The first stages of weights are fetched while the launch before this one ends, as no kernel of a plan writes weights.
        int before_wait = warp == 0 ? 0 : STAGES;
        for (int t = blockIdx.x; t < p.tiles; t += gridDim.x) {
            const int tile = t / p.splits, n = tile % p.pixels_n * N, pixel = work.pixel(tile / p.pixels_n);
            const int image = pixel / (work.height * work.width);
            const int row = pixel / work.width % work.height - p.up, column = pixel % work.width - p.left;
            StepWalk walk(p, first_step(t));
            for (int left = steps_of(t); left > 0; left--) {
                if (before_wait-- == 0) begin_kernel();
                const smem_addr full = pipe.begin(warp == 0 ? A_BYTES : N * ROW_BYTES), stage = pipe.at();
                if (warp == 1)
                    tma_load_2d(stage + A_BYTES, *walk.weights(), full, walk.k, n);
                else if (walk.neighbours())
                    tma_load_im2col(stage, *walk.input(), full, walk.c, column, row, image, walk.off_w, walk.off_h);
                else
                    tma_load_2d(stage, *walk.input(), full, walk.c, pixel);
                pipe.advance(), walk.next();
            }
        }
        return;
    }
    registers_take<232>();
    begin_kernel();
    const int warp = threadIdx.x / 32 - GROUP_WARPS;  // of both groups
    unsigned char* const stages = smem + (pipe.first - smem_address(smem));
    float* const out = reinterpret_cast<float*>(stages + Pipe::BYTES + (group - 1) * OUT_BYTES);
    float* const sums = reinterpret_cast<float*>(stages + Pipe::BYTES + 2 * OUT_BYTES);
    const int first = TOGETHER ? (group - 1) * GROUP_M : 0;  // of the group's rows
    int taken = 0;
    for (int t = blockIdx.x; t < p.tiles; t += gridDim.x, taken++) {
        if (!TOGETHER && taken % 2 != group - 1) {
            pipe.skip(steps_of(t));
            continue;
        }
        const int tile = t / p.splits;
        work.at(tile / p.pixels_n, tile % p.pixels_n * N);
        for_lines<GROUP_M, N, GROUP>([&](int row, int column) { work.prefetch(first + row, column); });
        float acc[TILES][N / 2] = {};
        if (!TOGETHER && taken > 0) mbarrier_wait(pipe.turn(group - 1), (taken - 1) / 2 % 2);
        const int own = min(steps_of(t), max(p.own_steps - first_step(t), 0)), main = steps_of(t) - own;
        // One loop serves both, since wgmma holds its registers.
        for (bool of_main = own == 0;; of_main = true) {
            const bool last = of_main || main == 0;
            consume<T, N, false>(acc, pipe, first * ROW_BYTES, 64 * ROW_BYTES, A_BYTES, of_main ? main : own, [&] {
                if (!TOGETHER && last && threadIdx.x % 32 == 0) mbarrier_arrive(pipe.turn(2 - group));
            });
            if (of_main) break;
            scale_sums(acc, p.to_main);
            if (last) break;
        }
        if (std::decay_t<Work>::SPLITS && p.splits > 1) {
            // All who read a stage have left it: a warp waits for its own products only.
            named_barrier(TOGETHER ? 3 : group, TOGETHER ? 2 * GROUP : GROUP);
#pragma unroll
            for (int i = 0; i < TILES; i++)
                stage_rows<N>(reinterpret_cast<const float(&)[N / 8][4]>(acc[i]),
                              reinterpret_cast<float*>(stages) + (first + i * 64 + warp % GROUP_WARPS * 16) * OUT_ROW<N>);
        } else {
            work.with_epilogue([&](auto&& epilogue) {
                emit_group<TILES, N, 128, 2>(acc, first, out, sums + warp * N, epilogue);
                const int from = TOGETHER ? 0 : (group - 1) * GROUP_WARPS, to = TOGETHER ? 2 * GROUP_WARPS : from + GROUP_WARPS;
                epilogue.over(sums, from, to, TOGETHER ? 3 : group, (to - from) * 32, work.m);
            });
        }
    }
    if constexpr (std::decay_t<Work>::SPLITS) {
        if (p.splits == 1) return;
        const int tile = blockIdx.x / p.splits;  // one a block
        work.at(tile / p.pixels_n, tile % p.pixels_n * N);
        work.with_epilogue([&](auto&& epilogue) {
            emit_cluster<M, N>(reinterpret_cast<const float*>(stages), sums + warp * N, epilogue);
            epilogue.over(sums, 0, 2 * GROUP_WARPS, 3, 2 * GROUP, work.m * p.splits + cluster_rank());
        });
    }
}

// For an epilogue without sums.
struct NoSums {
    __device__ __forceinline__ void clear(float*) {}
    template <class Columns>
    __device__ __forceinline__ void end(const Columns&, float*) {}
    __device__ __forceinline__ void over(const float*, int, int, int, int, int) {}
};

// Where the current tile of a network's convolution lies, and its epilogue.
template <class Channels, int M>
struct HopperTile : NoSums {
    static constexpr bool SPLITS = true;
    using Params = typename Channels::Params;
    const Params& p;
    int height, width;
    int m, channel;
    TilePixels<M> tile;
    TileImages images;
    __device__ __forceinline__ explicit HopperTile(const Params& p) : p(p), height(p.tiles.height), width(p.tiles.width) {}
    __device__ __forceinline__ int pixel(int m) const { return TilePixels<M>(p.tiles, m).first; }
    __device__ __forceinline__ void at(int m_, int n) {
        m = m_, channel = n, tile = TilePixels<M>(p.tiles, m), images = TileImages(p.tiles, tile.first);
    }
    __device__ __forceinline__ void prefetch(int row, int column) const {
        column += channel;
        if (row < tile.count && column < Channels::all(p)) Channels(p, column).prefetch(tile.first + row);
    }
    __device__ __forceinline__ TileColumns<Channels, M> columns(int column) const { return {p, tile, images, channel + column}; }
    template <class F>
    __device__ __forceinline__ void with_epilogue(F&& f) { f(*this); }
};

struct HopperFprop {
    HopperPixels pixels;
    ConvFprop conv;
};

template <class T, int M>
using FpropWork = HopperTile<FpropChannels<T>, M>;

struct HopperDgrad {
    HopperPixels pixels;
    ConvDgrad conv;
};

// The epilogue of dgrad's tiles of M x N where the input was scaled by the embedding.
template <class T, int M, int N>
struct ScaledDgradEpilogue {
    const HopperTile<DgradChannels<T>, M>& work;
    using Columns = TileColumns<ScaledDgradChannels<T>, M>;
    __device__ __forceinline__ Columns columns(int column) const { return {work.p, work.tile, work.images, work.channel + column}; }
    __device__ __forceinline__ void clear(float* of_warp) {
        for (int i = threadIdx.x % 32; i < N; i += 32) of_warp[i] = 0.0f;
        __syncwarp();
    }
    // Sums over the lanes with the same channels; below, over the warps in their order.
    __device__ __forceinline__ void end(Columns& columns, float* of_warp) {
        float(&sums)[8] = columns.channels.sums;
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int e = 0; e < 8; e++)
#pragma unroll
            for (int by = 8; by < 32; by *= 2) sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], by);
        if (lane < 8) store8(of_warp + (columns.column - work.channel), sums);
    }
    __device__ __forceinline__ void over(const float* of_warps, int first, int last, int barrier, int threads, int row) {
        const ConvDgrad& p = work.p;
        named_barrier(barrier, threads);
        for (int column = threadIdx.x % threads; column < N && work.channel + column < p.ca; column += threads) {
            float sum = 0;
            for (int w = first; w < last; w++) sum += of_warps[w * N + column];
            p.sums[size_t(row) * p.ca + work.channel + column] = sum;
        }
        named_barrier(barrier, threads);  // before the next tile's
    }
};

template <class T, int M, int N>
struct DgradWork : HopperTile<DgradChannels<T>, M> {
    using HopperTile<DgradChannels<T>, M>::HopperTile;
    template <class F>
    __device__ __forceinline__ void with_epilogue(F&& f) {
        if (this->p.scale)
            f(ScaledDgradEpilogue<T, M, N>{*this});
        else
            f(*this);
    }
};

struct HopperCodec {
    HopperPixels pixels;
    CodecConv conv;
};

template <class T, int M>
struct CodecWork : NoSums {
    static constexpr bool SPLITS = false;
    const CodecConv& p;
    int height, width;
    int m, channel;
    __device__ __forceinline__ explicit CodecWork(const CodecConv& p) : p(p), height(p.rows), width(p.columns) {}
    __device__ __forceinline__ int pixel(int m) const { return m * M; }
    __device__ __forceinline__ void at(int m_, int n) { m = m_, channel = n; }
    __device__ __forceinline__ CodecChannels<T> columns(int column) const { return {p, m * M, p.phase, channel + column}; }
    __device__ __forceinline__ void prefetch(int row, int column) const { columns(column).prefetch(row); }
    template <class F>
    __device__ __forceinline__ void with_epilogue(F&& f) { f(*this); }
};

// ---- weights ------------------------------------------------------------------------------------------

struct HopperWgrad {
    TensorMap grad;     // boxes of 64 channels by 64 of [pixels][cout]
    TensorMap x, skip;  // im2col, or for one tap boxes of [pixels][channels], tiles of 64 pixels
    ConvWgrad conv;
};

struct WgradWork : NoSums {
    const ConvWgrad& p;
    int co, n, split;  // of the tile's first value
    __device__ __forceinline__ explicit WgradWork(const ConvWgrad& p)
        : p(p), co(blockIdx.x * 128), n(blockIdx.y * 128), split(blockIdx.z) {}
    __device__ __forceinline__ WgradColumns columns(int column) const { return {p, co, n + column, split}; }
};

// 128 output channels by 128 columns a block.
template <class T, int STAGES>
__device__ __forceinline__ void hopper_wgrad(const HopperWgrad& h) {
    constexpr int A_BYTES = 128 * ROW_BYTES, BLOCK = BK * ROW_BYTES;  // a block: 64 channels of BK pixels
    const ConvWgrad& p = h.conv;
    extern __shared__ __align__(128) unsigned char smem[];
    Pipeline<STAGES, 2 * A_BYTES> pipe(rounded_to_1024(smem), 1, 2 * GROUP_WARPS);
    begin_kernel();
    const int all = (p.pixels + BK - 1) / BK, first = blockIdx.z * p.steps_per_split;
    const int steps = min(p.steps_per_split, all - first), cin = p.ca + p.cb;

    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // as above
    if (warp == 2 * GROUP_WARPS) {
        if (threadIdx.x % 32 != 0) return;
        // 64 columns are channels of one input at one tap. Columns beyond the last repeat it and are never stored.
        const TensorMap* from[2];
        int c[2], tap_x[2], tap_y[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int n = min(int(blockIdx.y) * 128 + j * 64, p.taps * cin - 64), tap = n / cin;
            const bool second = n % cin >= p.ca;
            c[j] = n % cin - (second ? p.ca : 0), from[j] = second ? &h.skip : &h.x;
            tap_x[j] = tap % 3, tap_y[j] = tap / 3;
        }
        // The first pixel, and how far from it the next step's lies.
        int pixel = first * BK, image = pixel / (p.height * p.width);
        int row = pixel / p.width % p.height, column = pixel % p.width;
        const int next_column = BK % p.width, next_row = BK / p.width % p.height, next_image = BK / p.width / p.height;
        for (int left = steps; left > 0; left--) {
            const smem_addr full = pipe.begin(2 * A_BYTES), stage = pipe.at();
#pragma unroll
            for (int i = 0; i < 2; i++)
                tma_load_2d(stage + i * BLOCK, h.grad, full, blockIdx.x * 128 + i * 64, pixel);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const smem_addr to = stage + A_BYTES + j * BLOCK;
                if (p.taps == 1)
                    tma_load_2d(to, *from[j], full, c[j], pixel);
                else
                    tma_load_im2col(to, *from[j], full, c[j], column - 1, row - 1, image, tap_x[j], tap_y[j]);
            }
            pipe.advance(), pixel += BK;
            column += next_column, row += next_row, image += next_image;
            if (column >= p.width) column -= p.width, row++;
            if (row >= p.height) row -= p.height, image++;
        }
        return;
    }
    const int group = warp / GROUP_WARPS;
    float acc[1][64] = {};
    consume<T, 128, true>(acc, pipe, group * BLOCK, 0, A_BYTES, steps, [] {});
    named_barrier(1, 2 * GROUP);  // the epilogue takes the place of the stages
    float* const out = reinterpret_cast<float*>(smem + (pipe.first - smem_address(smem)) + group * OUT_BYTES);
    emit_group<1, 128, 64, 1>(acc, group * 64, out, nullptr, WgradWork(p));
}

// ---- instances ------------------------------------------------------------------------------------

#define FPROP(name, T, m, n, stages, together)                                                                    \
    extern "C" __global__ void __launch_bounds__(3 * GROUP, 1) name(const __grid_constant__ HopperFprop p) {      \
        hopper_pixels<T, m, n, stages, together>(p.pixels, FpropWork<T, m>(p.conv));                               \
    }                                                                                                             \
    KERNEL_EXPORT_HOPPER(name);
#define DGRAD(name, T, m, n, stages, together)                                                                    \
    extern "C" __global__ void __launch_bounds__(3 * GROUP, 1) name(const __grid_constant__ HopperDgrad p) {      \
        hopper_pixels<T, m, n, stages, together>(p.pixels, DgradWork<T, m, n>(p.conv));                            \
    }                                                                                                             \
    KERNEL_EXPORT_HOPPER(name);
#define CODEC(name, T, m, n, stages, together)                                                                    \
    extern "C" __global__ void __launch_bounds__(3 * GROUP, 1) name(const __grid_constant__ HopperCodec p) {      \
        hopper_pixels<T, m, n, stages, together>(p.pixels, CodecWork<T, m>(p.conv));                               \
    }                                                                                                             \
    KERNEL_EXPORT_HOPPER(name);
#define WGRAD(name, T, stages, blocks)                                                                                    \
    extern "C" __global__ void __launch_bounds__(2 * GROUP + 32, blocks) name(const __grid_constant__ HopperWgrad p) { \
        hopper_wgrad<T, stages>(p);                                                                               \
    }                                                                                                             \
    KERNEL_EXPORT_HOPPER(name);
#define HOPPER(m, n, stages, together, speed)                                  \
    FPROP(hopper_fprop_f16_##m##x##n, __half, m, n, stages, together)          \
    FPROP(hopper_fprop_bf16_##m##x##n, __nv_bfloat16, m, n, stages, together)  \
    DGRAD(hopper_dgrad_f16_##m##x##n, __half, m, n, stages, together)          \
    DGRAD(hopper_dgrad_bf16_##m##x##n, __nv_bfloat16, m, n, stages, together)  \
    CODEC(hopper_codec_f16_##m##x##n, __half, m, n, stages, together)          \
    CODEC(hopper_codec_bf16_##m##x##n, __nv_bfloat16, m, n, stages, together)
#define HOPPER_GRADIENT(m, n, stages, blocks, speed)                 \
    WGRAD(hopper_wgrad_f16_##m##x##n, __half, stages, blocks)        \
    WGRAD(hopper_wgrad_bf16_##m##x##n, __nv_bfloat16, stages, blocks)
#define PIXELS(...)
#define FLAT(...)
#define GRADIENT(...)
#include "tiles.cuh"
