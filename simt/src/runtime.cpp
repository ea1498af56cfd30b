// CUDA's runtime API, as far as cuda_runtime.h has it, on the emulator's memory and launches.
#include "machine.h"

#include <algorithm>
#include <chrono>
#include <utility>

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
    if (code == 3) last = cudaErrorCooperativeLaunchTooLarge;
    if (code == 4) last = cudaErrorInvalidClusterSize;
    if (code == 2) last = sticky = cudaErrorLaunchFailure;
    if (code) fprintf(stderr, "%s\n", emu_last_error());
}

cudaError_t allocate(void** p, size_t bytes) {
    *p = bytes ? emu_malloc(bytes) : nullptr;
    return note(*p || !bytes ? cudaSuccess : cudaErrorMemoryAllocation);
}

// Kernels may use either.
static cudaError_t allocate_at(Home home, void** p, size_t bytes) {
    const cudaError_t error = allocate(p, bytes);
    if (*p) set_home(*p, home);
    return error;
}
cudaError_t allocate_host(void** p, size_t bytes) { return allocate_at(Home::pinned, p, bytes); }
cudaError_t allocate_managed(void** p, size_t bytes) { return allocate_at(Home::managed, p, bytes); }

// A copy that does not fit is refused, as on a device. It is also a finding, since few programs ask whether a copy was
// refused.
template <class... A>
static cudaError_t refuse(const char* format, A... arguments) {
    refused(format, arguments...);
    fprintf(stderr, "%s\n", emu_last_error());
    return note(cudaErrorInvalidValue);
}

// As whose memory a copy's kind may name this pointer. A variable of the program may be the host's or the device's.
enum class Whose { host, device, both };
static Whose whose(const void* p) {
    const Allocation* a = find_allocation(uintptr_t(p));
    if (a && uintptr_t(p) < a->map_end) return a->home == Home::device ? Whose::device : Whose::both;
    return find_object(uintptr_t(p)) ? Whose::both : Whose::host;
}
// Refuses a copy whose kind contradicts its pointers; null stands for a variable of the device.
static cudaError_t refuse_direction(const char* call, const void* to, const void* from, cudaMemcpyKind kind) {
    static const char* const names[] = {"cudaMemcpyHostToHost", "cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice"};
    if (unsigned(kind) > cudaMemcpyDefault) return note(cudaErrorInvalidMemcpyDirection);
    if (kind == cudaMemcpyDefault) return cudaSuccess;
    for (const bool is_to : {true, false}) {
        const bool device = is_to ? kind & cudaMemcpyHostToDevice : kind & cudaMemcpyDeviceToHost;
        const void* p = is_to ? to : from;
        if ((p ? whose(p) : Whose::device) == (device ? Whose::host : Whose::device))
            return refuse("%s: %s %s memory of the %s", call, names[kind], is_to ? "to" : "from", device ? "host" : "device");
    }
    return cudaSuccess;
}

cudaError_t copy_symbol(void* symbol, size_t size, size_t offset, void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (sticky) return sticky;
    const char* call = from ? "cudaMemcpyToSymbol" : "cudaMemcpyFromSymbol";
    if (offset > size || bytes > size - offset)
        return refuse("%s: %zu bytes from byte %zu on of the variable %s of %zu bytes", call, bytes, offset, variable_name(uintptr_t(symbol)).c_str(), size);
    if (cudaError_t e = refuse_direction(call, to, from, kind)) return e;
    unsigned char* at = static_cast<unsigned char*>(symbol) + offset;
    launches_are_over();
    if (from) memcpy(at, from, bytes);
    else memcpy(to, at, bytes);
    return cudaSuccess;
}

