//! Products of every instruction set of this machine against the definition, within its bound.
//!
//! Quick by default; `PROPTEST_CASES=1000 cargo test --release --test products` is thorough.

// Helpers outside of test functions.
#![allow(clippy::unwrap_used)]

use half::{bf16, f16};
use nybble::backend::cpu::{Cpu, Isa, Lanes, Quantizer};
use nybble::format::{Decode, Format};
use nybble::quant::product;
use nybble::tensor::{Layout, QTensor, Scales, ScalesMut};
use proptest::prelude::*;

/// Few cases unless the environment asks for more.
fn config(cases: u32) -> ProptestConfig {
    let asked = std::env::var_os("PROPTEST_CASES").is_some();
    let default = ProptestConfig::default();
    let cases = if asked { default.cases } else { cases };
    // A failure prints its input; nothing is written beside the sources.
    ProptestConfig { cases, failure_persistence: None, ..default }
}

/// A small generator: a case is a seed.
struct Random(u64);

impl Random {
    /// Between -1 and 1.
    fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 40) as f32 / 8_388_608.0 - 1.0
    }

    /// Near enough to normal.
    fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.unit()).sum::<f32>() * 0.707
    }

    fn fill<T: Lanes>(&mut self, length: usize, size: f32) -> Vec<T> {
        (0..length).map(|_| T::from_f32(self.normal() * size)).collect()
    }
}

/// What is multiplied.
#[derive(Clone, Debug)]
struct Case {
    format: Format,
    blocksize: Option<usize>,
    nested: bool,
    rows: usize,
    columns: usize,
    m: usize,
    bias: bool,
    threads: usize,
    seed: u64,
}

/// Columns that are whole blocks and whole vectors, whole blocks only, or neither.
fn columns() -> impl Strategy<Value = usize> {
    prop_oneof![
        (1usize..6).prop_map(|n| 256 * n),
        (1usize..40).prop_map(|n| 64 * n),
        (1usize..40).prop_map(|n| 32 * n),
        1usize..300,
        Just(2048usize + 64),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    let quantized: Vec<Format> = Format::ALL
        .iter()
        .copied()
        .filter(|format| !matches!(format.spec().decode, Decode::Dense(_)))
        .collect();
    let blocksize = prop::sample::select(vec![None, Some(32), Some(64), Some(128), Some(2048)]);
    let shape = (prop_oneof![1usize..40, 60usize..140], columns(), 1usize..30);
    let how = (prop::sample::select(quantized), blocksize, any::<bool>());
    (how, shape, any::<bool>(), 1usize..4, any::<u64>()).prop_map(
        |((format, blocksize, nested), (rows, columns, m), bias, threads, seed)| {
            let blocksize = blocksize.filter(|b| format.blocksize(Some(*b)).is_ok());
            let nested = nested && format.spec().nestable;
            Case { format, blocksize, nested, rows, columns, m, bias, threads, seed }
        },
    )
}

/// Buffers of a quantized tensor.
struct Stored {
    layout: Layout,
    packed: Vec<u8>,
    plain: Vec<f32>,
    codes: Vec<u8>,
    nested_absmax: Vec<f32>,
    offset: f32,
}

impl Stored {
    fn new(case: &Case, weights: &[f32]) -> Self {
        let shape = [case.rows, case.columns];
        let layout = Layout::new(case.format, &shape, case.blocksize, case.nested).unwrap();
        let mut stored = Self {
            layout,
            packed: vec![0; layout.packed],
            plain: vec![0.0; layout.scales],
            codes: vec![0; layout.scales],
            nested_absmax: vec![0.0; layout.nested_scales()],
            offset: 0.0,
        };
        let scales = match (case.nested, case.format.spec().scale) {
            (true, _) => ScalesMut::Nested {
                codes: &mut stored.codes,
                absmax: &mut stored.nested_absmax,
                offset: &mut stored.offset,
            },
            (false, nybble::format::Scale::E8M0) => ScalesMut::E8M0(&mut stored.codes),
            _ => ScalesMut::Plain(&mut stored.plain),
        };
        Cpu::with(Isa::Scalar, 1)
            .quantize_stored(&layout, Quantizer::default(), weights, &mut stored.packed, scales)
            .unwrap();
        stored
    }

    fn view(&self) -> QTensor<'_> {
        let scales = match (self.layout.nested, self.layout.format.spec().scale) {
            (true, _) => Scales::Nested {
                codes: &self.codes,
                absmax: &self.nested_absmax,
                offset: self.offset,
            },
            (false, nybble::format::Scale::E8M0) => Scales::E8M0(&self.codes),
            _ => Scales::Plain(&self.plain),
        };
        QTensor::new(self.layout, &self.packed, scales).unwrap()
    }
}

