//! Strips of some rows of the weight against all tokens.

#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;
use std::sync::atomic::{Ordering, compiler_fence};

use super::super::ahead::{AHEAD, Ahead, Steps};
use super::super::avx512::transposed;
use super::super::bf16::pairs;
use super::super::lanes::{Dot, Vector};
use super::{CHUNK, LANES, PAIRS, QUAD, Shape, Tokens};
use crate::backend::cpu::aligned::Aligned;
use crate::backend::cpu::avx512::Avx512Ext;

/// Steps of a chunk, and quarters of it.
const STEPS: usize = 4;

/// Words of a decoded chunk of a row.
const WORDS: usize = STEPS * LANES;

/// Memory of one thread.
#[derive(Default)]
pub struct Scratch {
    /// Two chunks of each row of a strip: one that is multiplied, and one that is decoded.
    words: Aligned<u32>,
    /// Vectors of sums of each row.
    sums: Aligned<f32>,
    /// Sums, a token a row.
    columns: Aligned<f32>,
}

/// Sums for `count` rows of the weight from `first` on, into `scratch`; `scales` are those from
/// row [`Tokens::lowest`] on.
pub fn strips(
    d: Avx512Ext,
    tokens: &Tokens<'_>,
    (first, count): (usize, usize),
    scales: &[f32],
    scratch: &mut Scratch,
) {
    macro_rules! shapes {
        ($(($rows:literal, $pairs:literal, $vectors:literal)),+) => {
            match tokens.shape {
                $(
                    // SAFETY: `d` exists, so the machine has the features.
                    Shape { rows: $rows, pairs: $pairs, vectors: $vectors } => unsafe {
                        part::<$rows, $pairs, $vectors>(d, tokens, (first, count), scales, scratch);
                    },
                )+
                shape => unreachable!("{shape:?}"),
            }
        };
    }
    shapes!((8, 2, 2), (8, 1, 2), (8, 1, 3));
}

/// A chunk of each row of a strip in memory.
#[derive(Clone, Copy)]
struct Codes<'a> {
    packed: &'a [u8],
    row_bytes: usize,
    /// Bytes of the chunk that are there.
    mask: __mmask64,
}

impl Codes<'_> {
    /// Decodes the chunk of row `row`.
    ///
    /// # Safety
    /// Only called with a proof of AVX-512 BW at hand; the row is inside, and so are its words.
    #[inline(always)]
    unsafe fn decode(&self, d: Avx512Ext, table: __m512i, row: usize, to: *mut u32) {
        // SAFETY: the caller's; bytes that are not there are not read.
        unsafe {
            let from = self.packed.as_ptr().add(row * self.row_bytes);
            let mut codes = _mm512_maskz_loadu_epi8(self.mask, from.cast());
            let to = to.add(row * WORDS);
            for step in 0..STEPS {
                d.store_values(d.decode(table, codes), to.add(step * LANES));
                codes = d.next(codes, step);
            }
        }
    }
}

