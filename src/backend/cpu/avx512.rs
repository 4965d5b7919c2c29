//! AVX-512 F, BW, DQ and VL: a group is two vectors of sixteen lanes.
//!
//! Nothing here fuses a multiplication with an addition: the definition rounds after each.

// Intrinsics carry their origin in their names.
#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::simd::{GROUP, HALF, Simd, entry_points};
use super::{Isa, Kernels, Lanes};
use crate::format::codebook::Codebook;
use crate::quant::blockwise::Blocks;
use crate::quant::stats::{LANES, Stats, Sums};

/// Proof that the machine has AVX-512 F, BW, DQ and VL, and AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512(());

/// Proof that the machine has AVX512-BF16, VNNI and VBMI beside everything of [`Avx512`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512Ext(Avx512);

impl Avx512Ext {
    /// Asks the machine.
    pub fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512vbmi");
        Avx512::detect().filter(|_| found).map(Self)
    }

    /// The smaller proof.
    pub const fn base(self) -> Avx512 {
        self.0
    }
}

impl Avx512 {
    /// Asks the machine.
    pub fn detect() -> Option<Self> {
        let found = super::avx2::Avx2::detect().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        found.then_some(Self(()))
    }
}

/// The proof, inside of a function that has the features.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn inside() -> Avx512 {
    Avx512(())
}

entry_points!(Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");

/// Elements that sixteen lanes of f32 are loaded from and stored to.
pub trait Lanes16: Sized {
    /// Widens.
    fn load16(isa: Avx512, x: &[Self; 16]) -> __m512;
    /// Rounds to nearest, ties to even.
    fn store16(isa: Avx512, x: __m512, out: &mut [Self; 16]);
}

impl Lanes16 for f32 {
    #[inline(always)]
    fn load16(_: Avx512, x: &[Self; 16]) -> __m512 {
        // SAFETY: the proof implies AVX-512 F; `x` is sixteen readable floats.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store16(_: Avx512, x: __m512, out: &mut [Self; 16]) {
        // SAFETY: the proof implies AVX-512 F; `out` is sixteen writable floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
    }
}

impl Lanes16 for f16 {
    #[inline(always)]
    fn load16(_: Avx512, x: &[Self; 16]) -> __m512 {
        // SAFETY: the proof implies AVX-512 F; `x` is thirty-two readable bytes.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store16(_: Avx512, x: __m512, out: &mut [Self; 16]) {
        // SAFETY: the proof implies AVX-512 F; `out` is thirty-two writable bytes.
        unsafe {
            let half = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), half);
        }
    }
}

impl Lanes16 for bf16 {
    #[inline(always)]
    fn load16(_: Avx512, x: &[Self; 16]) -> __m512 {
        // SAFETY: the proof implies AVX-512 F; `x` is thirty-two readable bytes.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    fn store16(_: Avx512, x: __m512, out: &mut [Self; 16]) {
        // SAFETY: the proof implies AVX-512 F; `out` is thirty-two writable bytes.
        unsafe {
            // Just below half of the last place, and one more where the last bit is odd; a NaN
            // keeps its upper bits and becomes quiet, as `bf16::from_f32` does. (The instruction
            // of AVX512-BF16 flushes subnormals.)
            let bits = _mm512_castps_si512(x);
            let high = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
            let quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
            let words = _mm512_mask_blend_epi32(nan, rounded, quiet);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(words));
        }
    }
}

/// Evaluates an expression for both vectors of its groups.
macro_rules! each {
    ($($group:ident),+ => $body:expr) => {
        [each!(0, $($group),+ => $body), each!(1, $($group),+ => $body)]
    };
    ($i:literal, $($group:ident),+ => $body:expr) => {{
        $(let $group = $group[$i];)+
        // SAFETY: every group is an operand of a method whose `self` proves AVX-512 F, BW, DQ and
        // VL; operands in memory are references to arrays as long as the vector.
        unsafe { $body }
    }};
}

/// What a search among sixteen values looks at; see [`Cells`].
#[derive(Clone, Copy)]
pub struct Search {
    step: __m512,
    pivots: [__m512; 2],
    /// By a cell, and 32 more where a number is above its pivot: the code, or, if there are extra
    /// pivots, the number of other pivots below.
    codes: [__m512i; 2],
    extra: Option<[__m512; 2]>,
    /// The code of each position, twice.
    order: __m512i,
}

