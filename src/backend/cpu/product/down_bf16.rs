//! AVX512-BF16 down the columns: pairs of rows, each block's values scaled and rounded to bf16.
//!
//! Scales differ from row to row, so they cannot be applied to sums. They are applied to the
//! codebook, once for each block, which gives the very weights that decoding to bf16 gives.

#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;

use half::bf16;

use super::super::avx512::Avx512Ext;
use super::bf16::pairs;
use super::down::{Down, Rows, VECTORS};
use super::lanes::{Dot, Vector};

/// Words of sixteen bits that belong to the second row of a pair.
const SECOND: __mmask32 = 0xaaaa_aaaa;

/// Pairs of rows in a call of [`Down::chunk`].
const PAIRS: usize = 4;

/// The values of the blocks of a chunk of a pair of rows.
type Tables = [__m512i; 4];

/// The tables of `B` blocks of both rows: two blocks a vector.
#[inline(always)]
unsafe fn tables<const B: usize>(book: __m512, [first, second]: [*const f32; 2]) -> Tables {
    // SAFETY: only called with a proof of AVX512-BF16 at hand; the caller vouches for `B` scales
    // of each row. Both types of vector are sixty-four bytes in which every pattern is valid.
    unsafe {
        let one = |scale: *const f32| _mm512_mul_ps(book, _mm512_set1_ps(*scale));
        let both = |low: *const f32, high: *const f32| {
            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(one(high), one(low)))
        };
        match B {
            1 => [both(first, second); 4],
            2 => {
                let (a, b) = (both(first, first.add(1)), both(second, second.add(1)));
                [a, b, a, b]
            }
            _ => [
                both(first, first.add(1)),
                both(first.add(2), first.add(3)),
                both(second, second.add(1)),
                both(second.add(2), second.add(3)),
            ],
        }
    }
}

/// What is added to the codes of each lane to choose a table, in every byte.
#[inline(always)]
unsafe fn choice<const B: usize>() -> __m512i {
    // SAFETY: only called with a proof of AVX-512 BW at hand.
    unsafe {
        let block = match B {
            1 => _mm512_setzero_si512(),
            // The lanes of a chunk belong to the blocks in turn.
            2 => _mm512_maskz_set1_epi32(0xff00, 0x1010_1010),
            _ => {
                let low = _mm512_maskz_set1_epi32(0xf0f0, 0x1010_1010);
                let high = _mm512_maskz_set1_epi32(0xff00, 0x2020_2020);
                _mm512_or_si512(low, high)
            }
        };
        match B {
            1 => _mm512_maskz_set1_epi16(SECOND, 0x1010),
            2 => _mm512_or_si512(block, _mm512_maskz_set1_epi16(SECOND, 0x2020)),
            _ => block,
        }
    }
}

/// The pairs of weights of four steps, from words with the codes of both rows.
#[inline(always)]
unsafe fn four<const B: usize>(tables: Tables, choice: __m512i, words: __m512i) -> [__m512bh; 4] {
    // SAFETY: only called with a proof of AVX-512 BW at hand.
    unsafe {
        let low = _mm512_set1_epi8(15);
        // (a & b) | c
        let even = _mm512_ternarylogic_epi32::<0xea>(words, low, choice);
        let shifted = _mm512_srli_epi16::<4>(words);
        let odd = _mm512_ternarylogic_epi32::<0xea>(shifted, low, choice);
        let codes = [even, odd, _mm512_srli_epi16::<8>(even), _mm512_srli_epi16::<8>(odd)];
        codes.map(|codes| {
            pairs(match B {
                1 => _mm512_permutexvar_epi16(codes, tables[0]),
                2 => _mm512_permutex2var_epi16(tables[0], codes, tables[1]),
                _ => {
                    let first = _mm512_permutex2var_epi16(tables[0], codes, tables[1]);
                    let second = _mm512_permutex2var_epi16(tables[2], codes, tables[3]);
                    _mm512_mask_blend_epi16(SECOND, first, second)
                }
            })
        })
    }
}

