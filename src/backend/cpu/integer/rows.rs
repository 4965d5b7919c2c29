//! Few activations: lanes lie along a row of the weight, which is read as it lies in memory.
//!
//! Several rows of the weight meet several of the activations in registers. Meanwhile the rows
//! behind them are fetched, into the second-level cache only: a fetch into the first level holds
//! one of its few buffers for as long as memory takes.

use std::ops::Range;

use super::dot::Dot;
use super::job::{Arranged, Eight, Four, lane_starts};
use crate::backend::cpu::aligned::LINE;
use crate::backend::cpu::product::AHEAD;
use crate::backend::cpu::{Kernels, Lanes};
use crate::quant::integer::GROUP;
use crate::quant::rowwise::INVERSE_QMAX;

/// Rows of activations that registers have room for.
pub const TILE: usize = 4;

/// The most rows of activations for which an int8 weight is read as it lies. More of them pay for
/// the panels of [`super::panels`], whose activations need not be read anew for each few rows.
pub const TOKENS: usize = 32;

/// Quantizes the activations of a product for [`four`].
pub fn arranged<D: Dot, T: Lanes>(
    _: D,
    kernels: &Kernels<T>,
    threads: usize,
    job: &Four<'_, &[T]>,
) -> Arranged {
    let span = 8 * D::LANES;
    let starts = job.columns.div_ceil(span) * D::LANES;
    let x = (job.x, job.columns);
    Arranged::quantize(kernels, threads, x, span, starts, lane_starts::<D>)
}

/// Multiplies rows of a four-bit weight by all, at most [`TILE`], rows of activations. `out` gets a
/// product for each of them, row by row of the weight.
#[inline(always)]
pub fn four<D: Dot>(d: D, job: &Four<'_>, rows: Range<usize>, out: &mut [f32]) {
    match job.x.tokens {
        1 => four_by::<D, 1>(d, job, rows, out),
        2 => four_by::<D, 2>(d, job, rows, out),
        3 => four_by::<D, 3>(d, job, rows, out),
        _ => four_by::<D, TILE>(d, job, rows, out),
    }
}

#[inline(always)]
fn four_by<D: Dot, const M: usize>(d: D, job: &Four<'_>, rows: Range<usize>, out: &mut [f32]) {
    match 8 * D::LANES / job.q.layout().blocksize {
        4 => four_rows::<D, M, 4>(d, job, rows, out),
        2 => four_rows::<D, M, 2>(d, job, rows, out),
        _ => four_rows::<D, M, 1>(d, job, rows, out),
    }
}

/// `B`: blocks that a vector of codes meets.
#[inline(always)]
fn four_rows<D: Dot, const M: usize, const B: usize>(
    d: D,
    job: &Four<'_>,
    rows: Range<usize>,
    out: &mut [f32],
) {
    const ROWS: usize = 2;
    let blocks = job.columns / job.q.layout().blocksize;
    let mut decoded = vec![0.0; ROWS * blocks];
    let mut out = out.chunks_exact_mut(M);
    let mut row = rows.start;
    while row < rows.end {
        if rows.end - row >= ROWS {
            let scales = job.scales(row * blocks, ROWS * blocks, &mut decoded);
            let sums = four_group::<D, M, B, ROWS>(d, job, row, scales);
            for (sums, out) in sums.into_iter().zip(out.by_ref()) {
                out.copy_from_slice(&sums);
            }
            row += ROWS;
        } else {
            let scales = job.scales(row * blocks, blocks, &mut decoded);
            let [sums] = four_group::<D, M, B, 1>(d, job, row, scales);
            if let Some(out) = out.next() {
                out.copy_from_slice(&sums);
            }
            row += 1;
        }
    }
}

