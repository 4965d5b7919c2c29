//! The definition of a product with a quantized weight, and how far a fast one may be from it.
//!
//! `y[m, n] = sum over k of x[m, k] * W[n, k] + bias[n]` with `W[n, k] = decode(code) * scale`.
//! Codes are exact, scales are applied and sums are kept in f32 or better; only the result is
//! rounded to the type of the activations. The order of a sum is not defined, so fast kernels
//! are held to [`bound`] and not to bits.

use crate::dtype::{Dtype, Element};

/// One element of the product, and the sum of the magnitudes of its terms, in f64.
pub fn dot<T: Element>(x: &[T], weights: &[f32], bias: f32) -> (f64, f64) {
    let terms = x.iter().zip(weights).map(|(x, w)| f64::from(x.to_f32()) * f64::from(*w));
    let bias = f64::from(bias);
    terms.fold((bias, bias.abs()), |(sum, magnitude), term| (sum + term, magnitude + term.abs()))
}

/// Half a unit in the last place of a number of this type, relative to the number.
pub const fn half_ulp(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 1.0 / (1u32 << 24) as f64,
        Dtype::F16 => 1.0 / (1u32 << 11) as f64,
        Dtype::BF16 => 1.0 / (1u32 << 8) as f64,
    }
}

/// The error that is allowed to an element whose terms' magnitudes sum to `magnitude`.
///
/// In whatever order `terms` terms are summed in f32, a term takes part in fewer additions than
/// there are terms; each rounds, and so do its products with the scale and the activation. Units
/// that multiply bf16 may round to odd, which is off by a unit and not by half of one. With
/// `narrow` weights (a codebook or a decoded weight in bf16) each term is off by half a unit of
/// bf16 at most. The result is rounded once to the type of the activations.
pub fn bound(dtype: Dtype, narrow: bool, terms: usize, sum: f64, magnitude: f64) -> f64 {
    let additions = (terms + 4) as f64 * if narrow { 2.0 } else { 1.0 };
    let weight = if narrow { half_ulp(Dtype::BF16) } else { 0.0 };
    // A subnormal result of f16 has a fixed step; half of it is 2^-25.
    let step = if matches!(dtype, Dtype::F16) { 2f64.powi(-25) } else { 0.0 };
    let before = (additions * half_ulp(Dtype::F32) + weight) * magnitude;
    before + half_ulp(dtype) * (sum.abs() + before) + step + f64::from(f32::MIN_POSITIVE)
}
