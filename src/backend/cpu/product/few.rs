//! Few rows of activations: dot products along the rows of the weight, from the packed bytes.
//!
//! The weight is read once and decoded in registers. A scale is applied to the sum over its
//! block.

use super::ahead::AHEAD;
use super::lanes::{CODES, Dot};
use crate::backend::cpu::aligned::LINE;

/// The most rows of activations that share one pass over the weight.
pub const FEW: usize = 4;

/// Bytes of activations that stay in the first-level cache beside a stream of weights.
const HOT: usize = 34 * 1024;

/// As [`AHEAD`], but behind the next rows, where activations leave less room.
const FAR: usize = 4096;

/// Rows that meet a stretch of the activations before the next stretch comes near, where all of
/// them would not stay there.
const TALL: usize = 8;

/// Bytes of such a stretch: half of a first-level cache of 32 KB.
const STRETCH: usize = 16 * 1024;

/// Sums of a chunk where one would be waited for.
const WAYS: usize = 2;

/// The most blocks that share a chunk: 128 codes in blocks of 32.
const BLOCKS: usize = 4;

/// A product of up to [`FEW`] rows with a weight whose rows are whole blocks of codes.
pub struct Few<'a, X> {
    /// Codes of all rows, first of a pair high.
    pub packed: &'a [u8],
    /// Elements of a row; a multiple of the block size.
    pub columns: usize,
    /// Elements of a block: a power of two, at least 32.
    pub blocksize: usize,
    /// The codebook.
    pub values: [f32; 16],
    /// What the sums are multiplied by at the end.
    pub factor: f32,
    /// Rows of activations.
    pub m: usize,
    /// The activations: rows of whole chunks, see [`prepare`].
    pub x: &'a [X],
}

/// Puts a row of activations in the order in which chunks of `8 * lanes` codes are decoded: step
/// by step, word by word. `out` is padded with zeros to whole chunks.
#[inline(always)]
pub fn prepare<D: Dot>(row: &[D::X], lanes: usize, out: &mut [D::X]) {
    let chunk = CODES * lanes;
    let (whole, rest) = row.split_at(row.len() - row.len() % chunk);
    let (out, last) = out.split_at_mut(whole.len());
    if lanes == 1 {
        prepare_words::<D>(whole, out);
    } else {
        for (x, out) in whole.chunks_exact(chunk).zip(out.chunks_exact_mut(chunk)) {
            D::arrange(x, out);
        }
    }
    if !rest.is_empty() {
        let mut padded = vec![<D::X as bytemuck::Zeroable>::zeroed(); chunk];
        padded[..rest.len()].copy_from_slice(rest);
        D::arrange(&padded, last);
    }
}

/// Chunks of one word: an order of eight numbers that the compiler knows.
#[inline(always)]
fn prepare_words<D: Dot>(x: &[D::X], out: &mut [D::X]) {
    let per = CODES / D::STEPS;
    let (words, _) = x.as_chunks::<CODES>();
    let (out, _) = out.as_chunks_mut::<CODES>();
    for (word, out) in words.iter().zip(out) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = word[i % per * D::STEPS + ((i / per) ^ 1)];
        }
    }
}

impl<X> Few<'_, X> {
    /// Bytes of a row.
    const fn row_bytes(&self) -> usize {
        self.columns / 2
    }
    /// Whether the activations stay in the first-level cache.
    fn hot(&self) -> bool {
        size_of_val(self.x) <= HOT
    }
    /// Blocks of a row.
    pub const fn blocks(&self) -> usize {
        self.columns / self.blocksize
    }
}

/// `out[n][m]` for the rows of the weight from `first` on, as many as `out` holds, with their
/// scales.
#[inline(always)]
pub fn rows<D: Dot>(d: D, few: &Few<'_, D::X>, first: usize, scales: &[f32], out: &mut [f32]) {
    match few.m {
        1 => columns::<D, 1>(d, few, first, scales, out),
        2 => columns::<D, 2>(d, few, first, scales, out),
        3 => columns::<D, 3>(d, few, first, scales, out),
        _ => columns::<D, FEW>(d, few, first, scales, out),
    }
}

