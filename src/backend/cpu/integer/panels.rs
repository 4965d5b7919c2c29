//! Many activations and an int8 weight: `2 * LANES` rows become a panel in the cache, in which lanes
//! are rows, and a tile of it and a few activations stays in registers.

use super::dot::Dot;
use super::job::Eight;
use super::rows::{INVERSE_SQUARE, outlier};
use crate::backend::cpu::Lanes;
use crate::backend::cpu::aligned::Aligned;
use crate::backend::cpu::product::{Ahead, Out, Steps};

/// Columns of a panel.
const DEPTH: usize = 1024;

/// Rows of activations that one call takes; what they need of the cache at a depth is half of it.
pub const TOKENS: usize = 512;

/// What is decoded next: rows are read in short pieces, which the processor does not foresee. That
/// is what lies behind the columns up to byte `end` of `rows` rows from `row` on.
fn behind(
    (weight, row_bytes): (&[u8], usize),
    (row, rows): (usize, usize),
    end: usize,
) -> Ahead<'_> {
    let (row, start) = if end < row_bytes { (row, end) } else { (row + rows, 0) };
    let width = DEPTH.min(row_bytes - start);
    Ahead::new((weight, row_bytes), (row, rows), (start, width), &[])
}

/// The most rows of a panel.
const ROWS: usize = 32;

/// The vectors of one column of dwords: `LANES` rows of `row(r)` (a slice that may end early),
/// from byte `first` on, transposed.
#[inline(always)]
fn transposed<'a, D: Dot>(d: D, first: usize, row: impl Fn(usize) -> &'a [u8]) -> [D::Ints; 16] {
    let bytes = 4 * D::LANES;
    let mut vectors = [d.splat_int(0); 16];
    for (r, vector) in vectors.iter_mut().enumerate().take(D::LANES) {
        let row = row(r);
        if let Some(bytes) = row.get(first..first + bytes) {
            // SAFETY: the slice is one vector long.
            *vector = unsafe { d.ints(bytes.as_ptr()) };
        } else if let Some(rest) = row.get(first..) {
            let mut end = [0u8; 64];
            end[..rest.len()].copy_from_slice(rest);
            // SAFETY: the copy is as long as the longest vector.
            *vector = unsafe { d.ints(end.as_ptr()) };
        }
    }
    d.exchange(&mut vectors);
    vectors
}

/// Calls a tile for as many tokens as fit, then for the rest.
macro_rules! tiles {
    ($tile:ident::<$D:ident>, $tokens:expr, |$token:ident, $m:ident| $args:tt) => {{
        let mut $token = 0;
        while $token < $tokens {
            let $m = $D::TILE.min($tokens - $token);
            tiles!(@ $tile, $D, $m, $args, 1 2 3 4 5 6);
            $token += $m;
        }
    }};
    (@ $tile:ident, $D:ident, $m:ident, $args:tt, $($n:literal)+) => {
        match $m {
            $( $n if $n <= $D::TILE => tiles!(@@ $tile, $D, $n, $args), )+
            _ => {}
        }
    };
    (@@ $tile:ident, $D:ident, $n:literal, ($($arg:expr),+)) => {
        $tile::<$D, $n>($($arg),+)
    };
}

/// Adds the bias to sums times a factor and writes them where they belong.
#[inline(always)]
pub fn write<D: Dot, T: Lanes>(
    d: D,
    row: usize,
    (factor, bias): (f32, &[f32]),
    first: usize,
    sums: &[f32],
    out: &Out<'_, T>,
) {
    let (rows, n) = (2 * D::LANES, bias.len());
    let here = rows.min(n - row);
    let mut biases = [0f32; ROWS];
    biases[..here].copy_from_slice(&bias[row..row + here]);
    for (token, sums) in (first..).zip(sums.chunks_exact(rows)) {
        // SAFETY: the outputs of these rows and tokens belong to this call alone.
        let out = unsafe { out.part(token, row, here) };
        let mut values = [T::default(); ROWS];
        let to = if here == rows { out.as_mut_ptr() } else { values.as_mut_ptr() };
        for half in [0, D::LANES] {
            // SAFETY: `sums` and the output are `rows` long, the arrays at least as long.
            unsafe {
                let y = d.load(sums.as_ptr().add(half));
                let factor = d.splat(factor);
                let y = d.fma(y, factor, d.load(biases.as_ptr().add(half)));
                d.store_as(y, to.add(half));
            }
        }
        if here < rows {
            out.copy_from_slice(&values[..here]);
        }
    }
}