impl Simd for Avx512 {
    type Floats = [__m512; 2];
    type Ints = [__m512i; 2];
    type Search = Search;
    type Tree = __m512;
    /// The sixteen values twice: the permutation reads five bits of an index.
    type Table2 = __m512i;
    type Table4 = __m512;

    #[inline(always)]
    fn load<T: Lanes>(self, x: &[T; GROUP]) -> Self::Floats {
        let x = x.as_chunks().0;
        [T::load16(self, &x[0]), T::load16(self, &x[1])]
    }

    #[inline(always)]
    fn store<T: Lanes>(self, x: Self::Floats, out: &mut [T; GROUP]) {
        for (x, out) in x.into_iter().zip(out.as_chunks_mut().0) {
            T::store16(self, x, out);
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Floats {
        let x = [x; 2];
        each!(x => _mm512_set1_ps(x))
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::Ints {
        let x = [x; 2];
        each!(x => _mm512_set1_epi32(x))
    }

    #[inline(always)]
    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        each!(a, b => _mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        each!(a, b => _mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn add_sums(self, sums: &mut Sums, x: &[f32; GROUP], decoded: &[f32; GROUP]) {
        let (x8, y8) = (x.as_chunks::<LANES>().0, decoded.as_chunks::<LANES>().0);
        // SAFETY: the proof implies AVX-512; arrays of eight numbers are what is read and written.
        unsafe {
            let mut acc = [_mm512_setzero_pd(); 4];
            for (acc, lanes) in acc.iter_mut().zip(&sums.sums) {
                *acc = _mm512_loadu_pd(lanes.as_ptr());
            }
            let mut largest = _mm256_loadu_ps(sums.max_abs.as_ptr());
            for (x, y) in x8.iter().zip(y8) {
                let (x, y) = (_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(y.as_ptr()));
                let (wide, decoded) = (_mm512_cvtps_pd(x), _mm512_cvtps_pd(y));
                let difference = _mm512_sub_pd(wide, decoded);
                acc[0] = _mm512_add_pd(acc[0], _mm512_mul_pd(wide, wide));
                acc[1] = _mm512_add_pd(acc[1], _mm512_mul_pd(decoded, decoded));
                acc[2] = _mm512_add_pd(acc[2], _mm512_mul_pd(wide, decoded));
                acc[3] = _mm512_add_pd(acc[3], _mm512_mul_pd(difference, difference));
                let apart = _mm256_andnot_ps(_mm256_set1_ps(-0.0), _mm256_sub_ps(x, y));
                largest = _mm256_max_ps(apart, largest);
            }
            for (lanes, acc) in sums.sums.iter_mut().zip(acc) {
                _mm512_storeu_pd(lanes.as_mut_ptr(), acc);
            }
            _mm256_storeu_ps(sums.max_abs.as_mut_ptr(), largest);
        }
    }

    #[inline(always)]
    fn max_magnitude(self, largest: Self::Ints, x: Self::Floats) -> Self::Ints {
        each!(largest, x => {
            let magnitude = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MAX));
            _mm512_max_epi32(largest, magnitude)
        })
    }

    #[inline(always)]
    fn reduce_max(self, [a, b]: Self::Ints) -> u32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_reduce_max_epi32(_mm512_max_epi32(a, b)).cast_unsigned() }
    }

    #[inline(always)]
    fn round(self, x: Self::Floats) -> Self::Ints {
        each!(x => _mm512_cvtps_epi32(x))
    }

    #[inline(always)]
    fn tree(self, nodes: &[f32; 16]) -> Self::Tree {
        f32::load16(self, nodes)
    }

    #[inline(always)]
    fn upper(self, tree: Self::Tree, node: Self::Ints) -> Self::Floats {
        each!(node => _mm512_permutexvar_ps(node, tree))
    }

    #[inline(always)]
    fn lower(self, tree: Self::Tree, node: Self::Ints) -> Self::Floats {
        each!(node => _mm512_permutexvar_ps(node, tree))
    }

    #[inline(always)]
    fn child(self, node: Self::Ints, x: Self::Floats, pivot: Self::Floats) -> Self::Ints {
        each!(node, x, pivot => {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, pivot);
            let child = _mm512_add_epi32(node, node);
            _mm512_mask_add_epi32(child, above, child, _mm512_set1_epi32(1))
        })
    }

