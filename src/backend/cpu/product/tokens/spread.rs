//! Activations in the order in which decoded pairs of weights meet them.
//!
//! A step of a chunk (`Dot`) holds sixteen pairs, four for each quarter. All steps of a quarter come
//! before the next quarter, since a block may end there:
//!
//! ```text
//! [quarter][step][pairs of a vector][vector][token][pair]
//! ```

#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;

use half::bf16;

use super::super::avx512::transposed;
use super::{LANES, PARTS, QUAD, Shape};
use crate::backend::cpu::avx512::Avx512Ext;
use crate::backend::cpu::product::out::Out;
use crate::backend::cpu::threads;

/// Where the activations of the pairs are among those of a quarter: in step `s` the elements
/// `8j + (s ^ 1)` and `8j + 4 + (s ^ 1)` of each of four words.
const PLACES: [u16; QUAD] = {
    let mut places = [0; QUAD];
    let mut i = 0;
    while i < QUAD {
        let (step, word, half) = (i / 8, i / 2 % 4, i % 2);
        places[i] = (8 * word + 4 * half + (step ^ 1)) as u16;
        i += 1;
    }
    places
};

/// Activations that are worth another thread: fewer are spread while it wakes up.
const WORTH: usize = 1 << 18;

/// Spreads rows of `columns` activations, zeros for tokens that there are not.
pub fn spread(
    d: Avx512Ext,
    shape: Shape,
    threads: usize,
    (x, columns): (&[bf16], usize),
    out: &mut [u32],
) {
    let (quads, length) = (columns / QUAD, shape.quad());
    let threads = threads.min(x.len() / WORTH + 1);
    let together = quads.div_ceil(if threads == 1 { 1 } else { threads * PARTS });
    let out = Out::new(out, length);
    threads::share(threads, quads.div_ceil(together), |part| {
        for quad in part * together..quads.min((part + 1) * together) {
            // SAFETY: every part of the work writes rows of its own; `d` exists, so the machine
            // has the features.
            unsafe { one(d, shape, (&x[quad * QUAD..], columns), out.part(quad, 0, length)) }
        }
    });
}

/// Where the lanes of two vectors are that lie pair by pair in vectors of two pairs of each token.
const TWO: [[u32; LANES]; 2] = {
    let mut places = [[0; LANES]; 2];
    let mut i = 0;
    while i < 2 * LANES {
        places[i / LANES][i % LANES] = (i / 2 + i % 2 * LANES) as u32;
        i += 1;
    }
    places
};

/// A quarter of a chunk of all rows, which are `stride` apart.
#[target_feature(enable = "avx512f,avx512bw")]
fn one(d: Avx512Ext, shape: Shape, (x, stride): (&[bf16], usize), out: &mut [u32]) {
    // SAFETY: tables of sixty-four bytes.
    let (places, two) = unsafe {
        let two = TWO.map(|places| _mm512_loadu_si512(places.as_ptr().cast()));
        (_mm512_loadu_si512(PLACES.as_ptr().cast()), two)
    };
    let mut rows = x.chunks(stride);
    for first in (0..shape.vectors).step_by(shape.pairs) {
        let mut square = [_mm512_setzero_si512(); LANES];
        for (words, row) in square.iter_mut().zip(rows.by_ref()) {
            let row = &row[..QUAD];
            // SAFETY: the slice is sixty-four bytes.
            let row = unsafe { _mm512_loadu_si512(row.as_ptr().cast()) };
            *words = _mm512_permutexvar_epi16(places, row);
        }
        let square = transposed(d.base(), square);
        let mut put = |unit: usize, vector: usize, words: __m512i| {
            let to = &mut out[(unit * shape.vectors + vector) * LANES..][..LANES];
            // SAFETY: the slice is a vector.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), words) };
        };
        if shape.pairs == 1 {
            for (unit, words) in square.into_iter().enumerate() {
                put(unit, first, words);
            }
            continue;
        }
        for (unit, words) in square.as_chunks::<2>().0.iter().enumerate() {
            for (vector, two) in (first..shape.vectors).zip(two) {
                put(unit, vector, _mm512_permutex2var_epi32(words[0], two, words[1]));
            }
        }
    }
}
