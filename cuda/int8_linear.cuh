// y[m, n] = sums[m, n] * (x_absmax[m] * absmax[n]) / 127^2 + outliers + bias[n], where sums[m, n] is
// the sum over k of products of signed bytes, exact in 32 bits, and outliers are the columns whose
// activations were left out: x[m, k] * (weight[n, k] * absmax[n] / 127), in f32.
//
// int8_linear_small makes the sums: a warp has a row of the weight and eight tokens, a lane takes
// 16 bytes at a time where rows are whole such pieces. int8_finish takes sums from elsewhere.
#pragma once
#include "int8_rows.cuh"

static constexpr u32 INT8_TOKENS = 8;

// One output from its sum of integers and its sum over outliers of x * code.
template <class T> DEVICE void finish(const Int8Linear &p, u64 m, u64 n, i32 sum, float outlying) {
    float y = float(sum) * (p.x_absmax[m] * p.absmax[n]) * (INVERSE_QMAX * INVERSE_QMAX);
    y += outlying * (p.absmax[n] * INVERSE_QMAX);
    if (p.bias) y += load_as(p.bias, n, p.bias_dtype);
    static_cast<T *>(p.y)[m * p.n + n] = narrow<T>(y);
}

template <class T> DEVICE void int8_linear_small(const Int8Linear &p) {
    const u32 lane = lane_of_warp();
    const u64 warps = INT8_THREADS / WARP;
    const T *x = static_cast<const T *>(p.x);
    const u32 outliers = p.outliers.count ? *p.outliers.count : 0;
    const bool pieces = (p.k | reinterpret_cast<u64>(p.codes) | reinterpret_cast<u64>(p.weight)) % 16 == 0;
#pragma unroll 1
    for (u64 m0 = u64(blockIdx.y) * INT8_TOKENS; m0 < p.m; m0 += u64(gridDim.y) * INT8_TOKENS) {
        // Tokens beyond the last read the last one again.
        u64 tokens[INT8_TOKENS];
#pragma unroll
        for (u32 j = 0; j < INT8_TOKENS; ++j) tokens[j] = (m0 + j < p.m ? m0 + j : p.m - 1) * p.k;
#pragma unroll 1
        for (u64 n0 = blockIdx.x * warps; n0 < p.n; n0 += gridDim.x * warps) {
            // Rows beyond the last read the last one again, so that whole thread blocks go on.
            const bool there = n0 + warp_of_block() < p.n;
            const u64 n = there ? n0 + warp_of_block() : p.n - 1;
            const i8 *row = p.weight + n * p.k;
            i32 sums[INT8_TOKENS] = {};
            float outlying[INT8_TOKENS] = {};
            if (pieces) {
#pragma unroll 1
                for (u64 k = lane * 16; k < p.k; k += WARP * 16) {
                    const Words4 weight = load_once4(row + k);
#pragma unroll
                    for (u32 j = 0; j < INT8_TOKENS; ++j) {
                        if (j > 0 && m0 + j >= p.m) break;
                        const Words4 codes = load<Words4>(p.codes + tokens[j] + k);
#pragma unroll
                        for (u32 w = 0; w < 4; ++w) sums[j] = __dp4a(i32(weight.word[w]), i32(codes.word[w]), sums[j]);
                    }
                }
            } else {
#pragma unroll 1
                for (u64 k = lane; k < p.k; k += WARP)
#pragma unroll
                    for (u32 j = 0; j < INT8_TOKENS; ++j) sums[j] += i32(row[k]) * i32(p.codes[tokens[j] + k]);
            }
#pragma unroll 1
            for (u32 i = lane; i < outliers; i += WARP) {
                const u64 column = p.outliers.columns[i];
                const float code = float(row[column]);
#pragma unroll
                for (u32 j = 0; j < INT8_TOKENS; ++j) outlying[j] = fmaf(widen(x[tokens[j] + column]), code, outlying[j]);
            }
#pragma unroll
            for (u32 j = 0; j < INT8_TOKENS; ++j) {
                sums[j] = warp_sum(sums[j]);
                if (outliers) outlying[j] = warp_sum(outlying[j]);
            }
            // Lane j finishes token j.
            i32 sum = sums[0];
            float outlier = outlying[0];
#pragma unroll
            for (u32 j = 1; j < INT8_TOKENS; ++j) {
                if (lane == j) {
                    sum = sums[j];
                    outlier = outlying[j];
                }
            }
            if (there && lane < INT8_TOKENS && m0 + lane < p.m) finish<T>(p, m0 + lane, n, sum, outlier);
        }
    }
}

template <class T> DEVICE void int8_finish(const Int8Linear &p) {
    const T *x = static_cast<const T *>(p.x);
    const u32 outliers = p.outliers.count ? *p.outliers.count : 0;
    const u64 all = p.m * p.n;
#pragma unroll 1
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += u64(gridDim.x) * blockDim.x) {
        const u64 m = i / p.n, n = i % p.n;
        float outlying = 0.0f;
        for (u32 j = 0; j < outliers; ++j) {
            const u64 column = p.outliers.columns[j];
            outlying = fmaf(widen(x[m * p.k + column]), float(p.weight[n * p.k + column]), outlying);
        }
        finish<T>(p, m, n, p.sums[i], outlying);
    }
}

KERNELS(int8_linear_small, Int8Linear, INT8_THREADS, int8_linear_small)
KERNELS(int8_finish, Int8Linear, INT8_THREADS, int8_finish)
