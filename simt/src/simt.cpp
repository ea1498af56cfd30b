// The runtime: fibers and their scheduler, shared memory, launches over OS threads, faults, and
// the C ABI at the end of the file.
//
// Costs, one core: switch 3-5 ns, a warp's rendezvous about 0.2 us, a launch about 1 us.
#include <dlfcn.h>
#include <cxxabi.h>
#include <elf.h>
#include <execinfo.h>
#include <fcntl.h>
#include <link.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <thread>

#include "machine.h"
#include "cuda_runtime.h"

namespace simt {

// This cannot be thread_local, since the thread_local variables of this library are the kernels' __shared__ ones. Until the
// key is made it is an invalid one, for which every thread has null.
pthread_key_t machine_key = PTHREAD_KEYS_MAX;
__attribute__((constructor(101))) static void make_key() { pthread_key_create(&machine_key, nullptr); }
Reservation reservations[kReservations];

// ---- context switch ---------------------------------------------------------------------------

// Saves the callee-saved registers on this stack and *save = rsp; then the same backwards. All
// fibers share the floating-point control words.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
    .text
    .local simt_switch
    .type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size simt_switch, .-simt_switch
)");

static void fiber();

static uintptr_t stack_top(const Machine& m, int stack) {
    // Colouring: equal depths of neighbouring stacks must not share a cache set.
    return m.stacks + (stack + 1) * (kPage + kStack) - 64 * (stack % 32 + 1);
}

static void* fresh_stack(const Machine& m, int stack) {
    void** sp = reinterpret_cast<void**>(stack_top(m, stack));
    *--sp = nullptr;  // fiber() never returns
    *--sp = reinterpret_cast<void*>(fiber);
    return sp - 6;    // garbage in the six registers
}

// ---- scheduler --------------------------------------------------------------------------------

int choose(uint32_t set, Machine& m) {
    switch (m.launch->order) {
        case Order::forward: return __builtin_ctz(set);
        case Order::reversed: return 31 - __builtin_clz(set);
        case Order::random: break;
    }
    m.random ^= m.random << 13, m.random ^= m.random >> 7, m.random ^= m.random << 17;  // xorshift64
    int by = m.random >> 59;
    return (__builtin_ctz(set >> by | set << (-by & 31)) + by) & 31;
}

static void ready_yielded(Machine& m) {
    for (const Thread* t : m.yielded) make_ready(m, t->linear / 32, 1u << (t->linear & 31));
    m.yielded.clear();
}

// Takes the next thread that can run; null if none can. A warp runs on for as long as one of its
// lanes can, so that a collective's operands are still in the cache, and one warp runs far ahead.
static Thread* pick(Machine& m) {
    if (!m.ready_warps) ready_yielded(m);
    if (!m.ready_warps) return nullptr;
    if (m.launch->order == Order::random || !m.warps[m.warp].ready) m.warp = choose(m.ready_warps, m);
    Warp& w = m.warps[m.warp];
    int lane = choose(w.ready, m);
    w.ready &= ~(1u << lane);
    if (!w.ready) m.ready_warps &= ~(1u << m.warp);
    return &m.threads[m.warp * 32 + lane];
}

void make_ready(Machine& m, int warp, uint32_t lanes) {
    if (!lanes) return;
    m.warps[warp].ready |= lanes;
    m.ready_warps |= 1u << warp;
    for (uint32_t l = lanes; l; l &= l - 1) m.threads[warp * 32 + __builtin_ctz(l)].state = State::ready;
}

static void become(Machine& m, Thread& t) {
    m.self = &t;
    m.view.thread = t.index;
}

// What threads wait in for all blocks of the grid.
static const Op kGridSync = {"grid.sync()", nullptr};

const char* name_of(const Op* op) { return op ? op->name : "__syncthreads"; }
static bool is_barrier(const Op* op) { return !op || op == &kGridSync || op == &kClusterWait; }

[[noreturn]] static void deadlock(Machine& m) {
    if (m.launch->kernel->hopper) hopper_deadlock(m);
    const Thread* waits = m.threads;
    while (waits->state != State::waiting) waits++;
    const bool exits_count = m.launch->strict || (waits->op && waits->op->whole_warp);
    for (Thread* t = m.threads; t < m.threads + m.count; t++) {
        bool awaited = is_barrier(waits->op) || (t->linear / 32 == waits->linear / 32 && waits->mask >> (t->linear & 31) & 1);
        bool joined = t->state == State::waiting && t->op == waits->op && t->mask == waits->mask;
        if (!awaited || joined || (t->state == State::done && !exits_count)) continue;
        if (t->state == State::done)
            fail(*waits, waits->at, "divergent %s: waits for thread (%u,%u,%u), which has left the kernel",
                 name_of(waits->op), t->index.x, t->index.y, t->index.z);
        fail(*waits, waits->at, "divergent %s: waits for thread (%u,%u,%u), which is in %s at %s:%d%s",
             name_of(waits->op), t->index.x, t->index.y, t->index.z, name_of(t->op), t->at.file, t->at.line,
             t->op == waits->op ? " with another mask" : "");
    }
    fail(*waits, waits->at, "%s: waits for a lane beyond the block's last thread", name_of(waits->op));
}

// As pick. What is asynchronous happens as late as it may: when no thread can run.
static Thread* pick_or_progress(Machine& m) {
    if (!m.launch->kernel->hopper) return pick(m);
    if (m.launch->order == Order::random) hopper_progress(m, false);
    Thread* next;
    while (!(next = pick(m)) && hopper_progress(m, true)) {}
    return next;
}

// Where lanes wait that ask which others are with them. None of them waits for any other.
static const Op kConverged = {"__activemask", nullptr};

// Lets the lanes of a warp that have asked at one line go on, if no other lane of the warp can run.
static void complete_converged(Machine& m, int warp) {
    Warp& w = m.warps[warp];
    if (w.ready || !w.asking) return;
    const Thread& first = m.threads[warp * 32 + __builtin_ctz(w.asking)];
    uint32_t lanes = 0;
    for (uint32_t l = w.asking; l; l &= l - 1) {
        Thread& t = m.threads[warp * 32 + __builtin_ctz(l)];
        if (t.at.line == first.at.line && t.at.file == first.at.file) lanes |= l & -l;
    }
    for (uint32_t l = lanes; l; l &= l - 1) *static_cast<uint32_t*>(m.threads[warp * 32 + __builtin_ctz(l)].data) = lanes;
    w.asking &= ~lanes;
    make_ready(m, warp, lanes);
}

uint32_t converged(Where at) {
    Machine& m = *current();
    Thread& t = *m.self;
    uint32_t lanes = 0;
    t.op = &kConverged, t.mask = 0, t.data = &lanes, t.at = at, t.state = State::waiting;
    m.warps[t.linear / 32].asking |= 1u << (t.linear & 31);
    wait(m);
    return lanes;
}

// Switches away from what runs here, whose stack pointer goes to `save`.
static void go_to(Machine& m, void** save, Thread& next) {
    if (next.state == State::fresh) {
        next.stack = m.free_stacks.back();
        m.free_stacks.pop_back();
        next.sp = fresh_stack(m, next.stack);
    }
    become(m, next);
    simt_switch(save, next.sp);
}

// Called when no thread of the block can run. Returns whether another block may change that.
static bool waits_for_blocks(Machine& m) {
    m.parked = m.at_cluster > 0;
    return m.parked || m.at_grid;
}

void wait(Machine& m) {
    complete_converged(m, m.self->linear / 32);
    Thread &t = *m.self, *next = pick_or_progress(m);
    if (!next && waits_for_blocks(m)) return simt_switch(&t.sp, m.scheduler_sp);
    if (!next) deadlock(m);
    if (next != &t) go_to(m, &t.sp, *next);
}

static bool complete_barrier(Machine& m);
static uint3 coordinates(uint64_t linear, dim3 size);
static bool complete_collective(Machine& m, int warp, const Thread& arrived);

// Barriers and warps wait only for threads that have not left, unless the launch is strict.
static void leave(Machine& m, Thread& t) {
    m.alive--;
    const int warp = t.linear / 32;
    m.warps[warp].exited |= 1u << (t.linear & 31);
    if (m.launch->kernel->hopper) hopper_thread_end(m, t);
    if (m.launch->has_clusters()) cluster_thread_end(m, t);
    complete_converged(m, warp);
    if (m.launch->strict) return;
    if (m.at_barrier) complete_barrier(m);
    for (uint32_t rest = m.warps[warp].waiting; rest;) {
        const Thread& waits = m.threads[warp * 32 + __builtin_ctz(rest)];
        rest &= ~waits.mask;
        complete_collective(m, warp, waits);
    }
}

