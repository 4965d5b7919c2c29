// All kernels as one shared library for the host, for tests and for the fake driver.
#include <algorithm>
#include <cstdint>

#include "emulator.h"

#include "nybble.cu"

#ifdef NYBBLE_EMULATOR_BROKEN
#include "broken.cuh"
#endif

extern "C" {

// 1 if there is such a kernel.
int nybble_emulated(const char *name) { return int(emulator::kernels().count(name)); }

// How many kernels there are.
unsigned nybble_emulated_kernels() { return unsigned(emulator::kernels().size()); }

// Threads run in order for 0, in one shuffled order after another for other numbers.
void nybble_emulate_order(unsigned seed) { emulator::order_seed = seed; }

// Blocks before this one, along x and along y, are not run from now on.
void nybble_emulate_from(unsigned x, unsigned y) { emulator::first_block = {x, y, 0}; }

// Bytes of each struct of params.h, to compare with what a caller thinks it is; 0 for an unknown.
unsigned nybble_sizeof(const char *name) {
    const std::map<std::string, unsigned> sizes = {
#define SIZE(name) {#name, sizeof(name)}
        SIZE(Scales), SIZE(Dequantize4), SIZE(Encoder4), SIZE(NonFinite), SIZE(Quantize4),
        SIZE(Dequantize8), SIZE(Quantize8), SIZE(Mean), SIZE(Linear4), SIZE(Linear8), SIZE(IntegerRows),
        SIZE(IntegerLinear4), SIZE(RunStats), SIZE(Compare), SIZE(Outliers), SIZE(Int8Flags),
        SIZE(Int8Outliers), SIZE(Int8Rows), SIZE(Int8Dequantize), SIZE(Int8Linear),
#undef SIZE
    };
    const auto found = sizes.find(name);
    return found == sizes.end() ? 0 : found->second;
}

// Bytes of shared memory that a launch must give a kernel.
unsigned nybble_emulated_shared(const char *name) {
    const auto found = emulator::kernels().find(name);
    return found == emulator::kernels().end() ? 0 : found->second.shared;
}

// Runs a kernel. 1: no kernel has this name; 2: the block or the shared memory is not what the kernel is
// made for.
int nybble_emulate(const char *name, const unsigned grid[3], const unsigned block[3], unsigned shared_bytes,
                   const void *params) {
    const auto found = emulator::kernels().find(name);
    if (found == emulator::kernels().end()) return 1;
    const emulator::Index threads{block[0], block[1], block[2]};
    if (threads.size() != found->second.threads || shared_bytes != found->second.shared) return 2;
    emulator::launch(found->first.c_str(), found->second.run, {grid[0], grid[1], grid[2]}, threads, params);
    return 0;
}

}