fn check<T: Lanes>(case: &Case) -> Result<(), TestCaseError> {
    let Case { rows, columns, m, .. } = *case;
    let mut random = Random(case.seed);
    let stored = Stored::new(case, &random.fill::<f32>(rows * columns, 0.05));
    let (q, shape) = (stored.view(), [rows, columns]);
    let mut weights = vec![0f32; rows * columns];
    Cpu::with(Isa::Scalar, 1).dequantize(&q, &mut weights).unwrap();
    let x = random.fill::<T>(m * columns, 1.0);
    let grad = random.fill::<T>(m * rows, 1.0);
    let bias: Option<Vec<f32>> = case.bias.then(|| random.fill(rows, 1.0));
    let column = |k: usize| (0..rows).map(|n| weights[n * columns + k]).collect::<Vec<f32>>();
    for isa in Isa::available() {
        let cpu = Cpu::with(isa, case.threads);
        let narrow = cpu.narrow_products(T::DTYPE);
        // What was in the output must not matter.
        let mut out = vec![T::from_f32(f32::NAN); m * rows];
        cpu.linear(&q, shape, &x, bias.as_deref(), &mut out).unwrap();
        for (i, y) in out.iter().enumerate() {
            let (row, n) = (&x[i / rows * columns..][..columns], i % rows);
            let w = &weights[n * columns..][..columns];
            let (sum, magnitude) = product::dot(row, w, bias.as_ref().map_or(0.0, |b| b[n]));
            let bound = product::bound(T::DTYPE, narrow, columns, sum, magnitude);
            let error = (f64::from(y.to_f32()) - sum).abs();
            prop_assert!(error <= bound, "{} [{i}]: {y:?}, {sum} +- {bound:e}", isa.name());
            if !narrow && size_of::<T>() == 4 {
                // Random errors do not add up: a few units in the last place.
                let few = 8.0 * f64::from(f32::EPSILON) * magnitude;
                prop_assert!(error <= few, "{} [{i}]: {error:e} of {magnitude:e}", isa.name());
            }
        }
        let mut out = vec![T::from_f32(f32::NAN); m * columns];
        cpu.linear_backward(&q, shape, &grad, &mut out).unwrap();
        for (i, y) in out.iter().enumerate() {
            let row = &grad[i / columns * rows..][..rows];
            let (sum, magnitude) = product::dot(row, &column(i % columns), 0.0);
            let bound = product::bound(T::DTYPE, narrow, rows, sum, magnitude);
            let error = (f64::from(y.to_f32()) - sum).abs();
            prop_assert!(error <= bound, "{} grad [{i}]: {y:?}, {sum}", isa.name());
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(24))]

    #[test]
    fn products_of_f32_are_those_of_the_definition(case in case()) {
        check::<f32>(&case)?;
    }

    #[test]
    fn products_of_bf16_are_those_of_the_definition(case in case()) {
        check::<bf16>(&case)?;
    }

    #[test]
    fn products_of_f16_are_those_of_the_definition(case in case()) {
        check::<f16>(&case)?;
    }
}

/// More rows of activations than are multiplied at a time, and rows longer than a panel.
#[test]
fn long_products_are_those_of_the_definition() {
    let shape = |rows, columns, m| Case {
        format: Format::Nf4,
        blocksize: None,
        nested: true,
        rows,
        columns,
        m,
        bias: true,
        threads: 2,
        seed: 7,
    };
    check::<bf16>(&shape(34, 1280, 600)).unwrap();
    check::<f32>(&shape(20, 4096, 530)).unwrap();
    check::<bf16>(&shape(70, 9216, 1)).unwrap();
    // Too long for a panel of whole rows, whether scales come late, or early, or codes stay codes.
    check::<bf16>(&shape(45, 4160, 27)).unwrap();
    check::<bf16>(&shape(45, 4160, 90)).unwrap();
    check::<f32>(&shape(45, 4160, 30)).unwrap();
}

