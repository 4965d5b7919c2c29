//! The gradient of the activations: `out[m, k] = sum over n of grad[m, n] * W[n, k]`.
//!
//! Rows of the weight are decoded a stretch of columns at a time. As many columns as a panel has
//! lanes make a panel whose units run down the rows.

use std::ops::Range;

use super::engine::Engine;
use super::lanes::panel_rows;
use super::out::Out;
use super::tiles::Panel;
use super::{BATCH, Job, Lanes, converted, decode_dense, threads};
use crate::backend::cpu::Cpu;
use crate::backend::cpu::aligned::Aligned;

/// Columns of the weight that are one part of the work; a multiple of a panel's lanes.
const STRETCH: usize = 256;

/// The same for few rows of gradients, where to begin with a row of the weight is most of the work.
const LONG: usize = 2048;

/// The most rows of gradients that are few.
const FEW: usize = 96;

/// Elements of the weight that are decoded at a time; they stay in the second-level cache.
const DECODED: usize = 128 * STRETCH;

/// Columns of a part for `m` rows of gradients on `threads` threads.
fn columns_of_part(columns: usize, m: usize, threads: usize) -> usize {
    if m > FEW {
        return STRETCH;
    }
    columns.div_ceil(threads).next_multiple_of(STRETCH).clamp(STRETCH, LONG)
}

/// `job.x` is the gradient of the product, with rows as long as the weight has rows.
pub fn backward<D: Engine, T: Lanes>(d: D, job: &Job<'_, T>, out: &Out<'_, T>) {
    let per = 8 / D::STEPS;
    let stride = job.rows.next_multiple_of(per);
    for first in (0..job.m).step_by(BATCH) {
        let m = BATCH.min(job.m - first);
        let mut wide = Aligned::default();
        let grad = &job.x[first * job.rows..(first + m) * job.rows];
        let grad = converted(d, grad, &mut wide);
        let mut padded = Aligned::default();
        let grad = if stride == job.rows {
            grad
        } else {
            padded.resize(m * stride);
            for (row, out) in grad.chunks_exact(job.rows).zip(padded.chunks_exact_mut(stride)) {
                out[..job.rows].copy_from_slice(row);
            }
            &padded
        };
        let out = out.below(first);
        let threads = job.threads(m);
        let width = columns_of_part(job.columns, m, threads);
        threads::share(threads, job.columns.div_ceil(width), |part| {
            let first = part * width;
            let columns = first..job.columns.min(first + width);
            stretch(d, job, (grad, stride), m, columns, &out);
        });
    }
}

fn stretch<D: Engine, T: Lanes>(
    d: D,
    job: &Job<'_, T>,
    (grad, stride): (&[D::X], usize),
    m: usize,
    columns: Range<usize>,
    out: &Out<'_, T>,
) {
    let (lanes, per) = (panel_rows::<D>(), 8 / D::STEPS);
    let (first, width) = (columns.start, columns.len());
    // Rows of the scratch: whole panels.
    let pitch = width.next_multiple_of(STRETCH);
    // A pair of rows makes a unit where numbers are narrow.
    let most = DECODED / pitch / 2 * 2;
    let panels = width.div_ceil(lanes);
    let one = Cpu { threads: 1, ..job.cpu };
    let mut dense = Aligned::<D::X>::zeroed(most * pitch);
    let mut units = Aligned::<u32>::zeroed(most / per * lanes);
    let mut sums = Aligned::<f32>::zeroed(panels * m * lanes);
    for row in (0..job.rows).step_by(most) {
        let depth = most.min(job.rows - row);
        for (row, dense) in (row..row + depth).zip(dense.chunks_exact_mut(pitch)) {
            decode_dense(&one, job, row, first, &mut dense[..width]);
        }
        let length = depth.div_ceil(per);
        if !depth.is_multiple_of(per) {
            // The other half of the last pair.
            dense[depth * pitch..(depth + 1) * pitch].fill(bytemuck::Zeroable::zeroed());
        }
        for (panel, sums) in sums.chunks_exact_mut(m * lanes).enumerate() {
            for (i, unit) in units.chunks_exact_mut(lanes).take(length).enumerate() {
                let rows = &dense[i * per * pitch..(i + 1) * per * pitch];
                weave(rows, panel * lanes, unit);
            }
            let panel = Panel { units: &units[..length * lanes] };
            d.tiles(&panel, &grad[row..], stride, m, sums);
        }
    }
    for (panel, sums) in sums.chunks_exact(m * lanes).enumerate() {
        let at = panel * lanes;
        let count = lanes.min(width - at);
        for (i, sums) in sums.chunks_exact(lanes).enumerate() {
            // SAFETY: every part of the work writes columns of its own.
            d.finish(&sums[..count], None, unsafe { out.part(i, first + at, count) });
        }
    }
}

/// A unit of each column from `at` on, out of one row or of a pair of narrow ones.
fn weave<X: Lanes>(rows: &[X], at: usize, unit: &mut [u32]) {
    if size_of::<X>() == size_of::<u32>() {
        let row: &[u32] = bytemuck::cast_slice(rows);
        unit.copy_from_slice(&row[at..at + unit.len()]);
    } else {
        let rows: &[u16] = bytemuck::cast_slice(rows);
        let (low, high) = rows.split_at(rows.len() / 2);
        for ((unit, low), high) in unit.iter_mut().zip(&low[at..]).zip(&high[at..]) {
            *unit = u32::from(*low) | u32::from(*high) << 16;
        }
    }
}
