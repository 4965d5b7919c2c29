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

// Three ways to walk along a row: blocks of at least 64 with PLAIN or NESTED scales, and blocks of
// 32, whose scales may be any.
enum Kind { PLAIN, NESTED, SMALL_BLOCKS };

// The two rows of W that a lane reads. What is counted from the start of a row fits in 32 bits.
struct Rows {
    const u8 *bytes[2]; // the lane's first ones
    u64 blocks[2];      // blocks before the one in which the row begins
    u32 within[2];      // steps of that block that belong to the row before
};

// Some neighbouring steps of a lane's two rows. Blocks of 32 change which bytes of a step a lane
// takes. Scales stay as they are stored until they are needed, so that nothing waits.
template <Kind KIND, u32 STEPS> struct Group {
    static constexpr bool HALVES = KIND == SMALL_BLOCKS;
    static constexpr u32 EACH = HALVES ? 2 : 1, SCALES = STEPS * EACH;
    u32 words[2][STEPS][2];
    u32 stored[2][SCALES];   // bits of scales, or their codes
    float nested[2][SCALES]; // what nested ones are multiplied by

    // The first of the eight codes, and activations, of a lane's word h.
    DEVICE u32 offset(u32 h) {
        const u32 t = lane_of_warp() % 4;
        return HALVES ? 32 * h + 8 * t : 16 * t + 8 * h;
    }

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
            u64 blocks[SCALES];
#pragma unroll
            for (u32 i = 0; i < SCALES; ++i) {
                const u32 within = HALVES ? 2 * first + i : (rows.within[r] + first + i) >> (p.scales.log2_blocksize - 6);
                blocks[i] = rows.blocks[r] + within;
            }
            const bool plain = KIND == PLAIN || (KIND == SMALL_BLOCKS && p.scales.absmax);
#pragma unroll
            for (u32 i = 0; i < SCALES; ++i)
                stored[r][i] = plain ? __float_as_uint(p.scales.absmax[blocks[i]]) : p.scales.codes[blocks[i]];
            if (KIND == NESTED || (KIND == SMALL_BLOCKS && p.scales.codebook)) {
#pragma unroll
                for (u32 i = 0; i < SCALES; ++i)
                    nested[r][i] = p.scales.nested_absmax[blocks[i] >> p.scales.log2_nested_blocksize];
            }
        }
    }

    // The scale of block i of row r.
    METHOD float scale(const Scales &scales, u32 r, u32 i) const {
        if (KIND == PLAIN || (KIND == SMALL_BLOCKS && scales.absmax)) return __uint_as_float(stored[r][i]);
        if (KIND == SMALL_BLOCKS && !scales.codebook) return e8m0_decode(stored[r][i]);
        return scales.codebook[stored[r][i]] * nested[r][i] + *scales.offset;
    }
};

// The two values of a byte of the word; `table` is the lane's own copy.
DEVICE u32 values_of(const u32 *table, u32 word, u32 byte) {
    const u32 offset = (byte ? word >> (8 * byte - 7) : word << 7) & (255u << 7);
    return *reinterpret_cast<const u32 *>(reinterpret_cast<const char *>(table) + offset);
}

template <class T, u32 TILES, Kind KIND, u32 STEPS>
DEVICE void multiply(float sums[TILES][4], const Group<KIND, STEPS> &group, const Linear4 &p,
                     const T *const tokens[TILES], const u32 *table, u32 first) {
    constexpr bool HALVES = KIND == SMALL_BLOCKS;
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
                    a[part] = values_of(table, group.words[part % 2][i][h], 2 * j + part / 2);
#pragma unroll
                for (u32 tile = 0; tile < TILES; ++tile) mma(T{}, products[tile], a, &x[tile].word[2 * j]);
            }
            if (!HALVES && h == 0) continue;
