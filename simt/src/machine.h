// The emulator's inside, shared by its own source files; kernels never see it.
//
// A Machine is what one OS thread needs to run one block at a time. Its fibers' stacks and the
// block's shared memory lie in one reservation, so that an address is classified by subtraction:
//
//   | view | fault stack | stack 0 | ... | stack 1023 | guard | static shared | guard | dynamic shared | guard |
//
// with an unmapped page below every stack. Dynamic shared memory ends at its guard page.
#pragma once
#include <pthread.h>

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#define SIMT_RUNTIME  // its own memcpy and malloc are the host's
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
constexpr size_t kSharedMaxHopper = 227 << 10;
constexpr size_t kStaticArea = 64 << 10, kStaticGap = 64;  // the latter in the checked build
constexpr unsigned char kPoison = 0xff;  // NaN in every float type, -1 in every integer

constexpr int kMaxTiles = 16;              // of each side, in one mma_tile
constexpr unsigned kMaxCluster = 8;        // blocks that every card with clusters allows

struct Releases;

enum class Order { forward, reversed, random };

struct Serials { uint32_t from, to; };  // of launches, without the last

struct Launch {
    const Kernel* kernel;
    dim3 grid, block, cluster;
    unsigned smem;
    size_t shared_most;  // static and dynamic together
    uint64_t blocks, clusters;
    bool has_clusters() const { return clusters < blocks; }
    Order order;
    uint64_t seed;
    bool poison, strict, undefined;
    bool cooperative;    // all blocks are there together and may wait for each other
    bool spins;          // some thread waits in a loop that asks for nothing of the emulator's
    int64_t absent;      // a block that has left, while others wait for it; else -1
    uint32_t serial = 0;  // which launch, in the shadow of global memory; each barrier of the grid begins another
    uint32_t first = 0;   // its own before those
    // Programmatic dependent launch: those that may still run when this one begins, and when its threads have waited.
    Serials running{1, 1}, left{1, 1};
    std::atomic<bool> waited{false};  // some thread has
    std::atomic<bool> early{false};   // some thread let the next launch begin before it had
    bool overlaps() const { return running.from != running.to; }
    alignas(64) unsigned char params[32768];
    std::atomic<uint64_t> next{0}, conflicts{0};  // the former of the clusters
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::string error;
    Releases* releases = nullptr;  // checked.cpp: what blocks tell each other by fences and atomics
};

struct Copy {  // a cp.async that has not landed
    unsigned char* dst;
    const void* src;
    int bytes, copied;
    Where at;
};

// Accumulators of a wgmma, one thread's: poison in their place from issue to wait.
struct Accumulators {
    float* d = nullptr;  // null: this slot is free
    int n;               // columns
    int last_group;      // that adds to them
    float values[128];
};

struct Product {  // one wgmma of a thread
    int accumulators;
    uint64_t a, b;
    WgmmaShape shape;
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
    const void* imm = nullptr;
    Where at{};
    std::vector<Copy> copies;
    std::vector<size_t> groups;  // copies.size() at each commit
    // wgmma:
    std::vector<Accumulators> accumulators;
    std::vector<Product> products;  // since the last commit
    int committed = 0, needed = 0;  // groups; those that it waits for
    bool fenced = false;
    uint32_t async_fences = 0;
    uint32_t arrivals = 0, waits = 0;  // at the cluster's barrier
};

struct Warp {
    uint32_t ready, waiting, exited;  // the last with those beyond the block's last thread
    uint32_t asking;                  // who is with them (simt::converged)
    Where arrived;                    // the lane that came last to the cluster's barrier, for the time of this number
    uint32_t arrivals;
};

struct Fault {
    int signal;
    uintptr_t address, pc;
    void* stack[64];
    int depth;
};

// A __shared__ variable: to the compiler a thread_local one, whose name and size are in the library's symbol table.
struct Variable {
    std::string name;
    size_t offset, bytes;
    bool dynamic, guard;  // the latter says whether a variable has been constructed
};

struct Checker;  // checked.cpp
struct Hopper;   // hopper.cpp
struct Machine;

