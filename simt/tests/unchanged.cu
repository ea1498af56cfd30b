// What a program may write as it likes: no header for the runtime, macros with the names of templates, constants of
// headers and null pointers as arguments, kernels behind pointers and void*, variables with the names of built-in ones, any
// call of the runtime API; and numbers at the edges. With BUG an element too many. Arguments ask for wrong calls.
// expect normal: main() returned 1
// expect checked: past the end
#include <cmath>
#define N 16
#define T float
#include <cooperative_groups.h>
#include <cuComplex.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <driver_types.h>
#include <library_types.h>
#include <vector_functions.h>
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
    if (out[0] == 5) asm("fns.b32 %0, %1, 0, 1;" : "=r"(out[0]) : "r"(6));
}

// PTX, against the same in C++. `wrong` counts.
#define U(n, text, expected, ...) { unsigned u; asm(text : "=r"(u) : __VA_ARGS__); if (u != unsigned(expected)) atomicExch(wrong, n); }
#define F(n, text, expected, ...) { float f; asm(text : "=f"(f) : __VA_ARGS__); if (f != (expected)) atomicExch(wrong, n); }
#define H(n, text, expected, ...) { unsigned short h; asm(text : "=h"(h) : __VA_ARGS__); if (h != (expected)) atomicExch(wrong, n); }
__global__ void instructions(unsigned* words, float* real, int* wrong) {
    const unsigned t = threadIdx.x, x = 0x12345678u * (t + 1);
    U(1, "bfe.u32 %0, %1, 4, 12;", x >> 4 & 0xfff, "r"(x))
    U(2, "bfe.s32 %0, %1, 28, 8;", int(x) >> 28, "r"(x))
    U(3, "bfi.b32 %0, %1, %2, 8, 4;", (x & ~0xf00u) | (t & 15) << 8, "r"(t), "r"(x))
    U(4, "shf.l.wrap.b32 %0, %1, %2, 5;", x << 5 | t >> 27, "r"(t), "r"(x))
    U(5, "bfind.u32 %0, %1;", 31 - __clz(x), "r"(x))
    U(6, "add.sat.s32 %0, %1, %2;", INT_MAX, "r"(INT_MAX - 1), "r"(t + 2))
    U(7, "mad.lo.u32 %0, %1, %2, 7;", x * t + 7, "r"(x), "r"(t))
    U(8, "rem.u32 %0, %1, 1000;", x % 1000, "r"(x))
    U(9, "{ .reg .pred p, q; setp.lt.u32 p|q, %1, 5; selp.u32 %0, 1, 2, p; @q add.u32 %0, %0, 10; }", t < 5 ? 1 : 12, "r"(t))
    U(10, "{ .reg .pred p, q; setp.ge.u32 p, %1, 5; setp.lt.and.u32 q, %1, 9, p; selp.u32 %0, 1, 0, q; }", t >= 5 && t < 9, "r"(t))
    U(11, "mov.u32 %0, %%lanemask_le;", (2u << t) - 1, "r"(t))
    U(12, "dp4a.u32.u32 %0, %1, %2, 5;", (x & 255) * 4 + (x >> 8 & 255) * 3 + (x >> 16 & 255) * 2 + (x >> 24) + 5, "r"(x), "r"(0x01020304))
    // Lanes.
    U(20, "shfl.sync.down.b32 %0, %1, 3, 31, 0xffffffff;", t + 3 < 32 ? t + 3 : t, "r"(t))
    U(21, "{ .reg .pred p; shfl.sync.up.b32 %0|p, %1, 1, 0x1800, -1; @!p mov.b32 %0, 99; }", t % 8 ? t - 1 : 99, "r"(t))
    F(22, "shfl.sync.bfly.b32 %0, %1, 16, 0x1f, -1;", float(t ^ 16), "f"(float(t)))
    U(23, "shfl.sync.idx.b32 %0, %1, 7, 0x1f, -1;", 7, "r"(t))
    U(24, "{ .reg .pred p; setp.gt.u32 p, %1, 29; vote.sync.ballot.b32 %0, p, -1; }", 0xc0000000u, "r"(t))
    U(25, "{ .reg .pred p, q; setp.gt.u32 p, %1, 29; vote.sync.any.pred q, p, -1; selp.u32 %0, 1, 0, q; }", 1, "r"(t))
    U(26, "{ .reg .pred p, q; setp.gt.u32 p, %1, 29; vote.sync.uni.pred q, !p, -1; selp.u32 %0, 1, 0, q; }", 0, "r"(t))
    U(27, "redux.sync.add.u32 %0, %1, -1;", 496, "r"(t))
    U(28, "match.any.sync.b32 %0, %1, -1;", 0x11111111u << t % 4, "r"(t % 4))
    // Conversions and rounding.
    const float y = 2.5f + float(t) - 16, third = 1.0f / 3;
    U(40, "cvt.rni.s32.f32 %0, %1;", __float2int_rn(y), "f"(y))
    U(41, "cvt.rmi.s32.f32 %0, %1;", __float2int_rd(y), "f"(y))
    U(42, "cvt.rzi.u32.f32 %0, %1;", y < 0 ? 0 : unsigned(y), "f"(y))
    U(43, "cvt.sat.u8.s32 %0, %1;", 255, "r"(300))
    U(44, "cvt.s32.s8 %0, %1;", -1, "r"(255))
    F(45, "cvt.rz.f32.s32 %0, %1;", 16777216, "r"(16777217))
    F(46, "cvt.rp.f32.u64 %0, %1;", 16777218, "l"(16777217ull))
    F(47, "cvt.rpi.f32.f32 %0, %1;", ceilf(y), "f"(y))
    F(48, "cvt.sat.f32.f32 %0, %1;", y < 0 ? 0 : y > 1 ? 1 : y, "f"(y))
    F(49, "cvt.rm.f32.f64 %0, %1;", __double2float_rd(0.1), "d"(0.1))
    H(50, "cvt.rz.f16.f32 %0, %1;", __half_as_ushort(__float2half_rz(third)), "f"(third))
    H(51, "cvt.rn.bf16.f32 %0, %1;", __bfloat16_as_ushort(__float2bfloat16(third)), "f"(third))
    F(52, "cvt.f32.bf16 %0, %1;", 1.5f, "h"((unsigned short)0x3fc0))
    H(53, "cvt.rn.f16.s32 %0, %1;", __half_as_ushort(__int2half_rn(int(t))), "r"(t))
    H(59, "cvt.rn.f16.f64 %0, %1;", __half_as_ushort(__double2half(0.1)), "d"(0.1))
    F(54, "add.rz.f32 %0, %1, %2;", __fadd_rz(third, y), "f"(third), "f"(y))
    F(55, "mul.rp.ftz.f32 %0, %1, %2;", __fmul_ru(third, y), "f"(third), "f"(y))
    F(56, "fma.rn.sat.f32 %0, %1, %2, %3;", __saturatef(third * y), "f"(third), "f"(y), "f"(0.0f))
    F(57, "div.rn.f32 %0, %1, %2;", y / third, "f"(y), "f"(third))
    U(58, "fma.rn.f16x2 %0, %1, %1, %1;", 0x46004000, "r"(0x40003c00))  // (2, 1)
    // Carries go from one statement to the next. Loops, halves of a word.
    using Wide = unsigned __int128;
    unsigned long long low = 0x9e3779b97f4a7c15u * (t + 1), high = 0xbf58476d1ce4e5b9u * (t + 7), got[2];
    const Wide one = Wide(high) << 64 | low, other = Wide(low * 3) << 64 | ~high;
    auto expect = [&](Wide all, int which) { if (got[0] != (unsigned long long)all || got[1] != (unsigned long long)(all >> 64)) atomicExch(wrong, which); };
    asm volatile("add.cc.u64 %0, %1, %2;" : "=l"(got[0]) : "l"(low), "l"(~high));
    asm volatile("addc.u64 %0, %1, %2;" : "=l"(got[1]) : "l"(high), "l"(low * 3));
    expect(one + other, 30);
    asm volatile("sub.cc.u64 %0, %2, %4;\n\tsubc.u64 %1, %3, %5;" : "=&l"(got[0]), "=&l"(got[1]) : "l"(low), "l"(high), "l"(~high), "l"(low * 3));
    expect(one - other, 31);
    const unsigned a0 = unsigned(low), a1 = unsigned(low >> 32), b0 = unsigned(high), b1 = unsigned(high >> 32);
    asm("{ .reg .u32 r<4>;\n mul.lo.u32 r0, %2, %4; mul.hi.u32 r1, %2, %4;\n mad.lo.cc.u32 r1, %2, %5, r1; madc.hi.u32 r2, %2, %5, 0;\n"
        " mad.lo.cc.u32 r1, %3, %4, r1; madc.hi.cc.u32 r2, %3, %4, r2; madc.hi.u32 r3, %3, %5, 0;\n mad.lo.cc.u32 r2, %3, %5, r2; addc.u32 r3, r3, 0;\n"
        " mov.b64 %0, {r0, r1}; mov.b64 %1, {r2, r3}; }" : "=l"(got[0]), "=l"(got[1]) : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
    expect(Wide(low) * high, 32);
    U(33, "{ .reg .pred p; .reg .u32 n; mov.u32 n, %1; mov.u32 %0, 0; LOOP_%=: setp.eq.u32 p, n, 0; @p bra DONE_%=; add.u32 %0, %0, n; sub.u32 n, n, 1; bra.uni LOOP_%=; DONE_%=: }", t * (t + 1) / 2, "r"(t))
    U(34, "{ .reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, l}; }", x << 16 | x >> 16, "r"(x))
    U(35, "{ .reg .pred p; setp.lt.u32 p, %1, 5; mov.u32 %0, 9; @!p ld.global.nc.u32 %0, [%2]; }", t < 5 ? 9 : words[5], "r"(t), "l"(words + 5))
    // Atomics.
    __shared__ alignas(16) unsigned total;
    if (t == 0) total = 5;
    __syncthreads();
    const unsigned at = (unsigned)__cvta_generic_to_shared(&total);
    asm volatile("red.shared.add.u32 [%0], %1;" :: "r"(at), "r"(2) : "memory");
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" :: "l"(real), "f"(0.5f) : "memory");
    unsigned before;
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1+4], %2;" : "=r"(before) : "l"(words), "r"(1) : "memory");
    if (before > 31) atomicExch(wrong, 60);
    asm volatile("atom.global.max.s32 _, [%0+8], %1;" :: "l"(words), "r"(t) : "memory");
    asm volatile("atom.global.cas.b32 %0, [%1+12], 0, %2;" : "=r"(before) : "l"(words), "r"(t + 1) : "memory");
    __syncthreads();
    if (t == 0) words[0] = total;
}

