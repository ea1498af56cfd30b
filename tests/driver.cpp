// A libcuda.so.1 whose device is the kernels' emulator: as much of the driver as src/backend/gpu/cuda
// calls. So its files are tested on machines without a GPU (tests/kernels/cuda.rs); with nccl.cpp, several of them
// (tests/program/ranks.rs).
//
// It is as unfriendly as a driver may be. Nothing runs before somebody waits for it, and then only what that
// takes: a copy from pinned memory reads what is there at the last moment. With DRIVER_EARLY set, copies to
// the device run when they are given, long before the kernels given earlier on other streams. What a real
// driver refuses during a capture is refused, and ends the capture; a fault is sticky.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include <dlfcn.h>

namespace {

enum Result { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
              INVALID_HANDLE = 400, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700, UNSUPPORTED = 900, INVALIDATED = 901, INVALID_CLUSTER = 912, UNKNOWN = 999 };

constexpr size_t TOTAL = size_t(2) << 30;
constexpr int SHARED = 99 << 10;

using Work = std::function<int()>;

struct Record { bool done = false; struct Stream* stream = nullptr; };  // one recording of an event
struct Stream {
    std::deque<Work> queue;
    bool capturing = false, broken = false;
    bool after_launch = false;  // the last work given is a kernel
    std::vector<Work> captured;
};
struct Event { std::shared_ptr<Record> last; };
struct Graph { std::vector<Work> work; };
struct Function { std::string name; int allowed = 48 << 10; bool loaded = false; int ptx = getenv("DRIVER_OLD_CODE") ? 80 : 90; };

std::recursive_mutex lock;
std::map<std::string, Function> functions;
std::map<uint64_t, size_t> device_memory;
std::map<uintptr_t, size_t> pinned;
std::set<Stream*> streams;
std::set<Event*> events;
std::set<Graph*> graphs;
size_t used;
int fault;
struct Overlaps {  // launches that need not wait for the one before
    unsigned count = 0;
    ~Overlaps() { if (getenv("EDM2K_OVERLAP")) fprintf(stderr, "%u launches overlap\n", count); }
} overlaps;
thread_local Stream* capture;  // of this thread
thread_local void* current;
char context[1];

struct Emulator {
    void* library = dlopen(getenv("EMULATOR_LIBRARY"), RTLD_NOW);
    template <class F> F* get(const char* name) { return reinterpret_cast<F*>(dlsym(library, name)); }
    int (*launch)(const char*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void**) =
        get<int(const char*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void**)>("emu_launch");
    int (*info)(const char*, int*, size_t*, int) = get<int(const char*, int*, size_t*, int)>("emu_kernel_info");
    int (*allow)(const char*, size_t) = get<int(const char*, size_t)>("emu_set_max_dyn_smem");
    int (*config)(const char*, uint64_t) = get<int(const char*, uint64_t)>("emu_config");
    void* (*malloc)(size_t) = get<void*(size_t)>("emu_malloc");
    int (*free)(void*) = get<int(void*)>("emu_free");
};
Emulator& emulator() {
    static Emulator e;
    return e;
}

// Runs a stream's work, all of it or until a recording is done.
int drain(Stream* s, const Record* until = nullptr) {
    while (!s->queue.empty() && !(until && until->done)) {
        Work work = std::move(s->queue.front());
        s->queue.pop_front();
        if (fault) continue;
        if (int failed = work()) fault = failed;
    }
    return fault;
}

bool within(const std::map<uint64_t, size_t>& memory, uint64_t at, size_t bytes) {
    auto next = memory.upper_bound(at);
    if (next == memory.begin()) return false;
    --next;
    return at + bytes <= next->first + next->second;
}

int give(Stream* s, Work work) {
    if (!current) return INVALID_CONTEXT;
    if (!streams.count(s)) return INVALID_HANDLE;
    if (fault) return fault;
    s->after_launch = false;
    if (s->capturing) s->captured.push_back(std::move(work));
    else s->queue.push_back(std::move(work));
    return SUCCESS;
}

// What may not happen while this thread captures.
int forbidden() {
    if (!current) return INVALID_CONTEXT;
    if (capture) return capture->broken = true, int(UNSUPPORTED);
    return SUCCESS;
}

}  // namespace

// For nccl.cpp: work on a stream, which fails if it returns anything but 0.
extern "C" __attribute__((visibility("default"))) int driver_give(Stream* s, int (*work)(void*), void* about) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (int failed = give(s, [=] { return work(about) ? int(ILLEGAL_ADDRESS) : int(SUCCESS); })) return failed;
    return getenv("DRIVER_EARLY") ? drain(s) : int(SUCCESS);
}