// Blocks that run together, by their rank, on one OS thread. A block by itself is one too.
struct Cluster {
    std::vector<Machine*> blocks;
    size_t left;          // blocks that have not ended: until then all machines are theirs
    uint32_t meetings;    // so often the barrier was complete
    unsigned awaited;     // threads that it awaits
    bool stuck;           // and that will not come
};

struct Machine {
    View& view;  // at the reservation's begin
    Thread* self = nullptr;
    Launch* launch = nullptr;
    uintptr_t base, stacks, statics, statics_guard, dynamic_end, end;
    size_t static_end, static_bytes;  // with and without gaps
    unsigned char* dynamic;
    struct Static {
        const Variable* variable;
        uintptr_t begin, end;
    };
    std::vector<Static> variables;  // dynamic shared memory is the first
    // Where this block's variable of each number is, if its block is this one.
    struct Place { uint64_t block; uintptr_t begin; };
    std::vector<Place> places;
    uint64_t block_serial = 0;
    void* scheduler_sp;
    std::vector<int> free_stacks;
    int open_stacks = 0;
    Thread threads[kMaxThreads];
    Warp warps[kMaxWarps];
    uint32_t ready_warps;
    int warp;  // that ran last
    int count, alive, at_barrier;
    int votes, counted;  // of the barrier that fills, and of the last
    bool at_grid;        // all wait for the other blocks
    Cluster own, *cluster;  // that of the block of rank 0
    unsigned rank;
    int at_cluster;      // threads that wait for the cluster's other threads
    bool parked;         // no thread can run before these have come
    bool goes_on;        // the cluster has begun, or its barrier is complete: it runs before other clusters begin
    std::vector<Thread*> yielded;  // they wait in loops, until nobody else can run
    // So often a thread asked for one word by itself, and then others run.
    struct { uintptr_t address; const Thread* thread; unsigned times; } polled;
    struct { const Thread* thread; unsigned times; } ticked;  // so often in a row the clock has met one thread
    Thread* first_at_barrier;
    uint64_t random;
    const Where* fault_where = nullptr;  // blames this line, not the program counter
    const Thread* fault_thread = nullptr;  // and this thread, not the running one
    Fault fault;
    Checker* checker = nullptr;
    Hopper* hopper = nullptr;
    // The operands of an mma in f32, too large for a fiber's stack.
    alignas(32) float a_rows[kMaxTiles * 16][16];
    alignas(32) float b_rows[kMaxTiles][16][8];

    Machine();
    void begin_block(Launch& launch, uint64_t linear, Cluster& cluster, unsigned rank);
    void run();      // until the block has ended, or waits for others: then some of its threads are alive
    void abandon();  // what is left of a block of a launch that has failed
    // Where the block has its copy of a __shared__ variable, dynamic shared memory if null; `caller` for messages.
    uintptr_t shared_variable(const Variable* v, uintptr_t caller);
    bool is_shared(uintptr_t a) const { return a - statics < end - statics; }
    int lane() const { return self->linear & 31; }
};

// The one of this OS thread while it runs a block, else null.
extern pthread_key_t machine_key;
// Fibers know it by their stack pointer.
struct Reservation { uintptr_t begin; Machine* machine; };
constexpr size_t kReservations = 4096;  // 512 GB
extern Reservation reservations[kReservations];
inline Machine* current() {
    uintptr_t sp;
    asm("movq %%rsp, %0" : "=r"(sp));
    const uintptr_t begin = sp & ~(kReservation - 1);
    const Reservation& r = reservations[begin / kReservation % kReservations];
    return r.begin == begin ? r.machine : static_cast<Machine*>(pthread_getspecific(machine_key));
}

// The scheduler (simt.cpp): a member of `set`; lanes that may run on; and letting others run until
// someone makes this thread ready.
int choose(uint32_t set, Machine& m);
void make_ready(Machine& m, int warp, uint32_t lanes);
void wait(Machine& m);
void block_barrier(const Op& op, Where at);  // of all threads, each in a call of this
// Who reads one place so often by itself, volatile or by atomics, waits for another thread.
inline void let_others_run_if_polled(Machine& m, uintptr_t address) {
    if (m.polled.address != address || m.polled.thread != m.self) m.polled = {address, m.self, 0};
    if (++m.polled.times % 64 == 0) let_others_run();
}

