// LLM.int8(): rows of signed bytes, code = x * (127 / absmax) rounded to nearest, ties to even, and
// columns of outliers that are left out. src/quant/rowwise.rs is the definition.
//
// A thread block has a row, which it reads twice: once for the largest magnitude, once for the
// codes, then from a cache. Flags of columns are stores of the same byte by whoever finds it due.
#pragma once
#include "quantize4.cuh"

static constexpr float QMAX = 127.0f, INVERSE_QMAX = 1.0f / QMAX;
static constexpr u32 INT8_THREADS = 256, FLAG_ROWS = 64, LIST_THREADS = 1024;

template <class T> DEVICE void int8_flags(const Int8Flags &p) {
    const T *x = static_cast<const T *>(p.x);
#pragma unroll 1
    for (u64 row0 = u64(blockIdx.y) * FLAG_ROWS; row0 < p.rows; row0 += u64(gridDim.y) * FLAG_ROWS) {
        const u64 end = row0 + FLAG_ROWS < p.rows ? row0 + FLAG_ROWS : p.rows;
#pragma unroll 1
        for (u64 column = u64(blockIdx.x) * blockDim.x + threadIdx.x; column < p.columns;
             column += u64(gridDim.x) * blockDim.x) {
            bool outlier = false;
            for (u64 row = row0; row < end; ++row) outlier |= fabsf(widen(x[row * p.columns + column])) >= p.threshold;
            if (outlier) p.flags[column] = 1;
        }
    }
}

DEVICE void list_outliers(const Int8Outliers &p) {
    SHARED(u32, found, LIST_THREADS / WARP);
    const u32 lane = lane_of_warp(), warp = warp_of_block();
    u32 before = 0;
#pragma unroll 1
    for (u64 start = 0; start < p.columns; start += LIST_THREADS) {
        const u64 column = start + threadIdx.x;
        const bool flagged = column < p.columns && p.flags[column];
        const u32 flags = __ballot_sync(FULL, flagged);
        if (lane == 0) found[warp] = __popc(flags);
        __syncthreads();
        u32 place = before + __popc(flags & ((1u << lane) - 1));
        for (u32 w = 0; w < LIST_THREADS / WARP; ++w) {
            if (w < warp) place += found[w];
            before += found[w];
        }
        if (flagged) p.outliers.columns[place] = u32(column);
        __syncthreads();
    }
    if (threadIdx.x == 0) *p.outliers.count = before;
}

// The code of an element of a row with this scale and factor = 127 / scale.
DEVICE i8 code_of_row(float value, float absmax, float factor) {
    return i8(i32(rintf(magnitude(factor) < INFINITE ? value * factor : value / absmax * QMAX)));
}

// Elements that count for a row's scale: 0 for a flagged column, unless what is there makes the row
// meaningless.
template <class T> DEVICE float inlier(const Int8Rows &p, const T *row, u64 first, u64 column) {
    const float x = widen(row[column]);
    if (magnitude(x) < INFINITE) return p.flags && p.flags[column] ? 0.0f : x;
    if (p.nonfinite.first) atomicMin(p.nonfinite.first, first + column);
    return p.nonfinite.zero ? 0.0f : x;
}

template <class T> DEVICE void int8_rows(const Int8Rows &p) {
    SHARED(u32, largest_of_warp, INT8_THREADS / WARP);
#pragma unroll 1
    for (u64 row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const u64 first = row * p.columns;
        const T *x = static_cast<const T *>(p.x) + first;
        u32 largest = 0;
#pragma unroll 2
        for (u64 column = threadIdx.x; column < p.columns; column += INT8_THREADS)
            largest = larger(largest, magnitude(inlier(p, x, first, column)));
        largest = largest_of(largest, WARP);
        if (lane_of_warp() == 0) largest_of_warp[warp_of_block()] = largest;
        __syncthreads();
        for (u32 w = 0; w < INT8_THREADS / WARP; ++w) largest = larger(largest, largest_of_warp[w]);
        // The scale of a row that is not finite is NaN, and so are its products.
        const bool finite = largest < INFINITE;
        const float absmax = __uint_as_float(finite ? largest : 0x7fc00000u);
        const float factor = absmax == 0.0f ? 0.0f : QMAX / absmax;
#pragma unroll 2
        for (u64 column = threadIdx.x; column < p.columns; column += INT8_THREADS) {
            p.codes[first + column] = finite ? code_of_row(inlier(p, x, first, column), absmax, factor) : i8(0);
        }
        if (threadIdx.x == 0) p.absmax[row] = absmax;
        __syncthreads();
    }
}

template <class T> DEVICE void int8_dequantize(const Int8Dequantize &p) {
    T *out = static_cast<T *>(p.out);
    const u64 n = p.rows * p.columns;
#pragma unroll 1
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += u64(gridDim.x) * blockDim.x)
        out[i] = narrow<T>(float(p.codes[i]) * p.absmax[i / p.columns] * INVERSE_QMAX);
}

KERNELS(int8_flags, Int8Flags, INT8_THREADS, int8_flags)
KERNEL(int8_outliers, Int8Outliers, LIST_THREADS, list_outliers(p))
KERNELS(int8_rows, Int8Rows, INT8_THREADS, int8_rows)
KERNELS(int8_dequantize, Int8Dequantize, INT8_THREADS, int8_dequantize)
