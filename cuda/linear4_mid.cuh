// y[m, n] = sum over k of x[m, k] * W[n, k] + bias[n] for more rows of x than linear4_small takes and
// fewer than a dense product needs to be worth decoding the weight.
//
// A warp has 32 rows of W and up to 64 tokens: what it reads of x it uses for two tensor-core products,
// what it decodes of W for eight. Eight warps are groups of rows times halves of the tokens times shares
// of k, as the launch says: 128 rows with 128 tokens, or with 64 and two shares of k, or, where that gives
// too few blocks, 64 rows with 32 tokens and four shares.
// A step is 64 of k. x passes through shared memory in two stages: one is copied to by the hardware
// while the other is multiplied. W is read as in linear4_small, a step ahead into registers, and
// decoded before the barrier at which the warp would wait.
#pragma once
#include "linear4_small.cuh"

static constexpr u32 MID_TILES = 8, MID_WARP_ROWS = 2 * ROWS;
static constexpr u32 PIECES = STEP * 2 / 16;              // 16 bytes each, of a token's step
static constexpr u32 MID_TOKENS = 2 * MID_TILES * TOKENS; // of a thread block
static constexpr u32 STAGE = MID_TOKENS * PIECES;         // of all shares of k together
static constexpr u32 TABLE = 256 * WARP / 4;              // of pairs of values, in pieces

// Where a piece of a token lies. Odd tokens have theirs in another order, so that the eight lanes that
// shared memory serves at a time, of two tokens, ask different banks.
template <bool HALVES> DEVICE u32 place_of(u32 token, u32 piece) {
    return token * PIECES + (piece ^ (token % 2) * (HALVES ? 4 : 1));
}

// What a warp of the block has: tokens from `token` on, below `tokens`; rows from `row` on; a share of k.
struct Part {
    u32 token, tokens, row, share, shares;
};

DEVICE Part part_of(u32 warp, u32 rows, u32 tokens) {
    const u32 halves = tokens > MID_TOKENS / 2 ? 2 : 1, groups = rows / MID_WARP_ROWS;
    const u32 half = warp % halves, each = tokens / halves;
    return {half * each, (half + 1) * each, warp / halves % groups * MID_WARP_ROWS, warp / halves / groups,
            LINEAR_WARPS / halves / groups};
}

// A step of two times 16 rows, decoded: operands of tensor cores, and scales by row and half.
template <bool HALVES> struct Decoded {
    u32 a[2][2][2][4];
    float scales[2][2][HALVES ? 2 : 1];

    template <Form FORM> METHOD void take(const Group<FORM, HALVES, 1> groups[2], const Tables &tables) {
#pragma unroll
        for (u32 g = 0; g < 2; ++g) {
#pragma unroll
            for (u32 i = 0; i < 16; ++i)
                a[g][i / 8][i / 4 % 2][i % 4] =
                    values_of(tables.pairs, groups[g].words[i % 2][0][i / 8], i / 4 % 2 * 2 + i % 4 / 2);
#pragma unroll
            for (u32 r = 0; r < 2; ++r)
#pragma unroll
                for (u32 h = 0; h < (HALVES ? 2 : 1); ++h)
                    scales[g][r][h] =
                        FORM == EXPONENTS ? e8m0_decode(groups[g].stored[r][h]) : groups[g].scale(tables, r, h);
        }
    }
};

// Such a step times the warp's tokens, `tiles` of eight of them. `x` are the lane's pieces of the first.
template <class T, bool HALVES>
DEVICE void multiply_tokens(float sums[2][MID_TILES][4], const Decoded<HALVES> &step, const Words4 *const x[2], u32 tiles) {
    Words4 next[2] = {load<Words4>(x[0]), load<Words4>(x[0] + TOKENS * PIECES)};
    float products[2][2][4] = {};
    // Two tiles at a time, since each product waits for the one before it.
#pragma unroll
    for (u32 i = 0; i < MID_TILES; ++i) {
        const u32 first = i / 2 * 2, h = i % 2;
        if (h == 0 && first >= tiles) break;
        const Words4 b[2] = {next[0], next[1]};
#pragma unroll
        for (u32 tile = 0; tile < 2; ++tile)
            if (i + 1 < MID_TILES) next[tile] = load<Words4>(x[1 - h] + ((i + 1) / 2 * 2 + tile) * TOKENS * PIECES);
#pragma unroll
        for (u32 j = 0; j < 8; ++j)
            mma(T{}, products[j / 2 % 2][j % 2], step.a[j / 2 % 2][h][j / 4], &b[j % 2].word[j / 4 * 2]);
        if (!HALVES && h == 0) continue;
#pragma unroll
        for (u32 c = 0; c < 16; ++c) {
            float &sum = sums[c / 8][first + c / 4 % 2][c % 4], &product = products[c / 8][c / 4 % 2][c % 4];
            sum = fmaf(product, step.scales[c / 8][c % 4 / 2][HALVES ? h : 0], sum);
            product = 0.0f;
        }
    }
}