// Hopper (hopper.cpp): before a block; when a thread leaves; lets one asynchronous thing happen, if any is
// in flight; fails if a wait of Hopper's is what nothing will end.
void hopper_block_start(Machine& m);
void hopper_thread_end(Machine& m, const Thread& t);
bool hopper_progress(Machine& m, bool stuck);
void hopper_deadlock(Machine& m);

// Clusters (clusters.cpp). What threads wait in; when a thread leaves; and lets those who wait say so, if nobody else of the
// cluster can come.
extern const Op kClusterWait;
void cluster_thread_end(Machine& m, Thread& t);
void end_cluster_deadlock(Cluster& cluster);
const char* name_of(const Op* op);  // null: __syncthreads

// Ends the launch with an error that names kernel, block, thread and source line.
[[noreturn]] void fail(const Thread& thread, Where at, const char* format, ...) __attribute__((format(printf, 3, 4)));
[[noreturn]] void fail_at_pc(uintptr_t pc, const char* format, ...) __attribute__((format(printf, 2, 3)));
// Of an instruction before this one, maybe another thread's; and what such an error would say of the running one.
[[noreturn]] void fail_earlier(const Thread& thread, uintptr_t pc, const std::string& text);
std::string finding_at_pc(uintptr_t pc, const std::string& text);

enum class Home : uint8_t { device, pinned, managed, registered };  // the last is the host's own memory

struct Allocation {
    uintptr_t begin, end, map, map_end;
    void* shadow;  // checked build: one GlobalCell for every four bytes
    bool constant = false;
    Home home = Home::device;
};
std::string source_lines(uintptr_t pc);  // of an instruction and the calls it was inlined by, "file:line\n" each

// The runtime API (runtime.cpp): why a call was refused, to cudaGetErrorString and the report; what a launch of the host's said; 0, 1 refused, 2 fault.
void refused(const char* format, ...) __attribute__((format(printf, 1, 2)));
void launched(int code);
// The next launch need not wait for the last; or the last is over before it.
void overlap_next();
void launches_are_over();
// By its address; whether it may have so much; and how much it may have.
bool allow_dynamic(const void* kernel, size_t bytes);
size_t allowed_dynamic(const void* kernel);
size_t parameters_of(const std::string& signature);  // where their parenthesis is; npos, of `extern "C"`
std::string kernel_signature(const void* kernel);  // "void scale<float>(float*, int)"
// Of memory that an allocation returned; and the host's own, of which kernels may know from now on, or no more.
void set_home(const void* p, Home home);
void register_host(void* p, size_t bytes);
bool unregister_host(void* p);

// A function or an object of this library, from its symbol table.
struct Symbol {
    std::string name;
    uintptr_t begin, end;
};
const Symbol* find_object(uintptr_t address);
std::string variable_name(uintptr_t address);  // of the variable that is there

bool was_freed(uintptr_t address);  // and nothing is there now
const Allocation* find_allocation(uintptr_t address);  // that holds it, or the nearest below
std::string describe_address(uintptr_t address);
std::string describe_shared(const Machine& m, uintptr_t address);  // that lies in a block's reservation

// ---- the checked build (checked.cpp); empty functions otherwise ------------------------------

