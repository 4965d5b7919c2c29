// y[m, n] = sum over k of x[m, k] * W[n, k] + bias[n] in f32, for weights of byte codes: values of a
// codebook times a block's scale, or signed bytes times absmax[n] / 127.
//
// As linear4_gemv: a warp has a row of W and four tokens. Where rows are whole pieces of sixteen
// codes a lane takes such a piece at a time, all of one block, else one code.
#pragma once
#include "int8_rows.cuh"
#include "linear4_gemv.cuh"

static constexpr u32 GEMV8_CODES = 16;

// The signed byte `byte` of a word, exactly: its bits are put under the exponent of 2^23.
DEVICE float signed_byte(u32 word, u32 byte) {
    return __uint_as_float(__byte_perm(word ^ 0x80808080u, 0x4b000000u, 0x7440u + byte)) - (8388608.0f + 128.0f);
}

// The value of a code before its block's scale. TABLE: of a codebook.
template <bool TABLE> DEVICE float value8(const float *values, u32 word, u32 byte) {
    return TABLE ? values[word >> 8 * byte & 255u] : signed_byte(word, byte);
}

template <class T, bool TABLE> DEVICE void gemv8_rows(const Linear8 &p, const float *values) {
    const u32 lane = lane_of_warp();
    const T *x = global<T>(p.x);
    const bool pieces = (p.k | reinterpret_cast<u64>(p.x) | reinterpret_cast<u64>(p.codes)) % GEMV8_CODES == 0;
    const u64 warps = GEMV_THREADS / WARP;
#pragma unroll 1
    for (u64 m0 = u64(blockIdx.y) * GEMV_TOKENS; m0 < p.m; m0 += u64(gridDim.y) * GEMV_TOKENS) {
        // Tokens beyond the last read the last one again.
        u64 tokens[GEMV_TOKENS];
#pragma unroll
        for (u32 j = 0; j < GEMV_TOKENS; ++j) tokens[j] = (m0 + j < p.m ? m0 + j : p.m - 1) * p.k;
#pragma unroll 1
        for (u64 n0 = blockIdx.x * warps; n0 < p.n; n0 += gridDim.x * warps) {
            // Rows beyond the last read the last one again, so that whole thread blocks go on.
            const bool there = n0 + warp_of_block() < p.n;
            const u64 n = there ? n0 + warp_of_block() : p.n - 1;
            const u64 row = n * p.k;
            const float of_row = TABLE ? 1.0f : p.absmax[n] * INVERSE_QMAX;
            float sums[GEMV_TOKENS] = {};
            if (pieces) {
#pragma unroll 1
                for (u64 k = lane * GEMV8_CODES; k < p.k; k += WARP * GEMV8_CODES) {
                    const Words4 codes = load_once4(p.codes + row + k);
                    const float scale = TABLE ? p.absmax[(row + k) >> p.log2_blocksize] : of_row;
                    float parts[GEMV_TOKENS] = {};
#pragma unroll
                    for (u32 half = 0; half < 2; ++half) {
                        float weights[GEMV_CODES];
#pragma unroll
                        for (u32 i = 0; i < GEMV_CODES; ++i)
                            weights[i] = value8<TABLE>(values, codes.word[2 * half + i / 4], i % 4);
#pragma unroll
                        for (u32 j = 0; j < GEMV_TOKENS; ++j) {
                            if (j > 0 && m0 + j >= p.m) break;
                            float a[GEMV_CODES];
                            load_activations(a, x + tokens[j] + k + half * GEMV_CODES);
#pragma unroll
                            for (u32 i = 0; i < GEMV_CODES; ++i) parts[j] = fmaf(weights[i], a[i], parts[j]);
                        }
                    }
#pragma unroll
                    for (u32 j = 0; j < GEMV_TOKENS; ++j) sums[j] = fmaf(parts[j], scale, sums[j]);
                }
            } else {
#pragma unroll 1
                for (u64 k = lane; k < p.k; k += WARP) {
                    const float scale = TABLE ? p.absmax[(row + k) >> p.log2_blocksize] : of_row;
                    const float weight = value8<TABLE>(values, p.codes[row + k], 0) * scale;
#pragma unroll
                    for (u32 j = 0; j < GEMV_TOKENS; ++j) sums[j] = fmaf(weight, widen(x[tokens[j] + k]), sums[j]);
                }
            }
            finish_tokens<T>(p, sums, there, n, m0);
        }
    }
}

template <class T> DEVICE void linear8_gemv(const Linear8 &p) {
    SHARED(float, values, 256);
    if (p.values) values[threadIdx.x] = p.values[threadIdx.x];
    __syncthreads();
    if (p.values)
        gemv8_rows<T, true>(p, values);
    else
        gemv8_rows<T, false>(p, values);
}

KERNELS(linear8_gemv, Linear8, GEMV_THREADS, linear8_gemv)