// The warp's share of 32 rows from n0 on times tokens from m0 on.
template <class T, Form FORM, bool HALVES>
DEVICE void sum_tokens(float sums[2][MID_TILES][4], const Linear4 &p, const Part &part, const Tables &tables, Words4 *x,
                       u64 n0, u64 m0) {
    const u32 lane = lane_of_warp(), steps = u32(p.k / STEP), rounds = (steps + part.shares - 1) / part.shares;
    const Rows rows[2] = {rows_of<FORM, HALVES>(p, n0, lane, steps), rows_of<FORM, HALVES>(p, n0 + ROWS, lane, steps)};
    const u32 tokens = p.m - m0 < p.tokens ? u32(p.m - m0) : p.tokens, last = tokens < part.tokens ? tokens : part.tokens;
    const u32 tiles = last > part.token ? (last - part.token + TOKENS - 1) / TOKENS : 0;
    // Copies: neighbouring threads take the pieces of a token. Tokens beyond the last are not copied;
    // what they give is not stored.
    const u32 pieces = PIECES * part.shares, piece = threadIdx.x % pieces, token = threadIdx.x / pieces;
    const u32 between = LINEAR_THREADS / pieces; // a multiple of 2, so that places are as far apart
    const u32 of_share = STAGE / part.shares;
    Words4 *const to = x + piece / PIECES * of_share + place_of<HALVES>(token, piece % PIECES);
    const T *const from = static_cast<const T *>(p.x) + (m0 + token) * p.k + piece * 8;
    const auto copy = [&](u32 round) {
        if (round * part.shares + piece / PIECES >= steps) return;
#pragma unroll
        for (u32 i = 0; i < STAGE / LINEAR_THREADS; ++i)
            if (token + i * between < tokens)
                copy16(to + round % 2 * STAGE + i * between * PIECES,
                       from + i * between * p.k + u64(round) * part.shares * STEP);
    };
    const Words4 *mine[2];
#pragma unroll
    for (u32 h = 0; h < 2; ++h)
        mine[h] = x + part.share * of_share + part.token * PIECES +
                  place_of<HALVES>(lane / 4, HALVES ? lane % 4 + 4 * h : lane % 4 * 2 + h);
    Group<FORM, HALVES, 1> next[2] = {};
    u32 at = part.share;
    const auto fetch = [&] {
        if (at >= steps) return;
#pragma unroll
        for (u32 g = 0; g < 2; ++g) next[g].load(p, rows[g], at);
    };
    fetch();
    copy(0);
    Decoded<HALVES> step;
    step.template take<FORM>(next, tables);
    // All warps go on together, whether there is a step left for them or not.
#pragma unroll 1
    for (u32 round = 0; round < rounds; ++round) {
        copies_done();
        __syncthreads(); // the copies of all threads are there, and the other stage is read no more
        if (round + 1 < rounds) copy(round + 1);
        const bool whole = at < steps;
        at += part.shares;
        fetch();
        const Words4 *const stage[2] = {mine[0] + round % 2 * STAGE, mine[1] + round % 2 * STAGE};
        if (whole) multiply_tokens<T>(sums, step, stage, tiles);
        step.template take<FORM>(next, tables);
    }
}

