// What Hopper does beside its threads: bulk tensor copies and the products of warp groups (wgmma). Also the mbarriers by
// which threads learn of them. kernels/hopper.cuh explains each.
//
// A copy or a group of products, once issued, is in flight until no thread can go on without it. Then they happen one at a
// time, products first (in the random order also at any moment before, and in any order). Until then a copy's destination
// and a product's accumulators are poison. So a read that comes too early finds NaN, and so does a product whose operands
// are overwritten too early.
#include <algorithm>
#include <deque>

#include "machine.h"
#include "product.h"

namespace simt {

constexpr int kGroup = 128;      // threads of a warp group
constexpr int kRow = 128;        // bytes of a tile's row, the span of the swizzle
constexpr int kPattern = 1024;   // bytes after which the swizzle repeats
constexpr uint64_t kBarrierTag = 0x6d62617272696572, kMapTag = 0x70616d2072736e74;

struct Mbarrier {
    uintptr_t address;
    const Thread* maker;
    uint32_t arrivals, pending;  // a phase's, and those that it still awaits
    int64_t bytes = 0;           // that it still awaits
    int64_t expected = 0;        // of the phase's bytes
    uint32_t phase = 0;
    bool fenced = false;
    int in_flight = 0;           // copies
    std::vector<Thread*> waiting;
    // The last copy, and how far somebody has waited.
    uint32_t copied_phase = 0, waited_phase = 0;
    const Thread* copier = nullptr;
    Where copied_at{};
};

// What the host encodes in place of the driver (emulated.rs): dimensions in the order x, y or c, w, h, n.
struct Map {
    uint64_t tag, address;
    uint64_t strides[3];            // bytes, of all dimensions but the first
    uint32_t size[4], im2col;
    uint32_t box[2];                // columns and rows; channels and pixels
    int32_t lower[2], upper[2];     // im2col: corners of the bounding box, w and h
};

struct BulkCopy {
    const Thread* thread;
    uintptr_t to;
    Map map;
    int barrier;
    Box box;
    Where at;
};

struct WarpGroup {
    int committing = 0, completed = 0;
    const Thread* first = nullptr;  // of the committing
    std::deque<std::vector<Product>> groups;  // in flight
};

struct NamedBarrier {
    int threads = 0;
    std::vector<const Thread*> waiting, arrived;  // the latter do not wait

