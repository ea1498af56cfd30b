// CUDA's runtime API, as far as cuda_runtime.h has it, on the emulator's memory and launches.
#include "machine.h"

#include <chrono>

#include "cuda_runtime.h"

extern "C" {
void* emu_malloc(size_t bytes);
int emu_free(void* p);
const char* emu_last_error();
}

static cudaError_t last = cudaSuccess;   // what cudaGetLastError forgets
static cudaError_t sticky = cudaSuccess;  // a kernel's fault ends the context

static cudaError_t note(cudaError_t error) {
    if (error) last = error;
    return error;
}

namespace simt {

void launched(int code) {
    if (code == 1) last = cudaErrorInvalidConfiguration;
    if (code == 2) last = sticky = cudaErrorLaunchFailure;
    if (code) fprintf(stderr, "%s\n", emu_last_error());
}

cudaError_t allocate(void** p, size_t bytes) {
    *p = bytes ? emu_malloc(bytes) : nullptr;
    return note(*p || !bytes ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t allocate_host(void** p, size_t bytes) {
    return allocate(p, bytes);  // kernels may use it
}

// A copy that does not fit is refused, as on a device, and is a finding: few programs ask whether it was.
template <class... A>
static cudaError_t refuse(const char* format, A... arguments) {
    refused(format, arguments...);
    fprintf(stderr, "%s\n", emu_last_error());
    return note(cudaErrorInvalidValue);
}

cudaError_t copy_symbol(void* symbol, size_t size, size_t offset, void* to, const void* from, size_t bytes) {
    if (sticky) return sticky;
    if (offset > size || bytes > size - offset)
        return refuse("%s: %zu bytes from byte %zu on of the variable %s of %zu bytes", from ? "cudaMemcpyToSymbol" : "cudaMemcpyFromSymbol", bytes, offset,
                      variable_name(uintptr_t(symbol)).c_str(), size);
    unsigned char* at = static_cast<unsigned char*>(symbol) + offset;
    if (from) memcpy(at, from, bytes);
    else memcpy(to, at, bytes);
    return cudaSuccess;
}

cudaError_t refuse_untyped(const char* call) { return refuse("%s of a void*: the emulator needs the kernel itself, whose type says its parameters", call); }

cudaError_t set_attribute(const void* kernel, int attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    return value < 0 || !allow_dynamic(kernel, size_t(value)) ? note(cudaErrorInvalidValue) : cudaSuccess;
}

// Refuses a range that begins in an allocation of the device and is not wholly inside.
static cudaError_t check_range(const char* call, const char* what, const void* p, size_t bytes) {
    if (bytes && !p) return refuse("%s: %zu bytes %s a null pointer", call, bytes, what);
    if (bytes && was_freed(uintptr_t(p))) return refuse("%s: %zu bytes %s memory that has been freed", call, bytes, what);
    const Allocation* a = find_allocation(uintptr_t(p));
    if (!bytes || !a || uintptr_t(p) >= a->map_end || (uintptr_t(p) < a->end && uintptr_t(p) + bytes <= a->end)) return cudaSuccess;
    return refuse("%s: %zu bytes %s an allocation of %zu bytes, from byte %zu on", call, bytes, what, size_t(a->end - a->begin), size_t(uintptr_t(p) - a->begin));
}

}  // namespace simt

const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorInvalidConfiguration || error == cudaErrorLaunchFailure) return emu_last_error();
    switch (error) {
        case cudaSuccess: return "no error";
#define SIMT_ERROR(name, number, text) case cudaError##name: return text;
        SIMT_ERRORS(SIMT_ERROR)
#undef SIMT_ERROR
    }
    return "unrecognized error code";
}
const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
#define SIMT_ERROR(name, number, text) case cudaError##name: return "cudaError" #name;
        SIMT_ERRORS(SIMT_ERROR)
#undef SIMT_ERROR
    }
    return "unrecognized error code";
}
cudaError_t cudaGetLastError() {
    const cudaError_t error = last;
    last = sticky;
    return error;
}
cudaError_t cudaPeekAtLastError() { return last; }
cudaError_t cudaDeviceSynchronize() { return sticky; }
cudaError_t cudaDeviceReset() { return last = sticky = cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return note(device ? cudaErrorInvalidDevice : cudaSuccess); }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    *p = {};
    strcpy(p->name, "CPU");
    p->major = 8, p->minor = 6, p->multiProcessorCount = 4, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 1536;
    p->warpSize = 32, p->clockRate = 1000000, p->memoryClockRate = 1000000, p->memoryBusWidth = 64, p->l2CacheSize = 1 << 20;
    p->regsPerBlock = 65536;
    for (int i = 0; i < 3; i++) p->maxThreadsDim[i] = i < 2 ? 1024 : 64, p->maxGridSize[i] = i ? 65535 : 0x7fffffff;
    p->totalGlobalMem = size_t(4) << 30, p->totalConstMem = 64 << 10;
    p->sharedMemPerBlock = simt::kSharedDefault, p->sharedMemPerBlockOptin = simt::kSharedMax, p->sharedMemPerMultiprocessor = 100 << 10;
    return note(device ? cudaErrorInvalidDevice : cudaSuccess);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(p.sharedMemPerBlock); break;
        case cudaDevAttrWarpSize: *value = p.warpSize; break;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
        case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(p.sharedMemPerBlockOptin); break;
        default: return note(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { return *free = *total = size_t(4) << 30, cudaSuccess; }
cudaError_t cudaFree(void* p) {
    if (p && simt::was_freed(uintptr_t(p))) return simt::refuse("cudaFree: this memory has been freed before");
    if (!emu_free(p)) return note(sticky);
    return simt::refuse("cudaFree: %p is not what an allocation returned", p);
}
cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    if (sticky) return sticky;
    if (cudaError_t e = simt::check_range("cudaMemcpy", "to", to, bytes)) return e;
    if (cudaError_t e = simt::check_range("cudaMemcpy", "from", from, bytes)) return e;
    memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind) {
    if (width > to_pitch || width > from_pitch) return simt::refuse("cudaMemcpy2D: rows of %zu bytes with pitches of %zu and %zu", width, to_pitch, from_pitch), note(cudaErrorInvalidPitchValue);
    for (size_t y = 0; y < height; y++)
        if (cudaError_t e = cudaMemcpy(static_cast<char*>(to) + y * to_pitch, static_cast<const char*>(from) + y * from_pitch, width, kind)) return e;
    return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    if (sticky) return sticky;
    if (cudaError_t e = simt::check_range("cudaMemset", "to", to, bytes)) return e;
    memset(to, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = new simt_event{0}, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    event->milliseconds = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    return *milliseconds = float(std::max(to->milliseconds - from->milliseconds, 1e-3)), cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
