// y[m, n] = sum over k of x[m, k] * W[n, k] + bias[n] for more rows of x than linear4_small takes and
// fewer than a dense product needs to be worth decoding the weight.
//
// A thread block has 64 rows of W and up to 64 tokens: fewer where there would be too few blocks. Warps 0 to 3 have 16 rows each and every other step of
// 64 k, warps 4 to 7 the same rows and the steps between. What a step needs of x is copied to shared
// memory by the four warps that need it, from registers that were filled a step before; W is read as in
// linear4_small, decoded once for all tokens, and also loaded a step ahead.
#pragma once
#include "linear4_small.cuh"

static constexpr u32 MID_ROWS = 64, MID_TILES = 8, MID_TOKENS = MID_TILES * TOKENS;
static constexpr u32 MID_SHARE = 4 * WARP;    // threads that have the same steps
static constexpr u32 PIECES = STEP * 2 / 16;  // 16 bytes each, of a token's step
static constexpr u32 COPIED = MID_TOKENS * PIECES / MID_SHARE; // by a thread

// Where a piece of a token lies. Odd tokens have theirs in another order, so that the eight lanes that
// shared memory serves at a time, of two tokens, ask different banks.
template <bool HALVES> DEVICE u32 place_of(u32 token, u32 piece) {
    return token * PIECES + (piece ^ (token % 2) * (HALVES ? 4 : 1));
}

// A step of 16 rows, decoded: operands of tensor cores, and scales by row and half.
template <bool HALVES> struct Decoded {
    u32 a[2][2][4];
    float scales[2][HALVES ? 2 : 1];

    template <Form FORM> METHOD void take(const Group<FORM, HALVES, 1> &group, const Tables &tables) {
#pragma unroll
        for (u32 i = 0; i < 16; ++i)
            a[i / 8][i / 4 % 2][i % 4] =
                values_of(tables.pairs, group.words[i % 2][0][i / 8], i / 4 % 2 * 2 + i % 4 / 2);
#pragma unroll
        for (u32 r = 0; r < 2; ++r)
#pragma unroll
            for (u32 h = 0; h < (HALVES ? 2 : 1); ++h)
                scales[r][h] = FORM == EXPONENTS ? e8m0_decode(group.stored[r][h]) : group.scale(tables, r, h);
    }
};

// Such a step times all tokens.
template <class T, bool HALVES>
DEVICE void multiply_tokens(float sums[MID_TILES][4], const Decoded<HALVES> &step, const Words4 *const x[2], u32 tokens) {
    // Two tiles at a time, since each product waits for the one before it.
#pragma unroll
    for (u32 first = 0; first < MID_TILES; first += 2) {
        if (first * TOKENS >= tokens) break;
        float products[2][4] = {};
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            Words4 b[2];
#pragma unroll
            for (u32 i = 0; i < 2; ++i) b[i] = load<Words4>(x[h] + (first + i) * TOKENS * PIECES);
#pragma unroll
            for (u32 j = 0; j < 2; ++j)
#pragma unroll
                for (u32 i = 0; i < 2; ++i) mma(T{}, products[i], step.a[h][j], &b[i].word[2 * j]);
            if (!HALVES && h == 0) continue;
#pragma unroll
            for (u32 i = 0; i < 2; ++i)
#pragma unroll
                for (u32 c = 0; c < 4; ++c) {
                    sums[first + i][c] = fmaf(products[i][c], step.scales[c / 2][HALVES ? h : 0], sums[first + i][c]);
                    products[i][c] = 0.0f;
                }
        }
    }
}

