// y[m, n] = sum over k of x[m, k] * W[n, k] + bias[n], W = values[code] * scale, few rows of x.
//
// Weights are the 16 rows of a tensor-core product and tokens its 8 columns, so the product does
// not care whether there is one token or eight. The weight is read as it is stored: k may be in any
// order within a sum, so a lane takes eight bytes (16 codes) of a row from a block of 64 and the
// matching 16 activations. Codes become pairs of values by one lookup a byte; the table has a copy
// for each lane, a bank of its own. Scales are applied to the f32 sum of a block, never to a value
// in half precision. Blocks of 32 are taken two at a time, a word of each.
//
// A thread block has 16 rows of W; its eight warps share k, in groups of steps of 64, and add up
// through shared memory. The weights of the next group are under way while one is multiplied.
#pragma once
#include "scales.cuh"

static constexpr u32 LINEAR_THREADS = 256, LINEAR_WARPS = LINEAR_THREADS / WARP;
static constexpr u32 ROWS = 16, TOKENS = 8, STEP = 64;

// The two rows of W that a lane reads. What is counted from the start of a row fits in 32 bits; the
// rest is in the pointers.
struct Rows {
    const u8 *bytes[2];      // the lane's first ones
    const float *absmax[2];  // scale of the block in which the row begins,
    const u8 *codes[2];      // or its code,
    const float *nested[2];  // and what that is multiplied by
    u32 within[2];           // steps of that block that belong to the row before
    u32 within_nested[2];    // blocks before that one with the same nested scale
};

// In which form scales are stored. EXPONENTS come with blocks of 32 only.
enum Form { PLAIN, NESTED, EXPONENTS };

// What a launch needs beside its params: tables in shared memory, and the offset of nested scales.
struct Tables {
    const u32 *pairs;   // of values, see fill_pairs
    const float *scales; // by code, before nested ones are multiplied and shifted
    float offset;
};

// Some neighbouring steps of a lane's two rows. Blocks of 32 (HALVES) change which bytes of a step a
// lane takes. Scales stay as they are stored until they are needed, so that nothing waits.
template <Form FORM, bool HALVES, u32 STEPS> struct Group {
    static constexpr u32 SCALES = HALVES ? 2 * STEPS : STEPS;
    u32 words[2][STEPS][2];
    u32 stored[2][SCALES];   // bits of scales, or their codes
    float nested[2][SCALES]; // what nested ones are multiplied by

    METHOD void load(const Linear4 &p, const Rows &rows, u32 first) {
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            const u8 *bytes = rows.bytes[r] + u64(first) * (STEP / 2);
#pragma unroll
            for (u32 i = 0; i < STEPS; ++i) {
                if constexpr (HALVES) {
                    words[r][i][0] = ::load<u32>(bytes + i * (STEP / 2));
                    words[r][i][1] = ::load<u32>(bytes + i * (STEP / 2) + 16);
                } else {
                    const Words2 both = load_once2(bytes + i * (STEP / 2));
                    words[r][i][0] = both.word[0];
                    words[r][i][1] = both.word[1];
                }
            }
#pragma unroll
            for (u32 i = 0; i < SCALES; ++i) {
                const u32 block = HALVES ? 2 * first + i : (rows.within[r] + first + i) >> (p.scales.log2_blocksize - 6);
                stored[r][i] = FORM == PLAIN ? __float_as_uint(rows.absmax[r][block]) : rows.codes[r][block];
                if constexpr (FORM == NESTED) {
                    const u32 group = (rows.within_nested[r] + block) >> p.scales.log2_nested_blocksize;
                    nested[r][i] = rows.nested[r][group];
                }
            }
        }
    }

    // The scale of block i of row r.
    METHOD float scale(const Tables &tables, u32 r, u32 i) const {
        if constexpr (FORM == PLAIN) return __uint_as_float(stored[r][i]);
        const float value = tables.scales[stored[r][i]];
        return FORM == NESTED ? value * nested[r][i] + tables.offset : value;
    }
};

// The first of the eight codes, and activations, of the lane's word 0 of a step; word 1 follows
// at once, or half a step later.
template <bool HALVES> DEVICE u32 lane_offset(u32 lane) { return lane % 4 * (HALVES ? 8 : 16); }

// The two values of a byte of the word, from the lane's own copy: table and lane are joined to the
// address by bits, which costs nothing.
DEVICE u32 values_of(const u32 *pairs, u32 word, u32 byte) {
    const u32 shifted = byte ? word >> (8 * byte - 7) : word << 7;
    const u32 offset = masked_or(shifted, 255u << 7, lane_of_warp() * 4);
    return *reinterpret_cast<const u32 *>(reinterpret_cast<const char *>(pairs) + offset);
}

