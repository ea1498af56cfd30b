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
    X(InsufficientDriver, 35, "CUDA driver version is insufficient for CUDA runtime version") \
    X(DevicesUnavailable, 46, "CUDA-capable device(s) is/are busy or unavailable") \
    X(InvalidMemcpyDirection, 21, "invalid copy direction for memcpy") \
    X(InvalidDeviceFunction, 98, "invalid device function") \
    X(NoDevice, 100, "no CUDA-capable device is detected") \
    X(InvalidDevice, 101, "invalid device ordinal") \
    X(NoKernelImageForDevice, 209, "no kernel image is available for execution on the device") \
    X(ECCUncorrectable, 214, "uncorrectable ECC error encountered") \
    X(PeerAccessUnsupported, 217, "peer access is not supported between these two devices") \
    X(InvalidPtx, 218, "a PTX JIT compilation failed") \
    X(InvalidResourceHandle, 400, "invalid resource handle") \
    X(NotReady, 600, "device not ready") \
    X(IllegalAddress, 700, "an illegal memory access was encountered") \
    X(LaunchOutOfResources, 701, "too many resources requested for launch") \
    X(LaunchTimeout, 702, "the launch timed out and was terminated") \
    X(PeerAccessAlreadyEnabled, 704, "peer access is already enabled") \
    X(PeerAccessNotEnabled, 705, "peer access has not been enabled") \
    X(Assert, 710, "device-side assert triggered") \
    X(HostMemoryAlreadyRegistered, 712, "part or all of the requested memory range is already mapped") \
    X(HostMemoryNotRegistered, 713, "pointer does not correspond to a registered memory region") \
    X(MisalignedAddress, 716, "misaligned address") \
    X(LaunchFailure, 719, "unspecified launch failure") \
    X(CooperativeLaunchTooLarge, 720, "too many blocks in cooperative launch") \
    X(NotSupported, 801, "operation not supported") \
    X(InvalidClusterSize, 912, "cluster misconfiguration") \
    X(Unknown, 999, "unknown error")
