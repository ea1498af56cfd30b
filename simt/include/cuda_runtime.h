// The part of CUDA's runtime API that sample programs use. Everything happens at once: streams are in order, an event's
// time is the clock's when it was recorded.
#pragma once
#include "simt.h"

#include <cstdio>
#include <cstdlib>

// X(name, number, what cudaGetErrorString says)
#define SIMT_ERRORS(X) \
    X(InvalidValue, 1, "invalid argument") \
    X(MemoryAllocation, 2, "out of memory") \
    X(InitializationError, 3, "initialization error") \
    X(InvalidConfiguration, 9, "invalid configuration argument") \
    X(InvalidPitchValue, 12, "invalid pitch argument") \
    X(InvalidSymbol, 13, "invalid device symbol") \
    X(InvalidDevicePointer, 17, "invalid device pointer") \
    X(InvalidMemcpyDirection, 21, "invalid copy direction for memcpy") \
    X(InvalidDeviceFunction, 98, "invalid device function") \
    X(NoDevice, 100, "no CUDA-capable device is detected") \
    X(InvalidDevice, 101, "invalid device ordinal") \
    X(InvalidResourceHandle, 400, "invalid resource handle") \
    X(NotReady, 600, "device not ready") \
    X(IllegalAddress, 700, "an illegal memory access was encountered") \
    X(LaunchOutOfResources, 701, "too many resources requested for launch") \
    X(LaunchTimeout, 702, "the launch timed out and was terminated") \
    X(Assert, 710, "device-side assert triggered") \
    X(HostMemoryAlreadyRegistered, 712, "part or all of the requested memory range is already mapped") \
    X(HostMemoryNotRegistered, 713, "pointer does not correspond to a registered memory region") \
    X(MisalignedAddress, 716, "misaligned address") \
    X(LaunchFailure, 719, "unspecified launch failure") \
    X(CooperativeLaunchTooLarge, 720, "too many blocks in cooperative launch") \
    X(NotSupported, 801, "operation not supported") \
    X(Unknown, 999, "unknown error")
enum cudaError_t {
    cudaSuccess = 0,
#define SIMT_ERROR(name, number, text) cudaError##name = number,
    SIMT_ERRORS(SIMT_ERROR)
#undef SIMT_ERROR
};
typedef cudaError_t cudaError;
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaFuncCache { cudaFuncCachePreferNone, cudaFuncCachePreferShared, cudaFuncCachePreferL1, cudaFuncCachePreferEqual };
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2, cudaStreamNonBlocking = 1, cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2, cudaHostAllocWriteCombined = 4, cudaMemAttachGlobal = 1, cudaDeviceMapHost = 8 };
struct simt_event { double milliseconds; };
typedef struct simt_stream* cudaStream_t;
typedef simt_event* cudaEvent_t;
struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount, maxThreadsPerBlock, maxThreadsPerMultiProcessor, warpSize, clockRate, memoryClockRate,
        memoryBusWidth, l2CacheSize, regsPerBlock, maxThreadsDim[3], maxGridSize[3];
    size_t totalGlobalMem, totalConstMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
};

const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaDeviceReset();
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaFree(void* p);
cudaError_t cudaFreeHost(void* p);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind);
cudaError_t cudaMemset(void* to, int value, size_t bytes);
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to);
cudaError_t cudaEventDestroy(cudaEvent_t event);

namespace simt {
cudaError_t refuse_untyped(const char* call);
cudaError_t allocate(void** p, size_t bytes);
cudaError_t allocate_host(void** p, size_t bytes);
cudaError_t copy_symbol(void* symbol, size_t size, size_t offset, void* to, const void* from, size_t bytes);
const char* kernel_name(const void* kernel);  // of its symbol
cudaError_t set_attribute(const void* kernel, int attribute, int value);
}  // namespace simt

