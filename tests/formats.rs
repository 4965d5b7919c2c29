//! What every format promises, whatever computes it.
//!
//! Quick by default; `PROPTEST_CASES=1000 cargo test --release --test formats` is thorough.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used)]

use half::bf16;
use nybble::backend::cpu::{Cpu, Isa, Lanes, Quantizer};
use nybble::dtype::Element;
use nybble::error::Error;
use nybble::format::{Decode, Format, Scale};
use nybble::quant::blockwise::e8m0_encode;
use nybble::quant::stats::OUTLIER_FACTOR;
use nybble::quant::{NonFinite, Reference, nested};
use nybble::tensor::{Layout, QTensor, Scales};
use proptest::prelude::*;

/// Few cases unless the environment asks for more.
fn config(cases: u32) -> ProptestConfig {
    let asked = std::env::var_os("PROPTEST_CASES").is_some();
    let default = ProptestConfig::default();
    let cases = if asked { default.cases } else { cases };
    // A failure prints its input; nothing is written beside the sources.
    ProptestConfig { cases, failure_persistence: None, ..default }
}

/// A quantized tensor that owns its buffers.
#[derive(Debug, PartialEq)]
struct Quantized {
    layout: Layout,
    packed: Vec<u8>,
    scales: Vec<f32>,
    exponents: Vec<u8>,
}

impl Quantized {
    fn new<T: Lanes>(cpu: Cpu, layout: Layout, x: &[T]) -> Self {
        let (mut packed, mut scales) = (vec![0; layout.packed], vec![0.0; layout.scales]);
        cpu.quantize(&layout, Quantizer::default(), x, &mut packed, &mut scales).unwrap();
        let exponents = scales.iter().map(|scale| e8m0_encode(*scale)).collect();
        Self { layout, packed, scales, exponents }
    }

    fn tensor(&self) -> QTensor<'_> {
        let scales = match self.layout.format.spec().scale {
            Scale::E8M0 => Scales::E8M0(&self.exponents),
            _ => Scales::Plain(&self.scales),
        };
        QTensor::new(self.layout, &self.packed, scales).unwrap()
    }

    fn decode<T: Lanes>(&self, cpu: Cpu) -> Vec<T> {
        let mut out = vec![T::default(); self.layout.elements];
        cpu.dequantize(&self.tensor(), &mut out).unwrap();
        out
    }
}

/// Formats that have codes; int8 gets rows of 48.
fn quantized_formats() -> Vec<Format> {
    let dense = |format: &Format| matches!(format.spec().decode, Decode::Dense(_));
    Format::ALL.iter().copied().filter(|format| !dense(format)).collect()
}

const ROW: usize = 48;

fn layout(format: Format, blocksize: usize, rows: usize) -> Layout {
    let asked = format.spec().blocksizes.contains(&blocksize).then_some(blocksize);
    Layout::new(format, &[rows, ROW], asked, false).unwrap()
}

fn cpus() -> impl Strategy<Value = Cpu> {
    prop::sample::select(Isa::available()).prop_map(|isa| Cpu::with(isa, 1))
}

fn blocksizes() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![32usize, 64, 256, 4096])
}

/// Whole rows of weights of any common magnitude, with outliers, zeros and equal values.
fn weights() -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![
        8 => -1.0f32..1.0,
        1 => -50.0f32..50.0,
        1 => Just(0.0),
        1 => Just(-0.25),
    ];
    (-60i32..60, 0usize..24).prop_flat_map(move |(exponent, rows)| {
        let scale = 2f32.powi(exponent);
        prop::collection::vec(value.clone().prop_map(move |x| x * scale), rows * ROW)
    })
}

/// Makes values that a format is meant for: one without negative values gets magnitudes.
fn fit(format: Format, x: &mut [f32]) {
    if let Decode::Codebook8(book) = format.spec().decode
        && book.values.iter().all(|value| *value >= 0.0)
    {
        for x in x {
            *x = x.abs();
        }
    }
}

/// The largest error of a value in units of its scale.
///
/// A value lies within half a gap of its neighbours where the codebook covers it. Where it does
/// not, the distance to the end counts: signed dynamic codebooks end above -1 (but nearer than
/// half a gap), and MX scales leave magnitudes up to 8 for values up to 6.
fn bound(format: Format) -> f32 {
    let spec = format.spec();
    match (spec.decode, spec.scale) {
        (_, Scale::E8M0) => 8.0 - 6.0,
        (Decode::Codebook4(book), _) => book.widest_gap() / 2.0,
        (Decode::Codebook8(book), _) => book.widest_gap() / 2.0,
        (Decode::Int8, _) => 0.5 / 127.0,
        (Decode::Dense(_), _) => 0.0,
    }
}

