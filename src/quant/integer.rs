//! Products of quantized weights with activations of signed bytes: the scalar definition.
//!
//! Both factors become small integers, whose products are summed exactly:
//!
//! - A row of activations (a token) is cut into groups of [`GROUP`] values, the last one maybe
//!   short; each group is quantized like a row of LLM.int8(): code = x * (127 / absmax), rounded to
//!   nearest, ties to even.
//! - A four-bit code stands for an integer of [`Integers`] times one factor for the whole table.
//!   The values of int4 and mxfp4 are such integers; those of nf4 and fp4 are rounded, by at most
//!   [`Integers::error`] times the block's scale.
//! - y = sum over groups of (activation scale * sum over blocks of (weight scale * integer sum)),
//!   the integer sums in i32, the rest in f32. The order of the f32 sums is not part of the
//!   definition.
//!
//! A group with NaN or infinity makes every output of its token NaN.

use std::sync::OnceLock;

use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::format::{Decode, Format};
use crate::quant::rowwise;

/// Activations that share a scale.
pub const GROUP: usize = 256;

/// The largest magnitude of an integer, of weights and of activations.
pub const MAX: i8 = 127;

/// A table of sixteen values as integers: value = `values[code] * step`, nearly or exactly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Integers {
    /// The integer of each code.
    pub values: [i8; 16],
    /// What an integer is multiplied by.
    pub step: f32,
}

impl Integers {
    /// The integers of a table: of all scales that bring the largest value to an integer up to
    /// [`MAX`], the one with the least sum of squared errors, and the smallest among equals.
    ///
    /// ```
    /// use nybble::{format::codebook::{E2M1, INT4}, quant::integer::Integers};
    /// assert_eq!(Integers::new(&INT4.values).values[..4], [-8, -7, -6, -5]);
    /// assert_eq!(Integers::new(&E2M1.values).error(&E2M1.values), 0.0);
    /// ```
    pub fn new(table: &[f32; 16]) -> Self {
        let largest = table.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let scaled = |n: i8| {
            let factor = f64::from(n) / f64::from(largest);
            let values = table.map(|value| (f64::from(value) * factor).round_ties_even() as i8);
            let error: f64 = table
                .iter()
                .zip(values)
                .map(|(value, integer)| (f64::from(*value) - f64::from(integer) / factor).powi(2))
                .sum();
            (Self { values, step: factor.recip() as f32 }, error)
        };
        let mut best = scaled(1);
        for n in 2..=MAX {
            let next = scaled(n);
            // Rounding of the table to f32 is no reason to prefer one exact scale to another.
            if next.1 + 1e-12 < best.1 {
                best = next;
            }
        }
        best.0
    }

    /// The integers of a format with a table of sixteen values.
    pub fn of(format: Format) -> Result<&'static Self> {
        static TABLES: [OnceLock<Integers>; Format::ALL.len()] =
            [const { OnceLock::new() }; Format::ALL.len()];
        match (format.spec().decode, TABLES.get(format as usize)) {
            (Decode::Codebook4(book), Some(slot)) => {
                Ok(slot.get_or_init(|| Self::new(&book.values)))
            }
            _ => Err(Error::Unsupported {
                format: format.spec().name,
                what: "integer codes to compute with",
                remedy: "leave compute unset, or quantize to int8 or to a 4-bit format",
            }),
        }
    }

    /// The largest difference between a value and its integer times the step.
    pub fn error(&self, table: &[f32; 16]) -> f32 {
        let difference =
            |(value, integer): (&f32, i8)| (value - f32::from(integer) * self.step).abs();
        table.iter().zip(self.values).map(difference).fold(0.0, f32::max)
    }
}

/// Quantizes one group of activations; returns what its integers are multiplied by, NaN if a
/// value is not finite.
pub fn group_scale(absmax: f32) -> f32 {
    if absmax.is_finite() { absmax * rowwise::INVERSE_QMAX } else { f32::NAN }
}

