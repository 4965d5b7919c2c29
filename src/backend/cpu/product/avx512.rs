//! AVX-512: sixteen f32 a vector.

#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::super::Lanes;
use super::super::avx512::{Avx512, Lanes16};
use super::lanes::{Dot, Vector};

/// The square of 16 by 16 words with rows and columns exchanged.
#[inline(always)]
pub(super) fn transposed(_: Avx512, rows: [__m512i; 16]) -> [__m512i; 16] {
    // SAFETY: the proof implies AVX-512 F.
    unsafe {
        let zero = _mm512_setzero_si512();
        let (mut a, mut b) = ([zero; 16], [zero; 16]);
        for i in 0..8 {
            a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
            a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
        }
        // b[4i + j]: column j of each quarter, of rows 4i to 4i + 3.
        for i in 0..4 {
            b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
            b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
            b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
            b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
        }
        for j in 0..4 {
            let low = _mm512_shuffle_i32x4::<0x88>(b[j], b[4 + j]);
            let high = _mm512_shuffle_i32x4::<0xdd>(b[j], b[4 + j]);
            let low2 = _mm512_shuffle_i32x4::<0x88>(b[8 + j], b[12 + j]);
            let high2 = _mm512_shuffle_i32x4::<0xdd>(b[8 + j], b[12 + j]);
            a[j] = _mm512_shuffle_i32x4::<0x88>(low, low2);
            a[8 + j] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
            a[4 + j] = _mm512_shuffle_i32x4::<0x88>(high, high2);
            a[12 + j] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
        }
        a
    }
}

impl Vector for Avx512 {
    const LANES: usize = 16;
    type F = __m512;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: the proof implies AVX-512 F.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        // SAFETY: the proof implies AVX-512 F; the caller vouches for sixteen numbers.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, x: __m512, to: *mut f32) {
        // SAFETY: the proof implies AVX-512 F; the caller vouches for sixteen numbers.
        unsafe { _mm512_storeu_ps(to, x) }
    }
    #[inline(always)]
    unsafe fn load_as<T: Lanes>(self, from: *const T) -> __m512 {
        // SAFETY: the caller vouches for sixteen elements.
        <T as Lanes16>::load16(self, unsafe { &*from.cast() })
    }
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const i8) -> __m512 {
        // SAFETY: the proof implies AVX-512 F; the caller vouches for sixteen bytes.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_as<T: Lanes>(self, x: __m512, to: *mut T) {
        // SAFETY: the caller vouches for sixteen elements.
        <T as Lanes16>::store16(self, x, unsafe { &mut *to.cast() });
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the proof implies AVX-512 F.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the proof implies AVX-512 F.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the proof implies AVX-512 F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn sum(self, x: __m512) -> f32 {
        // SAFETY: the proof implies AVX-512 F.
        unsafe { _mm512_reduce_add_ps(x) }
    }
    #[inline(always)]
    unsafe fn transpose(self, from: *const u32, stride: usize, to: *mut u32, to_stride: usize) {
        // SAFETY: the proof implies AVX-512 F; the caller vouches for both squares.
        unsafe {
            let mut rows = [_mm512_setzero_si512(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm512_loadu_si512(from.add(i * stride).cast());
            }
            for (i, column) in transposed(self, rows).into_iter().enumerate() {
                _mm512_storeu_si512(to.add(i * to_stride).cast(), column);
            }
        }
    }
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: a prefetch reads nothing; any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
    #[inline(always)]
    fn prefetch_far(self, address: *const u8) {
        // SAFETY: a prefetch reads nothing; any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }
}

/// One number in each of `BLOCKS` equal runs of lanes.
#[inline(always)]
unsafe fn runs<const BLOCKS: usize>(from: *const f32) -> __m512 {
    // SAFETY: only called with a proof of AVX-512 F at hand; the caller vouches for `BLOCKS`
    // numbers.
    unsafe {
        match BLOCKS {
            1 => _mm512_set1_ps(*from),
            2 => spread::<2>(_mm_castpd_ps(_mm_set1_pd(from.cast::<f64>().read_unaligned()))),
            _ => spread::<BLOCKS>(_mm_loadu_ps(from)),
        }
    }
}

/// The same of the first numbers of four. They are repeated in every quarter, of which one shuffle
/// takes what is wanted; a load repeats them by itself.
#[inline(always)]
unsafe fn spread<const BLOCKS: usize>(numbers: __m128) -> __m512 {
    // SAFETY: only called with a proof of AVX-512 F at hand.
    unsafe {
        let places = match BLOCKS {
            1 => _mm512_setzero_si512(),
            2 => _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0),
            _ => _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0),
        };
        _mm512_permutevar_ps(_mm512_broadcast_f32x4(numbers), places)
    }
}