    #[inline(always)]
    fn last_four(self, nodes: &[f32; 256], node: Self::Ints, x: Self::Floats) -> Self::Ints {
        let vectors: &[[f32; 16]] = nodes.as_chunks().0;
        let at = |i: usize| f32::load16(self, &vectors[i]);
        // Nodes 16 to 31: a permutation reads the low four bits of an index, one of two vectors
        // reads five. Above that, the next bits choose among the results.
        let node = self.child(node, x, each!(node => _mm512_permutexvar_ps(node, at(1))));
        let pivot = each!(node => _mm512_permutex2var_ps(at(2), node, at(3)));
        let node = self.child(node, x, pivot);
        let pivot = each!(node => {
            let low = _mm512_permutex2var_ps(at(4), node, at(5));
            let high = _mm512_permutex2var_ps(at(6), node, at(7));
            let bit5 = _mm512_test_epi32_mask(node, _mm512_set1_epi32(32));
            _mm512_mask_blend_ps(bit5, low, high)
        });
        let node = self.child(node, x, pivot);
        let pivot = each!(node => {
            let bit5 = _mm512_test_epi32_mask(node, _mm512_set1_epi32(32));
            let bit6 = _mm512_test_epi32_mask(node, _mm512_set1_epi32(64));
            let low = _mm512_mask_blend_ps(
                bit5,
                _mm512_permutex2var_ps(at(8), node, at(9)),
                _mm512_permutex2var_ps(at(10), node, at(11)),
            );
            let high = _mm512_mask_blend_ps(
                bit5,
                _mm512_permutex2var_ps(at(12), node, at(13)),
                _mm512_permutex2var_ps(at(14), node, at(15)),
            );
            _mm512_mask_blend_ps(bit6, low, high)
        });
        self.child(node, x, pivot)
    }

    #[inline(always)]
    fn search(self, book: &Codebook<16>) -> Option<Search> {
        let cells = book.cells.as_ref()?;
        let mut codes = [0u16; 64];
        for (i, code) in codes.iter_mut().enumerate() {
            let position = cells.below[i % 32] + u8::from(i >= 32);
            let order =
                if cells.has_extra() { position } else { book.order[usize::from(position) % 16] };
            *code = u16::from(order);
        }
        let order: [u16; 32] = std::array::from_fn(|i| u16::from(book.order[i % 16]));
        let pivots: &[[f32; 16]] = cells.pivots.as_chunks().0;
        let halves: &[[u16; 32]] = codes.as_chunks().0;
        // SAFETY: `self` proves AVX-512 F; the arrays are as long as the vectors.
        unsafe {
            let words = |words: &[u16; 32]| _mm512_loadu_si512(words.as_ptr().cast());
            let extra = cells.extra.map(|pivot| _mm512_set1_ps(pivot));
            Some(Search {
                step: _mm512_set1_ps(cells.step),
                pivots: [f32::load16(self, &pivots[0]), f32::load16(self, &pivots[1])],
                codes: [words(&halves[0]), words(&halves[1])],
                extra: cells.has_extra().then_some(extra),
                order: words(&order),
            })
        }
    }

