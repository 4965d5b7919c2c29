//! More than a few activations and a four-bit weight: a strip of `2 * LANES` rows becomes integers
//! in which lanes are rows, a group of columns at a time, and a tile of them and some activations
//! stays in registers.
//!
//! A group is decoded while the one before it is multiplied, piece by piece between steps of the
//! tiles: decoding keeps other units of the processor busy than the products do. The strip behind
//! is fetched in the same gaps, into the second-level cache.

use std::cell::Cell;
use std::marker::PhantomData;

use super::dot::Dot;
use super::job::{Four, Staged};
use super::panels::write;
use crate::backend::cpu::aligned::{Aligned, LINE};
use crate::backend::cpu::product::Out;
use crate::backend::cpu::{Lanes, scales};
use crate::quant::integer::GROUP;
use crate::tensor::Scales;

/// Rows of activations that one call takes: their sums fit the first-level cache.
pub const TOKENS: usize = 128;

/// Columns between two gaps: a multiple of four that divides any unit.
const GAP: usize = 16;

/// Bytes of a row that are decoded at a time, and their columns.
const PIECE: usize = 16;
const PIECE_COLUMNS: usize = 2 * PIECE;

/// Memory that a thread keeps from one strip to the next: giving it back and asking for it anew
/// takes a tenth of the time of a product with few tokens.
#[derive(Default)]
struct Scratch {
    /// Integers of the group at hand and of the next.
    panels: [Aligned<u8>; 2],
    /// `2 * LANES` scales for each block.
    scales: Aligned<f32>,
    /// Scales of each row, where they are not stored as f32.
    decoded: Vec<f32>,
    /// `2 * LANES` sums for each token.
    sums: Aligned<f32>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// What is done in the gaps of a group's products.
struct Ahead<'a, 'b> {
    /// Pieces to decode, and those that are left of this half of the strip.
    pieces: usize,
    left: usize,
    due: usize,
    /// Where the next piece lies, and where its integers go.
    from: *const u8,
    to: *mut u8,
    /// From one row to the next, and from the end of the pieces of one half to those of the other.
    row_bytes: usize,
    other_half: usize,
    strip: PhantomData<(&'a [u8], &'a mut [u8])>,
    /// The lines that are fetched.
    lines: Lines<'b>,
    /// Gaps in which this happens.
    gaps: usize,
}

/// Cache lines of the next strip's scales and codes.
struct Lines<'a> {
    codes: &'a [u8],
    scales: &'a [u8],
    /// The next line, and how many are fetched in a group's gaps.
    line: usize,
    of_group: usize,
    due: usize,
}

impl<'a> Lines<'a> {
    /// What lies behind a strip.
    fn behind(job: &'a Four<'_, Staged>, row: usize, rows: usize) -> Self {
        let (n, blocks) = (job.bias.len(), job.columns / job.q.layout().blocksize);
        let next = row.min(n)..(row + rows).min(n);
        let codes = &job.q.packed()[next.start * job.columns / 2..next.end * job.columns / 2];
        let scales = match job.q.scales() {
            Scales::Plain(scales) => {
                bytemuck::cast_slice(&scales[next.start * blocks..next.end * blocks])
            }
            Scales::Nested { codes, .. } | Scales::E8M0(codes) => {
                &codes[next.start * blocks..next.end * blocks]
            }
        };
        let lines = codes.len().div_ceil(LINE) + scales.len().div_ceil(LINE);
        let of_group = lines.div_ceil(job.columns.div_ceil(GROUP));
        Self { codes, scales, line: 0, of_group, due: 0 }
    }

    #[inline(always)]
    fn fetch<D: Dot>(&mut self, d: D) {
        let (at, scales) = (self.line * LINE, self.scales.len().next_multiple_of(LINE));
        self.line += 1;
        let address = if at < scales {
            self.scales.as_ptr().wrapping_add(at)
        } else {
            self.codes.as_ptr().wrapping_add(at - scales)
        };
        d.prefetch_far(address);
    }
}