proptest! {
    #![proptest_config(config(48))]

    /// Beside [`bound`]: the reciprocal, the product with it, the pivot and the decoded product
    /// are rounded by half an ulp each (int8: two products), of numbers up to 8 scales.
    #[test]
    fn a_round_trip_stays_within_half_the_widest_gap(
        cpu in cpus(), blocksize in blocksizes(), mut x in weights(),
    ) {
        for format in quantized_formats() {
            fit(format, &mut x);
            let q = Quantized::new(cpu, layout(format, blocksize, x.len() / ROW), &x);
            let (wide, narrow) = (q.decode::<f32>(cpu), q.decode::<bf16>(cpu));
            for (i, x) in x.iter().enumerate() {
                let scale = q.scales[i / q.layout.blocksize];
                let bound = (bound(format) + 8.0 * 2.0 * f32::EPSILON) * scale;
                prop_assert!((wide[i] - x).abs() <= bound, "{format} {i}: {x} {}", wide[i]);
                // Rounding once to bfloat16 is rounding what f32 has.
                prop_assert_eq!(narrow[i], bf16::from_f32(wide[i]));
            }
        }
    }

    /// Decoded values are codebook values times the scale. Quantizing them finds the same scale if
    /// the largest of a block is still as large, and then the same codes. It is, where the
    /// codebook has both 1 and -1 (signed dynamic ones only have 1), and a power of two does not
    /// change as long as absmax stays within its octave. The scale of int8 may move by an ulp: its
    /// codes stay.
    #[test]
    fn quantizing_what_was_decoded_changes_nothing(
        cpu in cpus(), blocksize in blocksizes(), mut x in weights(),
    ) {
        for format in quantized_formats() {
            fit(format, &mut x);
            let layout = layout(format, blocksize, x.len() / ROW);
            if let Decode::Codebook8(_) = format.spec().decode {
                for block in x.chunks_mut(layout.blocksize) {
                    let largest = block.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs()));
                    if largest.is_some_and(|x| x < 0.0) {
                        for x in block.iter_mut() {
                            *x = -*x;
                        }
                    }
                    fit(format, block);
                }
            }
            let once = Quantized::new(cpu, layout, &x);
            let decoded = once.decode::<f32>(cpu);
            let twice = Quantized::new(cpu, layout, &decoded);
            if layout.blocksize == ROW {
                prop_assert_eq!(once.packed, twice.packed);
            } else {
                prop_assert_eq!(twice.decode::<f32>(cpu), decoded, "{}", format);
            }
        }
    }

    #[test]
    fn splitting_at_block_borders_changes_nothing(
        cpu in cpus(), blocksize in blocksizes(), x in weights(), at in 0.0f64..1.0,
    ) {
        for format in quantized_formats() {
            let whole = Quantized::new(cpu, layout(format, blocksize, x.len() / ROW), &x);
            let block = whole.layout.blocksize;
            let first = (x.len() as f64 * at) as usize / block * block;
            let (mut packed, mut scales) = (Vec::new(), Vec::new());
            for x in [&x[..first], &x[first..]] {
                // The part of a matrix of rows is a matrix of rows; other formats ignore rows.
                let shape: &[usize] =
                    if block == ROW { &[x.len() / ROW, ROW] } else { &[x.len()] };
                let asked = (block != ROW).then_some(block);
                let part = Layout::new(format, shape, asked, false).unwrap();
                let part = Quantized::new(cpu, part, x);
                packed.extend(part.packed);
                scales.extend(part.scales);
            }
            prop_assert_eq!(&packed, &whole.packed);
            prop_assert_eq!(&scales, &whole.scales);
        }
    }

    #[test]
    fn any_range_decodes_to_the_slice_of_the_whole(
        cpu in cpus(), blocksize in blocksizes(), x in weights(), ends in (0.0f64..=1.0, 0.0f64..=1.0),
    ) {
        let [a, b] = [ends.0, ends.1].map(|end| (x.len() as f64 * end) as usize);
        let (first, last) = (a.min(b), a.max(b));
        for format in quantized_formats() {
            let q = Quantized::new(cpu, layout(format, blocksize, x.len() / ROW), &x);
            let mut out = vec![0f32; last - first];
            cpu.dequantize_range(&q.tensor(), first, &mut out).unwrap();
            prop_assert_eq!(&out, &q.decode::<f32>(cpu)[first..last]);
            let beyond = cpu.dequantize_range(&q.tensor(), x.len() - out.len() + 1, &mut out);
            prop_assert!(beyond.is_err());
        }
    }

    #[test]
    fn chosen_rows_decode_to_the_rows_of_the_whole(
        cpu in cpus(), blocksize in blocksizes(), x in weights(), chosen in prop::collection::vec(0.0f64..1.0, 0..9),
    ) {
        let count = x.len() / ROW;
        let rows: Vec<i64> =
            chosen.iter().filter(|_| count > 0).map(|at| (at * count as f64) as i64).collect();
        for format in quantized_formats() {
            let q = Quantized::new(cpu, layout(format, blocksize, count), &x);
            let whole = q.decode::<bf16>(cpu);
            let mut out = vec![bf16::ZERO; rows.len() * ROW];
            cpu.dequantize_rows(&q.tensor(), ROW, &rows, &mut out).unwrap();
            let want: Vec<bf16> =
                rows.iter().flat_map(|row| &whole[*row as usize * ROW..][..ROW]).copied().collect();
            prop_assert_eq!(out, want);
            for beyond in [-1, count as i64] {
                prop_assert!(cpu.dequantize_rows(&q.tensor(), ROW, &[beyond], &mut [0f32; ROW]).is_err());
            }
        }
    }

    #[test]
    fn nested_scales_decode_alike_in_whole_and_in_part(
        cpu in cpus(), x in weights(), at in 0.0f64..=1.0,
    ) {
        let layout = Layout::new(Format::Nf4, &[x.len()], Some(32), true).unwrap();
        let plain = Quantized::new(cpu, Layout { nested: false, ..layout }, &x);
        let mut codes = vec![0; layout.scales];
        let mut absmax = vec![0.0; layout.nested_scales()];
        let offset =
            nested::quantize(&plain.scales, Reference::Exact, &mut codes, &mut absmax).unwrap();
        let scales = Scales::Nested { codes: &codes, absmax: &absmax, offset };
        let packed = plain.packed.clone();
        let q = QTensor::new(layout, &packed, scales).unwrap();
        let mut whole = vec![0f32; x.len()];
        cpu.dequantize(&q, &mut whole).unwrap();
        // As if the decoded scales had been stored.
        let mut decoded = vec![0f32; layout.scales];
        scales.decode(0, &mut decoded);
        prop_assert_eq!(&Quantized { scales: decoded, ..plain }.decode::<f32>(cpu), &whole);
        let first = (x.len() as f64 * at) as usize;
        let mut part = vec![0f32; x.len() - first];
        cpu.dequantize_range(&q, first, &mut part).unwrap();
        prop_assert_eq!(&part, &whole[first..]);
    }

    #[test]
    fn a_value_that_is_not_finite_is_named_or_stored_as_zero(
        cpu in cpus(), blocksize in blocksizes(), x in weights(),
        bad in prop::collection::vec((0.0f64..1.0, prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY])), 1..4),
    ) {
        prop_assume!(!x.is_empty());
        let (mut spoilt, mut zeroed) = (x.clone(), x.clone());
        for (at, value) in bad {
            let i = (at * x.len() as f64) as usize;
            (spoilt[i], zeroed[i]) = (value, 0.0);
        }
        let first = spoilt.iter().position(|x| !x.is_finite()).unwrap();
        let count = spoilt.iter().filter(|x| !x.is_finite()).count() as u64;
        for format in quantized_formats() {
            let layout = layout(format, blocksize, x.len() / ROW);
            let (mut packed, mut scales) = (vec![0; layout.packed], vec![0.0; layout.scales]);
            let error = cpu
                .quantize(&layout, Quantizer::default(), &spoilt, &mut packed, &mut scales)
                .unwrap_err();
            let Error::NonFinite { index, value } = error else { panic!("{error}") };
            prop_assert_eq!((index, value.to_bits()), (first, spoilt[first].to_bits()));
            let how = Quantizer { nonfinite: NonFinite::Zero, stats: true, ..Quantizer::default() };
            let stats = cpu.quantize(&layout, how, &spoilt, &mut packed, &mut scales).unwrap();
            prop_assert_eq!(stats.unwrap().zeroed, count);
            let want = Quantized::new(cpu, layout, &zeroed);
            prop_assert_eq!((packed, scales), (want.packed, want.scales));
        }
    }

    #[test]
    fn statistics_are_those_of_plain_sums(
        cpu in cpus(), blocksize in blocksizes(), mut x in weights(),
    ) {
        for format in quantized_formats() {
            fit(format, &mut x);
            let layout = layout(format, blocksize, x.len() / ROW);
            let q = Quantized::new(cpu, layout, &x);
            let how = Quantizer { stats: true, ..Quantizer::default() };
            let (mut packed, mut scales) = (vec![0; layout.packed], vec![0.0; layout.scales]);
            let stats = cpu.quantize(&layout, how, &x, &mut packed, &mut scales).unwrap().unwrap();
            let decoded = q.decode::<f32>(cpu);
            let pairs = || x.iter().zip(&decoded).map(|(x, y)| (f64::from(*x), f64::from(*y)));
            let sums = [
                (stats.original, pairs().map(|(x, _)| x * x).sum::<f64>()),
                (stats.decoded, pairs().map(|(_, y)| y * y).sum()),
                (stats.product, pairs().map(|(x, y)| x * y).sum()),
                (stats.error, pairs().map(|(x, y)| (x - y) * (x - y)).sum()),
            ];
            for (got, want) in sums {
                // Products may cancel: their sum is measured against the sum of squares.
                prop_assert!((got - want).abs() <= 1e-9 * want.max(stats.original), "{format}");
            }
            let furthest = x.iter().zip(&decoded).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            prop_assert_eq!(stats.max_abs, furthest);
            prop_assert_eq!(stats.absmax_max, q.scales.iter().copied().fold(0.0, f32::max));
            prop_assert_eq!(stats.count, x.len() as u64);
            prop_assert_eq!(stats.histogram.iter().sum::<u64>(), x.len() as u64);
            let outliers: usize = x.chunks(layout.blocksize).map(outliers).sum();
            prop_assert_eq!(stats.outliers, outliers as u64, "{}", format);
            // The same figures for the tensor as it is stored, but for the histogram.
            let again = cpu.error(&x, &q.tensor()).unwrap();
            prop_assert_eq!((again.error, again.original), (stats.error, stats.original));
        }
    }
}