/// Adds to `sums` the integer products of a panel with the tokens from `token` on.
#[inline(always)]
fn tile_eight<D: Dot, const M: usize>(
    d: D,
    job: &Eight<'_>,
    (first, length): (usize, usize),
    token: usize,
    panel: &[u8],
    sums: &mut [i32],
    next: &mut Steps<'_>,
) {
    let (x, rows) = (&job.x, 2 * D::LANES);
    assert!(panel.len() >= length * rows && sums.len() >= M * rows && length.is_multiple_of(4));
    assert!((token + M) * x.stride <= x.codes.len() && first + length <= x.stride);
    // SAFETY: every pointer below stays inside what the lines above have measured.
    unsafe {
        let mut weights = panel.as_ptr();
        let codes: [*const i8; M] =
            std::array::from_fn(|m| x.codes.as_ptr().add((token + m) * x.stride + first));
        let at = sums.as_mut_ptr().cast::<u8>();
        let place = |m: usize, half: usize| at.add((2 * m + half) * 4 * D::LANES);
        let mut c: [[D::Ints; 2]; M] =
            std::array::from_fn(|m| [d.ints(place(m, 0)), d.ints(place(m, 1))]);
        for k in (0..length).step_by(4) {
            if k % 16 == 0 {
                next.fetch(d);
            }
            let w0 = d.ints(weights);
            let w1 = d.ints(weights.add(4 * D::LANES));
            weights = weights.add(8 * D::LANES);
            for m in 0..M {
                let x = d.broadcast(codes[m].add(k));
                c[m][0] = d.dot(c[m][0], w0, x);
                c[m][1] = d.dot(c[m][1], w1, x);
            }
        }
        for (m, c) in c.into_iter().enumerate() {
            d.store_ints(c[0], place(m, 0));
            d.store_ints(c[1], place(m, 1));
        }
    }
}

/// Multiplies panel number `panel` of an int8 weight by the tokens from `first` on.
#[inline(always)]
pub fn eight<D: Dot, T: Lanes>(
    d: D,
    job: &Eight<'_>,
    panel: usize,
    first: usize,
    out: &Out<'_, T>,
) {
    let (rows, n) = (2 * D::LANES, job.bias.len());
    let tokens = TOKENS.min(job.x.tokens - first);
    let row = panel * rows;
    let weight = |row: usize| -> &[u8] {
        let of_row = job.columns;
        if row >= n {
            return &[];
        }
        bytemuck::cast_slice(&job.weight[row * of_row..(row + 1) * of_row])
    };
    let depth = DEPTH.min(job.columns).next_multiple_of(4 * D::LANES);
    let mut integers = Aligned::zeroed(rows * depth);
    let mut sums = Aligned::zeroed(rows * tokens);
    for (sums, token) in sums.chunks_exact_mut(rows).zip(first..) {
        sums.fill(job.x.starts[token]);
    }
    for start in (0..job.columns).step_by(DEPTH) {
        let end = (start + DEPTH).min(job.columns);
        for at in (start..end).step_by(4 * D::LANES) {
            for half in 0..2 {
                let vectors = transposed(d, at, |r| weight(row + half * D::LANES + r));
                let to: &mut [u8] = &mut integers[(at - start) * rows..][..4 * D::LANES * rows];
                for (j, vector) in vectors.into_iter().enumerate().take(D::LANES) {
                    // SAFETY: `to` has room for LANES pairs of vectors.
                    unsafe {
                        let at = (2 * j + half) * 4 * D::LANES;
                        d.store_ints(d.biased(vector), to.as_mut_ptr().add(at));
                    }
                }
            }
        }
        let at = (start, (end - start).next_multiple_of(4));
        let steps = tokens.div_ceil(D::TILE) * (end - start) / 16;
        let bytes = (bytemuck::cast_slice(job.weight), job.columns);
        let mut next = behind(bytes, (row, rows), end).steps(steps);
        tiles!(tile_eight::<D>, tokens, |token, m| (
            d,
            job,
            at,
            first + token,
            &integers,
            &mut sums[token * rows..],
            &mut next
        ));
    }
    let mut products = Aligned::zeroed(sums.len());
    outputs(d, job, row, first, &sums, &mut products);
    write(d, row, (1.0, job.bias), first, &products, out);
}

/// Scales integer sums and adds the products of the outliers.
#[inline(always)]
pub fn outputs<D: Dot>(
    d: D,
    job: &Eight<'_>,
    row: usize,
    first: usize,
    sums: &[i32],
    out: &mut [f32],
) {
    let (rows, columns) = (2 * D::LANES, job.outliers.len());
    let here = rows.min(job.bias.len() - row);
    let mut absmax = [0f32; ROWS];
    absmax[..here].copy_from_slice(&job.absmax[row..row + here]);
    let mut weights = vec![0f32; columns * rows];
    for (r, absmax) in absmax.iter().enumerate().take(here) {
        let weight = &job.weight[(row + r) * job.columns..(row + r + 1) * job.columns];
        for (j, column) in job.outliers.iter().enumerate() {
            weights[j * rows + r] = outlier(weight[*column], *absmax);
        }
    }
    for ((sums, out), token) in sums.chunks_exact(rows).zip(out.chunks_exact_mut(rows)).zip(first..)
    {
        let outlying = &job.outlying[token * job.apart..(token + 1) * job.apart];
        for half in [0, D::LANES] {
            // SAFETY: `sums`, `out` and each row of `weights` are `rows` long, `absmax` at least.
            unsafe {
                let scale = d.mul(d.splat(job.x.scales[token]), d.load(absmax.as_ptr().add(half)));
                let sum = d.to_floats(d.ints(sums.as_ptr().add(half).cast()));
                let y = d.mul(d.mul(sum, scale), d.splat(INVERSE_SQUARE));
                let mut apart = d.splat(0.0);
                for (j, x) in outlying.iter().enumerate().take(columns) {
                    let weight = d.load(weights.as_ptr().add(j * rows + half));
                    apart = d.fma(weight, d.splat(*x), apart);
                }
                let y = if columns == 0 { y } else { d.fma(apart, d.splat(1.0), y) };
                d.store(y, out.as_mut_ptr().add(half));
            }
        }
    }
}