/// The codes of a pair of rows in the halves of each word: those that were in the lower half of
/// each word, or those that were in the upper half.
#[inline(always)]
unsafe fn mixed(first: __m512i, second: __m512i, upper: bool) -> __m512i {
    // SAFETY: only called with a proof of AVX-512 BW at hand.
    unsafe {
        if upper {
            _mm512_mask_blend_epi16(SECOND, _mm512_srli_epi32::<16>(first), second)
        } else {
            _mm512_mask_blend_epi16(SECOND, first, _mm512_slli_epi32::<16>(second))
        }
    }
}

/// A part of the vectors of a chunk: all, or the first or last four.
///
/// # Safety
/// As for [`Down::chunk`].
#[inline(always)]
unsafe fn part<const M: usize, const B: usize, const HALVES: usize>(
    d: Avx512Ext,
    book: __m512,
    rows: Rows,
    (gradients, stride): (*const bf16, usize),
    (sums, width): (*mut f32, usize),
    from: usize,
) {
    // SAFETY: the caller's; the proof implies AVX512-BF16.
    unsafe {
        let choice = choice::<B>();
        let mut acc = [[[d.splat(0.0); 4]; HALVES]; M];
        for (m, acc) in acc.iter_mut().enumerate() {
            for (i, acc) in acc.as_flattened_mut().iter_mut().enumerate() {
                *acc = d.load(sums.add(m * width + (4 * from + i) * 16));
            }
        }
        for pair in 0..PAIRS {
            let (first, second) = (rows.below(2 * pair), rows.below(2 * pair + 1));
            let tables = tables::<B>(book, [first.scales, second.scales]);
            let (a, b) = (d.words(first.packed), d.words(second.packed));
            for half in 0..HALVES {
                let weights = four::<B>(tables, choice, mixed(a, b, from + half == 1));
                for (m, acc) in acc.iter_mut().enumerate() {
                    let gradient = d.unit(gradients.add(m * stride + 2 * pair).cast());
                    for (acc, weights) in acc[half].iter_mut().zip(weights) {
                        *acc = d.dot(*acc, weights, gradient);
                    }
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            for (i, acc) in acc.as_flattened().iter().enumerate() {
                d.store(*acc, sums.add(m * width + (4 * from + i) * 16));
            }
        }
    }
}

impl Down for Avx512Ext {
    const ROWS: usize = 2 * PAIRS;
    type Book = __m512;

    #[inline(always)]
    fn book(self, values: &[f32; 16]) -> __m512 {
        // SAFETY: the proof implies AVX-512 F; `values` is sixteen numbers.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn chunk<const M: usize, const B: usize>(
        self,
        book: __m512,
        rows: Rows,
        gradients: (*const bf16, usize),
        sums: (*mut f32, usize),
    ) {
        // SAFETY: the caller's.
        unsafe {
            if M <= 2 {
                part::<M, B, 2>(self, book, rows, gradients, sums, 0);
            } else {
                // There are registers for half of the sums.
                part::<M, B, 1>(self, book, rows, gradients, sums, 0);
                part::<M, B, 1>(self, book, rows, gradients, sums, 1);
            }
        }
    }

    #[inline(always)]
    unsafe fn units<const B: usize>(self, book: __m512, rows: Rows, to: *mut u32, apart: usize) {
        // SAFETY: the caller's; the proof implies AVX512-BF16.
        unsafe {
            let (choice, second) = (choice::<B>(), rows.below(1));
            let tables = tables::<B>(book, [rows.scales, second.scales]);
            let (a, b) = (self.words(rows.packed), self.words(second.packed));
            for half in 0..2 {
                let weights = four::<B>(tables, choice, mixed(a, b, half == 1));
                for (i, weights) in weights.into_iter().enumerate() {
                    let v = 4 * half + i;
                    debug_assert!(v < VECTORS);
                    self.store_values(weights, to.add(v / 2 * apart + v % 2 * 16));
                }
            }
        }
    }
}
