// Kernels that break the rules, to show that the emulator notices.
#pragma once
#include "device.cuh"

struct Broken {
    float *x; // [32]
};

// A barrier that half of the threads never reach.
DEVICE void divergent_barrier(const Broken &p) {
    if (threadIdx.x < 16) __syncthreads();
    p.x[threadIdx.x] = __shfl_xor_sync(FULL, p.x[threadIdx.x], 1);
}

// Halves of a warp that meet in different shuffles.
DEVICE void divergent_shuffle(const Broken &p) {
    const float x = p.x[threadIdx.x];
    if (threadIdx.x < 16)
        p.x[threadIdx.x] = __shfl_xor_sync(FULL, x, 1);
    else
        p.x[threadIdx.x] = __shfl_xor_sync(FULL, x, 1) + 1.0f;
}

// Shared memory that is read before the other warp wrote it: right in one order of threads only.
DEVICE void missing_barrier(const Broken &p) {
    SHARED(float, all, 64);
    all[threadIdx.x] = p.x[threadIdx.x % 32];
    p.x[threadIdx.x % 32] = all[63 - threadIdx.x] + 1.0f;
}

// One element too many.
DEVICE void out_of_bounds(const Broken &p) { p.x[threadIdx.x + 1] = 1.0f; }

// Sixteen bytes from an address that is a multiple of four only.
DEVICE void misaligned(const Broken &p) { p.x[0] = float(load<Words4>(p.x + 1).word[0]); }

// Sixteen bytes a lane that are read before they are waited for.
DEVICE void early_read(const Broken &p) {
    SHARED(Words4, all, 8);
    if (threadIdx.x < 8) copy16(all + threadIdx.x, p.x + 4 * threadIdx.x);
    __syncthreads();
    const float x = reinterpret_cast<const float *>(all)[threadIdx.x];
    copies_done();
    p.x[threadIdx.x] = x;
}

// Copies that nobody waits for.
DEVICE void forgotten_copy(const Broken &p) {
    SHARED(Words4, all, 8);
    if (threadIdx.x < 8) copy16(all + threadIdx.x, p.x + 4 * threadIdx.x);
}

KERNEL(broken_early, Broken, 32, early_read(p))
KERNEL(broken_forgotten, Broken, 32, forgotten_copy(p))
KERNEL(broken_barrier, Broken, 32, divergent_barrier(p))
KERNEL(broken_shuffle, Broken, 32, divergent_shuffle(p))
KERNEL(broken_order, Broken, 64, missing_barrier(p))
KERNEL(broken_bounds, Broken, 32, out_of_bounds(p))
KERNEL(broken_alignment, Broken, 32, misaligned(p))
