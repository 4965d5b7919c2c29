//! Stretches of columns of a weight, a run of rows at a time: chunks for `down`, in place or
//! padded.

use super::down::{BLOCKS, Down, Rows, VECTORS};
use super::lanes::{CODES, Dot, Vector, panel_rows};
use crate::backend::cpu::aligned::LINE;

/// Bytes of codes that are on their way from memory while [`few`] walks down: several pieces of
/// rows lie between what is read and what is read next, so more than `ahead` needs.
const AHEAD: usize = 32 * 1024;

/// The most rows that [`Down::chunk`] takes at once.
const MOST_ROWS: usize = 8;

/// A stretch of columns of a weight whose rows are whole blocks of codes.
pub struct Stretch<'a> {
    /// Codes of all rows, first of a pair high.
    pub packed: &'a [u8],
    /// Bytes of a row.
    pub row_bytes: usize,
    /// The first column; a multiple of any chunk.
    pub start: usize,
    /// Columns.
    pub width: usize,
    /// Elements of a block: a power of two, at least 32.
    pub blocksize: usize,
    /// The codebook.
    pub values: [f32; 16],
}

/// Scales of some rows of a stretch.
#[derive(Clone, Copy)]
pub struct RowScales<'a> {
    /// From the first block of the stretch in the first row on.
    pub scales: &'a [f32],
    /// How far a row is from the next.
    pub blocks: usize,
}

/// What a call of [`few`] or [`panels`] is about: `count` rows from `first` on.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// The first row.
    pub first: usize,
    /// Rows.
    pub count: usize,
    /// Their scales.
    pub scales: RowScales<'a>,
}

/// A few rows of gradients, as many numbers as the rows of a [`Run`] and zeros up to a multiple of
/// [`Down::ROWS`].
#[derive(Clone, Copy)]
pub struct Gradients<'a, X> {
    /// From the first row of the run on.
    pub x: &'a [X],
    /// How far a row is from the next.
    pub stride: usize,
    /// Rows, at most four.
    pub m: usize,
}

/// Memory for rows that are cut short.
struct Padded {
    packed: [[u8; 64]; MOST_ROWS],
    scales: [[f32; BLOCKS]; MOST_ROWS],
}

impl Padded {
    const ZERO: Self = Self { packed: [[0; 64]; MOST_ROWS], scales: [[0.0; BLOCKS]; MOST_ROWS] };

    fn rows(&self) -> Rows {
        let (packed, scales) = (self.packed.as_ptr().cast(), self.scales.as_ptr().cast());
        Rows { packed, row_bytes: 64, scales, blocks: BLOCKS }
    }
}

