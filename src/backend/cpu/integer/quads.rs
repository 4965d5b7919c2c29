//! Some activations and an int8 weight: a vector holds four dwords of each of a few tokens, and
//! meets the same sixteen bytes of a row of the weight in each four of its lanes.
//!
//! The weight is read as it lies in memory and nothing of it is turned; a few rows meet all tokens
//! a stretch of columns at a time, so that the activations of a stretch stay in the cache.

use std::cell::Cell;

use super::dot::Dot;
use super::job::{ALONE, Arranged, Eight};
use super::panels::{outputs, write};
use super::rows::TILE;
use crate::backend::cpu::Lanes;
use crate::backend::cpu::aligned::{Aligned, LINE};
use crate::backend::cpu::product::Out;
use crate::backend::cpu::threads::share;

/// What it takes beside [`Dot`]. A quad is four lanes.
pub trait Quads: Dot {
    /// The same sixteen bytes in every quad.
    ///
    /// # Safety
    /// - Sixteen bytes can be read.
    unsafe fn quad(self, at: *const u8) -> Self::Ints;
    /// Lane r of quad q is the wrapping sum of quad q of vector r.
    fn sum_quads(self, x: [Self::Ints; 4]) -> Self::Ints;
}

/// Bytes of a quad: columns that a step takes.
pub const STEP: usize = 16;

/// The most tokens: more of them pay for the panels of [`super::panels`].
pub const TOKENS: usize = 64;

/// Activations up to which so few tokens meet the rows of a weight one after the other
/// ([`super::rows`]): they stay in the first-level cache meanwhile.
const FEW: usize = 32 << 10;

/// Whether this takes less time than other ways for rows of activations.
pub const fn pays(tokens: usize, columns: usize) -> bool {
    let few = tokens == 1 || (tokens <= TILE && tokens * columns <= FEW);
    !few && tokens <= TOKENS
}

/// The most columns of a stretch, and the most bytes of its activations: they stay in the
/// first-level cache.
const COLUMNS: usize = 1024;
const BYTES: usize = 32 << 10;

/// Memory that a thread keeps from one panel to the next.
#[derive(Default)]
struct Scratch {
    /// For each row of the panel a vector of sums for each group of tokens.
    sums: Aligned<i32>,
    /// Sums of the panel's rows for each token, and what they stand for.
    turned: Aligned<i32>,
    products: Aligned<f32>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Rows of a panel are the lanes of two vectors, as for [`write`].
const fn panel_rows<D: Dot>() -> usize {
    2 * D::LANES
}

/// Arranges rows of codes that lie `columns` apart, with the scales of the rows, for [`eight`];
/// `arrange` calls [`Arranging::token`].
pub fn arranged<D: Dot>(
    _: D,
    threads: usize,
    (codes, columns): (&[i8], usize),
    scales: Vec<f32>,
    arrange: impl Fn(&Arranging<'_>, usize, &[i8]) + Sync,
) -> Arranged {
    let (tokens, of_vector) = (codes.len() / columns, D::LANES / 4);
    let filled = tokens.next_multiple_of(of_vector);
    let (of_step, of_starts) = (filled * STEP, filled * 4);
    let mut x = Arranged {
        tokens,
        stride: of_step,
        codes: Aligned::zeroed(columns.div_ceil(STEP) * of_step),
        starts: vec![0; of_starts],
        scales,
        groups: 1,
    };
    let to = Arranging {
        codes: Out::new(&mut x.codes, of_step),
        starts: Out::new(&mut x.starts, of_starts),
    };
    let threads = if codes.len() <= ALONE { 1 } else { threads };
    // The tokens of a vector share cache lines, and so a thread.
    share(threads, tokens.div_ceil(of_vector), |vector| {
        for token in vector * of_vector..tokens.min((vector + 1) * of_vector) {
            arrange(&to, token, &codes[token * columns..(token + 1) * columns]);
        }
    });
    x
}

/// Activations in the order in which [`eight`] reads them: step by step the sixteen columns of each
/// token, then those of tokens that are only there to fill a vector, which are zeros.
pub struct Arranging<'a> {
    /// The steps.
    codes: Out<'a, i8>,
    /// What the products of a token begin with, in the first lane of its quad.
    starts: Out<'a, i32>,
}

impl Arranging<'_> {
    /// Puts the codes of a token where they belong.
    ///
    /// # Safety
    /// - No other call is about this token.
    #[inline(always)]
    pub unsafe fn token<D: Dot>(&self, d: D, token: usize, codes: &[i8]) {
        let one = d.splat_int(0x0101_0101);
        let mut sum = d.splat_int(0);
        let (whole, rest) = codes.as_chunks::<64>();
        for (i, codes) in whole.iter().enumerate() {
            for part in 0..64 / (4 * D::LANES) {
                // SAFETY: a part of the chunk is a vector.
                let x = unsafe { d.ints(codes.as_ptr().add(part * 4 * D::LANES).cast()) };
                sum = d.dot(sum, one, x);
            }
            for (j, quad) in codes.as_chunks::<STEP>().0.iter().enumerate() {
                // SAFETY: the caller's.
                let to = unsafe { self.codes.part(4 * i + j, token * STEP, STEP) };
                to.copy_from_slice(quad);
            }
        }
        let mut total = d.sum_ints(sum);
        for (j, codes) in rest.chunks(STEP).enumerate() {
            // SAFETY: the caller's.
            let to = unsafe { self.codes.part(4 * whole.len() + j, token * STEP, codes.len()) };
            to.copy_from_slice(codes);
            for code in codes {
                total += i32::from(*code);
            }
        }
        // SAFETY: the caller's.
        let start = unsafe { self.starts.part(0, 4 * token, 1) };
        // The sum of up to 133,144 codes times 128 fits; sums of products wrap and come back.
        start[0] = total.wrapping_mul(i32::from(D::BIAS)).wrapping_neg();
    }
}

