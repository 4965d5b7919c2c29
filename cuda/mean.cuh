// The mean of a float vector with the bits that torch.mean gives on a CPU: src/quant/torch_sum.rs
// is the definition. 32 columns lie side by side, rows below each other; a column is summed by
// levels: `step` rows to a sum, `step` of these to the next, four levels in all.
//
// A lane is a column. Sums of `step` rows and of `step` such sums depend on nothing else, so each
// warp makes one of the latter at a time; the first warp takes them up in order.
#pragma once
#include "device.cuh"

static constexpr u32 MEAN_THREADS = 1024, COLUMNS = 32, VECTOR = 8;

// The sum of `rows` rows of a column, level by level from zero.
DEVICE float two_levels(const float *column, u64 rows, u64 step, float &rest) {
    float upper = 0.0f;
    u64 row = 0;
#pragma unroll 1
    for (; row + step <= rows; row += step) {
        float lower = 0.0f;
#pragma unroll 8
        for (u64 i = 0; i < step; ++i) lower += column[(row + i) * COLUMNS];
        upper += lower;
    }
    rest = 0.0f;
#pragma unroll 1
    for (; row < rows; ++row) rest += column[row * COLUMNS];
    return upper;
}

DEVICE u32 ceil_log2(u64 n) {
    u32 log = 1;
    while ((u64(1) << log) < n) ++log;
    return log;
}

// Fewer values than a vector: four at a time, what remains goes to the first of the four.
DEVICE float sum_of_few(const float *x, u64 n) {
    const u64 whole = n / 4 * 4;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (u64 i = 0; i < whole; i += 4)
        for (u32 j = 0; j < 4; ++j) sums[j] += x[i + j];
#pragma unroll 1
    for (u64 i = whole; i < n; ++i) sums[0] += x[i];
    return sums[0] + sums[1] + sums[2] + sums[3];
}

DEVICE float sum_of_columns(float *columns, const float *rest, u64 n) {
    const u64 vectors = n / VECTOR * VECTOR;
#pragma unroll 1
    for (u64 i = 0; i < vectors; ++i) columns[i % VECTOR] += rest[i];
#pragma unroll 1
    for (u32 i = VECTOR; i < COLUMNS; ++i) columns[i % VECTOR] += columns[i];
    float total = 0.0f;
#pragma unroll 1
    for (u64 i = vectors; i < n; ++i) total += rest[i];
    for (u32 i = 0; i < VECTOR; ++i) total += columns[i];
    return total;
}

DEVICE void mean(const Mean &p) {
    SHARED(float, sums, MEAN_THREADS);
    const u32 lane = lane_of_warp(), warp = warp_of_block(), warps = MEAN_THREADS / WARP;
    const float *column = p.x + lane;
    const u64 rows = p.n / COLUMNS;
    const u32 power = ceil_log2(rows) / 4 > 4 ? ceil_log2(rows) / 4 : 4;
    const u64 step = u64(1) << power, square = step * step, whole = rows / square;
    float third = 0.0f, fourth = 0.0f, none;
#pragma unroll 1
    for (u64 start = 0; start < whole; start += warps) {
        const u64 mine = start + warp;
        if (mine < whole) sums[threadIdx.x] = two_levels(column + mine * square * COLUMNS, square, step, none);
        __syncthreads();
        if (warp == 0) {
#pragma unroll 1
            for (u64 i = start; i < whole && i < start + warps; ++i) {
                third += sums[(i - start) * WARP + lane];
                if ((i + 1) % step == 0) {
                    fourth += third;
                    third = 0.0f;
                }
            }
        }
        __syncthreads();
    }
    if (warp == 0) {
        float first;
        const float second = two_levels(column + whole * square * COLUMNS, rows - whole * square, step, first);
        sums[lane] = first + second + third + fourth;
        __syncwarp();
        if (lane == 0) {
            const float sum = p.n < VECTOR ? sum_of_few(p.x, p.n)
                                           : sum_of_columns(sums, p.x + rows * COLUMNS, p.n - rows * COLUMNS);
            p.out[0] = sum / float(p.n);
        }
    }
}

KERNEL(mean_f32, Mean, MEAN_THREADS, mean(p))
