//! AVX2 with FMA: eight f32 a vector.

#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::super::Lanes;
use super::super::avx2::{Avx2, Lanes8};
use super::lanes::{Dot, Vector};

impl Vector for Avx2 {
    const LANES: usize = 8;
    type F = __m256;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: the proof implies AVX.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m256 {
        // SAFETY: the proof implies AVX; the caller vouches for eight numbers.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, x: __m256, to: *mut f32) {
        // SAFETY: the proof implies AVX; the caller vouches for eight numbers.
        unsafe { _mm256_storeu_ps(to, x) }
    }
    #[inline(always)]
    unsafe fn load_as<T: Lanes>(self, from: *const T) -> __m256 {
        // SAFETY: the caller vouches for eight elements.
        <T as Lanes8>::load8(self, unsafe { &*from.cast() })
    }
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const i8) -> __m256 {
        // SAFETY: the proof implies AVX2; the caller vouches for eight bytes.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_as<T: Lanes>(self, x: __m256, to: *mut T) {
        // SAFETY: the caller vouches for eight elements.
        <T as Lanes8>::store8(self, x, unsafe { &mut *to.cast() });
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: the proof implies AVX.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: the proof implies AVX.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the proof implies FMA.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn sum(self, x: __m256) -> f32 {
        // SAFETY: the proof implies AVX.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    unsafe fn transpose(self, from: *const u32, stride: usize, to: *mut u32, to_stride: usize) {
        // SAFETY: the proof implies AVX2; the caller vouches for both squares.
        unsafe {
            let zero = _mm256_setzero_si256();
            let (mut a, mut b) = ([zero; 8], [zero; 8]);
            for (i, row) in b.iter_mut().enumerate() {
                *row = _mm256_loadu_si256(from.add(i * stride).cast());
            }
            for i in 0..4 {
                a[2 * i] = _mm256_unpacklo_epi32(b[2 * i], b[2 * i + 1]);
                a[2 * i + 1] = _mm256_unpackhi_epi32(b[2 * i], b[2 * i + 1]);
            }
            for i in 0..2 {
                b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
                b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
                b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
                b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
            }
            for j in 0..4 {
                let low = _mm256_permute2x128_si256::<0x20>(b[j], b[4 + j]);
                let high = _mm256_permute2x128_si256::<0x31>(b[j], b[4 + j]);
                _mm256_storeu_si256(to.add(j * to_stride).cast(), low);
                _mm256_storeu_si256(to.add((4 + j) * to_stride).cast(), high);
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

impl Dot for Avx2 {
    const STEPS: usize = 8;
    const LATE: bool = false;
    type X = f32;
    type Words = __m256i;
    type Table = [__m256; 2];
    type Values = __m256;

    #[inline(always)]
    fn table(self, values: &[f32; 16]) -> [__m256; 2] {
        // SAFETY: the proof implies AVX; `values` is sixteen numbers.
        unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values[8..].as_ptr())] }
    }
    #[inline(always)]
    unsafe fn words(self, from: *const u8) -> __m256i {
        // SAFETY: the proof implies AVX; the caller vouches for thirty-two bytes.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }
    #[inline(always)]
    fn next(self, words: __m256i, _: usize) -> __m256i {
        // SAFETY: the proof implies AVX2.
        unsafe { _mm256_srli_epi32::<4>(words) }
    }
    #[inline(always)]
    fn decode(self, table: [__m256; 2], words: __m256i) -> __m256 {
        // SAFETY: the proof implies AVX2. The permutation reads three bits of an index; the
        // fourth, moved to the sign, chooses between the halves of the table.
        unsafe {
            let low = _mm256_permutevar8x32_ps(table[0], words);
            let high = _mm256_permutevar8x32_ps(table[1], words);
            let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(words));
            _mm256_blendv_ps(low, high, fourth)
        }
    }
    #[inline(always)]
    unsafe fn activations(self, from: *const f32) -> __m256 {
        // SAFETY: the proof implies AVX; the caller vouches for eight numbers.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn unit(self, from: *const u32) -> Self::Values {
        // SAFETY: the proof implies AVX; the caller vouches for four bytes.
        unsafe { _mm256_set1_ps(from.cast::<f32>().read_unaligned()) }
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
    fn first(self, a: __m256, b: __m256) -> __m256 {
        self.mul(a, b)
    }
    #[inline(always)]
    fn dot(self, sum: __m256, a: __m256, b: __m256) -> __m256 {
        self.fma(a, b, sum)
    }
    #[inline(always)]
    unsafe fn scales<const BLOCKS: usize>(self, from: *const f32) -> __m256 {
        // SAFETY: the proof implies AVX; the caller vouches for `BLOCKS` numbers, one or two.
        unsafe {
            let one = |i: usize| _mm256_set1_ps(*from.add(i));
            if BLOCKS == 1 { one(0) } else { _mm256_blend_ps::<0xf0>(one(0), one(1)) }
        }
    }
}
