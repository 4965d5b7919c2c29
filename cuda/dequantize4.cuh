// out[i] = values[code of element first + i] * scale of its block, in f32, rounded once.
//
// A thread takes as many neighbouring codes as fill one store of 16 bytes, four times, so that four
// loads are under way before the first is needed. Neighbouring threads take neighbouring codes: a
// warp stores 512 bytes in a row. Sixteen floats lie in sixteen banks, so lookups never collide.
#pragma once
#include "scales.cuh"

static constexpr u32 DEQUANTIZE_THREADS = 256, DEQUANTIZE_BATCH = 4;

// The value of the code `shift` bits up in a word.
DEVICE float value_at(const float *values, u32 word, u32 shift) { return values[word >> shift & 15u]; }

// As many codes from the low end of a word as fill 16 bytes.
template <class T> DEVICE void decode_store(void *out, const float *values, u32 word, float scale) {
    Words4 result;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            result.word[i] = __float_as_uint(value_at(values, word, 4 * (i ^ 1)) * scale);
        } else {
            result.word[i] =
                pair<T>(value_at(values, word, 8 * i + 4) * scale, value_at(values, word, 8 * i) * scale);
        }
    }
    store(out, result);
}

template <class T> DEVICE void dequantize4(const Dequantize4 &p) {
    constexpr u32 EACH = 16 / sizeof(T);
    SHARED(float, values, 16);
    if (threadIdx.x < 16) values[threadIdx.x] = p.values[threadIdx.x];
    __syncthreads();
    T *out = static_cast<T *>(p.out);
    const u8 *packed = p.packed + p.first / 2;
    const u64 span = u64(DEQUANTIZE_THREADS) * EACH, piece = span * DEQUANTIZE_BATCH;
#pragma unroll 1
    for (u64 start = blockIdx.x * piece; start < p.n; start += gridDim.x * piece) {
        u32 words[DEQUANTIZE_BATCH];
        float scales[DEQUANTIZE_BATCH];
#pragma unroll
        for (u32 j = 0; j < DEQUANTIZE_BATCH; ++j) {
            const u64 i = start + j * span + threadIdx.x * EACH;
            words[j] = 0;
            scales[j] = 0.0f;
            if (i >= p.n) continue;
            scales[j] = scale_of(p.scales, (p.first + i) >> p.scales.log2_blocksize);
            if (i + EACH <= p.n) {
                words[j] = EACH == 8 ? load<u32>(packed + i / 2) : load<u16>(packed + i / 2);
            } else {
#pragma unroll 1
                for (u32 byte = 0; i + 2 * byte < p.n; ++byte) words[j] |= u32(packed[i / 2 + byte]) << 8 * byte;
            }
        }
#pragma unroll
        for (u32 j = 0; j < DEQUANTIZE_BATCH; ++j) {
            const u64 i = start + j * span + threadIdx.x * EACH;
            if (i + EACH <= p.n) {
                decode_store<T>(out + i, values, words[j], scales[j]);
            } else {
#pragma unroll 1
                for (u32 at = 0; i + at < p.n; ++at)
                    out[i + at] = narrow<T>(value_at(values, words[j], 4 * (at ^ 1)) * scales[j]);
            }
        }
    }
}

KERNELS(dequantize4, Dequantize4, DEQUANTIZE_THREADS, dequantize4)