#define API extern "C" __attribute__((visibility("default"))) int
#define LOCK std::lock_guard<std::recursive_mutex> guard(lock)
#define TRY(call) do { if (int failed_ = (call)) return failed_; } while (0)

API cuInit(unsigned) { return getenv("DRIVER_BROKEN") ? UNKNOWN : SUCCESS; }
API cuDriverGetVersion(int* version) { return *version = getenv("DRIVER_OLD") ? 11040 : 13000, SUCCESS; }
API cuDeviceGetCount(int* n) { return *n = 1, SUCCESS; }
API cuDeviceGet(int* device, int ordinal) { return *device = 7, ordinal == 0 ? SUCCESS : INVALID_DEVICE; }
API cuDeviceGetName(char* name, int size, int device) {
    return strncpy(name, "Emulated Card", size), device == 7 ? SUCCESS : INVALID_DEVICE;
}
// That of the card which CUDA_VISIBLE_DEVICES leaves.
API cuDeviceGetUuid_v2(char* uuid, int device) {
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    return memset(uuid, visible ? atoi(visible) + 1 : 1, 16), device == 7 ? SUCCESS : INVALID_DEVICE;
}
API cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = TOTAL, SUCCESS; }
// Its compute capability.
int card() {
    const char* set = getenv("DRIVER_CARD");
    return set ? atoi(set) : 90;
}
API cuDeviceGetAttribute(int* value, int which, int) {
    const std::map<int, int> known = {{75, card() / 10}, {76, card() % 10}, {16, 4}, {97, SHARED}, {81, SHARED + 1024},
                                      {38, 1 << 20}, {13, 1000000}, {36, 1000000}, {37, 256}};
    auto it = known.find(which);
    return it == known.end() ? INVALID_VALUE : (*value = it->second, SUCCESS);
}
API cuDevicePrimaryCtxRetain(void** c, int) { return *c = context, SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxSetCurrent(void* c) { return current = c, c == context ? SUCCESS : INVALID_CONTEXT; }
API cuMemGetInfo_v2(size_t* free, size_t* total) {
    LOCK;
    return *free = TOTAL - used, *total = TOTAL, fault;
}
API cuGetErrorName(int error, const char** name) {
    return *name = error == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_OTHER", SUCCESS;
}
API cuGetErrorString(int, const char** text) { return *text = "an emulated error", SUCCESS; }

// Whether a fatbin has code for the card: machine code of its generation, or PTX for it or an older one.
bool fits(const char* image) {
    struct Header { uint32_t magic; uint16_t version, bytes; uint64_t rest; } header;
    struct Entry { uint16_t kind, version; uint32_t bytes; uint64_t rest; uint32_t more[3], arch; } entry;
    memcpy(&header, image, sizeof header);
    const char *at = image + header.bytes, *end = at + header.rest;
    for (; at < end; at += entry.bytes + entry.rest) {
        memcpy(&entry, at, sizeof entry);
        const bool ptx = entry.kind == 1, generation = int(entry.arch) / 10 == card() / 10;
        if (int(entry.arch) <= card() && (ptx || generation)) return true;
    }
    return false;
}

API cuModuleLoadData(void** module, const void* image) {
    static int modules;
    if (uintptr_t(image) % 8 || *static_cast<const uint32_t*>(image) != 0xba55ed50) return 200;  // no fatbin
    if (!fits(static_cast<const char*>(image))) return 209;
    return *module = &modules + ++modules, SUCCESS;
}
API cuModuleUnload(void*) { return SUCCESS; }
API cuModuleGetFunction(void** function, void*, const char* name) {
    LOCK;
    TRY(forbidden());
    int count;
    size_t sizes[8];
    if (emulator().info(name, &count, sizes, 8)) return NOT_FOUND;
    auto it = functions.emplace(name, Function{name}).first;
    return *function = &it->second, SUCCESS;
}
API cuFuncGetParamInfo(Function* f, size_t i, size_t* offset, size_t* size) {
    int count;
    size_t sizes[8];
    if (emulator().info(f->name.c_str(), &count, sizes, 8) || i >= size_t(count)) return INVALID_VALUE;
    return *offset = 0, *size = sizes[i], SUCCESS;
}
API cuFuncGetAttribute(int* value, int which, Function* f) { return *value = which == 5 ? f->ptx : 0, f->loaded = true, SUCCESS; }
API cuFuncSetAttribute(Function* f, int which, int value) {
    if (which != 8) return which == 9 && value <= 100 ? SUCCESS : INVALID_VALUE;
    if (value > SHARED) return INVALID_VALUE;
    return f->allowed = value, emulator().allow(f->name.c_str(), value);
}

API cuMemAlloc_v2(uint64_t* at, size_t bytes) {
    LOCK;
    TRY(forbidden());
    if (fault) return fault;
    if (!bytes) return INVALID_VALUE;
    if (bytes > TOTAL - used) return OUT_OF_MEMORY;
    void* memory = emulator().malloc(bytes);
    if (!memory) return OUT_OF_MEMORY;
    *at = uint64_t(memory), device_memory[*at] = bytes, used += bytes;
    return SUCCESS;
}
API cuMemFree_v2(uint64_t at) {
    LOCK;
    TRY(forbidden());
    auto it = device_memory.find(at);
    if (it == device_memory.end()) return INVALID_VALUE;
    // Work that still needs the memory finds it gone: a fault.
    used -= it->second, device_memory.erase(it), emulator().free(reinterpret_cast<void*>(at));
    return fault;
}
API cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    LOCK;
    TRY(forbidden());
    *at = malloc(bytes), memset(*at, 0xff, bytes), pinned[uintptr_t(*at)] = bytes;
    return SUCCESS;
}
API cuMemFreeHost(void* at) {
    LOCK;
    return pinned.erase(uintptr_t(at)) ? free(at), SUCCESS : INVALID_VALUE;
}