enum cudaError_t {
    cudaSuccess = 0,
#define SIMT_ERROR(name, number, text) cudaError##name = number,
    SIMT_ERRORS(SIMT_ERROR)
#undef SIMT_ERROR
};
typedef cudaError_t cudaError;
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes {
    cudaMemoryType type;
    int device;
    void *devicePointer, *hostPointer;
};
enum cudaLimit { cudaLimitStackSize, cudaLimitPrintfFifoSize, cudaLimitMallocHeapSize, cudaLimitDevRuntimeSyncDepth, cudaLimitDevRuntimePendingLaunchCount, cudaLimitMaxL2FetchGranularity, cudaLimitPersistingL2CacheSize };
enum cudaMemoryAdvise { cudaMemAdviseSetReadMostly = 1, cudaMemAdviseUnsetReadMostly, cudaMemAdviseSetPreferredLocation, cudaMemAdviseUnsetPreferredLocation, cudaMemAdviseSetAccessedBy, cudaMemAdviseUnsetAccessedBy };
enum cudaSharedMemConfig { cudaSharedMemBankSizeDefault, cudaSharedMemBankSizeFourByte, cudaSharedMemBankSizeEightByte };
enum cudaComputeMode { cudaComputeModeDefault, cudaComputeModeExclusive, cudaComputeModeProhibited, cudaComputeModeExclusiveProcess };
constexpr int cudaCpuDeviceId = -1, cudaInvalidDeviceId = -2;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaFuncCache { cudaFuncCachePreferNone, cudaFuncCachePreferShared, cudaFuncCachePreferL1, cudaFuncCachePreferEqual };
// X(name, number, what of the properties p)
#define SIMT_ATTRIBUTES(X) \
    X(MaxThreadsPerBlock, 1, p.maxThreadsPerBlock) X(MaxBlockDimX, 2, p.maxThreadsDim[0]) X(MaxBlockDimY, 3, p.maxThreadsDim[1]) \
    X(MaxBlockDimZ, 4, p.maxThreadsDim[2]) X(MaxGridDimX, 5, p.maxGridSize[0]) X(MaxGridDimY, 6, p.maxGridSize[1]) \
    X(MaxGridDimZ, 7, p.maxGridSize[2]) X(MaxSharedMemoryPerBlock, 8, p.sharedMemPerBlock) X(TotalConstantMemory, 9, p.totalConstMem) \
    X(WarpSize, 10, p.warpSize) X(MaxPitch, 11, p.memPitch) X(MaxRegistersPerBlock, 12, p.regsPerBlock) X(ClockRate, 13, p.clockRate) \
    X(TextureAlignment, 14, p.textureAlignment) X(GpuOverlap, 15, p.deviceOverlap) X(MultiProcessorCount, 16, p.multiProcessorCount) \
    X(KernelExecTimeout, 17, p.kernelExecTimeoutEnabled) X(Integrated, 18, p.integrated) X(CanMapHostMemory, 19, p.canMapHostMemory) \
    X(ComputeMode, 20, p.computeMode) X(ConcurrentKernels, 31, p.concurrentKernels) X(EccEnabled, 32, p.ECCEnabled) X(PciBusId, 33, p.pciBusID) \
    X(PciDeviceId, 34, p.pciDeviceID) X(TccDriver, 35, p.tccDriver) X(MemoryClockRate, 36, p.memoryClockRate) \
    X(GlobalMemoryBusWidth, 37, p.memoryBusWidth) X(L2CacheSize, 38, p.l2CacheSize) X(MaxThreadsPerMultiProcessor, 39, p.maxThreadsPerMultiProcessor) \
    X(AsyncEngineCount, 40, p.asyncEngineCount) X(UnifiedAddressing, 41, p.unifiedAddressing) X(PciDomainId, 50, p.pciDomainID) \
    X(ComputeCapabilityMajor, 75, p.major) X(ComputeCapabilityMinor, 76, p.minor) X(StreamPrioritiesSupported, 78, p.streamPrioritiesSupported) \
    X(GlobalL1CacheSupported, 79, p.globalL1CacheSupported) X(LocalL1CacheSupported, 80, p.localL1CacheSupported) \
    X(MaxSharedMemoryPerMultiprocessor, 81, p.sharedMemPerMultiprocessor) X(MaxRegistersPerMultiprocessor, 82, p.regsPerMultiprocessor) \
    X(ManagedMemory, 83, p.managedMemory) X(IsMultiGpuBoard, 84, p.isMultiGpuBoard) X(SingleToDoublePrecisionPerfRatio, 87, p.singleToDoublePrecisionPerfRatio) \
    X(PageableMemoryAccess, 88, p.pageableMemoryAccess) X(ConcurrentManagedAccess, 89, p.concurrentManagedAccess) \
    X(ComputePreemptionSupported, 90, p.computePreemptionSupported) X(CooperativeLaunch, 95, p.cooperativeLaunch) \
    X(MaxSharedMemoryPerBlockOptin, 97, p.sharedMemPerBlockOptin) X(HostRegisterSupported, 99, p.hostRegisterSupported) \
    X(MaxBlocksPerMultiprocessor, 106, p.maxBlocksPerMultiProcessor) X(ReservedSharedMemoryPerBlock, 111, p.reservedSharedMemPerBlock) \
    X(MemoryPoolsSupported, 115, p.memoryPoolsSupported) X(ClusterLaunch, 120, p.clusterLaunch)
