// scale = largest magnitude of a block, or a power of two near it; code = nearest of sixteen values
// to x / scale. The bytes equal those of the scalar definition in src/quant/blockwise.rs.
//
// A lane takes eight neighbouring elements, a warp 256: whole blocks where they have up to 256
// elements, else a part of one, which is then read twice. The nearest value is found as the core's
// vector kernels find it (src/format/cells.rs): a number's cell follows from one fused step, and
// what is left is a comparison with the cell's own pivot.
#pragma once
#include "scales.cuh"

static constexpr u32 QUANTIZE_THREADS = 256, QUANTIZE_WARPS = QUANTIZE_THREADS / WARP;
static constexpr u32 EACH_LANE = 8, EACH_WARP = EACH_LANE * WARP;

DEVICE u32 largest_of_eight(const float x[EACH_LANE]) {
    u32 largest = 0;
#pragma unroll
    for (u32 j = 0; j < EACH_LANE; ++j) largest = larger(largest, magnitude(x[j]));
    return largest;
}

// NaN and infinity among eight elements: noticed, and replaced if that is asked for.
DEVICE void check_eight(float x[EACH_LANE], u64 i, const NonFinite &rule) {
    if (largest_of_eight(x) < INFINITE) return;
    u32 first = EACH_LANE;
#pragma unroll
    for (u32 j = EACH_LANE; j-- > 0;) {
        if (magnitude(x[j]) < INFINITE) continue;
        first = j;
        if (rule.zero) x[j] = 0.0f;
    }
    if (rule.first) atomicMin(rule.first, i + first);
}

// Eight elements, 0 beyond the end; the first of them has flat index i.
template <class T> DEVICE void load_eight(float x[EACH_LANE], const T *from, u64 i, u64 n, const NonFinite &rule) {
    if (i + EACH_LANE <= n) {
        constexpr u32 WORDS = EACH_LANE * sizeof(T) / 16;
        Words4 words[WORDS];
#pragma unroll
        for (u32 w = 0; w < WORDS; ++w) words[w] = load_once4(reinterpret_cast<const Words4 *>(from + i) + w);
#pragma unroll
        for (u32 j = 0; j < EACH_LANE; ++j) {
            const u32 word = words[j * sizeof(T) / 16].word[j * sizeof(T) / 4 % 4];
            if constexpr (sizeof(T) == 4)
                x[j] = __uint_as_float(word);
            else
                x[j] = widen(T{u16(j % 2 ? word >> 16 : word & 0xffffu)});
        }
    } else {
        const u32 there = i < n ? u32(n - i) : 0;
#pragma unroll
        for (u32 j = 0; j < EACH_LANE; ++j) x[j] = j < there ? widen(from[i + j]) : 0.0f;
    }
    check_eight(x, i, rule);
}

// The encoder's tables where every lane reads its own entry at once.
struct Cells {
    const float *pivots;
    const u32 *below, *order;
    float step, extra[2];
    bool has_extra;
};

// Adding 1.5 * 2^23 rounds to an integer, ties to even, in the low bits; 16 is added on the way.
static constexpr float ROUND_TO_CELL = 12582912.0f + 16.0f;

template <bool EXTRA> DEVICE u32 encode(float x, const Cells &cells) {
    const u32 cell = __float_as_uint(fmaf(x, cells.step, ROUND_TO_CELL)) & 31u;
    u32 position = cells.below[cell] + u32(x > cells.pivots[cell]);
    if (EXTRA) position += u32(x > cells.extra[0]) + u32(x > cells.extra[1]);
    return cells.order[position & 15u];
}

// Eight codes in a word, the first in the high half of the lowest byte.
template <bool EXTRA> DEVICE u32 encode_eight(const float x[EACH_LANE], const Cells &cells) {
    u32 word = 0;
#pragma unroll
    for (u32 j = 0; j < EACH_LANE; ++j) word |= encode<EXTRA>(x[j], cells) << 4 * (j ^ 1);
    return word;
}

// One block of a warp's own, or `lanes` lanes of it.
template <class T> DEVICE void quantize4(const Quantize4 &p) {
    SHARED(float, pivots, 32);
    SHARED(u32, below, 32);
    SHARED(u32, order, 16);
    if (threadIdx.x < 32) {
        pivots[threadIdx.x] = p.encoder.pivots[threadIdx.x];
        below[threadIdx.x] = p.encoder.below[threadIdx.x];
    }
    if (threadIdx.x < 16) order[threadIdx.x] = p.encoder.order[threadIdx.x];
    __syncthreads();
    const Cells cells = {pivots, below, order, p.encoder.step, {p.encoder.extra[0], p.encoder.extra[1]},
                         magnitude(p.encoder.extra[0]) < INFINITE};
    const T *from = static_cast<const T *>(p.x);
    const u64 blocksize = u64(1) << p.log2_blocksize;
    const u64 piece = blocksize > EACH_WARP ? blocksize : EACH_WARP;
    const u32 lanes = blocksize < EACH_WARP ? u32(blocksize) / EACH_LANE : WARP;
    const u64 together = QUANTIZE_WARPS * piece;
    // The whole thread block goes on or stops, so that the warps' shuffles need no care.
#pragma unroll 1
    for (u64 base = blockIdx.x * together; base < p.n; base += gridDim.x * together) {
        const u64 start = base + warp_of_block() * piece;
        float x[EACH_LANE];
        u32 largest = 0;
#pragma unroll 1
        for (u64 within = 0; within < piece; within += EACH_WARP) {
            load_eight(x, from, start + within + lane_of_warp() * EACH_LANE, p.n, p.nonfinite);
            largest = larger(largest, largest_of_eight(x));
        }
        const float absmax = __uint_as_float(largest_of(largest, lanes));
        const u32 exponent = e8m0_of(absmax);
        const Divisor by = divisor_of(p.scale == SCALE_E8M0 ? e8m0_decode(exponent) : absmax);
        const u64 mine = start + lane_of_warp() * EACH_LANE;
        if (lane_of_warp() % lanes == 0 && mine < p.n) {
            const u64 block = mine >> p.log2_blocksize;
            if (p.scale == SCALE_E8M0)
                static_cast<u8 *>(p.scales)[block] = u8(exponent);
            else
                static_cast<float *>(p.scales)[block] = absmax;
        }
#pragma unroll 1
        for (u64 within = 0; within < piece; within += EACH_WARP) {
            const u64 i = start + within + lane_of_warp() * EACH_LANE;
            // A block that the registers hold is not read again.
            if (piece > EACH_WARP) load_eight(x, from, i, p.n, p.nonfinite);
            divide<EACH_LANE>(x, by);
            const u32 word = cells.has_extra ? encode_eight<true>(x, cells) : encode_eight<false>(x, cells);
            if (i + EACH_LANE <= p.n) {
                store(p.packed + i / 2, word);
            } else {
#pragma unroll 1
                for (u32 byte = 0; i + 2 * byte < p.n; ++byte) p.packed[i / 2 + byte] = u8(word >> 8 * byte);
            }
        }
    }
}

KERNELS(quantize4, Quantize4, QUANTIZE_THREADS, quantize4)
