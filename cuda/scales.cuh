// The scale of a block, in each form in which scales are stored, and the largest magnitude of one.
#pragma once
#include "device.cuh"

// 2^(code - 127); code 255 is NaN.
DEVICE float e8m0_decode(u32 code) {
    if (code == 0) return __uint_as_float(0x00400000u);
    return __uint_as_float(code == 255 ? 0x7fc00000u : code << 23);
}

// The exponent byte of the power of two that brings `absmax` into the range of E2M1:
// floor(log2(absmax)) - 2, at least 0.
DEVICE u32 e8m0_of(float absmax) {
    const i32 exponent = i32(__float_as_uint(absmax) >> 23) - 2;
    return exponent < 0 ? 0 : u32(exponent);
}

// Every lane of a launch takes the same way here: the forms differ between tensors only.
DEVICE float scale_of(const Scales &scales, u64 block) {
    if (scales.absmax) return scales.absmax[block];
    const u32 code = scales.codes[block];
    if (!scales.codebook) return e8m0_decode(code);
    // Not one fused step: the definition rounds the product.
    return scales.codebook[code] * scales.nested_absmax[block >> scales.log2_nested_blocksize] + *scales.offset;
}

// Magnitudes order like their bits, and NaN is above infinity.
DEVICE u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
static constexpr u32 INFINITE = 0x7f800000u;

DEVICE u32 larger(u32 a, u32 b) { return a > b ? a : b; }

// The largest of `lanes` neighbouring lanes, a power of two of them.
DEVICE u32 largest_of(u32 x, u32 lanes) {
    for (u32 bits = 1; bits < lanes; bits *= 2) x = larger(x, __shfl_xor_sync(FULL, x, bits));
    return x;
}

// Brings values into a codebook's range: multiplication by the reciprocal where that is finite,
// else a division; a scale of zero makes everything zero.
struct Divisor {
    float scale, reciprocal;
};

DEVICE Divisor divisor_of(float scale) {
    Divisor by;
    by.scale = scale;
    by.reciprocal = 1.0f / scale;
    return by;
}

// Apart, since a division is long and hardly ever needed.
OUTLINED float divide_small(float x, float scale) { return scale == 0.0f ? 0.0f : x / scale; }

// One decision for all: they belong to one block.
template <u32 COUNT> DEVICE void divide(float x[COUNT], Divisor by) {
    if (magnitude(by.reciprocal) < INFINITE) {
#pragma unroll
        for (u32 j = 0; j < COUNT; ++j) x[j] *= by.reciprocal;
    } else {
#pragma unroll
        for (u32 j = 0; j < COUNT; ++j) x[j] = divide_small(x[j], by.scale);
    }
}
