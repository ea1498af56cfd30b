// One convolution four times, each time nearer to how conv.cuh does it. docs/first-kernel.md walks through this file;
// tests/emulator/first_kernel.rs runs each step on the emulator.
//
//     y[pixel][o] = sum over the nine taps and the channels c of x[pixel under the tap][c] * w[o][tap][c]
//
// x and y are NHWC, halves; there are zeros beyond the edge. cin is a multiple of 32, cout of 64.
#include "ptx.cuh"

struct Conv {
    const __half* x;  // [n, height, width, cin]
    const __half* w;  // [cout, 3, 3, cin]
    __half* y;        // [n, height, width, cout]
    int pixels;       // n * height * width
    int height, width, cin, cout;
};

// The channels of x that output pixel `pixel` meets under tap `tap`, or null beyond the edge.
__device__ __forceinline__ const __half* under(const Conv& p, int pixel, int tap) {
    const int down = tap / 3 - 1, right = tap % 3 - 1;
    const int row = pixel / p.width % p.height + down, column = pixel % p.width + right;
    const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width && pixel < p.pixels;
    return inside ? p.x + size_t(pixel + down * p.width + right) * p.cin : nullptr;
}

// ---- 1. naive: a thread for each output value -----------------------------------------------------

extern "C" __global__ void conv_naive(Conv p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const int pixel = i / p.cout, o = i % p.cout;
    if (pixel >= p.pixels) return;
    float sum = 0;
    for (int tap = 0; tap < 9; tap++) {
        const __half* x = under(p, pixel, tap);
        const __half* w = p.w + size_t(o * 9 + tap) * p.cin;
        if (x == nullptr) continue;
        for (int c = 0; c < p.cin; c++) sum += to_float(x[c]) * to_float(w[c]);
    }
    from_float(p.y[i], sum);
}
KERNEL_EXPORT(conv_naive);

// ---- 2. tiled: a block for 64 pixels and 64 outputs, which share what they read ---------------------

constexpr int TILE = 64;   // pixels and outputs of a block
constexpr int DEPTH = 16;  // channels of a step

extern "C" __global__ void conv_tiled(Conv p) {
    // Two columns more: a warp writes 16 channels of two rows at once, and the banks 2 c + row are all different.
    __shared__ __align__(16) float xs[DEPTH][TILE + 2];
    __shared__ __align__(16) float ws[DEPTH][TILE + 2];
    const int first_pixel = blockIdx.x * TILE, first_o = blockIdx.y * TILE;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;  // 256 threads of 4 x 4 sums
    float sum[4][4] = {};
    for (int tap = 0; tap < 9; tap++)
        for (int c0 = 0; c0 < p.cin; c0 += DEPTH) {
            for (int i = threadIdx.x; i < TILE * DEPTH; i += 256) {
                const int row = i / DEPTH, c = i % DEPTH;
                const __half* x = under(p, first_pixel + row, tap);
                xs[c][row] = x == nullptr ? 0.0f : to_float(x[c0 + c]);
                ws[c][row] = to_float(p.w[size_t((first_o + row) * 9 + tap) * p.cin + c0 + c]);
            }
            __syncthreads();  // all have written what all will read
            for (int c = 0; c < DEPTH; c++)
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < 4; j++) sum[i][j] += xs[c][ty + 16 * i] * ws[c][tx + 16 * j];
            __syncthreads();  // all have read what the next step overwrites
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            const int pixel = first_pixel + ty + 16 * i;
            if (pixel < p.pixels) from_float(p.y[size_t(pixel) * p.cout + first_o + tx + 16 * j], sum[i][j]);
        }
}
KERNEL_EXPORT(conv_tiled);

// ---- 3. tensor cores: the same tile, multiplied 16 x 8 x 16 at a time --------------------------------

constexpr int CHUNK = 32;                           // channels of a step: rows of 64 bytes
constexpr int OPERAND = TILE * CHUNK * 2;           // bytes of one operand's tile

// This thread's sums: of the warp's 32 x 32 values, two by four fragments of 16 x 8.
struct Sums {
    float d[2][4][4] = {};

