// y[m, n] = sum over k of x[m, k] * W[n, k] + bias[n] for more rows of x than linear4_small takes and
// fewer than a dense product needs to be worth decoding the weight.
//
// A warp has 32 rows of W and up to 64 tokens: what it reads of x it uses for two tensor-core products,
// what it decodes of W for eight. Eight warps are groups of rows times halves of the tokens times shares
// of k, as the launch says: 128 rows with 128 tokens, or with 64 and two shares of k, or, where that gives
// too few blocks, 64 rows with 32 tokens and four shares.
// A step is 32 of k. x passes through shared memory in two stages: one is copied to by the hardware
// while the other is multiplied. W is read as in linear4_small, two steps ahead into registers, and a
// step is decoded before the barrier at which the warp would wait.
#pragma once
#include "linear4_small.cuh"

static constexpr u32 MID_STEP = 32, MID_TILES = 8, MID_WARP_ROWS = 2 * ROWS;
static constexpr u32 PIECES = MID_STEP * 2 / 16;             // 16 bytes each, of a token's step
static constexpr u32 MID_TOKENS = 2 * MID_TILES * TOKENS;    // of a thread block
static constexpr u32 STAGE = MID_TOKENS * PIECES;            // of all shares of k together

// What a warp of the block has: tokens from `token` on, below `tokens`; rows from `row` on; a share of k.
struct Place {
    u32 token, tokens, row, share, shares;
};

DEVICE Place place_of(u32 warp, u32 rows, u32 tokens) {
    const u32 halves = tokens > MID_TOKENS / 2 ? 2 : 1, groups = rows / MID_WARP_ROWS;
    const u32 half = warp % halves, each = tokens / halves;
    return {half * each, (half + 1) * each, warp / halves % groups * MID_WARP_ROWS, warp / halves / groups,
            LINEAR_WARPS / halves / groups};
}

// Where the four rows of a lane are stored, one in each half of both tensor-core products: what is
// counted from the start of a row fits in 32 bits.
template <Form FORM> struct MidRows {
    const u8 *bytes[4];
    const float *absmax[4]; // or
    const u8 *codes[4];
    const float *nested[4];
    u32 within[4];        // steps of the first block that belong to the row before
    u32 within_nested[4]; // blocks before that one with the same nested scale

    METHOD MidRows(const Linear4 &p, u64 n0, u32 lane) {
        const u32 steps = u32(p.k / MID_STEP), log2_steps = p.scales.log2_blocksize - 5;
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
            u64 row = n0 + r * 8 + lane / 4;
            row = row < p.n ? row : p.n - 1; // what it gives is not stored
            const u64 before = row * steps, block = before >> log2_steps;
            bytes[r] = p.packed + before * (MID_STEP / 2) + lane % 4 * 4;
            within[r] = u32(before) & ((1u << log2_steps) - 1);
            if constexpr (FORM == PLAIN)
                absmax[r] = p.scales.absmax + block;
            else
                codes[r] = p.scales.codes + block;
            if constexpr (FORM == NESTED) {
                nested[r] = p.scales.nested_absmax + (block >> p.scales.log2_nested_blocksize);
                within_nested[r] = u32(block) & ((1u << p.scales.log2_nested_blocksize) - 1);
            }
        }
    }
};

// A step of these rows, as it is stored.
template <Form FORM> struct Stored {
    u32 words[4], scales[4];
    float nested[4];

    METHOD void load(const Linear4 &p, const MidRows<FORM> &rows, u32 step) {
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
            // Through the first-level cache: the other half of these sectors is the next step.
            words[r] = ::load<u32>(rows.bytes[r] + u64(step) * (MID_STEP / 2));
            const u32 block = (rows.within[r] + step) >> (p.scales.log2_blocksize - 5);
            scales[r] = FORM == PLAIN ? __float_as_uint(rows.absmax[r][block]) : rows.codes[r][block];
            if constexpr (FORM == NESTED)
                nested[r] = rows.nested[r][(rows.within_nested[r] + block) >> p.scales.log2_nested_blocksize];
        }
    }
};

// The same step decoded: operands of tensor cores for 16 of k each, and scales.
struct MidStep {
    u32 a[2][2][4];
    float scales[4];

