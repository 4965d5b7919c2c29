//! The definition spread over threads: for machines without vectors, rows that are not whole
//! blocks, and rows too long for an i32.

use super::job::{Eight, Four};
use super::rows::{INVERSE_SQUARE, outlier, scaled};
use crate::backend::cpu::product::Out;
use crate::backend::cpu::threads::share;
use crate::dtype::Element;
use crate::quant::integer::{MAX_COLUMNS, Row, dot};

/// Rows of the weight that a thread takes at a time.
const RUN: usize = 16;

/// The product with no columns.
pub fn bias_only<T: Element>(bias: &[f32], out: &mut [T]) {
    for out in out.chunks_exact_mut(bias.len()) {
        for (out, bias) in out.iter_mut().zip(bias) {
            *out = T::from_f32(*bias);
        }
    }
}

/// Any four-bit weight; the activations lie in their own order.
pub fn four<T: Element>(threads: usize, job: &Four<'_>, out: &mut [T]) {
    let blocksize = job.q.layout().blocksize;
    each_row(threads, job.bias.len(), out, |n, out| {
        let mut row = Row::default();
        row.decode(
            job.integers,
            job.q.packed(),
            (n * job.columns, job.columns),
            blocksize,
            |block| {
                let mut scale = [0.0];
                job.q.scales().decode(block, &mut scale);
                scale[0]
            },
        );
        for token in 0..job.x.tokens {
            let scales = &job.x.scales[token * job.x.groups..(token + 1) * job.x.groups];
            out(token, row.dot(job.x.row(token), scales) + job.bias[n]);
        }
    });
}

/// Any int8 weight.
pub fn eight<T: Element>(threads: usize, job: &Eight<'_>, out: &mut [T]) {
    each_row(threads, job.bias.len(), out, |n, out| {
        let weight = &job.weight[n * job.columns..(n + 1) * job.columns];
        for token in 0..job.x.tokens {
            let (codes, scale) = (&job.x.row(token)[..job.columns], job.x.scales[token]);
            let mut y = if job.columns <= MAX_COLUMNS {
                scaled(dot(weight, codes), scale, job.absmax[n])
            } else {
                let pieces = weight.chunks(MAX_COLUMNS).zip(codes.chunks(MAX_COLUMNS));
                let sum: i64 = pieces.map(|(a, b)| i64::from(dot(a, b))).sum();
                sum as f32 * (scale * job.absmax[n]) * INVERSE_SQUARE
            };
            let outlying = &job.outlying[token * job.apart..(token + 1) * job.apart];
            let apart = job.outliers.iter().zip(outlying);
            if job.apart > 0 {
                y += apart.map(|(c, x)| outlier(weight[*c], job.absmax[n]) * x).sum::<f32>();
            }
            out(token, y + job.bias[n]);
        }
    });
}

/// Calls `work` with each row of the weight and a function that takes (token, output).
fn each_row<T: Element>(
    threads: usize,
    rows: usize,
    out: &mut [T],
    work: impl Fn(usize, &mut dyn FnMut(usize, f32)) + Sync,
) {
    let out = Out::new(out, rows);
    share(threads, rows.div_ceil(RUN), |part| {
        for n in part * RUN..rows.min((part + 1) * RUN) {
            work(n, &mut |token, y| {
                // SAFETY: outputs of this row belong to this call alone.
                unsafe { out.part(token, n, 1)[0] = T::from_f32(y) };
            });
        }
    });
}