template <class T> cudaError_t cudaMalloc(T** p, size_t bytes) { return simt::allocate(reinterpret_cast<void**>(p), bytes); }
template <class T> cudaError_t cudaMallocManaged(T** p, size_t bytes, unsigned = 1) { return cudaMalloc(p, bytes); }
template <class T> cudaError_t cudaMallocAsync(T** p, size_t bytes, cudaStream_t) { return cudaMalloc(p, bytes); }
template <class T> cudaError_t cudaMallocHost(T** p, size_t bytes) { return simt::allocate_host(reinterpret_cast<void**>(p), bytes); }
template <class T> cudaError_t cudaHostAlloc(T** p, size_t bytes, unsigned = 0) { return cudaMallocHost(p, bytes); }
template <class T> cudaError_t cudaMallocPitch(T** p, size_t* pitch, size_t width, size_t height) {
    *pitch = (width + 511) / 512 * 512;
    return cudaMalloc(p, *pitch * height);
}
template <class T> cudaError_t cudaHostGetDevicePointer(T** device, void* host, unsigned) { return *device = static_cast<T*>(host), cudaSuccess; }
inline cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t = nullptr) {
    return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) { return cudaMemset(to, value, bytes); }
template <class T> cudaError_t cudaMemcpyToSymbol(T& symbol, const void* from, size_t bytes, size_t offset = 0, cudaMemcpyKind = cudaMemcpyHostToDevice) {
    return simt::copy_symbol((void*)&symbol, sizeof symbol, offset, nullptr, from, bytes);
}
template <class T> cudaError_t cudaMemcpyFromSymbol(void* to, const T& symbol, size_t bytes, size_t offset = 0, cudaMemcpyKind = cudaMemcpyDeviceToHost) {
    return simt::copy_symbol((void*)&symbol, sizeof symbol, offset, to, nullptr, bytes);
}
template <class T>
cudaError_t cudaMemcpyToSymbolAsync(T& symbol, const void* from, size_t bytes, size_t offset = 0, cudaMemcpyKind = cudaMemcpyHostToDevice, cudaStream_t = nullptr) {
    return cudaMemcpyToSymbol(symbol, from, bytes, offset);
}
template <class T>
cudaError_t cudaMemcpyFromSymbolAsync(void* to, const T& symbol, size_t bytes, size_t offset = 0, cudaMemcpyKind = cudaMemcpyDeviceToHost, cudaStream_t = nullptr) {
    return cudaMemcpyFromSymbol(to, symbol, bytes, offset);
}
template <class T> cudaError_t cudaGetSymbolAddress(void** p, const T& symbol) { return *p = (void*)&symbol, cudaSuccess; }
template <class T> cudaError_t cudaGetSymbolSize(size_t* bytes, const T& symbol) { return *bytes = sizeof symbol, cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0) { return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaDeviceSynchronize(); }
template <class F> cudaError_t cudaFuncSetAttribute(F kernel, cudaFuncAttribute attribute, int value) {
    return simt::set_attribute((const void*)kernel, attribute, value);
}
template <class F> cudaError_t cudaFuncSetCacheConfig(F, cudaFuncCache) { return cudaSuccess; }
template <class F> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F, int threads, size_t) {
    return *blocks = threads > 0 && threads <= 1024 ? 1536 / threads : 0, cudaSuccess;
}
// Of a kernel as such. Behind a void* nobody knows its parameters any more.
namespace simt {
template <class... A, size_t... I>
cudaError_t launch_kernel(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments, size_t shared, std::index_sequence<I...>) {
    (void)arguments;
    launch(kernel_name((const void*)kernel), Config(grid, block, shared), [=](auto... a) { kernel(a...); }, *static_cast<std::decay_t<A>*>(arguments[I])...);
    return cudaGetLastError();
}
}  // namespace simt
template <class... A>
cudaError_t cudaLaunchKernel(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments, size_t shared = 0, cudaStream_t = nullptr) {
    return simt::launch_kernel(kernel, grid, block, arguments, shared, std::index_sequence_for<A...>());
}
template <class... A>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments, size_t shared = 0, cudaStream_t = nullptr) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared);
}
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t = 0, cudaStream_t = nullptr) { return simt::refuse_untyped("cudaLaunchKernel"); }
inline cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t = 0, cudaStream_t = nullptr) {
    return simt::refuse_untyped("cudaLaunchCooperativeKernel");
}
inline cudaError_t cudaProfilerStart() { return cudaSuccess; }
inline cudaError_t cudaProfilerStop() { return cudaSuccess; }