/// Numbers of rows of activations around those from which on weights are rounded, and tiles of all
/// heights.
#[test]
fn products_of_a_middling_number_of_rows_are_those_of_the_definition() {
    for (m, format, blocksize, columns) in [
        (79, Format::Nf4, 64, 576),
        (80, Format::Nf4, 64, 576),
        (85, Format::Int4, 32, 1184),
        (97, Format::Fp4, 128, 1536),
        (110, Format::Mxfp4, 32, 96),
        (127, Format::Nf4, 64, 1024),
    ] {
        let case = Case {
            format,
            blocksize: Some(blocksize),
            nested: m % 2 == 1,
            rows: 75,
            columns,
            m,
            bias: true,
            threads: 2,
            seed: 5,
        };
        check::<bf16>(&case).unwrap();
        check::<f32>(&case).unwrap();
    }
}

/// The last, short chunk of a row is read together with the beginning of the next row.
#[test]
fn a_row_without_a_finite_scale_leaves_the_row_before_it_alone() {
    for (blocksize, columns) in [(64, 576), (32, 160), (32, 224)] {
        for m in [1, 3, 7, 90] {
            let case = Case {
                format: Format::Nf4,
                blocksize: Some(blocksize),
                nested: false,
                rows: 6,
                columns,
                m,
                bias: false,
                threads: 1,
                seed: 17,
            };
            let mut random = Random(case.seed);
            let mut stored = Stored::new(&case, &random.fill::<f32>(6 * columns, 0.05));
            let blocks = columns / blocksize;
            stored.plain[3 * blocks..4 * blocks].fill(f32::INFINITY);
            let x = random.fill::<bf16>(m * columns, 1.0);
            for isa in Isa::available() {
                let mut out = vec![bf16::ZERO; m * 6];
                let cpu = Cpu::with(isa, 1);
                cpu.linear(&stored.view(), [6, columns], &x, None, &mut out).unwrap();
                let others = out.iter().enumerate().filter(|(i, _)| i % 6 != 3);
                assert!(others.clone().count() == 5 * m);
                assert!(others.clone().all(|(_, y)| y.is_finite()), "{}", isa.name());
            }
        }
    }
}

/// So many rows of the weight that several strips share activations, and enough activations for
/// weights that are rounded once.
#[test]
fn large_products_are_those_of_the_definition() {
    for (format, blocksize, rows, columns) in [
        (Format::Nf4, 64, 230, 576),
        (Format::Fp4, 128, 262, 640),
        (Format::Int4, 32, 100, 288),
        (Format::Mxfp4, 32, 161, 320),
        (Format::Nf4, 2048, 65, 2048),
    ] {
        let case = Case {
            format,
            blocksize: Some(blocksize),
            nested: false,
            rows,
            columns,
            m: 261,
            bias: true,
            threads: 2,
            seed: 11,
        };
        check::<bf16>(&case).unwrap();
    }
}

/// As many rows of activations as fill vectors, for weights whose last chunk, strip or stretch of
/// columns is short.
#[test]
fn products_of_full_vectors_are_those_of_the_definition() {
    for (m, format, blocksize, rows, columns) in [
        (15, Format::Nf4, 64, 13, 192),
        (16, Format::Nf4, 64, 150, 4096),
        (16, Format::Fp4, 128, 8, 1280),
        (16, Format::Int4, 4096, 33, 8192),
        (16, Format::Mxfp4, 32, 31, 416),
        (16, Format::Nf4, 64, 7, 256),
        (31, Format::Int4, 32, 41, 352),
        (32, Format::Nf4, 64, 13, 8256),
        (32, Format::Mxfp4, 32, 139, 1024),
        (48, Format::Nf4, 64, 70, 1088),
        (48, Format::Fp4, 256, 9, 5632),
    ] {
        for nested in [false, true] {
            let case = Case {
                format,
                blocksize: Some(blocksize),
                nested: nested && format.spec().nestable,
                rows,
                columns,
                m,
                bias: !nested,
                threads: 2,
                seed: 17,
            };
            check::<bf16>(&case).unwrap();
        }
    }
}