// Runs threads from their start to their end; a thread that never waits costs no switch.
static void fiber() {
    Machine& m = *current();
    for (;;) {
        Thread& t = *m.self;
        t.state = State::ready;
        m.launch->kernel->thunk(*m.launch->kernel, m.launch->params);
        check_thread_end();
        t.state = State::done;
        if (!t.copies.empty())
            fail(t, t.copies.back().at, "the thread has left the kernel with this cp.async in flight");
        leave(m, t);
        Thread* next = pick_or_progress(m);
        if (!next && m.alive && !waits_for_blocks(m)) deadlock(m);
        void* ignored;
        int stack = t.stack;
        if (next && next->state == State::fresh) {
            next->stack = stack;
            become(m, *next);
            continue;
        }
        m.free_stacks.push_back(stack);  // nobody takes it before the switch
        if (next) become(m, *next);
        simt_switch(&ignored, next ? next->sp : m.scheduler_sp);
    }
}

// Lets all other threads of the block that can run do so, and then other blocks. So a thread that waits in a loop for
// another one does not wait for ever.
void let_others_run() {
    Machine* running = current();
    if (!running || !running->self) return;
    Machine& m = *running;
    Thread& t = *m.self;
    m.yielded.push_back(&t);
    while (!m.ready_warps && m.launch->kernel->hopper && hopper_progress(m, true)) {}
    if (!m.ready_warps && m.launch->blocks > 1) return simt_switch(&t.sp, m.scheduler_sp);
    if (Thread* next = pick(m); next != &t) go_to(m, &t.sp, *next);
}

static void arrive(const Op* op, Where at) {
    Machine& m = *current();
    Thread& t = *m.self;
    t.op = op, t.at = at, t.mask = 0, t.state = State::waiting;
    if (!m.at_barrier++) m.first_at_barrier = &t;
    const Thread& first = *m.first_at_barrier;
    if (first.op != op || first.at.line != at.line || first.at.nth != at.nth || strcmp(first.at.file, at.file))
        fail(t, at, "mixed barriers: thread (%u,%u,%u) waits in another, at %s:%d", first.index.x, first.index.y,
             first.index.z, first.at.file, first.at.line);
    complete_barrier(m);
    wait(m);
}
void barrier(Where at) { arrive(nullptr, at); }
void block_barrier(const Op& op, Where at) { arrive(&op, at); }

void grid_barrier(Where at) {
    const Launch& l = *current()->launch;
    Thread& t = *current()->self;
    if (!l.cooperative) fail(t, at, "grid.sync() in a kernel that was not launched by cudaLaunchCooperativeKernel");
    arrive(&kGridSync, at);
    if (l.absent < 0) return;
    const uint3 absent = coordinates(uint64_t(l.absent), l.grid);
    fail(t, at, "divergent grid.sync(): waits for block (%u,%u,%u), which has left the kernel", absent.x, absent.y, absent.z);
}
bool is_cooperative() { return current()->launch->cooperative; }

int barrier_count(bool predicate, Where at) {
    current()->votes += predicate;
    barrier(at);
    return current()->counted;  // the next barrier waits for this thread
}

static void pass_barrier(Machine& m);
static bool complete_barrier(Machine& m) {
    if (m.at_barrier != (m.launch->strict ? m.count : m.alive)) return false;
    m.at_barrier = 0;
    m.counted = m.votes, m.votes = 0;
    check_barrier();
    const Thread& first = *m.first_at_barrier;
    m.at_grid = first.op == &kGridSync;
    if (!m.at_grid) pass_barrier(m);
    // This thread is the one that waits for the other blocks.
    else if (m.threads[0].state == State::done) fail(first, first.at, "divergent grid.sync(): waits for thread (0,0,0), which has left the kernel");
    return true;
}

static void pass_barrier(Machine& m) {
    for (int w = 0; w * 32 < m.count; w++) make_ready(m, w, ~m.warps[w].exited);
    m.warp = choose(m.ready_warps, m);
}

void collective(const Op& op, uint32_t mask, void* data, const void* imm, Where at) {
    Machine& m = *current();
    Thread& t = *m.self;
    int warp = t.linear / 32, lane = t.linear & 31;
    t.op = &op, t.mask = mask, t.data = data, t.imm = imm, t.at = at, t.state = State::waiting;
    if (!(mask >> lane & 1)) fail(t, at, "%s: the calling lane %d is not in its mask 0x%08x", op.name, lane, mask);
    m.warps[warp].waiting |= 1u << lane;
    if (!complete_collective(m, warp, t)) return wait(m);
    // It goes on at once.
    m.warps[warp].ready &= ~(1u << lane);
    if (!m.warps[warp].ready) m.ready_warps &= ~(1u << warp);
}

// Runs what `t` waits for and makes its lanes ready, if all have come.
static bool complete_collective(Machine& m, int warp, const Thread& t) {
    Warp& w = m.warps[warp];
    Thread* lanes = &m.threads[warp * 32];
    const Op& op = *t.op;
    const uint32_t mask = m.launch->strict || op.whole_warp ? t.mask : t.mask & ~w.exited;
    if ((w.waiting & mask) != mask) return false;
    void* all[32] = {};
    for (uint32_t l = mask; l; l &= l - 1) {
        Thread& other = lanes[__builtin_ctz(l)];
        if (other.op != &op || other.mask != t.mask || other.at.line != t.at.line || other.at.file != t.at.file)
            fail(t, t.at, "mixed collectives: %s with mask 0x%08x, but thread (%u,%u,%u) is in %s with mask 0x%08x at %s:%d",
                 op.name, t.mask, other.index.x, other.index.y, other.index.z, op.name == name_of(other.op) ? "it" : name_of(other.op),
                 other.mask, other.at.file, other.at.line);
        all[__builtin_ctz(l)] = other.data;
    }
    w.waiting &= ~mask;
    m.fault_where = &t.at;
    op.run(all, mask, t.imm);
    m.fault_where = nullptr;
    check_warp_step(mask | w.exited);
    make_ready(m, warp, mask);
    return true;
}

void fence(bool of_device) { check_fence(of_device); }

void wait_for_launches() {
    Launch& l = *current()->launch;
    l.waited = true;
    if (l.overlaps()) check_waited();
}
void let_next_launch_begin() {
    Launch& l = *current()->launch;
    if (l.overlaps() && !knows_waited(*current()->self)) l.early = true;
}

// ---- shared memory and cp.async ---------------------------------------------------------------

static size_t max_shared(const Kernel& k) { return k.hopper ? kSharedMaxHopper : kSharedMax; }

// How a program asks for more than 48 KB.
static const char* opt_in(const Kernel& k) { return k.function ? " (emu_set_max_dyn_smem)" : " (cudaFuncSetAttribute)"; }

// This library's symbol table, read from its file.
struct Image {
    uintptr_t base = 0, code_end = 0;
    size_t tls_module = 0, tls_size = 0;
    std::vector<Variable> variables;
    std::vector<uint16_t> variable_at;  // by offset: its number + 1
    std::vector<Symbol> objects, functions;  // objects by address

    Image();
};

static std::string plain_name(const std::string& symbol) {
    int failed = 0;
    char* text = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &failed);
    const std::string plain = failed ? symbol : text;
    free(text);
    return plain;
}

static const Image& image() {
    static const Image& image = *new Image;
    return image;
}