// A kernel of which only the address is known. Its symbol says what its parameters are. By the System V ABI, whole numbers,
// pointers and floats have their registers, and those that find none are on the stack in their order. So one call serves
// all signatures.
namespace {
struct Words {
    const void* function;
    uint64_t integers[6], stack[24];
    double reals[8];
};
template <size_t, class T> using Each = T;
template <size_t... I, size_t... R, size_t... S>
void call(const Words& w, std::index_sequence<I...>, std::index_sequence<R...>, std::index_sequence<S...>) {
    using F = void (*)(Each<I, uint64_t>..., Each<R, double>..., Each<S, uint64_t>...);
    reinterpret_cast<F>(const_cast<void*>(w.function))(w.integers[I]..., w.reals[R]..., w.stack[S]...);
}
void call_words(const Kernel&, const unsigned char* params) {
    call(*reinterpret_cast<const Words*>(params), std::make_index_sequence<6>(), std::make_index_sequence<8>(), std::make_index_sequence<24>());
}
}  // namespace

cudaError_t launch_untyped(const char* call, const void* kernel, const Config& config, void** arguments) {
    static const std::pair<const char*, int> scalars[] = {{"int", 4}, {"unsigned int", 4}, {"long", 8}, {"unsigned long", 8}, {"long long", 8},
        {"unsigned long long", 8}, {"bool", 1}, {"char", -1}, {"signed char", -1}, {"unsigned char", 1}, {"short", -2}, {"unsigned short", 2}, {"__half", 2}, {"__nv_bfloat16", 2}};
    const std::string signature = kernel_signature(kernel);
    const size_t open = parameters_of(signature);
    if (signature.empty() || open == signature.npos)
        return refuse("%s of a void*: %s; pass the kernel itself, whose type says its parameters", call, signature.empty() ? "there is no kernel" : "a kernel that is extern \"C\"");
    Words words = {};
    words.function = kernel;
    unsigned integers = 0, reals = 0, stack = 0, i = 0;
    int depth = 0;
    std::string type;
    for (size_t at = open + 1; at < signature.size(); at++) {
        const char c = signature[at];
        if (depth || (c != ',' && c != ')')) {
            depth += (c == '<' || c == '(') - (c == '>' || c == ')');
            type += c;
            continue;
        }
        for (size_t gap; (gap = type.find(" const")) != type.npos;) type.erase(gap, 6);
        type.erase(0, type.find_first_not_of(' '));
        const bool real = type == "float" || type == "double", pointer = !type.empty() && (type.back() == '*' || type.find("(*)") != type.npos);
        int size = type == "float" ? 4 : 8;
        if (type.empty() && c == ')') break;
        if (!real && !pointer) {
            const auto known = std::find_if(std::begin(scalars), std::end(scalars), [&](const auto& s) { return type == s.first; });
            if (known == std::end(scalars)) return refuse("%s of a void*: a parameter of type %s; pass the kernel itself, %s", call, type.c_str(), kernel_name(kernel));
            size = known->second;
        }
        uint64_t word = 0;
        memcpy(&word, arguments[i++], size_t(abs(size)));
        if (size < 0) word = uint64_t(int64_t(word << (64 + 8 * size)) >> (64 + 8 * size));
        if (real && reals < 8) memcpy(&words.reals[reals++], &word, 8);
        else if (!real && integers < 6) words.integers[integers++] = word;
        else if (stack < 24) words.stack[stack++] = word;
        else return refuse("%s of a void*: too many parameters; pass the kernel itself, %s", call, kernel_name(kernel));
        type.clear();
        if (c == ')') break;
    }
    run(kernel_name(kernel), config, call_words, &words, sizeof words);
    return cudaGetLastError();
}

cudaError_t read_config(const cudaLaunchConfig_t& from, Config& config) {
    config = {from.gridDim, from.blockDim, from.dynamicSmemBytes, from.stream};
    for (unsigned i = 0; i < from.numAttrs; i++) {
        const auto& [id, value] = from.attrs[i];
        if (id == cudaLaunchAttributeClusterDimension) config.cluster = {value.clusterDim.x, value.clusterDim.y, value.clusterDim.z};
        if (id == cudaLaunchAttributeProgrammaticStreamSerialization && value.programmaticStreamSerializationAllowed) overlap_next();
        if (id == cudaLaunchAttributeCooperative && value.cooperative) config.cooperative = true;
    }
    return cudaSuccess;
}

