//! Double quantization: the scales of the blocks become eight-bit codes themselves.
//!
//! QLoRA (arXiv:2305.14314), section 3: the mean of the scales is subtracted, the rest is
//! quantized in blocks of 256 with the signed dynamic codebook:
//! `value = codebook[code] * nested_absmax[block] + offset`.

use std::sync::LazyLock;

use crate::error::Result;
use crate::format::Scale;
use crate::format::codebook::{Codebook, DYNAMIC};
use crate::pack::check_len;
use crate::quant::blockwise::{Blocks, Divisor, absmax, quantize8};
use crate::quant::{Reference, torch_sum};

/// Scales that share a scale.
pub const NESTED_BLOCKSIZE: usize = 256;

/// Quantizes scales in place of their f32 form; returns the offset.
///
/// `codes` has one byte a scale, `nested_absmax` one value per 256 of them.
pub fn quantize(
    scales: &[f32],
    reference: Reference,
    codes: &mut [u8],
    nested_absmax: &mut [f32],
) -> Result<f32> {
    quantize_by(quantize8, scales, reference, codes, nested_absmax)
}

/// [`quantize`] with a kernel that computes what [`quantize8`] does.
pub fn quantize_by(
    quantize8: fn(&Codebook<256>, Blocks, &[f32], &mut [u8], &mut [f32]) -> bool,
    scales: &[f32],
    reference: Reference,
    codes: &mut [u8],
    nested_absmax: &mut [f32],
) -> Result<f32> {
    check_len("codes of absmax", scales.len(), codes.len())?;
    check_len("nested_absmax", scales.len().div_ceil(NESTED_BLOCKSIZE), nested_absmax.len())?;
    if scales.is_empty() {
        return Ok(0.0);
    }
    let offset = torch_sum::mean(scales);
    let how = Blocks::new(NESTED_BLOCKSIZE, Scale::Absmax, reference);
    let mut shifted = [0f32; NESTED_BLOCKSIZE];
    for ((scales, codes), nested) in
        scales.chunks(NESTED_BLOCKSIZE).zip(codes.chunks_mut(NESTED_BLOCKSIZE)).zip(nested_absmax)
    {
        let shifted = &mut shifted[..scales.len()];
        for (shifted, scale) in shifted.iter_mut().zip(scales) {
            *shifted = scale - offset;
        }
        match reference {
            Reference::Exact => {
                quantize8(&DYNAMIC, how, shifted, codes, std::slice::from_mut(nested));
            }
            Reference::BitsandbytesCpu => {
                *nested = absmax(shifted);
                encode_by_table(*nested, shifted, codes);
            }
        }
    }
    Ok(offset)
}

/// One scale back from its code.
#[inline(always)]
pub fn decode(code: u8, nested_absmax: f32, offset: f32) -> f32 {
    DYNAMIC.values[usize::from(code)] * nested_absmax + offset
}

/// The scales of a nested block, back from their codes.
pub fn decode_block(codes: &[u8], nested_absmax: f32, offset: f32, out: &mut [f32]) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = decode(*code, nested_absmax, offset);
    }
}

const TABLE_STEPS: f32 = 65_535.0;

/// bitsandbytes' CPU code finds 8-bit codes through 65,536 steps between -1 and 1
/// (`csrc/cpu_ops.cpp` at 95f9af3): the code of step i is the number of midpoints below it.
static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let (values, midpoints) = (&DYNAMIC.values, DYNAMIC.values.windows(2));
    let midpoints: Vec<f32> = midpoints.map(|pair| 0.5 * (pair[0] + pair[1])).collect();
    debug_assert_eq!(midpoints.len() + 1, values.len());
    (0..=u16::MAX)
        .map(|i| -1.0 + 2.0 * f32::from(i) / TABLE_STEPS)
        .map(|step| midpoints.partition_point(|midpoint| *midpoint < step) as u8)
        .collect()
});

fn encode_by_table(absmax: f32, x: &[f32], codes: &mut [u8]) {
    if absmax == 0.0 {
        codes.fill(0);
        return;
    }
    let divisor = Divisor::Times(1.0 / absmax);
    for (code, x) in codes.iter_mut().zip(x) {
        let x = divisor.apply(*x).clamp(-1.0, 1.0);
        // A float to integer cast saturates and truncates, as C's does within range.
        let step = ((x + 1.0) * 0.5 * TABLE_STEPS + 0.5) as u16;
        *code = TABLE[usize::from(step)];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(scales: &[f32], reference: Reference) -> Vec<f32> {
        let mut codes = vec![0; scales.len()];
        let mut nested = vec![0.0; scales.len().div_ceil(NESTED_BLOCKSIZE)];
        let offset = quantize(scales, reference, &mut codes, &mut nested).unwrap();
        codes
            .chunks(NESTED_BLOCKSIZE)
            .zip(&nested)
            .flat_map(|(codes, nested)| codes.iter().map(|code| decode(*code, *nested, offset)))
            .collect()
    }

    #[test]
    fn equal_scales_come_back_exactly() {
        for reference in [Reference::Exact, Reference::BitsandbytesCpu] {
            assert_eq!(round_trip(&[0.25; 300], reference), vec![0.25; 300]);
        }
    }

    #[test]
    fn scales_come_back_within_half_a_gap() {
        let scales: Vec<f32> = (0..1000).map(|i| 0.05 + ((i * 37) % 100) as f32 * 1e-3).collect();
        let again = round_trip(&scales, Reference::Exact);
        let bound = 0.5 * DYNAMIC.widest_gap() * 0.051;
        assert!(scales.iter().zip(&again).all(|(a, b)| (a - b).abs() <= bound));
    }

    #[test]
    fn no_scales_are_no_trouble() {
        assert!(round_trip(&[], Reference::Exact).is_empty());
    }
}