Image::Image() {
    Dl_info info;
    if (!dladdr(reinterpret_cast<void*>(add_kernel), &info)) return;
    base = uintptr_t(info.dli_fbase);
    dl_iterate_phdr([](dl_phdr_info* i, size_t, void* p) {
        Image& self = *static_cast<Image*>(p);
        if (i->dlpi_addr != self.base) return 0;
        self.tls_module = i->dlpi_tls_modid;
        for (int k = 0; k < i->dlpi_phnum; k++) {
            const auto& part = i->dlpi_phdr[k];
            if (part.p_type == PT_TLS) self.tls_size = part.p_memsz;
            if (part.p_type == PT_LOAD && part.p_flags & PF_X) self.code_end = self.base + part.p_vaddr + part.p_memsz;
        }
        return 1;
    }, this);
    const int file = open(info.dli_fname, O_RDONLY);
    struct stat status;
    void* map = file < 0 || fstat(file, &status) ? MAP_FAILED : mmap(nullptr, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (file >= 0) close(file);
    if (map == MAP_FAILED) return;
    const char* bytes = static_cast<const char*>(map);
    const auto& header = *reinterpret_cast<const Elf64_Ehdr*>(bytes);
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes + header.e_shoff);
    variable_at.resize(tls_size + 1);
    for (int i = 0; i < header.e_shnum; i++) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        const char* names = bytes + sections[sections[i].sh_link].sh_offset;
        const auto* symbols = reinterpret_cast<const Elf64_Sym*>(bytes + sections[i].sh_offset);
        for (size_t k = 0; k < sections[i].sh_size / sizeof *symbols; k++) {
            const Elf64_Sym& y = symbols[k];
            const char* name = names + y.st_name;
            const int type = ELF64_ST_TYPE(y.st_info);
            if (y.st_shndx == SHN_UNDEF || !*name) continue;
            if (type == STT_FUNC) functions.push_back({name, base + y.st_value, base + y.st_value + y.st_size});
            const bool guard = !strncmp(name, "_ZGV", 4);
            if (strstr(name, "4simt") || !strncmp(name, "__", 2) || (guard && type != STT_TLS)) continue;  // the emulator's, the compiler's
            if (type == STT_OBJECT && y.st_size) objects.push_back({name, base + y.st_value, base + y.st_value + y.st_size});
            if (type != STT_TLS || y.st_value >= tls_size || variable_at[y.st_value]) continue;
            std::string text = plain_name(name);
            if (const size_t scope = text.rfind("::"); scope != text.npos) text.erase(0, scope + 2);
            variables.push_back({text, y.st_value, y.st_size, !strcmp(name, "smem"), guard});
            variable_at[y.st_value] = uint16_t(variables.size());
        }
    }
    munmap(map, status.st_size);
    std::sort(objects.begin(), objects.end(), [](const Symbol& a, const Symbol& b) { return a.begin < b.begin; });
}

const Symbol* find_object(uintptr_t a) {
    const auto& objects = image().objects;
    auto it = std::upper_bound(objects.begin(), objects.end(), a, [](uintptr_t a, const Symbol& s) { return a < s.begin; });
    return it == objects.begin() || a >= std::prev(it)->end ? nullptr : &*std::prev(it);
}

std::string variable_name(uintptr_t a) {
    const Symbol* object = find_object(a);
    return object ? plain_name(object->name) : "of no name";
}

// The block's copy of a __shared__ variable: its first use in a block gives it a place.
static uintptr_t place_shared(Machine& m, const Variable& v, uintptr_t caller) {
    if (v.dynamic) return uintptr_t(m.dynamic);
    // In CUDA a shared variable's constructor does nothing.
    static unsigned char constructed[8] = {1};
    if (v.guard) return uintptr_t(constructed);
    // The symbol table does not have the alignment, so it is taken from the offset.
    const size_t align = v.offset ? std::clamp<size_t>(v.offset & -v.offset, 16, 1024) : 1024;
    // The checked build leaves a gap, so that an overrun does not land in the next array.
    const size_t gap = kChecked && m.static_end ? kStaticGap : 0, begin = (m.static_end + gap + align - 1) / align * align;
    m.static_bytes = (m.static_bytes + 15) / 16 * 16 + v.bytes;
    if (m.static_bytes > kSharedDefault || begin + v.bytes > kStaticArea)
        fail_at_pc(caller, "%zu bytes of static shared memory, more than 48 KB", m.static_bytes);
    if (const size_t most = m.launch->shared_most; m.static_bytes + m.launch->smem > most)
        fail_at_pc(caller, "%zu bytes of static and %u of dynamic shared memory, more than %zu KB%s", m.static_bytes, m.launch->smem,
                   most >> 10, most == kSharedDefault ? opt_in(*m.launch->kernel) : "");
    m.static_end = begin + v.bytes;
    if (m.launch->poison) memset(reinterpret_cast<void*>(m.statics + begin), kPoison, v.bytes);
    m.variables.push_back({&v, m.statics + begin, m.statics + begin + v.bytes});
    return m.statics + begin;
}

// That of a number.
static inline uintptr_t shared_place(Machine& m, size_t number, uintptr_t caller) {
    Machine::Place& place = m.places[number];
    if (place.block != m.block_serial) place = {m.block_serial, place_shared(m, image().variables[number], caller)};
    return place.begin;
}

uintptr_t Machine::shared_variable(const Variable* v, uintptr_t caller) {
    return v ? shared_place(*this, size_t(v - image().variables.data()), caller) : uintptr_t(dynamic);
}

// The compiler calls this for the address of a thread_local variable. It is hidden, and so serves this library alone. A
// thread_local variable that is not a kernel's is where it always is.
struct TlsIndex { size_t module, offset; };
extern "C" __attribute__((visibility("hidden"))) void* __tls_get_addr(TlsIndex* index) {
    if (Machine* m = current(); m && m->self) {
        const Image& i = image();
        const uint16_t number = index->module == i.tls_module && index->offset < i.tls_size ? i.variable_at[index->offset] : 0;
        if (number) return reinterpret_cast<void*>(shared_place(*m, number - 1u, uintptr_t(__builtin_return_address(0))));
    }
    static void* (*const everyones)(TlsIndex*) = reinterpret_cast<void* (*)(TlsIndex*)>(dlsym(RTLD_NEXT, "__tls_get_addr"));
    return everyones(index);
}

// The kernels' fmaxf and the like (simt.h). They prefer a number to a NaN, but not to poison, and 0 to -0.
template <class T>
static T extreme(T a, T b, bool most) {
    if (a != a || b != b) return is_poison(a) ? a : is_poison(b) || a != a ? b : a;
    if (a == b) return std::signbit(a) == most ? b : a;
    return (a < b) == most ? b : a;
}
extern "C" {
float simt_fmaxf(float a, float b) { return extreme(a, b, true); }
float simt_fminf(float a, float b) { return extreme(a, b, false); }
double simt_fmax(double a, double b) { return extreme(a, b, true); }
double simt_fmin(double a, double b) { return extreme(a, b, false); }
}

// The name that all dynamic shared memory has: `extern __shared__ float anything[]` becomes another name of it.
extern "C" {
__attribute__((used)) thread_local unsigned char smem[1];
}

uint32_t shared_offset(const void* p) {
    if (!current()->is_shared(uintptr_t(p))) trap("the address is not in shared memory", {});
    return uint32_t(uintptr_t(p) - current()->statics);
}
void* dynamic_shared() { return current()->dynamic; }
void* shared_pointer(uint32_t offset) { return reinterpret_cast<void*>(current()->statics + offset); }

struct Range { uintptr_t begin, end; };
// Variables register before main, in any order of files.
static std::vector<Range>& constants() {
    static auto& list = *new std::vector<Range>;
    return list;
}
bool add_constant(const void* variable, size_t bytes) {
    constants().push_back({uintptr_t(variable), uintptr_t(variable) + bytes});
    return true;
}

Space space_of(const void* p) {
    const Machine& m = *current();
    const uintptr_t a = uintptr_t(p);
    if (m.is_shared(a)) return Space::shared;
    if (a - m.base < m.statics - m.base) return Space::local;
    for (const Range& r : constants())
        if (a - r.begin < r.end - r.begin) return Space::constant;
    const Allocation* in = find_allocation(a);
    return (in && a < in->end) || find_object(a) ? Space::global : Space::none;
}

void cp_async(void* dst, const void* src, int bytes, int copied, Where at) {
    Machine& m = *current();
    Thread& t = *m.self;
    uintptr_t d = uintptr_t(dst), s = uintptr_t(src);
    if (!m.is_shared(d) || !m.is_shared(d + bytes - 1))
        fail(t, at, "cp.async: the destination is not in shared memory: %s", describe_address(d).c_str());
    if (d % bytes || s % bytes)
        fail(t, at, "cp.async of %d bytes: the %s is not aligned to them", bytes, d % bytes ? "destination" : "source");
    if (copied) check_access(t, s, copied, Access::read, at);
    check_copy_issued(t, d, bytes, at);
    m.fault_where = &at;
    if (m.launch->poison) memset(dst, kPoison, bytes);
    m.fault_where = nullptr;
    t.copies.push_back({static_cast<unsigned char*>(dst), src, bytes, copied, at});
}

void cp_async_commit() {
    Thread& t = *current()->self;
    t.groups.push_back(t.copies.size());
}

void cp_async_wait(int groups_left) {
    Machine& m = *current();
    Thread& t = *m.self;
    int landing = int(t.groups.size()) - groups_left;
    if (landing <= 0) return;
    size_t copies = t.groups[landing - 1];
    for (size_t i = 0; i < copies; i++) {
        const Copy& c = t.copies[i];
        m.fault_where = &c.at;
        if (c.copied == 16) {
            memcpy(c.dst, c.src, 16);
        } else {
            memcpy(c.dst, c.src, c.copied);
            memset(c.dst + c.copied, 0, c.bytes - c.copied);
        }
        check_copy_landed(t, uintptr_t(c.dst), c.bytes);
    }
    m.fault_where = nullptr;
    t.copies.erase(t.copies.begin(), t.copies.begin() + copies);
    t.groups.erase(t.groups.begin(), t.groups.begin() + landing);
    for (size_t& g : t.groups) g -= copies;
}