impl<'a, 'b> Ahead<'a, 'b> {
    /// Decodes so many columns of a strip of `2 * LANES` rows, which begin at its start, into a
    /// panel, and fetches lines, in so many gaps.
    #[inline(always)]
    fn new<D: Dot>(
        (strip, row_bytes, columns): (&'a [u8], usize, usize),
        panel: &'a mut [u8],
        lines: Lines<'b>,
        gaps: usize,
    ) -> Self {
        let rows = 2 * D::LANES;
        assert!(strip.len() >= (rows - 1) * row_bytes + columns / 2);
        assert!(columns.is_multiple_of(PIECE_COLUMNS) && panel.len() >= columns * rows);
        Self {
            pieces: 2 * columns / PIECE_COLUMNS,
            left: columns / PIECE_COLUMNS,
            due: 0,
            from: strip.as_ptr(),
            to: panel.as_mut_ptr(),
            row_bytes,
            other_half: D::LANES * row_bytes - columns / 2,
            strip: PhantomData,
            lines,
            gaps,
        }
    }

    /// Does what is due in a gap.
    #[inline(always)]
    fn gap<D: Dot>(&mut self, d: D, table: D::Ints) {
        self.lines.due += self.lines.of_group;
        while self.lines.due >= self.gaps {
            self.lines.due -= self.gaps;
            self.lines.fetch(d);
        }
        self.due += self.pieces;
        while self.due >= self.gaps {
            self.due -= self.gaps;
            // SAFETY: in as many gaps as `new` was told there are, each piece is due once.
            unsafe { self.decode(d, table) };
        }
    }

    /// Decodes a piece of one half of the strip: of every four bytes the high halves, then the low
    /// ones, of all rows.
    ///
    /// # Safety
    /// - There is one left of the two halves' pieces.
    #[inline(always)]
    unsafe fn decode<D: Dot>(&mut self, d: D, table: D::Ints) {
        // SAFETY: `new` has measured the strip and the panel; a piece is four times two vectors,
        // each with one of the other half's behind it.
        unsafe {
            let vectors = d.columns(self.from, self.row_bytes);
            for (i, vector) in vectors.into_iter().enumerate() {
                let [high, low] = d.lookup(table, vector);
                d.store_ints(high, self.to.add(16 * i * D::LANES));
                d.store_ints(low, self.to.add((16 * i + 8) * D::LANES));
            }
        }
        self.from = self.from.wrapping_add(PIECE);
        self.to = self.to.wrapping_add(64 * D::LANES);
        self.left -= 1;
        if self.left == 0 {
            let of_half = self.pieces / 2;
            self.left = of_half;
            self.from = self.from.wrapping_add(self.other_half);
            self.to = self.to.wrapping_add(4 * D::LANES).wrapping_sub(64 * D::LANES * of_half);
        }
    }
}

/// A group of columns, ready to be multiplied.
struct Stage<'a> {
    /// Columns, and those that are summed as integers.
    length: usize,
    unit: usize,
    /// Pairs of vectors, one for four columns.
    panel: &'a [u8],
    /// `2 * LANES` scales for each block, from the one that the group begins in.
    scales: &'a [f32],
    /// Units of a block, as a shift; 0 where a block is a unit.
    share: u32,
    /// Activations, what their units begin with, and their scales.
    codes: &'a [i8],
    starts: &'a [i32],
    of_tokens: &'a [f32],
}