fn outliers(block: &[f32]) -> usize {
    let square = block.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
    let limit = OUTLIER_FACTOR * (square / block.len() as f64).sqrt() as f32;
    block.iter().filter(|x| x.abs() > limit).count()
}

/// Large enough for several runs on each of several threads, with a short block at the end.
fn large() -> Vec<f32> {
    (0..5 * 65_536 + 33).map(|i| ((i64::from(i) * 7919) % 65_521) as f32 / 32_760.0 - 1.0).collect()
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let x = large();
    let how = Quantizer { stats: true, ..Quantizer::default() };
    for format in quantized_formats() {
        let layout = Layout::new(format, &[x.len() / 11, 11], None, false).unwrap();
        let results = [1, 2, 3].map(|threads| {
            let cpu = Cpu::with(Isa::chosen().unwrap(), threads);
            let (mut packed, mut scales) = (vec![0; layout.packed], vec![0.0; layout.scales]);
            let x = &x[..layout.elements];
            let stats = cpu.quantize(&layout, how, x, &mut packed, &mut scales).unwrap();
            let q = Quantized {
                exponents: scales.iter().map(|s| e8m0_encode(*s)).collect(),
                layout,
                packed,
                scales,
            };
            (q.decode::<f32>(cpu), q, stats)
        });
        assert!(results[0] == results[1] && results[1] == results[2], "{format}");
    }
}

