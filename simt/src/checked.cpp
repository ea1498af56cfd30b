// The checked build. Kernels are compiled with -fsanitize=thread and a few -fsanitize=undefined
// checks, but linked without the sanitizers: the compiler calls a hook before every load and
// store, and the hooks are ours. They know what no host tool knows: CUDA's threads and barriers.
//
// Shared memory has a cell for every byte: who wrote it last, and who has read it since, by block
// phase (number of __syncthreads so far) and by the thread's epoch. Two accesses are ordered if a
// __syncthreads lies between them or a chain of __syncwarps, mbarriers and named barriers: each thread
// holds a vector clock of the others' epochs. Everything else that overlaps, with a write among
// it, is a race. Shuffles and other collectives do not order memory, as in CUDA.
//
// Bulk copies and the products of warp groups are parties of their own: a copy writes as "what arrives at
// this mbarrier", and only a wait for it is ordered after; products read as "the products of this warp
// group", and only a wgmma_wait is.
//
// Lanes of one warp may store to one address by one instruction: one of them wins. Thread orders let another
// lane win, and so differing values show in the result. Any threads may store what is there already: whether they did is
// looked at when the store is over (settle).
//
// Fences and atomics order as well: what a thread did before a fence is known to whoever meets a later atomic of that
// thread by an atomic on the same address. A plain read of what atomics change is suspect: it is no race if it is
// volatile, or if a thread goes on from that instruction to an atomic on the same address, as loops of atomicCAS do and
// "if (v > *best) atomicMax(best, v)". That is known when the launch is over.
//
// Global memory has a cell for every four bytes, which finds races between blocks of one launch. Blocks are
// ordered as "the last block reduces" needs it: writes, a fence, an atomic; in the other block an atomic on the same
// address, then reads. Barriers carry both sides to the block's other threads.
//
// Between the blocks of a cluster only its barrier orders: what a thread did before its n-th arrival is over for whoever knows
// that the n-th meeting was. The blocks' clocks have nothing in common but the number of meetings, so that of each byte of
// shared memory a second cell (Across) has how many arrivals its thread had behind it at each kind of access.
#ifdef SIMT_CHECKED
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <set>

#include "machine.h"

namespace simt {

constexpr uint32_t kInFlight = 0xffffffffu;  // as an epoch: a cp.async that has not landed
constexpr uint32_t kUnknownReaders = 0xffffffffu;  // of several warps
constexpr uint16_t kManyWarps = 0xffff, kAtomic = 0xffff, kMbarrier = 0xfffe, kOtherBlock = 0xfffd;

struct alignas(32) SharedCell {
    uint32_t write_phase, write_epoch, read_phase, read_epoch;
    uint32_t readers;  // lanes of read_warp; if that is kManyWarps a set of Checker::sets, or kUnknownReaders
    uint16_t writer, read_warp;
    uint32_t proxy;    // the writer's async fences before the write; of a bulk copy: its map
    uint32_t pc;       // of the write, from the library's start

    bool operator==(const SharedCell& other) const {
        uint64_t a[4], b[4];
        memcpy(a, this, 32), memcpy(b, &other, 32);
        return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]));
    }
};

// An access from another block of the cluster.
struct Far {
    uint32_t meeting;       // the first one after it; 0: there was none
    uint32_t phase, epoch;  // of its own block
    uint16_t rank, thread;
    bool atomic;

    bool by_atomic(Access now) const { return atomic && now == Access::atomic; }
};
constexpr uint16_t kManyRanks = 0xffff, kManyThreads = 0xffff;

// A byte of shared memory between blocks.
struct Across {
    uint32_t block;        // first_phase of the block that this is of
    uint32_t wrote, atomic, read;  // by its own threads: the first meetings after it
    Far far_wrote, far_read;
};

struct Readers {  // lanes of one warp that read at one epoch
    uint32_t epoch, lanes;
    uint16_t warp;
};
using ReadSet = std::vector<Readers>;

struct GlobalCell {
    uint32_t write_tag, writer;  // tag: launch * 16 + bytes of the word, one bit each
    uint32_t read_tag, reader;
    uint32_t stamp;                // when in its block the write was, and by which thread: Checker::stamp * 1024 + thread
};
constexpr uint32_t kAtomicBlocks = 0xffffffffu, kManyBlocks = 0xfffffffeu;

// What a block tells others by an atomic after a fence: which writes are over.
struct Release {
    uint32_t all;              // stamp: all writes until then are over
    std::vector<uint32_t> of;  // and those of each thread until then
};

// By the address of the atomic.
struct Releases {
    struct Place {
        uint32_t atomics = 0;  // so far
        std::map<uint32_t, Release> blocks;
    };
    std::atomic<bool> any{false};
    std::recursive_mutex mutex;
    std::map<uintptr_t, Place> places;
    // Plain reads of what atomics change, by their instructions, and those that an atomic has followed.
    std::map<uintptr_t, std::string> suspects;
    std::set<uintptr_t> followed;
};

// Another block's releases, as a thread's atomic has met them.
struct Acquire {
    uintptr_t place;
    int thread;
    uint32_t stamp, atomics;
    uint32_t serial;
    std::map<uint32_t, Release> blocks;
};

struct BankAccess {
    uintptr_t pc, address;
    size_t bytes;
};

struct Checker {
    SharedCell* cells;  // of each byte
    uint32_t phase = 0, first_phase = 0, epoch = 0;
    uint32_t epochs[kMaxThreads] = {};  // now: clocks[i][i], side by side for the cache
    // [thread][thread or party]: its last epoch known to be over
    uint32_t (*clocks)[kParties] = static_cast<uint32_t(*)[kParties]>(calloc(kMaxThreads, sizeof *clocks));
    struct Barrier {
        int maker;
        uint32_t phase, epoch;  // when it was made
        uint32_t arrived[kParties], over[kParties];  // clocks: of all arrivals; of those before the phase was over
    };
    std::vector<Barrier> barriers;
    uint32_t named[16][kParties] = {};  // clocks of those who have come to a named barrier and do not wait
    uint32_t group_clock[kParties];                // of the group whose products run
    std::vector<uint32_t> products[kMaxGroups];  // of each warp group: epochs of its committed groups that ran
    // Sets of readers from several warps, and which set comes of a set and a reader: in this phase.
    std::vector<ReadSet> sets;
    std::map<std::pair<uint32_t, std::pair<uint32_t, uint16_t>>, uint32_t> next_sets;
    std::vector<BankAccess> log[kMaxThreads];
    Allocation last = {};  // that was accessed, in the launch last_serial
    uint32_t last_serial = 0;
    // Order between blocks: time in this block, which barriers, fences and atomics advance; when the last barrier
    // was, and of each thread its last fence and the barrier before it.
    uint32_t stamp = 1, last_barrier = 0;
    uint32_t met[kMaxThreads] = {};  // when a thread's last named barrier was
    // Threads that have waited for the launches before, when, and those that know of it.
    struct Wait { int thread; uint32_t phase, epoch; };
    std::vector<Wait> waits;
    std::vector<bool> knows_waited;
    bool any_fence = false;
    uint32_t fence[kMaxThreads] = {}, barrier_before_fence[kMaxThreads] = {};
    std::vector<Acquire> acquired;
    // Within the block: what each thread knew at its last fence, and what atomics on an address have told.
    bool fenced = false;
    // Clusters: of shared memory's bytes; what all had done when they arrived; each thread's stamps at its last two arrivals; and
    // the last access from another block, of the thread of that number, and where it was.
    Across* across = nullptr;
    uint32_t arrived[kParties], met_then[kParties];
    uint32_t arrived_at[2][kMaxThreads];
    Far last_far;
    uintptr_t last_far_pc;
    Where last_far_at;
    std::vector<uint32_t> at_fence[kMaxThreads];
    std::map<uintptr_t, std::vector<uint32_t>> told;
    // Each thread's last plain reads, for the atomics that follow.
    struct Read { uintptr_t address, pc; } reads[kMaxThreads][8];
    uint8_t next_read[kMaxThreads] = {};
    // A store that meets another thread's: what was there before, and what to say if that changes.
    struct Store {
        size_t bytes = 0;
        uintptr_t address, pc;
        const Thread* thread;
        unsigned char before[64];
        std::string race;
    } store;
};