enum cudaDeviceAttr {
#define SIMT_ATTRIBUTE(name, number, value) cudaDevAttr##name = number,
    SIMT_ATTRIBUTES(SIMT_ATTRIBUTE)
#undef SIMT_ATTRIBUTE
};
enum {
    cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2, cudaEventInterprocess = 4, cudaEventRecordDefault = 0, cudaEventWaitDefault = 0,
    cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2, cudaHostAllocWriteCombined = 4,
    cudaHostRegisterDefault = 0, cudaHostRegisterPortable = 1, cudaHostRegisterMapped = 2, cudaHostRegisterIoMemory = 4, cudaHostRegisterReadOnly = 8,
    cudaMemAttachGlobal = 1, cudaMemAttachHost = 2, cudaMemAttachSingle = 4, cudaDeviceScheduleAuto = 0, cudaDeviceScheduleSpin = 1, cudaDeviceScheduleYield = 2,
    cudaDeviceScheduleBlockingSync = 4, cudaDeviceBlockingSync = 4, cudaDeviceMapHost = 8, cudaDeviceLmemResizeToMax = 16, cudaOccupancyDefault = 0, cudaPeerAccessDefault = 0
};
struct simt_event { double milliseconds; };  // 0: never recorded
struct simt_stream { unsigned flags; int priority; };
typedef simt_stream* cudaStream_t;
typedef simt_event* cudaEvent_t;
#define cudaStreamLegacy ((cudaStream_t)1)
#define cudaStreamPerThread ((cudaStream_t)2)
typedef void (*cudaStreamCallback_t)(cudaStream_t stream, cudaError_t status, void* data);
typedef void (*cudaHostFn_t)(void* data);
struct cudaUUID_t { char bytes[16]; };
struct cudaDeviceProp {
    char name[256];
    cudaUUID_t uuid;
    int major, minor, multiProcessorCount, maxThreadsPerBlock, maxThreadsPerMultiProcessor, maxBlocksPerMultiProcessor, warpSize, clockRate, memoryClockRate,
        memoryBusWidth, l2CacheSize, persistingL2CacheMaxSize, accessPolicyMaxWindowSize, regsPerBlock, regsPerMultiprocessor, maxThreadsDim[3], maxGridSize[3];
    int deviceOverlap, asyncEngineCount, kernelExecTimeoutEnabled, integrated, canMapHostMemory, computeMode, concurrentKernels, ECCEnabled, pciBusID, pciDeviceID,
        pciDomainID, tccDriver, unifiedAddressing, streamPrioritiesSupported, globalL1CacheSupported, localL1CacheSupported, managedMemory, isMultiGpuBoard,
        multiGpuBoardGroupID, hostNativeAtomicSupported, singleToDoublePrecisionPerfRatio, pageableMemoryAccess, concurrentManagedAccess,
        computePreemptionSupported, canUseHostPointerForRegisteredMem, cooperativeLaunch, cooperativeMultiDeviceLaunch, pageableMemoryAccessUsesHostPageTables,
        directManagedMemAccessFromHost, hostRegisterSupported, memoryPoolsSupported, clusterLaunch;
    int maxTexture1D, maxTexture1DLinear, maxTexture2D[2], maxTexture3D[3], maxTexture1DLayered[2], maxTexture2DLayered[3];  // 0: there are none
    size_t totalGlobalMem, totalConstMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor, reservedSharedMemPerBlock, memPitch,
        textureAlignment, texturePitchAlignment, surfaceAlignment;
};
// What only a compiler for the device knows, registers above all, is invented.
struct cudaFuncAttributes {
    size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, cacheModeCA, maxDynamicSharedSizeBytes, preferredShmemCarveout;
};
struct cudaPitchedPtr { void* ptr; size_t pitch, xsize, ysize; };
struct cudaExtent { size_t width, height, depth; };
struct cudaPos { size_t x, y, z; };
typedef struct cudaArray* cudaArray_t;  // there are none: always null
struct cudaMemcpy3DParms {
    cudaArray_t srcArray;
    cudaPos srcPos;
    cudaPitchedPtr srcPtr;
    cudaArray_t dstArray;
    cudaPos dstPos;
    cudaPitchedPtr dstPtr;
    cudaExtent extent;
    cudaMemcpyKind kind;
};
inline cudaPitchedPtr make_cudaPitchedPtr(void* p, size_t pitch, size_t width, size_t height) { return {p, pitch, width, height}; }
inline cudaExtent make_cudaExtent(size_t width, size_t height, size_t depth) { return {width, height, depth}; }
inline cudaPos make_cudaPos(size_t x, size_t y, size_t z) { return {x, y, z}; }
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore, cudaLaunchAttributeAccessPolicyWindow, cudaLaunchAttributeCooperative, cudaLaunchAttributeSynchronizationPolicy, cudaLaunchAttributeClusterDimension, cudaLaunchAttributeClusterSchedulingPolicyPreference, cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeProgrammaticEvent, cudaLaunchAttributePriority };
union cudaLaunchAttributeValue {
    int cooperative, programmaticStreamSerializationAllowed, priority;
    struct { unsigned x, y, z; } clusterDim;
    char pad[64];
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    cudaLaunchAttributeValue val;
};
#ifndef gridDim
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
#endif

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
cudaError_t cudaMemcpy3D(const cudaMemcpy3DParms* p);
cudaError_t cudaMemset(void* to, int value, size_t bytes);
cudaError_t cudaMemset2D(void* to, size_t pitch, int value, size_t width, size_t height);
cudaError_t cudaMemset3D(cudaPitchedPtr to, int value, cudaExtent extent);
cudaError_t cudaMalloc3D(cudaPitchedPtr* p, cudaExtent extent);
cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned flags);
cudaError_t cudaHostUnregister(void* p);
cudaError_t cudaMemPrefetchAsync(const void* p, size_t bytes, int device, cudaStream_t stream = nullptr);
cudaError_t cudaMemAdvise(const void* p, size_t bytes, cudaMemoryAdvise advice, int device);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p);
cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit limit);
cudaError_t cudaDeviceSetLimit(cudaLimit limit, size_t value);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags);
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority);
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to);
cudaError_t cudaEventDestroy(cudaEvent_t event);