// Bias, rounding, and where the outputs belong.
template <class T>
DEVICE void store_tokens(const Linear4 &p, const Part &part, const float sums[2][MID_TILES][4], u64 n0, u64 m0) {
    const u32 lane = lane_of_warp();
    n0 += lane / 4;
    float bias[4] = {};
#pragma unroll
    for (u32 r = 0; r < 4; ++r)
        if (p.bias && n0 + r * 8 < p.n) bias[r] = load_as(p.bias, n0 + r * 8, p.bias_dtype);
#pragma unroll
    for (u32 i = 0; i < 2 * MID_TILES * 4; ++i) {
        const u32 tile = i / 4 % MID_TILES, r = i / 4 / MID_TILES * 2 + i % 4 / 2;
        const u32 token = part.token + tile * TOKENS + lane % 4 * 2 + i % 2;
        if (token >= part.tokens || m0 + token >= p.m || n0 + r * 8 >= p.n) continue;
        static_cast<T *>(p.y)[(m0 + token) * p.n + n0 + r * 8] = narrow<T>(sums[r / 2][tile][i % 4] + bias[r]);
    }
}

template <class T> DEVICE void linear4_mid(const Linear4 &p) {
    // One array, with the table at its start: addresses in it are put together from bits.
    SHARED_LARGE(Words4, memory, TABLE + 2 * STAGE);
    u32 *pairs = reinterpret_cast<u32 *>(memory);
    Words4 *x = memory + TABLE;
    fill_pairs<T>(pairs, p.values);
    __syncthreads();
    // Nested scales are looked up where the launcher put their values, from the first-level cache.
    const Tables tables = {pairs, p.scales.codebook, p.scales.offset ? *p.scales.offset : 0.0f};
    const bool halves = p.scales.log2_blocksize == 5;
    const Part part = part_of(warp_of_block(), p.rows, p.tokens);
    float *partial = reinterpret_cast<float *>(x) + threadIdx.x;
#pragma unroll 1
    for (u64 m0 = u64(blockIdx.y) * p.tokens; m0 < p.m; m0 += u64(gridDim.y) * p.tokens) {
#pragma unroll 1
        for (u64 block = u64(blockIdx.x) * p.rows; block < p.n; block += u64(gridDim.x) * p.rows) {
            const u64 n0 = block + part.row;
            float sums[2][MID_TILES][4] = {};
            if (p.scales.absmax)
                halves ? sum_tokens<T, PLAIN, true>(sums, p, part, tables, x, n0, m0)
                       : sum_tokens<T, PLAIN, false>(sums, p, part, tables, x, n0, m0);
            else if (p.scales.codebook)
                halves ? sum_tokens<T, NESTED, true>(sums, p, part, tables, x, n0, m0)
                       : sum_tokens<T, NESTED, false>(sums, p, part, tables, x, n0, m0);
            else
                sum_tokens<T, EXPONENTS, true>(sums, p, part, tables, x, n0, m0);
            __syncthreads(); // nobody reads x any more
            // The first share gets what the others have, two tiles at a time.
#pragma unroll
            for (u32 first = 0; first < MID_TILES; first += 2) {
                if (part.shares == 1 || first * TOKENS >= p.tokens) break;
#pragma unroll
                for (u32 i = 0; i < 16; ++i)
                    if (part.share > 0) partial[i * LINEAR_THREADS] = sums[i / 8][first + i / 4 % 2][i % 4];
                __syncthreads();
                const float *other = partial;
#pragma unroll 1
                for (u32 share = 1; share < part.shares; ++share) {
                    other += LINEAR_THREADS / part.shares;
                    if (part.share > 0) break;
#pragma unroll
                    for (u32 i = 0; i < 16; ++i) sums[i / 8][first + i / 4 % 2][i % 4] += other[i * LINEAR_THREADS];
                }
                __syncthreads();
            }
            if (part.share == 0) store_tokens<T>(p, part, sums, n0, m0);
        }
    }
}

// Sums take most of the registers that a thread may have, so a multiprocessor holds one block.
#define LINEAR4_MID(name, T) KERNEL_LARGE(name, Linear4, LINEAR_THREADS, 16 * (TABLE + 2 * STAGE), linear4_mid<T>(p))

LINEAR4_MID(linear4_mid_f16, f16)
#ifdef HAS_BF16_TENSOR_CORES
LINEAR4_MID(linear4_mid_bf16, bf16)
#endif