// One for each byte of a block's shared memory; zeros.
static void* make_cells(const Machine& m, size_t bytes) {
    void* cells = mmap(nullptr, (m.end - m.statics) * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (cells == MAP_FAILED) throw std::bad_alloc();
    return cells;
}

static Checker& checker() {
    Machine& m = *current();
    if (!m.checker) {
        m.checker = new Checker;
        m.checker->cells = static_cast<SharedCell*>(make_cells(m, sizeof(SharedCell)));
    }
    return *m.checker;
}

// ---- order ------------------------------------------------------------------------------------

static void set_epoch(Checker& c, int thread, uint32_t epoch) { c.epochs[thread] = c.clocks[thread][thread] = epoch; }

static void forget_readers(Checker& c) {
    if (c.sets.size() != 1) c.sets.assign(1, {});
    c.next_sets.clear();
}

// Whether each reader's time counts: threads know of other warps.
static bool exact(const Checker& c) { return c.fenced || current()->launch->kernel->hopper || current()->launch->has_clusters(); }

static void settle(Checker& c);


void check_block_start() {
    Checker& c = checker();
    // Phases are never reused, so that cells need no clearing.
    c.first_phase = ++c.phase;
    c.epoch++;
    c.stamp = 1, c.last_barrier = 0, c.acquired.clear();
    if (c.any_fence) memset(c.fence, 0, sizeof c.fence), c.any_fence = false;
    memset(c.met, 0, sizeof c.met);
    if (c.fenced) {
        for (auto& known : c.at_fence) known.clear();
        c.told.clear(), c.fenced = false;
    }
    if (current()->launch->overlaps()) c.waits.clear(), c.knows_waited.assign(kMaxThreads, false);
    memset(c.reads, 0, sizeof c.reads);
    c.store.bytes = 0, c.store.race.clear();
    for (int i = 0; i < current()->count; i++) set_epoch(c, i, c.epoch), c.log[i].clear();
    forget_readers(c);
    if (current()->launch->kernel->hopper) {
        c.barriers.clear();
        memset(c.named, 0, sizeof c.named);
        for (auto& epochs : c.products) epochs.clear();
    }
    if (!current()->launch->has_clusters()) return;
    if (!c.across) c.across = static_cast<Across*>(make_cells(*current(), sizeof *c.across));
    memset(c.arrived, 0, sizeof c.arrived), memset(c.arrived_at, 0, sizeof c.arrived_at), c.last_far = {};
    for (int i = 0; i < current()->count; i++) c.clocks[i][kMeetings] = 0;
}

// Wavefronts of one warp-wide access beyond the least possible: a wavefront serves 128 bytes, so
// that 8- and 16-byte accesses go by half and quarter warps.
static int bank_conflicts(const BankAccess* const* lanes) {
    size_t bytes = 4;
    for (int i = 0; i < 32; i++)
        if (lanes[i]) bytes = std::max(bytes, lanes[i]->bytes);
    int group = bytes > 8 ? 8 : bytes > 4 ? 16 : 32, conflicts = 0;
    for (int first = 0; first < 32; first += group) {
        uintptr_t words[32][32];
        int used[32] = {}, most = 1;
        for (int i = first; i < first + group; i++) {
            if (!lanes[i]) continue;
            uintptr_t end = lanes[i]->address + lanes[i]->bytes;
            for (uintptr_t w = lanes[i]->address / 4; w * 4 < end; w++) {
                int bank = w % 32;
                if (std::find(words[bank], words[bank] + used[bank], w) != words[bank] + used[bank]) continue;
                if (used[bank] < 32) words[bank][used[bank]++] = w;
                most = std::max(most, used[bank]);
            }
        }
        conflicts += most - 1;
    }
    return conflicts;
}

// The warp's lanes have met: their accesses since the last meeting are put side by side, the n-th
// of one lane with the n-th of the others as long as they come from the same instruction.
static void count_conflicts(Checker& c, int warp) {
    std::vector<BankAccess>* logs = &c.log[warp * 32];
    uint64_t conflicts = 0;
    for (size_t n = 0;; n++) {
        const BankAccess* lanes[32] = {};
        const BankAccess* first = nullptr;
        for (int i = 0; i < 32; i++) {
            if (n >= logs[i].size()) continue;
            if (!first) first = &logs[i][n];
            if (logs[i][n].pc == first->pc) lanes[i] = &logs[i][n];
        }
        if (!first) break;
        conflicts += bank_conflicts(lanes);
    }
    for (int i = 0; i < 32; i++) logs[i].clear();
    if (conflicts) current()->launch->conflicts += conflicts;
}

void check_block_end() {
    for (int w = 0; w * 32 < current()->count; w++) count_conflicts(checker(), w);
}

void check_barrier() {
    Checker& c = checker();
    settle(c);
    c.phase++;
    c.last_barrier = c.stamp++;
    check_block_end();
    forget_readers(c);
    if (!current()->launch->kernel->hopper && !current()->launch->has_clusters()) return;
    // Phases do not order the parties: who knows of them tells the others.
    for (int i = kArrivals; i < kParties; i++) {
        uint32_t known = 0;
        for (int t = 0; t < current()->count; t++) known = std::max(known, c.clocks[t][i]);
        for (int t = 0; t < current()->count; t++) c.clocks[t][i] = known;
    }
}

void check_warp_step(uint32_t mask) {
    settle(checker());
    if (mask == 0xffffffffu) count_conflicts(checker(), current()->self->linear / 32);
}

// All of them know from now on what one of them knew, and what is in `known`.
static void meet(Checker& c, const int* threads, int count, uint32_t* known) {
    // Without mbarriers and fences nobody knows of another warp.
    const int first = exact(c) ? 0 : threads[0] & ~31, end = exact(c) ? kParties : first + 32;
    for (int i = 0; i < count; i++)
        for (int p = first; p < end; p++) known[p] = std::max(known[p], c.clocks[threads[i]][p]);
    c.epoch++;
    for (int i = 0; i < count; i++) {
        memcpy(c.clocks[threads[i]] + first, known + first, (end - first) * sizeof known[0]);
        set_epoch(c, threads[i], c.epoch);
    }
}

void check_sync(uint32_t mask) {
    int threads[32], count = 0;
    for (uint32_t l = mask; l; l &= l - 1) threads[count++] = (current()->self->linear & ~31) + __builtin_ctz(l);
    uint32_t known[kParties] = {};
    meet(checker(), threads, count, known);
}

void check_meeting(const Thread* const* who, int count, int barrier) {
    Checker& c = checker();
    int threads[kMaxThreads] = {};
    for (int i = 0; i < count; i++) threads[i] = who[i]->linear;
    if (count) meet(c, threads, count, c.named[barrier]);
    memset(c.named[barrier], 0, sizeof c.named[barrier]);
    const uint32_t now = c.stamp++;
    for (int i = 0; i < count; i++) c.met[who[i]->linear] = now;
}

static void join(uint32_t* to, const uint32_t* from) {
    for (int p = 0; p < kParties; p++) to[p] = std::max(to[p], from[p]);
}

static void release(const Thread& t, uint32_t* known) {
    Checker& c = checker();
    join(known, c.clocks[t.linear]);
    set_epoch(c, t.linear, ++c.epoch);  // what it does next is not covered
}
void check_release(const Thread& t, int barrier) { release(t, checker().barriers[barrier].arrived); }
void check_named_arrival(const Thread& t, int barrier) { release(t, checker().named[barrier]); }

void check_cluster_arrival(const Thread& t) {
    Checker& c = *current()->checker;
    settle(c);
    release(t, c.arrived);
    c.arrived_at[t.arrivals % 2][t.linear] = c.stamp++;
}
void check_cluster_met(const Machine& m) { memcpy(m.checker->met_then, m.checker->arrived, sizeof m.checker->met_then); }
void check_cluster_wait(const Thread& t) {
    Checker& c = checker();
    join(c.clocks[t.linear], c.met_then);
    c.clocks[t.linear][kMeetings] = t.waits;
}

void check_phase_over(int barrier) {
    Checker::Barrier& b = checker().barriers[barrier];
    memcpy(b.over, b.arrived, sizeof b.over);
}

void check_acquire(const Thread& t, int barrier) { join(checker().clocks[t.linear], checker().barriers[barrier].over); }

void check_products_begin(int group) {
    Checker& c = checker();
    c.products[group].push_back(++c.epoch);
    // What all threads of the group know.
    const int first = group * 128;
    memcpy(c.group_clock, c.clocks[first], sizeof c.group_clock);
    for (int i = 1; i < 128; i++)
        for (int p = 0; p < kParties; p++) c.group_clock[p] = std::min(c.group_clock[p], c.clocks[first + i][p]);
    c.group_clock[kProducts + group] = c.epoch;  // among themselves they only read
}

void check_products_over(const Thread& t, int group, int committed) {
    if (committed > 0) checker().clocks[t.linear][kProducts + group] = checker().products[group][committed - 1];
}

// ---- shared memory ----------------------------------------------------------------------------

struct Site {  // of an access: a line if a runtime function made it, else a program counter
    const Where* where;
    uintptr_t pc;
    bool relaxed = false;  // a volatile read
};

#define FAIL(thread, site, ...) \
    do { if (site.where) fail(thread, *site.where, __VA_ARGS__); else fail_at_pc(site.pc, __VA_ARGS__); } while (0)

static const char* verb(Access a) { return a == Access::read ? "read" : a == Access::write ? "write" : "atomic"; }

static void require_shared_bounds(const Machine& m, const Thread& t, uintptr_t a, size_t bytes, Access access, Site site) {
    for (const auto& v : m.variables)
        if (a >= v.begin && a + bytes <= v.end) return;
    uintptr_t bad = a;  // the first byte that lies in no array
    for (const auto& v : m.variables)
        if (a >= v.begin && a < v.end) bad = v.end;
    FAIL(t, site, "out of bounds: %s of %zu bytes, %s", verb(access), bytes, describe_shared(m, bad).c_str());
}

// "byte 7 of the shared array sums"
static std::string shared_byte_name(const Machine& m, uintptr_t a) {
    size_t offset = a - m.variables[0].begin;
    std::string array = "dynamic shared memory";
    for (const auto& v : m.variables)
        if (v.variable && a >= v.begin && a < v.end) offset = a - v.begin, array = "the shared array " + v.variable->name;
    return "byte " + std::to_string(offset) + " of " + array;
}

static std::string race_text(Access access, const char* other, int thread, uintptr_t a) {
    Machine& m = *current();
    char who[64] = "threads of several warps";
    if (thread >= kProducts) snprintf(who, sizeof who, "a wgmma of warp group %d", thread - kProducts);
    else if (thread >= kArrivals) snprintf(who, sizeof who, "a bulk copy");
    else if (thread >= 0)
        snprintf(who, sizeof who, "thread (%u,%u,%u)", m.threads[thread].index.x, m.threads[thread].index.y, m.threads[thread].index.z);
    char text[512];
    snprintf(text, sizeof text, "race: %s of %s, which %s %s with no barrier between%s", verb(access), shared_byte_name(m, a).c_str(), who, other,
             thread < kArrivals ? "" : thread < kProducts ? ": no mbarrier_wait for it" : ": no wgmma_wait for it");
    return text;
}

[[noreturn]] static void race(const Thread& t, Site site, Access access, const char* other, int thread, uintptr_t a) {
    FAIL(t, site, "%s", race_text(access, other, thread, a).c_str());
    __builtin_unreachable();
}

// A plain read of what atomics change.
template <class Text>
static void suspect(Site site, Text text) {
    if (site.relaxed) return;
    Releases& r = *current()->launch->releases;
    std::lock_guard lock(r.mutex);
    std::string& finding = r.suspects[site.pc];
    if (finding.empty()) finding = finding_at_pc(site.pc, text());
}

// A store that meets another thread's is about to happen.
template <class Text>
static void stores(Checker& c, const Thread& t, Site site, Text text) {
    if (c.store.bytes || !c.store.race.empty()) return;
    c.store.race = text(), c.store.thread = &t, c.store.pc = site.pc;
}
static void remember_store(Checker& c, uintptr_t a, size_t bytes) {
    if (bytes > sizeof c.store.before) fail_at_pc(c.store.pc, "%s", c.store.race.c_str());
    c.store.bytes = bytes, c.store.address = a;
    memcpy(c.store.before, reinterpret_cast<void*>(a), bytes);
}

static void settle(Checker& c) {
    if (!c.store.bytes) return;
    const bool same = !memcmp(reinterpret_cast<void*>(c.store.address), c.store.before, c.store.bytes);
    c.store.bytes = 0;
    const std::string race = std::exchange(c.store.race, "");
    if (!same) fail_earlier(*c.store.thread, c.store.pc, race);
}
void check_freed() { checker().last_serial = 0; }
void check_thread_end() { settle(checker()); }

static inline void note_read(Checker& c, const Thread& t, uintptr_t a, Site site) {
    c.reads[t.linear][c.next_read[t.linear]++ % 8] = {a, site.pc};
}

// An atomic of thread t on an address: the reads of it that came before are no race.
static void follow(Checker& c, int t, uintptr_t a) {
    for (const auto& read : c.reads[t]) {
        if (read.address != a || !read.pc) continue;
        Releases& r = *current()->launch->releases;
        std::lock_guard lock(r.mutex);
        r.followed.insert(read.pc);
    }
}

// The compiler copies code: its copies count as one.
std::string check_launch_end(Launch& l) {
    for (const auto& [pc, finding] : l.releases->suspects) {
        bool followed = l.releases->followed.count(pc);
        for (uintptr_t other : l.releases->followed) followed = followed || source_lines(other - 1) == source_lines(pc - 1);
        if (!followed) return finding;
    }
    return "";
}

static uintptr_t image_begin();

// Which execution of the instruction `pc` touched `a`, counted since the warp last met; `count` of them if none did.
static int execution(const std::vector<BankAccess>& log, uintptr_t pc, uintptr_t a, int& count) {
    int found = -1;
    count = 0;
    for (const BankAccess& access : log) {
        if (access.pc != pc) continue;
        if (a - access.address < access.bytes) found = count;
        count++;
    }
    return found < 0 ? count : found;
}

// Whether `t` is about to write what another lane of its warp wrote by the same execution of the same instruction.
static bool same_instruction(Checker& c, const SharedCell& cell, const Thread& t, uintptr_t a, Site site) {
    if (site.where || cell.writer >= kMaxThreads || cell.writer / 32 != t.linear / 32) return false;
    const uintptr_t pc = image_begin() + cell.pc;
    if (pc != site.pc && source_lines(pc - 1) != source_lines(site.pc - 1)) return false;  // the compiler copies code
    int mine, theirs;
    execution(c.log[t.linear], site.pc, 0, mine);
    return execution(c.log[cell.writer], pc, a, theirs) == mine;
}

// Whether all atomics of the block's threads on a byte were before a meeting of the cluster that `clock` knows of.
static bool atomics_met(const Checker& c, uintptr_t a, const uint32_t* clock) {
    return current()->launch->has_clusters() && c.across[a - current()->statics].atomic <= clock[kMeetings];
}

// What a cell says before an access by `self` (or by none) that would come after `clock`: not in flight, written,
// ordered.
static inline void require_written(Checker& c, const SharedCell& cell, const Thread& t, int self, const uint32_t* clock, uintptr_t a, Access access, Site site) {
    if (cell.write_phase < c.first_phase) {
        if (access != Access::write) FAIL(t, site, "%s of shared memory that nobody has written", verb(access));
        return;
    }
    if (cell.writer == kMbarrier) FAIL(t, site, "%s of shared memory that is an mbarrier", verb(access));
    if (cell.writer == kOtherBlock) return;  // between_blocks says whether it is over
    const bool copied = cell.writer >= kArrivals && cell.writer < kProducts;
    if (cell.write_epoch == kInFlight) {
        if (copied) FAIL(t, site, "%s of shared memory that a bulk copy is still writing: no mbarrier_wait for it", verb(access));
        FAIL(t, site, "%s of shared memory that a cp.async is still writing: no cp_async_wait by its thread", verb(access));
    }
    if ((cell.write_phase != c.phase && !copied) || cell.writer == self) return;
    bool ordered = cell.writer == kAtomic ? access == Access::atomic || atomics_met(c, a, clock) : clock[cell.writer] >= cell.write_epoch;
    if (!ordered && access == Access::write) ordered = same_instruction(c, cell, t, a, site);
    if (ordered) return;
    if (!site.where && cell.writer == kAtomic && access == Access::read) return suspect(site, [&] { return race_text(access, "wrote", -1, a); });
    if (!site.where && cell.writer < kMaxThreads && access == Access::write) return stores(c, t, site, [&] { return race_text(access, "wrote", cell.writer, a); });
    race(t, site, access, "wrote", cell.writer == kAtomic ? -1 : cell.writer, a);
}

// The set of `set` and a reader.
static uint32_t with_reader(Checker& c, uint32_t set, Readers r) {
    uint32_t& known = c.next_sets[{set, {r.epoch, uint16_t(r.warp * 32 + __builtin_ctz(r.lanes))}}];
    if (known && r.lanes == (r.lanes & -r.lanes)) return known;
    ReadSet next = c.sets[set];
    bool there = false;
    for (Readers& old : next) {
        if (old.warp != r.warp) continue;
        there |= old.epoch == r.epoch;
        old.lanes = old.epoch == r.epoch ? old.lanes | r.lanes : old.lanes & ~r.lanes;  // its own later read counts
    }
    if (!there) next.push_back(r);
    next.erase(std::remove_if(next.begin(), next.end(), [](const Readers& old) { return !old.lanes; }), next.end());
    c.sets.push_back(next);
    return known = uint32_t(c.sets.size()) - 1;
}

// A thread or a party has read the cell.
static inline void add_reader(Checker& c, SharedCell& cell, Readers r, const uint32_t* clock) {
    const bool first = cell.read_phase != c.phase;
    if (!first && cell.read_warp == r.warp && cell.read_epoch == r.epoch) {
        cell.readers |= r.lanes;
        return;
    }
    bool ordered = first;  // all others' reads are before this one
    if (!first && cell.read_warp == r.warp) {
        ordered = true;
        for (uint32_t l = cell.readers; l; l &= l - 1)
            if (clock[r.warp * 32 + __builtin_ctz(l)] < cell.read_epoch) ordered = false;
    }
    if (ordered) {
        cell.read_phase = c.phase, cell.read_warp = r.warp, cell.readers = r.lanes, cell.read_epoch = r.epoch;
        return;
    }
    if (!exact(c)) {
        cell.read_warp = kManyWarps, cell.readers = kUnknownReaders;
        return;
    }
    if (cell.read_warp == kManyWarps && cell.readers == kUnknownReaders) return;
    uint32_t set = cell.readers;
    if (cell.read_warp != kManyWarps) {
        set = 0;
        for (uint32_t l = cell.readers; l; l &= l - 1) set = with_reader(c, set, {cell.read_epoch, l & -l, cell.read_warp});
    }
    cell.read_warp = kManyWarps, cell.readers = with_reader(c, set, r);
}

static inline void require_read(Checker& c, const SharedCell& cell, const Thread& t, uintptr_t a, Access access, Site site) {
    // An atomic after a plain read: that the read was a race shows where it comes later.
    if (cell.read_phase != c.phase || access == Access::atomic) return;
    const uint32_t* clock = c.clocks[t.linear];
    auto check = [&](const Readers& r) {
        for (uint32_t l = r.lanes; l; l &= l - 1) {
            const int reader = r.warp * 32 + __builtin_ctz(l);
            if (reader != t.linear && clock[reader] < r.epoch) race(t, site, access, "read", reader, a);
        }
    };
    if (cell.read_warp != kManyWarps) return check({cell.read_epoch, cell.readers, cell.read_warp});
    if (cell.readers == kUnknownReaders) race(t, site, access, "read", -1, a);
    for (const Readers& r : c.sets[cell.readers]) check(r);
}

// Calls change(cell, address) for each byte; equal neighbours get equal results.
struct Neighbours {
    SharedCell before = {}, after = {};
    bool any = false;

    template <class F>
    inline void each(Checker& c, uintptr_t a, size_t bytes, F change) {
        SharedCell* cells = &c.cells[a - current()->statics];
        for (size_t i = 0; i < bytes; i++) {
            if (any && cells[i] == before) {
                cells[i] = after;
                continue;
            }
            before = cells[i], any = true;
            change(cells[i], a + i);
            after = cells[i];
        }
    }
};

static inline void shared_byte(Checker& c, SharedCell& cell, const Thread& t, uintptr_t a, Access access, Site site) {
    require_written(c, cell, t, t.linear, c.clocks[t.linear], a, access, site);
    if (access == Access::read) {
        add_reader(c, cell, {c.epochs[t.linear], 1u << (t.linear & 31), uint16_t(t.linear / 32)}, c.clocks[t.linear]);
        return;
    }
    require_read(c, cell, t, a, access, site);
    cell.write_phase = c.phase, cell.write_epoch = c.epochs[t.linear];
    cell.writer = access == Access::atomic ? kAtomic : t.linear;
    cell.proxy = t.async_fences;
    cell.pc = uint32_t(site.pc - image_begin());
    cell.read_phase = 0;
}

// A race of threads of two blocks of a cluster: `by` is one of the block of this rank, or none.
[[noreturn]] static void cluster_race(const Machine& owner, const Thread& t, Site site, Access access, const char* other, unsigned rank, int by, uintptr_t a) {
    std::string who = "threads of several blocks";
    if (rank != kManyRanks) {
        const Machine& m = *owner.cluster->blocks[rank];
        const uint3 block = m.view.block;
        char text[96];
        if (by < m.count) snprintf(text, sizeof text, "thread (%u,%u,%u) of block (%u,%u,%u)", m.threads[by].index.x, m.threads[by].index.y, m.threads[by].index.z, block.x, block.y, block.z);
        else snprintf(text, sizeof text, "block (%u,%u,%u)", block.x, block.y, block.z);
        who = text;
    }
    const uint3 block = owner.view.block;
    FAIL(t, site, "race between blocks of a cluster: %s of %s of block (%u,%u,%u), which %s %s with no cluster_arrive and cluster_wait between", verb(access),
         shared_byte_name(owner, a).c_str(), block.x, block.y, block.z, who.c_str(), other);
    __builtin_unreachable();
}

// Whether an access from another block is over for this thread: it has met the cluster since then, or its own block.
static bool is_over(const Far& far, const Thread& t) {
    const Checker& c = checker();
    if (far.meeting <= c.clocks[t.linear][kMeetings]) return true;
    if (far.rank != current()->rank) return false;
    return far.phase != c.phase || far.thread == t.linear || (far.thread != kManyThreads && c.clocks[t.linear][far.thread] >= far.epoch);
}

// An access of `owner`'s shared memory, by a thread of that block or of another, and those from the other side.
static void between_blocks(const Machine& owner, const Thread& t, uintptr_t a, size_t bytes, Access access, Site site) {
    Checker &c = *owner.checker, &mine = checker();
    const bool far = &owner != current();
    const uint32_t meeting = t.arrivals + 1, known = mine.clocks[t.linear][kMeetings];
    for (; bytes; a++, bytes--) {
        Across& across = c.across[a - owner.statics];
        if (across.block != c.first_phase) across = {c.first_phase, 0, 0, 0, {}, {}};
        SharedCell& cell = c.cells[a - owner.statics];
        if (far && std::max(across.wrote, access == Access::atomic ? 0 : across.atomic) > known) cluster_race(owner, t, site, access, "wrote", owner.rank, cell.writer, a);
        if (far && access != Access::read && across.read > known) cluster_race(owner, t, site, access, "read", owner.rank, kManyThreads, a);
        const Far &wrote = across.far_wrote, &read = across.far_read;
        if (wrote.meeting && !wrote.by_atomic(access) && !is_over(wrote, t)) cluster_race(owner, t, site, access, "wrote", wrote.rank, wrote.thread, a);
        if (read.meeting && access != Access::read && !is_over(read, t)) cluster_race(owner, t, site, access, "read", read.rank, read.thread, a);
        if (!far) {
            uint32_t& last = access == Access::read ? across.read : access == Access::write ? across.wrote : across.atomic;
            last = std::max(last, meeting);
            continue;
        }
        Far now = {meeting, mine.phase, mine.epochs[t.linear], uint16_t(current()->rank), t.linear, access == Access::atomic};
        if (access == Access::read) {
            // Of readers in order the last one counts.
            if (read.meeting && !is_over(read, t)) {
                if (read.rank != now.rank) now.rank = kManyRanks;
                now.thread = kManyThreads, now.meeting = std::max(now.meeting, read.meeting);
            }
            across.far_read = now;
        } else {
            across.far_wrote = now;
            cell.write_phase = c.phase, cell.writer = kOtherBlock, cell.read_phase = 0;
        }
    }
}

static void other_shared_access(const Machine& owner, const Thread& t, uintptr_t a, size_t bytes, Access access, Site site) {
    const uint3 block = owner.view.block;
    if (!owner.alive) FAIL(t, site, "%s of the shared memory of block (%u,%u,%u), rank %u of the cluster, which has ended", verb(access), block.x, block.y, block.z, owner.rank);
    require_shared_bounds(owner, t, a, bytes, access, site);
    Checker& c = *owner.checker;
    const SharedCell* cells = &c.cells[a - owner.statics];
    for (size_t i = 0; i < bytes; i++) {
        const bool written = cells[i].write_phase >= c.first_phase;
        if (written && cells[i].writer == kMbarrier) FAIL(t, site, "%s of another block's shared memory that is an mbarrier", verb(access));
        if (written && cells[i].write_epoch == kInFlight) FAIL(t, site, "%s of another block's shared memory that a copy is still writing", verb(access));
        // Parts of a wide read may be a struct's padding.
        if (!written && access != Access::write && (site.where || std::none_of(cells, cells + bytes, [&](const SharedCell& s) { return s.write_phase >= c.first_phase; })))
            FAIL(t, site, "%s of shared memory that nobody has written, %s of block (%u,%u,%u)", verb(access), shared_byte_name(owner, a + i).c_str(), block.x, block.y, block.z);
    }
    between_blocks(owner, t, a, bytes, access, site);
    if (t.arrivals + 1 < c.last_far.meeting) return;
    c.last_far = {t.arrivals + 1, 0, 0, uint16_t(current()->rank), t.linear, false};
    c.last_far_pc = site.pc;
    if (site.where) c.last_far_at = *site.where;
}

// Some thread of the block must have met the cluster after the last access from another block.
void check_cluster_end(const Thread& t) {
    const Checker& c = *current()->checker;
    for (int i = 0; i < current()->count; i++)
        if (c.last_far.meeting <= c.clocks[i][kMeetings]) return;
    const Machine& m = *current()->cluster->blocks[c.last_far.rank];
    const Thread& by = m.threads[c.last_far.thread];
    char text[256];
    snprintf(text, sizeof text, "the block has ended, with no cluster_wait after this access of its shared memory by thread (%u,%u,%u) of block (%u,%u,%u)", by.index.x,
             by.index.y, by.index.z, m.view.block.x, m.view.block.y, m.view.block.z);
    if (c.last_far_pc) fail_earlier(t, c.last_far_pc, text);
    fail(t, c.last_far_at, "%s", text);
}

static void shared_access(const Thread& t, uintptr_t a, size_t bytes, Access access, Site site) {
    Checker& c = checker();
    require_shared_bounds(*current(), t, a, bytes, access, site);
    // Parts of a wide read that nobody has written are a struct's padding, if others were.
    bool padded = false;
    if (access == Access::read && !site.where && bytes > 1)
        for (size_t i = 0; i < bytes; i++) padded |= c.cells[a - current()->statics + i].write_phase >= c.first_phase;
    if (access == Access::read && !site.where) note_read(c, t, a, site);
    Neighbours neighbours;
    neighbours.each(c, a, bytes, [&](SharedCell& cell, uintptr_t here) {
        if (!padded || cell.write_phase >= c.first_phase) shared_byte(c, cell, t, here, access, site);
    });
    if (current()->launch->has_clusters()) between_blocks(*current(), t, a, bytes, access, site);
    // ldmatrix counts its own.
    if (access != Access::atomic && !site.where && c.log[t.linear].size() < 4096)
        c.log[t.linear].push_back({site.pc, a, bytes});
}

void check_copy_issued(const Thread& t, uintptr_t a, size_t bytes, Where at) {
    Checker& c = checker();
    shared_access(t, a, bytes, Access::write, {&at, 0});
    if (c.log[t.linear].size() < 4096) c.log[t.linear].push_back({uintptr_t(at.file) + at.line, a, bytes});
    for (size_t i = 0; i < bytes; i++) c.cells[a - current()->statics + i].write_epoch = kInFlight;
}

void check_copy_landed(const Thread& t, uintptr_t a, size_t bytes) {
    Checker& c = checker();
    Neighbours neighbours;
    neighbours.each(c, a, bytes, [&](SharedCell& cell, uintptr_t) {
        cell.write_phase = c.phase, cell.write_epoch = c.epochs[t.linear], cell.writer = t.linear;
        cell.proxy = t.async_fences;
    });
    if (!current()->launch->has_clusters()) return;
    for (size_t i = 0; i < bytes; i++) c.across[a - current()->statics + i].wrote = t.arrivals + 1;
}

// ---- shared memory: Hopper ----------------------------------------------------------------------

void check_mbarrier_made(const Thread& t, int barrier, uintptr_t a, Where at) {
    Checker& c = checker();
    shared_access(t, a, 8, Access::write, {&at, 0});
    for (int i = 0; i < 8; i++) c.cells[a - current()->statics + i].writer = kMbarrier;
    c.barriers.resize(barrier + 1);
    Checker::Barrier& b = c.barriers[barrier];
    memset(&b, 0, sizeof b);
    b.maker = t.linear, b.phase = c.phase, b.epoch = c.epochs[t.linear];
}

void check_mbarrier_used(const Thread& t, int barrier, Where at) {
    Checker& c = checker();
    const Checker::Barrier& b = c.barriers[barrier];
    if (b.phase == c.phase && c.clocks[t.linear][b.maker] < b.epoch)
        fail(t, at, "race: use of an mbarrier, which thread %d of the block has made with no barrier between", b.maker);
}

// What was written by threads, not by bulk copies, needs a fence before wgmma or a bulk copy meets it.
static void require_fence(Checker& c, const SharedCell& cell, const Thread& t, Where at) {
    if (cell.write_phase < c.first_phase || cell.writer >= kArrivals) return;
    const Thread& writer = current()->threads[cell.writer];
    if (writer.async_fences == cell.proxy)
        fail(t, at, "missing proxy fence: thread (%u,%u,%u) wrote this shared memory with no fence_async_shared since", writer.index.x,
             writer.index.y, writer.index.z);
}

void check_bulk_issued(const Thread& t, int barrier, uint32_t map, uintptr_t a, size_t bytes, Where at) {
    Checker& c = checker();
    if (current()->launch->has_clusters()) between_blocks(*current(), t, a, bytes, Access::write, {&at, 0});
    Neighbours neighbours;
    neighbours.each(c, a, bytes, [&](SharedCell& cell, uintptr_t here) {
        require_written(c, cell, t, t.linear, c.clocks[t.linear], here, Access::write, {&at, 0});
        require_read(c, cell, t, here, Access::write, {&at, 0});
        require_fence(c, cell, t, at);
        cell = {c.phase, kInFlight, 0, 0, 0, uint16_t(kArrivals + barrier), 0, map, 0};
    });
}

void check_bulk_landed(int barrier, uintptr_t a, size_t bytes) {
    Checker& c = checker();
    const uint32_t epoch = ++c.epoch;
    for (size_t i = 0; i < bytes; i++) {
        SharedCell& cell = c.cells[a - current()->statics + i];
        cell.write_phase = c.phase, cell.write_epoch = epoch;
    }
    c.barriers[barrier].arrived[kArrivals + barrier] = epoch;
}

void check_operand(const Thread& t, int group, const uintptr_t* pieces, int count, size_t bytes, Where at) {
    Checker& c = checker();
    const uint32_t* clock = c.group_clock;
    const uint16_t party = uint16_t(kProducts + group);
    uint32_t map = 0;
    Neighbours neighbours;
    for (int i = 0; i < count; i++)
        neighbours.each(c, pieces[i], bytes, [&](SharedCell& cell, uintptr_t here) {
            require_written(c, cell, t, -1, clock, here, Access::read, {&at, 0});
            require_fence(c, cell, t, at);
            const uint32_t from = cell.writer >= kArrivals ? cell.proxy : 1;
            if (map && from != map)
                fail(t, at, "wgmma: the descriptor reaches beyond its tile: byte %zu of dynamic shared memory comes from elsewhere than the first",
                     size_t(here - current()->variables[0].begin));
            map = from;
            add_reader(c, cell, {c.products[group].back(), 1u << (party & 31), uint16_t(party / 32)}, clock);
        });
}

// ---- launches that overlap ----------------------------------------------------------------------

void check_waited() {
    Checker& c = checker();
    const int t = current()->self->linear;
    c.waits.push_back({t, c.phase, c.epochs[t]});
    c.knows_waited[t] = true;
}

// It has waited, or a thread that has is ordered before it.
bool knows_waited(const Thread& t) {
    Checker& c = checker();
    if (c.knows_waited[t.linear]) return true;
    for (const auto& wait : c.waits)
        if (wait.phase < c.phase || c.clocks[t.linear][wait.thread] >= wait.epoch) return c.knows_waited[t.linear] = true;
    return false;
}

static void require_over(const Thread& t, Site site, Access access, uint32_t mask, uint32_t write_tag, uint32_t read_tag) {
    const Launch& l = *current()->launch;
    const bool waited = knows_waited(t);
    const Serials may_run = waited ? l.left : l.running;
    const auto meets = [&](uint32_t tag) { return (tag & mask) && (tag >> 4) - may_run.from < may_run.to - may_run.from; };
    const bool written = meets(write_tag);
    if (!written && (access == Access::read || !meets(read_tag))) return;
    FAIL(t, site, "race between launches: %s of what a launch %s, which may still run: %s", verb(access), written ? "before has written" : "before has read",
         waited ? "the one in between did not wait for it" : "no cudaGridDependencySynchronize before");
}

// ---- global memory ----------------------------------------------------------------------------

void check_launch_start(Launch& l) {
    delete l.releases;
    l.releases = new Releases;
}

// What was before is another launch's.
void check_grid_barrier(Launch& l) {
    l.serial++;
    l.releases->places.clear();
}

void* make_shadow(size_t bytes) {
    size_t size = std::max<size_t>(1, (bytes + 3) / 4) * sizeof(GlobalCell);
    void* shadow = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return shadow == MAP_FAILED ? nullptr : shadow;  // without it, bounds are still checked
}

void free_shadow(void* shadow, size_t bytes) {
    if (shadow) munmap(shadow, std::max<size_t>(1, (bytes + 3) / 4) * sizeof(GlobalCell));
}

static uint32_t number_of(const Machine& m) {
    const uint3 b = m.view.block;
    const dim3 grid = m.launch->grid;
    return b.x + grid.x * (b.y + grid.y * b.z);
}
static uint32_t block_number() { return number_of(*current()); }

static std::string block_race_text(Access access, const char* other, uint32_t block, const Allocation& in, uintptr_t a) {
    char text[256];
    const std::string who = block >= kManyBlocks ? "other blocks" : "block " + std::to_string(block) + " of the grid";
    snprintf(text, sizeof text, "race between blocks: %s of bytes %zu..+4 of an allocation, which %s %s in this launch", verb(access),
             (a - in.begin) & ~size_t(3), who.c_str(), other);
    return text;
}

[[noreturn]] static void block_race(const Thread& t, Site site, Access access, const char* other, uint32_t block, const Allocation& in, uintptr_t a) {
    FAIL(t, site, "%s", block_race_text(access, other, block, in, a).c_str());
    __builtin_unreachable();
}

struct Range { uintptr_t begin, end; };

// The emulator's own library: constants and vtables of the kernels' code.
static const Range& image() {
    static const Range image = [] {
        Range range = {uintptr_t(&checker), 0};
        dl_iterate_phdr([](dl_phdr_info* info, size_t, void* data) {
            Range& r = *static_cast<Range*>(data);
            uintptr_t begin = UINTPTR_MAX, end = 0;
            for (int i = 0; i < info->dlpi_phnum; i++) {
                const auto& p = info->dlpi_phdr[i];
                if (p.p_type != PT_LOAD) continue;
                begin = std::min<uintptr_t>(begin, info->dlpi_addr + p.p_vaddr);
                end = std::max<uintptr_t>(end, info->dlpi_addr + p.p_vaddr + p.p_memsz);
            }
            if (r.begin < begin || r.begin >= end) return 0;
            r = {begin, end};
            return 1;
        }, &range);
        return range;
    }();
    return image;
}

static uintptr_t image_begin() { return image().begin; }

static bool in_image(uintptr_t a) { return a - image().begin < image().end - image().begin; }

// Whether both threads have been at one barrier since then.
static bool met_since(const Checker& c, int a, int b, uint32_t then) {
    return then <= c.last_barrier || (c.met[a] == c.met[b] && then < c.met[a]);
}

void check_fence(bool of_device) {
    Checker& c = checker();
    settle(c);
    const int t = current()->self->linear;
    if (of_device) {
        c.any_fence = true;
        c.fence[t] = c.stamp++, c.barrier_before_fence[t] = c.last_barrier;
    }
    // What it does next is not covered.
    c.fenced = true;
    c.at_fence[t].assign(c.clocks[t], c.clocks[t] + kMaxThreads);
    set_epoch(c, t, ++c.epoch);
}

static void join_known(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
    to.resize(std::max(to.size(), from.size()));
    for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}

// A thread has read what others may have told it by atomics, and volatile stores, behind their fences.
static void learn(Checker& c, int t, uintptr_t a) {
    const Machine& m = *current();
    if (const auto told = c.told.find(a); c.fenced && told != c.told.end())
        for (size_t i = 0; i < told->second.size(); i++) c.clocks[t][i] = std::max(c.clocks[t][i], told->second[i]);
    Releases& releases = *m.launch->releases;
    if (m.launch->blocks == 1 || !releases.any || m.is_shared(a)) return;
    std::lock_guard lock(releases.mutex);
    const auto place = releases.places.find(a);
    if (place == releases.places.end() || place->second.blocks.empty()) return;
    // A later one of the same thread and place knows more.
    const auto known = std::find_if(c.acquired.begin(), c.acquired.end(), [&](const Acquire& q) { return q.place == a && q.thread == t && !met_since(c, t, t, q.stamp); });
    if (known != c.acquired.end()) {
        if (known->serial == m.launch->serial && known->atomics == place->second.atomics) return;
        c.acquired.erase(known);
    }
    c.acquired.push_back({a, t, ++c.stamp, place->second.atomics, m.launch->serial, place->second.blocks});
}

// It tells what came before its fence, and what it had learnt before that.
static void tell(Checker& c, int t, uintptr_t a) {
    Machine& m = *current();
    if (!c.at_fence[t].empty()) join_known(c.told[a], c.at_fence[t]);
    if (m.launch->blocks == 1 || !c.any_fence || m.is_shared(a)) return;
    Releases& releases = *m.launch->releases;
    std::lock_guard lock(releases.mutex);
    Releases::Place& place = releases.places[a];
    c.stamp++;
    releases.any = true;
    Release& r = place.blocks[block_number()];
    r.of.resize(m.count);
    for (int i = 0; i < m.count; i++) {
        // A fence counts if it is this thread's own or a barrier is between.
        if (!c.fence[i] || (i != t && !met_since(c, i, t, c.fence[i]))) continue;
        r.of[i] = std::max(r.of[i], c.fence[i]);
        r.all = std::max(r.all, c.barrier_before_fence[i]);
    }
    for (const Acquire& q : c.acquired) {
        if (q.serial != m.launch->serial || q.stamp > c.fence[t] || (q.thread != t && !met_since(c, q.thread, t, q.stamp))) continue;
        for (const auto& [block, release] : q.blocks) {
            Release& known = place.blocks[block];
            join_known(known.of, release.of);
            known.all = std::max(known.all, release.all);
        }
    }
}

// An atomic and what it tells are one: a block on another OS thread that sees the one must know the other.
void check_atomic_begin() { current()->launch->releases->mutex.lock(); }

void check_atomic_done(uintptr_t a) {
    Machine& m = *current();
    Checker& c = checker();
    Releases& releases = *m.launch->releases;
    std::lock_guard lock(releases.mutex, std::adopt_lock);
    const int t = m.self->linear;
    follow(c, t, a);
    if (m.launch->blocks > 1 && (c.any_fence || releases.any) && !m.is_shared(a)) releases.places[a].atomics++;
    learn(c, t, a);
    if (c.fenced) tell(c, t, a);
}

// Whether a thread may know that another block's access is over: of the write with this stamp, or of all that the
// block did before it told (stamp 0).
static bool is_released(const Thread& t, uintptr_t a, uint32_t block, uint32_t stamp) {
    Checker& c = checker();
    const Launch& l = *current()->launch;
    // The meetings of a cluster, too.
    if (const uint32_t known = l.has_clusters() && block < kManyBlocks ? c.clocks[t.linear][kMeetings] : 0)
        for (const Machine* m : current()->cluster->blocks)
            if (const Thread& by = m->threads[stamp % 1024]; number_of(*m) == block)
                if (stamp / 1024 <= m->checker->arrived_at[known % 2][stamp % 1024] || (by.state == State::done && by.arrivals <= known)) return true;
    for (const Acquire& q : c.acquired) {
        if (q.serial != l.serial || (q.thread != t.linear && !met_since(c, q.thread, t.linear, q.stamp))) continue;
        if (block < kManyBlocks) {
            auto told = q.blocks.find(block);
            if (told == q.blocks.end()) continue;
            const uint32_t when = stamp / 1024, thread = stamp % 1024;
            if (!stamp || when <= told->second.all || (thread < told->second.of.size() && when <= told->second.of[thread])) return true;
        } else {
            // Atomics, or reads by several blocks: all blocks that there are have told, or this is the place
            // where they tell, and nobody came later.
            std::lock_guard lock(l.releases->mutex);
            if (q.blocks.size() + 1 >= l.blocks) return true;
            if (q.place == a && l.releases->places[a].atomics == q.atomics) return true;
        }
    }
    return false;
}

// A __device__ or __constant__ variable; its shadow is made when it is first touched.
static const Allocation* device_variable(uintptr_t a) {
    static std::map<uintptr_t, Allocation> variables;
    static std::mutex mutex;
    const Symbol* object = find_object(a);
    if (!object) return nullptr;
    std::lock_guard<std::mutex> lock(mutex);
    auto [it, fresh] = variables.try_emplace(object->begin);
    if (fresh) {
        const bool constant = space_of(reinterpret_cast<void*>(a)) == Space::constant;
        it->second = {object->begin, object->end, 0, 0, make_shadow(object->end - object->begin), constant};
    }
    return &it->second;
}

static void global_access(const Thread& t, uintptr_t a, size_t bytes, Access access, Site site) {
    Machine& m = *current();
    Allocation& last = checker().last;
    const Launch& launch = *m.launch;
    if (checker().last_serial != launch.serial || a < last.begin || a + bytes > last.end) {
        if (access == Access::read && a - uintptr_t(launch.params) < sizeof launch.params) return;
        const Allocation* found = find_allocation(a);
        if (!found || a >= found->end || a + bytes > found->end) {
            if (in_image(a)) {
                found = device_variable(a);
                if (!found) return;
                if (a + bytes > found->end) FAIL(t, site, "out of bounds: %s of %zu bytes, %zu bytes past the end of a variable of %zu bytes", verb(access), bytes, size_t(found->end - a), size_t(found->end - found->begin));
            }
        }
        if (!found || a >= found->end || a + bytes > found->end) {
            uintptr_t bad = found && a < found->end ? found->end : a;
            FAIL(t, site, "out of bounds: %s of %zu bytes, %s", verb(access), bytes, describe_address(bad).c_str());
        }
        last = *found, checker().last_serial = launch.serial;
    }
    if (last.constant && access != Access::read)
        FAIL(t, site, "%s of the __constant__ variable %s, which kernels only read", verb(access), variable_name(a).c_str());
    if (access == Access::read && !site.where) note_read(checker(), t, a, site);
    if (!last.shadow) return;
    const uint32_t serial = launch.serial << 4;
    const uint32_t block = block_number();
    auto* cells = static_cast<GlobalCell*>(last.shadow);
    for (uintptr_t word = (a - last.begin) / 4; word * 4 < a - last.begin + bytes; word++) {
        GlobalCell& cell = cells[word];
        uint32_t mask = 0;
        for (uintptr_t i = 0; i < 4; i++)
            if (word * 4 + i - (a - last.begin) < bytes) mask |= 1u << i;
        if (launch.overlaps()) require_over(t, site, access, mask, cell.write_tag, cell.read_tag);
        auto meets = [&](uint32_t tag) { return (tag ^ serial) < 16 && (tag & mask); };
        auto merge = [&](uint32_t& tag, uint32_t& who, uint32_t now) {
            bool same_launch = (tag ^ serial) < 16;
            tag = same_launch && (who == now || now == kManyBlocks) ? tag | mask : serial | mask;
            who = now;
        };
        if (meets(cell.write_tag) && cell.writer != block && (cell.writer != kAtomicBlocks || access != Access::atomic))
            if (launch.blocks > 1 && !is_released(t, a, cell.writer, cell.stamp)) {
                const auto text = [&] { return block_race_text(access, "wrote", cell.writer, last, a); };
                if (!site.where && cell.writer == kAtomicBlocks && access == Access::read) suspect(site, text);
                else if (!site.where && cell.writer != kAtomicBlocks && access == Access::write) stores(checker(), t, site, text);
                else block_race(t, site, access, "wrote", cell.writer, last, a);
            }
        if (access == Access::read) {
            // Of readers in order the last one counts.
            bool other = meets(cell.read_tag) && cell.reader != block && !is_released(t, a, cell.reader, 0);
            merge(cell.read_tag, cell.reader, other ? kManyBlocks : block);
            continue;
        }
        if (access == Access::write && meets(cell.read_tag) && cell.reader != block && !is_released(t, a, cell.reader, 0)) block_race(t, site, access, "read", cell.reader, last, a);
        merge(cell.write_tag, cell.writer, access == Access::atomic ? kAtomicBlocks : block);
        cell.stamp = checker().stamp << 10 | t.linear;
    }
}

// The block of the cluster in whose shared memory this is, or null.
static const Machine* owner(const Machine& m, uintptr_t a) {
    for (const Machine* other : m.cluster->blocks)
        if (other->is_shared(a)) return other;
    return nullptr;
}

static inline void check(const Thread& t, uintptr_t a, size_t bytes, Access access, Site site) {
    Machine& m = *current();
    if (a - m.base < m.statics - kPage - m.base) {  // local memory
        for (const Accumulators& mine : t.accumulators)
            if (mine.d && a - uintptr_t(mine.d) < size_t(mine.n) * 2)
                FAIL(t, site, "%s of accumulators while wgmma adds to them: no wgmma_wait", verb(access));
        return;
    }
    settle(checker());
    if (m.is_shared(a)) shared_access(t, a, bytes, access, site);
    else if (const Machine* other = m.launch->has_clusters() ? owner(m, a) : nullptr) other_shared_access(*other, t, a, bytes, access, site);
    else global_access(t, a, bytes, access, site);
    if (!checker().store.race.empty()) remember_store(checker(), a, bytes);
}

void check_access(const Thread& t, uintptr_t a, size_t bytes, Access access, Where at) {
    check(t, a, bytes, access, {&at, 0});
}

static inline void hook(void* address, size_t bytes, Access access, void* pc, bool relaxed = false) {
    Machine* m = current();
    if (m && m->self) check(*m->self, uintptr_t(address), bytes, access, {nullptr, uintptr_t(pc), relaxed});
}

static void volatile_read(void* p, size_t bytes, void* pc) {
    Machine* m = current();
    if (!m || !m->self) return;
    let_others_run_if_polled(*m, uintptr_t(p));
    hook(p, bytes, Access::read, pc, true);
    learn(checker(), m->self->linear, uintptr_t(p));
}

// A flag: behind a fence it tells others, as an atomic does.
static void volatile_write(void* p, size_t bytes, void* pc) {
    Machine* m = current();
    const bool tells = m && m->self && !checker().at_fence[m->self->linear].empty();
    hook(p, bytes, tells ? Access::atomic : Access::write, pc);
    if (tells) check_atomic_begin(), check_atomic_done(uintptr_t(p));
}

void check_range(const void* address, size_t bytes, Access access, uintptr_t pc) {
    Machine& m = *current();
    if (bytes) check(*m.self, uintptr_t(address), bytes, access, {nullptr, pc});
}

}  // namespace simt

