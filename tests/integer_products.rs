//! Integer products: every instruction set against the definition, computed in f64.

// Helpers outside of test functions.
#![allow(clippy::unwrap_used)]

use half::{bf16, f16};
use nybble::backend::cpu::integer::{Integer, Product};
use nybble::backend::cpu::{Cpu, Isa, Lanes, Quantizer};
use nybble::dtype::Element;
use nybble::format::{Decode, Format, Scale};
use nybble::quant::integer::{GROUP, Integers, quantize_activations};
use nybble::tensor::{Layout, QTensor, Scales, ScalesMut};
use proptest::prelude::*;

/// Numbers in -1..1 that follow from a seed.
fn noise(seed: u64, length: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// A quantized matrix with its buffers.
struct Stored {
    layout: Layout,
    packed: Vec<u8>,
    plain: Vec<f32>,
    bytes: Vec<u8>,
    nested: Vec<f32>,
    offset: f32,
}

impl Stored {
    fn new(format: Format, shape: [usize; 2], blocksize: Option<usize>, nested: bool) -> Self {
        let layout = Layout::new(format, &shape, blocksize, nested).unwrap();
        let spec = format.spec();
        let byte_scales = nested || spec.scale == Scale::E8M0;
        let mut stored = Self {
            layout,
            packed: vec![0; layout.packed],
            plain: vec![0.0; if byte_scales { 0 } else { layout.scales }],
            bytes: vec![0; if byte_scales { layout.scales } else { 0 }],
            nested: vec![0.0; layout.nested_scales()],
            offset: 0.0,
        };
        let scales = if nested {
            ScalesMut::Nested {
                codes: &mut stored.bytes,
                absmax: &mut stored.nested,
                offset: &mut stored.offset,
            }
        } else if byte_scales {
            ScalesMut::E8M0(&mut stored.bytes)
        } else {
            ScalesMut::Plain(&mut stored.plain)
        };
        let x = noise(7, layout.elements);
        let cpu = Cpu::with(Isa::Scalar, 1);
        let how = Quantizer::default();
        cpu.quantize_stored(&layout, how, &x, &mut stored.packed, scales).unwrap();
        stored
    }

    fn q(&self) -> QTensor<'_> {
        let scales = if self.layout.nested {
            Scales::Nested { codes: &self.bytes, absmax: &self.nested, offset: self.offset }
        } else if self.layout.format.spec().scale == Scale::E8M0 {
            Scales::E8M0(&self.bytes)
        } else {
            Scales::Plain(&self.plain)
        };
        QTensor::new(self.layout, &self.packed, scales).unwrap()
    }

    /// The definition in f64, and the sum of magnitudes: what an error is measured by.
    fn product<T: Element>(&self, x: &[T], columns: usize, bias: &[f32]) -> Vec<(f64, f64)> {
        let integers = Integers::of(self.layout.format).unwrap();
        let mut scales = vec![0.0; self.layout.scales];
        self.q().scales().decode(0, &mut scales);
        let mut out = Vec::new();
        for x in x.chunks(columns) {
            let (mut codes, mut groups) = (vec![0; columns], vec![0.0; columns.div_ceil(GROUP)]);
            quantize_activations(x, &mut codes, &mut groups);
            for (n, bias) in bias.iter().enumerate() {
                let (mut y, mut magnitude) = (f64::from(*bias), f64::from(bias.abs()));
                for (k, code) in codes.iter().enumerate() {
                    let i = n * columns + k;
                    let nibble = self.packed[i / 2] >> (4 * ((i + 1) % 2)) & 15;
                    let weight = f64::from(integers.values[usize::from(nibble)])
                        * f64::from(integers.step)
                        * f64::from(scales[i / self.layout.blocksize]);
                    let term = weight * f64::from(*code) * f64::from(groups[k / GROUP]);
                    y += term;
                    magnitude += term.abs();
                }
                out.push((y, magnitude));
            }
        }
        out
    }
}