template <class T, u32 TILES, Form FORM, bool HALVES, u32 STEPS>
DEVICE void multiply(float sums[TILES][4], const Group<FORM, HALVES, STEPS> &group, const Tables &tables,
                     const T *const tokens[TILES], u32 first) {
#pragma unroll
    for (u32 i = 0; i < STEPS; ++i) {
        float products[TILES][4] = {};
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            Words4 x[TILES];
#pragma unroll
            for (u32 tile = 0; tile < TILES; ++tile)
                x[tile] = load<Words4>(tokens[tile] + u64(first) * STEP + i * STEP + (HALVES ? 32 : 8) * h);
#pragma unroll
            for (u32 j = 0; j < 2; ++j) {
                u32 a[4];
#pragma unroll
                for (u32 part = 0; part < 4; ++part)
                    a[part] = values_of(tables.pairs, group.words[part % 2][i][h], 2 * j + part / 2);
#pragma unroll
                for (u32 tile = 0; tile < TILES; ++tile) mma(T{}, products[tile], a, &x[tile].word[2 * j]);
            }
            if (!HALVES && h == 0) continue;
#pragma unroll
            for (u32 r = 0; r < 2; ++r) {
                const float scale = group.scale(tables, r, HALVES ? 2 * i + h : i);
#pragma unroll
                for (u32 tile = 0; tile < TILES; ++tile)
#pragma unroll
                    for (u32 c = 2 * r; c < 2 * r + 2; ++c) {
                        sums[tile][c] = fmaf(products[tile][c], scale, sums[tile][c]);
                        products[tile][c] = 0.0f;
                    }
            }
        }
    }
}

// Pairs of values for every byte, 32 copies each: copy l of byte b is word 32 b + l.
template <class T> DEVICE void fill_pairs(u32 *pairs, const float *values) {
    const u32 byte = threadIdx.x, both = pair<T>(values[byte >> 4], values[byte & 15u]);
    // Eight neighbouring threads write to different banks.
    for (u32 i = 0; i < 8; ++i) store(pairs + byte * WARP + 4 * ((i + byte) % 8), Words4{{both, both, both, both}});
}

// Adds up what the warps have and writes the outputs of 16 rows and 8 tokens.
template <class T> DEVICE void finish_tile(const Linear4 &p, float *partial, const float sums[4], u64 n0, u64 m0) {
    const u32 lane = lane_of_warp();
#pragma unroll
    for (u32 c = 0; c < 4; ++c)
        partial[(warp_of_block() * ROWS + lane / 4 + 8 * (c / 2)) * TOKENS + lane % 4 * 2 + c % 2] = sums[c];
    __syncthreads();
    const u32 row = threadIdx.x % ROWS, token = threadIdx.x / ROWS;
    const u64 m = m0 + token, n = n0 + row;
    if (token < TOKENS && m < p.m && n < p.n) {
        float sum = p.bias ? load_as(p.bias, n, p.bias_dtype) : 0.0f;
#pragma unroll
        for (u32 w = 0; w < LINEAR_WARPS; ++w) sum += partial[(w * ROWS + row) * TOKENS + token];
        static_cast<T *>(p.y)[m * p.n + n] = narrow<T>(sum);
    }
    __syncthreads();
}

// The two rows of a lane, of the sixteen from row n0 on, with so many steps each. Rows beyond the last
// are the last one again.
template <Form FORM, bool HALVES> DEVICE Rows rows_of(const Linear4 &p, u64 n0, u32 lane, u32 steps) {
    const u32 log2_steps = HALVES ? 0 : p.scales.log2_blocksize - 6; // of a block
    Rows rows;
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
        const u64 row = n0 + lane / 4 + 8 * r < p.n ? n0 + lane / 4 + 8 * r : p.n - 1;
        const u64 before = row * steps;
        rows.bytes[r] = p.packed + before * (STEP / 2) + lane_offset<HALVES>(lane) / 2;
        const u64 block = HALVES ? 2 * before : before >> log2_steps;
        rows.within[r] = u32(before) & ((1u << log2_steps) - 1);
        if constexpr (FORM == PLAIN)
            rows.absmax[r] = p.scales.absmax + block;
        else
            rows.codes[r] = p.scales.codes + block;
        if constexpr (FORM == NESTED) {
            rows.nested[r] = p.scales.nested_absmax + (block >> p.scales.log2_nested_blocksize);
            rows.within_nested[r] = u32(block) & ((1u << p.scales.log2_nested_blocksize) - 1);
        }
    }
    return rows;
}

