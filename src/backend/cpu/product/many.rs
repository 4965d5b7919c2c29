//! Many rows of activations: panels of decoded weights, and tiles of results in registers.
//!
//! A panel holds `2 * LANES` rows of the weight, rows in lanes: unit by unit (a number, or a pair
//! of narrow ones), `2 * LANES` units each. It is small enough for the first-level cache and is
//! used for all rows of activations before the next one is made.

use std::ops::Range;

use super::ahead::Ahead;
use super::lanes::{CODES, Dot, panel_rows};
use super::tiles::{Coded, HIGH_TILE, Panel, TILE, Tiles, To, Unscaled, tiles};
use crate::backend::cpu::aligned::Aligned;

/// Elements of a row of the weight in a panel of decoded weights; a multiple of any chunk.
const WIDTH: usize = 256;

/// Elements of a row that are decoded at a time where they are not codes; a multiple of [`WIDTH`].
const STRETCH: usize = 2048;

/// Elements from one row of them to the next: a power of two would share few sets of the cache.
const DENSE_ROW: usize = STRETCH + 32;

/// Bytes of a panel of whole rows, at most: it stays in the second-level cache, and sums are never
/// put away to be taken up again.
const WHOLE: usize = 256 * 1024;

/// The same where there are one or two tiles, or codes are decoded for each of them: it stays in
/// the first-level cache.
const WHOLE_NEAR: usize = 32 * 1024;

/// As [`WIDTH`], where codes are decoded for each tile and there are only one or two of them: to begin
/// a panel costs more than what could be done beside its transposition.
const CODED_WIDTH: usize = 512;

/// Strips of [`panel_rows`] rows that meet a part of the activations while it is near.
pub const STRIPS: usize = 4;

/// Bytes of such a part: a quarter of a second-level cache of a megabyte, with room for as much
/// again for the sums of [`STRIPS`].
const NEAR: usize = 256 * 1024;

/// The most rows of activations for which codes are decoded again for every low tile, while the
/// sums keep the processor busy, and not once into a panel. For high tiles that is always quicker.
const ON_THE_FLY: usize = 2 * TILE;

/// Where the rows of a weight come from.
pub enum Source<'a, X> {
    /// Rows of whole blocks of four-bit codes.
    Codes(Codes<'a>),
    /// Anything that can be decoded: `f(row, first column, out)`.
    Dense(&'a (dyn Fn(usize, usize, &mut [X]) + Sync)),
}

/// Rows of whole blocks of four-bit codes.
pub struct Codes<'a> {
    /// Codes of all rows, first of a pair high.
    pub packed: &'a [u8],
    /// Elements of a block: a power of two, at least 32.
    pub blocksize: usize,
    /// The codebook.
    pub values: [f32; 16],
    /// What every scale is multiplied by.
    pub factor: f32,
    /// Writes the scales from block `first` on.
    pub scales: &'a (dyn Fn(usize, &mut [f32]) + Sync),
    /// The scales, where they need no decoding.
    pub plain: &'a [f32],
}

impl Codes<'_> {
    /// The bytes of the scales of `count` rows from `first` on, or of as many as there are.
    fn scale_bytes(&self, first: usize, count: usize, blocks: usize) -> &[u8] {
        let rest = self.plain.get(first * blocks..).unwrap_or_default();
        bytemuck::cast_slice(&rest[..rest.len().min(count * blocks)])
    }
}

/// A product of many rows of activations.
pub struct Many<'a, X> {
    /// The weight.
    pub source: Source<'a, X>,
    /// Elements of a row of the weight.
    pub columns: usize,
    /// Rows of activations.
    pub m: usize,
    /// Rows of `stride` activations: where codes are decoded for each tile or scales come late
    /// ([`late`]) in the order of their steps, else as they are, zeros behind the last one.
    pub x: &'a [X],
    /// Activations of a row.
    pub stride: usize,
    /// Takes sums that are done: of which rows of the weight, from which row of activations on, and
    /// [`panel_rows`] sums of each.
    pub finish: &'a (dyn Fn(Range<usize>, usize, &[f32]) + Sync),
}

/// Memory of one thread.
#[derive(Default)]
pub struct Scratch<X> {
    /// Words of codes, rows in lanes.
    words: Aligned<u32>,
    panel: Aligned<u32>,
    dense: Aligned<X>,
    row_scales: Aligned<f32>,
    /// The scales of all blocks of the rows, rows in lanes.
    scales: Aligned<f32>,
    /// Sums: `m` rows of [`panel_rows`] for each strip, or those of a tile.
    sums: Aligned<f32>,
}