/// Half a unit in the last place of `T`, relative.
fn rounding<T: Element>() -> f64 {
    match size_of::<T>() {
        4 => f64::from(f32::EPSILON),
        // bf16 is the coarser of the two.
        _ => 1.0 / 256.0,
    }
}

fn check<T: Lanes>(stored: &Stored, [tokens, rows, columns]: [usize; 3], has_bias: bool) {
    let x: Vec<T> = noise(3, tokens * columns).into_iter().map(T::from_f32).collect();
    let bias = if has_bias { noise(5, rows) } else { vec![0.0; rows] };
    let expected = stored.product(&x, columns, &bias);
    // Sums of integers are exact up to the conversion to f32 (one rounding). Then each of the
    // blocks, groups and lanes adds at most one rounding of a partial sum, and the scales three.
    let sums = columns / 32 + columns / GROUP + 32;
    for threads in [1, 2] {
        for integer in Integer::available(threads) {
            let mut out = vec![T::from_f32(9.0); tokens * rows];
            let product = Product { columns, bias: has_bias.then_some(&bias) };
            integer.linear(&x, &stored.q(), product, &mut out).unwrap();
            for (i, (out, (y, magnitude))) in out.iter().zip(&expected).enumerate() {
                let bound = f64::from(f32::EPSILON) * (sums + 4) as f64 * magnitude
                    + rounding::<T>() * y.abs()
                    + 1e-30;
                let error = (f64::from(out.to_f32()) - y).abs();
                assert!(
                    error <= bound,
                    "{} {} {tokens}x{rows}x{columns} output {i}: {out:?} for {y}, bound {bound}",
                    integer.name(),
                    stored.layout.format,
                );
            }
        }
    }
}

fn formats4() -> Vec<Format> {
    let four = |format: &Format| matches!(format.spec().decode, Decode::Codebook4(_));
    Format::ALL.iter().copied().filter(four).collect()
}

#[test]
fn every_instruction_set_multiplies_like_the_definition() {
    for format in formats4() {
        let sizes = format.spec().blocksizes;
        for blocksize in [sizes[0], sizes[sizes.len() / 2], sizes[sizes.len() - 1]] {
            for nested in [false, format.spec().nestable] {
                for shape in [[1, 3, 4096], [5, 33, 4096], [8, 70, 8192]] {
                    let stored = Stored::new(format, [shape[1], shape[2]], Some(blocksize), nested);
                    check::<f32>(&stored, shape, true);
                }
            }
        }
    }
}

#[test]
fn more_tokens_than_one_panel_takes() {
    let stored = Stored::new(Format::Nf4, [40, 320], None, false);
    check::<bf16>(&stored, [515, 40, 320], true);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn ragged_shapes_multiply_like_the_definition(
        format in proptest::sample::select(formats4()),
        tokens in 1usize..20,
        rows in 1usize..70,
        columns in prop_oneof![1usize..700, (1usize..40).prop_map(|blocks| 32 * blocks)],
        size in 0usize..4,
        nested: bool,
        has_bias: bool,
        dtype in 0..3,
    ) {
        let spec = format.spec();
        let blocksize = spec.blocksizes[size.min(spec.blocksizes.len() - 1)];
        let nested = nested && spec.nestable;
        let stored = Stored::new(format, [rows, columns], Some(blocksize), nested);
        let shape = [tokens, rows, columns];
        match dtype {
            0 => check::<f32>(&stored, shape, has_bias),
            1 => check::<f16>(&stored, shape, has_bias),
            _ => check::<bf16>(&stored, shape, has_bias),
        }
    }

    #[test]
    fn llm_int8_is_the_same_integer_sum_everywhere(
        tokens in prop_oneof![1usize..20, 20usize..70],
        rows in 1usize..70,
        columns in prop_oneof![1usize..700, 700usize..3000],
        every in 0usize..50,
    ) {
        same_integer_sums([tokens, rows, columns], every);
    }
}