cudaError_t function_attributes(cudaFuncAttributes* a, const void* kernel) {
    *a = {};
    a->maxThreadsPerBlock = kMaxThreads, a->numRegs = 32, a->ptxVersion = a->binaryVersion = 86, a->maxDynamicSharedSizeBytes = int(allowed_dynamic(kernel));
    return kernel_signature(kernel).empty() ? note(cudaErrorInvalidDeviceFunction) : cudaSuccess;
}

// By threads and shared memory, of which a block takes 1 KB more.
int resident_blocks(int threads, size_t shared) {
    if (threads < 1 || threads > kMaxThreads || shared > kSharedMax) return 0;
    return std::min({16, 1536 / ((threads + 31) / 32 * 32), int((size_t(100) << 10) / (shared + 1024))});
}

cudaError_t set_attribute(const void* kernel, int attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    return value < 0 || !allow_dynamic(kernel, size_t(value)) ? note(cudaErrorInvalidValue) : cudaSuccess;
}

// Refuses a range that begins in an allocation of the device and does not end in it.
static cudaError_t refuse_outside(const char* call, const char* what, const void* p, size_t bytes) {
    if (bytes && !p) return refuse("%s: %zu bytes %s a null pointer", call, bytes, what);
    if (bytes && was_freed(uintptr_t(p))) return refuse("%s: %zu bytes %s memory that has been freed", call, bytes, what);
    const Allocation* a = find_allocation(uintptr_t(p));
    if (!bytes || !a || uintptr_t(p) >= a->map_end || (uintptr_t(p) < a->end && uintptr_t(p) + bytes <= a->end)) return cudaSuccess;
    return refuse("%s: %zu bytes %s an allocation of %zu bytes, from byte %zu on", call, bytes, what, size_t(a->end - a->begin), size_t(uintptr_t(p) - a->begin));
}

}  // namespace simt

