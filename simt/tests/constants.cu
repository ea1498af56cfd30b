// A filter of a line with its taps in constant memory. With BUG one tap more than there are; an argument chooses other bugs.
// expect normal: main() returned 1
// expect checked: index out of the array's bounds
#include <cuda_runtime.h>
#include <string>

#define RADIUS 3
struct Filter {
    float taps[2 * RADIUS + 1];
    int padding;
};
__constant__ Filter filter;
__constant__ float scale = 2.0f;
__device__ int rows_done;
namespace tables {
static const __constant__ short steps[4] = {1, 2, 3, 4}, last = 5;
__device__ double sums[3];
}  // namespace tables

__global__ void sum_up(int i) {
    tables::sums[i] = tables::steps[i] + tables::last;
}
__global__ void overwrite(float* to, float value) { *to += value; }

template <int TILE>
__global__ void line(const float* in, float* out, int n) {
    __shared__ float tile[TILE + 2 * RADIUS];
    const int x = blockIdx.x * TILE + threadIdx.x;
    for (int i = threadIdx.x; i < TILE + 2 * RADIUS; i += TILE) {
        const int from = int(blockIdx.x) * TILE + i - RADIUS;
        tile[i] = from >= 0 && from < n ? in[from] : 0.0f;
    }
    __syncthreads();
    float sum = 0;
#ifdef BUG
    for (int k = -RADIUS; k <= RADIUS + 1; k++) sum += filter.taps[k + RADIUS] * tile[min(threadIdx.x + k + RADIUS, TILE + 2u * RADIUS - 1)];
#else
    for (int k = -RADIUS; k <= RADIUS; k++) sum += filter.taps[k + RADIUS] * tile[threadIdx.x + k + RADIUS];
#endif
    if (x < n) out[x] = scale * sum;
    if (threadIdx.x == 0) atomicAdd(&rows_done, 1);
}

static int other_bug(const std::string& bug) {
    float* address;
    float two[2] = {};
    cudaGetSymbolAddress((void**)&address, scale);
    if (bug == "write") return overwrite<<<1, 1>>>(address, 1), cudaDeviceSynchronize() != cudaSuccess;
    if (bug == "to") return cudaMemcpyToSymbol(scale, two, sizeof two) != cudaErrorInvalidValue;
    if (bug == "offset") return cudaMemcpyToSymbol(filter, two, 8, sizeof filter - 4) != cudaErrorInvalidValue;
    if (bug == "from") return cudaMemcpyFromSymbol(two, tables::sums, 8, 24) != cudaErrorInvalidValue;
    cudaMalloc(&address, 4);
    return cudaMemcpy(address, two, 8, cudaMemcpyHostToDevice) != cudaErrorInvalidValue;
}

static bool symbols() {
    double sums[3] = {-1, -1, -1}, *address;
    size_t bytes;
    cudaMemcpyToSymbol(tables::sums, sums, sizeof sums);
    sum_up<<<1, 1>>>(1);
    cudaMemcpyFromSymbol(sums, tables::sums, 16, 8);
    cudaGetSymbolAddress((void**)&address, tables::sums), cudaGetSymbolSize(&bytes, tables::sums);
    cudaMemcpyToSymbol(tables::sums, sums, 8, 16);
    cudaMemcpy(sums + 1, address + 2, 8, cudaMemcpyDeviceToHost);
    return bytes == 24 && sums[0] == 7 && sums[1] == 7;
}

int main(int argc, char** argv) {
    if (argc > 1) return other_bug(argv[1]);
    if (!symbols()) return 1;
    const int n = 100;
    float in[n], out[n];
    Filter f = {{1, 2, 3, 4, 3, 2, 1}, 0x7fc00000};
    for (int i = 0; i < n; i++) in[i] = float(i % 5);
    float *a, *b, half = 0.5f;
    int done = 0;
    cudaMalloc(&a, sizeof in), cudaMalloc(&b, sizeof out);
    cudaMemcpy(a, in, sizeof in, cudaMemcpyHostToDevice);
    cudaMemcpyToSymbol(filter, &f, sizeof f);
    cudaMemcpyToSymbol(scale, &half, sizeof half);
    line<32><<<(n + 31) / 32, 32>>>(a, b, n);
    if (cudaDeviceSynchronize() != cudaSuccess) return 1;
    cudaMemcpy(out, b, sizeof out, cudaMemcpyDeviceToHost);
    cudaMemcpyFromSymbol(&done, rows_done, sizeof done);
    for (int i = 0; i < n; i++) {
        float sum = 0;
        for (int k = -RADIUS; k <= RADIUS; k++) sum += i + k >= 0 && i + k < n ? f.taps[k + RADIUS] * in[i + k] : 0;
        if (out[i] != 0.5f * sum) return 1;
    }
    return done != 4;
}