/// Multiplies panel number `panel` of an int8 weight by all tokens.
#[inline(always)]
pub fn eight<D: Quads, T: Lanes>(d: D, job: &Eight<'_>, panel: usize, out: &Out<'_, T>) {
    // As many as there are registers for the sums.
    if job.x.tokens.div_ceil(D::LANES / 4) <= 2 {
        eight_by::<D, T, 8>(d, job, panel, out);
    } else {
        eight_by::<D, T, 4>(d, job, panel, out);
    }
}

/// `R`: rows of a tile.
#[inline(always)]
fn eight_by<D: Quads, T: Lanes, const R: usize>(
    d: D,
    job: &Eight<'_>,
    panel: usize,
    out: &Out<'_, T>,
) {
    /// Vectors of activations of a tile.
    const WIDTH: usize = 4;
    let (columns, tokens) = (job.columns, job.x.tokens);
    let groups = tokens.div_ceil(D::LANES / 4);
    let first = panel * panel_rows::<D>();
    let rows = panel_rows::<D>().min(job.bias.len() - first);
    let weight = job.weight[first * columns..(first + rows) * columns].as_ptr().cast::<u8>();
    let of_step = groups * 4 * D::LANES;
    assert!(job.x.codes.len() >= columns.div_ceil(STEP) * of_step);
    let mut scratch = SCRATCH.take();
    let Scratch { sums, turned, products } = &mut scratch;
    sums.resize(panel_rows::<D>() * groups * D::LANES);
    turned.resize(panel_rows::<D>() * tokens);
    products.resize(panel_rows::<D>() * tokens);
    // Stretches of the same length, since each fetches as much of what comes next.
    let bytes = columns * groups * (D::LANES / 4);
    let stretches = columns.div_ceil(COLUMNS).max(bytes.div_ceil(BYTES));
    let stretch = columns.div_ceil(stretches).next_multiple_of(LINE);
    for sums in sums.chunks_exact_mut(groups * D::LANES) {
        sums.copy_from_slice(&job.x.starts);
    }
    for start in (0..columns).step_by(stretch) {
        let length = stretch.min(columns - start);
        let whole = length / STEP;
        // What comes next: more of these rows, or the rows behind.
        let next =
            if start + length < columns { length } else { panel_rows::<D>() * columns - start };
        for row in (0..rows).step_by(R) {
            let at: [*const u8; R] = std::array::from_fn(|r| {
                weight.wrapping_add((row + r).min(rows - 1) * columns + start)
            });
            let mut ends = [[0u8; STEP]; R];
            if length % STEP > 0 {
                for (end, at) in ends.iter_mut().zip(at) {
                    // SAFETY: so many bytes are left of the row.
                    unsafe {
                        let rest = at.add(whole * STEP);
                        rest.copy_to_nonoverlapping(end.as_mut_ptr(), length % STEP);
                    }
                }
            }
            let tiles = groups.div_ceil(WIDTH);
            for tile in 0..tiles {
                let (begin, end) = (groups * tile / tiles, groups * (tile + 1) / tiles);
                // SAFETY: the activations are as long as measured above.
                let x = unsafe {
                    job.x.codes.as_ptr().add(start / STEP * of_step + begin * 4 * D::LANES)
                };
                let place = Place { x, of_step, groups };
                let sums = &mut sums[(row * groups + begin) * D::LANES..];
                let next = if tile == 0 { Some(next) } else { None };
                macro_rules! tile {
                    ($g:literal) => {{
                        assert!(sums.len() >= ((R - 1) * groups + $g) * D::LANES);
                        // SAFETY: whole steps of the rows, all steps of the activations and the
                        // sums are there.
                        unsafe {
                            eight_tile::<D, R, $g>(d, at, place, whole, next, sums);
                            if length % STEP > 0 {
                                let at = std::array::from_fn(|r| ends[r].as_ptr());
                                let x = place.x.add(whole * of_step);
                                let place = Place { x, ..place };
                                eight_tile::<D, R, $g>(d, at, place, 1, None, sums);
                            }
                        }
                    }};
                }
                match end - begin {
                    1 => tile!(1),
                    2 => tile!(2),
                    3 => tile!(3),
                    _ => tile!(4),
                }
            }
        }
    }
    for row in (0..rows).step_by(4) {
        for group in 0..groups {
            let mut quads = [0i32; 16];
            // SAFETY: each row of the panel has a vector of sums for each group.
            unsafe {
                let vector = |r: usize| {
                    sums.as_ptr().add(((row + r) * groups + group) * D::LANES).cast::<u8>()
                };
                let sum = d.sum_quads([
                    d.ints(vector(0)),
                    d.ints(vector(1)),
                    d.ints(vector(2)),
                    d.ints(vector(3)),
                ]);
                d.store_ints(sum, quads.as_mut_ptr().cast());
            }
            let here = (group * D::LANES / 4..tokens).zip(quads.as_chunks::<4>().0);
            for (token, quad) in here.take(D::LANES / 4) {
                turned[token * panel_rows::<D>() + row..][..4].copy_from_slice(quad);
            }
        }
    }
    outputs(d, job, first, 0, turned, products);
    write(d, first, (1.0, job.bias), 0, products, out);
    SCRATCH.set(scratch);
}

