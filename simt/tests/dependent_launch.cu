// Launches that begin before the one before them is over (programmatic dependent launch). With BUG a kernel reads what that one writes
// before it has waited for it. The numbers of other mistakes are arguments.
// expect normal: ok
// expect checked: race between launches: read
#include <cstdlib>
#include <cuda_runtime.h>

constexpr int n = 1000;
__constant__ float factor = 2;

__global__ void fill(float* out, float value) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = value;
}

// What nobody writes may be read before.
__global__ void scale(const float* in, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const float by = factor;
#ifdef BUG
    const float x = i < n ? in[i] : 0;
    cudaGridDependencySynchronize();
#else
    cudaGridDependencySynchronize();
    const float x = i < n ? in[i] : 0;
#endif
    cudaTriggerProgrammaticLaunchCompletion();
    if (i < n) out[i] = by * x;
}

// One thread waits for all of its block, and the next launch may begin long before.
__global__ void add(float* a, const float* b, float* out, int wrong) {
    asm volatile("griddepcontrol.launch_dependents;");
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (wrong == 1 && i < n) a[i] = 1;
    if (wrong == 2 ? threadIdx.x < 32 : threadIdx.x == 0) asm volatile("griddepcontrol.wait;" ::: "memory");
    if (wrong != 2) __syncthreads();
    if (i < n) out[i] = a[i] + b[i];
}

// Never waits, and needs not: nobody else touches its memory.
__global__ void count(int* counts) { counts[blockIdx.x * blockDim.x + threadIdx.x]++; }

template <class... P, class... A>
void launch(bool beside, void (*kernel)(P...), A... arguments) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = beside;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(4), config.blockDim = dim3(256), config.attrs = &attribute, config.numAttrs = 1;
    cudaLaunchKernelEx(&config, kernel, arguments...);
}

int main(int argc, char** argv) {
    const int wrong = argc > 1 ? atoi(argv[1]) : 0;
    float *a, *b, *c, result[n];
    int* counts;
    cudaMalloc(&a, sizeof result), cudaMalloc(&b, sizeof result), cudaMalloc(&c, sizeof result), cudaMalloc(&counts, 1024 * 4);
    cudaMemset(counts, 0, 1024 * 4);
    for (int turn = 0; turn < 2; turn++) {
        launch(turn > 0, fill, a, 1.0f);  // the copy below has waited for all
        launch(true, scale, (const float*)a, b);
        launch(true, add, a, (const float*)b, c, wrong);
        if (wrong == 3) launch(true, count, counts);  // the next one waits for this one alone
        launch(true, scale, (const float*)c, a);
        launch(true, scale, (const float*)a, b);
        cudaMemcpy(result, b, sizeof result, cudaMemcpyDeviceToHost);
        for (float x : result)
            if (x != 12) return 1;
    }
    if (wrong == 4) launch(true, fill, a, 1.0f), launch(false, fill, b, 2.0f), launch(true, fill, a, 3.0f);  // the second waits for all before
    if (wrong == 5) launch(true, fill, a, 1.0f), launch(true, fill, a, 2.0f);
    return cudaGetLastError() != cudaSuccess;
}