/// Whether scales are applied to sums.
pub const fn late<D: Dot>(m: usize) -> bool {
    D::LATE && m < D::ROUNDED_FROM
}

/// The products with `count` rows of the weight from `first` on, at most [`STRIPS`] times
/// [`panel_rows`].
#[inline(always)]
pub fn strips<D: Dot>(
    d: D,
    many: &Many<'_, D::X>,
    first: usize,
    count: usize,
    scratch: &mut Scratch<D::X>,
) {
    match &many.source {
        Source::Codes(codes) => coded_strips(d, many, codes, (first, count), scratch),
        Source::Dense(decode) => {
            let rows = panel_rows::<D>();
            for at in (first..first + count).step_by(rows) {
                dense_strip(d, many, *decode, (at, rows.min(first + count - at)), scratch);
            }
        }
    }
}

/// Columns that are multiplied before the next ones are: for each of the strips the same part of
/// all rows of activations, which stays in the second-level cache.
fn depth<D: Dot>(m: usize, most: usize) -> usize {
    let fit = NEAR / (m * size_of::<D::X>());
    (fit / WIDTH * WIDTH).clamp(WIDTH, most)
}

#[inline(always)]
fn coded_strips<D: Dot>(
    d: D,
    many: &Many<'_, D::X>,
    codes: &Codes<'_>,
    (first, count): (usize, usize),
    scratch: &mut Scratch<D::X>,
) {
    let (rows, per) = (panel_rows::<D>(), CODES / D::STEPS);
    let strips = count.div_ceil(rows);
    let blocks = many.columns / codes.blocksize;
    let padded = blocks.next_multiple_of(D::LANES);
    scratch.scales.resize(strips * rows * padded);
    for strip in 0..strips {
        let present = rows.min(count - strip * rows);
        lane_scales(d, codes, blocks, (first, present, strip), scratch);
    }
    let table = d.table(&codes.values);
    let high = <Coded<'_, D> as Tiles<D>>::ROWS == HIGH_TILE;
    let late = late::<D>(many.m);
    let on_the_fly = late && (high || many.m <= ON_THE_FLY);
    let wide = on_the_fly && many.m <= 2 * HIGH_TILE;
    let bytes = if on_the_fly { many.columns / 2 } else { many.columns * size_of::<D::X>() };
    let near = on_the_fly || many.m <= 2 * HIGH_TILE;
    let whole = bytes * rows <= if near { WHOLE_NEAR } else { WHOLE };
    let most = match () {
        () if whole => many.columns,
        () => depth::<D>(many.m, if wide { CODED_WIDTH } else { WIDTH }),
    };
    // Sums of a tile, or of all of them.
    let of_strip = if whole { HIGH_TILE.min(many.m) } else { many.m } * rows;
    scratch.sums.resize(if whole { of_strip } else { strips * of_strip });
    let scale_bytes = codes.scale_bytes(first + count, count, blocks);
    for k in (0..many.columns).step_by(most) {
        let width = most.min(many.columns - k);
        for strip in 0..strips {
            let at = first + strip * rows;
            let present = rows.min(count - strip * rows);
            transpose_codes(d, codes, many.columns, (at, present), (k, width), scratch);
            let segment = codes.blocksize.min(width);
            let scales = &scratch.scales[strip * rows * padded + k / codes.blocksize * rows..];
            let coded = Coded {
                words: &scratch.words[..width / CODES * rows],
                segment: segment / CODES,
                scales,
                table,
            };
            let ahead = {
                // The next strip at these columns, or the first one at the next, or the next rows.
                let (row, k) = match () {
                    () if strip + 1 < strips => (at + rows, k),
                    () if k + width < many.columns => (first, k + width),
                    () => (first + count, 0),
                };
                let width = most.min(many.columns - k);
                let scales = part(scale_bytes, (k, width), many.columns, (strip, strips));
                let packed = (codes.packed, many.columns / 2);
                Ahead::new(packed, (row, rows), (k / 2, width / 2), scales)
            };
            let (x, stride, m) = (&many.x[k..], many.stride, many.m);
            let sums = if whole { 0 } else { strip * of_strip };
            let finish = |i: usize, sums: &[f32]| (many.finish)(at..at + present, i, sums);
            let to = To {
                sums: &mut scratch.sums[sums..sums + of_strip],
                fresh: k == 0,
                done: whole.then_some(&finish),
            };
            if on_the_fly {
                tiles(d, &coded, x, stride, m, ahead, to);
            } else {
                scratch.panel.resize(width / per * rows);
                decode(d, &coded, (!late).then_some(&codes.values), &mut scratch.panel);
                let units = &scratch.panel[..];
                if late {
                    let panel = Unscaled { units, segment: segment / per, scales };
                    tiles(d, &panel, x, stride, m, ahead, to);
                } else {
                    tiles(d, &Panel { units }, x, stride, m, ahead, to);
                }
            }
        }
    }
    if !whole {
        for (strip, sums) in scratch.sums.chunks_exact(of_strip).enumerate() {
            let at = first + strip * rows;
            (many.finish)(at..(at + rows).min(first + count), 0, sums);
        }
    }
}

