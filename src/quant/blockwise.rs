//! Blockwise quantization: the scalar definition.
//!
//! A tensor is flattened row by row and cut into blocks of `blocksize` values; blocks ignore
//! rows, and the last one may be short. A block's scale is its largest magnitude (or a power of
//! two near it); its values are divided by the scale and replaced by the nearest code.

use crate::dtype::Element;
use crate::format::{Scale, codebook::Codebook};
use crate::quant::Reference;

/// How blocks are cut and scaled.
#[derive(Clone, Copy, Debug)]
pub struct Blocks {
    /// Elements that share a scale; even.
    pub blocksize: usize,
    /// What the scale is.
    pub scale: Scale,
    /// The smallest divisor of a whole block: 0, or bitsandbytes' 1e-38.
    pub floor: f32,
}

impl Blocks {
    /// The rule for whole blocks.
    pub const fn new(blocksize: usize, scale: Scale, reference: Reference) -> Self {
        let floor = match scale {
            Scale::Absmax => reference.floor(),
            Scale::E8M0 | Scale::RowAbsmax | Scale::None => 0.0,
        };
        Self { blocksize, scale, floor }
    }

    /// The stored scale of a block, from its largest magnitude.
    #[inline(always)]
    pub fn scale(&self, absmax: f32) -> f32 {
        match self.scale {
            Scale::E8M0 => e8m0_scale(absmax),
            Scale::Absmax | Scale::RowAbsmax | Scale::None => absmax,
        }
    }

    /// How the values of a block with this scale are brought into the codebook's range.
    #[inline(always)]
    pub fn divisor(&self, scale: f32) -> Divisor {
        let reciprocal = 1.0 / scale.max(self.floor);
        if reciprocal.is_finite() { Divisor::Times(reciprocal) } else { Divisor::By(scale) }
    }
}

/// Multiplication by the reciprocal where that is finite, else a division.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Divisor {
    /// Multiply by this.
    Times(f32),
    /// Divide by this; zero divides everything to zero.
    By(f32),
}

impl Divisor {
    /// Brings one value into the codebook's range.
    #[inline(always)]
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Divisor::Times(reciprocal) => x * reciprocal,
            Divisor::By(0.0) => 0.0,
            Divisor::By(scale) => x / scale,
        }
    }
}

/// The exponent of the largest E2M1 value: 6 = 1.5 * 2^2 (OCP MX 1.0, section 6.3).
const E2M1_EMAX: i32 = 2;

/// The power of two that brings `absmax` into E2M1's range: 2^(floor(log2(absmax)) - 2), at
/// least 2^-127.
#[inline(always)]
pub fn e8m0_scale(absmax: f32) -> f32 {
    // The biased exponent of a normal number; 0 for zero and subnormals, which are below 2^-126.
    let exponent = (absmax.to_bits() >> 23) as i32 - E2M1_EMAX;
    e8m0_decode(exponent.max(0) as u8)
}

/// 2^(code - 127); code 255 is NaN.
#[inline(always)]
pub fn e8m0_decode(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// The scales of blocks, back from their codes.
pub fn e8m0_decode_all(codes: &[u8], out: &mut [f32]) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = e8m0_decode(*code);
    }
}

/// The code of a scale made by [`e8m0_scale`].
#[inline(always)]
pub fn e8m0_encode(scale: f32) -> u8 {
    (scale.to_bits() >> 23) as u8
}

/// The largest magnitude; not finite if any value is not.
#[inline(always)]
pub fn absmax<T: Element>(x: &[T]) -> f32 {
    // Magnitudes order like their bits, and NaN is above infinity.
    f32::from_bits(x.iter().map(|x| x.to_f32().to_bits() & 0x7fff_ffff).max().unwrap_or(0))
}

/// Encodes one block into packed nibbles, first element high. An odd last element is followed by
/// the code of 0.0, as bitsandbytes pads.
#[inline(always)]
pub fn encode4<T: Element>(book: &Codebook<16>, divisor: Divisor, x: &[T], packed: &mut [u8]) {
    let (pairs, odd) = x.as_chunks::<2>();
    let code = |x: T| book.encode(divisor.apply(x.to_f32()));
    for (byte, [high, low]) in packed.iter_mut().zip(pairs) {
        *byte = code(*high) << 4 | code(*low);
    }
    if let ([last], Some(byte)) = (odd, packed.get_mut(pairs.len())) {
        *byte = code(*last) << 4 | book.encode(0.0);
    }
}

/// Encodes one block, one byte an element.
#[inline(always)]
pub fn encode8<T: Element>(book: &Codebook<256>, divisor: Divisor, x: &[T], codes: &mut [u8]) {
    for (code, x) in codes.iter_mut().zip(x) {
        *code = book.encode(divisor.apply(x.to_f32()));
    }
}

/// Quantizes consecutive blocks; returns whether all values were finite. With a value that is
/// not, the output is meaningless.
///
/// `packed` holds `ceil(len / 2)` bytes and `scales` one value a block.
#[inline(always)]
pub fn quantize4<T: Element>(
    book: &Codebook<16>,
    how: Blocks,
    x: &[T],
    packed: &mut [u8],
    scales: &mut [f32],
) -> bool {
    let bytes = packed.chunks_mut(how.blocksize / 2);
    let mut finite = true;
    for ((x, packed), scale) in x.chunks(how.blocksize).zip(bytes).zip(scales) {
        let absmax = absmax(x);
        finite &= absmax.is_finite();
        *scale = how.scale(absmax);
        encode4(book, how.divisor(*scale), x, packed);
    }
    finite
}

