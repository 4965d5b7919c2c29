//! LLM.int8() (arXiv:2208.07339): one scale a row, signed bytes, and columns of outliers.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::dtype::Element;
use crate::quant::blockwise::absmax;

/// The largest code.
pub const QMAX: f32 = 127.0;

/// 1/127 as bitsandbytes multiplies by it, in f32.
pub const INVERSE_QMAX: f32 = 7.874_015_718_698_502e-3_f64 as f32;

/// Quantizes one row: code = x * (127 / absmax), rounded to nearest, ties to even. Returns the
/// row's largest magnitude; if that is not finite the codes are meaningless. A row of zeros has
/// codes and scale 0.
#[inline(always)]
pub fn quantize_row<T: Element>(x: &[T], codes: &mut [i8]) -> f32 {
    let absmax = absmax(x);
    quantize_row_by(x, absmax, row_factor(absmax), codes)
}

/// Quantizes one row as bitsandbytes does on a CPU: from fp16, and with the factor that torch
/// makes of `127.0 / absmax`, which is 1/absmax times 127, rounded twice.
pub fn quantize_row_like_bitsandbytes<T: Element>(x: &[T], codes: &mut [i8]) -> f32 {
    let x = through_f16(x);
    let absmax = absmax(&x);
    let factor = if absmax == 0.0 { 0.0 } else { absmax.recip() * QMAX };
    quantize_row_by(&x, absmax, factor, codes)
}

#[inline(always)]
fn quantize_row_by<T: Element>(x: &[T], absmax: f32, factor: f32, codes: &mut [i8]) -> f32 {
    for (code, x) in codes.iter_mut().zip(x) {
        *code = row_code(x.to_f32(), absmax, factor);
    }
    absmax
}

/// What a row is multiplied by; infinite for a row too small for it, 0 for a row of zeros.
#[inline(always)]
pub fn row_factor(absmax: f32) -> f32 {
    if absmax == 0.0 { 0.0 } else { QMAX / absmax }
}

/// The code of one value. A row so small that its factor overflows is divided instead.
#[inline(always)]
pub fn row_code(x: f32, absmax: f32, factor: f32) -> i8 {
    let scaled = if factor.is_finite() { x * factor } else { x / absmax * QMAX };
    scaled.round_ties_even() as i8
}

/// Decodes one row: value = code * absmax * (1/127) in f32, rounded once to `T`.
#[inline(always)]
pub fn dequantize_row<T: Element>(codes: &[i8], absmax: f32, out: &mut [T]) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = T::from_f32(f32::from(*code) * absmax * INVERSE_QMAX);
    }
}

/// Values rounded to fp16, as bitsandbytes rounds every weight that it makes int8.
pub fn through_f16<T: Element>(x: &[T]) -> Vec<f32> {
    let mut wide: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
    let mut halves = vec![f16::ZERO; x.len()];
    // Whole slices: half looks for the machine's instruction at every call.
    halves.convert_from_f32_slice(&wide);
    halves.convert_to_f32_slice(&mut wide);
    wide
}

/// The columns of a `[rows, columns]` matrix that hold a magnitude of at least `threshold`,
/// ascending.
pub fn outlier_columns<T: Element>(x: &[T], columns: usize, threshold: f32) -> Vec<usize> {
    if columns == 0 {
        return Vec::new();
    }
    let mut outlier = vec![false; columns];
    for row in x.chunks_exact(columns) {
        for (outlier, x) in outlier.iter_mut().zip(row) {
            *outlier |= x.to_f32().abs() >= threshold;
        }
    }
    outlier.iter().enumerate().filter(|(_, outlier)| **outlier).map(|(column, _)| column).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(x: &[f32]) -> (Vec<i8>, f32) {
        let mut codes = vec![99; x.len()];
        let absmax = quantize_row(x, &mut codes);
        (codes, absmax)
    }

    #[test]
    fn halves_go_to_the_even_code() {
        assert_eq!(codes(&[127.0, 0.5, 1.5, 2.5, -2.5]), (vec![127, 0, 2, 2, -2], 127.0));
    }

    #[test]
    fn torch_rounds_the_factor_twice() {
        let x = [0.065_917_97, 0.131_835_94].map(half::f16::from_f32);
        let (mut exact, mut like) = ([0; 2], [0; 2]);
        quantize_row(&x, &mut exact);
        quantize_row_like_bitsandbytes(&x, &mut like);
        assert_eq!((exact, like), ([64, 127], [63, 127]));
    }

    #[test]
    fn a_row_of_zeros_is_zeros() {
        assert_eq!(codes(&[0.0, -0.0]), (vec![0, 0], 0.0));
    }

    #[test]
    fn the_smallest_numbers_keep_their_ratios() {
        let tiny = f32::from_bits(4);
        assert_eq!(codes(&[tiny, -tiny, tiny / 2.0]).0, [127, -127, 64]);
    }

    #[test]
    fn outlier_columns_are_found_in_any_row() {
        let x = [0.0, 7.0, 1.0, -6.0, 0.0, 1.0];
        assert_eq!(outlier_columns(&x, 3, 6.0), [0, 1]);
        assert!(outlier_columns(&x, 3, 8.0).is_empty());
        assert!(outlier_columns::<f32>(&[], 0, 1.0).is_empty());
    }
}