/// Quantizes a row of activations: `codes` as long as `x`, a scale for each [`GROUP`].
pub fn quantize_activations<T: Element>(x: &[T], codes: &mut [i8], scales: &mut [f32]) {
    for ((x, codes), scale) in x.chunks(GROUP).zip(codes.chunks_mut(GROUP)).zip(scales) {
        *scale = group_scale(rowwise::quantize_row(x, codes));
    }
}

/// One row of a quantized matrix as integers, cut where a block or a group ends.
#[derive(Debug, Default)]
pub struct Row {
    /// The integer of each weight.
    pub codes: Vec<i8>,
    /// (end, group, scale) of each piece; the first begins at 0.
    pub pieces: Vec<(usize, usize, f32)>,
}

impl Row {
    /// Takes the row of `length` weights that begins at flat position `first`. `scale` gives the
    /// scale of a block; blocks lie along the flat tensor and need not end with a row.
    pub fn decode(
        &mut self,
        integers: &Integers,
        packed: &[u8],
        (first, length): (usize, usize),
        blocksize: usize,
        scale: impl Fn(usize) -> f32,
    ) {
        self.codes.clear();
        self.codes.extend((first..first + length).map(|i| {
            let code = packed[i / 2] >> if i.is_multiple_of(2) { 4 } else { 0 };
            integers.values[usize::from(code & 15)]
        }));
        self.pieces.clear();
        let mut start = 0;
        while start < length {
            let block = (first + start) / blocksize;
            let group = start / GROUP;
            let end = ((block + 1) * blocksize - first).min((group + 1) * GROUP).min(length);
            self.pieces.push((end, group, scale(block) * integers.step));
            start = end;
        }
    }

    /// The product with one row of quantized activations.
    pub fn dot(&self, codes: &[i8], scales: &[f32]) -> f32 {
        let (mut sum, mut start) = (0.0, 0);
        for &(end, group, scale) in &self.pieces {
            let integer = dot(&self.codes[start..end], &codes[start..end]);
            sum += integer as f32 * scale * scales[group];
            start = end;
        }
        sum
    }
}

/// The sum of products of integers; exact for up to 2^31 / 127^2 = 133,144 of them.
#[inline(always)]
pub fn dot(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum()
}

/// The longest row whose integer product fits in an i32 whatever the codes.
pub const MAX_COLUMNS: usize = (i32::MAX / (128 * MAX as i32)) as usize;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::codebook::{E2M1, FP4, INT4, NF4};

    #[test]
    fn integers_are_exact_where_the_values_are_multiples_of_one_number() {
        for table in [&INT4.values, &E2M1.values] {
            assert!(Integers::new(table).error(table) < 1e-7);
        }
    }

    #[test]
    fn rounded_tables_stay_within_half_a_step() {
        for table in [&NF4.values, &FP4.values] {
            let integers = Integers::new(table);
            let error = integers.error(table);
            assert!(error > 0.0 && error <= integers.step / 2.0 + 1e-7, "{integers:?} {error}");
            assert!(error < 0.006, "{integers:?} {error}");
        }
    }

    #[test]
    fn eight_bit_tables_have_no_integers() {
        assert!(Integers::of(Format::Dynamic8).is_err());
        assert!(Integers::of(Format::Bf16).is_err());
        assert_eq!(Integers::of(Format::Int4).unwrap().values[15], 7);
    }

    #[test]
    fn a_row_is_cut_at_blocks_and_groups() {
        let mut row = Row::default();
        let packed = vec![0x8f; 300];
        row.decode(&Integers::new(&INT4.values), &packed, (30, 300), 64, |block| block as f32);
        let ends: Vec<usize> = row.pieces.iter().map(|piece| piece.0).collect();
        assert_eq!(ends, [34, 98, 162, 226, 256, 290, 300]);
        assert_eq!(row.pieces[6].1, 1);
        assert_eq!(row.codes[..2], [0, 7]);
    }

    #[test]
    fn what_is_not_finite_makes_the_token_nan() {
        let (mut codes, mut scales) = ([0; 2], [0.0]);
        quantize_activations(&[1.0f32, f32::INFINITY], &mut codes, &mut scales);
        assert!(scales[0].is_nan());
    }
}
