//! AVX2 with FMA and F16C: a group is four vectors of eight lanes.
//!
//! Nothing here fuses a multiplication with an addition: the definition rounds after each.

// Intrinsics carry their origin in their names.
#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::simd::{GROUP, HALF, Simd, entry_points, first_four};
use super::{Isa, Kernels, Lanes};
use crate::format::codebook::Codebook;
use crate::quant::blockwise::Blocks;
use crate::quant::stats::{LANES, Stats, Sums};

/// Proof that the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(());

impl Avx2 {
    /// Asks the machine.
    pub fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }
}

entry_points!(Avx2, "avx2,fma,f16c");

/// Elements that eight lanes of f32 are loaded from and stored to.
pub trait Lanes8: Sized {
    /// Widens.
    fn load8(isa: Avx2, x: &[Self; 8]) -> __m256;
    /// Rounds to nearest, ties to even.
    fn store8(isa: Avx2, x: __m256, out: &mut [Self; 8]);
}

impl Lanes8 for f32 {
    #[inline(always)]
    fn load8(_: Avx2, x: &[Self; 8]) -> __m256 {
        // SAFETY: the proof implies AVX; `x` is eight readable floats.
        unsafe { _mm256_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store8(_: Avx2, x: __m256, out: &mut [Self; 8]) {
        // SAFETY: the proof implies AVX; `out` is eight writable floats.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) }
    }
}

impl Lanes8 for f16 {
    #[inline(always)]
    fn load8(_: Avx2, x: &[Self; 8]) -> __m256 {
        // SAFETY: the proof implies F16C; `x` is sixteen readable bytes.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store8(_: Avx2, x: __m256, out: &mut [Self; 8]) {
        // SAFETY: the proof implies F16C; `out` is sixteen writable bytes.
        unsafe {
            let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
            _mm_storeu_si128(out.as_mut_ptr().cast(), half);
        }
    }
}

impl Lanes8 for bf16 {
    #[inline(always)]
    fn load8(_: Avx2, x: &[Self; 8]) -> __m256 {
        // SAFETY: the proof implies AVX2; `x` is sixteen readable bytes.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    fn store8(_: Avx2, x: __m256, out: &mut [Self; 8]) {
        // SAFETY: the proof implies AVX2; `out` is sixteen writable bytes.
        unsafe {
            // Just below half of the last place, and one more where the last bit is odd; a NaN
            // keeps its upper bits and becomes quiet, as `bf16::from_f32` does.
            let bits = _mm256_castps_si256(x);
            let high = _mm256_srli_epi32::<16>(bits);
            let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
            let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
            let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
            let words = _mm256_blendv_epi8(rounded, quiet, nan);
            let (first, last) =
                (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm_packus_epi32(first, last));
        }
    }
}

/// Evaluates an expression for each of the four vectors of its groups.
macro_rules! each {
    ($($group:ident),+ => $body:expr) => {
        [each!(0, $($group),+ => $body), each!(1, $($group),+ => $body),
         each!(2, $($group),+ => $body), each!(3, $($group),+ => $body)]
    };
    ($i:literal, $($group:ident),+ => $body:expr) => {{
        $(let $group = $group[$i];)+
        // SAFETY: every group is an operand of a method whose `self` proves AVX2, FMA and F16C;
        // operands in memory are references to arrays as long as the vector.
        unsafe { $body }
    }};
}

/// What a search among sixteen values looks at.
#[derive(Clone, Copy)]
pub struct Search {
    tree: [__m256; 2],
    root: [__m256; 4],
    /// The code of each position.
    order: __m128i,
}

impl Simd for Avx2 {
    type Floats = [__m256; 4];
    type Ints = [__m256i; 4];
    /// Nodes 0 to 7, nodes 8 to 15.
    type Tree = [__m256; 2];
    type Search = Search;
    /// The low bytes of all values, the high bytes of all values, each twice.
    type Table2 = [__m256i; 2];
    /// Values 0 to 7, values 8 to 15.
    type Table4 = [__m256; 2];

    #[inline(always)]
    fn load<T: Lanes>(self, x: &[T; GROUP]) -> Self::Floats {
        let x = x.as_chunks().0;
        [T::load8(self, &x[0]), T::load8(self, &x[1]), T::load8(self, &x[2]), T::load8(self, &x[3])]
    }

    #[inline(always)]
    fn store<T: Lanes>(self, x: Self::Floats, out: &mut [T; GROUP]) {
        for (x, out) in x.into_iter().zip(out.as_chunks_mut().0) {
            T::store8(self, x, out);
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Floats {
        let x = [x; 4];
        each!(x => _mm256_set1_ps(x))
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::Ints {
        let x = [x; 4];
        each!(x => _mm256_set1_epi32(x))
    }

    #[inline(always)]
    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        each!(a, b => _mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        each!(a, b => _mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn add_sums(self, sums: &mut Sums, x: &[f32; GROUP], decoded: &[f32; GROUP]) {
        // SAFETY: the proof implies AVX2; both halves of eight numbers are read and written.
        unsafe {
            for at in [0, LANES / 2] {
                let mut acc = [_mm256_setzero_pd(); 4];
                for (acc, lanes) in acc.iter_mut().zip(&sums.sums) {
                    *acc = _mm256_loadu_pd(lanes[at..].as_ptr());
                }
                let mut largest = _mm_loadu_ps(sums.max_abs[at..].as_ptr());
                for (x, y) in x.chunks_exact(LANES).zip(decoded.chunks_exact(LANES)) {
                    let x = _mm_loadu_ps(x[at..].as_ptr());
                    let y = _mm_loadu_ps(y[at..].as_ptr());
                    let (wide, decoded) = (_mm256_cvtps_pd(x), _mm256_cvtps_pd(y));
                    let difference = _mm256_sub_pd(wide, decoded);
                    acc[0] = _mm256_add_pd(acc[0], _mm256_mul_pd(wide, wide));
                    acc[1] = _mm256_add_pd(acc[1], _mm256_mul_pd(decoded, decoded));
                    acc[2] = _mm256_add_pd(acc[2], _mm256_mul_pd(wide, decoded));
                    acc[3] = _mm256_add_pd(acc[3], _mm256_mul_pd(difference, difference));
                    let apart = _mm_andnot_ps(_mm_set1_ps(-0.0), _mm_sub_ps(x, y));
                    largest = _mm_max_ps(apart, largest);
                }
                for (lanes, acc) in sums.sums.iter_mut().zip(acc) {
                    _mm256_storeu_pd(lanes[at..].as_mut_ptr(), acc);
                }
                _mm_storeu_ps(sums.max_abs[at..].as_mut_ptr(), largest);
            }
        }
    }

    #[inline(always)]
    fn max_magnitude(self, largest: Self::Ints, x: Self::Floats) -> Self::Ints {
        each!(largest, x => {
            let magnitude = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(i32::MAX));
            _mm256_max_epi32(largest, magnitude)
        })
    }

    #[inline(always)]
    fn reduce_max(self, [a, b, c, d]: Self::Ints) -> u32 {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let x = _mm256_max_epi32(_mm256_max_epi32(a, b), _mm256_max_epi32(c, d));
            let x = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            let x = _mm_max_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
            let x = _mm_max_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x));
            _mm_cvtsi128_si32(x).cast_unsigned()
        }
    }

    #[inline(always)]
    fn round(self, x: Self::Floats) -> Self::Ints {
        each!(x => _mm256_cvtps_epi32(x))
    }

    #[inline(always)]
    fn tree(self, nodes: &[f32; 16]) -> Self::Tree {
        let nodes = nodes.as_chunks().0;
        [f32::load8(self, &nodes[0]), f32::load8(self, &nodes[1])]
    }

    #[inline(always)]
    fn upper(self, tree: Self::Tree, node: Self::Ints) -> Self::Floats {
        each!(node => _mm256_permutevar8x32_ps(tree[0], node))
    }

    #[inline(always)]
    fn lower(self, tree: Self::Tree, node: Self::Ints) -> Self::Floats {
        // The permutation reads the low three bits of an index.
        each!(node => _mm256_permutevar8x32_ps(tree[1], node))
    }

    #[inline(always)]
    fn child(self, node: Self::Ints, x: Self::Floats, pivot: Self::Floats) -> Self::Ints {
        each!(node, x, pivot => {
            // All bits of a true comparison: -1.
            let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(x, pivot));
            _mm256_sub_epi32(_mm256_add_epi32(node, node), above)
        })
    }

    #[inline(always)]
    fn last_four(self, nodes: &[f32; 256], node: Self::Ints, x: Self::Floats) -> Self::Ints {
        let at = |i: usize| f32::load8(self, &nodes.as_chunks().0[i]);
        // Nodes 16 to 31 are two registers; the blend looks at the sign, where bit 3 goes.
        let pivot = each!(node => {
            let low = _mm256_permutevar8x32_ps(at(2), node);
            let high = _mm256_permutevar8x32_ps(at(3), node);
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(node)))
        });
        let mut node = self.child(node, x, pivot);
        for _ in 0..3 {
            // Eight loads, for a gather is slower on many processors and never much faster.
            let pivot = each!(node => {
                let mut index = [0u32; 8];
                _mm256_storeu_si256(index.as_mut_ptr().cast(), node);
                let [a, b, c, d, e, f, g, h] = index.map(|node| nodes[node as usize & 255]);
                _mm256_setr_ps(a, b, c, d, e, f, g, h)
            });
            node = self.child(node, x, pivot);
        }
        node
    }