/// Adds to `sums` the products of a stage with the tokens from `token` on.
#[inline(always)]
fn tile<D: Dot, const M: usize>(
    d: D,
    stage: &Stage<'_>,
    token: usize,
    ahead: &mut Ahead<'_, '_>,
    table: D::Ints,
    sums: &mut [f32],
) {
    let (rows, unit) = (2 * D::LANES, stage.unit);
    let (units, of_group) = (stage.length / unit, GROUP / unit);
    assert!(stage.panel.len() >= stage.length * rows);
    assert!(stage.codes.len() >= (token + M) * GROUP && sums.len() >= M * rows);
    assert!(stage.starts.len() >= (token + M) * of_group && stage.of_tokens.len() >= token + M);
    assert!(units > 0 && stage.scales.len() >= (((units - 1) >> stage.share) + 1) * rows);
    // SAFETY: every pointer below stays inside what the lines above have measured.
    unsafe {
        let mut weights = stage.panel.as_ptr();
        let mut codes = stage.codes.as_ptr().add(token * GROUP);
        let starts = stage.starts.as_ptr().add(token * of_group);
        let mut part = [[d.splat(0.0); 2]; M];
        for u in 0..units {
            let mut c: [[D::Ints; 2]; M] =
                std::array::from_fn(|m| [d.splat_int(*starts.add(m * of_group + u)); 2]);
            for _ in 0..unit / GAP {
                ahead.gap(d, table);
                // Counted loops: an iterator's closures would lack the instructions.
                #[allow(clippy::needless_range_loop)]
                for step in 0..GAP / 4 {
                    let w0 = d.ints(weights.add(step * 8 * D::LANES));
                    let w1 = d.ints(weights.add((2 * step + 1) * 4 * D::LANES));
                    for m in 0..M {
                        let x = d.broadcast(codes.add(m * GROUP + 4 * step));
                        c[m][0] = d.dot(c[m][0], w0, x);
                        c[m][1] = d.dot(c[m][1], w1, x);
                    }
                }
                weights = weights.add(GAP / 4 * 8 * D::LANES);
                codes = codes.add(GAP);
            }
            let scales = stage.scales.as_ptr().add((u >> stage.share) * rows);
            let (s0, s1) = (d.load(scales), d.load(scales.add(D::LANES)));
            for m in 0..M {
                part[m][0] = d.fma(d.to_floats(c[m][0]), s0, part[m][0]);
                part[m][1] = d.fma(d.to_floats(c[m][1]), s1, part[m][1]);
            }
        }
        for (m, part) in part.into_iter().enumerate() {
            let scale = d.splat(stage.of_tokens[token + m]);
            for (half, part) in part.into_iter().enumerate() {
                let at = sums.as_mut_ptr().add(m * rows + half * D::LANES);
                d.store(d.fma(part, scale, d.load(at)), at);
            }
        }
    }
}