enum class Access { read, write, atomic };
// What is ordered with threads but is none: what arrives at the i-th mbarrier, and the products of the i-th
// warp group.
constexpr int kMaxBarriers = 64, kMaxGroups = kMaxThreads / 128;
// The last of them are the cluster's barriers, of which a clock has the number.
constexpr int kArrivals = kMaxThreads, kProducts = kArrivals + kMaxBarriers, kMeetings = kProducts + kMaxGroups, kParties = kMeetings + 1;
#ifdef SIMT_CHECKED
void check_block_start();
void check_block_end();
void check_barrier();
void check_sync(uint32_t mask);
void check_fence(bool of_device);  // else of the block
void check_atomic_begin();
void check_atomic_done(uintptr_t address);
void check_launch_start(Launch& launch);
void check_waited();  // for the launches before
bool knows_waited(const Thread& thread);
void check_grid_barrier(Launch& launch);  // all blocks have met
std::string check_launch_end(Launch& launch);  // a finding, or nothing
void check_thread_end();
void check_freed();  // by a kernel: what was there is not remembered
void check_range(const void* address, size_t bytes, Access access, uintptr_t pc);  // of memcpy and the like
void check_warp_step(uint32_t mask);
void check_access(const Thread& thread, uintptr_t address, size_t bytes, Access access, Where at);
void check_copy_issued(const Thread& thread, uintptr_t address, size_t bytes, Where at);
void check_copy_landed(const Thread& thread, uintptr_t address, size_t bytes);
// Order by mbarriers: made, used by `thread`, an arrival (release), the phase is over, a wait is (acquire).
void check_mbarrier_made(const Thread& thread, int barrier, uintptr_t address, Where at);
void check_mbarrier_used(const Thread& thread, int barrier, Where at);
void check_release(const Thread& thread, int barrier);
void check_phase_over(int barrier);
void check_acquire(const Thread& thread, int barrier);
// At a named barrier: who does not wait; and those who do, whom it lets go.
void check_named_arrival(const Thread& thread, int barrier);
void check_meeting(const Thread* const* threads, int count, int barrier);
// At the cluster's barrier: a thread has arrived, or left; all have; its wait is over; and its block has ended by it.
void check_cluster_arrival(const Thread& thread);
void check_cluster_met(const Machine& m);
void check_cluster_wait(const Thread& thread);
void check_cluster_end(const Thread& thread);
// A bulk copy begins to write a tile (`map` names its source), and has written it.
void check_bulk_issued(const Thread& thread, int barrier, uint32_t map, uintptr_t address, size_t bytes, Where at);
void check_bulk_landed(int barrier, uintptr_t address, size_t bytes);
// A warp group's products begin to read; read `count` pieces of one tile; and a thread knows that those of
// its first `committed` groups are over.
void check_products_begin(int group);
void check_operand(const Thread& thread, int group, const uintptr_t* pieces, int count, size_t bytes, Where at);
void check_products_over(const Thread& thread, int group, int committed);
void* make_shadow(size_t bytes);
void free_shadow(void* shadow, size_t bytes);
#else
inline void check_block_start() {}
inline void check_block_end() {}
inline void check_barrier() {}
inline void check_sync(uint32_t) {}
inline void check_fence(bool) {}
inline void check_atomic_begin() {}
inline void check_atomic_done(uintptr_t) {}
inline void check_launch_start(Launch&) {}
inline void check_waited() {}
inline bool knows_waited(const Thread&) { return true; }
inline void check_grid_barrier(Launch&) {}
inline std::string check_launch_end(Launch&) { return ""; }
inline void check_thread_end() {}
inline void check_freed() {}
inline void check_range(const void*, size_t, Access, uintptr_t) {}
inline void check_warp_step(uint32_t) {}
inline void check_access(const Thread&, uintptr_t, size_t, Access, Where) {}
inline void check_copy_issued(const Thread&, uintptr_t, size_t, Where) {}
inline void check_copy_landed(const Thread&, uintptr_t, size_t) {}
inline void check_mbarrier_made(const Thread&, int, uintptr_t, Where) {}
inline void check_mbarrier_used(const Thread&, int, Where) {}
inline void check_release(const Thread&, int) {}
inline void check_phase_over(int) {}
inline void check_acquire(const Thread&, int) {}
inline void check_named_arrival(const Thread&, int) {}
inline void check_meeting(const Thread* const*, int, int) {}
inline void check_cluster_arrival(const Thread&) {}
inline void check_cluster_met(const Machine&) {}
inline void check_cluster_wait(const Thread&) {}
inline void check_cluster_end(const Thread&) {}
inline void check_bulk_issued(const Thread&, int, uint32_t, uintptr_t, size_t, Where) {}
inline void check_bulk_landed(int, uintptr_t, size_t) {}
inline void check_products_begin(int) {}
inline void check_operand(const Thread&, int, const uintptr_t*, int, size_t, Where) {}
inline void check_products_over(const Thread&, int, int) {}
inline void* make_shadow(size_t) { return nullptr; }
inline void free_shadow(void*, size_t) {}
#endif

}  // namespace simt