#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx512vbmi,avx2,fma,f16c"
)]
fn part<const R: usize, const P: usize, const G: usize>(
    d: Avx512Ext,
    tokens: &Tokens<'_>,
    (first, count): (usize, usize),
    scales: &[f32],
    scratch: &mut Scratch,
) {
    let (columns, row_bytes, blocks) = (tokens.columns, tokens.columns / 2, tokens.blocks());
    let (lowest, width) = (tokens.lowest(first), tokens.width());
    let strips = count.div_ceil(R);
    let steps = strips * columns.div_ceil(width);
    scratch.sums.resize((strips * R).next_multiple_of(LANES) * G * LANES);
    scratch.words.resize(2 * R * WORDS);
    let (mut now, mut then) = scratch.words.split_at_mut(R * WORDS);
    let table = d.table(&tokens.values);
    // The first row and column of a step: all strips meet a part of the activations.
    let place = |step: usize| match step.checked_sub(steps) {
        None => (tokens.lowest(first + step % strips * R), step / strips * width),
        Some(later) => (first + count + later * R, 0),
    };
    let codes = |(row, k): (usize, usize)| {
        let there = (columns - k).min(CHUNK) / 2;
        let mask = u64::MAX >> (64 - there);
        Codes { packed: &tokens.packed[row * row_bytes + k / 2..], row_bytes, mask }
    };
    let lead = AHEAD.div_ceil(R * width.min(columns) / 2);
    for row in 0..R {
        // SAFETY: a strip of rows begins at `lowest`, and there are words for it.
        unsafe { codes(place(0)).decode(d, table, row, now.as_mut_ptr()) };
    }
    for step in 0..steps {
        let (row, start) = place(step);
        let end = (start + width).min(columns);
        let mut ahead = {
            let (row, k) = place(step + lead);
            let (rows, width) = ((row, R), width.min(columns - k));
            let codes = Ahead::new((tokens.packed, row_bytes), rows, (k / 2, width / 2), &[]);
            // Four bytes each.
            let (at, width) = (4 * k / tokens.blocksize, 4 * width / tokens.blocksize);
            let scales = (bytemuck::cast_slice(tokens.plain), 4 * blocks);
            let scales = Ahead::new(scales, rows, (at, width), &[]);
            [codes, scales].map(|ahead| ahead.steps((end - start) / QUAD))
        };
        let sums = &mut scratch.sums[step % strips * R * G * LANES..][..R * G * LANES];
        for k in (start..end).step_by(CHUNK) {
            let next = match k + CHUNK {
                k if k < end => (row, k),
                // The last one decodes what nobody needs.
                _ => place((step + 1).min(steps - 1)),
            };
            let chunk = Chunk {
                words: now,
                next: codes(next),
                x: &tokens.x[k / QUAD * tokens.shape.quad()..],
                scales: &scales[(row - lowest) * blocks + k / tokens.blocksize..],
                blocks,
                quads: (end - k).min(CHUNK) / QUAD,
                segment: (tokens.blocksize / QUAD).min(STEPS),
                table,
            };
            // SAFETY: the slices begin where the chunk does and hold what belongs to `R` rows.
            unsafe { chunk.multiply::<R, P, G>(d, then, &mut ahead, sums.as_mut_ptr()) };
            std::mem::swap(&mut now, &mut then);
        }
    }
    // Those of a strip that began before its place.
    let shift = (first + (strips - 1) * R).saturating_sub(tokens.rows - R);
    let strip = (strips - 1) * R * G * LANES;
    scratch.sums.copy_within(strip + shift * G * LANES..strip + R * G * LANES, strip);
}

/// A chunk of a strip.
struct Chunk<'a> {
    /// Decoded weights.
    words: &'a [u32],
    /// What is decoded meanwhile.
    next: Codes<'a>,
    x: &'a [u32],
    scales: &'a [f32],
    /// Blocks of a row.
    blocks: usize,
    /// Quarters that are there.
    quads: usize,
    /// Quarters that share their scales.
    segment: usize,
    table: __m512i,
}

impl Chunk<'_> {
    /// # Safety
    /// Only called with a proof of AVX512-BF16 at hand. There are words, scales and sums of `R`
    /// rows, `G` vectors of activations for each unit, and room for words of `R` rows.
    #[inline(always)]
    unsafe fn multiply<const R: usize, const P: usize, const G: usize>(
        &self,
        d: Avx512Ext,
        then: &mut [u32],
        ahead: &mut [Steps<'_>; 2],
        sums: *mut f32,
    ) {
        let per = const { R.div_ceil(STEPS) };
        let (mut x, mut scales) = (self.x.as_ptr(), self.scales.as_ptr());
        let mut quad = 0;
        // SAFETY: the caller's.
        unsafe {
            while quad < self.quads {
                let mut acc = [[d.splat(0.0); G]; R];
                for _ in 0..self.segment {
                    for i in 0..per {
                        let row = quad * per + i;
                        if R.is_multiple_of(STEPS) || row < R {
                            self.next.decode(d, self.table, row, then.as_mut_ptr());
                        }
                    }
                    for ahead in ahead.iter_mut() {
                        ahead.fetch(d);
                    }
                    let words = self.words.as_ptr().add(quad * STEPS);
                    for unit in 0..const { PAIRS / P } {
                        let mut activations = [d.activations(x.cast()); G];
                        for (g, activations) in activations.iter_mut().enumerate() {
                            *activations = d.activations(x.add(g * LANES).cast());
                        }
                        x = x.add(G * LANES);
                        let words = words.add(unit * P / STEPS * LANES + unit * P % STEPS);
                        for (row, acc) in acc.iter_mut().enumerate() {
                            let weights = broadcast::<P>(words.add(row * WORDS));
                            for (acc, activations) in acc.iter_mut().zip(activations) {
                                *acc = d.dot(*acc, activations, weights);
                            }
                        }
                    }
                    quad += 1;
                }
                // Else the compiler carries sums to the next segment through the stack.
                compiler_fence(Ordering::SeqCst);
                for (row, acc) in acc.into_iter().enumerate() {
                    let scale = d.splat(*scales.add(row * self.blocks));
                    for (g, acc) in acc.into_iter().enumerate() {
                        let sum = sums.add((row * G + g) * LANES);
                        d.store(d.fma(acc, scale, d.load(sum)), sum);
                    }
                }
                scales = scales.add(1);
            }
            for row in quad * per..R {
                self.next.decode(d, self.table, row, then.as_mut_ptr());
            }
        }
    }
}

