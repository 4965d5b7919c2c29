//! Integer products with AVX-512: VNNI's products of bytes, or two steps through words.

// Intrinsics carry their origin in their names.
#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::dot::Dot;
use super::quads::Quads;
use crate::backend::cpu::avx512::{Avx512, Avx512Ext};

/// Evaluates an expression of intrinsics.
macro_rules! isa {
    ($body:expr) => {{
        // SAFETY: `self` proves AVX-512 F, BW, DQ and VL (and VNNI where it is an `Avx512Ext`);
        // the caller of a method with a pointer guarantees its memory.
        unsafe { $body }
    }};
}

macro_rules! dot {
    ($name:ty, $bias:literal, $dot:item) => {
        impl Dot for $name {
            type Ints = __m512i;
            const TILE: usize = 6;
            const HIGH: usize = 8;
            const BIAS: u8 = $bias;

            #[inline(always)]
            unsafe fn ints(self, at: *const u8) -> __m512i {
                isa!(_mm512_loadu_si512(at.cast()))
            }
            #[inline(always)]
            unsafe fn store_ints(self, x: __m512i, at: *mut u8) {
                isa!(_mm512_storeu_si512(at.cast(), x));
            }
            #[inline(always)]
            unsafe fn broadcast(self, at: *const i8) -> __m512i {
                isa!(_mm512_set1_epi32(at.cast::<i32>().read_unaligned()))
            }
            #[inline(always)]
            unsafe fn spread<const BLOCKS: usize>(self, at: *const f32) -> __m512 {
                isa!(match BLOCKS {
                    1 => _mm512_set1_ps(*at),
                    2 => {
                        let both = _mm512_castsi512_ps(_mm512_castsi128_si512(_mm_loadu_si64(at.cast())));
                        let order = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
                        _mm512_permutexvar_ps(order, both)
                    }
                    _ => {
                        let four = _mm512_castps128_ps512(_mm_loadu_ps(at));
                        let order = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
                        _mm512_permutexvar_ps(order, four)
                    }
                })
            }
            #[inline(always)]
            fn splat_int(self, x: i32) -> __m512i {
                isa!(_mm512_set1_epi32(x))
            }
            #[inline(always)]
            fn to_floats(self, x: __m512i) -> __m512 {
                isa!(_mm512_cvtepi32_ps(x))
            }
            #[inline(always)]
            fn sum_ints(self, x: __m512i) -> i32 {
                isa!(_mm512_reduce_add_epi32(x))
            }
            #[inline(always)]
            $dot
            #[inline(always)]
            fn biased(self, x: __m512i) -> __m512i {
                isa!(_mm512_xor_si512(x, _mm512_set1_epi8(Self::BIAS as i8)))
            }
            #[inline(always)]
            fn table(self, values: &[i8; 16]) -> __m512i {
                let lane = isa!(_mm512_broadcast_i32x4(_mm_loadu_si128(values.as_ptr().cast())));
                self.biased(lane)
            }
            #[inline(always)]
            fn lookup(self, table: __m512i, packed: __m512i) -> [__m512i; 2] {
                isa!({
                    let half = _mm512_set1_epi8(15);
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(packed), half);
                    let low = _mm512_and_si512(packed, half);
                    [_mm512_shuffle_epi8(table, high), _mm512_shuffle_epi8(table, low)]
                })
            }
            #[inline(always)]
            unsafe fn columns(self, rows: *const u8, stride: usize) -> [__m512i; 4] {
                // SAFETY: `self` proves AVX-512 F; the caller vouches for the rows.
                unsafe { columns(rows, stride) }
            }
            #[inline(always)]
            fn exchange(self, rows: &mut [__m512i; 16]) {
                // SAFETY: `self` proves AVX-512 F.
                unsafe { transpose(rows) }
            }
        }
    };
}

impl Quads for Avx512Ext {
    #[inline(always)]
    unsafe fn quad(self, at: *const u8) -> __m512i {
        isa!(_mm512_broadcast_i32x4(_mm_loadu_si128(at.cast())))
    }
    #[inline(always)]
    fn sum_quads(self, [a, b, c, d]: [__m512i; 4]) -> __m512i {
        isa!({
            let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
        })
    }
}