impl Stretch<'_> {
    /// Chunks, the last of which may be cut short.
    pub const fn chunks<D: Dot>(&self) -> usize {
        self.width.div_ceil(CODES * D::LANES)
    }

    /// Where the scales of a chunk begin, among those of the stretch.
    const fn block<D: Dot>(&self, chunk: usize) -> usize {
        let shift = self.blocksize.trailing_zeros();
        ((self.start + chunk * CODES * D::LANES) >> shift) - (self.start >> shift)
    }

    /// Bytes of a chunk.
    fn bytes<D: Dot>(&self, chunk: usize) -> usize {
        (self.width - chunk * CODES * D::LANES).min(CODES * D::LANES) / 2
    }

    /// The first of `chunks` whole chunks of [`Down::ROWS`] rows from row `n` of the run on, all of
    /// which are there.
    fn whole<D: Down>(&self, run: &Run<'_>, n: usize, chunks: usize) -> Rows {
        let (bytes, blocks) = (chunks * CODES / 2 * D::LANES, run.scales.blocks);
        let at = (run.first + n) * self.row_bytes + self.start / 2;
        let packed = &self.packed[at..][..(D::ROWS - 1) * self.row_bytes + bytes];
        let last = self.block::<D>(chunks - 1) + (CODES * D::LANES).div_ceil(self.blocksize);
        let scales = &run.scales.scales[n * blocks..][..(D::ROWS - 1) * blocks + last];
        let (packed, scales) = (packed.as_ptr(), scales.as_ptr());
        Rows { packed, row_bytes: self.row_bytes, scales, blocks }
    }

    /// A chunk of `count` rows from row `n` of the run on, in place if it is whole and there are
    /// `wanted` rows, else as a copy with zeros around it.
    fn rows<D: Dot>(
        &self,
        run: &Run<'_>,
        (n, wanted): (usize, usize),
        chunk: usize,
        padded: &mut Padded,
    ) -> Rows {
        let count = wanted.min(run.count - n);
        let (block, bytes) = (self.block::<D>(chunk), self.bytes::<D>(chunk));
        let at = (run.first + n) * self.row_bytes + (self.start / 2 + chunk * CODES / 2 * D::LANES);
        let blocks = (2 * bytes).div_ceil(self.blocksize);
        let packed = &self.packed[at..at + (count - 1) * self.row_bytes + bytes];
        let scales = &run.scales.scales[n * run.scales.blocks + block..];
        let scales = &scales[..(count - 1) * run.scales.blocks + blocks];
        if count == wanted && bytes == CODES / 2 * D::LANES {
            return Rows {
                packed: packed.as_ptr(),
                row_bytes: self.row_bytes,
                scales: scales.as_ptr(),
                blocks: run.scales.blocks,
            };
        }
        *padded = Padded::ZERO;
        for (r, row) in packed.chunks(self.row_bytes).enumerate() {
            padded.packed[r][..bytes].copy_from_slice(&row[..bytes]);
        }
        for (r, row) in scales.chunks(run.scales.blocks).enumerate() {
            padded.scales[r][..blocks].copy_from_slice(&row[..blocks]);
        }
        padded.rows()
    }
}

/// Calls a function with the number of blocks that share a chunk.
macro_rules! with_blocks {
    ($D:ty, $blocksize:expr, $B:ident => $call:expr) => {
        match (CODES * <$D as Vector>::LANES) / $blocksize {
            0 | 1 => {
                const $B: usize = 1;
                $call
            }
            2 => {
                const $B: usize = 2;
                $call
            }
            _ => {
                const $B: usize = BLOCKS;
                $call
            }
        }
    };
}

/// Adds the products of a stretch of some rows with a few gradients to `sums`: of each row of
/// gradients the vectors of all chunks.
#[inline(always)]
pub fn few<D: Down>(
    d: D,
    stretch: &Stretch<'_>,
    run: &Run<'_>,
    gradients: Gradients<'_, D::X>,
    sums: &mut [f32],
) {
    with_blocks!(D, stretch.blocksize, B => match gradients.m {
        1 => few_rows::<D, 1, B>(d, stretch, run, gradients, sums),
        2 => few_rows::<D, 2, B>(d, stretch, run, gradients, sums),
        3 => few_rows::<D, 3, B>(d, stretch, run, gradients, sums),
        _ => few_rows::<D, 4, B>(d, stretch, run, gradients, sums),
    });
}

