//! Few rows of activations and a decoded row of a weight, and what both ways end with.

use super::super::Lanes;
use super::lanes::Vector;
use super::out::Out;

/// `out[m]`: the products of one row of the weight with rows of activations of the same length.
#[inline(always)]
pub fn row<V: Vector>(v: V, weights: &[f32], x: &[f32], out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weights.len()).zip(out) {
        *out = dot(v, weights, x);
    }
}

#[inline(always)]
fn dot<V: Vector>(v: V, a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [v.splat(0.0); 4];
    let length = a.len().min(b.len());
    let mut i = 0;
    while i + 4 * V::LANES <= length {
        for (j, acc) in acc.iter_mut().enumerate() {
            // SAFETY: four vectors from `i` on are inside both slices.
            let (a, b) = unsafe {
                let at = i + j * V::LANES;
                (v.load(a.as_ptr().add(at)), v.load(b.as_ptr().add(at)))
            };
            *acc = v.fma(a, b, *acc);
        }
        i += 4 * V::LANES;
    }
    let sum = v.sum(v.add(v.add(acc[0], acc[1]), v.add(acc[2], acc[3])));
    a[i..length].iter().zip(&b[i..length]).fold(sum, |sum, (a, b)| sum + a * b)
}

/// Adds the bias and rounds.
#[inline(always)]
pub fn finish<V: Vector, T: Lanes>(v: V, sums: &[f32], bias: Option<&[f32]>, out: &mut [T]) {
    let length = out.len().min(sums.len()).min(bias.map_or(usize::MAX, <[f32]>::len));
    let mut i = 0;
    while i + V::LANES <= length {
        // SAFETY: a vector from `i` on is inside all slices.
        unsafe {
            let mut sum = v.load(sums.as_ptr().add(i));
            if let Some(bias) = bias {
                sum = v.add(sum, v.load(bias.as_ptr().add(i)));
            }
            v.store_as(sum, out.as_mut_ptr().add(i));
        }
        i += V::LANES;
    }
    for i in i..length {
        out[i] = T::from_f32(sums[i] + bias.map_or(0.0, |bias| bias[i]));
    }
}

/// The same for rows of sums, `pitch` apart: columns from `first` on of rows from `row` on. There
/// are as many columns as in `bias`, if it is given, and at most `count`.
///
/// # Safety
/// Nothing else uses these elements of `out` meanwhile.
#[inline(always)]
pub unsafe fn finish_rows<V: Vector, T: Lanes>(
    v: V,
    (sums, pitch): (&[f32], usize),
    bias: Option<&[f32]>,
    out: &Out<'_, T>,
    (row, first, count): (usize, usize, usize),
) {
    for (i, sums) in sums.chunks_exact(pitch).enumerate() {
        // SAFETY: the caller's.
        finish(v, sums, bias, unsafe { out.part(row + i, first, count) });
    }
}

/// Widens.
#[inline(always)]
pub fn widen<V: Vector, T: Lanes>(v: V, x: &[T], out: &mut [f32]) {
    let length = out.len().min(x.len());
    let mut i = 0;
    while i + V::LANES <= length {
        // SAFETY: a vector from `i` on is inside both slices.
        unsafe { v.store(v.load_as(x.as_ptr().add(i)), out.as_mut_ptr().add(i)) };
        i += V::LANES;
    }
    for i in i..length {
        out[i] = x[i].to_f32();
    }
}