struct Point { int x, y; };
template <class E, bool FIRST> E pick(E a, E b) { return FIRST ? a : b; }
struct Deep { Point first; float more; };
template <class E> __global__ void deep(Deep d, Point empty, E* out) { out[threadIdx.x] = E(d.first.x * 100 + d.first.y * 10 + d.more) + empty.x; }
__global__ void point(Point p, int* out) { out[threadIdx.x] = p.x * 10 + p.y + int(blockDim.x); }
// More parameters than there are registers.
__global__ void many(int* out, char a, short b, unsigned c, long long d, bool e, float f, double g, float h, float i, float j, float k, float l, float m, float n, int o) {
    *out = int(a + b + c + d + e + f + g + h + i + j + k + l + m) * 1000 + int(n) * 100 + o;
}
__global__ void fill(int* out, int value) { out[blockIdx.x * blockDim.x + threadIdx.x] = value; }
__device__ int counter;

// As for nvcc, device code has an architecture, and host code has none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 600
static __device__ double atomicAdd(double* address, double value) { return *address += value; }
#endif
template <class V> struct __align__(16) Place {
    V architecture;
    __host__ __device__ Place() : architecture(V(0)) {
#ifdef __CUDA_ARCH__
        architecture = V(__CUDA_ARCH__);
        atomicAdd(&counter, blockDim.x);
#else
        printf("%s", ""), architecture = V(1);
#endif
    }
    __host__ __device__ V twice() const { return 2 * architecture; }
};
__host__ __device__ constexpr int lanes() {
#ifndef __CUDA_ARCH__
    return 1;
#else
    return 32;
#endif
}
__global__ void where(int* out) {
#if __CUDA_ARCH__ >= 800
    out[0] = Place<int>().twice();
    out[1] = lanes();
#endif
}