namespace simt {
cudaError_t launch_untyped(const char* call, const void* kernel, const Config& config, void** arguments);
#ifndef gridDim
cudaError_t read_config(const cudaLaunchConfig_t& from, Config& config);
#endif
cudaError_t allocate(void** p, size_t bytes);
cudaError_t allocate_host(void** p, size_t bytes);
cudaError_t allocate_managed(void** p, size_t bytes);
cudaError_t copy_symbol(void* symbol, size_t size, size_t offset, void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t function_attributes(cudaFuncAttributes* attributes, const void* kernel);
int resident_blocks(int threads, size_t shared);  // on one multiprocessor
const char* kernel_name(const void* kernel);  // of its symbol
cudaError_t set_attribute(const void* kernel, int attribute, int value);
}  // namespace simt

template <class T> cudaError_t cudaMalloc(T** p, size_t bytes) { return simt::allocate(reinterpret_cast<void**>(p), bytes); }
template <class T> cudaError_t cudaMallocManaged(T** p, size_t bytes, unsigned = 1) { return simt::allocate_managed(reinterpret_cast<void**>(p), bytes); }
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
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t = nullptr) {
    return cudaMemcpy2D(to, to_pitch, from, from_pitch, width, height, kind);
}
inline cudaError_t cudaMemcpy3DAsync(const cudaMemcpy3DParms* p, cudaStream_t = nullptr) { return cudaMemcpy3D(p); }
inline cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t bytes) { return cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToDevice); }
inline cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t = nullptr) { return cudaMemcpyPeer(to, 0, from, 0, bytes); }
inline cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t = nullptr) { return cudaMemset2D(to, pitch, value, width, height); }
inline cudaError_t cudaMemset3DAsync(cudaPitchedPtr to, int value, cudaExtent extent, cudaStream_t = nullptr) { return cudaMemset3D(to, value, extent); }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) { return cudaMemset(to, value, bytes); }
template <class T> cudaError_t cudaMemcpyToSymbol(T& symbol, const void* from, size_t bytes, size_t offset = 0, cudaMemcpyKind kind = cudaMemcpyHostToDevice) {
    return simt::copy_symbol((void*)&symbol, sizeof symbol, offset, nullptr, from, bytes, kind);
}
template <class T> cudaError_t cudaMemcpyFromSymbol(void* to, const T& symbol, size_t bytes, size_t offset = 0, cudaMemcpyKind kind = cudaMemcpyDeviceToHost) {
    return simt::copy_symbol((void*)&symbol, sizeof symbol, offset, to, nullptr, bytes, kind);
}
template <class T>
cudaError_t cudaMemcpyToSymbolAsync(T& symbol, const void* from, size_t bytes, size_t offset = 0, cudaMemcpyKind kind = cudaMemcpyHostToDevice, cudaStream_t = nullptr) {
    return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}
