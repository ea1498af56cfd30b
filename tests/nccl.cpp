// A libnccl.so.2 for cards of driver.cpp's: as much of it as src/collective/nccl.rs calls. The ranks are processes of one
// machine, which leave their values in files of a directory that the unique id names. Sums are made in the order of the ranks,
// so that all have the same bits.
//
// A call is put on its stream and done there, as late as that driver does everything; or, with DRIVER_EARLY set, at once and
// long before the kernels given earlier on other streams. So a sum that does not wait for what it sums, or that nobody waits
// for, is a wrong one.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include <dlfcn.h>
#include <unistd.h>

namespace {

enum Result { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4 };

struct Id { char dir[128]; };
struct Comm { std::string dir; int ranks, rank; long calls; };
struct Call { const Comm* comm; long number; float* at; size_t count; bool sum; };

// The values of a rank, when it has left them.
bool values_of(const Call& c, int rank, std::vector<float>& values) {
    std::string path = c.comm->dir + "/" + std::to_string(c.number) + "." + std::to_string(rank);
    for (int tries = 0; tries < 30000; ++tries) {
        if (std::ifstream in{path, std::ios::binary}) {
            values.resize(c.count + 1);
            in.read(reinterpret_cast<char*>(values.data()), 4 * values.size());
            bool whole = size_t(in.gcount()) == 4 * c.count;  // as many as here
            return values.resize(c.count), whole;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
}

int work(void* about) {
    Call c = *static_cast<Call*>(about);
    delete static_cast<Call*>(about);
    std::string own = c.comm->dir + "/" + std::to_string(c.number) + "." + std::to_string(c.comm->rank);
    std::ofstream(own + ".tmp", std::ios::binary).write(reinterpret_cast<char*>(c.at), 4 * c.count);
    if (rename((own + ".tmp").c_str(), own.c_str())) return 1;
    std::vector<float> values;
    if (!values_of(c, 0, values)) return 1;
    memcpy(c.at, values.data(), 4 * c.count);
    for (int rank = 1; c.sum && rank < c.comm->ranks; ++rank) {
        if (!values_of(c, rank, values)) return 1;
        for (size_t i = 0; i < c.count; ++i) c.at[i] += values[i];
    }
    return 0;
}

int give(const void* from, void* to, size_t count, int type, bool sum, Comm* comm, void* stream) {
    if (from != to || type != 7) return INVALID_ARGUMENT;  // f32 in place
    void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    auto give = driver ? reinterpret_cast<int (*)(void*, int (*)(void*), void*)>(dlsym(driver, "driver_give")) : nullptr;
    if (!give) return SYSTEM_ERROR;
    return give(stream, work, new Call{comm, comm->calls++, static_cast<float*>(to), count, sum}) ? SYSTEM_ERROR : SUCCESS;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API int ncclGetVersion(int* version) { return *version = 29900, SUCCESS; }
API const char* ncclGetErrorString(int) { return "an emulated error"; }
API int ncclGetUniqueId(Id* id) {
    const char* place = getenv("TMPDIR");
    snprintf(id->dir, sizeof id->dir, "%s/nccl-XXXXXX", place ? place : "/tmp");
    return mkdtemp(id->dir) ? SUCCESS : SYSTEM_ERROR;
}
API int ncclCommInitRank(Comm** comm, int ranks, Id id, int rank) {
    return *comm = new Comm{id.dir, ranks, rank, 0}, SUCCESS;
}
API int ncclCommGetAsyncError(Comm*, int* error) { return *error = SUCCESS, SUCCESS; }
API int ncclCommDestroy(Comm*) { return SUCCESS; }  // calls may still be under way
API int ncclCommAbort(Comm*) { return SUCCESS; }
API int ncclAllReduce(const void* from, void* to, size_t count, int type, int op, Comm* comm, void* stream) {
    return op ? int(INVALID_ARGUMENT) : give(from, to, count, type, true, comm, stream);
}
API int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, Comm* comm, void* stream) {
    return root ? int(INVALID_ARGUMENT) : give(from, to, count, type, false, comm, stream);
}
