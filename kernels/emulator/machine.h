// The emulator's inside, shared by its own source files; kernels never see it.
//
// A Machine is what one OS thread needs to run one block at a time. Its fibers' stacks and the
// block's shared memory lie in one reservation, so that an address is classified by subtraction:
//
//   | fault stack | stack 0 | ... | stack 1023 | guard | static shared | guard | dynamic shared | guard |
//
// with an unmapped page below every stack. Dynamic shared memory ends at its guard page.
#pragma once
#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

#ifdef SIMT_CHECKED
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

constexpr size_t kPage = 4096, kStack = 64 << 10;
constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;
// What sm_86 and sm_89, the smallest targets, allow a block: 48 KB, and 99 KB by opt-in.
constexpr size_t kSharedDefault = 48 << 10, kSharedMax = 99 << 10;
constexpr size_t kStaticArea = 64 << 10, kStaticGap = 64;  // the latter in the checked build
constexpr unsigned char kPoison = 0xff;  // NaN in every float type, -1 in every integer

constexpr int kMaxTiles = 16;              // of each side, in one mma_tile

enum class Order { forward, reversed, random };

struct Launch {
    const Kernel* kernel;
    dim3 grid, block;
    unsigned smem;
    uint64_t blocks;
    Order order;
    uint64_t seed;
    bool poison;
    uint32_t serial;  // which launch, in the shadow of global memory
    unsigned char params[4096];
    std::atomic<uint64_t> next{0}, conflicts{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::string error;
};

struct Copy {  // a cp.async that has not landed
    unsigned char* dst;
    const void* src;
    int bytes, copied;
    Where at;
};

enum class State : uint8_t { fresh, ready, waiting, done };

struct Thread {
    void* sp = nullptr;
    int stack = -1;
    State state = State::done;
    uint16_t linear = 0;
    uint3 index{};
    // What it waits for: op == nullptr is the block's barrier.
    const Op* op = nullptr;
    uint32_t mask = 0;
    void* data = nullptr;
    Where at{};
    std::vector<Copy> copies;
    std::vector<size_t> groups;  // copies.size() at each commit
};

struct Warp {
    uint32_t ready, waiting;
};

struct Fault {
    int signal;
    uintptr_t address, pc;
};

struct Checker;  // checked.cpp

struct Machine {
    View view;
    Thread* self = nullptr;
    Launch* launch = nullptr;
    uintptr_t base, stacks, statics, statics_guard, dynamic_end, end;
    size_t static_end, static_bytes;  // with and without gaps
    unsigned char* dynamic;
    struct Static {
        const void* site;
        uintptr_t begin, end;
    };
    std::vector<Static> variables;  // dynamic shared memory is the first
    void* scheduler_sp;
    std::vector<int> free_stacks;
    Thread threads[kMaxThreads];
    Warp warps[kMaxWarps];
    uint32_t ready_warps;
    int warp;  // that ran last
    int count, alive, at_barrier;
    Thread* first_at_barrier;
    uint64_t random;
    const Where* fault_where = nullptr;  // blames this line, not the program counter
    Fault fault;
    Checker* checker = nullptr;
    // The operands of an mma in f32, too large for a fiber's stack.
    alignas(32) float a_rows[kMaxTiles * 16][16];
    alignas(32) float b_rows[kMaxTiles][16][8];

    Machine();
    void run_block(Launch& launch, uint64_t linear);
    bool is_shared(uintptr_t a) const { return a - statics < end - statics; }
    int lane() const { return self->linear & 31; }
};

extern __thread Machine* machine __attribute__((tls_model("initial-exec")));

// Ends the launch with an error that names kernel, block, thread and source line.
[[noreturn]] void fail(const Thread& thread, Where at, const char* format, ...) __attribute__((format(printf, 3, 4)));
[[noreturn]] void fail_at_pc(uintptr_t pc, const char* format, ...) __attribute__((format(printf, 2, 3)));

struct Allocation {
    uintptr_t begin, end, map, map_end;
    void* shadow;  // checked build: one GlobalCell for every four bytes
};
const Allocation* find_allocation(uintptr_t address);  // that holds it, or the nearest below
std::string describe_address(uintptr_t address);

// ---- the checked build (checked.cpp); empty functions otherwise ------------------------------

enum class Access { read, write, atomic };
#ifdef SIMT_CHECKED
void check_block_start();
void check_block_end();
void check_barrier();
void check_sync(uint32_t mask);
void check_warp_step(uint32_t mask);
void check_access(const Thread& thread, uintptr_t address, size_t bytes, Access access, Where at);
void check_copy_issued(const Thread& thread, uintptr_t address, size_t bytes, Where at);
void check_copy_landed(const Thread& thread, uintptr_t address, size_t bytes);
void* make_shadow(size_t bytes);
void free_shadow(void* shadow, size_t bytes);
#else
inline void check_block_start() {}
inline void check_block_end() {}
inline void check_barrier() {}
inline void check_sync(uint32_t) {}
inline void check_warp_step(uint32_t) {}
inline void check_access(const Thread&, uintptr_t, size_t, Access, Where) {}
inline void check_copy_issued(const Thread&, uintptr_t, size_t, Where) {}
inline void check_copy_landed(const Thread&, uintptr_t, size_t) {}
inline void* make_shadow(size_t) { return nullptr; }
inline void free_shadow(void*, size_t) {}
#endif

}  // namespace simt