// ---- blocks -----------------------------------------------------------------------------------

// Address space, aligned to its size.
static View& reserve() {
    void* memory = mmap(nullptr, 2 * kReservation, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t from = uintptr_t(memory), base = (from + kReservation - 1) & ~(kReservation - 1);
    if (base > from) munmap(memory, base - from);
    munmap(reinterpret_cast<void*>(base + kReservation), from + kReservation - base);
    if (mprotect(reinterpret_cast<void*>(base), kPage, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
    return *reinterpret_cast<View*>(base);
}

static void open(uintptr_t at, size_t bytes) {
    if (mprotect(reinterpret_cast<void*>(at), bytes, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
}

Machine::Machine() : view(reserve()) {
    places.resize(image().variables.size());
    size_t stack_area = kPage + (kMaxThreads + 1) * (kPage + kStack);
    size_t dynamic_area = (kSharedMaxHopper + kPage) / kPage * kPage;
    static_assert(kPage + (kMaxThreads + 1) * (kPage + kStack) + kPage + kStaticArea + 2 * kPage + kSharedMaxHopper + kPage <= kReservation);
    base = uintptr_t(&view);
    // If another machine, whose memory is 512 GB away, has this slot, it keeps it, and current() finds this machine the
    // slow way.
    if (Reservation& r = reservations[base / kReservation % kReservations]; !r.begin) r = {base, this};
    stacks = base + 2 * kPage + kStack;  // the first is for faults
    statics = base + stack_area + kPage;
    statics_guard = statics + kStaticArea;
    end = statics_guard + kPage + dynamic_area;
    dynamic_end = end;
    open(stacks - kStack, kStack);
    open(statics, kStaticArea);
    open(statics_guard + kPage, dynamic_area);
}

static uint3 coordinates(uint64_t linear, dim3 size) {
    return {unsigned(linear % size.x), unsigned(linear / size.x % size.y), unsigned(linear / size.x / size.y)};
}

void Machine::begin_block(Launch& l, uint64_t linear, Cluster& with, unsigned as) {
    launch = &l;
    cluster = &with, rank = as, at_cluster = 0, parked = goes_on = false;
    view.block = coordinates(linear, l.grid);
    view.block_dim = l.block, view.grid_dim = l.grid;
    count = alive = l.block.x * l.block.y * l.block.z;
    ready_warps = 0, at_barrier = votes = 0, at_grid = false, polled = {}, ticked = {}, static_end = static_bytes = 0, fault_where = nullptr, fault_thread = nullptr;
    random = (l.seed + 1) * 0x9e3779b97f4a7c15u ^ (linear + 1) * 0xbf58476d1ce4e5b9u;
    uintptr_t begin = (dynamic_end - l.smem) & ~uintptr_t(127);
    // A driver promises no more than 128, so a kernel that needs 1024 must round up.
    if (l.kernel->hopper && begin % 1024 == 0) begin -= 128;
    dynamic = reinterpret_cast<unsigned char*>(begin);
    if (l.poison) memset(dynamic, kPoison, dynamic_end - uintptr_t(dynamic));
    block_serial++;
    yielded.clear();
    variables.clear();
    variables.push_back({nullptr, uintptr_t(dynamic), uintptr_t(dynamic) + l.smem});
    // Made only for as many as a launch needs, since each is a mapping of its own, and a process may have 65530.
    for (; open_stacks < count; open_stacks++) {
        open(stacks + open_stacks * (kPage + kStack) + kPage, kStack);
        free_stacks.insert(free_stacks.begin(), open_stacks);
    }
    for (int i = 0; i < count; i++) {
        Thread& t = threads[i];
        t.linear = i, t.index = coordinates(i, l.block), t.state = State::fresh, t.stack = -1;
        t.groups.clear();
        t.arrivals = t.waits = 0;
    }
    for (int w = 0; w * 32 < count; w++) {
        const uint32_t lanes = count - w * 32 >= 32 ? ~0u : (1u << (count - w * 32)) - 1;
        warps[w] = {lanes, 0, ~lanes, 0, {}, 0};
        ready_warps |= 1u << w;
    }
    warp = choose(ready_warps, *this);
    pthread_setspecific(machine_key, this);
    check_block_start();
    if (l.kernel->hopper) hopper_block_start(*this);
    pthread_setspecific(machine_key, nullptr);
}

void Machine::run() {
    pthread_setspecific(machine_key, this);
    go_to(*this, &scheduler_sp, *pick(*this));
    if (!launch->failed && !alive) check_block_end();
    pthread_setspecific(machine_key, nullptr);
    self = nullptr;
    if (launch->failed) abandon();
}

// Fibers can be dropped, as nothing on their stacks owns anything.
void Machine::abandon() {
    for (int i = 0; i < count; i++) threads[i].copies.clear(), threads[i].groups.clear();
    free_stacks.clear();
    for (int i = open_stacks - 1; i >= 0; i--) free_stacks.push_back(i);
    alive = 0;
}

// ---- faults -----------------------------------------------------------------------------------

// Relative to the current directory.
static std::string relative(std::string path) {
    char here[4096];
    if (getcwd(here, sizeof here) && path.compare(0, strlen(here), here) == 0 && path[strlen(here)] == '/')
        path.erase(0, strlen(here) + 1);
    while (path.compare(0, 2, "./") == 0) path.erase(0, 2);
    return path;
}

static bool is_own(const std::string& file) {
    static const std::string source = relative(__FILE__), home = source.substr(0, source.size() - strlen("src/simt.cpp"));
    return file.compare(0, home.size() + 4, home + "src/") == 0 || file.compare(0, home.size() + 8, home + "include/") == 0;
}

// Source lines from addr2line of binutils, which g++ needs anyway, without those of the emulator's own files. One call
// serves all addresses that are not known yet.
static const std::string& source_lines(const std::vector<uintptr_t>& pcs) {
    static std::map<uintptr_t, std::string> known;
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    Dl_info info, own;
    dladdr(reinterpret_cast<void*>(add_kernel), &own);
    std::string command = "addr2line -a -i -e '" + std::string(own.dli_fname) + "'";
    char buffer[1024];
    bool any = false;
    for (const uintptr_t pc : pcs) {
        if (!known.try_emplace(pc).second || !dladdr(reinterpret_cast<void*>(pc), &info) || info.dli_fbase != own.dli_fbase) continue;
        snprintf(buffer, sizeof buffer, " 0x%zx", size_t(pc - uintptr_t(own.dli_fbase)));
        command += buffer, any = true;
    }
    if (FILE* pipe = any ? popen((command + " 2>/dev/null").c_str(), "r") : nullptr) {
        std::string* found = nullptr;
        while (fgets(buffer, sizeof buffer, pipe)) {
            if (buffer[0] == '0') {  // an address; its lines follow
                found = &known[uintptr_t(own.dli_fbase) + strtoull(buffer, nullptr, 16)];
                continue;
            }
            const std::string line = relative(std::string(buffer, strcspn(buffer, " \n")));
            if (!found || line[0] == '?' || line.find(":?") != line.npos || line.compare(0, 8, "/usr/inc") == 0) continue;
            if (!is_own(line.substr(0, line.rfind(':')))) *found += line + "\n";
        }
        pclose(pipe);
    }
    return known[pcs[0]];
}
std::string source_lines(uintptr_t pc) { return source_lines(std::vector<uintptr_t>{pc}); }

// Where a thread is: the innermost line, "file:line", and who calls it, as far as that is in the kernel's sources.
// `stack` has the return addresses, from the innermost one; `first` goes before if it is not among them.
static std::string place(const std::string& first, void* const* stack, int depth, uintptr_t exact_pc = 0) {
    std::vector<std::string> lines;
    std::vector<uintptr_t> pcs;
    for (int i = 0; i < depth; i++) pcs.push_back(uintptr_t(stack[i]) - (uintptr_t(stack[i]) != exact_pc));  // a call returns behind itself
    if (depth) source_lines(pcs);
    for (const uintptr_t pc : pcs) {
        const std::string all = source_lines(pc);
        for (size_t at = 0, end; (end = all.find('\n', at)) != all.npos; at = end + 1) lines.push_back(all.substr(at, end - at));
    }
    auto known = std::find(lines.begin(), lines.end(), first);
    if (known != lines.end()) lines.erase(lines.begin(), known);
    else if (!first.empty()) lines = {first};  // of another thread, or without its line
    std::string text = lines.empty() ? "unknown source" : lines[0];
    for (size_t i = 1; i < lines.size(); i++)
        if (lines[i] != lines[i - 1]) text += ", called at " + lines[i];
    return text;
}

static std::string head(const Thread& t) {
    Machine& m = *current();
    char text[256];
    snprintf(text, sizeof text, "kernel %s, block (%u,%u,%u), thread (%u,%u,%u), ", m.launch->kernel->name, m.view.block.x, m.view.block.y,
             m.view.block.z, t.index.x, t.index.y, t.index.z);
    return text;
}

[[noreturn]] static void report(const Thread& t, const std::string& where, const char* format, va_list args) {
    Machine& m = *current();
    char text[512];
    vsnprintf(text, sizeof text, format, args);
    {
        std::lock_guard<std::mutex> lock(m.launch->mutex);
        if (m.launch->error.empty()) m.launch->error = head(t) + where + ": " + text;
    }
    m.launch->failed = true;
    void* ignored;
    simt_switch(&ignored, m.scheduler_sp);
    __builtin_unreachable();
}

void fail(const Thread& t, Where at, const char* format, ...) {
    va_list args;
    va_start(args, format);
    void* stack[64];
    const int depth = &t == current()->self ? backtrace(stack, 64) : 0;
    report(t, place(relative(at.file) + ":" + std::to_string(at.line), stack, depth), format, args);
}

static std::string place_at_pc(uintptr_t pc) {
    void* stack[64];
    int depth = backtrace(stack, 64);
    // Everything on the stack above the instruction belongs to the emulator.
    void** from = std::find(stack, stack + depth, reinterpret_cast<void*>(pc));
    if (from == stack + depth) stack[0] = reinterpret_cast<void*>(pc), from = stack, depth = 1;
    return place("", from, int(stack + depth - from));
}

void fail_at_pc(uintptr_t pc, const char* format, ...) {
    va_list args;
    va_start(args, format);
    report(*current()->self, place_at_pc(pc), format, args);
}

static void report(const Thread& t, const std::string& where, const char* format, ...) {
    va_list args;
    va_start(args, format);
    report(t, where, format, args);
}
void fail_earlier(const Thread& t, uintptr_t pc, const std::string& text) {
    void* stack = reinterpret_cast<void*>(pc);
    report(t, place("", &stack, 1), "%s", text.c_str());
    __builtin_unreachable();
}

std::string finding_at_pc(uintptr_t pc, const std::string& text) { return head(*current()->self) + place_at_pc(pc) + ": " + text; }

void trap(const char* message, Where at) { fail(*current()->self, at, "%s", message); }

static struct sigaction previous_action[NSIG];

// Runs on the fault stack, after the handler has returned to it.
[[noreturn]] static void faulted() {
    Machine& m = *current();
    const Fault& f = m.fault;
    std::string what;
    if (f.signal == SIGFPE) what = "integer division by zero";
    else if (f.signal == SIGILL) what = "illegal instruction";
    else if (f.address - m.base < m.statics - kPage - m.base) what = "stack overflow: more than 64 KB of local memory";
    else what = "illegal access: " + describe_address(f.address);
    const Where* at = m.fault_where;
    const Thread& t = at && m.fault_thread ? *m.fault_thread : *m.self;
    m.fault_where = nullptr;
    void* const* from = std::find(f.stack, f.stack + f.depth, reinterpret_cast<void*>(f.pc));
    const int depth = from == f.stack + f.depth ? 0 : int(f.stack + f.depth - from);
    const std::string first = at ? relative(at->file) + ":" + std::to_string(at->line) : "";
    const auto finish = [&](const char* format, ...) {
        va_list args;
        va_start(args, format);
        report(t, place(first, from, &t == m.self ? depth : 0, f.pc), format, args);
    };
    finish("%s", what.c_str());
    __builtin_unreachable();
}

static void on_signal(int signal, siginfo_t* info, void* context) {
    Machine* m = current();
    if (!m || !m->self) {  // not ours, but perhaps the other build's
        const struct sigaction& previous = previous_action[signal];
        if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(signal, info, context);
        sigaction(signal, &previous, nullptr);  // the instruction faults again, under that
        return;
    }
    greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    Fault& f = m->fault;
    f.signal = signal, f.address = uintptr_t(info->si_addr), f.pc = uintptr_t(registers[REG_RIP]);
    f.depth = backtrace(f.stack, 64);  // through the signal's frame into the kernel
    registers[REG_RSP] = m->stacks - 64 - 8;
    registers[REG_RIP] = greg_t(faulted);
}

static void install_handlers() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        void* first;
        backtrace(&first, 1);  // its first call allocates
        for (int s : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(s, &action, &previous_action[s]);
    });
    // A fiber that overflowed its stack cannot take the signal on it.
    static thread_local std::unique_ptr<unsigned char[]> own;
    static thread_local bool checked = false;
    if (checked) return;
    checked = true;
    stack_t stack;
    if (!sigaltstack(nullptr, &stack) && !(stack.ss_flags & SS_DISABLE)) return;
    own.reset(new unsigned char[64 << 10]);
    stack = {own.get(), 0, 64 << 10};
    sigaltstack(&stack, nullptr);
}

// A thread that runs for half a second by itself is taken to wait for another in a loop, and others run. It must be in the
// program's own code, since what the emulator and libraries are doing must not be done twice.
extern "C" void simt_code_ends();
static void on_tick(int, siginfo_t*, void* context) {
    Machine* m = current();
    if (!m || !m->self || m->fault_where) return;  // nor in the middle of an atomic
    if (m->ticked.thread != m->self) m->ticked = {m->self, 0};
    const auto pc = uintptr_t(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
    if (++m->ticked.times < (m->launch->spins ? 1 : 50) || pc < uintptr_t(simt_code_ends) || pc >= image().code_end) return;
    m->launch->spins = true;
    m->ticked = {};
    let_others_run();
}
static void start_ticking() {
    image();
    struct sigaction action = {};
    action.sa_sigaction = on_tick;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
    sigaction(SIGVTALRM, &action, nullptr);
    const itimerval every = {{0, 10000}, {0, 10000}};
    setitimer(ITIMER_VIRTUAL, &every, nullptr);
}

// ---- global memory ----------------------------------------------------------------------------

static std::map<uintptr_t, Allocation> allocations;
static std::map<uintptr_t, uintptr_t> freed;  // beginnings and ends
static std::recursive_mutex allocations_mutex;  // kernels allocate too

// What was freed most recently keeps its addresses. Otherwise the host's next memory might lie there and be taken for freed
// memory.
struct Kept {
    uintptr_t map, map_end, begin;
};
static std::deque<Kept> kept;  // the oldest first
static size_t kept_bytes = 0;
constexpr size_t kKeptBytes = size_t(64) << 30, kKeptRanges = 16384;  // a process has 65530 mappings

static void forget_freed(size_t bytes, size_t ranges) {
    for (; kept_bytes > bytes || kept.size() > ranges; kept.pop_front()) {
        const Kept& k = kept.front();
        freed.erase(k.begin), kept_bytes -= k.map_end - k.map;
        munmap(reinterpret_cast<void*>(k.map), k.map_end - k.map);
    }
}
static void keep_freed(const Allocation& a) {
    // It is mapped anew with the permissions of guard pages, so that it becomes one mapping with them.
    if (mmap(reinterpret_cast<void*>(a.map), a.map_end - a.map, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
        return void(munmap(reinterpret_cast<void*>(a.map), a.map_end - a.map));
    kept.push_back({a.map, a.map_end, a.begin}), kept_bytes += a.map_end - a.map;
    freed[a.begin] = a.end;
    forget_freed(kKeptBytes, kKeptRanges);
}

bool was_freed(uintptr_t a) {
    std::lock_guard<std::recursive_mutex> lock(allocations_mutex);
    auto it = freed.upper_bound(a);
    return it != freed.begin() && a < std::prev(it)->second;
}

const Allocation* find_allocation(uintptr_t address) {
    std::lock_guard<std::recursive_mutex> lock(allocations_mutex);
    auto it = allocations.upper_bound(address);
    return it == allocations.begin() ? nullptr : &std::prev(it)->second;
}

static std::string relative_to(uintptr_t a, const char* what, uintptr_t begin, uintptr_t end) {
    char text[256];
    if (a >= end)
        snprintf(text, sizeof text, "%zu bytes past the end of %s of %zu bytes", a - end, what, end - begin);
    else
        snprintf(text, sizeof text, "%zu bytes before %s of %zu bytes", begin - a, what, end - begin);
    return text;
}

std::string describe_shared(const Machine& m, uintptr_t a) {
    if (a >= m.statics_guard) return relative_to(a, "dynamic shared memory", m.variables[0].begin, m.variables[0].end);
    const Machine::Static* nearest = nullptr;
    for (const auto& v : m.variables)
        if (v.begin <= a && v.variable && (!nearest || v.begin > nearest->begin)) nearest = &v;
    if (nearest) return relative_to(a, ("the shared array " + nearest->variable->name).c_str(), nearest->begin, nearest->end);
    return "below the static shared memory";
}

std::string describe_address(uintptr_t a) {
    Machine& m = *current();
    char text[256];
    const auto relative = [&](const char* what, uintptr_t begin, uintptr_t end) { return relative_to(a, what, begin, end); };
    if (a - (m.statics - kPage) < m.end + kPage - (m.statics - kPage)) return describe_shared(m, a);
    if (a < kPage) return "a null pointer";
    if (was_freed(a)) return "memory that has been freed";
    const Allocation* below = find_allocation(a);
    auto above = allocations.upper_bound(a);
    uintptr_t past = below ? a - below->end : UINTPTR_MAX, before = above == allocations.end() ? UINTPTR_MAX : above->first - a;
    if (below && a < below->end) return "inside a live allocation";
    if (past <= before && past < 1 << 20) return relative("an allocation", below->begin, below->end);
    if (before < past && before < 1 << 20) return relative("an allocation", above->second.begin, above->second.end);
    snprintf(text, sizeof text, "0x%zx, which is no memory of this device", size_t(a));
    return text;
}

// ---- launches over OS threads -----------------------------------------------------------------

static uint64_t cluster_at(const Launch& l, uint64_t i) {
    switch (l.order) {
        case Order::forward: return i;
        case Order::reversed: return l.clusters - 1 - i;
        case Order::random: break;
    }
    uint64_t step = (l.seed * 2654435761u + 12345) % l.clusters | 1;  // coprime: a permutation
    auto gcd = [](uint64_t a, uint64_t b) { while (b) std::swap(a %= b, b); return a; };
    while (gcd(step, l.clusters) != 1) step += 2;
    return uint64_t(((unsigned __int128)i * step + l.seed) % l.clusters);
}

// The number of a block in the grid, of a rank in a cluster.
static uint64_t block_of(const Launch& l, uint64_t cluster, unsigned rank) {
    const uint3 first = coordinates(cluster, {l.grid.x / l.cluster.x, l.grid.y / l.cluster.y, l.grid.z / l.cluster.z}), in = coordinates(rank, l.cluster);
    return first.x * l.cluster.x + in.x + l.grid.x * (first.y * l.cluster.y + in.y + uint64_t(l.grid.y) * (first.z * l.cluster.z + in.z));
}

// What one OS thread needs to run blocks, one after the other. A block that waits for others keeps its machine while they
// go on.
class Worker {
    static constexpr size_t kTogether = 64;  // four multiprocessors, 16 blocks each
    std::vector<Machine*> idle;
    std::deque<Machine*> waiting;

    // All blocks that there are wait for the grid's barrier.
    void meet(Launch& l) {
        check_grid_barrier(l);
        if (waiting.size() < l.blocks) {
            std::set<uint64_t> here;
            for (const Machine* m : waiting) here.insert(m->view.block.x + l.grid.x * (m->view.block.y + uint64_t(l.grid.y) * m->view.block.z));
            for (l.absent = 0; here.count(uint64_t(l.absent)); l.absent++) {}
        }
        for (Machine* m : waiting) m->at_grid = false, pass_barrier(*m);
        mix(l);
    }

    // The next to go on is any of them.
    void mix(const Launch& l) {
        if (l.order == Order::random) std::rotate(waiting.begin(), waiting.begin() + long(waiting[0]->random % waiting.size()), waiting.end());
    }

    // All blocks of the cluster wait for their turn.
    void begin(Launch& l, uint64_t number) {
        const size_t size = l.blocks / l.clusters;
        for (; idle.size() < size; idle.push_back(new Machine)) {}
        Cluster& cluster = idle.back()->own;
        cluster.blocks.assign(idle.rbegin(), idle.rbegin() + long(size));
        idle.resize(idle.size() - size);
        cluster.left = size, cluster.meetings = 0, cluster.awaited = unsigned(size) * l.block.x * l.block.y * l.block.z, cluster.stuck = false;
        for (unsigned rank = 0; rank < size; rank++) {
            Machine* m = cluster.blocks[rank];
            m->begin_block(l, block_of(l, number, rank), cluster, rank);
            m->goes_on = true;
            waiting.insert(l.order == Order::reversed ? waiting.begin() : waiting.end(), m);
        }
        if (size > 1) mix(l);
    }

    // Returns one of the waiting ones that `may` go on, which then waits no more; else null.
    template <class F>
    Machine* take(F may) {
        const auto next = std::find_if(waiting.begin(), waiting.end(), may);
        if (next == waiting.end()) return nullptr;
        Machine* m = *next;
        waiting.erase(next);
        return m;
    }

    // Its blocks have ended, or will not go on.
    void end(Cluster& cluster) { idle.insert(idle.end(), cluster.blocks.rbegin(), cluster.blocks.rend()); }

public:
    void run(Launch& l) {
        install_handlers();
        const size_t most = std::max<size_t>(kTogether, l.blocks / l.clusters);
        const auto goes_on = [](const Machine* m) { return m->goes_on; };
        const auto can_run = [](const Machine* m) { return !m->at_grid && !m->parked; };
        while (!l.failed) {
            Machine* m = take(goes_on);
            if (!m && waiting.size() + l.blocks / l.clusters <= most)
                if (const uint64_t i = l.next++; i < l.clusters) begin(l, cluster_at(l, i)), m = take(goes_on);
            if (!m && waiting.empty()) break;
            if (!m && std::none_of(waiting.begin(), waiting.end(), can_run)) meet(l);
            if (!m) m = take(can_run);
            m->goes_on = false;
            m->run();
            Cluster& cluster = *m->cluster;
            if (m->alive) waiting.push_back(m);
            else if (!--cluster.left) end(cluster);
            if (l.has_clusters() && cluster.left) end_cluster_deadlock(cluster);
        }
        while (Machine* m = take([](const Machine*) { return true; })) {
            m->abandon();
            if (!--m->cluster->left) end(*m->cluster);
        }
    }
};

// Without a name of its own, the static below would be shared by both builds in a process (it would be a unique symbol,
// even for dlopen).
namespace {

// Helpers beside the launching thread, which live as long as the process.
class Pool {
    std::mutex mutex;
    std::condition_variable wake, finished;
    Launch* launch = nullptr;
    uint64_t generation = 0;
    int started = 0, wanted = 0, running = 0;

    void helper(int id) {
        Worker worker;
        std::unique_lock<std::mutex> lock(mutex);
        for (uint64_t seen = 0;;) {
            wake.wait(lock, [&] { return generation != seen && launch && id < wanted; });
            seen = generation;
            Launch* l = launch;
            running++;
            lock.unlock();
            worker.run(*l);
            lock.lock();
            if (!--running) finished.notify_one();
        }
    }

public:
    void run(Launch& l, int threads) {
        static Worker& own = *new Worker;
        int helpers = int(std::min<uint64_t>(threads, l.clusters)) - 1;
        if (helpers > 0) {
            std::lock_guard<std::mutex> lock(mutex);
            for (; started < helpers; started++) std::thread(&Pool::helper, this, started).detach();
            launch = &l, wanted = helpers, generation++;
            wake.notify_all();
        }
        own.run(l);
        if (helpers > 0) {
            std::unique_lock<std::mutex> lock(mutex);
            launch = nullptr;  // who has not woken yet is not needed
            finished.wait(lock, [&] { return !running; });
        }
    }
};

}  // namespace

struct KernelState {
    Kernel kernel;
    std::optional<size_t> max_dynamic;  // if somebody asked
};

// Kernels register before main, in any order of files, so this cannot be a plain global.
static std::map<std::string, KernelState, std::less<>>& kernels() {
    static auto& map = *new std::map<std::string, KernelState, std::less<>>;
    return map;
}

void add_kernel(const Kernel& k) { kernels()[k.name].kernel = k; }

static std::mutex big_lock;  // one call of the C ABI at a time
static thread_local std::string last_error;
static int threads = std::max(1u, std::thread::hardware_concurrency());
static Order order = Order::forward;
static uint64_t seed = 0;
static bool poison = true, strict = false, undefined = false;
static bool overlap = false, between = false;  // of the next launch: it need not wait for the last; but the host does
static unsigned along_x = 1;  // of the next launch by emu_launch: blocks of a cluster
static uint64_t conflicts = 0;

// Findings go to the file that SIMT_REPORT names, one a line, and so do the names of kernels that ran.
static void record(const char* kind, const std::string& text) {
    static const char* const path = getenv("SIMT_REPORT");
    if (!path) return;
    if (FILE* file = fopen(path, "a")) {
        fprintf(file, "%s %s\n", kind, text.c_str());
        fclose(file);
    }
}

static int note_refusal(const char* format, va_list args) {
    char text[512];
    vsnprintf(text, sizeof text, format, args);
    last_error = text;
    overlap = false, along_x = 1;
    record("refused", text);
    return 1;
}

static int refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));
static int refuse(const char* format, ...) {
    va_list args;
    va_start(args, format);
    const int code = note_refusal(format, args);
    va_end(args);
    return code;
}

void refused(const char* format, ...) {
    va_list args;
    va_start(args, format);
    note_refusal(format, args);
    va_end(args);
}

// Not the parenthesis of "k<(Mode)1>" or of "(anonymous namespace)::".
size_t parameters_of(const std::string& signature) {
    static const std::string nameless = "(anonymous namespace)";
    int angles = 0, inner = 0;
    for (size_t i = 0; i < signature.size(); i++) {
        const char c = signature[i];
        if (!angles && signature.compare(i, nameless.size(), nameless) == 0) i += nameless.size() - 1;
        else if (!angles && c == '(') return i;
        else if (c == '(' || c == ')') inner += c == '(' ? 1 : -1;
        else if (!inner) angles += (c == '<') - (c == '>');
    }
    return signature.npos;
}

static Launch& the_launch() {
    static Launch& launch = *new Launch;
    return launch;
}

void overlap_next() { overlap = true; }
void launches_are_over() { between = true; }

// Which launches may still run beside the one that begins now. It waits for the last one only. Of those before that one it
// knows that they are over only if that one has waited for them.
static void place_launch(Launch& l, bool beside_last) {
    const uint32_t last = l.first, before_last = l.running.from;
    const bool last_waited = l.waited || !l.overlaps();
    l.first = ++l.serial;
    l.running = {!beside_last ? l.first : last_waited && !l.early ? last : before_last, l.first};
    l.left = {before_last, beside_last && !last_waited ? last : before_last};
    l.waited = l.early = false;
}

// Its parameters are there already.
static int start(Launch& l, const Kernel& k, std::optional<size_t> max_dynamic, const Config& config) {
    const bool beside = std::exchange(overlap, false);
#ifdef __AVX2__
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return refuse("the emulator was compiled for a processor with AVX2 and FMA");
#endif
    const auto [gx, gy, gz] = config.grid;
    const auto [bx, by, bz] = config.block;
    const size_t smem = config.shared;
    if (!bx || !by || !bz || bx > 1024 || by > 1024 || bz > 64 || uint64_t(bx) * by * bz > kMaxThreads)
        return refuse("kernel %s: a block of %ux%ux%u threads; at most 1024, and 1024x1024x64", k.name, bx, by, bz);
    if (!gx || !gy || !gz || gx > 0x7fffffff || gy > 65535 || gz > 65535)
        return refuse("kernel %s: a grid of %ux%ux%u blocks; at most 2147483647x65535x65535, at least 1", k.name, gx, gy, gz);
    if (const size_t allowed = max_dynamic.value_or(kSharedDefault); smem > allowed)
        return refuse("kernel %s: %zu bytes of dynamic shared memory, %zu allowed%s", k.name, smem, allowed, opt_in(k));
    const auto [cx, cy, cz] = config.cluster;
    if (!cx || !cy || !cz || cx > kMaxCluster || cy > kMaxCluster || cz > kMaxCluster || cx * cy * cz > kMaxCluster || gx % cx || gy % cy || gz % cz) {
        refuse("kernel %s: clusters of %ux%ux%u blocks in a grid of %ux%ux%u; at most %u blocks, and the grid's sizes must be multiples", k.name, cx, cy, cz,
               gx, gy, gz, kMaxCluster);
        return 4;
    }
    l.blocks = uint64_t(gx) * gy * gz, l.clusters = l.blocks / (cx * cy * cz);
    if (const int most = 4 * resident_blocks(int(bx * by * bz), smem); config.cooperative && l.blocks > uint64_t(most)) {
        refuse("kernel %s: a cooperative launch of %llu blocks, of which %d are resident together (cudaOccupancyMaxActiveBlocksPerMultiprocessor)", k.name,
               (unsigned long long)l.blocks, most);
        return 3;
    }
    static std::set<std::string> recorded;
    if (recorded.insert(k.name).second) record("launched", k.name);
    l.kernel = &k, l.grid = config.grid, l.block = config.block, l.cluster = config.cluster, l.smem = unsigned(smem), l.cooperative = config.cooperative, l.absent = -1, l.spins = false;
    l.shared_most = max_dynamic ? max_shared(k) : kSharedDefault;
    l.order = order, l.seed = seed, l.poison = poison, l.strict = strict, l.undefined = undefined;
    place_launch(l, beside && !between);
    between = false;
    l.next = 0, l.conflicts = 0, l.failed = false, l.error.clear();
    check_launch_start(l);
    static Pool& pool = *new Pool;
    pool.run(l, l.cooperative ? 1 : threads);
    conflicts = l.conflicts;
    if (!l.failed) l.error = check_launch_end(l);
    if (l.error.empty()) return 0;
    last_error = l.error;
    record("fault", l.error);
    return 2;
}

}  // namespace simt

// ---- C ABI: 0, or an error that emu_last_error explains (per OS thread) --------------------------

using namespace simt;

extern "C" {

const char* emu_last_error() { return last_error.c_str(); }

// threads: OS threads for blocks; order: 0 forward, 1 reversed, 2 random; seed: of the random
// order; poison: 0 or 1; strict: 1 if barriers and warps must not be short of threads that left; undefined: 1 if a shuffle
// from a lane that is not there gives poison and is no error; overlap: 1 if the next launch may begin while the last one
// still runs (programmatic dependent launch); cluster: blocks along x of a cluster, of the next launch; ticking: 1 if a clock (SIGVTALRM) stops threads that wait in loops.
int emu_config(const char* key, uint64_t value) {
    std::lock_guard<std::mutex> lock(big_lock);
    std::string k = key;
    if (k == "threads" && value >= 1 && value <= 1024) threads = int(value);
    else if (k == "order" && value <= 2) order = Order(value);
    else if (k == "seed") seed = value;
    else if (k == "poison" && value <= 1) poison = value;
    else if (k == "strict" && value <= 1) strict = value;
    else if (k == "undefined" && value <= 1) undefined = value;
    else if (k == "overlap" && value <= 1) overlap = value;
    else if (k == "cluster" && value <= UINT_MAX) along_x = unsigned(value);
    else if (k == "ticking" && value == 1) start_ticking();
    else return refuse("emu_config: no setting %s = %llu", key, (unsigned long long)value);
    return 0;
}

// The name of the i-th kernel in alphabetical order, or null.
const char* emu_kernel_name(int i) {
    if (i < 0 || size_t(i) >= kernels().size()) return nullptr;
    return std::next(kernels().begin(), i)->first.c_str();
}

// Number of arguments, and their sizes as far as `cap` allows.
int emu_kernel_info(const char* name, int* nargs, size_t* sizes, int cap) {
    auto it = kernels().find(name);
    if (it == kernels().end()) return refuse("no kernel named %s", name);
    *nargs = it->second.kernel.nargs;
    for (int i = 0; i < *nargs && i < cap; i++) sizes[i] = it->second.kernel.sizes[i];
    return 0;
}

int emu_set_max_dyn_smem(const char* name, size_t bytes) {
    std::lock_guard<std::mutex> lock(big_lock);
    auto it = kernels().find(name);
    if (it == kernels().end()) return refuse("no kernel named %s", name);
    size_t most = max_shared(it->second.kernel);
    if (bytes > most) return refuse("kernel %s: %zu bytes of shared memory, at most %zu", name, bytes, most);
    it->second.max_dynamic = bytes;
    return 0;
}

// Shared-memory bank conflicts (wavefronts beyond the least possible) of the last launch: in
// ldmatrix; in the checked build in every access.
uint64_t emu_bank_conflicts() { return conflicts; }

// Aligned to 256 bytes, filled with NaN, with unmapped pages before and behind.
static void* allocate_device(size_t bytes) {
    size_t room = (bytes + 255) / 256 * 256, pages = (std::max<size_t>(room, 1) + kPage - 1) / kPage * kPage;
    size_t size = pages + 2 * kPage;
    auto reserve = [&] { return room < bytes ? MAP_FAILED : mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); };
    void* map = reserve();
    if (map == MAP_FAILED) {
        std::lock_guard<std::recursive_mutex> lock(allocations_mutex);
        forget_freed(0, 0);
        map = reserve();
    }
    if (map == MAP_FAILED || mprotect(static_cast<char*>(map) + kPage, pages, PROT_READ | PROT_WRITE)) {
        if (map != MAP_FAILED) munmap(map, size);
        refuse("out of memory: %zu bytes", bytes);
        return nullptr;
    }
    uintptr_t begin = uintptr_t(map) + kPage + pages - room;
    if (poison) memset(reinterpret_cast<void*>(begin), kPoison, room);
    std::lock_guard<std::recursive_mutex> lock(allocations_mutex);
    allocations[begin] = {begin, begin + bytes, uintptr_t(map), uintptr_t(map) + size, make_shadow(bytes)};
    return reinterpret_cast<void*>(begin);
}

static bool free_device(void* p) {
    std::lock_guard<std::recursive_mutex> lock(allocations_mutex);
    auto it = allocations.find(uintptr_t(p));
    if (it == allocations.end() || it->second.home == Home::registered) return false;
    const Allocation& a = it->second;
    free_shadow(a.shadow, a.end - a.begin);
    keep_freed(a);
    allocations.erase(it);
    return true;
}

void* emu_malloc(size_t bytes) {
    std::lock_guard<std::mutex> lock(big_lock);
    return allocate_device(bytes);
}

// Functions that kernels' files call by names of the C library (simt.h). On the host they are those of the C library.
static Thread* running() {
    Machine* m = current();
    return m ? m->self : nullptr;
}
void* simt_memcpy(void* to, const void* from, size_t bytes) {
    if (running()) check_range(from, bytes, Access::read, uintptr_t(__builtin_return_address(0))), check_range(to, bytes, Access::write, uintptr_t(__builtin_return_address(0)));
    return memcpy(to, from, bytes);
}
void* simt_memmove(void* to, const void* from, size_t bytes) {
    if (running()) check_range(from, bytes, Access::read, uintptr_t(__builtin_return_address(0))), check_range(to, bytes, Access::write, uintptr_t(__builtin_return_address(0)));
    return memmove(to, from, bytes);
}
void* simt_memset(void* to, int value, size_t bytes) {
    if (running()) check_range(to, bytes, Access::write, uintptr_t(__builtin_return_address(0)));
    return memset(to, value, bytes);
}
void* simt_malloc(size_t bytes) { return running() ? allocate_device(bytes) : malloc(bytes); }
void simt_free(void* p) {
    if (!running()) return free(p);
    if (p && !free_device(p)) trap("free: not what malloc returned, or freed before", {});
    if (p) check_freed();
}

int emu_free(void* p) {
    if (!p) return 0;
    std::lock_guard<std::mutex> lock(big_lock);
    return free_device(p) ? 0 : refuse("emu_free: %p was not allocated, or freed before", p);
}

int emu_launch(const char* name, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
               unsigned smem, void** args) {
    std::lock_guard<std::mutex> lock(big_lock);
    Config config({gx, gy, gz}, {bx, by, bz}, smem);
    config.cluster.x = std::exchange(along_x, 1);
    auto it = kernels().find(std::string_view(name));
    if (it == kernels().end()) return refuse("no kernel named %s", name);
    const Kernel& k = it->second.kernel;
    Launch& l = the_launch();
    constexpr size_t most = 4096;
    if (k.offsets[k.nargs] > most) return refuse("kernel %s: %zu bytes of arguments, at most %zu", name, k.offsets[k.nargs], most);
    for (int i = 0; i < k.nargs; i++) memcpy(l.params + k.offsets[i], args[i], k.sizes[i]);
    const int code = start(l, k, it->second.max_dynamic, config);
    return code > 2 ? 1 : code;
}

// A function of the kernels' sources by its name, "scale" or "scale<float>", whose parameters have the types that `types`
// lists ("float*, int"; null: any). If there is none: null, and an error that says which there are.
void* emu_function(const char* name, const char* types) {
    auto plain = [](std::string text) {
        for (size_t at; (at = text.find(" const")) != text.npos;) text.erase(at, 6);
        return text;
    };
    std::string seen;
    for (const Symbol& f : image().functions) {
        const std::string full = plain_name(f.name);  // of `extern "C"`: no types
        const size_t open = parameters_of(full);
        std::string called = full.substr(0, open);
        if (called.compare(0, 5, "void ") == 0) called.erase(0, 5);
        if (called != name) continue;
        if (!types || open == full.npos || plain(full.substr(open + 1, full.rfind(')') - open - 1)) == plain(types))
            return reinterpret_cast<void*>(f.begin);
        seen += (seen.empty() ? "" : ", ") + full;
    }
    refuse(seen.empty() ? "no kernel named %s" : "no kernel %s(%s), but there is %s", name, types ? types : "", seen.c_str());
    return nullptr;
}

}  // extern "C"

namespace simt {

// "scale" of "void (anonymous namespace)::scale<float>(float*)". More than this base name is not certain in what a launch
// says of a kernel.
static std::string base_name(std::string text) {
    for (const std::string scope = "(anonymous namespace)::"; text.find(scope) != text.npos;) text.erase(text.find(scope), scope.size());
    text.erase(std::min(text.find_first_of("<("), text.size()));
    return text.substr(text.find_last_of(" :") + 1);
}

// How much shared memory was allowed to kernels that no line registers, by their base names.
static std::map<std::string, size_t>& max_dynamic() {
    static auto& map = *new std::map<std::string, size_t>;
    return map;
}

// And their __cluster_dims__, which are noted before main.
static std::map<std::string, dim3>& cluster_dims() {
    static auto& map = *new std::map<std::string, dim3>;
    return map;
}
bool add_cluster_dims(const char* kernel, dim3 dims) { return cluster_dims()[kernel] = dims, true; }

std::string kernel_signature(const void* kernel) {
    for (const Symbol& f : image().functions)
        if (f.begin == uintptr_t(kernel)) return plain_name(f.name);
    return "";
}

const char* kernel_name(const void* kernel) {
    static std::set<std::string> names;
    const std::string signature = kernel_signature(kernel);
    return signature.empty() ? "of no name" : names.insert(base_name(signature)).first->c_str();
}

bool allow_dynamic(const void* kernel, size_t bytes) {
    if (bytes > kSharedMax) return false;
    size_t& allowed = max_dynamic()[kernel_name(kernel)];
    allowed = std::max(allowed, bytes);
    return true;
}
size_t allowed_dynamic(const void* kernel) {
    const auto it = max_dynamic().find(kernel_name(kernel));
    return it == max_dynamic().end() ? kSharedDefault : it->second;
}

void set_home(const void* p, Home home) {
    std::lock_guard<std::recursive_mutex> lock(allocations_mutex);
    allocations.at(uintptr_t(p)).home = home;
}
void register_host(void* p, size_t bytes) {
    std::lock_guard<std::recursive_mutex> lock(allocations_mutex);
    const uintptr_t begin = uintptr_t(p), end = begin + bytes;
    allocations[begin] = {begin, end, begin, end, make_shadow(bytes), false, Home::registered};
}
bool unregister_host(void* p) {
    std::lock_guard<std::recursive_mutex> lock(allocations_mutex);
    const auto it = allocations.find(uintptr_t(p));
    if (it == allocations.end() || it->second.home != Home::registered) return false;
    free_shadow(it->second.shadow, it->second.end - it->second.begin);
    allocations.erase(it);
    return true;
}

bool on_device() { return running() != nullptr; }

static bool named_barriers = false;
bool use_named_barriers() { return named_barriers = true; }

void run(const char* name, const Config& given, void (*thunk)(const Kernel&, const unsigned char*), const void* params, size_t bytes) {
    if (running()) fail_at_pc(uintptr_t(__builtin_return_address(0)), "a kernel launches a kernel: the emulator has no dynamic parallelism");
    std::lock_guard<std::mutex> lock(big_lock);
    static std::set<std::string> names;  // an error message may name it later
    const Kernel kernel = {names.insert(name).first->c_str(), named_barriers, thunk, nullptr, 0, nullptr, nullptr};
    Launch& l = the_launch();
    memcpy(l.params, params, bytes);
    const auto allowed = max_dynamic().find(base_name(name));
    Config config = given;
    if (const auto own = cluster_dims().find(base_name(name)); own != cluster_dims().end() && config.cluster.x * config.cluster.y * config.cluster.z == 1)
        config.cluster = own->second;
    launched(start(l, kernel, allowed == max_dynamic().end() ? std::nullopt : std::optional(allowed->second), config));
}

}  // namespace simt