    #[inline(always)]
    fn search(self, book: &Codebook<16>) -> Option<Search> {
        // SAFETY: `self` proves AVX; the order is sixteen bytes.
        let order = unsafe { _mm_loadu_si128(book.order.as_ptr().cast()) };
        Some(Search { tree: self.tree(&book.tree), root: self.splat(book.tree[1]), order })
    }

    #[inline(always)]
    fn encode(self, search: Search, x: Self::Floats) -> [u8; HALF] {
        let [a, b, c, d] = first_four(self, search.tree, search.root, x);
        // SAFETY: `self` proves AVX2; the result is sixteen bytes.
        unsafe {
            // Four bytes of `a`, of `b`, of `c`, of `d`, then the other four of each.
            let x = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
            let order = _mm256_broadcastsi128_si256(search.order);
            let codes = _mm256_shuffle_epi8(order, x);
            let pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
            let (first, last) =
                (_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
            let bytes = _mm_packus_epi16(first, last);
            let places = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
            let mut out = [0; HALF];
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm_shuffle_epi8(bytes, places));
            out
        }
    }

    #[inline(always)]
    fn bytes(self, [a, b, c, d]: Self::Ints) -> [u8; GROUP] {
        // SAFETY: `self` proves AVX2; the result is thirty-two bytes.
        unsafe {
            let low = _mm256_set1_epi16(0xff);
            let ab = _mm256_and_si256(_mm256_packs_epi32(a, b), low);
            let cd = _mm256_and_si256(_mm256_packs_epi32(c, d), low);
            let places = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(ab, cd), places);
            let mut out = [0; GROUP];
            _mm256_storeu_si256(out.as_mut_ptr().cast(), bytes);
            out
        }
    }

    #[inline(always)]
    fn signed(self, x: &[i8; GROUP]) -> Self::Floats {
        let x: &[[i8; 8]] = x.as_chunks().0;
        each!(x => {
            let bytes = _mm_loadl_epi64(x.as_ptr().cast());
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))
        })
    }

    #[inline(always)]
    fn exponents(self, codes: &[u8; GROUP]) -> Self::Floats {
        let codes: &[[u8; 8]] = codes.as_chunks().0;
        each!(codes => {
            let codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.as_ptr().cast()));
            // The upper half of the mantissa: all of the least number, and what makes a NaN.
            let half = _mm256_set1_epi32(1 << 22);
            let bits = _mm256_max_epi32(_mm256_slli_epi32::<23>(codes), half);
            let nan = _mm256_cmpeq_epi32(codes, _mm256_set1_epi32(255));
            _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_and_si256(nan, half)))
        })
    }

    #[inline(always)]
    fn gather(self, values: &[f32; 256], codes: &[u8; GROUP]) -> Self::Floats {
        let codes: &[[u8; 8]] = codes.as_chunks().0;
        each!(codes => {
            let [a, b, c, d, e, f, g, h] = codes.map(|code| values[usize::from(code)]);
            _mm256_setr_ps(a, b, c, d, e, f, g, h)
        })
    }

    #[inline(always)]
    fn scaled<T: Lanes>(self, values: &[f32; 16], scale: f32) -> [T; 16] {
        let mut out = [T::default(); 16];
        for (values, out) in values.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
            let values = f32::load8(self, values);
            // SAFETY: `self` proves AVX.
            T::store8(self, unsafe { _mm256_mul_ps(values, _mm256_set1_ps(scale)) }, out);
        }
        out
    }

    #[inline(always)]
    fn table2(self, values: &[u16; 16]) -> Self::Table2 {
        // SAFETY: `self` proves AVX2; `values` is thirty-two bytes.
        unsafe {
            let values = _mm256_loadu_si256(values.as_ptr().cast());
            let low = _mm256_and_si256(values, _mm256_set1_epi16(0xff));
            let bytes = _mm256_packus_epi16(low, _mm256_srli_epi16::<8>(values));
            // Low bytes of the first eight, high bytes of them, then the same of the last eight.
            [
                _mm256_permute4x64_epi64::<0b10_00_10_00>(bytes),
                _mm256_permute4x64_epi64::<0b11_01_11_01>(bytes),
            ]
        }
    }

    #[inline(always)]
    fn table4(self, values: &[f32; 16]) -> Self::Table4 {
        self.tree(values)
    }

    #[inline(always)]
    fn decode2(self, table: Self::Table2, packed: &[u8; HALF], out: &mut [u16; GROUP]) {
        // SAFETY: `self` proves AVX2; `out` is sixty-four bytes.
        unsafe {
            // The unpacking below works within 128 bits: 0 to 7 and 16 to 23 in the first.
            let codes = _mm256_permute4x64_epi64::<0b11_01_10_00>(unpacked(self, packed));
            let low = _mm256_shuffle_epi8(table[0], codes);
            let high = _mm256_shuffle_epi8(table[1], codes);
            let (first, last) = out.split_at_mut(HALF);
            _mm256_storeu_si256(first.as_mut_ptr().cast(), _mm256_unpacklo_epi8(low, high));
            _mm256_storeu_si256(last.as_mut_ptr().cast(), _mm256_unpackhi_epi8(low, high));
        }
    }

    #[inline(always)]
    fn decode4(self, table: Self::Table4, packed: &[u8; HALF], out: &mut [f32; GROUP]) {
        let mut codes = [0u8; GROUP];
        // SAFETY: `self` proves AVX; `codes` is thirty-two bytes.
        unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), unpacked(self, packed)) };
        let codes: &[[u8; 8]] = codes.as_chunks().0;
        let values = each!(codes => {
            let index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.as_ptr().cast()));
            let low = _mm256_permutevar8x32_ps(table[0], index);
            let high = _mm256_permutevar8x32_ps(table[1], index);
            // Bit 3 of the index becomes the sign, which is what the blend looks at.
            let upper_half = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
            _mm256_blendv_ps(low, high, upper_half)
        });
        self.store(values, out);
    }
}

/// One code a byte, in the order of the elements.
#[inline(always)]
fn unpacked(_: Avx2, packed: &[u8; HALF]) -> __m256i {
    // SAFETY: the proof implies AVX2; `packed` is sixteen bytes.
    unsafe {
        let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(packed.as_ptr().cast()));
        let pairs = _mm256_or_si256(_mm256_slli_epi16::<8>(words), _mm256_srli_epi16::<4>(words));
        _mm256_and_si256(pairs, _mm256_set1_epi8(15))
    }
}