    template <Form FORM> METHOD void take(const Linear4 &p, const u32 *pairs, const Stored<FORM> &from, float offset) {
#pragma unroll
        for (u32 i = 0; i < 16; ++i)
            a[i / 8][i / 4 % 2][i % 4] = values_of(pairs, from.words[i / 8 * 2 + i % 2], i / 4 % 2 * 2 + i % 4 / 2);
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
            if constexpr (FORM == PLAIN)
                scales[r] = __uint_as_float(from.scales[r]);
            else if constexpr (FORM == EXPONENTS)
                scales[r] = e8m0_decode(from.scales[r]);
            else // not one fused step: the definition rounds the product
                scales[r] = global<float>(p.scales.codebook)[from.scales[r]] * from.nested[r] + offset;
        }
    }
};

// Such a step times the warp's tokens, `tiles` of eight of them. `x` is the lane's piece of the first.
template <class T>
DEVICE void multiply_tokens(float sums[2][MID_TILES][4], const MidStep &step, const Words4 *x, u32 tiles) {
    Words4 next[2] = {load<Words4>(x), load<Words4>(x + TOKENS * PIECES)};
    // Two tiles at a time, since each product waits for the one before it.
#pragma unroll
    for (u32 first = 0; first < MID_TILES; first += 2) {
        if (first >= tiles) break;
        const Words4 b[2] = {next[0], next[1]};
#pragma unroll
        for (u32 i = 0; i < 2; ++i)
            if (first + 2 < MID_TILES) next[i] = load<Words4>(x + (first + 2 + i) * TOKENS * PIECES);
        float products[2][2][4] = {};
#pragma unroll
        for (u32 j = 0; j < 2; ++j)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) mma(T{}, products[i / 2][i % 2], step.a[i / 2][j], &b[i % 2].word[2 * j]);
#pragma unroll
        for (u32 i = 0; i < 16; ++i) {
            float &sum = sums[i / 8][first + i / 4 % 2][i % 4];
            sum = fmaf(products[i / 8][i / 4 % 2][i % 4], step.scales[i / 8 * 2 + i % 4 / 2], sum);
        }
    }
}

// The warp's share of 32 rows from n0 on times tokens from m0 on.
template <class T, Form FORM>
DEVICE void sum_tokens(float sums[2][MID_TILES][4], const Linear4 &p, const Place &place, const u32 *pairs, Words4 *x,
                       u64 n0, u64 m0) {
    const u32 lane = lane_of_warp(), steps = u32(p.k / MID_STEP), rounds = (steps + place.shares - 1) / place.shares;
    const MidRows<FORM> rows(p, n0, lane);
    const float offset = FORM == NESTED ? *p.scales.offset : 0.0f;
    const u32 tokens = p.m - m0 < p.tokens ? u32(p.m - m0) : p.tokens, last = tokens < place.tokens ? tokens : place.tokens;
    const u32 tiles = last > place.token ? (last - place.token + TOKENS - 1) / TOKENS : 0;
    // Copies: neighbouring threads take the pieces of a token. Tokens beyond the last are not copied;
    // what they give is not stored.
    const u32 pieces = PIECES * place.shares, piece = threadIdx.x % pieces, token = threadIdx.x / pieces;
    const u32 between = LINEAR_THREADS / pieces;
    Words4 *const to = x + piece / PIECES * (STAGE / place.shares) + token * PIECES + piece % PIECES;
    const T *const from = static_cast<const T *>(p.x) + (m0 + token) * p.k + piece * 8;
    const auto copy = [&](u32 round) {
        if (round * place.shares + piece / PIECES < steps)
#pragma unroll
            for (u32 i = 0; i < 2; ++i)
                if (token + i * between < tokens)
                    copy16(to + round % 2 * STAGE + i * between * PIECES,
                           from + i * between * p.k + u64(round) * place.shares * MID_STEP);
        copies_begun();
    };
    const Words4 *const pieces_of_lane = x + place.share * (STAGE / place.shares) + (place.token + lane / 4) * PIECES + lane % 4;
    Stored<FORM> next = {}, later = {};
    u32 at = place.share;
    if (at < steps) next.load(p, rows, at);
    if (at + place.shares < steps) later.load(p, rows, at + place.shares);
    copy(0);
    MidStep step;
    step.take(p, pairs, next, offset);
    // All warps go on together, whether there is a step left for them or not.
#pragma unroll 2
    for (u32 round = 0; round < rounds; ++round) {
        copies_done();
        __syncthreads(); // the copies of all threads are there, and the other stage is read no more
        if (round + 1 < rounds) copy(round + 1);
        next = later;
        if (at + 2 * place.shares < steps) later.load(p, rows, at + 2 * place.shares);
        if (at < steps) multiply_tokens<T>(sums, step, pieces_of_lane + round % 2 * STAGE, tiles);
        step.take(p, pairs, next, offset);
        at += place.shares;
    }
}