dot!(
    Avx512Ext,
    128,
    fn dot(self, sum: __m512i, weights: __m512i, x: __m512i) -> __m512i {
        isa!(_mm512_dpbusd_epi32(sum, weights, x))
    }
);

// A weight's magnitude is at most 128 and an activation's at most 127, so a pair's sum is at most
// 2 * 128 * 127 = 32,512: it fits in a word, and nothing saturates.
dot!(
    Avx512,
    0,
    fn dot(self, sum: __m512i, weights: __m512i, x: __m512i) -> __m512i {
        isa!({
            let negative = _mm512_movepi8_mask(weights);
            let signed = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
            let pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(weights), signed);
            _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        })
    }
);

/// See [`Dot::columns`].
///
/// # Safety
/// - The machine has AVX-512 F and DQ.
/// - Sixteen bytes can be read from each of sixteen rows.
#[inline(always)]
unsafe fn columns(rows: *const u8, stride: usize) -> [__m512i; 4] {
    // SAFETY: the caller's guarantees.
    unsafe {
        let mut r = [_mm512_setzero_si512(); 4];
        // Every fourth row: from these, addresses take one addition.
        let four = stride << 2;
        let (b, c) = (rows.add(four), rows.add(2 * four));
        let fourth = [rows, b, c, c.add(four)];
        let behind = [0, stride, 2 * stride, stride + 2 * stride];
        for (r, behind) in r.iter_mut().zip(behind) {
            // Quarter i of vector j is of row 4 i + j: below, dwords end up in the order of rows.
            let row = |i: usize| _mm_loadu_si128(fourth[i].add(behind).cast());
            *r = _mm512_castsi128_si512(row(0));
            *r = _mm512_mask_broadcast_i32x4(*r, 0x00f0, row(1));
            *r = _mm512_mask_broadcast_i32x4(*r, 0x0f00, row(2));
            *r = _mm512_mask_broadcast_i32x4(*r, 0xf000, row(3));
        }
        let (ab, cd) = (_mm512_unpacklo_epi32(r[0], r[1]), _mm512_unpacklo_epi32(r[2], r[3]));
        let (ef, gh) = (_mm512_unpackhi_epi32(r[0], r[1]), _mm512_unpackhi_epi32(r[2], r[3]));
        [
            _mm512_unpacklo_epi64(ab, cd),
            _mm512_unpackhi_epi64(ab, cd),
            _mm512_unpacklo_epi64(ef, gh),
            _mm512_unpackhi_epi64(ef, gh),
        ]
    }
}

/// # Safety
/// - The machine has AVX-512 F.
#[inline(always)]
unsafe fn transpose(r: &mut [__m512i; 16]) {
    // SAFETY: the caller's guarantee; registers only.
    unsafe {
        let mut t = *r;
        // Within each 128-bit part: four rows by four dwords.
        for i in 0..4 {
            let [a, b, c, d] = [r[4 * i], r[4 * i + 1], r[4 * i + 2], r[4 * i + 3]];
            let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            t[4 * i] = _mm512_unpacklo_epi64(ab, cd);
            t[4 * i + 1] = _mm512_unpackhi_epi64(ab, cd);
            let (ab, cd) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            t[4 * i + 2] = _mm512_unpacklo_epi64(ab, cd);
            t[4 * i + 3] = _mm512_unpackhi_epi64(ab, cd);
        }
        // Then the parts: t[4 i + j] holds rows 4 i to 4 i + 3 of dwords j, 4 + j, 8 + j, 12 + j.
        for j in 0..4 {
            let [a, b, c, d] = [t[j], t[4 + j], t[8 + j], t[12 + j]];
            let ab = _mm512_shuffle_i32x4::<0x44>(a, b);
            let cd = _mm512_shuffle_i32x4::<0x44>(c, d);
            r[j] = _mm512_shuffle_i32x4::<0x88>(ab, cd);
            r[4 + j] = _mm512_shuffle_i32x4::<0xdd>(ab, cd);
            let ab = _mm512_shuffle_i32x4::<0xee>(a, b);
            let cd = _mm512_shuffle_i32x4::<0xee>(c, d);
            r[8 + j] = _mm512_shuffle_i32x4::<0x88>(ab, cd);
            r[12 + j] = _mm512_shuffle_i32x4::<0xdd>(ab, cd);
        }
    }
}