template <class T>
cudaError_t cudaMemcpyFromSymbolAsync(void* to, const T& symbol, size_t bytes, size_t offset = 0, cudaMemcpyKind kind = cudaMemcpyDeviceToHost, cudaStream_t = nullptr) {
    return cudaMemcpyFromSymbol(to, symbol, bytes, offset, kind);
}
template <class T> cudaError_t cudaGetSymbolAddress(void** p, const T& symbol) { return *p = (void*)&symbol, cudaSuccess; }
template <class T> cudaError_t cudaGetSymbolSize(size_t* bytes, const T& symbol) { return *bytes = sizeof symbol, cudaSuccess; }
template <class T> cudaError_t cudaHostGetFlags(unsigned* flags, T*) { return *flags = cudaHostAllocMapped, cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) { return cudaStreamCreateWithPriority(stream, flags, 0); }
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }
inline cudaError_t cudaStreamQuery(cudaStream_t) { return cudaDeviceSynchronize(); }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0) { return cudaSuccess; }
template <class T> cudaError_t cudaStreamAttachMemAsync(cudaStream_t, T*, size_t = 0, unsigned = 4) { return cudaSuccess; }
inline cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) { return call(stream, cudaDeviceSynchronize(), data), cudaSuccess; }
inline cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t call, void* data) { return call(data), cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
inline cudaError_t cudaEventCreate(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
inline cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream = nullptr, unsigned = 0) { return cudaEventRecord(event, stream); }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaDeviceSynchronize(); }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cudaDeviceSynchronize(); }
inline cudaError_t cudaThreadSynchronize() { return cudaDeviceSynchronize(); }
inline cudaError_t cudaThreadExit() { return cudaDeviceReset(); }
inline cudaError_t cudaChooseDevice(int* device, const cudaDeviceProp*) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceFlags(unsigned* flags) { return *flags = cudaDeviceMapHost, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
inline cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaErrorPeerAccessUnsupported; }
inline cudaError_t cudaDeviceDisablePeerAccess(int) { return cudaErrorPeerAccessNotEnabled; }
inline cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int) { return snprintf(text, size_t(length), "0000:00:00.0"), cudaSuccess; }
inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
inline cudaError_t cudaDeviceSetCacheConfig(cudaFuncCache) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetCacheConfig(cudaFuncCache* config) { return *config = cudaFuncCachePreferNone, cudaSuccess; }
inline cudaError_t cudaDeviceSetSharedMemConfig(cudaSharedMemConfig) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetSharedMemConfig(cudaSharedMemConfig* config) { return *config = cudaSharedMemBankSizeFourByte, cudaSuccess; }
template <class F> cudaError_t cudaFuncSetAttribute(F kernel, cudaFuncAttribute attribute, int value) {
    return simt::set_attribute((const void*)kernel, attribute, value);
}
template <class F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F kernel) { return simt::function_attributes(attributes, (const void*)kernel); }
template <class F> cudaError_t cudaFuncSetCacheConfig(F, cudaFuncCache) { return cudaSuccess; }
template <class F> cudaError_t cudaFuncSetSharedMemConfig(F, cudaSharedMemConfig) { return cudaSuccess; }
template <class F> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F, int threads, size_t shared) {
    return *blocks = simt::resident_blocks(threads, shared), cudaSuccess;
}
template <class F> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, F kernel, int threads, size_t shared, unsigned) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared);
}
// The block for which most threads are resident, the largest of several.
template <class S, class F> cudaError_t cudaOccupancyMaxPotentialBlockSizeVariableSMem(int* grid, int* block, F, S shared_of, int limit = 0) {
    *grid = *block = 0;
    if (limit < 1 || limit > 1024) limit = 1024;
    for (int warps = (limit + 31) / 32, most = 0; warps > 0; warps--) {
        const int threads = warps * 32 < limit ? warps * 32 : limit;
        const int blocks = simt::resident_blocks(threads, shared_of(threads));
        if (blocks * threads > most) most = blocks * threads, *block = threads, *grid = 4 * blocks;
    }
    return cudaSuccess;
}
template <class F> cudaError_t cudaOccupancyMaxPotentialBlockSize(int* grid, int* block, F kernel, size_t shared = 0, int limit = 0) {
    return cudaOccupancyMaxPotentialBlockSizeVariableSMem(grid, block, kernel, [=](int) { return shared; }, limit);
}
namespace simt {
template <class... A, size_t... I>
cudaError_t launch_kernel(void (*kernel)(A...), const Config& config, void** arguments, std::index_sequence<I...>) {
    (void)arguments;
    launch(kernel_name((const void*)kernel), config, [=](auto... a) { kernel(a...); }, *static_cast<std::decay_t<A>*>(arguments[I])...);
    return cudaGetLastError();
}
}  // namespace simt
// Of a kernel, and of a void* that is one. The source step takes casts to void* away.
template <class... A>
cudaError_t cudaLaunchKernel(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments, size_t shared = 0, cudaStream_t stream = nullptr) {
    return simt::launch_kernel(kernel, {grid, block, shared, stream}, arguments, std::index_sequence_for<A...>());
}
template <class... A>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments, size_t shared = 0, cudaStream_t stream = nullptr) {
    return simt::launch_kernel(kernel, {grid, block, shared, stream, true}, arguments, std::index_sequence_for<A...>());
}
inline cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared = 0, cudaStream_t stream = nullptr) {
    return simt::launch_untyped("cudaLaunchKernel", kernel, {grid, block, shared, stream}, arguments);
}
inline cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared = 0, cudaStream_t stream = nullptr) {
    return simt::launch_untyped("cudaLaunchCooperativeKernel", kernel, {grid, block, shared, stream, true}, arguments);
}
#ifndef gridDim
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
    simt::Config read({}, {});
    if (const cudaError_t e = simt::read_config(*config, read)) return e;
    simt::launch_as(simt::kernel_name((const void*)kernel), read, kernel, std::forward<A>(arguments)...);
    return cudaGetLastError();
}
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
    simt::Config read({}, {});
    if (const cudaError_t e = simt::read_config(*config, read)) return e;
    return simt::launch_untyped("cudaLaunchKernelExC", kernel, read, arguments);
}
template <class... A>
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, void (*kernel)(A...), void** arguments) {
    simt::Config read({}, {});
    if (const cudaError_t e = simt::read_config(*config, read)) return e;
    return simt::launch_kernel(kernel, read, arguments, std::index_sequence_for<A...>());
}
#endif
inline cudaError_t cudaProfilerStart() { return cudaSuccess; }
inline cudaError_t cudaProfilerStop() { return cudaSuccess; }