// The warp's share of 16 rows times all of k.
template <class T, u32 TILES, Form FORM, bool HALVES>
DEVICE void sum_steps(float sums[TILES][4], const Linear4 &p, const Tables &tables, u64 n0) {
    constexpr u32 STEPS = FORM != PLAIN || HALVES || TILES > 2 ? 1 : 2; // more would need too many registers
    using Steps = Group<FORM, HALVES, STEPS>;
    // Many tokens leave no registers for what follows from these and could be kept between tiles.
    const u32 lane = TILES > 1 ? opaque(lane_of_warp()) : lane_of_warp();
    const u32 warp = TILES > 1 ? opaque(warp_of_block()) : warp_of_block();
    const u32 steps = u32(p.k / STEP), groups = steps / STEPS;
    // Tokens and rows beyond the last read the last one again; what they give is not stored.
    const T *tokens[TILES];
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile) {
        const u64 token = tile * TOKENS + lane / 4;
        tokens[tile] = global<T>(p.x) + (token < p.m ? token : p.m - 1) * p.k + lane_offset<HALVES>(lane);
    }
    const Rows rows = rows_of<FORM, HALVES>(p, n0, lane, steps);
    Steps group = {};
    u32 at = warp;
    if (at < groups) group.load(p, rows, at * STEPS);
#pragma unroll 1
    for (; at < groups; at += LINEAR_WARPS) {
        Steps next = group;
        if (at + LINEAR_WARPS < groups) next.load(p, rows, (at + LINEAR_WARPS) * STEPS);
        multiply<T, TILES>(sums, group, tables, tokens, at * STEPS);
        group = next;
    }
    const u32 last = groups * STEPS + warp;
    if (STEPS > 1 && last < steps) {
        Group<FORM, HALVES, 1> one = {};
        one.load(p, rows, last);
        multiply<T, TILES>(sums, one, tables, tokens, last);
    }
}

template <class T, u32 TILES> DEVICE void linear4_small(const Linear4 &p) {
    SHARED(u32, pairs, 256 * WARP);
    SHARED(float, scales, 256);
    SHARED(float, partial, LINEAR_WARPS * ROWS * TOKENS);
    fill_pairs<T>(pairs, p.values);
    const u32 code = threadIdx.x;
    if (!p.scales.absmax) scales[code] = p.scales.codebook ? p.scales.codebook[code] : e8m0_decode(code);
    __syncthreads();
    const Tables tables = {pairs, scales, p.scales.offset ? *p.scales.offset : 0.0f};
    const bool halves = p.scales.log2_blocksize == 5;
#pragma unroll 1
    for (u64 n0 = u64(blockIdx.x) * ROWS; n0 < p.n; n0 += u64(gridDim.x) * ROWS) {
        float sums[TILES][4] = {};
        if (p.scales.absmax)
            halves ? sum_steps<T, TILES, PLAIN, true>(sums, p, tables, n0)
                   : sum_steps<T, TILES, PLAIN, false>(sums, p, tables, n0);
        else if (p.scales.codebook)
            halves ? sum_steps<T, TILES, NESTED, true>(sums, p, tables, n0)
                   : sum_steps<T, TILES, NESTED, false>(sums, p, tables, n0);
        else
            sum_steps<T, TILES, EXPONENTS, true>(sums, p, tables, n0);
#pragma unroll
        for (u32 tile = 0; tile < TILES; ++tile) finish_tile<T>(p, partial, sums[tile], n0, tile * TOKENS);
    }
}

// Two thread blocks on a multiprocessor: 16 warps, each with up to 2 KB under way, and registers for
// sums and addresses. 7.5 has shared memory for one only.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define LINEAR_BLOCKS 1
#else
#define LINEAR_BLOCKS 2
#endif
#define LINEAR4_SMALL_OF(name, tiles, T)                                                            \
    KERNEL_BLOCKS(name, Linear4, LINEAR_THREADS, LINEAR_BLOCKS, linear4_small<T, tiles>(p))
#define LINEAR4_SMALL(name, T)                                                                      \
    LINEAR4_SMALL_OF(linear4_small8_##name, 1, T)                                                   \
    LINEAR4_SMALL_OF(linear4_small16_##name, 2, T)                                                  \
    LINEAR4_SMALL_OF(linear4_small32_##name, 4, T)

LINEAR4_SMALL(f16, f16)
#ifdef HAS_BF16_TENSOR_CORES
LINEAR4_SMALL(bf16, bf16)
#endif
