// Runs kernels on the CPU: a fiber for each thread, blocks one after another.
//
// What a kernel may do here is what kernels of this project may do at all: barriers that every
// thread of a block or warp reaches, shuffles of whole warps, aligned vector accesses, tensor-core
// products, copies that are waited for. What breaks these rules ends the process with a message. Each block begins with shared
// memory full of 0xff (NaN), so a value that nobody stored is noticed. Orders of threads can be
// shuffled: results that change with the order show a missing barrier.
// Not modelled: weak memory order, bank conflicts, blocks that run at the same time.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"

namespace emulator {

struct Index {
    unsigned x = 1, y = 1, z = 1;
    unsigned long long size() const { return 1ull * x * y * z; }
};

inline Index threadIdx, blockIdx, blockDim, gridDim;

constexpr unsigned WARP = 32;

// What lanes of a warp show each other: `words` of up to six values, two sets in turn, so that a
// fast lane can publish again while a slow one still reads.
struct Warp {
    unsigned long long slots[2][WARP][4];
    unsigned rounds[WARP];
    int lines[2][WARP];
};

// A copy to shared memory that the hardware makes while its thread goes on.
struct Copy {
    void *to;
    const void *from;
};
constexpr size_t COPIED = 16;

struct Thread {
    Fiber fiber;
    std::vector<Copy> copies;
    Index index;
    bool done = false, waiting = false;
    unsigned barriers = 0;
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::map<const void *, bool> shared; // declared so far in this block
    void (*kernel)(const void *) = nullptr;
    const void *params = nullptr;
    const char *name = "";
    unsigned current = 0;
    unsigned long long progress = 0;
};

inline Block *block = nullptr;
inline unsigned order_seed = 0;
inline Index first_block = {0, 0, 0}; // those before are not run: a test of a large grid has no time for all

[[noreturn]] inline void fail(const char *format, ...) {
    std::fprintf(stderr, "emulator: %s, block (%u, %u), thread %u: ", block ? block->name : "?",
                 blockIdx.x, blockIdx.y, block ? block->current : 0);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fputc('\n', stderr);
    std::fflush(stderr);
    std::abort();
}

inline Thread &self() { return block->threads[block->current]; }
inline unsigned lane() { return block->current % WARP; }

template <class Ready> inline void wait_until(Ready ready) {
    Thread &me = self();
    while (!ready()) {
        me.waiting = true;
        me.fiber.suspend();
    }
    me.waiting = false;
}

inline void sync_threads() {
    Thread &me = self();
    ++me.barriers;
    ++block->progress;
    wait_until([&] {
        for (const Thread &other : block->threads)
            if (static_cast<int>(other.barriers - me.barriers) < 0) return false;
        return true;
    });
}

// Shows `value` to the warp, waits for all its lanes, and returns the set that they showed.
template <class T> inline unsigned publish(const T &value, int line) {
    static_assert(sizeof(T) <= sizeof(Warp{}.slots[0][0]));
    Warp &warp = block->warps[block->current / WARP];
    const unsigned first = block->current / WARP * WARP, mine = lane();
    const unsigned lanes = std::min<unsigned>(WARP, block->threads.size() - first);
    const unsigned round = warp.rounds[mine] + 1, set = round & 1;
    std::memcpy(warp.slots[set][mine], &value, sizeof value);
    warp.lines[set][mine] = line;
    warp.rounds[mine] = round;
    ++block->progress;
    wait_until([&] {
        for (unsigned i = 0; i < lanes; ++i)
            if (static_cast<int>(warp.rounds[i] - round) < 0) return false;
        return true;
    });
    for (unsigned i = 0; i < lanes; ++i)
        if (warp.rounds[i] == round && warp.lines[set][i] != line)
            fail("lanes meet at different places: lines %d and %d", line, warp.lines[set][i]);
    return set;
}

template <class T> inline T shown(unsigned set, unsigned of) {
    T value;
    std::memcpy(&value, block->warps[block->current / WARP].slots[set][of % WARP], sizeof value);
    return value;
}

inline void whole_warp(unsigned mask) {
    if (mask != 0xffffffffu) fail("a shuffle of a part of a warp");
    if (block->threads.size() % WARP) fail("a shuffle in a block that is not whole warps");
}

// Shared memory holds nothing when a block begins.
inline void fresh(void *start, size_t bytes) {
    if (!block->shared.emplace(start, true).second) return;
    std::memset(start, 0xff, bytes);
}

template <class T> inline T load_aligned(const void *address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail("a misaligned load of %zu bytes", sizeof(T));
    T value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

template <class T> inline void store_aligned(void *address, const T &value) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail("a misaligned store of %zu bytes", sizeof(T));
    std::memcpy(address, &value, sizeof value);
}

// What is read between the order to copy and the wait is nothing: memory is poisoned until then.
inline void copy_later(void *to, const void *from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % COPIED) fail("a misaligned copy");
    std::memset(to, 0xff, COPIED);
    self().copies.push_back({to, from});
}

inline void copies_done() {
    for (const Copy &copy : self().copies) std::memcpy(copy.to, copy.from, COPIED);
    self().copies.clear();
}

inline void entry() {
    block->kernel(block->params);
    if (!self().copies.empty()) fail("a thread that ends before its copies are done");
    self().done = true;
    ++block->progress;
    self().fiber.suspend();
    std::abort();
}

inline void run_block(std::vector<unsigned> &order, unsigned &random) {
    block->shared.clear();
    block->warps.assign((block->threads.size() + WARP - 1) / WARP, Warp{});
    for (unsigned i = 0; i < block->threads.size(); ++i) {
        Thread &thread = block->threads[i];
        thread.done = thread.waiting = false;
        thread.barriers = 0;
        thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        thread.fiber.begin(entry);
    }
    for (;;) {
        for (unsigned i = block->threads.size() - 1; order_seed && i > 0; --i) {
            random = random * 1664525u + 1013904223u;
            std::swap(order[i], order[(random >> 8) % (i + 1)]);
        }
        block->progress = 0;
        unsigned live = 0;
        for (unsigned i : order) {
            Thread &thread = block->threads[i];
            if (thread.done) continue;
            ++live;
            block->current = i;
            threadIdx = thread.index;
            thread.fiber.resume();
        }
        if (!live) return;
        if (!block->progress) fail("a barrier or shuffle that %u threads wait at and others never reach", live);
    }
}

inline void launch(const char *name, void (*kernel)(const void *), Index grid, Index threads, const void *params) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> held(one_at_a_time);
    if (threads.size() == 0 || threads.size() > 1024) fail("a block of %llu threads", threads.size());
    Block storage;
    block = &storage;
    storage.threads = std::vector<Thread>(threads.size());
    storage.kernel = kernel;
    storage.params = params;
    storage.name = name;
    blockDim = threads;
    gridDim = grid;
    std::vector<unsigned> order(threads.size());
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    unsigned random = order_seed * 2654435761u + 1;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
        for (blockIdx.y = first_block.y; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = first_block.x; blockIdx.x < grid.x; ++blockIdx.x) run_block(order, random);
    block = nullptr;
}

struct Kernel {
    void (*run)(const void *);
    unsigned threads, shared; // shared: bytes beyond those that it declares
};

inline std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> table;
    return table;
}

struct Registration {
    Registration(const char *name, void (*run)(const void *), unsigned threads, unsigned shared) {
        kernels()[name] = {run, threads, shared};
    }
};

} // namespace emulator

using emulator::blockDim;
using emulator::blockIdx;
using emulator::gridDim;
using emulator::threadIdx;

#include "intrinsics.h"