/// The share of `bytes` that belongs to `width` of `columns` columns and one of some strips.
fn part(
    bytes: &[u8],
    (k, width): (usize, usize),
    columns: usize,
    (strip, strips): (usize, usize),
) -> &[u8] {
    let cut = |strip: usize| bytes.len() * (k * strips + width * strip) / (columns * strips);
    bytes.get(cut(strip)..cut(strip + 1)).unwrap_or_default()
}

#[inline(always)]
fn dense_strip<D: Dot>(
    d: D,
    many: &Many<'_, D::X>,
    decode: &dyn Fn(usize, usize, &mut [D::X]),
    (first, count): (usize, usize),
    scratch: &mut Scratch<D::X>,
) {
    scratch.sums.resize(many.m * panel_rows::<D>());
    for k in (0..many.columns).step_by(WIDTH) {
        let width = WIDTH.min(many.columns - k);
        if k % STRETCH == 0 {
            let width = STRETCH.min(many.columns - k);
            decode_dense(d, decode, (first, count), (k, width), scratch);
        }
        from_dense(d, k % STRETCH, width, scratch);
        let panel = Panel { units: &scratch.panel };
        let (x, stride, m) = (&many.x[k..], many.stride, many.m);
        let to = To { sums: &mut scratch.sums, fresh: k == 0, done: None };
        tiles(d, &panel, x, stride, m, Ahead::NOTHING, to);
    }
    (many.finish)(first..first + count, 0, &scratch.sums);
}

/// The scales of the `count` rows of a strip, rows in lanes. Rows that are not there get any.
#[inline(always)]
fn lane_scales<D: Dot>(
    d: D,
    codes: &Codes<'_>,
    blocks: usize,
    (first, count, strip): (usize, usize, usize),
    scratch: &mut Scratch<D::X>,
) {
    let rows = panel_rows::<D>();
    let padded = blocks.next_multiple_of(D::LANES);
    scratch.row_scales.resize(rows * padded);
    let first = first + strip * rows;
    let whole = padded == blocks && count == rows;
    let (from, stride) = match codes.plain.get(first * blocks..(first + rows) * blocks) {
        Some(scales) if whole => (scales, blocks),
        _ => {
            scratch.row_scales.resize(rows * padded);
            for r in 0..count {
                let row = &mut scratch.row_scales[r * padded..][..blocks];
                (codes.scales)((first + r) * blocks, row);
            }
            (&scratch.row_scales[..], padded)
        }
    };
    let scales = &mut scratch.scales[strip * rows * padded..][..rows * padded];
    for half in 0..2 {
        for block in (0..padded).step_by(D::LANES) {
            // SAFETY: both squares are inside `rows` rows of `padded` words.
            unsafe {
                let from = from.as_ptr().add(half * D::LANES * stride + block);
                let to = scales.as_mut_ptr().add(block * rows + half * D::LANES);
                d.transpose(from.cast(), stride, to.cast(), rows);
            }
        }
    }
    if codes.factor != 1.0 {
        for scales in scales.chunks_exact_mut(D::LANES) {
            // SAFETY: the chunk is a vector.
            unsafe {
                let scaled = d.mul(d.load(scales.as_ptr()), d.splat(codes.factor));
                d.store(scaled, scales.as_mut_ptr());
            }
        }
    }
}

