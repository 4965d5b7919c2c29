// y[m, n] = sum over k of x[m, k] * W[n, k] + bias[n] in f32, for what tensor cores do not take:
// f32 activations, and rows of any length, even ones that begin in the middle of a byte.
//
// A warp has a row of W and four tokens. Where rows are whole words of codes a lane takes eight
// neighbouring codes at a time, else one. Sums of a lane are in f32; a block's scale is applied to
// the eight products it is shared by.
#pragma once
#include "dequantize4.cuh"

static constexpr u32 GEMV_THREADS = 256, GEMV_TOKENS = 4, GEMV_CODES = 8;

template <class T> DEVICE void load_activations(float x[GEMV_CODES], const T *from) {
    constexpr u32 WORDS = GEMV_CODES * sizeof(T) / 16;
#pragma unroll
    for (u32 w = 0; w < WORDS; ++w) {
        const Words4 words = load<Words4>(reinterpret_cast<const Words4 *>(from) + w);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            if constexpr (sizeof(T) == 4) {
                x[4 * w + i] = __uint_as_float(words.word[i]);
            } else {
                x[2 * i] = widen(T{u16(words.word[i] & 0xffffu)});
                x[2 * i + 1] = widen(T{u16(words.word[i] >> 16)});
            }
        }
    }
}

// Adds up what the lanes have of a row and some tokens, and writes the outputs: lane j's is token j.
template <class T, u32 TOKENS, class Params>
DEVICE void finish_tokens(const Params &p, const float (&sums)[TOKENS], bool there, u64 n, u64 m0) {
    const u32 lane = lane_of_warp();
    float sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < TOKENS; ++j) {
        const float all = warp_sum(sums[j]);
        if (lane == j) sum = all;
    }
    if (there && lane < TOKENS && m0 + lane < p.m) {
        if (p.bias) sum += load_as(p.bias, n, p.bias_dtype);
        static_cast<T *>(p.y)[(m0 + lane) * p.n + n] = narrow<T>(sum);
    }
}

template <class T> DEVICE void linear4_gemv(const Linear4 &p) {
    SHARED(float, values, 16);
    if (threadIdx.x < 16) values[threadIdx.x] = p.values[threadIdx.x];
    __syncthreads();
    const u32 lane = lane_of_warp();
    const T *x = global<T>(p.x);
    const bool words = p.k % GEMV_CODES == 0;
#pragma unroll 1
    for (u64 m0 = u64(blockIdx.y) * GEMV_TOKENS; m0 < p.m; m0 += u64(gridDim.y) * GEMV_TOKENS) {
        // Tokens beyond the last read the last one again.
        u64 tokens[GEMV_TOKENS];
#pragma unroll
        for (u32 j = 0; j < GEMV_TOKENS; ++j) tokens[j] = (m0 + j < p.m ? m0 + j : p.m - 1) * p.k;
        const u64 warps = GEMV_THREADS / WARP;
#pragma unroll 1
        for (u64 n0 = blockIdx.x * warps; n0 < p.n; n0 += gridDim.x * warps) {
            // Rows beyond the last read the last one again, so that whole thread blocks go on.
            const bool there = n0 + warp_of_block() < p.n;
            const u64 n = there ? n0 + warp_of_block() : p.n - 1;
            const u64 row = n * p.k;
            float sums[GEMV_TOKENS] = {};
            if (words) {
#pragma unroll 2
                for (u64 k = lane * GEMV_CODES; k < p.k; k += WARP * GEMV_CODES) {
                    const u32 word = load<u32>(p.packed + (row + k) / 2);
                    const float scale = scale_of(p.scales, (row + k) >> p.scales.log2_blocksize);
#pragma unroll
                    for (u32 j = 0; j < GEMV_TOKENS; ++j) {
                        if (j > 0 && m0 + j >= p.m) break;
                        float a[GEMV_CODES], sum = 0.0f;
                        load_activations(a, x + tokens[j] + k);
#pragma unroll
                        for (u32 i = 0; i < GEMV_CODES; ++i)
                            sum = fmaf(value_at(values, word, 4 * (i ^ 1)), a[i], sum);
                        sums[j] = fmaf(sum, scale, sums[j]);
                    }
                }
            } else {
#pragma unroll 1
                for (u64 k = lane; k < p.k; k += WARP) {
                    const u64 i = row + k;
                    const float weight = value_at(values, p.packed[i / 2], i % 2 ? 0 : 4) *
                                         scale_of(p.scales, i >> p.scales.log2_blocksize);
#pragma unroll
                    for (u32 j = 0; j < GEMV_TOKENS; ++j) sums[j] = fmaf(weight, widen(x[tokens[j] + k]), sums[j]);
                }
            }
            finish_tokens<T>(p, sums, there, n, m0);
        }
    }
}

KERNELS(linear4_gemv, Linear4, GEMV_THREADS, linear4_gemv)
