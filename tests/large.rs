//! Results that are made by several threads in many runs are those of the scalar definition, for
//! every format and instruction set.

use half::bf16;
use nybble::backend::cpu::{Cpu, Isa, Lanes, Quantizer};
use nybble::format::{Format, Scale};
use nybble::quant::Reference;
use nybble::quant::nested;
use nybble::tensor::{Layout, QTensor, Scales};

/// Neither rows nor the whole are multiples of a block or of a run.
const SHAPE: [usize; 2] = [1601, 4 * 4096 / 3 + 1];

fn values<T: Lanes>() -> Vec<T> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..SHAPE[0] * SHAPE[1])
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let unit = (state >> 40) as f32 / 8_388_608.0 - 1.0;
            T::from_f32(unit * unit * unit)
        })
        .collect()
}

fn quantized<T: Lanes>(cpu: Cpu, layout: &Layout, x: &[T]) -> (Vec<u8>, Vec<u32>) {
    let (mut packed, mut scales) = (vec![0xa5; layout.packed], vec![f32::NAN; layout.scales]);
    let how = Quantizer::default();
    cpu.quantize(layout, how, x, &mut packed, &mut scales).expect("the lengths fit");
    (packed, scales.into_iter().map(f32::to_bits).collect())
}

fn decoded<T: Lanes>(cpu: Cpu, q: &QTensor<'_>, first: usize) -> Vec<u8> {
    let mut out = vec![T::default(); q.layout().elements - first];
    cpu.dequantize_range(q, first, &mut out).expect("the lengths fit");
    bytemuck::cast_slice(&out).to_vec()
}

fn large_results_are_those_of_scalar<T: Lanes>() {
    let x = values::<T>();
    for format in [Format::Nf4, Format::Mxfp4, Format::Dynamic8, Format::Int8] {
        let layout = Layout::new(format, &SHAPE, None, false).expect("the shape is small");
        let scalar = Cpu::with(Isa::Scalar, 1);
        let want = quantized(scalar, &layout, &x);
        let plain: Vec<f32> = want.1.iter().map(|bits| f32::from_bits(*bits)).collect();
        let exponents: Vec<u8> = want.1.iter().map(|bits| (bits >> 23) as u8).collect();
        let scales = match format.spec().scale {
            Scale::E8M0 => Scales::E8M0(&exponents),
            _ => Scales::Plain(&plain),
        };
        let q = QTensor::new(layout, &want.0, scales).expect("the lengths fit");
        let values = decoded::<T>(scalar, &q, 0);
        for isa in Isa::available() {
            for threads in [1, 3] {
                let cpu = Cpu::with(isa, threads);
                let context = format!("{format} {} {threads}", isa.name());
                assert!(quantized(cpu, &layout, &x) == want, "quantized: {context}");
                for first in [0, 7] {
                    let got = decoded::<T>(cpu, &q, first);
                    assert!(got == values[first * size_of::<T>()..], "decoded: {context}");
                }
            }
        }
    }
}

#[test]
fn large_f32_results_are_those_of_scalar() {
    large_results_are_those_of_scalar::<f32>();
}

#[test]
fn large_bf16_results_are_those_of_scalar() {
    large_results_are_those_of_scalar::<bf16>();
}

#[test]
fn every_instruction_set_finds_the_same_figures() {
    let x = &values::<bf16>()[..100_001];
    for format in [Format::Nf4, Format::Dynamic8] {
        let layout = Layout::new(format, &[x.len()], None, false).expect("the shape is small");
        let how = Quantizer { stats: true, ..Quantizer::default() };
        let figures = |isa| {
            let (mut packed, mut scales) = (vec![0; layout.packed], vec![0.0; layout.scales]);
            let cpu = Cpu::with(isa, 1);
            let found = cpu.quantize(&layout, how, x, &mut packed, &mut scales);
            let found = found.expect("the lengths fit").expect("figures were asked for");
            let q = QTensor::new(layout, &packed, Scales::Plain(&scales)).expect("they fit");
            let again = cpu.error(x, &q).expect("the lengths fit");
            assert_eq!((found.error, found.outliers), (again.error, again.outliers));
            assert_eq!(found.histogram.iter().sum::<u64>(), x.len() as u64);
            found
        };
        for isa in Isa::available() {
            assert_eq!(figures(isa), figures(Isa::Scalar), "{}", isa.name());
        }
    }
}

#[test]
fn every_instruction_set_quantizes_scales_alike() {
    let scales: Vec<f32> = values::<f32>().iter().take(70_001).map(|x| x.abs()).collect();
    for reference in [Reference::Exact, Reference::BitsandbytesCpu] {
        let (mut want, mut want_absmax) = (vec![0; scales.len()], vec![0.0; 274]);
        let offset = nested::quantize(&scales, reference, &mut want, &mut want_absmax);
        let offset = offset.expect("the lengths fit");
        for isa in Isa::available() {
            let (mut codes, mut absmax) = (vec![0; scales.len()], vec![0.0; 274]);
            let cpu = Cpu::with(isa, 2);
            let got = cpu.quantize_scales(&scales, reference, &mut codes, &mut absmax);
            assert_eq!(got.expect("the lengths fit"), offset);
            assert_eq!((&codes, &absmax), (&want, &want_absmax), "{}", isa.name());
        }
        // Any range of scales is the same piece of the whole.
        let stored = Scales::Nested { codes: &want, absmax: &want_absmax, offset };
        let mut all = vec![0.0; scales.len()];
        stored.decode(0, &mut all);
        for (i, scale) in all.iter().enumerate() {
            assert_eq!(*scale, nested::decode(want[i], want_absmax[i / 256], offset));
        }
        for (first, len) in [(0, 1), (255, 2), (256, 256), (1000, 3000), (69_000, 1001)] {
            let mut part = vec![0.0; len];
            stored.decode(first, &mut part);
            assert_eq!(part, all[first..first + len]);
        }
        let mut beyond = [7.0; 4];
        stored.decode(scales.len() - 2, &mut beyond);
        assert_eq!(beyond[2..], [7.0, 7.0]);
    }
}