    void clear() { waiting.clear(), arrived.clear(); }
};

struct Hopper {
    std::vector<Mbarrier> barriers;
    std::vector<BulkCopy> copies;
    WarpGroup groups[kMaxGroups];
    NamedBarrier named[16];
    // Operands in f32, and the accumulators by slot: [64][n].
    alignas(32) float a[64][16];
    alignas(32) float b[32][16][8];
    std::vector<std::vector<float>> tiles;
};

static const Op kMbarrierWait = {"mbarrier_wait", nullptr}, kNamedBarrier = {"named_barrier", nullptr},
                kCommit = {"wgmma_commit", nullptr}, kProductWait = {"wgmma_wait", nullptr};

static Hopper& hopper(const char* what, Where at) {
    Machine& m = *current();
    if (!m.launch->kernel->hopper)
        fail(*m.self, at, "%s: only sm_90a has it, and the kernel is not exported by KERNEL_EXPORT_HOPPER", what);
    return *m.hopper;
}

static void ready(Machine& m, const Thread& t) { make_ready(m, t.linear / 32, 1u << (t.linear & 31)); }

static void block(Machine& m, const Op& op, Where at) {
    Thread& t = *m.self;
    t.op = &op, t.at = at, t.mask = 0, t.state = State::waiting;
    wait(m);
}

// Whether the bytes lie in one array of shared memory.
static bool inside(const Machine& m, uintptr_t a, size_t bytes) {
    for (const auto& v : m.variables)
        if (a >= v.begin && a + bytes <= v.end) return true;
    return false;
}

static std::string place(uintptr_t a) {
    Machine& m = *current();
    for (const auto& v : m.variables)
        if (a >= v.begin && a < v.end)
            return "byte " + std::to_string(a - v.begin) + " of " + std::to_string(v.end - v.begin) +
                   (v.variable ? " of the shared array " + v.variable->name : " of dynamic shared memory");
    return describe_address(a);
}

// ---- mbarriers --------------------------------------------------------------------------------

void mbarrier_init(uintptr_t address, uint32_t arrivals, Where at) {
    Hopper& h = hopper("mbarrier_init", at);
    Machine& m = *current();
    const Thread& t = *m.self;
    if (address % 8) fail(t, at, "mbarrier_init: the address is not a multiple of 8");
    if (!inside(m, address, 8)) fail(t, at, "mbarrier_init: not in shared memory: %s", describe_address(address).c_str());
    if (!arrivals || arrivals >= 1 << 20) fail(t, at, "mbarrier_init: %u arrivals, expected 1 to 2^20 - 1", arrivals);
    for (const Mbarrier& b : h.barriers)
        if (b.address == address) fail(t, at, "mbarrier_init: there is an mbarrier at %s already", place(address).c_str());
    if (h.barriers.size() == kMaxBarriers) fail(t, at, "mbarrier_init: more than %d mbarriers", kMaxBarriers);
    const int index = int(h.barriers.size());
    check_mbarrier_made(t, index, address, at);
    Mbarrier b;
    b.address = address, b.maker = &t, b.arrivals = b.pending = arrivals;
    h.barriers.push_back(b);
    const uint64_t bits = kBarrierTag + index;
    memcpy(reinterpret_cast<void*>(address), &bits, 8);
}

void mbarrier_init_fence(Where at) {
    for (Mbarrier& b : hopper("fence_mbarrier_init", at).barriers)
        if (b.maker == current()->self) b.fenced = true;
}

static int find_barrier(Hopper& h, const char* what, uintptr_t address, Where at) {
    Machine& m = *current();
    uint64_t bits = 0;
    if (address % 8 == 0 && inside(m, address, 8)) memcpy(&bits, reinterpret_cast<void*>(address), 8);
    const uint64_t index = bits - kBarrierTag;
    if (index >= h.barriers.size() || h.barriers[index].address != address)
        fail(*m.self, at, "%s: there is no mbarrier at %s: none was made, or it was overwritten", what, place(address).c_str());
    check_mbarrier_used(*m.self, int(index), at);
    return int(index);
}

// "phase 3 (parity 1) of the mbarrier at byte 64 of 128 of dynamic shared memory"
static std::string describe(const Mbarrier& b) {
    return "phase " + std::to_string(b.phase) + " (parity " + std::to_string(b.phase & 1) + ") of the mbarrier at " + place(b.address);
}

// Turns the phase if everything has come; `thread` brought the last of it.
static void turn(Machine& m, int index, const Thread& thread, Where at) {
    Hopper& h = *m.hopper;
    Mbarrier& b = h.barriers[index];
    if (b.pending) return;
    if (b.bytes < 0)
        fail(thread, at, "%s has got more bytes than the %lld that were expected", describe(b).c_str(), (long long)b.expected);
    if (b.bytes) return;
    if (b.in_flight)
        for (const BulkCopy& c : h.copies)
            if (c.barrier == index)
                fail(*c.thread, c.at, "%s is over while this bulk copy is in flight: only %lld bytes were expected", describe(b).c_str(),
                     (long long)b.expected);
    b.phase++, b.pending = b.arrivals, b.expected = 0;
    check_phase_over(index);
    for (const Thread* t : b.waiting) ready(m, *t);
    b.waiting.clear();
}

void mbarrier_arrive(uintptr_t address, uint32_t bytes, Where at) {
    Hopper& h = hopper("mbarrier_arrive", at);
    Machine& m = *current();
    const Thread& t = *m.self;
    const int index = find_barrier(h, bytes ? "mbarrier_expect" : "mbarrier_arrive", address, at);
    Mbarrier& b = h.barriers[index];
    if (bytes >= 1 << 20) fail(t, at, "mbarrier_expect: %u bytes, expected fewer than 2^20", bytes);
    if (!b.pending) fail(t, at, "%s: more arrivals than its %u", describe(b).c_str(), b.arrivals);
    b.bytes += bytes, b.expected += bytes, b.pending--;
    check_release(t, index);
    turn(m, index, t, at);
}

void mbarrier_wait(uintptr_t address, uint32_t parity, Where at) {
    Hopper& h = hopper("mbarrier_wait", at);
    Machine& m = *current();
    Thread& t = *m.self;
    const int index = find_barrier(h, "mbarrier_wait", address, at);
    if (parity > 1) fail(t, at, "mbarrier_wait: the parity is %u, expected 0 or 1", parity);
    const uint32_t phase = h.barriers[index].phase;
    if ((phase & 1) == parity) {
        h.barriers[index].waiting.push_back(&t);
        t.data = reinterpret_cast<void*>(intptr_t(index));
        block(m, kMbarrierWait, at);
        if (h.barriers[index].phase != phase + 1)
            fail(t, at, "mbarrier_wait: %s: the phase after the awaited one is over too, so this thread might wait for ever",
                 describe(h.barriers[index]).c_str());
    }
    Mbarrier& b = h.barriers[index];
    b.waited_phase = std::max(b.waited_phase, b.phase);
    check_acquire(t, index);
}

// The calling thread comes to a named barrier, and waits or not.
static void come(const char* name, int id, int threads, bool waits, Where at) {
    Hopper& h = hopper(name, at);
    Machine& m = *current();
    const Thread& t = *m.self;
    if (id < 1 || id > 15) fail(t, at, "%s: id %d, expected 1 to 15 (0 is __syncthreads)", name, id);
    if (threads <= 0 || threads % 32 || threads > m.count)
        fail(t, at, "%s %d: %d threads, expected whole warps, at most the block's %d threads", name, id, threads, m.count);
    NamedBarrier& b = h.named[id];
    if (b.waiting.empty() && b.arrived.empty()) b.threads = threads;
    if (b.threads != threads) fail(t, at, "%s %d: %d threads, but another thread came with %d", name, id, threads, b.threads);
    if (std::find(b.arrived.begin(), b.arrived.end(), &t) != b.arrived.end())
        fail(t, at, "%s %d: the thread has arrived already, and not all others have", name, id);
    (waits ? b.waiting : b.arrived).push_back(&t);
    if (!waits) check_named_arrival(t, id);
    if (int(b.waiting.size() + b.arrived.size()) == threads) {
        uint32_t lanes[kMaxWarps] = {};
        for (const auto* list : {&b.waiting, &b.arrived})
            for (const Thread* other : *list) lanes[other->linear / 32] |= 1u << (other->linear & 31);
        for (const auto* list : {&b.waiting, &b.arrived})
            for (const Thread* other : *list)
                if (lanes[other->linear / 32] != ~0u) fail(*other, at, "%s %d: not all lanes of the warp take part", name, id);
        check_meeting(b.waiting.data(), int(b.waiting.size()), id);
        for (const Thread* other : b.waiting) ready(m, *other);
        b.clear();
    }
    if (waits) block(m, kNamedBarrier, at);
}

void named_barrier(int id, int threads, Where at) { come("named_barrier", id, threads, true, at); }
void named_arrive(int id, int threads, Where at) { come("named_arrive", id, threads, false, at); }

void async_fence(Where at) {
    hopper("fence_async_shared", at);
    current()->self->async_fences++;
}

// ---- bulk copies ------------------------------------------------------------------------------

// Calls row(r, bytes before, source, bytes) for each row of the box. Zeros stand for what is outside.
template <class F>
static void for_rows(const Map& map, const Box& box, F row) {
    const int first = box.at[0], from = std::max(first, 0);
    const int until = int(std::min<int64_t>(int64_t(first) + map.box[0], map.size[0]));
    auto tell = [&](uint32_t r, const int* at, int dims) {  // at: coordinates of all dimensions but the first
        uint64_t address = map.address + from * int64_t(2);
        bool valid = from < until;
        for (int d = 0; d < dims; d++) {
            valid = valid && at[d] >= 0 && uint32_t(at[d]) < map.size[d + 1];
            address += at[d] * map.strides[d];
        }
        row(r, valid ? (from - first) * 2 : 0, reinterpret_cast<const unsigned char*>(address), valid ? (until - from) * 2 : 0);
    };
    if (!map.im2col) {
        for (uint32_t r = 0; r < map.box[1]; r++) {
            const int y = box.at[1] + int(r);
            tell(r, &y, 1);
        }
        return;
    }
    int w = box.at[1], h = box.at[2], n = box.at[3];
    for (uint32_t r = 0; r < map.box[1]; r++) {
        const int at[3] = {w + box.offset[0], h + box.offset[1], n};
        tell(r, at, 3);
        if (++w < int(map.size[1]) + map.upper[0]) continue;
        w = map.lower[0];
        if (++h < int(map.size[2]) + map.upper[1]) continue;
        h = map.lower[1], n++;
    }
}

void bulk_load(uintptr_t to, const void* encoded, uintptr_t barrier, const Box& box, Where at) {
    const char* what = box.im2col ? "tma_load_im2col" : "tma_load_2d";
    Hopper& h = hopper(what, at);
    Machine& m = *current();
    const Thread& t = *m.self;
    const int index = find_barrier(h, what, barrier, at);
    Mbarrier& b = h.barriers[index];
    if (!b.fenced) fail(t, at, "%s: no fence_mbarrier_init by the thread that made the mbarrier", what);
    Map map;
    memcpy(&map, encoded, sizeof map);
    if (map.tag != kMapTag) fail(t, at, "%s: not a tensor map of this device", what);
    if (bool(map.im2col) != box.im2col) fail(t, at, "%s: the tensor map is %s", what, map.im2col ? "for im2col" : "of a matrix");
    const size_t bytes = size_t(map.box[1]) * kRow;
    if (to % kPattern)
        fail(t, at, "%s: the destination is not a multiple of 1024 bytes, where the swizzle's pattern begins (of 128: %s)", what,
             to % 128 ? "neither" : "it is");
    if (!inside(m, to, bytes))
        fail(t, at, "%s: the box of %zu bytes from %s on goes beyond it", what, bytes, place(to).c_str());
    for (int i = 0; i < 2 && box.im2col; i++) {
        const int first = box.at[1 + i], end = int(map.size[1 + i]) + map.upper[i], offset = box.offset[i];
        if (first < map.lower[i] || first >= end)
            fail(t, at, "%s: the first pixel's base has %s = %d, expected %d to %d, the map's bounding box", what, i ? "h" : "w", first,
                 map.lower[i], end - 1);
        if (offset < 0 || offset > 255) fail(t, at, "%s: the offset along %s is %d, expected 0 to 255", what, i ? "h" : "w", offset);
    }
    if (kChecked)
        for_rows(map, box, [&](uint32_t, int, const unsigned char* source, int n) {
            if (n) check_access(t, uintptr_t(source), n, Access::read, at);
        });
    uint32_t name = 1;  // of the map, by its content
    for (int i = 0; i < int(sizeof map); i++) name = name * 31 + reinterpret_cast<const unsigned char*>(&map)[i];
    check_bulk_issued(t, index, name | 1, to, bytes, at);
    if (m.launch->poison) memset(reinterpret_cast<void*>(to), kPoison, bytes);
    b.in_flight++;
    b.copied_phase = b.phase + 1, b.copier = &t, b.copied_at = at;
    h.copies.push_back({&t, to, map, index, box, at});
}

static void land(Machine& m, size_t which) {
    Hopper& h = *m.hopper;
    const BulkCopy c = h.copies[which];
    h.copies.erase(h.copies.begin() + which);
    m.fault_where = &c.at, m.fault_thread = c.thread;
    for_rows(c.map, c.box, [&](uint32_t r, int before, const unsigned char* source, int n) {
        unsigned char row[kRow] = {};
        memcpy(row + before, source, n);
        unsigned char* to = reinterpret_cast<unsigned char*>(c.to) + r * kRow;
        for (int chunk = 0; chunk < 8; chunk++) memcpy(to + (chunk ^ (r & 7)) * 16, row + chunk * 16, 16);
    });
    m.fault_where = nullptr, m.fault_thread = nullptr;
    const size_t bytes = size_t(c.map.box[1]) * kRow;
    check_bulk_landed(c.barrier, c.to, bytes);
    Mbarrier& b = h.barriers[c.barrier];
    b.in_flight--, b.bytes -= int64_t(bytes);
    turn(m, c.barrier, *c.thread, c.at);
}

// ---- wgmma ------------------------------------------------------------------------------------

// A descriptor of this device: address in shared memory / 16 (24 bits), leading / 16 and stride / 16 (14 each).
constexpr uint64_t kDescriptorTag = uint64_t(0xde) << 56;

uint64_t wgmma_descriptor(uintptr_t address, uint32_t leading, uint32_t stride, Where at) {
    hopper("wgmma_descriptor", at);
    Machine& m = *current();
    if (address % 16 || leading % 16 || stride % 16)
        fail(*m.self, at, "wgmma_descriptor: address, leading and stride bytes are multiples of 16");
    if (!m.is_shared(address)) fail(*m.self, at, "wgmma_descriptor: not in shared memory: %s", describe_address(address).c_str());
    if (leading >= 1 << 18 || stride >= 1 << 18) fail(*m.self, at, "wgmma_descriptor: leading and stride bytes are below 2^18");
    return (address - m.statics) / 16 | uint64_t(leading / 16) << 24 | uint64_t(stride / 16) << 38 | kDescriptorTag;
}

static void require_group(const Machine& m, const char* what, Where at) {
    if ((m.self->linear | (kGroup - 1)) >= m.count)
        fail(*m.self, at, "%s: needs a warp group of 128 threads, and this one is not whole", what);
}

void wgmma(float* d, uint64_t a, uint64_t b, const WgmmaShape& shape, Where at) {
    hopper("wgmma", at);
    Machine& m = *current();
    Thread& t = *m.self;
    require_group(m, "wgmma", at);
    int slot = -1, unused = -1;
    for (size_t i = 0; i < t.accumulators.size(); i++) {
        const Accumulators& other = t.accumulators[i];
        if (!other.d) unused = int(i);
        else if (other.d == d && other.n == shape.n) slot = int(i);
        else if (other.d < d + shape.n / 2 && d < other.d + other.n / 2)
            fail(t, at, "wgmma: the accumulators overlap those of another shape in flight");
    }
    if (slot < 0) {
        if (!t.fenced) fail(t, at, "wgmma: no wgmma_fence since the accumulators could be touched");
        if (unused < 0) unused = int(t.accumulators.size()), t.accumulators.emplace_back();
        slot = unused;
        Accumulators& mine = t.accumulators[slot];
        mine.d = d, mine.n = shape.n;
        memcpy(mine.values, d, shape.n * 2);
        if (m.launch->poison) memset(d, kPoison, shape.n * 2);
    }
    t.accumulators[slot].last_group = t.committed;
    t.products.push_back({slot, a, b, shape, at});
}

void wgmma_fence(Where at) {
    hopper("wgmma_fence", at);
    current()->self->fenced = true;
}

void wgmma_commit(Where at) {
    Hopper& h = hopper("wgmma_commit", at);
    Machine& m = *current();
    Thread& t = *m.self;
    require_group(m, "wgmma_commit", at);
    WarpGroup& g = h.groups[t.linear / kGroup];
    if (!g.committing++) g.first = &t;
    else if (g.first->at.line != at.line || strcmp(g.first->at.file, at.file))
        fail(t, at, "wgmma_commit: thread (%u,%u,%u) of the warp group is in another, at %s:%d", g.first->index.x, g.first->index.y,
             g.first->index.z, g.first->at.file, g.first->at.line);
    t.committed++;
    if (g.committing == kGroup) {
        g.committing = 0;
        Thread* threads = &m.threads[t.linear / kGroup * kGroup];
        const std::vector<Product>& ours = t.products;
        for (int i = 0; i < kGroup; i++) {
            const std::vector<Product>& theirs = threads[i].products;
            bool same = theirs.size() == ours.size();
            for (size_t p = 0; same && p < ours.size(); p++)
                same = ours[p].a == theirs[p].a && ours[p].b == theirs[p].b && ours[p].accumulators == theirs[p].accumulators &&
                       ours[p].at.line == theirs[p].at.line && ours[p].shape.n == theirs[p].shape.n;
            if (!same)
                fail(threads[i], at, "wgmma: thread (%u,%u,%u) of the warp group has issued other products than this one since the last commit",
                     t.index.x, t.index.y, t.index.z);
        }
        g.groups.push_back(ours);
        for (int i = 0; i < kGroup; i++) threads[i].products.clear();
        for (int w = 0; w < kGroup / 32; w++) make_ready(m, t.linear / kGroup * 4 + w, ~0u);
    }
    block(m, kCommit, at);
}

void wgmma_wait(int groups_left, Where at) {
    Hopper& h = hopper("wgmma_wait", at);
    Machine& m = *current();
    Thread& t = *m.self;
    require_group(m, "wgmma_wait", at);
    const int group = t.linear / kGroup;
    t.needed = t.committed - groups_left;
    if (h.groups[group].completed < t.needed) block(m, kProductWait, at);
    check_products_over(t, group, t.needed);
    for (Accumulators& mine : t.accumulators) {
        if (!mine.d || mine.last_group >= t.needed) continue;
        const size_t bytes = mine.n * 2;
        for (size_t i = 0; i < bytes && m.launch->poison; i++)
            if (reinterpret_cast<unsigned char*>(mine.d)[i] != kPoison)
                fail(t, at, "wgmma_wait: accumulator %zu was written while the products were in flight", i / 4);
        memcpy(mine.d, mine.values, bytes);
        mine.d = nullptr, t.fenced = false;
    }
}

// One operand: its chunks of 16 bytes lie at chunk(i, j) - K-major: row i and half j of the 16 k; MN-major: k = i
// and columns 8j to 8j + 7.
class Operand {
    const uintptr_t start, leading, stride;

public:
    const bool mn_major;
    Operand(const Machine& m, uint64_t d, bool mn_major)
        : start(m.statics + (d & 0xffffff) * 16), leading((d >> 24 & 0x3fff) * 16), stride((d >> 38 & 0x3fff) * 16), mn_major(mn_major) {}
    uintptr_t chunk(int i, int j) const {
        uintptr_t a = start + i / 8 * stride + i % 8 * kRow;
        a += mn_major ? j / 8 * leading + j % 8 * 16 : j * 16;
        return a ^ (a >> 7 & 7) << 4;
    }
    __m128i load(int i, int j) const { return _mm_load_si128(reinterpret_cast<const __m128i*>(chunk(i, j))); }