/// Compares all products of LLM.int8() with the first; each `every`th column has outliers.
fn same_integer_sums([tokens, rows, columns]: [usize; 3], every: usize) {
    let stored = Stored::new(Format::Int8, [rows, columns], None, false);
    let mut x = noise(11, tokens * columns);
    for (i, x) in x.iter_mut().enumerate() {
        if every > 1 && (i % columns) % every == 1 {
            *x *= 20.0;
        }
    }
    let bias = noise(13, rows);
    let run = |integer: &Integer| {
        let mut out = vec![0f32; tokens * rows];
        let product = Product { columns, bias: Some(&bias) };
        integer.llm_int8(&x, &stored.q(), 6.0, product, &mut out).unwrap();
        out
    };
    let all = Integer::available(2);
    let expected = run(&all[0]);
    let outliers = columns.checked_div(every).map_or(0, |n| n + 1);
    for integer in &all {
        for (out, expected) in run(integer).iter().zip(&expected) {
            // The integer part is exact; the outliers are sums of so many terms up to 20.
            let bound = f32::EPSILON * (outliers * outliers * 20 + 1) as f32 * 4.0;
            let bound = if every > 1 { bound } else { 0.0 };
            assert!((out - expected).abs() <= bound, "{} {out} {expected}", integer.name());
        }
    }
}

#[test]
fn few_tokens_of_long_rows_have_the_same_integer_sums() {
    for tokens in [2, 3, 4] {
        same_integer_sums([tokens, 41, 16_500], 0);
    }
}

#[test]
fn rows_longer_than_an_i32_can_sum_are_exact() {
    let columns = 140_000;
    let layout = Layout::new(Format::Int8, &[2, columns], None, false).unwrap();
    let packed = vec![127u8; 2 * columns];
    let q = QTensor::new(layout, &packed, Scales::Plain(&[1.0, 1.0])).unwrap();
    for integer in Integer::available(1) {
        let mut out = [0f32; 2];
        let product = Product { columns, bias: None };
        integer.llm_int8(&vec![1f32; columns], &q, 0.0, product, &mut out).unwrap();
        assert!((out[0] - columns as f32).abs() < 0.1, "{}: {out:?}", integer.name());
    }
}

#[test]
fn a_token_that_is_not_finite_is_nan_and_others_are_not() {
    let stored = Stored::new(Format::Nf4, [40, 256], None, false);
    for integer in Integer::available(1) {
        for tokens in [2, 7] {
            let mut x = noise(1, tokens * 256);
            x[300] = f32::INFINITY;
            let mut out = vec![0f32; tokens * 40];
            let product = Product { columns: 256, bias: None };
            integer.linear(&x, &stored.q(), product, &mut out).unwrap();
            assert!(out[40..80].iter().all(|y| y.is_nan()), "{}", integer.name());
            assert!(out[..40].iter().all(|y| y.is_finite()), "{}", integer.name());
        }
    }
}

#[test]
fn wrong_lengths_and_formats_are_errors() {
    let stored = Stored::new(Format::Nf4, [4, 64], None, false);
    let integer = Integer::new(Cpu::with(Isa::Scalar, 1));
    let x = [0f32; 64];
    let product = |columns, bias| Product { columns, bias };
    assert!(integer.linear(&x, &stored.q(), product(64, None), &mut [0.0; 3]).is_err());
    assert!(integer.linear(&x[1..], &stored.q(), product(64, None), &mut [0.0; 4]).is_err());
    assert!(integer.linear(&x, &stored.q(), product(63, None), &mut [0.0; 4]).is_err());
    let bias = [0.0; 3];
    assert!(integer.linear(&x, &stored.q(), product(64, Some(&bias)), &mut [0.0; 4]).is_err());
    assert!(integer.llm_int8(&x, &stored.q(), 0.0, product(64, None), &mut [0.0; 4]).is_err());
    let dynamic = Stored::new(Format::Dynamic8, [4, 64], None, false);
    assert!(integer.linear(&x, &dynamic.q(), product(64, None), &mut [0.0; 4]).is_err());
}
