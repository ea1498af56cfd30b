// What a program may write as it likes: no header for the runtime, macros with the names of templates, constants of
// headers and null pointers as arguments, kernels behind pointers and void*, variables with the names of built-in ones, any
// call of the runtime API; and numbers at the edges. With BUG an element too many. Arguments ask for wrong calls.
// expect normal: main() returned 1
// expect checked: past the end
#include <cmath>
#define N 16
#define T float
#include <cooperative_groups.h>
namespace cg = cooperative_groups;

inline __forceinline__ __device__ T twice(T x) { return x + x; }
__device__ __noinline__ T once(T x) { return x; }

template <bool WIDE, int BY> __global__ void scale(T* out, const T* bias, T limit) {
    const int t = threadIdx.x;
#ifdef BUG
    out[t + 1]
#else
    out[t]
#endif
        = fminf(limit, twice(once(T(BY))) + (bias ? bias[t] : WIDE));
}
typedef void (*Kernel)(T*, const T*, T);
struct Kernels { Kernel k; };

__global__ void numbers(int* out, double nan) {
    out[0] = __double2int_rn(nan);
    out[1] = __float2ll_rz(float(nan)) == LLONG_MIN;
    out[2] = __float2int_rn(float(nan));
    asm("shr.s32 %0, %1, 40;" : "=r"(out[3]) : "r"(-40));
    asm("{ .reg .pred p; /* of a NaN */ setp.ne.f32 p, %1, %1; selp.s32 %0, 1, 0, p; }" : "=r"(out[4]) : "f"(float(nan)));
    asm("prmt.b32 %0, %1, %2, 0x9810;" : "=r"(out[5]) : "r"(0x80ff), "r"(0));
    auto tile = cg::tiled_partition<8>(cg::tiled_partition<32>(cg::this_thread_block()));
    out[6] = tile.meta_group_size();
    cg::this_grid().sync();
    __barrier_sync(0);
    __barrier_sync_count(1, 32);
    if (out[0] == 5) asm("add.rz.f32 %0, %1, %2;" : "=f"(*(float*)out) : "f"(1.0f), "f"(2.0f));
}

struct Point { int x, y; };
__global__ void point(Point p, int* out) { out[threadIdx.x] = p.x * 10 + p.y + int(blockDim.x); }
// More parameters than there are registers.
__global__ void many(int* out, char a, short b, unsigned c, long long d, bool e, float f, double g, float h, float i, float j, float k, float l, float m, float n, int o) {
    *out = int(a + b + c + d + e + f + g + h + i + j + k + l + m) * 1000 + int(n) * 100 + o;
}
__global__ void fill(int* out, int value) { out[blockIdx.x * blockDim.x + threadIdx.x] = value; }
__device__ int counter;

static int failed = 0;
#define EXPECT(condition) void((condition) || failed++ || printf("line %d: " #condition "\n", __LINE__))
#define CALL(expression) EXPECT((expression) == cudaSuccess)

static void launches() {
    int *out, got[N] = {};
    CALL(cudaMalloc(&out, sizeof got));
    const dim3 gridDim(1), blockDim(N);
    point<<<gridDim, blockDim>>>({1, 2}, out);
    point<<<{1}, {N}, 0, 0>>>(Point{1, 2}, out);
    CALL(cudaMemcpy(got, out, sizeof got, cudaMemcpyDefault));
    EXPECT(got[N - 1] == 12 + N);

    char a = -1;
    short b = -2;
    unsigned c = 3;
    long long d = 4;
    bool e = true;
    float f = 1, last = 7;
    double g = 2;
    int o = 5;
    void* arguments[] = {&out, &a, &b, &c, &d, &e, &f, &g, &f, &f, &f, &f, &f, &f, &last, &o};
    CALL(cudaLaunchKernel((const void*)many, gridDim, blockDim.x / N, arguments, 0, nullptr));
    CALL(cudaMemcpy(got, out, 4, cudaMemcpyDeviceToHost));
    EXPECT(got[0] == 14705);
    CALL(cudaLaunchCooperativeKernel((void*)many, 1, 1, arguments));

    cudaLaunchConfig_t config = {};
    config.gridDim = gridDim, config.blockDim = N;
    CALL(cudaLaunchKernelEx(&config, fill, out, 3));
    CALL(cudaMemcpy(got, out, sizeof got, cudaMemcpyDeviceToHost));
    EXPECT(got[N - 1] == 3);
    CALL(cudaFree(out));
}