API cuStreamCreate(Stream** s, unsigned flags) {
    LOCK;
    return streams.insert(*s = new Stream), flags == 1 ? SUCCESS : INVALID_VALUE;  // non-blocking
}
API cuStreamDestroy_v2(Stream* s) {
    LOCK;
    drain(s);
    return streams.erase(s) ? SUCCESS : INVALID_HANDLE;
}
API cuStreamSynchronize(Stream* s) {
    LOCK;
    TRY(forbidden());
    return streams.count(s) ? drain(s) : INVALID_HANDLE;
}
API cuEventCreate(Event** e, unsigned) {
    LOCK;
    return events.insert(*e = new Event), SUCCESS;
}
API cuEventDestroy_v2(Event* e) {
    LOCK;
    return events.erase(e) ? SUCCESS : INVALID_HANDLE;
}
API cuEventRecord(Event* e, Stream* s) {
    LOCK;
    if (!events.count(e)) return INVALID_HANDLE;
    auto record = std::make_shared<Record>();
    record->stream = s, e->last = record;
    return give(s, [record] { return record->done = true, int(SUCCESS); });
}
API cuEventSynchronize(Event* e) {
    LOCK;
    TRY(forbidden());
    if (!events.count(e)) return INVALID_HANDLE;
    return e->last ? drain(e->last->stream, e->last.get()) : SUCCESS;
}
API cuEventElapsedTime(float* ms, Event* from, Event* to) {
    LOCK;
    if (!events.count(from) || !events.count(to) || !from->last || !to->last) return INVALID_HANDLE;
    return *ms = 2.5f, from->last->done && to->last->done ? SUCCESS : 600;  // not ready
}
API cuStreamWaitEvent(Stream* s, Event* e, unsigned) {
    LOCK;
    if (!events.count(e)) return INVALID_HANDLE;
    auto record = e->last;
    return give(s, [record] { return record ? drain(record->stream, record.get()) : SUCCESS; });
}

