//! The gradient of the activations: `out[m, k] = sum over n of grad[m, n] * W[n, k]`.
//!
//! For few rows of gradients the codes are decoded in registers, and each thread walks down rows of
//! its own. For more, threads take stretches of columns, so that no two of them add to one sum, and
//! as many columns as a panel has lanes make a panel whose units run down the rows. Weights without
//! whole blocks of four-bit codes are decoded into memory first.

use std::ops::Range;

use super::down::VECTORS;
use super::engine::Engine;
use super::few::FEW;
use super::lanes::{CODES, panel_rows};
use super::out::Out;
use super::stretch::{Gradients, RowScales, Run, Stretch, ordered};
use super::tiles::{Panel, To};
use super::{BATCH, Job, Lanes, converted, decode_dense, scales, threads};
use crate::backend::cpu::Cpu;
use crate::backend::cpu::aligned::Aligned;
use crate::tensor::Scales;

/// Columns of the weight that are one part of the work; a multiple of any chunk.
const STRETCH: usize = 256;

/// The same where weights are decoded into memory for few rows of gradients: to begin with a row
/// of the weight is most of the work.
const LONG: usize = 2048;

/// Rows of gradients that are few in that case.
const NOT_MANY: usize = 96;

/// Columns that are added up together for few rows of gradients: long pieces of rows are read
/// faster than short ones, and the sums of one row stay in the first-level cache.
const FEW_COLUMNS: usize = 4096;

/// Parts that each thread has in that case.
const FEW_PARTS: usize = 2;

/// Parts that walk down different rows of the same columns, at most: each has sums of its own, which
/// have to be added up. More threads share the columns too.
const DOWN: usize = 4;

/// Rows of the weight whose scales are decoded at once.
const ROWS: usize = 64;

/// Units of a panel: few enough for the second-level cache to hold four of them beside the sums,
/// and enough for their products to take far longer than the sums take to come and go.
const DEPTH: usize = 128;

/// Elements of the weight that are decoded at a time; they stay in the second-level cache.
const DECODED: usize = 128 * STRETCH;

/// Columns of a part of the work.
fn columns_of_part(columns: usize, coded: bool, m: usize, threads: usize) -> usize {
    if coded || m > NOT_MANY {
        return STRETCH;
    }
    columns.div_ceil(threads).next_multiple_of(STRETCH).clamp(STRETCH, LONG)
}

/// `job.x` is the gradient of the product, with rows as long as the weight has rows.
pub fn backward<D: Engine, T: Lanes>(d: D, job: &Job<'_, T>, out: &Out<'_, T>) {
    let codebook = job.codebook();
    for first in (0..job.m).step_by(BATCH) {
        let m = BATCH.min(job.m - first);
        let mut wide = Aligned::default();
        let grad = &job.x[first * job.rows..(first + m) * job.rows];
        let grad = converted(d, grad, &mut wide);
        // Rows of the weight that are taken together.
        let group = if codebook.is_some() && m <= FEW { D::ROWS } else { CODES / D::STEPS };
        let stride = job.rows.next_multiple_of(group);
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
        let gradients = Gradients { x: grad, stride, m };
        let out = out.below(first);
        if let Some(values) = codebook
            && m <= FEW
        {
            few_gradients(d, job, values, gradients, &out);
            continue;
        }
        let threads = job.threads(m);
        let width = columns_of_part(job.columns, codebook.is_some(), m, threads);
        threads::share(threads, job.columns.div_ceil(width), |part| {
            let first = part * width;
            let columns = first..job.columns.min(first + width);
            match codebook {
                Some(values) => coded_stretch(d, job, values, gradients, columns, &out),
                None => dense_stretch(d, job, gradients, columns, &out),
            }
        });
    }
}

/// Few rows of gradients: each part of the work walks down rows that follow one another in memory
/// and has sums of its own, which are added up in their order at the end. So the number of threads
/// says how a sum is taken apart, and not who was first.
fn few_gradients<D: Engine, T: Lanes>(
    d: D,
    job: &Job<'_, T>,
    values: &[f32; 16],
    gradients: Gradients<'_, D::X>,
    out: &Out<'_, T>,
) {
    let (m, chunk) = (gradients.m, CODES * D::LANES);
    let threads = job.threads_of_few(m);
    let parts = if threads == 1 { 1 } else { threads * FEW_PARTS };
    let down = parts.min(DOWN);
    let across = parts.div_ceil(down).max(job.columns.div_ceil(FEW_COLUMNS));
    let width = job.columns.div_ceil(across).next_multiple_of(STRETCH);
    let across = job.columns.div_ceil(width);
    let rows = job.rows.div_ceil(down).next_multiple_of(D::ROWS);
    let down = job.rows.div_ceil(rows);
    let stretch = |i: usize| {
        let stretch = stretch_of(job, values, &(i * width..job.columns.min((i + 1) * width)));
        let length = m * stretch.chunks::<D>() * chunk;
        (stretch, length)
    };
    // Of all parts that walk down the same rows: of each stretch, of each row of gradients the
    // vectors of all chunks.
    let pitch = m * job.columns.next_multiple_of(chunk);
    let mut sums = Aligned::<f32>::zeroed(down * pitch);
    let all = Out::new(&mut sums, pitch);
    threads::share_runs(threads, down * across, |part| {
        let (part, (stretch, length)) = (part / across, stretch(part % across));
        // SAFETY: every part of the work adds to sums of its own.
        let sums = unsafe { all.part(part, m * stretch.start, length) };
        let columns = stretch.start..stretch.start + stretch.width;
        let (mut decoded, end) = (Vec::new(), job.rows.min((part + 1) * rows));
        for first in (part * rows..end).step_by(ROWS) {
            let count = ROWS.min(end - first);
            let scales = scales_of(job, (first, count), &columns, &mut decoded);
            let x = Gradients { x: &gradients.x[first..], ..gradients };
            d.few_columns(&stretch, &Run { first, count, scales }, x, sums);
        }
    });
    threads::share(threads, across, |part| {
        let (stretch, length) = stretch(part);
        let mut total = Aligned::<f32>::zeroed(length);
        for part in sums.chunks_exact(pitch) {
            for (sum, more) in total.iter_mut().zip(&part[m * stretch.start..]) {
                *sum += more;
            }
        }
        let (columns, chunks) =
            (stretch.start..stretch.start + stretch.width, stretch.chunks::<D>());
        let at = |c: usize, i: usize, v: usize| (i * chunks + c) * chunk + v * D::LANES;
        finish_stretch(d, &columns, m, |c, i, v| &total[at(c, i, v)..][..D::LANES], out);
    });
}