static int failed = 0;
#define EXPECT(condition) void((condition) || failed++ || printf("line %d: " #condition "\n", __LINE__))
#define CALL(expression) EXPECT((expression) == cudaSuccess)

struct Shape {
    Shape(int blocks, int threads) : gridDim(blocks), blockDim(threads) {}
    dim3 gridDim, blockDim;
};
__global__ void piped(cuComplex* out, const cuComplex* in) {
    __shared__ cuComplex numbers[2];
    __pipeline_memcpy_async(&numbers[threadIdx.x], &in[threadIdx.x], sizeof numbers[0]);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    out[threadIdx.x] = cuCmulf(numbers[threadIdx.x], cuConjf(numbers[threadIdx.x]));
}

// Beside the same names of the program's own, and of textures.
struct Sizes {
    Sizes(dim3 grid, dim3 block);
    dim3 gridDim, blockDim;
};
Sizes::Sizes(dim3 grid, dim3 block) : gridDim{grid}, blockDim(block) {}
struct surf2DView { int tex3D; };
__device__ unsigned product(const dim3* size) { return size->x * size->y; }
__global__ void names(unsigned* out, surf2DView tex2DWidth) {
    const unsigned odd = 0xdead'beefu + u8'"' + L'\'';
    const uint3 all[] = {threadIdx, blockIdx, threadIdx};
    struct Both { uint3 thread; dim3 grid; };
    const auto both = [](const dim3* size) -> Both { return size->x ? Both{threadIdx, gridDim} : Both{}; };
    if (both(&gridDim).grid.x != 1) return;
    out[threadIdx.x] = odd + unsigned(tex2DWidth.tex3D) + all[2].x * 256 + all[1].x + product(&blockDim) * 65536;
}
enum class Mode { one = 1 };
namespace {
template <Mode M> __global__ void moded(int* out) { *out = int(M); }
}  // namespace