const char* cudaGetErrorString(cudaError_t error) {
    for (const auto launch : {cudaErrorInvalidConfiguration, cudaErrorCooperativeLaunchTooLarge, cudaErrorInvalidClusterSize, cudaErrorLaunchFailure})
        if (error == launch) return emu_last_error();
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
cudaError_t cudaDeviceSynchronize() { return simt::launches_are_over(), sticky; }
cudaError_t cudaDeviceReset() { return last = sticky = cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return note(device ? cudaErrorInvalidDevice : cudaSuccess); }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    *p = {};
    strcpy(p->name, "CPU");
    p->major = 8, p->minor = 6, p->multiProcessorCount = 4, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 1536, p->maxBlocksPerMultiProcessor = 16;
    p->warpSize = 32, p->clockRate = 1000000, p->memoryClockRate = 1000000, p->memoryBusWidth = 64, p->l2CacheSize = 1 << 20;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->memPitch = 0x7fffffff, p->reservedSharedMemPerBlock = 1024, p->singleToDoublePrecisionPerfRatio = 32;
    p->textureAlignment = p->surfaceAlignment = 512, p->texturePitchAlignment = 32;
    for (int* yes : {&p->deviceOverlap, &p->asyncEngineCount, &p->canMapHostMemory, &p->concurrentKernels, &p->unifiedAddressing, &p->streamPrioritiesSupported,
                     &p->globalL1CacheSupported, &p->localL1CacheSupported, &p->managedMemory, &p->concurrentManagedAccess, &p->computePreemptionSupported,
                     &p->canUseHostPointerForRegisteredMem, &p->cooperativeLaunch, &p->clusterLaunch, &p->hostRegisterSupported, &p->memoryPoolsSupported})
        *yes = 1;
    for (int i = 0; i < 3; i++) p->maxThreadsDim[i] = i < 2 ? 1024 : 64, p->maxGridSize[i] = i ? 65535 : 0x7fffffff;
    p->totalGlobalMem = size_t(4) << 30, p->totalConstMem = 64 << 10;
    p->sharedMemPerBlock = simt::kSharedDefault, p->sharedMemPerBlockOptin = simt::kSharedMax, p->sharedMemPerMultiprocessor = 100 << 10;
    return note(device ? cudaErrorInvalidDevice : cudaSuccess);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (attribute) {
#define SIMT_ATTRIBUTE(name, number, field) case cudaDevAttr##name: *value = int(field); break;
        SIMT_ATTRIBUTES(SIMT_ATTRIBUTE)
#undef SIMT_ATTRIBUTE
        default: return note(cudaErrorInvalidValue);
    }
    return note(device ? cudaErrorInvalidDevice : cudaSuccess);
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { return *free = *total = size_t(4) << 30, cudaSuccess; }
static cudaError_t free_of(const char* call, void* p, bool pinned) {
    if (p && simt::was_freed(uintptr_t(p))) return simt::refuse("%s: this memory has been freed before", call);
    const simt::Allocation* a = simt::find_allocation(uintptr_t(p));
    if (p && a && a->begin == uintptr_t(p) && (a->home == simt::Home::pinned) != pinned)
        return simt::refuse("%s: of %s, which %s frees", call, pinned ? "memory of the device" : "pinned memory of the host", pinned ? "cudaFree" : "cudaFreeHost");
    if (!emu_free(p)) return note(sticky);
    return simt::refuse("%s: %p is not what an allocation returned", call, p);
}
cudaError_t cudaFree(void* p) { return free_of("cudaFree", p, false); }
cudaError_t cudaFreeHost(void* p) { return free_of("cudaFreeHost", p, true); }
static cudaError_t copy(const char* call, void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (sticky) return sticky;
    if (cudaError_t e = simt::refuse_outside(call, "to", to, bytes)) return e;
    if (cudaError_t e = simt::refuse_outside(call, "from", from, bytes)) return e;
    if (!bytes) return cudaSuccess;
    if (cudaError_t e = simt::refuse_direction(call, to, from, kind)) return e;
    simt::launches_are_over();
    memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) { return copy("cudaMemcpy", to, from, bytes, kind); }
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind) {
    if (width > to_pitch || width > from_pitch) return simt::refuse("cudaMemcpy2D: rows of %zu bytes with pitches of %zu and %zu", width, to_pitch, from_pitch), note(cudaErrorInvalidPitchValue);
    for (size_t y = 0; y < height; y++)
        if (cudaError_t e = copy("cudaMemcpy2D", static_cast<char*>(to) + y * to_pitch, static_cast<const char*>(from) + y * from_pitch, width, kind)) return e;
    return cudaSuccess;
}
cudaError_t cudaMemcpy3D(const cudaMemcpy3DParms* p) {
    if (p->srcArray || p->dstArray) return simt::refuse("cudaMemcpy3D: the emulator has no arrays");
    const auto at = [](const cudaPitchedPtr& q, const cudaPos& pos, size_t y, size_t z) {
        return static_cast<char*>(q.ptr) + ((pos.z + z) * q.ysize + pos.y + y) * q.pitch + pos.x;
    };
    if (p->srcPos.x + p->extent.width > p->srcPtr.pitch || p->dstPos.x + p->extent.width > p->dstPtr.pitch)
        return simt::refuse("cudaMemcpy3D: rows of %zu bytes with pitches of %zu and %zu", p->extent.width, p->dstPtr.pitch, p->srcPtr.pitch), note(cudaErrorInvalidPitchValue);
    for (size_t z = 0; z < p->extent.depth; z++)
        for (size_t y = 0; y < p->extent.height; y++)
            if (cudaError_t e = copy("cudaMemcpy3D", at(p->dstPtr, p->dstPos, y, z), at(p->srcPtr, p->srcPos, y, z), p->extent.width, p->kind)) return e;
    return cudaSuccess;
}
static cudaError_t set(const char* call, void* to, int value, size_t bytes) {
    if (sticky) return sticky;
    if (cudaError_t e = simt::refuse_outside(call, "to", to, bytes)) return e;
    if (bytes && simt::whose(to) == simt::Whose::host) return simt::refuse("%s: to memory of the host", call);
    simt::launches_are_over();
    memset(to, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return set("cudaMemset", to, value, bytes); }
cudaError_t cudaMemset2D(void* to, size_t pitch, int value, size_t width, size_t height) {
    if (width > pitch) return simt::refuse("cudaMemset2D: rows of %zu bytes with a pitch of %zu", width, pitch), note(cudaErrorInvalidPitchValue);
    for (size_t y = 0; y < height; y++)
        if (cudaError_t e = set("cudaMemset2D", static_cast<char*>(to) + y * pitch, value, width)) return e;
    return cudaSuccess;
}
cudaError_t cudaMemset3D(cudaPitchedPtr to, int value, cudaExtent extent) {
    for (size_t z = 0; z < extent.depth; z++)
        if (cudaError_t e = cudaMemset2D(static_cast<char*>(to.ptr) + z * to.ysize * to.pitch, to.pitch, value, extent.width, extent.height)) return e;
    return cudaSuccess;
}
cudaError_t cudaMalloc3D(cudaPitchedPtr* p, cudaExtent extent) {
    *p = {nullptr, 0, extent.width, extent.height};
    return cudaMallocPitch(&p->ptr, &p->pitch, extent.width, extent.height * extent.depth);
}
cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
    if (!p || !bytes) return note(cudaErrorInvalidValue);
    if (simt::whose(p) != simt::Whose::host && !simt::find_object(uintptr_t(p))) return note(cudaErrorHostMemoryAlreadyRegistered);
    simt::register_host(p, bytes);
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) { return note(simt::unregister_host(p) ? cudaSuccess : cudaErrorHostMemoryNotRegistered); }
// Advice changes nothing, but it must be about managed memory.
static cudaError_t advise(const char* call, const void* p, size_t bytes) {
    if (cudaError_t e = simt::refuse_outside(call, "of", p, bytes)) return e;
    const simt::Allocation* a = simt::find_allocation(uintptr_t(p));
    const bool managed = a && uintptr_t(p) < a->end ? a->home == simt::Home::managed : simt::find_object(uintptr_t(p)) != nullptr;
    return managed ? cudaSuccess : simt::refuse("%s: not of managed memory", call);
}
cudaError_t cudaMemPrefetchAsync(const void* p, size_t bytes, int, cudaStream_t) { return advise("cudaMemPrefetchAsync", p, bytes); }
cudaError_t cudaMemAdvise(const void* p, size_t bytes, cudaMemoryAdvise, int) { return advise("cudaMemAdvise", p, bytes); }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
    const simt::Allocation* a = simt::find_allocation(uintptr_t(p));
    void* q = const_cast<void*>(p);
    if (!a || uintptr_t(p) >= a->end) *attributes = {cudaMemoryTypeUnregistered, cudaInvalidDeviceId, nullptr, q};
    else if (a->home == simt::Home::device) *attributes = {cudaMemoryTypeDevice, 0, q, nullptr};
    else *attributes = {a->home == simt::Home::managed ? cudaMemoryTypeManaged : cudaMemoryTypeHost, 0, q, q};
    return cudaSuccess;
}
static size_t limits[] = {1024, 1 << 20, 8 << 20, 2, 2048, 64, 0};  // what a program asks for; the stack has always 64 KB, the heap what there is
cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit limit) {
    return unsigned(limit) < std::size(limits) ? *value = limits[limit], cudaSuccess : note(cudaErrorInvalidValue);
}
cudaError_t cudaDeviceSetLimit(cudaLimit limit, size_t value) {
    if (unsigned(limit) >= std::size(limits)) return note(cudaErrorInvalidValue);
    return limits[limit] = value, cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) { return *stream = new simt_stream{flags, priority}, cudaSuccess; }
static bool is_own(cudaStream_t stream) { return stream && stream != cudaStreamLegacy && stream != cudaStreamPerThread; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (!is_own(stream)) return note(cudaErrorInvalidResourceHandle);
    return delete stream, cudaSuccess;
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) { return *flags = is_own(stream) ? stream->flags : 0, cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) { return *priority = is_own(stream) ? stream->priority : 0, cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = new simt_event{0}, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    event->milliseconds = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    if (!from || !to || !from->milliseconds || !to->milliseconds) return simt::refuse("cudaEventElapsedTime: an event that was never recorded"), note(cudaErrorInvalidResourceHandle);
    return *milliseconds = float(std::max(to->milliseconds - from->milliseconds, 1e-3)), cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
