// How far decoded values are from what they were quantized from: src/quant/stats.rs is the
// definition, and the sums have its bits.
//
// A thread block has a run of elements, as many as the CPU adds up at a time. Eight lanes have a
// block (or row) of it, of which each sums every eighth element in f64; what is left of a block goes
// to the first lane. The blocks' sums are added up in order, a thread for each of the four.
#pragma once
#include "scales.cuh"

static constexpr u32 COMPARE_THREADS = 256, COMPARE_LANES = 8, COMPARE_SUMS = 4;
static constexpr u32 COMPARE_BLOCKS = COMPARE_THREADS / COMPARE_LANES; // at a time

// What a lane has seen of a block: squares of the original and of the decoded values, products of
// the two, squared differences.
struct Seen {
    double sums[COMPARE_SUMS];
    float largest;

    METHOD void add(float x, float decoded) {
        const double wide = x, other = decoded, difference = wide - other;
        sums[0] += wide * wide;
        sums[1] += other * other;
        sums[2] += wide * other;
        sums[3] += difference * difference;
        const float distance = fabsf(x - decoded);
        largest = distance > largest ? distance : largest; // NaN is passed over
    }
};

// The sum over the eight lanes of a block, in their order, in every one of them.
DEVICE double sum_in_order(double mine) {
    const u32 first = lane_of_warp() / COMPARE_LANES * COMPARE_LANES;
    double sum = __shfl_sync(FULL, mine, first);
#pragma unroll
    for (u32 lane = 1; lane < COMPARE_LANES; ++lane) sum += __shfl_sync(FULL, mine, first + lane);
    return sum;
}

template <class T> DEVICE void compare(const Compare &p) {
    SHARED(double, sums, COMPARE_SUMS * COMPARE_BLOCKS);
    SHARED(u32, largest, COMPARE_BLOCKS);
    SHARED(float, scale_of_block, COMPARE_BLOCKS);
    SHARED(u32, outliers, COMPARE_BLOCKS);
    const u32 group = threadIdx.x / COMPARE_LANES, lane = threadIdx.x % COMPARE_LANES;
    const T *x = static_cast<const T *>(p.x);
    const u64 runs = (p.n + p.run - 1) / p.run;
#pragma unroll 1
    for (u64 run = blockIdx.x; run < runs; run += gridDim.x) {
        const u64 begin = run * p.run, end = begin + p.run < p.n ? begin + p.run : p.n;
        double total = 0.0; // of the sum that this thread adds up
        float distance = 0.0f, least = __uint_as_float(INFINITE), most = 0.0f;
        u64 found = 0;
#pragma unroll 1
        for (u64 base = begin; base < end; base += COMPARE_BLOCKS * p.block) {
            // The whole thread block goes on; a group beyond the end has no elements.
            const u64 start = base + group * p.block;
            const u64 stop = start + p.block < end ? start + p.block : end;
            const u64 count = start < end ? stop - start : 0;
            const u64 whole = count / COMPARE_LANES * COMPARE_LANES;
            Seen seen = {{0.0, 0.0, 0.0, 0.0}, 0.0f};
#pragma unroll 2
            for (u64 i = lane; i < whole; i += COMPARE_LANES) seen.add(widen(x[start + i]), p.decoded[start + i]);
            if (lane == 0)
                for (u64 i = whole; i < count; ++i) seen.add(widen(x[start + i]), p.decoded[start + i]);
            double square = 0.0;
#pragma unroll
            for (u32 i = 0; i < COMPARE_SUMS; ++i) {
                const double sum = sum_in_order(seen.sums[i]);
                if (i == 0) square = sum;
                if (lane == 0) sums[i * COMPARE_BLOCKS + group] = sum;
            }
            const float limit = p.outlier_factor * float(sqrt(square / double(count ? count : 1)));
            u32 above = 0;
#pragma unroll 2
            for (u64 i = lane; i < count; i += COMPARE_LANES) above += fabsf(widen(x[start + i])) > limit;
#pragma unroll
            for (u32 bits = 1; bits < COMPARE_LANES; bits *= 2) above += __shfl_xor_sync(FULL, above, bits);
            const u32 far = largest_of(__float_as_uint(seen.largest), COMPARE_LANES);
            if (lane == 0) {
                largest[group] = far;
                outliers[group] = above;
                const float scale = count ? scale_of(p.scales, (p.first + start) / p.block) : 0.0f;
                scale_of_block[group] = scale;
            }
            __syncthreads();
            const u64 left = (end - base + p.block - 1) / p.block;
            const u32 blocks = left < COMPARE_BLOCKS ? u32(left) : COMPARE_BLOCKS;
            if (threadIdx.x < COMPARE_SUMS)
                for (u32 i = 0; i < blocks; ++i) total += sums[threadIdx.x * COMPARE_BLOCKS + i];
            if (threadIdx.x == 0) {
                for (u32 i = 0; i < blocks; ++i) {
                    const float scale = scale_of_block[i], far = __uint_as_float(largest[i]);
                    distance = far > distance ? far : distance;
                    least = scale < least ? scale : least;
                    most = scale > most ? scale : most;
                    found += outliers[i];
                }
            }
            __syncthreads();
        }
        RunStats *out = p.out + run;
        if (threadIdx.x < COMPARE_SUMS) out->sums[threadIdx.x] = total;
        if (threadIdx.x == 0) {
            out->max_abs = distance;
            out->absmax_min = least;
            out->absmax_max = most;
            out->padding = 0;
            out->outliers = found;
        }
    }
}

KERNELS(compare, Compare, COMPARE_THREADS, compare)