/// Puts words of codes where tiles want them: rows in lanes.
#[inline(always)]
fn transpose_codes<D: Dot>(
    d: D,
    codes: &Codes<'_>,
    columns: usize,
    (first, count): (usize, usize),
    (k, width): (usize, usize),
    scratch: &mut Scratch<D::X>,
) {
    let (rows, lanes) = (panel_rows::<D>(), D::LANES);
    let (row_bytes, chunk) = (columns / 2, CODES * lanes);
    scratch.words.resize(width.next_multiple_of(chunk) / CODES * rows);
    for c in (0..width).step_by(chunk) {
        let length = chunk.min(width - c);
        for half in 0..2 {
            let present = count.saturating_sub(half * lanes).min(lanes);
            if present == 0 {
                continue;
            }
            let at = (first + half * lanes) * row_bytes + k / 2 + c / 2;
            let to = &mut scratch.words[c / CODES * rows + half * lanes..];
            assert!(to.len() >= (lanes - 1) * rows + lanes);
            // Behind the end of a row that is no whole chunk lie codes that no one reads.
            let whole = codes.packed.get(at..at + (lanes - 1) * row_bytes + chunk / 2);
            // SAFETY: a chunk of each of `lanes` rows is inside `packed`, or was copied to a square
            // of at most 16 by 16 words; the assertion counts what is written. Rows of whole
            // blocks are multiples of sixteen bytes.
            unsafe {
                if present == lanes
                    && let Some(from) = whole
                {
                    d.transpose(from.as_ptr().cast(), row_bytes / 4, to.as_mut_ptr(), rows);
                } else {
                    let mut square = [0u32; 256];
                    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut square);
                    for r in 0..present {
                        let row = &codes.packed[at + r * row_bytes..][..length / 2];
                        bytes[r * chunk / 2..][..length / 2].copy_from_slice(row);
                    }
                    d.transpose(square.as_ptr(), lanes, to.as_mut_ptr(), rows);
                }
            }
        }
    }
}

/// Decodes a panel: scaled and in the order of the elements, if the codebook is given for it.
#[inline(always)]
fn decode<D: Dot>(d: D, coded: &Coded<'_, D>, scaled: Option<&[f32; 16]>, panel: &mut [u32]) {
    let (rows, lanes) = (panel_rows::<D>(), D::LANES);
    let words = coded.words.chunks(coded.segment * rows);
    let units = panel.chunks_mut(coded.segment * rows * D::STEPS);
    for ((words, units), scales) in words.zip(units).zip(coded.scales.chunks_exact(rows)) {
        let words = words.chunks_exact(rows);
        for (word, units) in words.zip(units.chunks_exact_mut(D::STEPS * rows)) {
            for half in 0..2 {
                // SAFETY: `rows` words and scales, and as many units of each step.
                unsafe {
                    let scale = d.load(scales.as_ptr().add(half * lanes));
                    let mut codes = d.words(word.as_ptr().add(half * lanes).cast());
                    let to = units.as_mut_ptr().add(half * lanes);
                    if let Some(values) = scaled {
                        d.store_scaled(values, coded.table, codes, scale, to, rows);
                        continue;
                    }
                    for s in 0..D::STEPS {
                        d.store_values(d.decode(coded.table, codes), to.add(s * rows));
                        codes = d.next(codes, s);
                    }
                }
            }
        }
    }
}

/// Decodes a stretch of rows.
#[inline(always)]
fn decode_dense<D: Dot>(
    _: D,
    decode: &dyn Fn(usize, usize, &mut [D::X]),
    (first, count): (usize, usize),
    (k, width): (usize, usize),
    scratch: &mut Scratch<D::X>,
) {
    let zero = <D::X as bytemuck::Zeroable>::zeroed();
    scratch.dense.resize(panel_rows::<D>() * DENSE_ROW);
    for r in 0..count {
        let row = &mut scratch.dense[r * DENSE_ROW..(r + 1) * DENSE_ROW];
        decode(first + r, k, &mut row[..width]);
        // An odd width ends in half a pair.
        row[width..=width].fill(zero);
    }
}

/// Turns a part of the stretch, from element `at` of each row on, into the panel.
#[inline(always)]
fn from_dense<D: Dot>(d: D, at: usize, width: usize, scratch: &mut Scratch<D::X>) {
    let (rows, per) = (panel_rows::<D>(), CODES / D::STEPS);
    let stride = DENSE_ROW / per;
    let units = width.div_ceil(per);
    scratch.panel.resize(WIDTH / per * rows);
    for half in 0..2 {
        for unit in (0..units).step_by(D::LANES) {
            // SAFETY: both squares are inside their buffers, whose rows are whole multiples of
            // vectors.
            unsafe {
                let from = scratch.dense.as_ptr().cast::<u32>();
                let from = from.add(half * D::LANES * stride + at / per + unit);
                let to = scratch.panel.as_mut_ptr().add(unit * rows + half * D::LANES);
                d.transpose(from, stride, to, rows);
            }
        }
    }
    scratch.panel.resize(units * rows);
}