#[inline(always)]
fn columns<D: Dot, const M: usize>(
    d: D,
    few: &Few<'_, D::X>,
    first: usize,
    scales: &[f32],
    out: &mut [f32],
) {
    let chunk = CODES * D::LANES;
    if few.blocksize >= chunk {
        blocks::<D, M, 1>(d, few, first, scales, out);
    } else if few.blocksize * 2 == chunk {
        blocks::<D, M, 2>(d, few, first, scales, out);
    } else {
        blocks::<D, M, BLOCKS>(d, few, first, scales, out);
    }
}

#[inline(always)]
fn blocks<D: Dot, const M: usize, const B: usize>(
    d: D,
    few: &Few<'_, D::X>,
    first: usize,
    scales: &[f32],
    out: &mut [f32],
) {
    let (count, bytes, blocks) = (out.len() / M, few.row_bytes(), few.blocks());
    let chunks = few.columns.div_ceil(CODES * D::LANES);
    assert!(few.x.len() / M >= chunks * CODES * D::LANES);
    // Rows share the loads of activations; the more, the further apart the streams of codes.
    let together = match (D::LANES >= 16, M) {
        (true, 1) if few.hot() => 1,
        (true, _) if !few.hot() => 4,
        (true, _) => 2,
        (false, 1 | 2) => D::TOGETHER,
        (false, _) => 1,
    };
    let table = d.table(&few.values);
    let mut n = 0;
    if D::LANES < 16 && size_of_val(few.x) > STRETCH {
        while n < count {
            let packed = &few.packed[(first + n) * bytes..];
            let rows = TALL.min(count - n);
            tall::<D, M, B>(
                d,
                few,
                table,
                packed,
                &scales[n * blocks..],
                &mut out[n * M..][..rows * M],
            );
            n += rows;
        }
        return;
    }
    while n < count {
        let packed = &few.packed[(first + n) * bytes..];
        let (scales, out) = (&scales[n * blocks..], &mut out[n * M..]);
        n += match together.min(count - n) {
            4 => group::<D, M, B, 4>(d, few, table, packed, scales, out),
            2 | 3 => group::<D, M, B, 2>(d, few, table, packed, scales, out),
            _ => group::<D, M, B, 1>(d, few, table, packed, scales, out),
        };
    }
}

/// `R` rows of the weight; returns `R`.
#[inline(always)]
fn group<D: Dot, const M: usize, const B: usize, const R: usize>(
    d: D,
    few: &Few<'_, D::X>,
    table: D::Table,
    packed: &[u8],
    scales: &[f32],
    out: &mut [f32],
) -> usize {
    let (bytes, blocks) = (few.row_bytes(), few.blocks());
    assert!(packed.len() >= R * bytes && scales.len() >= R * blocks && out.len() >= R * M);
    let chunk = CODES * D::LANES;
    let mut acc = [[d.splat(0.0); M]; R];
    // SAFETY: whole chunks of codes, their scales and their activations lie inside the slices,
    // as counted here and in `blocks`; where less than a chunk is left of the slice it is copied,
    // with zeros behind it.
    unsafe {
        if few.hot() {
            chunks_of_rows::<D, M, B, R, true>(d, few, table, packed, scales, &mut acc);
        } else {
            chunks_of_rows::<D, M, B, R, false>(d, few, table, packed, scales, &mut acc);
        }
        if few.columns % chunk != 0 {
            last_chunk::<D, M, B, R>(d, few, table, packed, scales, &mut acc);
        }
    }
    for (acc, out) in acc.iter().zip(out.chunks_exact_mut(M)) {
        for (acc, out) in acc.iter().zip(out) {
            *out = d.sum(*acc) * few.factor;
        }
    }
    R
}

