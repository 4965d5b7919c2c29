//! Few activations: lanes lie along a row of the weight, which is read as it lies in memory.

use std::ops::Range;

use super::dot::Dot;
use super::job::{Eight, Four, Out};
use crate::backend::cpu::Lanes;
use crate::quant::integer::GROUP;
use crate::quant::rowwise::INVERSE_QMAX;

/// The most rows of activations.
pub const TOKENS: usize = 4;

/// How far ahead of a row's bytes the next ones are asked for.
const AHEAD: usize = 4096;

/// Multiplies rows of a four-bit weight by `M` rows of activations.
#[inline(always)]
pub fn four<D: Dot, T: Lanes, const M: usize>(
    d: D,
    job: &Four<'_>,
    rows: Range<usize>,
    out: &Out<'_, T>,
) {
    let (span, bytes) = (8 * D::LANES, 4 * D::LANES);
    let (blocksize, x) = (job.q.layout().blocksize, &job.x);
    let blocks = job.columns / blocksize;
    let (whole, vectors) = (job.columns / span, job.columns.div_ceil(span));
    let (count, of_group) = ((span / blocksize).max(1), GROUP / span);
    // Block sizes are powers of two; a division for each vector would cost as much as its products.
    let shift = blocksize.ilog2();
    let table = d.table(&job.integers.values);
    let n = job.bias.len();
    let mut decoded = vec![0.0; blocks];
    for row in rows {
        let scales = job.scales(row * blocks, blocks, &mut decoded);
        let packed = &job.q.packed()[row * job.columns / 2..(row + 1) * job.columns / 2];
        let mut total = [d.splat(0.0); M];
        for (group, first) in (0..vectors).step_by(of_group).enumerate() {
            let mut part = [d.splat(0.0); M];
            for v in first..(first + of_group).min(vectors) {
                let at = (v * span) >> shift;
                let (codes, scale);
                if v < whole {
                    // SAFETY: vector `v` lies inside the row and its `count` scales in `scales`.
                    unsafe {
                        codes = d.load(packed.as_ptr().add(v * bytes));
                        scale = d.spread(scales.as_ptr().add(at), count);
                    }
                    d.prefetch(packed.as_ptr().wrapping_add(v * bytes + AHEAD));
                } else {
                    let (mut end, mut ends) = ([0u8; 64], [0f32; 4]);
                    let rest = &packed[v * bytes..];
                    end[..rest.len()].copy_from_slice(rest);
                    let last = &scales[at..];
                    ends[..last.len()].copy_from_slice(last);
                    // SAFETY: the copies are as long as the longest vector.
                    unsafe {
                        codes = d.load(end.as_ptr());
                        scale = d.spread(ends.as_ptr(), count);
                    }
                }
                let [high, low] = d.lookup(table, codes);
                for (m, part) in part.iter_mut().enumerate() {
                    // SAFETY: a row of `x` is `vectors` spans long, and has `LANES` starts each.
                    let (start, even, odd) = unsafe {
                        let starts = x.starts.as_ptr().add((m * vectors + v) * D::LANES);
                        let codes = x.codes.as_ptr().add(m * x.stride + v * span);
                        (
                            d.load(starts.cast()),
                            d.load(codes.cast()),
                            d.load(codes.add(bytes).cast()),
                        )
                    };
                    let sum = d.dot(d.dot(start, high, even), low, odd);
                    *part = d.fma(d.to_floats(sum), scale, *part);
                }
            }
            for m in 0..M {
                let scale = d.splat(x.scales[m * x.groups + group]);
                total[m] = d.fma(part[m], scale, total[m]);
            }
        }
        for (m, total) in total.into_iter().enumerate() {
            let y = d.sum(total) * job.integers.step + job.bias[row];
            // SAFETY: this row's outputs belong to this call alone.
            unsafe { out.part(m * n + row..m * n + row + 1)[0] = T::from_f32(y) };
        }
    }
}

/// Multiplies rows of an int8 weight by `M` rows of activations.
#[inline(always)]
pub fn eight<D: Dot, T: Lanes, const M: usize>(
    d: D,
    job: &Eight<'_>,
    rows: Range<usize>,
    out: &Out<'_, T>,
) {
    let (bytes, x, n) = (4 * D::LANES, &job.x, job.bias.len());
    let whole = job.columns / bytes;
    for row in rows {
        let codes = &job.weight[row * job.columns..(row + 1) * job.columns];
        let mut sums = [d.splat_int(0); M];
        let mut end = [0i8; 64];
        let rest = &codes[whole * bytes..];
        end[..rest.len()].copy_from_slice(rest);
        // One loop and no closure: a function of its own would lack the instructions.
        for v in 0..job.columns.div_ceil(bytes) {
            let at = if v < whole { codes[v * bytes..].as_ptr() } else { end.as_ptr() };
            d.prefetch(at.wrapping_add(AHEAD).cast());
            // SAFETY: a whole vector or the copy of the last; rows of `x` are padded to whole ones.
            unsafe {
                let codes = d.biased(d.load(at.cast()));
                for (m, sum) in sums.iter_mut().enumerate() {
                    let x = d.load(x.codes.as_ptr().add(m * x.stride + v * bytes).cast());
                    *sum = d.dot(*sum, codes, x);
                }
            }
        }
        for (m, sum) in sums.into_iter().enumerate() {
            let mut y =
                scaled(d.sum_ints(sum).wrapping_add(x.starts[m]), x.scales[m], job.absmax[row]);
            if !job.outliers.is_empty() {
                let columns = job.outliers.len();
                let outlying = &job.outlying[m * columns..(m + 1) * columns];
                let weight = |column: &usize| outlier(codes[*column], job.absmax[row]);
                let products = job.outliers.iter().zip(outlying).map(|(c, x)| weight(c) * x);
                y += products.sum::<f32>();
            }
            // SAFETY: this row's outputs belong to this call alone.
            unsafe { out.part(m * n + row..m * n + row + 1)[0] = T::from_f32(y + job.bias[row]) };
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