    void check(const Machine& m, const Thread& t, int group, int columns, const char* name, Where at) const {
        if (mn_major ? start % kPattern : start % kPattern & ~uintptr_t(96))
            fail(t, at, "wgmma: %s begins at %s, which is not a multiple of 1024 bytes%s", name, place(start).c_str(),
                 mn_major ? "" : " plus 0, 32, 64 or 96");
        if (stride % kPattern || !stride || (mn_major && columns > 64 && (leading % kPattern || !leading)))
            fail(t, at, "wgmma: %s has a leading of %zu and a stride of %zu bytes, expected multiples of 1024", name, size_t(leading),
                 size_t(stride));
        uintptr_t pieces[512];
        int count = 0;
        auto require = [&] {
            for (int i = 0; i < count; i++)
                if (!inside(m, pieces[i], 16))
                    fail(t, at, "wgmma: the descriptor of %s reaches beyond shared memory: %s", name, describe_address(pieces[i]).c_str());
            check_operand(t, group, pieces, count, 16, at);
            count = 0;
        };
        for (int r = 0; r < columns && !mn_major; r++)
            for (int j = 0; j < 2; j++) pieces[count++] = chunk(r, j);
        // Blocks of 64 columns may come from different tensors.
        for (int block = 0; block < columns / 8 && mn_major; block += 8) {
            for (int k = 0; k < 16; k++)
                for (int j = block; j < std::min(block + 8, columns / 8); j++) pieces[count++] = chunk(k, j);
            require();
        }
        if (!mn_major) require();
    }
};

static void run_products(Machine& m, int group) {
    Hopper& h = *m.hopper;
    WarpGroup& g = h.groups[group];
    const std::vector<Product> products = g.groups.front();
    g.groups.pop_front();
    Thread* threads = &m.threads[group * kGroup];
    check_products_begin(group);
    // Row r of warp w's 16 lies in lanes 4 (r % 8) ..+3, as in an mma.
    auto move = [&](int slot, bool gather) {
        const int n = threads[0].accumulators[slot].n;
        float* tile = h.tiles[slot].data();
        for (int i = 0; i < kGroup; i++) {
            float* values = threads[i].accumulators[slot].values;
            float* row = tile + (i / 32 * 16 + i % 32 / 4) * n + i % 4 * 2;
            for (int j = 0; j < n / 8; j++)
                for (int half = 0; half < 2; half++) {
                    float* here = row + half * 8 * n + j * 8;
                    if (gather) memcpy(here, values + j * 4 + half * 2, 8);
                    else memcpy(values + j * 4 + half * 2, here, 8);
                }
        }
    };
    std::vector<bool> gathered(threads[0].accumulators.size());
    if (h.tiles.size() < gathered.size()) h.tiles.resize(gathered.size());
    const Product* last = nullptr;
    for (const Product& p : products) {
        const int n = p.shape.n, slot = p.accumulators;
        const bool bf16 = p.shape.element == Element::bf16, mn = p.shape.mn_major;
        if (p.a >> 52 << 52 != kDescriptorTag || p.b >> 52 << 52 != kDescriptorTag)
            fail(threads[0], p.at, "wgmma: not a descriptor made by wgmma_descriptor");
        const Operand a(m, p.a, mn), b(m, p.b, mn);
        a.check(m, threads[0], group, 64, "A", p.at);
        b.check(m, threads[0], group, n, "B", p.at);
        if (!gathered[slot]) {
            h.tiles[slot].resize(64 * 256);
            move(slot, true);
            gathered[slot] = true;
        }
        __m128i c[8];
        for (int r = 0; r < 64; r += 8)
            for (int half = 0; half < 2; half++) {
                for (int i = 0; i < 8; i++) c[i] = mn ? a.load(half * 8 + i, r / 8) : a.load(r + i, half);
                if (mn) transpose8x8(c);
                for (int i = 0; i < 8; i++) widen(c[i], bf16, h.a[r + i] + half * 8);
            }
        const bool again = last && last->b == p.b && last->shape.n == n && last->shape.element == p.shape.element && last->shape.mn_major == mn;
        for (int j = 0; j < n / 8 && !again; j++)
            for (int half = 0; half < 2; half++) {
                for (int i = 0; i < 8; i++) c[i] = mn ? b.load(half * 8 + i, j) : b.load(j * 8 + i, half);
                if (!mn) transpose8x8(c);
                for (int i = 0; i < 8; i++) widen(c[i], bf16, h.b[j][half * 8 + i]);
            }
        last = &p;
        float* tile = h.tiles[slot].data();
        for (int j = 0; j < n / 8; j += 2)
            for (int r = 0; r < 64; r += 4) {
                float* d = tile + r * n + j * 8;
                if (j + 2 <= n / 8) multiply<2>(h.a + r, h.b + j, d, n);
                else multiply<1>(h.a + r, h.b + j, d, n);
            }
    }
    for (size_t slot = 0; slot < gathered.size(); slot++)
        if (gathered[slot]) move(int(slot), false);
    g.completed++;
    for (int i = 0; i < kGroup; i++) {
        const Thread& t = threads[i];
        if (t.state == State::waiting && t.op == &kProductWait && t.needed <= g.completed) ready(m, t);
    }
}

// ---- the scheduler's side -----------------------------------------------------------------------

void hopper_block_start(Machine& m) {
    if (!m.hopper) m.hopper = new Hopper;
    Hopper& h = *m.hopper;
    h.barriers.clear(), h.copies.clear();
    for (WarpGroup& g : h.groups) g = {};
    for (NamedBarrier& b : h.named) b.clear();
    for (int i = 0; i < m.count; i++) {
        Thread& t = m.threads[i];
        t.accumulators.clear(), t.products.clear();
        t.committed = 0, t.fenced = false, t.async_fences = 0;
    }
}

void hopper_thread_end(Machine& m, const Thread& t) {
    if (!t.products.empty()) fail(t, t.products.back().at, "the thread has left the kernel with this wgmma not committed");
    for (const Accumulators& a : t.accumulators)
        if (a.d) fail(t, t.at, "the thread has left the kernel with products in flight: no wgmma_wait after this");
    if (m.alive) return;
    for (const Mbarrier& b : m.hopper->barriers)
        if (b.copied_phase > b.waited_phase)
            fail(*b.copier, b.copied_at, "nobody has waited for this bulk copy, which may write into the next block's shared memory");
}

bool hopper_progress(Machine& m, bool stuck) {
    Hopper& h = *m.hopper;
    auto draw = [&](uint32_t below) {
        m.random ^= m.random << 13, m.random ^= m.random >> 7, m.random ^= m.random << 17;
        return uint32_t((m.random >> 32) * below >> 32);
    };
    uint32_t groups = 0;
    for (int g = 0; g * kGroup < m.count; g++)
        if (!h.groups[g].groups.empty()) groups |= 1u << g;
    if (!groups && h.copies.empty()) return false;
    if (!stuck && draw(4)) return true;
    const Order order = m.launch->order;
    bool copy = order == Order::random && draw(uint32_t(h.copies.size()) + __builtin_popcount(groups)) < h.copies.size();
    if (!groups || copy)
        land(m, order == Order::forward ? 0 : order == Order::reversed ? h.copies.size() - 1 : draw(uint32_t(h.copies.size())));
    else
        run_products(m, choose(groups, m));
    return true;
}

void hopper_deadlock(Machine& m) {
    Hopper& h = *m.hopper;
    const Thread* waits = nullptr;
    for (const Thread* t = m.threads; t < m.threads + m.count; t++) {
        if (t->state != State::waiting || t->op != &kMbarrierWait) continue;
        // Name first a barrier that lacks nothing but bytes, as that is where the trouble began.
        const Mbarrier& b = h.barriers[intptr_t(t->data)];
        if (!waits || (!b.pending && b.bytes)) waits = t;
        if (!b.pending && b.bytes) break;
    }
    if (waits) {
        const Mbarrier& b = h.barriers[intptr_t(waits->data)];
        fail(*waits, waits->at, "deadlock: mbarrier_wait: %s lacks %u of %u arrivals and %lld of %lld bytes, and nothing is in flight",
             describe(b).c_str(), b.pending, b.arrivals, (long long)b.bytes, (long long)b.expected);
    }
    for (const Thread* t = m.threads; t < m.threads + m.count; t++) {
        if (t->state != State::waiting) continue;
        if (t->op == &kNamedBarrier)
            for (int id = 1; id < 16; id++) {
                const NamedBarrier& b = h.named[id];
                if (std::find(b.waiting.begin(), b.waiting.end(), t) != b.waiting.end())
                    fail(*t, t->at, "deadlock: named_barrier %d: %zu of %d threads have come", id, b.waiting.size() + b.arrived.size(), b.threads);
            }
        if (t->op == &kCommit)
            for (const Thread* other = &m.threads[t->linear / kGroup * kGroup]; ; other++)
                if (other->op != &kCommit || other->state != State::waiting)
                    fail(*t, t->at, "divergent wgmma_commit: waits for thread (%u,%u,%u), which %s", other->index.x, other->index.y,
                         other->index.z, other->state == State::done ? "has left the kernel" : "waits elsewhere");
    }
}

}  // namespace simt