API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* s) {
    LOCK;
    bool is_pinned = within({pinned.begin(), pinned.end()}, uint64_t(from), bytes);
    if (!is_pinned) return INVALID_VALUE;  // a driver takes it, and waits
    TRY(give(s, [=] {
        if (!within(device_memory, to, bytes)) return int(ILLEGAL_ADDRESS);
        return memcpy(reinterpret_cast<void*>(to), from, bytes), int(SUCCESS);
    }));
    return getenv("DRIVER_EARLY") && !s->capturing ? drain(s) : SUCCESS;
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* s) {
    LOCK;
    return give(s, [=] {
        if (!within(device_memory, from, bytes)) return int(ILLEGAL_ADDRESS);
        return memcpy(to, reinterpret_cast<void*>(from), bytes), int(SUCCESS);
    });
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream* s) {
    LOCK;
    return give(s, [=] {
        if (!within(device_memory, to, bytes) || !within(device_memory, from, bytes)) return int(ILLEGAL_ADDRESS);
        return memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes), int(SUCCESS);
    });
}
API cuMemsetD8Async(uint64_t at, unsigned char value, size_t bytes, Stream* s) {
    LOCK;
    return give(s, [=] {
        if (!within(device_memory, at, bytes)) return int(ILLEGAL_ADDRESS);
        return memset(reinterpret_cast<void*>(at), value, bytes), int(SUCCESS);
    });
}
struct Attribute { int id; char pad[4]; union { int overlap; unsigned cluster[3]; char all[64]; }; };
struct Config { unsigned grid[3], block[3], shared; Stream* stream; Attribute* attributes; unsigned count; };
API cuLaunchKernelEx(const Config* c, Function* f, void** params, void**) {
    LOCK;
    Stream* s = c->stream;
    if (!f->loaded && s->capturing) return s->broken = true, int(UNSUPPORTED);  // it would be loaded now
    const auto [gx, gy, gz] = c->grid;
    const auto [bx, by, bz] = c->block;
    const unsigned shared = c->shared;
    if (!gx || !gy || !gz || bx * by * bz > 1024 || int(shared) > f->allowed) return INVALID_VALUE;
    bool overlap = false;  // programmatic stream serialization, which only follows a launch
    unsigned cluster = 1;  // blocks along x
    for (unsigned i = 0; i < c->count; i++) {
        const Attribute& a = c->attributes[i];
        if (f->ptx < 90) return INVALID_VALUE;
        if (a.id == 4) {
            if (!a.cluster[0] || a.cluster[0] > 8 || gx % a.cluster[0] || a.cluster[1] != 1 || a.cluster[2] != 1) return INVALID_CLUSTER;
            cluster = a.cluster[0];
        } else if (a.id == 6 && s->after_launch) {
            overlap = a.overlap;
        } else {
            return INVALID_VALUE;
        }
    }
    overlaps.count += overlap;
    int count;
    size_t sizes[8];
    emulator().info(f->name.c_str(), &count, sizes, 8);
    const char* from = static_cast<const char*>(params[0]);
    std::vector<char> copy(from, from + sizes[0]);
    TRY(give(s, [=]() mutable {
        void* args[] = {copy.data()};
        emulator().config("overlap", overlap);
        emulator().config("cluster", cluster);
        return emulator().launch(f->name.c_str(), gx, gy, gz, bx, by, bz, shared, args) ? int(ILLEGAL_ADDRESS) : 0;
    }));
    return s->after_launch = true, int(SUCCESS);
}

API cuStreamBeginCapture_v2(Stream* s, unsigned mode) {
    LOCK;
    if (capture || !streams.count(s) || mode != 1) return INVALID_VALUE;  // thread-local
    s->capturing = true, s->broken = s->after_launch = false, s->captured.clear(), capture = s;
    return SUCCESS;
}
API cuStreamEndCapture(Stream* s, Graph** graph) {
    LOCK;
    if (capture != s) return INVALID_VALUE;
    s->capturing = false, capture = nullptr;
    if (s->broken) return *graph = nullptr, int(INVALIDATED);
    graphs.insert(*graph = new Graph{std::move(s->captured)});
    return SUCCESS;
}
API cuGraphInstantiateWithFlags(Graph** ready, Graph* graph, unsigned long long) {
    LOCK;
    TRY(forbidden());
    return graphs.count(graph) ? (graphs.insert(*ready = new Graph(*graph)), SUCCESS) : INVALID_VALUE;
}
API cuGraphDestroy(Graph* g) {
    LOCK;
    return graphs.erase(g) ? SUCCESS : INVALID_VALUE;
}
API cuGraphExecDestroy(Graph* g) {
    LOCK;
    return graphs.erase(g) ? SUCCESS : INVALID_VALUE;
}
API cuGraphUpload(Graph* g, Stream*) {
    LOCK;
    return graphs.count(g) ? fault : INVALID_VALUE;
}
API cuGraphLaunch(Graph* g, Stream* s) {
    LOCK;
    if (!graphs.count(g)) return INVALID_VALUE;
    return give(s, [g] {
        if (!graphs.count(g)) return int(ILLEGAL_ADDRESS);
        for (const Work& work : std::vector<Work>(g->work))
            if (int failed = work()) return failed;
        return int(SUCCESS);
    });
}