/// Multiplies strip number `strip` of the weight by the tokens from `first` on.
#[inline(always)]
pub fn four<D: Dot, T: Lanes>(
    d: D,
    job: &Four<'_, Staged>,
    strip: usize,
    first: usize,
    out: &Out<'_, T>,
) {
    let rows = 2 * D::LANES;
    let (row, row_bytes, groups) = (strip * rows, job.columns / 2, job.columns.div_ceil(GROUP));
    let here = rows.min(job.bias.len() - row);
    let tokens = TOKENS.min(job.tokens - first);
    let packed = &job.q.packed()[row * row_bytes..(row + here) * row_bytes];
    let copy; // The last strip may lack rows.
    let packed = if here == rows {
        packed
    } else {
        let mut longer = packed.to_vec();
        longer.resize(rows * row_bytes, 0);
        copy = longer;
        &copy
    };
    let (blocksize, unit) = (job.q.layout().blocksize, job.unit());
    let (share, of_group) = ((blocksize / unit).ilog2(), GROUP / unit);
    let table = d.table(&job.integers.values);
    let tiles = tokens.div_ceil(if tokens <= 2 * D::HIGH { D::HIGH } else { D::TILE });
    let mut scratch = SCRATCH.take();
    block_scales(d, job, (row, here), &mut scratch);
    let Scratch { panels, sums, scales, .. } = &mut scratch;
    for panel in &mut *panels {
        panel.resize(GROUP * rows);
    }
    sums.resize(tokens * rows);
    sums.fill(0.0);
    let columns = |group: usize| group * GROUP..((group + 1) * GROUP).min(job.columns);
    let mut lines = Lines::behind(job, row + rows, rows);
    // The first stage only decodes.
    for stage in 0..=groups {
        let decoded = if stage < groups { columns(stage) } else { 0..0 };
        let strip = (&packed[decoded.start / 2..], row_bytes, decoded.len());
        let [current, next] = &mut *panels;
        if stage == 0 {
            let mut ahead = Ahead::new::<D>(strip, next, lines, 1);
            for _ in 0..ahead.pieces {
                // SAFETY: there are so many.
                unsafe { ahead.decode(d, table) };
            }
            lines = ahead.lines;
        } else {
            let group = stage - 1;
            let length = columns(group).len();
            let mut ahead = Ahead::new::<D>(strip, next, lines, tiles * length / GAP);
            let of = group * job.tokens + first..group * job.tokens + first + tokens;
            let stage = Stage {
                length,
                unit,
                panel: current,
                scales: &scales[(group * GROUP / blocksize) * rows..],
                share,
                codes: &job.x.codes[of.start * GROUP..of.end * GROUP],
                starts: &job.x.starts[of.start * of_group..of.end * of_group],
                of_tokens: &job.x.scales[of],
            };
            let mut token = 0;
            for i in 0..tiles {
                let height = (tokens - token).div_ceil(tiles - i);
                let sums = &mut sums[token * rows..];
                macro_rules! tile {
                    ($m:literal) => {
                        tile::<D, $m>(d, &stage, token, &mut ahead, table, sums)
                    };
                }
                match height {
                    1 => tile!(1),
                    2 => tile!(2),
                    3 if D::HIGH >= 3 => tile!(3),
                    4 if D::HIGH >= 4 => tile!(4),
                    5 if D::HIGH >= 5 => tile!(5),
                    6 if D::HIGH >= 6 => tile!(6),
                    7 if D::HIGH >= 7 => tile!(7),
                    _ if D::HIGH >= 8 => tile!(8),
                    _ => {}
                }
                token += height;
            }
            lines = ahead.lines;
        }
        panels.swap(0, 1);
    }
    write(d, row, (job.integers.step, job.bias), first, sums, out);
    SCRATCH.set(scratch);
}

/// Writes the scales of the blocks of a strip: those of all its rows for each block.
#[inline(always)]
fn block_scales<D: Dot>(
    d: D,
    job: &Four<'_, Staged>,
    (row, here): (usize, usize),
    scratch: &mut Scratch,
) {
    const FOUR: usize = PIECE / size_of::<f32>();
    let rows = 2 * D::LANES;
    let blocks = job.columns / job.q.layout().blocksize;
    let Scratch { scales, decoded, .. } = scratch;
    let of_rows = match job.q.scales() {
        Scales::Plain(of_rows) if here == rows => &of_rows[row * blocks..][..rows * blocks],
        of_rows => {
            decoded.resize(rows * blocks, 0.0);
            scales::decode(job.isa, of_rows, row * blocks, &mut decoded[..here * blocks]);
            decoded[here * blocks..].fill(0.0);
            decoded
        }
    };
    scales.resize(rows * blocks);
    let fours = blocks / FOUR;
    for half in 0..2 {
        let of_half = &of_rows[half * D::LANES * blocks..(half + 1) * D::LANES * blocks];
        for four in 0..fours {
            // SAFETY: four scales of `LANES` rows are inside; `scales` is as long as `of_rows`.
            unsafe {
                let from = of_half.as_ptr().add(four * FOUR);
                let vectors = d.columns(from.cast(), blocks * size_of::<f32>());
                for (i, vector) in vectors.into_iter().enumerate() {
                    let to = scales.as_mut_ptr().add((four * FOUR + i) * rows + half * D::LANES);
                    d.store_ints(vector, to.cast());
                }
            }
        }
        for (r, of_row) in of_half.chunks_exact(blocks).enumerate() {
            for (block, scale) in of_row.iter().enumerate().skip(fours * FOUR) {
                scales[block * rows + half * D::LANES + r] = *scale;
            }
        }
    }
}
