// Both factors as integers: src/quant/integer.rs is the definition.
//   y[m, n] = sum over pieces of k of float(integer sum) * (scale * step) * factor + bias[n],
// a piece being what lies in one block of the weight and one group of activations.
//
// integer_rows: a warp has a group of a row, and quantizes it like a row of LLM.int8().
// integer_linear4: a warp has a row of the weight and eight tokens. Where rows are whole pieces of 32
// codes a lane takes such a piece at a time, else one code. Four codes become signed bytes by two
// selections of bytes, one from each half of the table.
#pragma once
#include "int8_rows.cuh"
#include "linear4_gemv.cuh"

static constexpr u32 INTEGER_THREADS = 256, INTEGER_TOKENS = 8, INTEGER_CODES = 32;

template <class T> DEVICE void integer_rows(const IntegerRows &p) {
    const T *x = static_cast<const T *>(p.x);
    const u64 group = u64(1) << p.log2_group, groups = (p.columns + group - 1) >> p.log2_group, warps = INTEGER_THREADS / WARP;
#pragma unroll 1
    for (u64 base = blockIdx.x * warps; base < p.rows * groups; base += gridDim.x * warps) {
        // Warps beyond the last group take it again, so that whole thread blocks go on.
        const u64 last = p.rows * groups - 1, mine = base + warp_of_block();
        const u64 at = mine < last ? mine : last, row = at / groups;
        const u64 begin = at % groups << p.log2_group;
        const u64 end = begin + group < p.columns ? begin + group : p.columns;
        const u64 first = row * p.columns;
        u32 largest = 0;
#pragma unroll 1
        for (u64 i = begin + lane_of_warp(); i < end; i += WARP)
            largest = larger(largest, magnitude(widen(x[first + i])));
        largest = largest_of(largest, WARP);
        const bool finite = largest < INFINITE;
        const float absmax = __uint_as_float(largest);
        const float factor = largest == 0 ? 0.0f : QMAX / absmax;
#pragma unroll 1
        for (u64 i = begin + lane_of_warp(); i < end; i += WARP)
            p.codes[first + i] = finite ? code_of_row(widen(x[first + i]), absmax, factor) : i8(0);
        if (lane_of_warp() == 0) p.factors[at] = finite ? absmax * INVERSE_QMAX : __uint_as_float(0x7fc00000u);
    }
}

// Four signed bytes for the four codes in the low half of the word, in the order of the elements.
DEVICE i32 integers_of(const u32 table[4], u32 word) {
    const u32 index = word & 0x7777u;
    const u32 low = __byte_perm(table[0], table[1], index), high = __byte_perm(table[2], table[3], index);
    const u32 upper = __byte_perm(0xff00u, 0u, word >> 3 & 0x1111u); // where codes are 8 and more
    // The first element of a byte is its high half.
    return i32(__byte_perm((high & upper) | (low & ~upper), 0u, 0x2301u));
}

template <class T> DEVICE void integer_linear4(const IntegerLinear4 &p) {
    const u32 lane = lane_of_warp();
    const u64 warps = INTEGER_THREADS / WARP, groups = (p.k + (u64(1) << p.log2_group) - 1) >> p.log2_group;
    const bool pieces = p.k % INTEGER_CODES == 0;
    u32 table[4] = {};
#pragma unroll
    for (u32 i = 0; i < 16; ++i) table[i / 4] |= u32(u8(p.integers[i])) << 8 * (i % 4);
#pragma unroll 1
    for (u64 m0 = u64(blockIdx.y) * INTEGER_TOKENS; m0 < p.m; m0 += u64(gridDim.y) * INTEGER_TOKENS) {
        const u32 tokens = p.m - m0 < INTEGER_TOKENS ? u32(p.m - m0) : INTEGER_TOKENS;
#pragma unroll 1
        for (u64 n0 = blockIdx.x * warps; n0 < p.n; n0 += gridDim.x * warps) {
            // Rows beyond the last read the last one again, so that whole thread blocks go on.
            const bool there = n0 + warp_of_block() < p.n;
            const u64 n = there ? n0 + warp_of_block() : p.n - 1;
            const u64 row = n * p.k;
            float sums[INTEGER_TOKENS] = {};
            if (pieces) {
#pragma unroll 1
                for (u64 k = lane * INTEGER_CODES; k < p.k; k += WARP * INTEGER_CODES) {
                    const Words4 words = load_once4(p.packed + (row + k) / 2);
                    const float scale = scale_of(p.scales, (row + k) >> p.scales.log2_blocksize) * p.step;
                    i32 weights[8];
#pragma unroll
                    for (u32 i = 0; i < 8; ++i) weights[i] = integers_of(table, words.word[i / 2] >> 16 * (i % 2));
                    const i8 *codes_of_token = global<i8>(p.codes) + m0 * p.k + k;
                    const float *factor = global<float>(p.factors) + m0 * groups + (k >> p.log2_group);
#pragma unroll
                    for (u32 j = 0; j < INTEGER_TOKENS; ++j) {
                        if (j > 0 && j >= tokens) break;
                        i32 sum = 0;
#pragma unroll
                        for (u32 half = 0; half < 2; ++half) {
                            const Words4 codes = load<Words4>(codes_of_token + 16 * half);
#pragma unroll
                            for (u32 w = 0; w < 4; ++w) sum = __dp4a(weights[4 * half + w], i32(codes.word[w]), sum);
                        }
                        sums[j] = fmaf(float(sum) * scale, *factor, sums[j]);
                        codes_of_token += p.k;
                        factor += groups;
                    }
                }
            } else {
#pragma unroll 1
                for (u64 k = lane; k < p.k; k += WARP) {
                    const u64 i = row + k;
                    const float scale = scale_of(p.scales, i >> p.scales.log2_blocksize) * p.step;
                    const i32 weight = p.integers[p.packed[i / 2] >> (i % 2 ? 0 : 4) & 15u];
#pragma unroll
                    for (u32 j = 0; j < INTEGER_TOKENS; ++j) {
                        if (j > 0 && j >= tokens) break;
                        const i32 product = weight * i32(p.codes[(m0 + j) * p.k + k]);
                        const float factor = p.factors[(m0 + j) * groups + (k >> p.log2_group)];
                        sums[j] = fmaf(float(product) * scale, factor, sums[j]);
                    }
                }
            }
            finish_tokens<T>(p, sums, there, n, m0);
        }
    }
}

KERNELS(integer_rows, IntegerRows, INTEGER_THREADS, integer_rows)
KERNELS(integer_linear4, IntegerLinear4, INTEGER_THREADS, integer_linear4)