// The warp's share of 16 rows from n0 on times tokens from m0 on. `x` has room for those of a step.
template <class T, Form FORM, bool HALVES>
DEVICE void sum_tokens(float sums[MID_TILES][4], const Linear4 &p, const u32 *pairs, Words4 *x, u64 n0, u64 m0) {
    const u32 steps = u32(p.k / STEP), thread = threadIdx.x % MID_SHARE;
    const Rows rows = rows_of<FORM, HALVES>(p, n0, lane_of_warp(), steps);
    // Tokens beyond the last are not copied; what they give is not stored.
    const u32 tokens = opaque(p.m - m0 < p.tokens ? u32(p.m - m0) : p.tokens);
    const u32 token = thread / PIECES, piece = thread % PIECES;
    u32 at = threadIdx.x / MID_SHARE;
    const T *from = global<T>(p.x) + (m0 + token) * p.k + piece * 8 + at * STEP;
    const u64 between = MID_SHARE / PIECES * p.k;
    Words4 *to = x + place_of<HALVES>(token, piece);
    // A lane's two pieces of its token of the first tile; those of other tiles lie as far apart.
    const u32 lane = lane_of_warp();
    const Words4 *pieces[2];
#pragma unroll
    for (u32 h = 0; h < 2; ++h)
        pieces[h] = x + place_of<HALVES>(lane / 4, HALVES ? lane % 4 + 4 * h : lane % 4 * 2 + h);
    Group<FORM, HALVES, 1> group = {};
    Words4 ahead[COPIED] = {};
    // Nested scales of blocks of 32 leave no registers for x; its steps are waited for.
    constexpr bool X_AHEAD = FORM != NESTED || !HALVES;
    const auto fetch_x = [&] {
        const T *next = from;
#pragma unroll
        for (u32 i = 0; i < COPIED; ++i) {
            if (token + i * (MID_SHARE / PIECES) < tokens) ahead[i] = load<Words4>(next);
            next += between;
        }
        from += 2 * STEP;
    };
    const auto fetch = [&] {
        if (at >= steps) return;
        if (X_AHEAD) fetch_x();
        group.load(p, rows, at);
    };
    fetch();
    // All warps go on together, whether there is a step left for them or not.
#pragma unroll 1
    for (u32 first = 0; first < steps; first += 2) {
        const bool mine = at < steps;
        // Read in each step, from the first-level cache: a register less.
        const Tables tables = {pairs, p.scales.codebook, FORM == NESTED ? *global<float>(p.scales.offset) : 0.0f};
        if (!X_AHEAD && mine) fetch_x();
        __syncthreads(); // all have multiplied the step before
#pragma unroll
        for (u32 i = 0; i < COPIED; ++i)
            store(to + i * MID_SHARE, ahead[i]);
        __syncthreads();
        Decoded<HALVES> step;
        step.take(group, tables);
        at += 2;
        fetch();
        if (mine) multiply_tokens<T>(sums, step, pieces, tokens);
    }
}

template <class T> DEVICE void linear4_mid(const Linear4 &p) {
    // One array, with the table at its start: addresses in it are put together from bits. Together it is
    // all that a kernel may have without asking, so scales are looked up elsewhere.
    SHARED(Words4, memory, 256 * WARP / 4 + 2 * MID_TOKENS * PIECES);
    u32 *pairs = reinterpret_cast<u32 *>(memory);
    Words4 *x = memory + 256 * WARP / 4;
    fill_pairs<T>(pairs, p.values);
    const bool halves = p.scales.log2_blocksize == 5;
    const u32 lane = lane_of_warp(), share = threadIdx.x / MID_SHARE, thread = threadIdx.x % MID_SHARE;
    Words4 *mine = x + share * MID_TOKENS * PIECES;
    float *partial = reinterpret_cast<float *>(x);
#pragma unroll 1
    for (u64 m0 = u64(blockIdx.y) * p.tokens; m0 < p.m; m0 += u64(gridDim.y) * p.tokens) {
#pragma unroll 1
        for (u64 n0 = u64(blockIdx.x) * MID_ROWS; n0 < p.n; n0 += u64(gridDim.x) * MID_ROWS) {
            const u64 row = n0 + thread / WARP * ROWS;
            float sums[MID_TILES][4] = {};
            if (p.scales.absmax)
                halves ? sum_tokens<T, PLAIN, true>(sums, p, pairs, mine, row, m0)
                       : sum_tokens<T, PLAIN, false>(sums, p, pairs, mine, row, m0);
            else if (p.scales.codebook)
                halves ? sum_tokens<T, NESTED, true>(sums, p, pairs, mine, row, m0)
                       : sum_tokens<T, NESTED, false>(sums, p, pairs, mine, row, m0);
            else
                sum_tokens<T, EXPONENTS, true>(sums, p, pairs, mine, row, m0);
            // The second half of the warps hands over what it has.
            __syncthreads();
#pragma unroll
            for (u32 i = 0; i < 4 * MID_TILES; ++i)
                if (share == 1) partial[i * MID_SHARE + thread] = sums[i / 4][i % 4];
            __syncthreads();
#pragma unroll
            for (u32 i = 0; i < 4 * MID_TILES; ++i) {
                const u32 token = i / 4 * TOKENS + lane % 4 * 2 + i % 2;
                const u64 m = m0 + token, n = row + lane / 4 + i % 4 / 2 * 8;
                if (share == 1 || token >= p.tokens || m >= p.m || n >= p.n) continue;
                float sum = sums[i / 4][i % 4] + partial[i * MID_SHARE + thread];
                if (p.bias) sum += load_as(p.bias, n, p.bias_dtype);
                static_cast<T *>(p.y)[m * p.n + n] = narrow<T>(sum);
            }
        }
    }
}

KERNEL_BLOCKS(linear4_mid_f16, Linear4, LINEAR_THREADS, LINEAR_BLOCKS, linear4_mid<f16>(p))
#ifdef HAS_BF16_TENSOR_CORES
KERNEL_BLOCKS(linear4_mid_bf16, Linear4, LINEAR_THREADS, LINEAR_BLOCKS, linear4_mid<bf16>(p))
#endif
