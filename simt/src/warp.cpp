// The warp-wide operations: mma, ldmatrix, shuffles, reductions, and atomics beside them.
//
// Each gets all 32 lanes' registers at once and works on them in place. Fragment layouts are
// those of ptx.cuh. A product m16n8k16 is 2048 multiply-adds in 60-100 ns with AVX2.
#include <algorithm>

#include "machine.h"
#include "product.h"

namespace simt {

constexpr uint32_t kAll = 0xffffffffu;

static Thread& lane_thread(int lane) { return current()->threads[(current()->self->linear & ~31) + lane]; }

// ---- mma --------------------------------------------------------------------------------------

struct MmaLane {
    void* d;
    const uint32_t *a, *b;
};

// Row r of an accumulator tile lies in the lanes 4 (r % 8) ..+3, two columns each.
static inline void load_row(void* const* d, int tile, int r, Accumulator kind, float* out) {
    int word = r / 8;
    void* const* lanes = d + 4 * (r % 8);
    if (kind == Accumulator::f32) {
        for (int c = 0; c < 4; c++) memcpy(out + 2 * c, static_cast<float*>(lanes[c]) + 4 * tile + 2 * word, 8);
    } else {
        uint32_t w[4];
        for (int c = 0; c < 4; c++) w[c] = static_cast<uint32_t*>(lanes[c])[2 * tile + word];
        widen(_mm_loadu_si128(reinterpret_cast<__m128i*>(w)), false, out);
    }
}

static inline void store_row(void* const* d, int tile, int r, Accumulator kind, const float* in) {
    int word = r / 8;
    void* const* lanes = d + 4 * (r % 8);
    for (int c = 0; c < 4; c++) {
        if (kind == Accumulator::f32) {
            memcpy(static_cast<float*>(lanes[c]) + 4 * tile + 2 * word, in + 2 * c, 8);
        } else {
            static_cast<uint32_t*>(lanes[c])[2 * tile + word] =
                float_to_half(in[2 * c]) | uint32_t(float_to_half(in[2 * c + 1])) << 16;
        }
    }
}

template <int COLUMNS, Accumulator KIND>
static inline void multiply_tile(const Machine& machine, void* const* d, int m, int n, int columns) {
    for (int r0 = 0; r0 < 16; r0 += 4) {
        float rows[4][COLUMNS][8];
        for (int r = 0; r < 4; r++)
            for (int c = 0; c < COLUMNS; c++) load_row(d, m * columns + n + c, r0 + r, KIND, rows[r][c]);
        multiply<COLUMNS>(machine.a_rows + m * 16 + r0, machine.b_rows + n, rows[0][0], COLUMNS * 8);
        for (int r = 0; r < 4; r++)
            for (int c = 0; c < COLUMNS; c++) store_row(d, m * columns + n + c, r0 + r, KIND, rows[r][c]);
    }
}

template <Accumulator KIND>
static void multiply_all(void* const* d, int m, int n) {
    for (int i = 0; i < m; i++) {
        int j = 0;
        for (; j + 2 <= n; j += 2) multiply_tile<2, KIND>(*current(), d, i, j, n);
        if (j < n) multiply_tile<1, KIND>(*current(), d, i, j, n);
    }
}

static void run_mma(void* const* lanes, uint32_t, const void* imm) {
    const MmaShape& shape = *static_cast<const MmaShape*>(imm);
    bool bf16 = shape.element == Element::bf16;
    auto gather = [&](int row, auto word) {  // one word of each of the four lanes of a row
        const MmaLane* const* l = reinterpret_cast<const MmaLane* const*>(lanes) + 4 * row;
        return _mm_setr_epi32(word(*l[0]), word(*l[1]), word(*l[2]), word(*l[3]));
    };
    for (int i = 0; i < shape.m; i++)
        for (int r = 0; r < 16; r++)
            for (int k = 0; k < 2; k++)
                widen(gather(r % 8, [&](const MmaLane& l) { return l.a[4 * i + 2 * k + r / 8]; }), bf16,
                      current()->a_rows[16 * i + r] + 8 * k);
    for (int j = 0; j < shape.n; j++)
        for (int k = 0; k < 2; k++) {
            __m128i columns[8];
            for (int c = 0; c < 8; c++) columns[c] = gather(c, [&](const MmaLane& l) { return l.b[2 * j + k]; });
            transpose8x8(columns);
            for (int r = 0; r < 8; r++) widen(columns[r], bf16, current()->b_rows[j][8 * k + r]);
        }
    void* d[32];
    for (int i = 0; i < 32; i++) d[i] = static_cast<const MmaLane*>(lanes[i])->d;
    if (shape.accumulator == Accumulator::f32) multiply_all<Accumulator::f32>(d, shape.m, shape.n);
    else multiply_all<Accumulator::f16>(d, shape.m, shape.n);
}

void mma(void* d, const uint32_t* a, const uint32_t* b, const MmaShape& shape, Where at) {
    static const Op op = {"mma", run_mma, true};
    if (shape.m > kMaxTiles || shape.n > kMaxTiles) trap("mma_tile: more than 16 tiles a side", at);
    MmaLane lane = {d, a, b};
    collective(op, kAll, &lane, &shape, at);
}

// ---- ldmatrix ---------------------------------------------------------------------------------

struct LdmatrixLane {
    uint32_t* registers;
    const uintptr_t* rows;
};
struct LdmatrixShape {
    int count, matrices;
    bool trans;
    Where at;
};

// Wavefronts beyond the first one. The same row twice counts as one access.
static int row_conflicts(const uintptr_t* addresses) {
    int used[8] = {}, most = 1;
    for (int r = 0; r < 8; r++)
        if (std::find(addresses, addresses + r, addresses[r]) == addresses + r)
            most = std::max(most, ++used[addresses[r] / 16 % 8]);
    return most - 1;
}

static void run_ldmatrix(void* const* lanes, uint32_t, const void* imm) {
    const LdmatrixShape& shape = *static_cast<const LdmatrixShape*>(imm);
    Machine& m = *current();
    auto lane = [&](int i) { return static_cast<const LdmatrixLane*>(lanes[i]); };
    uint64_t conflicts = 0;
    for (int n = 0; n < shape.count; n++)
        for (int j = 0; j < shape.matrices; j++) {
            __m128i rows[8];
            uintptr_t addresses[8];
            uint32_t banks = 0;  // a row covers four of the 32
            for (int r = 0; r < 8; r++) {
                const uintptr_t address = addresses[r] = lane(8 * j + r)->rows[n];
                const Thread& t = lane_thread(8 * j + r);
                if (address % 16) fail(t, shape.at, "ldmatrix: the row's address is not a multiple of 16");
                if (!m.is_shared(address))
                    fail(t, shape.at, "ldmatrix: the row is not in shared memory: %s", describe_address(address).c_str());
                check_access(t, address, 16, Access::read, shape.at);
                rows[r] = _mm_load_si128(reinterpret_cast<const __m128i*>(address));
                banks |= 1u << address / 16 % 8;
            }
            if (banks != 0xff) conflicts += row_conflicts(addresses);
            if (shape.trans) transpose8x8(rows);
            for (int r = 0; r < 8; r++) {
                uint32_t words[4];
                memcpy(words, &rows[r], 16);
                for (int c = 0; c < 4; c++) lane(4 * r + c)->registers[n * shape.matrices + j] = words[c];
            }
        }
    if (conflicts) m.launch->conflicts += conflicts;
}

void ldmatrix(uint32_t* registers, const uintptr_t* rows, int count, int matrices, bool trans, Where at) {
    static const Op op = {"ldmatrix", run_ldmatrix, true};
    LdmatrixLane lane = {registers, rows};
    LdmatrixShape shape = {count, matrices, trans, at};
    collective(op, kAll, &lane, &shape, at);
}

// ---- shuffles, votes, reductions, __syncwarp --------------------------------------------------

struct ShuffleLane {
    void* value;
    int operand;
};
struct ShuffleShape {
    Shuffle kind;
    size_t size;
    int width;
    Where at;
};

static void run_shuffle(void* const* lanes, uint32_t mask, const void* imm) {
    const ShuffleShape& shape = *static_cast<const ShuffleShape*>(imm);
    uint64_t before[32];
    for (uint32_t l = mask; l; l &= l - 1) {
        int i = __builtin_ctz(l);
        memcpy(&before[i], static_cast<ShuffleLane*>(lanes[i])->value, shape.size);
    }
    for (uint32_t l = mask; l; l &= l - 1) {
        int i = __builtin_ctz(l), first = i & ~(shape.width - 1), last = first + shape.width - 1, from = i;
        const ShuffleLane& lane = *static_cast<ShuffleLane*>(lanes[i]);
        switch (shape.kind) {
            case Shuffle::index: from = first | (lane.operand & (shape.width - 1)); break;
            case Shuffle::up: from = i - lane.operand < first ? i : i - lane.operand; break;
            case Shuffle::down: from = i + lane.operand > last ? i : i + lane.operand; break;
            case Shuffle::lane_xor: from = (i ^ lane.operand) > last ? i : i ^ lane.operand; break;
        }
        if (!(mask >> from & 1) && current()->launch->undefined) {
            memset(lane.value, kPoison, shape.size);  // CUDA: an undefined value, which nobody may use
            continue;
        }
        if (!(mask >> from & 1)) fail(lane_thread(i), shape.at, "shuffle: lane %d reads lane %d, %s", i, from, lane_thread(i).mask >> from & 1 ? "which has left the kernel" : "which is not in the mask");
        memcpy(lane.value, &before[from], shape.size);
    }
}

void shuffle(Shuffle kind, uint32_t mask, void* value, size_t size, int operand, int width, Where at) {
    static const Op op = {"shuffle", run_shuffle};
    ShuffleLane lane = {value, operand};
    ShuffleShape shape = {kind, size, width, at};
    collective(op, mask, &lane, &shape, at);
}

struct BallotLane {
    bool predicate;
    uint32_t result;
};

static void run_ballot(void* const* lanes, uint32_t mask, const void*) {
    uint32_t votes = 0;
    for (uint32_t l = mask; l; l &= l - 1)
        votes |= uint32_t(static_cast<BallotLane*>(lanes[__builtin_ctz(l)])->predicate) << __builtin_ctz(l);
    for (uint32_t l = mask; l; l &= l - 1) static_cast<BallotLane*>(lanes[__builtin_ctz(l)])->result = votes;
}

uint32_t ballot(uint32_t mask, bool predicate, Where at) {
    static const Op op = {"vote", run_ballot};
    BallotLane lane = {predicate, 0};
    collective(op, mask, &lane, nullptr, at);
    return lane.result;
}

struct MatchLane {
    uint64_t bits;
    uint32_t result;
};

static void run_match(void* const* lanes, uint32_t mask, const void* imm) {
    const bool all = *static_cast<const bool*>(imm);
    auto lane = [&](int i) { return static_cast<MatchLane*>(lanes[i]); };
    for (uint32_t l = mask; l; l &= l - 1) {
        MatchLane& mine = *lane(__builtin_ctz(l));
        mine.result = 0;
        for (uint32_t o = mask; o; o &= o - 1) mine.result |= uint32_t(lane(__builtin_ctz(o))->bits == mine.bits) << __builtin_ctz(o);
        if (all && mine.result != mask) mine.result = 0;
    }
}

uint32_t match(uint32_t mask, uint64_t bits, bool all, Where at) {
    static const Op any_op = {"match_any", run_match}, all_op = {"match_all", run_match};
    MatchLane lane = {bits, 0};
    collective(all ? all_op : any_op, mask, &lane, &all, at);
    return lane.result;
}

// The butterfly of ptx.cuh in one rendezvous: the same operations in the same order.
static void run_reduce(void* const* lanes, uint32_t, const void* imm) {
    float v[32], w[32];
    for (int i = 0; i < 32; i++) v[i] = *static_cast<float*>(lanes[i]);
    for (int by = 16; by; by /= 2) {
        for (int i = 0; i < 32; i++) w[i] = *static_cast<const bool*>(imm) ? fmaxf(v[i], v[i ^ by]) : v[i] + v[i ^ by];
        memcpy(v, w, sizeof v);
    }
    for (int i = 0; i < 32; i++) *static_cast<float*>(lanes[i]) = v[i];
}

float warp_reduce(float value, bool maximum, Where at) {
    static const Op sum = {"warp_sum", run_reduce, true}, max = {"warp_max", run_reduce, true};
    collective(maximum ? max : sum, kAll, &value, &maximum, at);
    return value;
}

struct ReduceShape {
    size_t bytes;
    void (*combine)(void* to, const void* from);
};

static void run_any_reduce(void* const* lanes, uint32_t mask, const void* imm) {
    const ReduceShape& shape = *static_cast<const ReduceShape*>(imm);
    uint64_t all;
    memcpy(&all, lanes[__builtin_ctz(mask)], shape.bytes);
    for (uint32_t l = mask & (mask - 1); l; l &= l - 1) shape.combine(&all, lanes[__builtin_ctz(l)]);
    for (uint32_t l = mask; l; l &= l - 1) memcpy(lanes[__builtin_ctz(l)], &all, shape.bytes);
}

void reduce(uint32_t mask, void* value, size_t bytes, void (*combine)(void*, const void*), Where at) {
    static const Op op = {"reduction", run_any_reduce};
    ReduceShape shape = {bytes, combine};
    collective(op, mask, value, &shape, at);
}

// ---- atomics ----------------------------------------------------------------------------------

// Blocks run on several OS threads, so these must be atomic on the CPU too.
template <class Bits>
static void update(void* address, void* before, const void* operand, void (*apply)(void*, const void*)) {
    Bits* bits = static_cast<Bits*>(address);
    Bits seen = __atomic_load_n(bits, __ATOMIC_RELAXED), next;
    do {
        next = seen;
        apply(&next, operand);
    } while (!__atomic_compare_exchange_n(bits, &seen, next, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    memcpy(before, &seen, sizeof seen);
}

static bool exchange16(void* address, uint64_t* seen, const uint64_t* next) {
    bool same;
    asm volatile("lock cmpxchg16b %1" : "=@ccz"(same), "+m"(*static_cast<unsigned __int128*>(address)), "+a"(seen[0]), "+d"(seen[1])
                 : "b"(next[0]), "c"(next[1]));
    return same;
}

static void update16(void* address, void* before, const void* operand, void (*apply)(void*, const void*)) {
    uint64_t seen[2], next[2];
    memcpy(seen, address, 16);
    do {
        memcpy(next, seen, 16);
        apply(next, operand);
    } while (!exchange16(address, seen, next));
    memcpy(before, seen, 16);
}

void atomic(void* address, size_t bytes, void* before, const void* operand, void (*apply)(void*, const void*), Where at) {
    Machine& m = *current();
    const Thread& t = *m.self;
    const uintptr_t a = uintptr_t(address);
    if (a % bytes) fail(t, at, "atomic: the address is not a multiple of %zu", bytes);
    check_access(t, a, bytes, Access::atomic, at);
    check_atomic_begin();
    m.fault_where = &at;
    if (bytes == 2) update<uint16_t>(address, before, operand, apply);
    else if (bytes == 4) update<uint32_t>(address, before, operand, apply);
    else if (bytes == 16) update16(address, before, operand, apply);
    else update<uint64_t>(address, before, operand, apply);
    m.fault_where = nullptr;
    check_atomic_done(a);
    let_others_run_if_polled(m, a);
}

int lane() { return current()->lane(); }

}  // namespace simt

void __syncwarp(uint32_t mask, simt::Where at) {
    static const simt::Op op = {"__syncwarp", [](void* const*, uint32_t mask, const void*) { simt::check_sync(mask); }};
    simt::collective(op, mask, nullptr, nullptr, at);
}