/// Where a tile's activations lie.
#[derive(Clone, Copy)]
struct Place {
    x: *const i8,
    /// Bytes from one step to the next.
    of_step: usize,
    /// Vectors of a step, and of a row's sums.
    groups: usize,
}

/// Adds the products of `steps` steps of `R` rows with `G` vectors of activations to their sums,
/// and fetches as much of the rows that lie `next` bytes behind.
///
/// # Safety
/// - So many steps can be read of rows and activations.
/// - There are sums for all rows.
// Counted loops: an iterator's closures would lack the instructions.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn eight_tile<D: Quads, const R: usize, const G: usize>(
    d: D,
    rows: [*const u8; R],
    place: Place,
    steps: usize,
    next: Option<usize>,
    sums: &mut [i32],
) {
    let Place { mut x, of_step, groups } = place;
    let of_line = LINE / STEP;
    // SAFETY: the caller's.
    unsafe {
        let at = sums.as_mut_ptr();
        let at = |r: usize, g: usize| at.add((r * groups + g) * D::LANES).cast::<u8>();
        let mut sums = [[d.splat_int(0); G]; R];
        for r in 0..R {
            for g in 0..G {
                sums[r][g] = d.ints(at(r, g));
            }
        }
        let mut xs = [d.splat_int(0); G];
        let mut step = 0;
        while step + of_line <= steps {
            for i in step..step + of_line {
                if let Some(next) = next {
                    for row in 0..R / of_line {
                        let row = rows[(i - step) * (R / of_line) + row];
                        d.prefetch_far(row.wrapping_add(next + step * STEP));
                        d.prefetch(row.wrapping_add((step + of_line) * STEP));
                    }
                }
                for g in 0..G {
                    xs[g] = d.ints(x.add(g * 4 * D::LANES).cast());
                }
                for r in 0..R {
                    let w = d.biased(d.quad(rows[r].add(i * STEP)));
                    for g in 0..G {
                        sums[r][g] = d.dot(sums[r][g], w, xs[g]);
                    }
                }
                x = x.add(of_step);
            }
            step += of_line;
        }
        while step < steps {
            for g in 0..G {
                xs[g] = d.ints(x.add(g * 4 * D::LANES).cast());
            }
            for r in 0..R {
                let w = d.biased(d.quad(rows[r].add(step * STEP)));
                for g in 0..G {
                    sums[r][g] = d.dot(sums[r][g], w, xs[g]);
                }
            }
            x = x.add(of_step);
            step += 1;
        }
        for r in 0..R {
            for g in 0..G {
                d.store_ints(sums[r][g], at(r, g));
            }
        }
    }
}