/// The products of `R` rows with `M` of activations.
#[inline(always)]
fn four_group<D: Dot, const M: usize, const B: usize, const R: usize>(
    d: D,
    job: &Four<'_>,
    row: usize,
    scales: &[f32],
) -> [[f32; M]; R] {
    let (span, bytes, x) = (8 * D::LANES, 4 * D::LANES, &job.x);
    let of_group = GROUP / span;
    let (of_row, blocksize) = (job.columns / 2, job.q.layout().blocksize);
    let blocks = job.columns / blocksize;
    let (whole, vectors) = (job.columns / span, job.columns.div_ceil(span));
    // Where blocks are longer than a vector, vectors share a scale.
    let share = (blocksize / span).max(1).ilog2();
    let packed = &job.q.packed()[row * of_row..(row + R) * of_row];
    assert!(scales.len() >= R * blocks && x.codes.len() >= M * x.stride);
    assert!(x.stride >= vectors * span && x.starts.len() >= M * vectors * D::LANES);
    assert!(x.scales.len() >= M * x.groups && x.groups * of_group >= vectors);
    let behind = packed.as_ptr().wrapping_add((R * of_row).max(AHEAD));
    for line in 0..(R * blocks * size_of::<f32>()).div_ceil(LINE) {
        let next = scales.as_ptr().wrapping_add(R * blocks);
        d.prefetch_far(next.cast::<u8>().wrapping_add(line * LINE));
    }
    let table = d.table(&job.integers.values);
    let mut total = [[d.splat(0.0); M]; R];
    let mut codes = [d.splat_int(0); R];
    let mut scale = [d.splat(0.0); R];
    // SAFETY: whole vectors of codes and their scales lie inside the slices, as measured above;
    // what is left of a row is copied, with zeros behind it.
    unsafe {
        for v in 0..whole {
            for r in 0..R {
                d.prefetch_far(behind.wrapping_add((v * R + r) * bytes));
                codes[r] = d.ints(packed.as_ptr().add(r * of_row + v * bytes));
                scale[r] = d.spread::<B>(scales.as_ptr().add(r * blocks + ((v * B) >> share)));
            }
            four_step(d, job, table, v, codes, scale, &mut total);
        }
        if whole < vectors {
            for r in 0..R {
                let (mut end, mut ends) = ([0u8; 64], [0f32; 4]);
                let rest = &packed[r * of_row + whole * bytes..(r + 1) * of_row];
                end[..rest.len()].copy_from_slice(rest);
                let last = &scales[r * blocks + ((whole * B) >> share)..(r + 1) * blocks];
                ends[..last.len()].copy_from_slice(last);
                codes[r] = d.ints(end.as_ptr());
                scale[r] = d.spread::<B>(ends.as_ptr());
            }
            four_step(d, job, table, whole, codes, scale, &mut total);
        }
    }
    let mut sums = [[0.0; M]; R];
    for (sums, total) in sums.iter_mut().zip(total) {
        for (sum, total) in sums.iter_mut().zip(total) {
            *sum = d.sum(total) * job.integers.step;
        }
    }
    sums
}

/// Adds the products of vector `v` of `R` rows to their sums.
///
/// # Safety
/// - `M` rows of activations have a vector `v`, with its starts.
#[inline(always)]
unsafe fn four_step<D: Dot, const M: usize, const R: usize>(
    d: D,
    job: &Four<'_>,
    table: D::Ints,
    v: usize,
    codes: [D::Ints; R],
    scale: [D::F; R],
    total: &mut [[D::F; M]; R],
) {
    let (x, half) = (&job.x, 4 * D::LANES);
    let vectors = job.columns.div_ceil(2 * half);
    let mut values = [[table; 2]; R];
    for r in 0..R {
        values[r] = d.lookup(table, codes[r]);
    }
    // Counted loops: an iterator's closures would lack the instructions.
    #[allow(clippy::needless_range_loop)]
    for m in 0..M {
        // SAFETY: the caller vouches for this vector.
        let (start, even, odd) = unsafe {
            let at = x.codes.as_ptr().add(m * x.stride + v * 2 * half).cast();
            let starts = x.starts.as_ptr().add((m * vectors + v) * D::LANES);
            (d.ints(starts.cast()), d.ints(at), d.ints(at.add(half)))
        };
        let of_group = d.splat(x.scales[m * x.groups + v / (GROUP / (2 * half))]);
        for r in 0..R {
            let [high, low] = values[r];
            let sum = d.dot(d.dot(start, high, even), low, odd);
            total[r][m] = d.fma(d.to_floats(sum), d.mul(scale[r], of_group), total[r][m]);
        }
    }
}

/// Multiplies rows of an int8 weight by all rows of activations. `out` gets a product for each of
/// them, row by row of the weight.
#[inline(always)]
pub fn eight<D: Dot>(d: D, job: &Eight<'_>, rows: Range<usize>, out: &mut [f32]) {
    const MANY: usize = 4;
    let tokens = job.x.tokens;
    // As many as there are registers for the sums.
    let together = match (tokens <= TILE, D::LANES) {
        (true, _) => 1,
        (false, 16) => MANY,
        (false, _) => 2,
    };
    let mut outliers = vec![0.0; MANY * job.apart];
    let mut row = rows.start;
    while row < rows.end {
        let now = if rows.end - row < together { 1 } else { together };
        let out = &mut out[(row - rows.start) * tokens..][..now * tokens];
        match now {
            MANY => eight_group::<D, MANY>(d, job, row, &mut outliers, out),
            2 => eight_group::<D, 2>(d, job, row, &mut outliers, out),
            _ => eight_group::<D, 1>(d, job, row, &mut outliers, out),
        }
        row += now;
    }
}