#[test]
fn the_first_of_many_bad_values_is_named_on_any_number_of_threads() {
    let mut x = large();
    for i in [70_000, 140_001, 300_000] {
        x[i] = f32::NAN;
    }
    let layout = Layout::new(Format::Nf4, &[x.len()], None, false).unwrap();
    let (mut packed, mut scales) = (vec![0; layout.packed], vec![0.0; layout.scales]);
    for threads in [1, 3] {
        let cpu = Cpu::with(Isa::Scalar, threads);
        let error = cpu.quantize(&layout, Quantizer::default(), &x, &mut packed, &mut scales);
        assert!(matches!(error, Err(Error::NonFinite { index: 70_000, .. })), "{error:?}");
    }
}

#[test]
fn half_precision_input_is_quantized_as_its_f32_values() {
    let x: Vec<bf16> = large().into_iter().take(4097).map(bf16::from_f32).collect();
    let wide: Vec<f32> = x.iter().map(|x| Element::to_f32(*x)).collect();
    for format in quantized_formats() {
        let layout = Layout::new(format, &[17, 241], None, false).unwrap();
        for isa in Isa::available() {
            let cpu = Cpu::with(isa, 1);
            assert_eq!(Quantized::new(cpu, layout, &x), Quantized::new(cpu, layout, &wide));
        }
    }
}