/// Writes the sums of a stretch; `vector(c, i, v)` are those of vector `v` of chunk `c` of row `i`.
fn finish_stretch<'a, D: Engine, T: Lanes>(
    d: D,
    columns: &Range<usize>,
    m: usize,
    vector: impl Fn(usize, usize, usize) -> &'a [f32],
    out: &Out<'_, T>,
) {
    let (chunk, mut row) = (CODES * D::LANES, [0.0; CODES * 16]);
    for (c, at) in columns.clone().step_by(chunk).enumerate() {
        let count = chunk.min(columns.end - at);
        for i in 0..m {
            ordered(|v| vector(c, i, v), &mut row);
            // SAFETY: every part of the work writes columns of its own.
            d.finish(&row[..count], None, unsafe { out.part(i, at, count) });
        }
    }
}

/// Columns of a weight whose rows are whole blocks of codes.
fn stretch_of<'a, T>(job: &Job<'a, T>, values: &[f32; 16], columns: &Range<usize>) -> Stretch<'a> {
    Stretch {
        packed: job.q.packed(),
        row_bytes: job.columns / 2,
        start: columns.start,
        width: columns.len(),
        blocksize: job.q.layout().blocksize,
        values: *values,
    }
}

/// Panels of a stretch of columns of a weight whose rows are whole blocks of codes.
fn coded_stretch<D: Engine, T: Lanes>(
    d: D,
    job: &Job<'_, T>,
    values: &[f32; 16],
    gradients: Gradients<'_, D::X>,
    columns: Range<usize>,
    out: &Out<'_, T>,
) {
    let (m, chunk, lanes) = (gradients.m, CODES * D::LANES, panel_rows::<D>());
    let stretch = stretch_of(job, values, &columns);
    let chunks = stretch.chunks::<D>();
    let mut sums = Aligned::<f32>::zeroed(m * chunks * chunk);
    let apart = DEPTH * lanes;
    let mut panels = Aligned::<u32>::zeroed(VECTORS / 2 * apart);
    let rows = DEPTH * CODES / D::STEPS;
    let mut decoded = Vec::new();
    for first in (0..job.rows).step_by(rows) {
        let count = rows.min(job.rows - first);
        let scales = scales_of(job, (first, count), &columns, &mut decoded);
        let run = Run { first, count, scales };
        let x = &gradients.x[first..];
        let length = count.div_ceil(CODES / D::STEPS) * lanes;
        for (c, sums) in sums.chunks_exact_mut(m * chunk).enumerate() {
            d.panels(&stretch, &run, c, &mut panels);
            for (units, sums) in panels.chunks_exact(apart).zip(sums.chunks_exact_mut(m * lanes)) {
                let to = To { sums, fresh: first == 0, done: None };
                d.tiles(&Panel { units: &units[..length] }, x, gradients.stride, m, to);
            }
        }
    }
    let at = |c: usize, i: usize, v: usize| {
        ((c * VECTORS / 2 + v / 2) * m + i) * lanes + v % 2 * D::LANES
    };
    finish_stretch(d, &columns, m, |c, i, v| &sums[at(c, i, v)..][..D::LANES], out);
}

/// The scales of a stretch of some rows, where they are or decoded.
fn scales_of<'a, T>(
    job: &Job<'a, T>,
    (first, count): (usize, usize),
    columns: &Range<usize>,
    decoded: &'a mut Vec<f32>,
) -> RowScales<'a> {
    let blocksize = job.q.layout().blocksize;
    let (start, blocks) = (columns.start / blocksize, job.columns / blocksize);
    let here = columns.end.div_ceil(blocksize) - start;
    match job.q.scales() {
        Scales::Plain(scales) => RowScales { scales: &scales[first * blocks + start..], blocks },
        scales => {
            decoded.resize(count * here, 0.0);
            for (row, decoded) in (first..).zip(decoded.chunks_exact_mut(here)) {
                scales::decode(job.cpu.isa, scales, row * blocks + start, decoded);
            }
            RowScales { scales: decoded, blocks: here }
        }
    }
}

/// A stretch of columns of any weight.
fn dense_stretch<D: Engine, T: Lanes>(
    d: D,
    job: &Job<'_, T>,
    gradients: Gradients<'_, D::X>,
    columns: Range<usize>,
    out: &Out<'_, T>,
) {
    let (lanes, per) = (panel_rows::<D>(), CODES / D::STEPS);
    let (first, width, m) = (columns.start, columns.len(), gradients.m);
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
            let to = To { sums, fresh: row == 0, done: None };
            d.tiles(&panel, &gradients.x[row..], gradients.stride, m, to);
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