static void memory() {
    int *device, *managed, *pinned, plain[64] = {}, *address;
    CALL(cudaMalloc(&device, 256)), CALL(cudaMallocManaged(&managed, 256)), CALL(cudaMallocHost(&pinned, 256));
    CALL(cudaMemset(device, 1, 256)), CALL(cudaMemset(managed, 2, 256)), CALL(cudaMemset(pinned, 3, 256));
    CALL(cudaMemcpy(plain, device, 256, cudaMemcpyDeviceToHost)), CALL(cudaMemcpy(device, managed, 256, cudaMemcpyDeviceToDevice));
    CALL(cudaMemcpy(device, pinned, 256, cudaMemcpyHostToDevice)), CALL(cudaMemcpy(pinned, managed, 256, cudaMemcpyDeviceToHost));
    CALL(cudaMemcpy(managed, plain, 256, cudaMemcpyHostToDevice)), CALL(cudaMemcpyPeer(device, 0, managed, 0, 256));
    EXPECT(plain[63] == 0x01010101 && pinned[1] == 0x02020202);
    CALL(cudaMemcpyToSymbol(counter, device, 4, 0, cudaMemcpyDeviceToDevice)), CALL(cudaGetSymbolAddress((void**)&address, counter));
    CALL(cudaMemcpy(plain, address, 4, cudaMemcpyDeviceToHost));
    EXPECT(plain[0] == 0x01010101);
    CALL(cudaMemAdvise(managed, 256, cudaMemAdviseSetReadMostly, 0)), CALL(cudaMemPrefetchAsync(managed, 256, cudaCpuDeviceId, nullptr));

    cudaPointerAttributes what;
    CALL(cudaPointerGetAttributes(&what, device + 3));
    EXPECT(what.type == cudaMemoryTypeDevice && what.devicePointer == device + 3);
    CALL(cudaPointerGetAttributes(&what, managed));
    EXPECT(what.type == cudaMemoryTypeManaged && what.hostPointer == managed);
    CALL(cudaPointerGetAttributes(&what, plain));
    EXPECT(what.type == cudaMemoryTypeUnregistered);

    int* mapped;
    CALL(cudaHostRegister(plain, 256, cudaHostRegisterMapped)), CALL(cudaHostGetDevicePointer(&mapped, plain, 0));
    fill<<<2, 32>>>(mapped, 9);
    EXPECT(plain[63] == 9);
    CALL(cudaHostUnregister(plain));

    cudaPitchedPtr cube;
    const cudaExtent extent = make_cudaExtent(8, 2, 2);
    CALL(cudaMalloc3D(&cube, extent)), CALL(cudaMemset3D(cube, 4, extent)), CALL(cudaMemset2D(cube.ptr, cube.pitch, 5, 8, 2));
    cudaMemcpy3DParms p = {};
    p.srcPtr = cube, p.dstPtr = make_cudaPitchedPtr(plain, 8, 8, 2), p.extent = extent, p.kind = cudaMemcpyDeviceToHost;
    CALL(cudaMemcpy3D(&p));
    EXPECT(plain[0] == 0x05050505 && plain[3] == 0x05050505 && plain[4] == 0x04040404 && plain[7] == 0x04040404 && plain[8] == 9);
    CALL(cudaMemcpy2DAsync(plain, 4, cube.ptr, cube.pitch, 4, 2, cudaMemcpyDeviceToHost, nullptr));
    CALL(cudaFree(cube.ptr)), CALL(cudaFree(device)), CALL(cudaFree(managed)), CALL(cudaFreeHost(pinned));
}

