//! Few rows of activations and a weight of signed bytes with a scale for each row, which is read
//! as it lies in memory. The scale is applied to the sum over the row.

use super::ahead::AHEAD;
use super::few::FEW;
use super::lanes::Vector;
use crate::backend::cpu::aligned::LINE;
use crate::quant::rowwise::INVERSE_QMAX;

/// A product of up to [`FEW`] rows with a weight of signed bytes.
pub struct Bytes<'a> {
    /// All rows of the weight.
    pub codes: &'a [i8],
    /// The largest magnitude of each row.
    pub absmax: &'a [f32],
    /// Elements of a row.
    pub columns: usize,
    /// Rows of activations.
    pub m: usize,
    /// The activations.
    pub x: &'a [f32],
}

/// `out[n][m]` for the rows of the weight from `first` on, as many as `out` holds.
#[inline(always)]
pub fn rows<V: Vector>(v: V, bytes: &Bytes<'_>, first: usize, out: &mut [f32]) {
    match bytes.m {
        1 => all::<V, 1>(v, bytes, first, out),
        2 => all::<V, 2>(v, bytes, first, out),
        3 => all::<V, 3>(v, bytes, first, out),
        _ => all::<V, FEW>(v, bytes, first, out),
    }
}

#[inline(always)]
fn all<V: Vector, const M: usize>(v: V, bytes: &Bytes<'_>, first: usize, out: &mut [f32]) {
    let columns = bytes.columns;
    assert!(bytes.x.len() >= M * columns);
    let rows = bytes.codes[first * columns..].chunks_exact(columns).zip(&bytes.absmax[first..]);
    for ((codes, absmax), out) in rows.zip(out.chunks_exact_mut(M)) {
        let sums = row::<V, M>(v, codes, bytes.x);
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = sum * (absmax * INVERSE_QMAX);
        }
    }
}

/// The sums of a row of codes with `M` rows of activations of the same length.
#[inline(always)]
fn row<V: Vector, const M: usize>(v: V, codes: &[i8], x: &[f32]) -> [f32; M] {
    // Vectors at a time, each with sums of its own: an addition takes several cycles.
    const TOGETHER: usize = 4;
    let (columns, step) = (codes.len(), TOGETHER * V::LANES);
    assert!(x.len() >= M * columns);
    let mut acc = [[v.splat(0.0); M]; TOGETHER];
    let whole = columns / step * step;
    for i in (0..whole).step_by(step) {
        if i % LINE < step {
            v.prefetch_far(codes.as_ptr().cast::<u8>().wrapping_add(i + AHEAD));
        }
        for (j, acc) in acc.iter_mut().enumerate() {
            let at = i + j * V::LANES;
            // SAFETY: a vector from `at` on is inside the codes and each row of activations.
            let weights = unsafe { v.load_bytes(codes.as_ptr().add(at)) };
            for (m, acc) in acc.iter_mut().enumerate() {
                // SAFETY: as above.
                let x = unsafe { v.load(x.as_ptr().add(m * columns + at)) };
                *acc = v.fma(weights, x, *acc);
            }
        }
    }
    let mut sums = [0.0; M];
    for (m, sum) in sums.iter_mut().enumerate() {
        let pairs = (v.add(acc[0][m], acc[1][m]), v.add(acc[2][m], acc[3][m]));
        *sum = v.sum(v.add(pairs.0, pairs.1));
        let rest = codes[whole..].iter().zip(&x[m * columns + whole..(m + 1) * columns]);
        for (code, x) in rest {
            *sum += f32::from(*code) * x;
        }
    }
    sums
}