/// Up to [`TALL`] rows of the weight, as many as `out` holds, a stretch of the activations at a
/// time.
#[inline(always)]
fn tall<D: Dot, const M: usize, const B: usize>(
    d: D,
    few: &Few<'_, D::X>,
    table: D::Table,
    packed: &[u8],
    scales: &[f32],
    out: &mut [f32],
) {
    let (bytes, blocks, chunk) = (few.row_bytes(), few.blocks(), CODES * D::LANES);
    let (rows, chunks) = (out.len() / M, few.columns / chunk);
    assert!(rows <= TALL && packed.len() >= rows * bytes && scales.len() >= rows * blocks);
    let share = (few.blocksize / chunk).max(1).trailing_zeros();
    let wide = (STRETCH / (M * chunk * size_of::<D::X>())).max(1);
    // What comes behind these rows is fetched meanwhile, in the order in which it lies in memory.
    let mut next = packed.as_ptr().wrapping_add(rows * bytes);
    let next_scales = scales.as_ptr().wrapping_add(rows * blocks).cast::<u8>();
    for line in 0..(rows * blocks).div_ceil(LINE / size_of::<f32>()) {
        d.prefetch_far(next_scales.wrapping_add(line * LINE));
    }
    let mut sums = [[d.splat(0.0); M]; TALL];
    for from in (0..chunks).step_by(wide) {
        for (r, sums) in sums.iter_mut().take(rows).enumerate() {
            let mut acc = [*sums];
            for c in from..chunks.min(from + wide) {
                d.prefetch_far(next);
                next = next.wrapping_add(chunk / 2);
                // SAFETY: the assertion counts whole chunks and their scales; `blocks` does the
                // activations.
                unsafe {
                    let words = [d.words(packed.as_ptr().add(r * bytes + c * chunk / 2))];
                    let block = r * blocks + ((c * B) >> share);
                    let scale = [d.scales::<B>(scales.as_ptr().add(block))];
                    step(d, few, table, words, few.x.as_ptr().add(c * chunk), scale, &mut acc);
                }
            }
            [*sums] = acc;
        }
    }
    for (r, (sums, out)) in sums.iter().zip(out.chunks_exact_mut(M)).enumerate() {
        let mut acc = [*sums];
        if few.columns % chunk != 0 {
            let (packed, scales) = (&packed[r * bytes..], &scales[r * blocks..]);
            // SAFETY: the assertion counts a row; `blocks` counts activations of whole chunks.
            unsafe { last_chunk::<D, M, B, 1>(d, few, table, packed, scales, &mut acc) };
        }
        for (sum, out) in acc[0].iter().zip(out) {
            *out = d.sum(*sum) * few.factor;
        }
    }
}

/// What is left of `R` rows behind their whole chunks.
///
/// # Safety
/// There are `R` rows of codes and scales, and whole chunks of `M` rows of activations.
#[inline(always)]
unsafe fn last_chunk<D: Dot, const M: usize, const B: usize, const R: usize>(
    d: D,
    few: &Few<'_, D::X>,
    table: D::Table,
    packed: &[u8],
    scales: &[f32],
    acc: &mut [[D::F; M]; R],
) {
    let (bytes, blocks, chunk) = (few.row_bytes(), few.blocks(), CODES * D::LANES);
    let chunks = few.columns / chunk;
    // With blocks longer than a chunk, chunks share a scale.
    let share = (few.blocksize / chunk).max(1).trailing_zeros();
    // SAFETY: the caller's; where less than a chunk is left of the slice it is copied, with zeros
    // behind it.
    unsafe {
        let mut words = [d.words([0u8; 64].as_ptr()); R];
        let mut scale = [d.splat(0.0); R];
        for r in 0..R {
            let mut last = [0u8; 64];
            let at = r * bytes + chunks * chunk / 2;
            words[r] = if at + chunk / 2 <= packed.len() {
                // Codes of the next row meet activations of zero. A copy would have to wait
                // until it is written, in every row.
                d.words(packed.as_ptr().add(at))
            } else {
                let rest = &packed[at..(r + 1) * bytes];
                last[..rest.len()].copy_from_slice(rest);
                d.words(last.as_ptr())
            };
            let rest = &scales[r * blocks + ((chunks * B) >> share)..(r + 1) * blocks];
            scale[r] = d.first_scales::<B>(rest);
        }
        step(d, few, table, words, few.x.as_ptr().add(chunks * chunk), scale, acc);
    }
}

