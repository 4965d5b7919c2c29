//! Integer products with AVX2: bytes to words to sums.

// Intrinsics carry their origin in their names.
#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::dot::Dot;
use crate::backend::cpu::avx2::Avx2;

/// Evaluates an expression of intrinsics.
macro_rules! isa {
    ($body:expr) => {{
        // SAFETY: `self` proves AVX2 and FMA; the caller of a method with a pointer guarantees
        // its memory.
        unsafe { $body }
    }};
}

impl Dot for Avx2 {
    type Ints = __m256i;
    const TILE: usize = 2;
    const HIGH: usize = 2;
    const BIAS: u8 = 0;

    #[inline(always)]
    unsafe fn ints(self, at: *const u8) -> __m256i {
        isa!(_mm256_loadu_si256(at.cast()))
    }
    #[inline(always)]
    unsafe fn store_ints(self, x: __m256i, at: *mut u8) {
        isa!(_mm256_storeu_si256(at.cast(), x));
    }
    #[inline(always)]
    unsafe fn broadcast(self, at: *const i8) -> __m256i {
        isa!(_mm256_set1_epi32(at.cast::<i32>().read_unaligned()))
    }
    #[inline(always)]
    unsafe fn spread<const BLOCKS: usize>(self, at: *const f32) -> __m256 {
        isa!(match BLOCKS {
            1 => _mm256_set1_ps(*at),
            2 => _mm256_set_m128(_mm_set1_ps(*at.add(1)), _mm_set1_ps(*at)),
            _ => {
                let [a, b, c, d] = *at.cast::<[f32; 4]>();
                _mm256_set_ps(d, d, c, c, b, b, a, a)
            }
        })
    }
    #[inline(always)]
    fn splat_int(self, x: i32) -> __m256i {
        isa!(_mm256_set1_epi32(x))
    }
    #[inline(always)]
    fn to_floats(self, x: __m256i) -> __m256 {
        isa!(_mm256_cvtepi32_ps(x))
    }
    #[inline(always)]
    fn sum_ints(self, x: __m256i) -> i32 {
        isa!({
            let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b1110>(x));
            _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<1>(x)))
        })
    }
    // A weight's magnitude is at most 128 and an activation's at most 127, so a pair's sum is at
    // most 2 * 128 * 127 = 32,512: it fits in a word, and nothing saturates.
    #[inline(always)]
    fn dot(self, sum: __m256i, weights: __m256i, x: __m256i) -> __m256i {
        isa!({
            let signed = _mm256_sign_epi8(x, weights);
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), signed);
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        })
    }
    #[inline(always)]
    fn biased(self, x: __m256i) -> __m256i {
        x
    }
    #[inline(always)]
    fn table(self, values: &[i8; 16]) -> __m256i {
        isa!(_mm256_broadcastsi128_si256(_mm_loadu_si128(values.as_ptr().cast())))
    }
    #[inline(always)]
    fn lookup(self, table: __m256i, packed: __m256i) -> [__m256i; 2] {
        isa!({
            let half = _mm256_set1_epi8(15);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), half);
            let low = _mm256_and_si256(packed, half);
            [_mm256_shuffle_epi8(table, high), _mm256_shuffle_epi8(table, low)]
        })
    }
    #[inline(always)]
    unsafe fn columns(self, rows: *const u8, stride: usize) -> [__m256i; 4] {
        isa!({
            let mut r = [_mm256_setzero_si256(); 4];
            for (j, r) in r.iter_mut().enumerate() {
                let row = |i: usize| _mm_loadu_si128(rows.add((4 * i + j) * stride).cast());
                *r = _mm256_set_m128i(row(1), row(0));
            }
            let (ab, cd) = (_mm256_unpacklo_epi32(r[0], r[1]), _mm256_unpacklo_epi32(r[2], r[3]));
            let (ef, gh) = (_mm256_unpackhi_epi32(r[0], r[1]), _mm256_unpackhi_epi32(r[2], r[3]));
            [
                _mm256_unpacklo_epi64(ab, cd),
                _mm256_unpackhi_epi64(ab, cd),
                _mm256_unpacklo_epi64(ef, gh),
                _mm256_unpackhi_epi64(ef, gh),
            ]
        })
    }
    #[inline(always)]
    fn exchange(self, r: &mut [__m256i; 16]) {
        isa!({
            let mut t = *r;
            // Within each 128-bit half: four rows by four dwords.
            for i in 0..2 {
                let [a, b, c, d] = [r[4 * i], r[4 * i + 1], r[4 * i + 2], r[4 * i + 3]];
                let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
                t[4 * i] = _mm256_unpacklo_epi64(ab, cd);
                t[4 * i + 1] = _mm256_unpackhi_epi64(ab, cd);
                let (ab, cd) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
                t[4 * i + 2] = _mm256_unpacklo_epi64(ab, cd);
                t[4 * i + 3] = _mm256_unpackhi_epi64(ab, cd);
            }
            for j in 0..4 {
                r[j] = _mm256_permute2x128_si256::<0x20>(t[j], t[4 + j]);
                r[4 + j] = _mm256_permute2x128_si256::<0x31>(t[j], t[4 + j]);
            }
        });
    }
}
