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

/// Spreads rows of `columns` activations, zeros for tokens that there are not.
pub fn spread(
    d: Avx512Ext,
    shape: Shape,
    threads: usize,
    (x, columns): (&[bf16], usize),
    out: &mut [u32],
) {
    let (quads, length) = (columns / QUAD, shape.quad());
    let out = Out::new(out, length);
    let together = quads.div_ceil(threads * PARTS);
    threads::share(threads, quads.div_ceil(together), |part| {
        for quad in part * together..quads.min((part + 1) * together) {
            // SAFETY: every part of the work writes rows of its own; `d` exists, so the machine
            // has the features.
            unsafe { one(d, shape, (&x[quad * QUAD..], columns), out.part(quad, 0, length)) }
        }
    });
}

/// A quarter of a chunk of all rows, which are `stride` apart.
#[target_feature(enable = "avx512f,avx512bw")]
fn one(d: Avx512Ext, shape: Shape, (x, stride): (&[bf16], usize), out: &mut [u32]) {
    // SAFETY: a table of sixty-four bytes.
    let places = unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) };
    let tokens = x.chunks(stride).map(|row| {
        let row = &row[..QUAD];
        // SAFETY: the slice is sixty-four bytes.
        _mm512_permutexvar_epi16(places, unsafe { _mm512_loadu_si512(row.as_ptr().cast()) })
    });
    match shape.pairs {
        1 => single(d, shape, tokens, out),
        2 => several::<2>(shape, tokens, out),
        _ => several::<4>(shape, tokens, out),
    }
}

/// One pair of each token in a vector.
#[inline(always)]
fn single(
    d: Avx512Ext,
    shape: Shape,
    mut tokens: impl Iterator<Item = __m512i>,
    out: &mut [u32],
) {
    for vector in 0..shape.vectors {
        // SAFETY: the proof implies AVX-512 F.
        let mut square = [unsafe { _mm512_setzero_si512() }; LANES];
        for (words, token) in square.iter_mut().zip(tokens.by_ref()) {
            *words = token;
        }
        for (i, pairs) in transposed(d.base(), square).into_iter().enumerate() {
            let to = &mut out[(i * shape.vectors + vector) * LANES..][..LANES];
            // SAFETY: the slice is a vector.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), pairs) };
        }
    }
}

/// `P` pairs of each token in a vector.
#[inline(always)]
fn several<const P: usize>(
    shape: Shape,
    tokens: impl Iterator<Item = __m512i>,
    out: &mut [u32],
) {
    for (t, token) in tokens.enumerate() {
        let mut words = [0u32; LANES];
        // SAFETY: the array is a vector; the caller holds a proof of AVX-512 F.
        unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), token) };
        let units = out[t * P..].chunks_mut(shape.vectors * LANES);
        for (pairs, unit) in words.as_chunks::<P>().0.iter().zip(units) {
            unit[..P].copy_from_slice(pairs);
        }
    }
}
