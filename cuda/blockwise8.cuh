// Blocks of byte codes: code = nearest of 256 values to (x - subtract) / absmax, and back:
// out = values[code] * absmax + offset. With the dynamic codebook these are `dynamic8` and the
// scales of nested scales (src/quant/blockwise.rs, src/quant/nested.rs).
//
// Lanes take elements as in quantize4. The search halves 256 pivots in shared memory eight times.
#pragma once
#include "quantize4.cuh"

static constexpr u32 CODES = 256;

// The number of pivots below x, of which the last is infinite.
DEVICE u32 position_of(float x, const float *pivots) {
    u32 position = 0;
#pragma unroll
    for (u32 half = CODES / 2; half; half /= 2) position += x > pivots[position + half - 1] ? half : 0;
    return position;
}

template <class T>
DEVICE void load_shifted(float x[EACH_LANE], const Quantize8 &p, u64 i, float subtract) {
    load_eight(x, static_cast<const T *>(p.x), i, p.n, p.nonfinite);
    if (!p.subtract) return;
#pragma unroll
    for (u32 j = 0; j < EACH_LANE; ++j) x[j] = i + j < p.n ? x[j] - subtract : 0.0f;
}

template <class T> DEVICE void quantize8(const Quantize8 &p) {
    SHARED(float, pivots, CODES);
    SHARED(u8, order, CODES);
    if (threadIdx.x < CODES) {
        pivots[threadIdx.x] = p.pivots[threadIdx.x];
        order[threadIdx.x] = p.order ? p.order[threadIdx.x] : u8(threadIdx.x);
    }
    __syncthreads();
    const float subtract = p.subtract ? *p.subtract : 0.0f;
    const u64 blocksize = u64(1) << p.log2_blocksize;
    const u64 piece = blocksize > EACH_WARP ? blocksize : EACH_WARP;
    const u32 lanes = blocksize < EACH_WARP ? u32(blocksize) / EACH_LANE : WARP;
    const u64 together = QUANTIZE_WARPS * piece;
#pragma unroll 1
    for (u64 base = blockIdx.x * together; base < p.n; base += gridDim.x * together) {
        const u64 start = base + warp_of_block() * piece;
        float x[EACH_LANE];
        u32 largest = 0;
#pragma unroll 1
        for (u64 within = 0; within < piece; within += EACH_WARP) {
            load_shifted<T>(x, p, start + within + lane_of_warp() * EACH_LANE, subtract);
            largest = larger(largest, largest_of_eight(x));
        }
        const float absmax = __uint_as_float(largest_of(largest, lanes));
        const Divisor by = divisor_of(absmax);
        const u64 mine = start + lane_of_warp() * EACH_LANE;
        if (lane_of_warp() % lanes == 0 && mine < p.n) p.absmax[mine >> p.log2_blocksize] = absmax;
#pragma unroll 1
        for (u64 within = 0; within < piece; within += EACH_WARP) {
            const u64 i = start + within + lane_of_warp() * EACH_LANE;
            if (piece > EACH_WARP) load_shifted<T>(x, p, i, subtract);
            divide<EACH_LANE>(x, by);
            Words2 codes = {{0, 0}};
#pragma unroll
            for (u32 j = 0; j < EACH_LANE; ++j)
                codes.word[j / 4] |= u32(order[position_of(x[j], pivots)]) << 8 * (j % 4);
            if (i + EACH_LANE <= p.n) {
                store(p.codes + i, codes);
            } else {
#pragma unroll
                for (u32 j = 0; j < EACH_LANE; ++j)
                    if (i + j < p.n) p.codes[i + j] = u8(codes.word[j / 4] >> 8 * (j % 4));
            }
        }
    }
}

template <class T> DEVICE void dequantize8(const Dequantize8 &p) {
    SHARED(float, values, CODES);
    if (threadIdx.x < CODES) values[threadIdx.x] = p.values[threadIdx.x];
    __syncthreads();
    const float offset = p.offset ? *p.offset : 0.0f;
    T *out = static_cast<T *>(p.out);
    constexpr u32 EACH = 4; // a word of codes
    const u64 span = u64(blockDim.x) * EACH;
#pragma unroll 1
    for (u64 start = blockIdx.x * span; start < p.n; start += gridDim.x * span) {
        const u64 i = start + threadIdx.x * EACH;
        if (i >= p.n) continue;
        const float absmax = p.absmax[i >> p.log2_blocksize];
        const bool whole = i + EACH <= p.n;
        u32 codes = 0;
        if (whole) {
            codes = load<u32>(p.codes + i);
        } else {
            for (u32 j = 0; i + j < p.n; ++j) codes |= u32(p.codes[i + j]) << 8 * j;
        }
        float x[EACH];
#pragma unroll
        for (u32 j = 0; j < EACH; ++j) {
            x[j] = values[codes >> 8 * j & 255u] * absmax;
            // Not always: -0.0 + 0.0 is another zero.
            if (p.offset) x[j] += offset;
        }
        if (!whole) {
#pragma unroll
            for (u32 j = 0; j < EACH; ++j)
                if (i + j < p.n) out[i + j] = narrow<T>(x[j]);
        } else if constexpr (sizeof(T) == 4) {
            store(out + i, Words4{{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                                   __float_as_uint(x[3])}});
        } else {
            store(out + i, Words2{{pair<T>(x[0], x[1]), pair<T>(x[2], x[3])}});
        }
    }
}

KERNELS(quantize8, Quantize8, QUANTIZE_THREADS, quantize8)
KERNELS(dequantize8, Dequantize8, 256, dequantize8)
