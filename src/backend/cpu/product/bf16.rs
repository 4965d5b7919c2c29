//! AVX512-BF16: codebook and activations in bf16, two products a lane, sums in f32.
//!
//! Activations that are bf16 stay exact. The codebook is rounded, but the scale is not and the
//! products are not, which makes the result more exact than a decoded weight in bf16.

#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;

use half::bf16;

use super::super::Lanes;
use super::super::avx512::Avx512Ext;
use super::lanes::{Dot, Vector};

/// Vectors as in AVX-512.
macro_rules! as_base {
    ($(fn $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)?;)+) => {
        $(#[inline(always)] fn $name(self, $($arg: $type),*) $(-> $out)? {
            self.base().$name($($arg),*)
        })+
    };
}

impl Vector for Avx512Ext {
    const LANES: usize = 16;
    type F = __m512;

    as_base! {
        fn splat(x: f32) -> __m512;
        fn add(a: __m512, b: __m512) -> __m512;
        fn mul(a: __m512, b: __m512) -> __m512;
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512;
        fn sum(x: __m512) -> f32;
        fn prefetch(address: *const u8);
        fn prefetch_far(address: *const u8);
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        // SAFETY: the caller's.
        unsafe { self.base().load(from) }
    }
    #[inline(always)]
    unsafe fn store(self, x: __m512, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { self.base().store(x, to) }
    }
    #[inline(always)]
    unsafe fn load_as<T: Lanes>(self, from: *const T) -> __m512 {
        // SAFETY: the caller's.
        unsafe { self.base().load_as(from) }
    }
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const i8) -> __m512 {
        // SAFETY: the caller's.
        unsafe { self.base().load_bytes(from) }
    }
    #[inline(always)]
    unsafe fn store_as<T: Lanes>(self, x: __m512, to: *mut T) {
        // SAFETY: the caller's.
        unsafe { self.base().store_as(x, to) }
    }
    #[inline(always)]
    unsafe fn transpose(self, from: *const u32, stride: usize, to: *mut u32, to_stride: usize) {
        // SAFETY: the caller's.
        unsafe { self.base().transpose(from, stride, to, to_stride) }
    }
}

/// Where the halves of pairs are in two vectors behind one another.
const PAIRS: [u16; 32] = {
    let mut places = [0; 32];
    let mut i = 0;
    while i < 16 {
        places[2 * i] = i as u16;
        places[2 * i + 1] = i as u16 + 16;
        i += 1;
    }
    places
};

/// Pairs of bf16 in each lane of sixteen.
#[inline(always)]
pub(super) fn pairs(x: __m512i) -> __m512bh {
    // SAFETY: both types are sixty-four bytes in which every pattern is valid.
    unsafe { std::mem::transmute(x) }
}

impl Dot for Avx512Ext {
    const STEPS: usize = 4;
    const LATE: bool = true;
    const SHORT: bool = true;
    type X = bf16;
    type Words = __m512i;
    type Table = __m512i;
    type Values = __m512bh;

    /// The sixteen values twice: the permutation reads five bits of an index.
    #[inline(always)]
    fn table(self, values: &[f32; 16]) -> __m512i {
        let values = values.map(bf16::from_f32);
        // SAFETY: the proof implies AVX-512 F; `values` is thirty-two bytes.
        unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(values.as_ptr().cast())) }
    }
    #[inline(always)]
    unsafe fn words(self, from: *const u8) -> __m512i {
        // SAFETY: the proof implies AVX-512 F; the caller vouches for sixty-four bytes.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    fn next(self, words: __m512i, _: usize) -> __m512i {
        // SAFETY: the proof implies AVX-512 BW. A shift by four bits would wait for the units of
        // the permutations; those that multiply have nothing else to do.
        unsafe { _mm512_srli_epi16::<4>(words) }
    }
    #[inline(always)]
    fn decode(self, table: __m512i, words: __m512i) -> __m512bh {
        // SAFETY: the proof implies AVX-512 BW.
        pairs(unsafe { _mm512_permutexvar_epi16(words, table) })
    }
    #[inline(always)]
    unsafe fn activations(self, from: *const bf16) -> __m512bh {
        // SAFETY: the proof implies AVX-512 F; the caller vouches for sixty-four bytes.
        pairs(unsafe { _mm512_loadu_si512(from.cast()) })
    }
    #[inline(always)]
    unsafe fn unit(self, from: *const u32) -> Self::Values {
        // SAFETY: the proof implies AVX-512 F; the caller vouches for four bytes.
        pairs(unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) })
    }
    #[inline(always)]
    unsafe fn store_values(self, values: Self::Values, to: *mut u32) {
        // SAFETY: the proof implies AVX-512 F; the caller vouches for sixty-four bytes. Both types of
        // vector are sixty-four bytes in which every pattern is valid.
        unsafe { _mm512_storeu_si512(to.cast(), std::mem::transmute::<__m512bh, __m512i>(values)) }
    }
    #[inline(always)]
    fn scaled(self, values: Self::Values, _: Self::F) -> Self::Values {
        values
    }
    /// From about here on to decode a panel once takes less time than to scale the sums of each
    /// segment: 2 % more at 64 rows, 4 % less at 96.
    const ROUNDED_FROM: usize = 80;
    #[inline(always)]
    unsafe fn store_scaled(
        self,
        values: &[f32; 16],
        _: __m512i,
        words: __m512i,
        scales: __m512,
        to: *mut u32,
        apart: usize,
    ) {
        // SAFETY: the proof implies AVX-512 F, BW and BF16; `values` is sixteen numbers, and the
        // caller vouches for `to`. The permutation of numbers reads four bits of an index; that of
        // halves puts second elements of bytes beside first ones.
        unsafe {
            let table = _mm512_loadu_ps(values.as_ptr());
            let places = _mm512_loadu_si512(PAIRS.as_ptr().cast());
            let value = |codes| _mm512_mul_ps(_mm512_permutexvar_ps(codes, table), scales);
            let (mut first, mut second) = (_mm512_srli_epi32::<4>(words), words);
            for byte in 0..Self::STEPS {
                let halves = _mm512_cvtne2ps_pbh(value(second), value(first));
                let halves = std::mem::transmute::<__m512bh, __m512i>(halves);
                let units = _mm512_permutexvar_epi16(places, halves);
                _mm512_storeu_si512(to.add(byte * apart).cast(), units);
                (first, second) = (_mm512_srli_epi32::<8>(first), _mm512_srli_epi32::<8>(second));
            }
        }
    }
    #[inline(always)]
    fn first(self, a: __m512bh, b: __m512bh) -> __m512 {
        self.dot(self.splat(0.0), a, b)
    }
    #[inline(always)]
    fn dot(self, sum: __m512, a: __m512bh, b: __m512bh) -> __m512 {
        // SAFETY: the proof implies AVX512-BF16.
        unsafe { _mm512_dpbf16_ps(sum, a, b) }
    }
    #[inline(always)]
    unsafe fn scales<const BLOCKS: usize>(self, from: *const f32) -> __m512 {
        // SAFETY: the caller's.
        unsafe { self.base().scales::<BLOCKS>(from) }
    }
    #[inline(always)]
    fn first_scales<const BLOCKS: usize>(self, scales: &[f32]) -> __m512 {
        self.base().first_scales::<BLOCKS>(scales)
    }
}