/// `P` pairs in turns in all lanes.
///
/// # Safety
/// Only called with a proof of AVX-512 F at hand; the pairs can be read.
#[inline(always)]
unsafe fn broadcast<const P: usize>(from: *const u32) -> __m512bh {
    // SAFETY: the caller's.
    pairs(unsafe {
        match P {
            1 => _mm512_set1_epi32(from.cast::<i32>().read_unaligned()),
            _ => _mm512_set1_epi64(from.cast::<i64>().read_unaligned()),
        }
    })
}

/// The lanes of two vectors with an even number, and those with an odd one.
const EVEN_ODD: [[u32; LANES]; 2] = {
    let mut places = [[0; LANES]; 2];
    let mut i = 0;
    while i < 2 * LANES {
        places[i % 2][i / 2] = i as u32;
        i += 1;
    }
    places
};

/// The sums of [`strips`] times `factor`: rows of as many as `count` asks for, rounded up, one for
/// each of `m` tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn by_tokens(
    d: Avx512Ext,
    shape: Shape,
    (m, count): (usize, usize),
    factor: f32,
    scratch: &mut Scratch,
) {
    let padded = count.next_multiple_of(LANES);
    let of_row = shape.vectors * LANES;
    scratch.columns.resize(m * padded);
    // SAFETY: tables of sixty-four bytes.
    let [even, odd] = EVEN_ODD.map(|places| unsafe { _mm512_loadu_si512(places.as_ptr().cast()) });
    for row in (0..count).step_by(LANES) {
        for (group, first) in (0..shape.vectors).step_by(shape.pairs).enumerate() {
            let sums = &scratch.sums[row * of_row..][..LANES * of_row];
            let mut square = [_mm512_setzero_si512(); LANES];
            for (tokens, sums) in square.iter_mut().zip(sums.chunks_exact(of_row)) {
                let mut vectors = sums[first * LANES..].chunks_exact(LANES).map(|sums| {
                    // SAFETY: the chunk is a vector.
                    unsafe { d.load(sums.as_ptr()) }
                });
                let mut next = || vectors.next().unwrap_or(_mm512_setzero_ps());
                let mut sum = next();
                if shape.pairs == 2 {
                    let (low, high) = (sum, next());
                    let half = |places| _mm512_permutex2var_ps(low, places, high);
                    sum = _mm512_add_ps(half(even), half(odd));
                }
                *tokens = _mm512_castps_si512(_mm512_mul_ps(sum, _mm512_set1_ps(factor)));
            }
            let tokens = transposed(d.base(), square);
            for (token, rows) in (group * LANES..m).zip(tokens) {
                let to = &mut scratch.columns[token * padded + row..][..LANES];
                // SAFETY: the slice is a vector.
                unsafe { d.store(_mm512_castsi512_ps(rows), to.as_mut_ptr()) };
            }
        }
    }
}

/// [`by_tokens`]
pub fn rows_of_tokens(
    d: Avx512Ext,
    shape: Shape,
    (m, count): (usize, usize),
    factor: f32,
    scratch: &mut Scratch,
) -> &[f32] {
    // SAFETY: `d` exists, so the machine has the features.
    unsafe { by_tokens(d, shape, (m, count), factor, scratch) };
    &scratch.columns
}