static void queries() {
    cudaDeviceProp properties;
    CALL(cudaGetDeviceProperties(&properties, 0));
    EXPECT(properties.unifiedAddressing && properties.concurrentManagedAccess && properties.regsPerMultiprocessor == 65536 && !properties.ECCEnabled);
    int value = 0, version, grid, block, least, greatest;
    CALL(cudaDeviceGetAttribute(&value, cudaDevAttrMaxBlockDimZ, 0));
    EXPECT(value == 64);
    CALL(cudaRuntimeGetVersion(&version));
    EXPECT(version == CUDART_VERSION);
    cudaFuncAttributes attributes;
    CALL(cudaFuncSetAttribute(fill, cudaFuncAttributeMaxDynamicSharedMemorySize, 60000)), CALL(cudaFuncGetAttributes(&attributes, fill));
    EXPECT(attributes.maxThreadsPerBlock == 1024 && attributes.maxDynamicSharedSizeBytes == 60000);
    CALL(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, fill, 256, 0));
    EXPECT(value == 6);
    CALL(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, fill, 32, 60000));
    EXPECT(value == 1);
    CALL(cudaOccupancyMaxPotentialBlockSize(&grid, &block, fill, 0, 0));
    EXPECT(block == 768 && grid == 8);
    size_t limit;
    CALL(cudaDeviceSetLimit(cudaLimitMallocHeapSize, 1 << 26)), CALL(cudaDeviceGetLimit(&limit, cudaLimitMallocHeapSize));
    EXPECT(limit == 1 << 26);

    cudaStream_t stream;
    cudaEvent_t event, later;
    unsigned flags = 0;
    CALL(cudaDeviceGetStreamPriorityRange(&least, &greatest)), CALL(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
    CALL(cudaStreamGetFlags(stream, &flags)), CALL(cudaStreamGetPriority(stream, &value));
    EXPECT(flags == cudaStreamNonBlocking && value == greatest);
    CALL(cudaEventCreate(&event)), CALL(cudaEventCreateWithFlags(&later, cudaEventDisableTiming)), CALL(cudaEventRecord(event, stream)), CALL(cudaEventRecord(later, cudaStreamPerThread));
    CALL(cudaStreamQuery(stream)), CALL(cudaEventQuery(event)), CALL(cudaStreamWaitEvent(stream, event, 0));
    CALL(cudaLaunchHostFunc(stream, [](void* p) { *(int*)p = 77; }, &value));
    EXPECT(value == 77);
    CALL(cudaEventDestroy(event)), CALL(cudaEventDestroy(later)), CALL(cudaStreamDestroy(stream));
}

// Each is refused, and a finding.
static void wrong_calls() {
    int *device, *pinned, host[4];
    float milliseconds;
    cudaMalloc(&device, 16), cudaMallocHost(&pinned, 16);
    cudaMemcpy(host, device, 16, cudaMemcpyHostToDevice);
    cudaMemcpy(device, host, 16, cudaMemcpyDeviceToHost);
    cudaMemcpy(device, host, 16, cudaMemcpyDeviceToDevice);
    cudaMemset(host, 0, 16);
    cudaFree(pinned), cudaFreeHost(device);
    cudaMemPrefetchAsync(device, 16, 0);
    cudaEvent_t event;
    cudaEventCreate(&event), cudaEventElapsedTime(&milliseconds, event, event);
    Point p = {};
    void* arguments[] = {&p, &device};
    cudaLaunchKernel((void*)point, 1, 1, arguments);
}

int main(int argc, char**) {
    if (argc > 1) return wrong_calls(), 0;
    launches(), memory(), queries();
    if (failed) return 1;
    T *out, h[N];
    cudaMalloc(&out, sizeof h);
    scale<(sizeof(T) > 2), 7><<<1, N>>>(out, NULL, INFINITY);
    Kernel kernel = scale<true, 7>, all[] = {kernel};
    Kernels kernels = {kernel};
    (*kernel)<<<1, N>>>(out, 0, INFINITY);
    all[0]<<<1, N>>>(out, nullptr, INFINITY);
    kernels.k<<<1, N>>>(out, NULL, INFINITY);
    T limit = INFINITY;
    const T* none = nullptr;
    void* arguments[] = {&out, &none, &limit};
    if (cudaLaunchKernel(kernel, dim3(1), dim3(N), arguments)) return 1;
    cudaMemcpy(h, out, sizeof h, cudaMemcpyDeviceToHost);
    for (T x : h)
        if (x != 15) return 1;
    int* d, n[7];
    double nan = NAN;
    cudaMalloc(&d, sizeof n);
    void* two[] = {&d, &nan};
    if (cudaLaunchCooperativeKernel(numbers, dim3(1), dim3(32), two)) return 1;
    cudaMemcpy(n, d, sizeof n, cudaMemcpyDeviceToHost);
    if (strcmp(cudaGetErrorName(cudaErrorNotReady), "cudaErrorNotReady")) return 1;
    return !(n[0] == INT_MIN && n[1] == 1 && n[2] == 0 && n[3] == -1 && n[4] == 0 && n[5] == int(0xffff80ff) && n[6] == 4);
}