impl Dot for Avx512 {
    const STEPS: usize = 8;
    const LATE: bool = false;
    const SHORT: bool = false;
    type X = f32;
    /// The words, moved as they are used, and their upper halves.
    type Words = [__m512i; 2];
    type Table = __m512;
    type Values = __m512;

    #[inline(always)]
    fn table(self, values: &[f32; 16]) -> __m512 {
        // SAFETY: the proof implies AVX-512 F; `values` is sixteen numbers.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn words(self, from: *const u8) -> [__m512i; 2] {
        // SAFETY: the proof implies AVX-512 F; the caller vouches for sixty-four bytes.
        unsafe {
            let words = _mm512_loadu_si512(from.cast());
            [words, _mm512_srli_epi32::<16>(words)]
        }
    }
    #[inline(always)]
    fn next(self, [words, upper]: [__m512i; 2], step: usize) -> [__m512i; 2] {
        if step == 3 {
            return [upper, upper];
        }
        // SAFETY: the proof implies AVX-512 BW. Shifts share their units with permutations;
        // those that multiply have nothing else to do. Only the lower half of a word counts.
        unsafe { [_mm512_mulhi_epu16(words, _mm512_set1_epi16(1 << 12)), upper] }
    }
    #[inline(always)]
    fn decode(self, table: __m512, [words, _]: [__m512i; 2]) -> __m512 {
        // SAFETY: the proof implies AVX-512 F. The permutation reads four bits of an index.
        unsafe { _mm512_permutexvar_ps(words, table) }
    }
    #[inline(always)]
    unsafe fn activations(self, from: *const f32) -> __m512 {
        // SAFETY: the proof implies AVX-512 F; the caller vouches for sixteen numbers.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn unit(self, from: *const u32) -> Self::Values {
        // SAFETY: the proof implies AVX-512 F; the caller vouches for four bytes.
        unsafe { _mm512_set1_ps(from.cast::<f32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store_values(self, values: Self::Values, to: *mut u32) {
        // SAFETY: the caller's.
        unsafe { self.store(values, to.cast()) }
    }
    #[inline(always)]
    fn scaled(self, values: Self::Values, scales: Self::F) -> Self::Values {
        self.mul(values, scales)
    }
    #[inline(always)]
    fn first(self, a: __m512, b: __m512) -> __m512 {
        self.mul(a, b)
    }
    #[inline(always)]
    fn dot(self, sum: __m512, a: __m512, b: __m512) -> __m512 {
        self.fma(a, b, sum)
    }
    #[inline(always)]
    unsafe fn scales<const BLOCKS: usize>(self, from: *const f32) -> __m512 {
        // SAFETY: the caller vouches for `BLOCKS` numbers.
        unsafe { runs::<BLOCKS>(from) }
    }
    /// Not by way of memory: what was just written in parts takes long to be read as a whole.
    #[inline(always)]
    fn first_scales<const BLOCKS: usize>(self, scales: &[f32]) -> __m512 {
        let there = (1u8 << scales.len().min(BLOCKS).min(4)) - 1;
        // SAFETY: the proof implies AVX-512 F and VL; only numbers of the slice are read.
        unsafe { spread::<BLOCKS>(_mm_maskz_loadu_ps(there, scales.as_ptr())) }
    }
}