// Bias, rounding, and where the outputs belong.
template <class T>
DEVICE void store_tokens(const Linear4 &p, const Place &place, const float sums[2][MID_TILES][4], u64 n0, u64 m0) {
    const u32 lane = lane_of_warp();
    n0 += lane / 4;
    float bias[4] = {};
#pragma unroll
    for (u32 r = 0; r < 4; ++r)
        if (p.bias && n0 + r * 8 < p.n) bias[r] = load_as(p.bias, n0 + r * 8, p.bias_dtype);
#pragma unroll
    for (u32 i = 0; i < 2 * MID_TILES * 4; ++i) {
        const u32 tile = i / 4 % MID_TILES, r = i / 4 / MID_TILES * 2 + i % 4 / 2;
        const u32 token = place.token + tile * TOKENS + lane % 4 * 2 + i % 2;
        if (token >= place.tokens || m0 + token >= p.m || n0 + r * 8 >= p.n) continue;
        static_cast<T *>(p.y)[(m0 + token) * p.n + n0 + r * 8] = narrow<T>(sums[r / 2][tile][i % 4] + bias[r]);
    }
}

template <class T> DEVICE void linear4_mid(const Linear4 &p) {
    // One array, with the table at its start: addresses in it are put together from bits. Together it is
    // all that a kernel may have without asking, so scales are looked up elsewhere.
    SHARED(Words4, memory, 256 * WARP / 4 + 2 * STAGE);
    u32 *pairs = reinterpret_cast<u32 *>(memory);
    Words4 *x = memory + 256 * WARP / 4;
    fill_pairs<T>(pairs, p.values);
    __syncthreads();
    const Place place = place_of(warp_of_block(), p.rows, p.tokens);
    float *partial = reinterpret_cast<float *>(x) + threadIdx.x;
#pragma unroll 1
    for (u64 m0 = u64(blockIdx.y) * p.tokens; m0 < p.m; m0 += u64(gridDim.y) * p.tokens) {
#pragma unroll 1
        for (u64 block = u64(blockIdx.x) * p.rows; block < p.n; block += u64(gridDim.x) * p.rows) {
            const u64 n0 = block + place.row;
            float sums[2][MID_TILES][4] = {};
            if (p.scales.absmax)
                sum_tokens<T, PLAIN>(sums, p, place, pairs, x, n0, m0);
            else if (p.scales.codebook)
                sum_tokens<T, NESTED>(sums, p, place, pairs, x, n0, m0);
            else
                sum_tokens<T, EXPONENTS>(sums, p, place, pairs, x, n0, m0);
            __syncthreads(); // nobody reads x any more
            // The first share gets what the others have, two tiles at a time.
#pragma unroll
            for (u32 first = 0; first < MID_TILES; first += 2) {
                if (place.shares == 1 || first * TOKENS >= p.tokens) break;
#pragma unroll
                for (u32 i = 0; i < 16; ++i)
                    if (place.share > 0) partial[i * LINEAR_THREADS] = sums[i / 8][first + i / 4 % 2][i % 4];
                __syncthreads();
                const float *other = partial;
#pragma unroll 1
                for (u32 share = 1; share < place.shares; ++share) {
                    other += LINEAR_THREADS / place.shares;
                    if (place.share > 0) break;
#pragma unroll
                    for (u32 i = 0; i < 16; ++i) sums[i / 8][first + i / 4 % 2][i % 4] += other[i * LINEAR_THREADS];
                }
                __syncthreads();
            }
            if (place.share == 0) store_tokens<T>(p, place, sums, n0, m0);
        }
    }
}

// Sums take most of the registers that a thread may have, so a multiprocessor holds one block.
KERNEL(linear4_mid_f16, Linear4, LINEAR_THREADS, linear4_mid<f16>(p))
#ifdef HAS_BF16_TENSOR_CORES
KERNEL(linear4_mid_bf16, Linear4, LINEAR_THREADS, linear4_mid<bf16>(p))
#endif