/// All whole chunks of `R` rows. `HOT`: see [`Few::hot`].
///
/// # Safety
/// There are `R` rows of codes and scales, and `M` of activations.
#[inline(always)]
unsafe fn chunks_of_rows<
    D: Dot,
    const M: usize,
    const B: usize,
    const R: usize,
    const HOT: bool,
>(
    d: D,
    few: &Few<'_, D::X>,
    table: D::Table,
    packed: &[u8],
    scales: &[f32],
    acc: &mut [[D::F; M]; R],
) {
    let (bytes, blocks, chunk) = (few.row_bytes(), few.blocks(), CODES * D::LANES);
    let share = (few.blocksize / chunk).max(1).trailing_zeros();
    if M > 1 {
        // Scales are a stream of their own, too thin to be fetched ahead without being asked for.
        let rows_ahead = if HOT { (AHEAD / bytes).max(R) } else { R };
        let next = scales.as_ptr().wrapping_add(rows_ahead * blocks).cast::<u8>();
        for line in 0..(R * blocks).div_ceil(LINE / size_of::<f32>()) {
            d.prefetch(next.wrapping_add(line * LINE));
        }
    }
    for c in 0..few.columns / chunk {
        let block = (c * B) >> share;
        // SAFETY: the caller vouches for whole rows; scales of a chunk are those of its blocks.
        unsafe {
            let mut words = [d.words(packed.as_ptr().add(c * chunk / 2)); R];
            let mut scale = [d.splat(0.0); R];
            for r in 0..R {
                // In the order in which rows lie in memory. What comes as near as the second-level
                // cache does not take the few places of lines on their way to the first; where
                // there is more to do for each line, places are free.
                let next = packed.as_ptr().wrapping_add((c * R + r) * (chunk / 2));
                if HOT && M == 1 {
                    d.prefetch_far(next.wrapping_add(AHEAD));
                } else if HOT {
                    d.prefetch(next.wrapping_add(AHEAD));
                } else {
                    d.prefetch(next.wrapping_add(R * bytes));
                    d.prefetch_far(next.wrapping_add(R * bytes + FAR));
                }
                words[r] = d.words(packed.as_ptr().add(r * bytes + c * chunk / 2));
                scale[r] = d.scales::<B>(scales.as_ptr().add(r * blocks + block));
            }
            step(d, few, table, words, few.x.as_ptr().add(c * chunk), scale, acc);
        }
    }
}

/// A chunk of each of `R` rows.
///
/// # Safety
/// A chunk of each of `M` rows of activations can be read from `x` on.
#[inline(always)]
unsafe fn step<D: Dot, const M: usize, const R: usize>(
    d: D,
    few: &Few<'_, D::X>,
    table: D::Table,
    mut words: [D::Words; R],
    x: *const D::X,
    scale: [D::F; R],
    acc: &mut [[D::F; M]; R],
) {
    let row = few.x.len() / M;
    let wide = D::LANES * (CODES / D::STEPS);
    // One sum would be waited for at every step, where a step is short and there is no other.
    let ways = if D::LANES < 16 && M == 1 { WAYS } else { 1 };
    let mut sums = [[[d.splat(0.0); WAYS]; M]; R];
    for s in 0..D::STEPS {
        let mut values = [d.decode(table, words[0]); R];
        for r in 0..R {
            values[r] = d.decode(table, words[r]);
            words[r] = d.next(words[r], s);
        }
        let mut x = x.wrapping_add(s * wide);
        for m in 0..M {
            // SAFETY: the caller vouches for a chunk of each row of activations.
            let activations = unsafe { d.activations(x) };
            for (sums, values) in sums.iter_mut().zip(values) {
                let sum = &mut sums[m][s % ways];
                *sum = if s < ways {
                    d.first(values, activations)
                } else {
                    d.dot(*sum, values, activations)
                };
            }
            x = x.wrapping_add(row);
        }
    }
    for ((acc, sums), scale) in acc.iter_mut().zip(sums).zip(scale) {
        for (acc, sum) in acc.iter_mut().zip(sums) {
            let mut all = sum[0];
            if ways == WAYS {
                all = d.add(all, sum[1]);
            }
            *acc = d.fma(all, scale, *acc);
        }
    }
}