static void launches() {
    int *out, got[N] = {};
    CALL(cudaMalloc(&out, sizeof got));
    const dim3 gridDim(1), blockDim(N);
    point<<<gridDim, blockDim>>>({1, 2}, out);
    point<<<{1}, {N}, 0, 0>>>(Point{1, 2}, out);
    CALL(cudaMemcpy(got, out, sizeof got, cudaMemcpyDefault));
    EXPECT(got[N - 1] == 12 + N);
    int columns = 3;
    deep<<<1, N>>>({{columns, pick<int, true>(4, 2)}, .more = 5}, {}, out);
    CALL(cudaMemcpy(got, out, sizeof got, cudaMemcpyDefault));
    EXPECT(got[N - 1] == 345);
    Point other = {6, 7};
    void* of_point[] = {&other, &out};
    CALL(cudaLaunchKernel((const void*)point, 1, N, of_point, 0, 0));
    CALL(cudaMemcpy(got, out, sizeof got, cudaMemcpyDefault));
    EXPECT(got[N - 1] == 67 + N);

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
    const Shape shape(1, 2);
    cuComplex numbers[2] = {make_cuComplex(3, 4), make_cuComplex(0, 2)}, *complex;
    CALL(cudaMalloc(&complex, 2 * sizeof numbers)), CALL(cudaMemcpy(complex, numbers, sizeof numbers, cudaMemcpyHostToDevice));
    piped<<<shape.gridDim, shape.blockDim>>>(complex + 2, complex);
    CALL(cudaMemcpy(numbers, complex + 2, sizeof numbers, cudaMemcpyDeviceToHost));
    EXPECT(numbers[0].x == 25 && numbers[0].y == 0 && cuCabsf(numbers[1]) == 4 && cuCdivf(numbers[0], numbers[1]).x == 6.25f);
    static_assert(CUDA_R_16F == 2, "");
    names<<<Sizes(1, 2).gridDim, Sizes(1, 2).blockDim>>>((unsigned*)out, surf2DView{0'1});
    CALL(cudaMemcpy(got, out, 8, cudaMemcpyDeviceToHost));
    EXPECT(got[1] - got[0] == 256 && unsigned(got[0]) == 0xdead'beefu + '"' + '\'' + 1 + 0x2'0000);
    void* moded_arguments[] = {&out};
    CALL(cudaLaunchKernel((const void*)moded<Mode::one>, 1, 1, moded_arguments));
    CALL(cudaMemcpy(got, out, 4, cudaMemcpyDeviceToHost));
    EXPECT(got[0] == 1);
    where<<<1, 7>>>(out);
    CALL(cudaMemcpy(got, out, sizeof got, cudaMemcpyDeviceToHost));
    EXPECT(got[0] == 2 * 860 && got[1] == 32 && Place<int>().twice() == 2 && lanes() == 1);
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
    for (const int most : {16, 48}) {
        CALL(cudaOccupancyMaxPotentialBlockSize(&grid, &block, fill, 0, most));
        EXPECT(block == most && grid == 64);
    }
    size_t limit;
    CALL(cudaDeviceSetLimit(cudaLimitMallocHeapSize, 1 << 26)), CALL(cudaDeviceGetLimit(&limit, cudaLimitMallocHeapSize));
    EXPECT(limit == 1 << 26);
    CALL(cudaDeviceSetLimit(cudaLimitStackSize, 1 << 20)), CALL(cudaDeviceGetLimit(&limit, cudaLimitStackSize));
    EXPECT(limit == 1 << 20);

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
    void* only_its_address = (void*)point;
    cudaLaunchKernel(only_its_address, 1, 1, arguments);
}

static void ptx() {
    unsigned *words, got[4] = {};
    float *real, sum = 0;
    int *wrong, which = 0;
    CALL(cudaMalloc(&words, 24)), CALL(cudaMalloc(&real, 4)), CALL(cudaMalloc(&wrong, 4));
    CALL(cudaMemset(words, 0, 24)), CALL(cudaMemset(real, 0, 4)), CALL(cudaMemset(wrong, 0, 4));
    instructions<<<1, 32>>>(words, real, wrong);
    CALL(cudaMemcpy(got, words, 16, cudaMemcpyDeviceToHost)), CALL(cudaMemcpy(&sum, real, 4, cudaMemcpyDeviceToHost)), CALL(cudaMemcpy(&which, wrong, 4, cudaMemcpyDeviceToHost));
    EXPECT(got[0] == 69 && got[1] == 32 && got[2] == 31 && got[3] > 0 && got[3] <= 32 && sum == 16);
    EXPECT(which == 0);
    if (which) printf("instruction %d\n", which);
}

int main(int argc, char**) {
    if (argc > 1) return wrong_calls(), 0;
    launches(), memory(), queries(), ptx();
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
