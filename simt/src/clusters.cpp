// Thread block clusters: their barrier, and access to the shared memory of other blocks. The blocks of a cluster are
// resident together on one OS thread (simt.cpp), so that only one of them runs at a time.
#include "machine.h"

namespace simt {

const Op kClusterWait = {"cluster_wait", nullptr};

unsigned cluster_rank() { return current()->rank; }
unsigned cluster_size() { return unsigned(current()->cluster->blocks.size()); }
dim3 cluster_dim() { return current()->launch->cluster; }

// ---- the barrier --------------------------------------------------------------------------------

// All that are awaited have come, so those who wait go on.
static void pass(Cluster& cluster) {
    cluster.meetings++;
    cluster.awaited = 0;
    for (Machine* m : cluster.blocks) {
        check_cluster_met(*m);
        cluster.awaited += unsigned(m->launch->strict ? m->count : m->alive);
        if (!m->at_cluster) continue;
        for (const Thread* t = m->threads; t < m->threads + m->count; t++)
            if (t->state == State::waiting && t->op == &kClusterWait) make_ready(*m, t->linear / 32, 1u << (t->linear & 31));
        m->at_cluster = 0;
        if (m->parked) m->parked = false, m->goes_on = true;
    }
}

static void come(Machine& m, Thread& t) {
    t.arrivals++;
    check_cluster_arrival(t);
    if (!--m.cluster->awaited) pass(*m.cluster);
}

void cluster_arrive(Where at) {
    Machine& m = *current();
    Thread& t = *m.self;
    if (t.arrivals != t.waits) fail(t, at, "cluster_arrive: the thread has arrived before, and has not waited since");
    // All lanes of the warp must execute the instruction together (.aligned).
    Warp& w = m.warps[t.linear / 32];
    if (w.arrivals == t.arrivals + 1 && (w.arrived.line != at.line || strcmp(w.arrived.file, at.file)))
        fail(t, at, "mixed barriers: another thread of the warp arrives by another cluster_arrive, at %s:%d", w.arrived.file, w.arrived.line);
    w.arrived = at, w.arrivals = t.arrivals + 1;
    if (m.launch->has_clusters()) come(m, t);
    else t.arrivals++;
}

[[noreturn]] static void fail_for_absent(const Thread& t, Where at) {
    const Cluster& cluster = *current()->cluster;
    for (const Machine* m : cluster.blocks)
        for (const Thread* other = m->threads; other < m->threads + m->count; other++) {
            if (other->arrivals > cluster.meetings || (other->state == State::done && !m->launch->strict)) continue;
            char where[256] = "has left the kernel";
            if (other->state != State::done) snprintf(where, sizeof where, "is in %s at %s:%d", name_of(other->op), other->at.file, other->at.line);
            const uint3 block = m->view.block;
            fail(t, at, "divergent cluster_wait: waits for thread (%u,%u,%u) of block (%u,%u,%u), which %s", other->index.x, other->index.y,
                 other->index.z, block.x, block.y, block.z, where);
        }
    fail(t, at, "cluster_wait: nobody is awaited");
}

void cluster_wait(Where at) {
    Machine& m = *current();
    Thread& t = *m.self;
    if (t.arrivals == t.waits) fail(t, at, "cluster_wait: the thread has not arrived");
    t.waits++;
    // A block without a cluster is one by itself.
    if (!m.launch->has_clusters()) return block_barrier(kClusterWait, at);
    if (m.cluster->meetings < t.waits) {
        t.op = &kClusterWait, t.at = at, t.mask = 0, t.state = State::waiting;
        m.at_cluster++;
        wait(m);
        if (m.cluster->stuck) fail_for_absent(t, at);
    }
    check_cluster_wait(t);
}

void cluster_thread_end(Machine& m, Thread& t) {
    if (!m.launch->strict && t.arrivals == m.cluster->meetings) come(m, t);
    if (m.alive) return;
    check_cluster_end(t);
    // A read of it afterwards finds that nobody has written it.
    if (m.launch->poison)
        for (const auto& v : m.variables) memset(reinterpret_cast<void*>(v.begin), kPoison, v.end - v.begin);
}

void end_cluster_deadlock(Cluster& cluster) {
    Machine* first = nullptr;
    for (Machine* m : cluster.blocks) {
        if (m->alive && !m->parked && !m->at_grid) return;
        if (m->alive && m->parked && !first) first = m;
    }
    if (!first) return;
    cluster.stuck = true;
    for (const Thread* t = first->threads; t < first->threads + first->count; t++)
        if (t->state == State::waiting && t->op == &kClusterWait) make_ready(*first, t->linear / 32, 1u << (t->linear & 31));
    first->at_cluster = 0, first->parked = false, first->goes_on = true;
}

// ---- distributed shared memory ------------------------------------------------------------------

// Where the block of this rank has these bytes, which lie in one array of this block's.
static uintptr_t there(const char* what, uintptr_t a, size_t bytes, unsigned rank, Where at) {
    Machine& m = *current();
    const Thread& t = *m.self;
    const auto& blocks = m.cluster->blocks;
    if (rank >= blocks.size()) fail(t, at, "%s: rank %u, but the cluster has %zu blocks", what, rank, blocks.size());
    for (const auto& v : m.variables)
        if (a >= v.begin && a + bytes <= v.end)
            return blocks[rank]->shared_variable(v.variable, uintptr_t(__builtin_return_address(0))) + (a - v.begin);
    fail(t, at, "%s: %zu bytes, %s", what, bytes, m.is_shared(a) ? describe_address(a).c_str() : "not of this block's shared memory");
}

Vector16 cluster_load16(uintptr_t address, unsigned rank, Where at) {
    const Machine& m = *current();
    if (address % 16) fail(*m.self, at, "load of another block's shared memory: the address is not a multiple of 16");
    const uintptr_t a = there("load of another block's shared memory", address, 16, rank, at);
    const Machine& other = *m.cluster->blocks[rank];
    if (!other.alive)
        fail(*m.self, at, "load of the shared memory of block (%u,%u,%u), rank %u of the cluster, which has ended", other.view.block.x,
             other.view.block.y, other.view.block.z, rank);
    check_access(*m.self, a, 16, Access::read, at);
    return *reinterpret_cast<const Vector16*>(a);
}

void* cluster_pointer(const void* p, unsigned rank, Where at) {
    return reinterpret_cast<void*>(there("map_shared_rank", uintptr_t(p), 1, rank, at));
}

}  // namespace simt