// ---- what the compiler calls --------------------------------------------------------------------

using namespace simt;

#define HOOK(name, bytes, access) \
    void name(void* p) { hook(p, bytes, Access::access, __builtin_return_address(0)); }

extern "C" {

HOOK(__tsan_read1, 1, read)
HOOK(__tsan_read2, 2, read)
HOOK(__tsan_read4, 4, read)
HOOK(__tsan_read8, 8, read)
HOOK(__tsan_read16, 16, read)
HOOK(__tsan_unaligned_read2, 2, read)
HOOK(__tsan_unaligned_read4, 4, read)
HOOK(__tsan_unaligned_read8, 8, read)
HOOK(__tsan_unaligned_read16, 16, read)
HOOK(__tsan_write1, 1, write)
HOOK(__tsan_write2, 2, write)
HOOK(__tsan_write4, 4, write)
HOOK(__tsan_write8, 8, write)
HOOK(__tsan_write16, 16, write)
HOOK(__tsan_unaligned_write2, 2, write)
HOOK(__tsan_unaligned_write4, 4, write)
HOOK(__tsan_unaligned_write8, 8, write)
HOOK(__tsan_unaligned_write16, 16, write)
#define VOLATILE(bytes)                                                                                                          \
    void __tsan_volatile_read##bytes(void* p) { volatile_read(p, bytes, __builtin_return_address(0)); }                          \
    void __tsan_unaligned_volatile_read##bytes(void* p) { hook(p, bytes, Access::read, __builtin_return_address(0), true); }     \
    void __tsan_volatile_write##bytes(void* p) { volatile_write(p, bytes, __builtin_return_address(0)); }                        \
    void __tsan_unaligned_volatile_write##bytes(void* p) { hook(p, bytes, Access::write, __builtin_return_address(0)); }
VOLATILE(1) VOLATILE(2) VOLATILE(4) VOLATILE(8) VOLATILE(16)
void __tsan_read_range(void* p, size_t bytes) { hook(p, bytes, Access::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { hook(p, bytes, Access::write, __builtin_return_address(0)); }
void __tsan_vptr_update(void** p, void*) { hook(p, 8, Access::write, __builtin_return_address(0)); }
void __tsan_vptr_read(void** p) { hook(p, 8, Access::read, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// Each sanitizer record begins with the source location.
struct UbsanRecord {
    const char* file;
    uint32_t line, column;
};

static void undefined(const UbsanRecord* r, const char* what) {
    if (current() && current()->self) fail(*current()->self, {r->file, int(r->line)}, "%s", what);
}

void __ubsan_handle_type_mismatch_v1(UbsanRecord* r, void*) { undefined(r, "misaligned access: the address is not a multiple of the type's alignment"); }
void __ubsan_handle_alignment_assumption(UbsanRecord* r, void*, void*, void*) { undefined(r, "misaligned access"); }
void __ubsan_handle_shift_out_of_bounds(UbsanRecord* r, void*, void*) { undefined(r, "shift by a negative number or by the type's width or more"); }
void __ubsan_handle_out_of_bounds(UbsanRecord* r, void*) { undefined(r, "index out of the array's bounds"); }
void __ubsan_handle_float_cast_overflow(UbsanRecord* r, void*) { undefined(r, "float to integer conversion out of range"); }
void __ubsan_handle_divrem_overflow(UbsanRecord* r, void*, void*) { undefined(r, "integer division by zero"); }

}  // extern "C"
#endif