/// Quantizes consecutive blocks to eight bits; like [`quantize4`] with one code a byte.
#[inline(always)]
pub fn quantize8<T: Element>(
    book: &Codebook<256>,
    how: Blocks,
    x: &[T],
    codes: &mut [u8],
    scales: &mut [f32],
) -> bool {
    let mut finite = true;
    for ((x, codes), scale) in
        x.chunks(how.blocksize).zip(codes.chunks_mut(how.blocksize)).zip(scales)
    {
        let absmax = absmax(x);
        finite &= absmax.is_finite();
        *scale = how.scale(absmax);
        encode8(book, how.divisor(*scale), x, codes);
    }
    finite
}

/// Decodes packed nibbles: value = table[code] * scale in f32, rounded once to `T`.
#[inline(always)]
pub fn dequantize4<T: Element>(
    values: &[f32; 16],
    blocksize: usize,
    packed: &[u8],
    scales: &[f32],
    out: &mut [T],
) {
    for ((out, packed), scale) in
        out.chunks_mut(blocksize).zip(packed.chunks(blocksize / 2)).zip(scales)
    {
        decode4(values, *scale, packed, out);
    }
}

/// Decodes the nibbles of one block.
#[inline(always)]
pub fn decode4<T: Element>(values: &[f32; 16], scale: f32, packed: &[u8], out: &mut [T]) {
    let decode = |code: u8| T::from_f32(values[usize::from(code & 15)] * scale);
    let (pairs, odd) = out.as_chunks_mut::<2>();
    for ([high, low], byte) in pairs.iter_mut().zip(packed) {
        (*high, *low) = (decode(byte >> 4), decode(*byte));
    }
    if let ([last], Some(byte)) = (odd, packed.last()) {
        *last = decode(byte >> 4);
    }
}

/// Decodes byte codes: value = table[code] * scale in f32, rounded once to `T`.
#[inline(always)]
pub fn dequantize8<T: Element>(
    values: &[f32; 256],
    blocksize: usize,
    codes: &[u8],
    scales: &[f32],
    out: &mut [T],
) {
    for ((out, codes), scale) in out.chunks_mut(blocksize).zip(codes.chunks(blocksize)).zip(scales)
    {
        for (out, code) in out.iter_mut().zip(codes) {
            *out = T::from_f32(values[usize::from(*code)] * scale);
        }
    }
}

/// Re-encodes a short last block as bitsandbytes' CPU code does: it divides where whole blocks
/// are multiplied by the reciprocal, and its absmax is at least 1e-38.
pub fn quantize4_tail_like_bitsandbytes<T: Element>(
    book: &Codebook<16>,
    x: &[T],
    packed: &mut [u8],
    scale: &mut f32,
) {
    *scale = absmax(x).max(Reference::BitsandbytesCpu.floor());
    encode4(book, Divisor::By(*scale), x, packed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::codebook::{E2M1, NF4};

    const HOW: Blocks = Blocks::new(64, Scale::Absmax, Reference::Exact);

    fn nf4(x: &[f32], how: Blocks) -> (Vec<u8>, Vec<f32>, bool) {
        let mut packed = vec![0; x.len().div_ceil(2)];
        let mut scales = vec![0.0; x.len().div_ceil(how.blocksize)];
        let finite = quantize4(&NF4, how, x, &mut packed, &mut scales);
        (packed, scales, finite)
    }

    #[test]
    fn zeros_give_the_code_of_zero_and_a_scale_of_zero() {
        let (packed, scales, finite) = nf4(&[0.0; 65], HOW);
        assert!(finite && packed.iter().all(|byte| *byte == 0x77));
        assert_eq!(scales, [0.0, 0.0]);
    }

    #[test]
    fn an_odd_end_is_padded_with_the_code_of_zero() {
        assert_eq!(nf4(&[1.0; 65], HOW).0[32], 0xf7);
    }

    #[test]
    fn the_smallest_numbers_keep_their_ratios() {
        let tiny = f32::from_bits(8);
        let (packed, _, finite) = nf4(&[tiny, -tiny, tiny / 2.0, 0.0], HOW);
        assert!(finite);
        assert_eq!(packed, nf4(&[1.0, -1.0, 0.5, 0.0], HOW).0);
    }

    #[test]
    fn nan_and_infinity_are_noticed() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!nf4(&[1.0, bad, 2.0], HOW).2);
        }
    }

    #[test]
    fn nan_and_infinity_are_noticed_behind_a_finite_scale() {
        let how = Blocks::new(32, Scale::E8M0, Reference::Exact);
        let bad = [1.0, f32::NEG_INFINITY];
        assert!(!quantize4(&E2M1, how, &bad, &mut [0], &mut [0.0]));
    }

    #[test]
    fn mx_scales_are_powers_of_two_and_survive_their_byte() {
        for (absmax, scale) in [(6.0, 1.0), (4.0, 1.0), (3.9, 0.5), (8.0, 2.0), (1.0, 0.25)] {
            assert_eq!(e8m0_scale(absmax), scale);
        }
        for absmax in [0.0, 1e-45, 1e-38, 1.0, f32::MAX] {
            let scale = e8m0_scale(absmax);
            assert_eq!(e8m0_decode(e8m0_encode(scale)).to_bits(), scale.to_bits());
        }
    }

    #[test]
    fn mxfp4_stores_its_own_values_exactly() {
        let x: Vec<f32> = E2M1.values.iter().chain(&E2M1.values).map(|x| x * 8.0).collect();
        let how = Blocks::new(32, Scale::E8M0, Reference::Exact);
        let (mut packed, mut scales, mut out) = (vec![0; 16], vec![0.0], vec![0f32; 32]);
        assert!(quantize4(&E2M1, how, &x, &mut packed, &mut scales));
        dequantize4(&E2M1.values, 32, &packed, &scales, &mut out);
        assert_eq!(out, x);
    }
}