    #[inline(always)]
    fn encode(self, search: Search, x: Self::Floats) -> [u8; HALF] {
        /// Added to a number below 2^22, 1.5 * 2^23 leaves the nearest integer in the low bits.
        const ROUND: f32 = 12_582_912.0;
        let cell = each!(x => {
            let cell = _mm512_fmadd_ps(x, search.step, _mm512_set1_ps(ROUND + 16.0));
            _mm512_castps_si512(cell)
        });
        // The permutation reads five bits of an index.
        let pivot = each!(cell => _mm512_permutex2var_ps(search.pivots[0], cell, search.pivots[1]));
        let [a, b] = each!(cell, x, pivot => {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, pivot);
            _mm512_mask_or_epi32(cell, above, cell, _mm512_set1_epi32(32))
        });
        // SAFETY: `self` proves AVX-512 F, BW and VL; the result is sixteen bytes.
        unsafe {
            // Words of the first and of the second half of the group by turns.
            let words = _mm512_mask_blend_epi16(0xaaaa_aaaa, a, _mm512_slli_epi32::<16>(b));
            let mut codes = _mm512_permutex2var_epi16(search.codes[0], words, search.codes[1]);
            if let Some(extra) = search.extra {
                for pivot in extra {
                    let first = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x[0], pivot);
                    let second = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x[1], pivot);
                    let (one, upper) = (_mm512_set1_epi32(1), _mm512_set1_epi32(1 << 16));
                    codes = _mm512_mask_add_epi32(codes, first, codes, one);
                    codes = _mm512_mask_add_epi32(codes, second, codes, upper);
                }
                codes = _mm512_permutexvar_epi16(codes, search.order);
            }
            // Of four words, the third belongs below the first, the fourth below the second.
            let pairs =
                _mm512_or_si512(_mm512_slli_epi64::<4>(codes), _mm512_srli_epi64::<32>(codes));
            let bytes = _mm256_cvtepi16_epi8(_mm512_cvtepi64_epi32(pairs));
            let places = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
            let mut out = [0; HALF];
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm_shuffle_epi8(bytes, places));
            out
        }
    }

    #[inline(always)]
    fn bytes(self, x: Self::Ints) -> [u8; GROUP] {
        let mut out = [0; GROUP];
        for (x, out) in x.into_iter().zip(out.as_chunks_mut::<16>().0) {
            // SAFETY: `self` proves AVX-512 F; `out` is sixteen bytes.
            unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(x)) };
        }
        out
    }

    #[inline(always)]
    fn signed(self, x: &[i8; GROUP]) -> Self::Floats {
        let x: &[[i8; 16]] = x.as_chunks().0;
        each!(x => {
            let bytes = _mm_loadu_si128(x.as_ptr().cast());
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
        })
    }

    #[inline(always)]
    fn exponents(self, codes: &[u8; GROUP]) -> Self::Floats {
        let codes: &[[u8; 16]] = codes.as_chunks().0;
        each!(codes => {
            let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            // The upper half of the mantissa: all of the least number, and what makes a NaN.
            let half = _mm512_set1_epi32(1 << 22);
            let bits = _mm512_max_epi32(_mm512_slli_epi32::<23>(codes), half);
            let nan = _mm512_cmpeq_epi32_mask(codes, _mm512_set1_epi32(255));
            _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, nan, bits, half))
        })
    }

    #[inline(always)]
    fn gather(self, values: &[f32; 256], codes: &[u8; GROUP]) -> Self::Floats {
        let codes: &[[u8; 16]] = codes.as_chunks().0;
        each!(codes => {
            let index = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            _mm512_i32gather_ps::<4>(index, values.as_ptr())
        })
    }

    #[inline(always)]
    fn scaled<T: Lanes>(self, values: &[f32; 16], scale: f32) -> [T; 16] {
        let mut out = [T::default(); 16];
        let values = f32::load16(self, values);
        // SAFETY: `self` proves AVX-512 F.
        T::store16(self, unsafe { _mm512_mul_ps(values, _mm512_set1_ps(scale)) }, &mut out);
        out
    }

    #[inline(always)]
    fn table2(self, values: &[u16; 16]) -> Self::Table2 {
        // SAFETY: `self` proves AVX-512 F; `values` is thirty-two bytes.
        unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(values.as_ptr().cast())) }
    }

    #[inline(always)]
    fn table4(self, values: &[f32; 16]) -> Self::Table4 {
        self.tree(values)
    }

    #[inline(always)]
    fn decode2(self, table: Self::Table2, packed: &[u8; HALF], out: &mut [u16; GROUP]) {
        // SAFETY: `self` proves AVX-512 BW; `packed` is sixteen bytes, `out` sixty-four.
        unsafe {
            // A byte becomes two words: the upper half, and all of it, of which the permutation
            // reads the lower half and one bit that makes no difference.
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(packed.as_ptr().cast()));
            let index =
                _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
            let values = _mm512_permutexvar_epi16(index, table);
            _mm512_storeu_si512(out.as_mut_ptr().cast(), values);
        }
    }

    #[inline(always)]
    fn decode4(self, table: Self::Table4, packed: &[u8; HALF], out: &mut [f32; GROUP]) {
        // SAFETY: `self` proves AVX-512 F; `packed` is sixteen bytes.
        let codes = unsafe {
            // The permutation reads the low four bits of an index: the rest may be anything.
            let low = _mm_loadu_si128(packed.as_ptr().cast());
            let high = _mm_srli_epi16::<4>(low);
            [_mm_unpacklo_epi8(high, low), _mm_unpackhi_epi8(high, low)]
        };
        let values = each!(codes => _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), table));
        self.store(values, out);
    }
}