    // Multiplies two tiles in shared memory, rows of pixels and of outputs.
    __device__ __forceinline__ void multiply(smem_addr xs, smem_addr ws) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        for (int k = 0; k < CHUNK / 16; k++) {
            smem_addr x_rows[2], w_rows[2];
            for (int i = 0; i < 2; i++) {
                x_rows[i] = xs + swizzle<2 * CHUNK>(warp / 2 * 32 + 16 * i + lane % 16, 2 * k + lane / 16);
                w_rows[i] = ws + swizzle<2 * CHUNK>(warp % 2 * 32 + 16 * i + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2);
            }
            uint32_t a[2][4], pairs[2][4], b[4][2];
            ldmatrix_n(a, x_rows);
            ldmatrix_n(pairs, w_rows);
            for (int j = 0; j < 4; j++) b[j][0] = pairs[j / 2][j % 2 * 2], b[j][1] = pairs[j / 2][j % 2 * 2 + 1];
            mma_tile<__half>(d, a, b);
        }
    }

    // Writes the sums where the fragments' picture in ptx.cuh says they are.
    __device__ __forceinline__ void write(const Conv& p, int first_pixel, int first_o) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 4; j++)
                for (int half = 0; half < 2; half++) {
                    const int pixel = first_pixel + warp / 2 * 32 + 16 * i + 8 * half + lane / 4;
                    const int o = first_o + warp % 2 * 32 + 8 * j + 2 * (lane % 4);
                    const uint32_t pair = pack2<__half>(d[i][j][2 * half], d[i][j][2 * half + 1]);
                    if (pixel < p.pixels) *reinterpret_cast<uint32_t*>(p.y + size_t(pixel) * p.cout + o) = pair;
                }
    }
};

extern "C" __global__ void conv_tensor(Conv p) {
    __shared__ __align__(16) unsigned char xs[OPERAND];
    __shared__ __align__(16) unsigned char ws[OPERAND];
    const int first_pixel = blockIdx.x * TILE, first_o = blockIdx.y * TILE;
    Sums sums;
    for (int tap = 0; tap < 9; tap++)
        for (int c0 = 0; c0 < p.cin; c0 += CHUNK) {
            for (int i = threadIdx.x; i < TILE * 4; i += 128) {  // 128 threads; 16 bytes each time
                const int row = i / 4, part = i % 4;
                const __half* x = under(p, first_pixel + row, tap);
                const __half* w = p.w + size_t((first_o + row) * 9 + tap) * p.cin;
                const int at = swizzle<2 * CHUNK>(row, part);
                store16(xs + at, x == nullptr ? make_uint4(0, 0, 0, 0) : load16(x + c0 + 8 * part));
                store16(ws + at, load16(w + c0 + 8 * part));
            }
            __syncthreads();
            sums.multiply(smem_address(xs), smem_address(ws));
            __syncthreads();
        }
    sums.write(p, first_pixel, first_o);
}
KERNEL_EXPORT(conv_tensor);

// ---- 4. pipelined: the next steps' bytes are on their way while this one's are multiplied -------------

constexpr int STAGES = 3;

extern "C" __global__ void conv_pipelined(Conv p) {
    __shared__ __align__(16) unsigned char stages[STAGES][2][OPERAND];
    const int first_pixel = blockIdx.x * TILE, first_o = blockIdx.y * TILE;
    const int steps_a_tap = p.cin / CHUNK, steps = 9 * steps_a_tap;
    auto load = [&](int step) {
        const int tap = step / steps_a_tap, c0 = step % steps_a_tap * CHUNK;
        for (int i = threadIdx.x; i < TILE * 4; i += 128) {
            const int row = i / 4, part = i % 4;
            const __half* x = under(p, first_pixel + row, tap);
            const __half* w = p.w + size_t((first_o + row) * 9 + tap) * p.cin;
            const int at = swizzle<2 * CHUNK>(row, part);
            // A copy that is not valid writes zeros; its source must be an address all the same.
            cp_async(smem_address(stages[step % STAGES][0]) + at, x == nullptr ? p.x : x + c0 + 8 * part, x != nullptr);
            cp_async(smem_address(stages[step % STAGES][1]) + at, w + c0 + 8 * part);
        }
    };
    for (int step = 0; step < STAGES - 1; step++) {
        load(step);
        cp_async_commit();
    }
    Sums sums;
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();  // this step's bytes have come, those that this thread asked for
        __syncthreads();              // and everyone's; and all have left the stage that is loaded next
        if (step + STAGES - 1 < steps) load(step + STAGES - 1);
        cp_async_commit();
        sums.multiply(smem_address(stages[step % STAGES][0]), smem_address(stages[step % STAGES][1]));
    }
    sums.write(p, first_pixel, first_o);
}
KERNEL_EXPORT(conv_pipelined);