/// `R` rows of an int8 weight.
#[inline(always)]
fn eight_group<D: Dot, const R: usize>(
    d: D,
    job: &Eight<'_>,
    row: usize,
    outliers: &mut [f32],
    out: &mut [f32],
) {
    let (tokens, columns, bytes) = (job.x.tokens, job.columns, 4 * D::LANES);
    let weights = &job.weight[row * columns..(row + R) * columns];
    let mut ends = [[0i8; 64]; R];
    for (end, weight) in ends.iter_mut().zip(weights.chunks_exact(columns)) {
        let rest = &weight[columns / bytes * bytes..];
        end[..rest.len()].copy_from_slice(rest);
    }
    if job.apart > 0 {
        let rows = weights.chunks_exact(columns).zip(&job.absmax[row..]);
        for ((weight, absmax), outliers) in rows.zip(outliers.chunks_exact_mut(job.apart)) {
            for (outlying, column) in outliers.iter_mut().zip(job.outliers) {
                *outlying = outlier(weight[*column], *absmax);
            }
        }
    }
    let passes = tokens.div_ceil(TILE);
    for pass in 0..passes {
        let (first, end) = (tokens * pass / passes, tokens * (pass + 1) / passes);
        // Each pass fetches its share of the next rows.
        let ahead = R * pass / passes..R * (pass + 1) / passes;
        macro_rules! tile {
            ($m:literal) => {
                eight_tile::<D, $m, R>(d, job, row, &ends, outliers, first, ahead, out)
            };
        }
        match end - first {
            1 => tile!(1),
            2 => tile!(2),
            3 => tile!(3),
            _ => tile!(4),
        }
    }
}

/// The products of `R` rows with `M` of activations from `first` on.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn eight_tile<D: Dot, const M: usize, const R: usize>(
    d: D,
    job: &Eight<'_>,
    row: usize,
    ends: &[[i8; 64]; R],
    outliers: &[f32],
    first: usize,
    ahead: Range<usize>,
    out: &mut [f32],
) {
    let (bytes, columns, x) = (4 * D::LANES, job.columns, &job.x);
    let (whole, vectors) = (columns / bytes, columns.div_ceil(bytes));
    let weights = job.weight[row * columns..(row + R) * columns].as_ptr().cast::<u8>();
    assert!(x.codes.len() >= (first + M) * x.stride && x.stride >= vectors * bytes);
    let codes = x.codes[first * x.stride..].as_ptr().cast::<u8>();
    let behind = weights.wrapping_add((R * columns).max(AHEAD) + ahead.start * columns);
    let mut sums = [[d.splat_int(0); M]; R];
    let mut w = [d.splat_int(0); R];
    for v in 0..whole {
        for i in v * ahead.len()..(v + 1) * ahead.len() {
            // In the order in which they lie.
            d.prefetch_far(behind.wrapping_add(i * bytes));
        }
        // SAFETY: whole vectors of weights lie inside their rows; activations have all vectors, by
        // the line above.
        unsafe {
            for (r, w) in w.iter_mut().enumerate() {
                *w = d.biased(d.ints(weights.add(r * columns + v * bytes)));
            }
            eight_step(d, codes.add(v * bytes), x.stride, w, &mut sums);
        }
    }
    if whole < vectors {
        // SAFETY: as above; an end is as long as the longest vector.
        unsafe {
            for (w, end) in w.iter_mut().zip(ends) {
                *w = d.biased(d.ints(end.as_ptr().cast()));
            }
            eight_step(d, codes.add(whole * bytes), x.stride, w, &mut sums);
        }
    }
    for r in 0..R {
        let outliers = &outliers[r * job.apart..(r + 1) * job.apart];
        #[allow(clippy::needless_range_loop)]
        for m in 0..M {
            let token = first + m;
            let sum = d.sum_ints(sums[r][m]).wrapping_add(x.starts[token]);
            let mut y = scaled(sum, x.scales[token], job.absmax[row + r]);
            if job.apart > 0 {
                let outlying = &job.outlying[token * job.apart..(token + 1) * job.apart];
                let mut sum = d.splat(0.0);
                for at in (0..job.apart).step_by(D::LANES) {
                    // SAFETY: both slices are `apart` long, a multiple of any number of lanes.
                    unsafe {
                        let (w, x) = (outliers.as_ptr().add(at), outlying.as_ptr().add(at));
                        sum = d.fma(d.load(w), d.load(x), sum);
                    }
                }
                y += d.sum(sum);
            }
            out[r * x.tokens + token] = y;
        }
    }
}

/// Adds the products of a vector of `R` rows with `M` of activations, `stride` bytes apart.
///
/// # Safety
/// - A vector can be read from each of the rows of activations.
#[inline(always)]
unsafe fn eight_step<D: Dot, const M: usize, const R: usize>(
    d: D,
    x: *const u8,
    stride: usize,
    weights: [D::Ints; R],
    sums: &mut [[D::Ints; M]; R],
) {
    #[allow(clippy::needless_range_loop)]
    for m in 0..M {
        // SAFETY: the caller's.
        let x = unsafe { d.ints(x.add(m * stride)) };
        for r in 0..R {
            sums[r][m] = d.dot(sums[r][m], weights[r], x);
        }
    }
}

/// 1 / 127^2: both factors are 127ths of their scale.
pub const INVERSE_SQUARE: f32 = (1.0 / (127.0 * 127.0)) as f32;

/// What an integer product of LLM.int8() stands for.
#[inline(always)]
pub fn scaled(product: i32, scale: f32, absmax: f32) -> f32 {
    product as f32 * (scale * absmax) * INVERSE_SQUARE
}

/// An int8 weight that meets an activation as it is.
#[inline(always)]
pub fn outlier(code: i8, absmax: f32) -> f32 {
    f32::from(code) * absmax * INVERSE_QMAX
}