/// Gradients whose sums are taken apart: by threads, and by stretches of columns, the last of which
/// is short.
#[test]
fn gradients_of_few_rows_are_those_of_the_definition() {
    for (threads, m, format, blocksize, rows, columns) in [
        (3, 1, Format::Nf4, 64, 139, 8256),
        (8, 1, Format::Nf4, 64, 139, 8256),
        (2, 2, Format::Mxfp4, 32, 61, 4128),
        (7, 3, Format::Fp4, 128, 77, 9088),
        (3, 4, Format::Int4, 4096, 66, 8192),
    ] {
        let case = Case {
            format,
            blocksize: Some(blocksize),
            nested: m == 3,
            rows,
            columns,
            m,
            bias: false,
            threads,
            seed: 13,
        };
        check::<bf16>(&case).unwrap();
        check::<f32>(&case).unwrap();
    }
}

#[test]
fn gradients_of_few_rows_do_not_depend_on_who_was_first() {
    let (rows, columns) = (512, 1024);
    let case = Case {
        format: Format::Nf4,
        blocksize: None,
        nested: false,
        rows,
        columns,
        m: 1,
        bias: false,
        threads: 3,
        seed: 3,
    };
    let mut random = Random(case.seed);
    let stored = Stored::new(&case, &random.fill::<f32>(rows * columns, 0.05));
    let grad = random.fill::<f32>(rows, 1.0);
    for isa in Isa::available() {
        let again = || {
            let mut out = vec![0f32; columns];
            let cpu = Cpu::with(isa, case.threads);
            cpu.linear_backward(&stored.view(), [rows, columns], &grad, &mut out).unwrap();
            out.iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
        };
        let first = again();
        assert!((0..20).all(|_| again() == first), "{}", isa.name());
    }
}

#[test]
fn no_rows_and_no_columns_are_no_trouble() {
    for (rows, columns, m) in [(0, 64, 3), (3, 0, 2), (3, 64, 0)] {
        let case = Case {
            format: Format::Nf4,
            blocksize: None,
            nested: false,
            rows,
            columns,
            m,
            bias: true,
            threads: 2,
            seed: 1,
        };
        let stored = Stored::new(&case, &vec![1.0; rows * columns]);
        let (x, bias) = (vec![1f32; m * columns], vec![2f32; rows]);
        let mut out = vec![9f32; m * rows];
        for isa in Isa::available() {
            let cpu = Cpu::with(isa, 2);
            cpu.linear(&stored.view(), [rows, columns], &x, Some(&bias), &mut out).unwrap();
            if columns == 0 {
                assert!(out.iter().all(|y| *y == 2.0));
            }
            let mut grad = vec![9f32; m * columns];
            cpu.linear_backward(&stored.view(), [rows, columns], &out, &mut grad).unwrap();
        }
    }
}

#[test]
fn wrong_lengths_are_refused() {
    let stored = Stored::new(
        &Case {
            format: Format::Nf4,
            blocksize: None,
            nested: false,
            rows: 4,
            columns: 64,
            m: 1,
            bias: false,
            threads: 1,
            seed: 1,
        },
        &[1.0; 256],
    );
    let (cpu, q) = (Cpu::with(Isa::Scalar, 1), stored.view());
    let mut out = [0f32; 8];
    assert!(cpu.linear(&q, [4, 64], &[1f32; 64], None, &mut out[..4]).is_ok());
    assert!(cpu.linear(&q, [4, 64], &[1f32; 65], None, &mut out[..4]).is_err());
    assert!(cpu.linear(&q, [4, 64], &[1f32; 64], None, &mut out[..5]).is_err());
    assert!(cpu.linear(&q, [4, 64], &[1f32; 64], Some(&[1.0; 3]), &mut out[..4]).is_err());
    assert!(cpu.linear(&q, [5, 64], &[1f32; 64], None, &mut out[..5]).is_err());
    assert!(cpu.linear_backward(&q, [4, 64], &[1f32; 4], &mut [0f32; 63]).is_err());
}