#[inline(always)]
fn few_rows<D: Down, const M: usize, const B: usize>(
    d: D,
    stretch: &Stretch<'_>,
    run: &Run<'_>,
    gradients: Gradients<'_, D::X>,
    sums: &mut [f32],
) {
    let (chunks, chunk) = (stretch.chunks::<D>(), CODES * D::LANES);
    let (width, depth) = (chunks * chunk, run.count.next_multiple_of(D::ROWS));
    assert!(sums.len() == M * width && gradients.m == M && D::ROWS <= MOST_ROWS);
    assert!(gradients.x.len() >= (M - 1) * gradients.stride + depth);
    let (book, mut padded) = (d.book(&stretch.values), Padded::ZERO);
    // Whole groups of rows that are on their way from memory.
    let far = D::ROWS * AHEAD.div_ceil(D::ROWS * stretch.width / 2);
    for n in (0..run.count).step_by(D::ROWS) {
        // Chunks that lie whole in memory, found once; the others are copied.
        let whole = if run.count - n < D::ROWS { 0 } else { stretch.width / chunk };
        let first = (whole > 0).then(|| stretch.whole::<D>(run, n, whole));
        for c in 0..chunks {
            let rows = match first {
                // SAFETY: this is the first of `whole` chunks and their scales.
                Some(first) if c < whole => unsafe {
                    let packed = first.packed.add(c * chunk / 2);
                    Rows { packed, scales: first.scales.add(stretch.block::<D>(c)), ..first }
                },
                _ => stretch.rows::<D>(run, (n, D::ROWS), c, &mut padded),
            };
            for r in 0..D::ROWS {
                d.prefetch_far(rows.packed.wrapping_add((far + r) * rows.row_bytes));
            }
            if (c * B).is_multiple_of(LINE / size_of::<f32>()) {
                // A line of scales of each row.
                for r in 0..D::ROWS {
                    d.prefetch_far(rows.scales.wrapping_add((far + r) * rows.blocks).cast());
                }
            }
            // SAFETY: `rows` are whole chunks; the assertions count gradients and sums.
            unsafe {
                let gradients = (gradients.x.as_ptr().add(n), gradients.stride);
                let sums = (sums.as_mut_ptr().add(c * chunk), width);
                d.chunk::<M, B>(book, rows, gradients, sums);
            }
        }
    }
}

/// Decodes one chunk of some rows into four panels of `units` words each.
#[inline(always)]
pub fn panels<D: Down>(
    d: D,
    stretch: &Stretch<'_>,
    run: &Run<'_>,
    chunk: usize,
    panels: &mut [u32],
) {
    with_blocks!(D, stretch.blocksize, B => panel_rows_of::<D, B>(d, stretch, run, chunk, panels));
}

#[inline(always)]
fn panel_rows_of<D: Down, const B: usize>(
    d: D,
    stretch: &Stretch<'_>,
    run: &Run<'_>,
    chunk: usize,
    panels: &mut [u32],
) {
    let (per, lanes) = (CODES / D::STEPS, panel_rows::<D>());
    let apart = panels.len() / (VECTORS / 2);
    assert!(apart >= run.count.div_ceil(per) * lanes);
    let (book, mut padded, mut i) = (d.book(&stretch.values), Padded::ZERO, 0);
    // All whole rows, then half a pair.
    for (n, count) in [(0, run.count / per * per), (run.count / per * per, per)] {
        if n >= run.count || count == 0 {
            continue;
        }
        let whole = stretch.bytes::<D>(chunk) == CODES / 2 * D::LANES && n + count <= run.count;
        let together = if whole { count } else { per };
        for n in (n..n + count).step_by(together) {
            let rows = stretch.rows::<D>(run, (n, together), chunk, &mut padded);
            for r in (0..together).step_by(per) {
                // SAFETY: `rows` are whole chunks; the assertion counts units.
                unsafe {
                    let rows = rows.below(r);
                    for row in 0..per {
                        // The next chunk of the same rows.
                        let next = row * rows.row_bytes + CODES / 2 * D::LANES;
                        d.prefetch_far(rows.packed.wrapping_add(next));
                    }
                    let to = panels.as_mut_ptr().add(i * lanes);
                    d.units::<B>(book, rows, to, apart);
                }
                i += 1;
            }
        }
    }
}

/// Puts the sums of a chunk back into the order of columns; `vector(v)` are those of vector `v`.
#[inline(always)]
pub fn ordered<'a>(vector: impl Fn(usize) -> &'a [f32], out: &mut [f32]) {
    for v in 0..VECTORS {
        for (sum, word) in vector(v).iter().zip(out.chunks_exact_mut(CODES)) {
            word[v ^ 1] = *sum;
        }
    }
}
