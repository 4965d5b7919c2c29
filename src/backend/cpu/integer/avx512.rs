//! Integer products with AVX-512: VNNI's products of bytes, or two steps through words.

// Intrinsics carry their origin in their names.
#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::dot::Dot;
use crate::backend::cpu::{
    Lanes,
    avx512::{Avx512, Avx512Ext},
};

/// Proof that the machine has AVX512-VNNI beside [`Avx512`].
#[derive(Clone, Copy, Debug)]
pub struct Vnni(Avx512);

impl Vnni {
    /// What a larger proof implies.
    pub const fn new(proof: Avx512Ext) -> Self {
        Self(proof.base())
    }
}

/// Evaluates an expression of intrinsics.
macro_rules! isa {
    ($body:expr) => {{
        // SAFETY: `self` proves AVX-512 F, BW, DQ and VL (and VNNI where it is a `Vnni`);
        // the caller of a method with a pointer guarantees its memory.
        unsafe { $body }
    }};
}

macro_rules! dot {
    ($name:ty, $bias:literal, $self:ident => $proof:expr, $dot:item) => {
        impl Dot for $name {
            type Ints = __m512i;
            type Floats = __m512;
            const LANES: usize = 16;
            const TILE: usize = 6;
            const BIAS: u8 = $bias;

            #[inline(always)]
            unsafe fn load(self, at: *const u8) -> __m512i {
                isa!(_mm512_loadu_si512(at.cast()))
            }
            #[inline(always)]
            unsafe fn store(self, x: __m512i, at: *mut u8) {
                isa!(_mm512_storeu_si512(at.cast(), x));
            }
            #[inline(always)]
            unsafe fn broadcast(self, at: *const i8) -> __m512i {
                isa!(_mm512_set1_epi32(at.cast::<i32>().read_unaligned()))
            }
            #[inline(always)]
            unsafe fn floats(self, at: *const f32) -> __m512 {
                isa!(_mm512_loadu_ps(at))
            }
            #[inline(always)]
            unsafe fn store_floats(self, x: __m512, at: *mut f32) {
                isa!(_mm512_storeu_ps(at, x));
            }
            #[inline(always)]
            unsafe fn write<T: Lanes>($self, x: __m512, at: *mut T) {
                isa!(T::store16($proof, x, &mut *at.cast::<[T; 16]>()));
            }
            #[inline(always)]
            unsafe fn spread(self, at: *const f32, count: usize) -> __m512 {
                isa!(match count {
                    1 => _mm512_set1_ps(*at),
                    2 => {
                        let low = _mm512_set1_ps(*at);
                        _mm512_mask_blend_ps(0xff00, low, _mm512_set1_ps(*at.add(1)))
                    }
                    _ => {
                        let lanes = _mm512_broadcast_f32x4(_mm_loadu_ps(at));
                        let order = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
                        _mm512_permutexvar_ps(order, lanes)
                    }
                })
            }
            #[inline(always)]
            fn splat(self, x: f32) -> __m512 {
                isa!(_mm512_set1_ps(x))
            }
            #[inline(always)]
            fn splat_int(self, x: i32) -> __m512i {
                isa!(_mm512_set1_epi32(x))
            }
            #[inline(always)]
            fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
                isa!(_mm512_fmadd_ps(a, b, c))
            }
            #[inline(always)]
            fn mul(self, a: __m512, b: __m512) -> __m512 {
                isa!(_mm512_mul_ps(a, b))
            }
            #[inline(always)]
            fn to_floats(self, x: __m512i) -> __m512 {
                isa!(_mm512_cvtepi32_ps(x))
            }
            #[inline(always)]
            fn sum(self, x: __m512) -> f32 {
                isa!(_mm512_reduce_add_ps(x))
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
            fn transpose(self, rows: &mut [__m512i; 16]) {
                // SAFETY: `self` proves AVX-512 F.
                unsafe { transpose(rows) }
            }
            #[inline(always)]
            fn prefetch(self, at: *const u8) {
                isa!(_mm_prefetch::<_MM_HINT_T0>(at.cast()));
            }
        }
    };
}

dot!(Vnni, 128, self => self.0, fn dot(self, sum: __m512i, weights: __m512i, x: __m512i) -> __m512i {
    isa!(_mm512_dpbusd_epi32(sum, weights, x))
});

// A weight's magnitude is at most 128 and an activation's at most 127, so a pair's sum is at most
// 2 * 128 * 127 = 32,512: it fits in a word, and nothing saturates.
dot!(Avx512, 0, self => self, fn dot(self, sum: __m512i, weights: __m512i, x: __m512i) -> __m512i {
    isa!({
        let negative = _mm512_movepi8_mask(weights);
        let signed = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
        let pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(weights), signed);
        _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
    })
});

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