#pragma unroll
            for (u32 r = 0; r < 2; ++r) {
                const float scale = group.scale(p.scales, r, HALVES ? 2 * i + h : i);
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
template <class T> DEVICE void fill_table(u32 *table, const float *values) {
    const u32 byte = threadIdx.x, both = pair<T>(values[byte >> 4], values[byte & 15u]);
    // Eight neighbouring threads write to different banks.
    for (u32 i = 0; i < 8; ++i) store(table + byte * WARP + 4 * ((i + byte) % 8), Words4{{both, both, both, both}});
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

// The warp's share of 16 rows times all of k.
template <class T, u32 TILES, Kind KIND>
DEVICE void sum_steps(float sums[TILES][4], const Linear4 &p, const u32 *table, u64 n0) {
    constexpr bool HALVES = KIND == SMALL_BLOCKS;
    constexpr u32 STEPS = HALVES ? 1 : 2;
    using Steps = Group<KIND, STEPS>;
    const u32 lane = lane_of_warp(), warp = warp_of_block();
    const u32 steps = u32(p.k / STEP), groups = steps / STEPS;
    // Tokens and rows beyond the last read the last one again; what they give is not stored.
    const T *tokens[TILES];
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile) {
        const u64 token = tile * TOKENS + lane / 4;
        tokens[tile] = static_cast<const T *>(p.x) + (token < p.m ? token : p.m - 1) * p.k + Steps::offset(0);
    }
    const u32 log2_steps = HALVES ? 0 : p.scales.log2_blocksize - 6; // of a block
    Rows rows;
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
        const u64 row = n0 + lane / 4 + 8 * r < p.n ? n0 + lane / 4 + 8 * r : p.n - 1;
        const u64 before = row * steps;
        rows.bytes[r] = p.packed + before * (STEP / 2) + Steps::offset(0) / 2;
        rows.blocks[r] = HALVES ? 2 * before : before >> log2_steps;
        rows.within[r] = u32(before) & ((1u << log2_steps) - 1);
    }
    Steps group = {};
    u32 at = warp;
    if (at < groups) group.load(p, rows, at * STEPS);
#pragma unroll 1
    for (; at < groups; at += LINEAR_WARPS) {
        Steps next = group;
        if (at + LINEAR_WARPS < groups) next.load(p, rows, (at + LINEAR_WARPS) * STEPS);
        multiply<T, TILES>(sums, group, p, tokens, table + lane, at * STEPS);
        group = next;
    }
    const u32 last = groups * STEPS + warp;
    if (STEPS > 1 && last < steps) {
        Group<KIND, 1> one = {};
        one.load(p, rows, last);
        multiply<T, TILES>(sums, one, p, tokens, table + lane, last);
    }
}

template <class T, u32 TILES> DEVICE void linear4_small(const Linear4 &p) {
    SHARED(u32, table, 256 * WARP);
    SHARED(float, partial, LINEAR_WARPS * ROWS * TOKENS);
    fill_table<T>(table, p.values);
    __syncthreads();
#pragma unroll 1
    for (u64 n0 = u64(blockIdx.x) * ROWS; n0 < p.n; n0 += u64(gridDim.x) * ROWS) {
        float sums[TILES][4] = {};
        if (p.scales.log2_blocksize == 5)
            sum_steps<T, TILES, SMALL_BLOCKS>(sums, p, table, n0);
        else if (p.scales.absmax)
            sum_steps<T, TILES, PLAIN>(sums, p, table, n0);
        else
            sum_steps<T, TILES, NESTED>(sums, p, table, n0);
#pragma unroll
        for (u32 tile = 0; tile < TILES; ++tile) finish_tile<T>(p, partial, sums[tile], n0, tile * TOKENS);
    }
}

// So many thread blocks on a multiprocessor: 24 warps keep memory busy for few tokens, and more
// tokens need more registers.
#define LINEAR4_SMALL(name, T)                                                                      \
    KERNEL_BLOCKS(linear4_small8_##name, Linear4, LINEAR_THREADS, 3, linear4_small<T, 1>(p))        \
    KERNEL_BLOCKS(linear4_small16_##name, Linear4, LINEAR_THREADS, 2, linear4_small<T, 2>(p))       \
    KERNEL_BLOCKS(linear4_small32_##name, Linear4, LINEAR_THREADS, 2, linear4_small<T, 4>(p))

LINEAR4_SMALL(f16, f16)
#ifdef HAS_BF16_TENSOR_CORES
LINEAR4_SMALL(bf16, bf16)
#endif
