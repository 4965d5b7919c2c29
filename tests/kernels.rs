//! Every instruction set of this machine computes what the scalar definition computes, bit for
//! bit: codes, scales, decoded values and whether all values were finite.
//!
//! Quick by default; `PROPTEST_CASES=1000 cargo test --release --test kernels` is thorough.

use std::fmt::Debug;

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use nybble::backend::cpu::{Isa, Kernels, Lanes};
use nybble::format::codebook::Codebook;
use nybble::format::{Decode, Format};
use nybble::quant::Reference;
use nybble::quant::blockwise::Blocks;
use nybble::quant::stats::Stats;
use proptest::prelude::*;

/// Few cases unless the environment asks for more.
fn config(cases: u32) -> ProptestConfig {
    let asked = std::env::var_os("PROPTEST_CASES").is_some();
    let default = ProptestConfig::default();
    let cases = if asked { default.cases } else { cases };
    // A failure prints its input; nothing is written beside the sources.
    ProptestConfig { cases, failure_persistence: None, ..default }
}

/// `SplitMix64`: a case is a seed, so that long inputs cost little and are found again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Between -1 and 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / 8_388_608.0 - 1.0
    }

    /// Near enough to normal.
    fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.unit()).sum::<f32>() * 0.707
    }

    fn sign(&mut self) -> f32 {
        if self.next().is_multiple_of(2) { 1.0 } else { -1.0 }
    }

    /// Any power of two times at most two, subnormal ones included.
    fn any_magnitude(&mut self) -> f32 {
        f32::from_bits((self.next() as u32) % 0x7f80_0000)
    }
}

/// What the values of a case look like.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Values {
    Normal,
    HeavyTailed,
    Constant,
    SignedZeros,
    Subnormal,
    /// Around the magnitude whose reciprocal overflows.
    Tiny,
    Huge,
    /// On a pivot times the scale, or next to it.
    OnPivots,
    AnyFinite,
    /// NaN and infinity among them.
    AnyBits,
    /// Each run of 32 is one of the others, but finite.
    Patchwork,
}

const FINITE: [Values; 9] = [
    Values::Normal,
    Values::HeavyTailed,
    Values::Constant,
    Values::SignedZeros,
    Values::Subnormal,
    Values::Tiny,
    Values::Huge,
    Values::OnPivots,
    Values::AnyFinite,
];

impl Values {
    fn any() -> impl Strategy<Value = Values> {
        let all: Vec<Values> = FINITE.into_iter().chain([Values::AnyBits]).collect();
        // Most cases mix all kinds: a block decides for itself how it is divided.
        prop_oneof![prop::sample::select(all), Just(Values::Patchwork)]
    }

    fn fill(self, random: &mut Random, pivots: &[f32], out: &mut [f32]) {
        if self == Values::Patchwork {
            for run in out.chunks_mut(32) {
                FINITE[random.below(FINITE.len())].fill(random, pivots, run);
            }
            return;
        }
        let constant = random.any_magnitude() * random.sign();
        let scale = if random.next().is_multiple_of(2) { 1.0 } else { 0.5 + random.unit().abs() };
        for x in out.iter_mut() {
            *x = match self {
                Values::Normal => random.normal(),
                Values::HeavyTailed => random.normal() / (random.unit() + 1e-3),
                Values::Constant => constant,
                Values::SignedZeros => 0.0 * random.sign(),
                Values::Subnormal => f32::from_bits(random.below(0x80_0000) as u32) * random.sign(),
                Values::Tiny => random.unit() * 1e-38,
                Values::Huge => random.unit() * f32::MAX,
                Values::OnPivots => {
                    let pivot = pivots[random.below(pivots.len())] * scale;
                    [pivot, pivot.next_up(), pivot.next_down()][random.below(3)]
                }
                Values::AnyFinite => random.any_magnitude() * random.sign(),
                Values::AnyBits | Values::Patchwork => f32::from_bits(random.next() as u32),
            };
        }
        if self == Values::OnPivots
            && let Some(first) = out.first_mut()
        {
            *first = scale * random.sign();
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    values: Values,
    seed: u64,
    /// Slices start this far into their allocation: kernels assume no alignment.
    offset: usize,
    reference: Reference,
}

fn cases() -> impl Strategy<Value = Case> {
    let reference = prop::sample::select(vec![Reference::Exact, Reference::BitsandbytesCpu]);
    (Values::any(), any::<u64>(), 0usize..4, reference)
        .prop_map(|(values, seed, offset, reference)| Case { values, seed, offset, reference })
}

impl Case {
    /// Values in `T`; a value too large for it becomes zero rather than infinite, except where
    /// non-finite values are the point.
    fn input<T: Lanes>(&self, pivots: &[f32], len: usize) -> Vec<T> {
        let mut x = vec![0f32; self.offset + len];
        self.values.fill(&mut Random(self.seed), pivots, &mut x[self.offset..]);
        let keep = self.values == Values::AnyBits;
        x.into_iter()
            .map(T::from_f32)
            .map(|x| if keep || x.to_f32().is_finite() { x } else { T::default() })
            .collect()
    }
}

/// A buffer with a pattern in it, so that an element left out is noticed.
fn scratch<T: Pod>(len: usize, byte: u8) -> Vec<T> {
    let mut buffer = vec![T::zeroed(); len];
    bytemuck::cast_slice_mut(&mut buffer).fill(byte);
    buffer
}

fn lengths(block: usize) -> Vec<usize> {
    let around = [block - 1, block, block + 1, 3 * block + 17];
    [0, 1, 2, 31, 32, 33, 63, 64, 65].into_iter().chain(around).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Equal bits, or NaN on both sides: Rust does not promise the bits of a NaN.
fn same<T: Lanes>(a: &[T], b: &[T]) -> bool {
    a.len() == b.len()
        && a.iter().zip(b).all(|(a, b)| {
            bytemuck::bytes_of(a) == bytemuck::bytes_of(b)
                || (a.to_f32().is_nan() && b.to_f32().is_nan())
        })
}

type Quantize<const N: usize, T> = fn(&Codebook<N>, Blocks, &[T], &mut [u8], &mut [f32]) -> bool;
type Dequantize<const N: usize, T> = fn(&[f32; N], usize, &[u8], &[f32], &mut [T]);

/// Compares one pair of kernels for a codebook of `N` values.
fn compare_blockwise<const N: usize, T: Lanes>(
    (name, case, len): (&str, Case, usize),
    book: &Codebook<N>,
    how: Blocks,
    quantize: [Quantize<N, T>; 2],
    dequantize: [Dequantize<N, T>; 2],
) {
    let context = || format!("{name} {:?} {how:?} {len} {case:?}", T::DTYPE);
    let x: Vec<T> = case.input(&book.pivots[..N - 1], len);
    let x = &x[case.offset..];
    let bytes = if N == 16 { len.div_ceil(2) } else { len };
    let [want, got] = quantize.map(|quantize| {
        let mut codes: Vec<u8> = scratch(case.offset + bytes, 0xa5);
        let mut scales: Vec<f32> = scratch(len.div_ceil(how.blocksize), 0xa5);
        let finite = quantize(book, how, x, &mut codes[case.offset..], &mut scales);
        (finite, codes, scales)
    });
    assert_eq!(want.0, got.0, "finite: {}", context());
    assert_eq!(bits(&want.2), bits(&got.2), "scales: {}", context());
    if want.0 {
        assert_eq!(want.1, got.1, "codes: {}", context());
    }
    // Decode what was encoded, and codes and scales that no encoder makes.
    let mut random = Random(case.seed ^ 1);
    let codes: Vec<u8> = (0..bytes).map(|_| random.next() as u8).collect();
    let scales: Vec<f32> =
        (0..want.2.len()).map(|_| f32::from_bits(random.next() as u32)).collect();
    for (codes, scales) in [(&want.1[case.offset..], &want.2), (&codes[..], &scales)] {
        let [want, got] = dequantize.map(|dequantize| {
            let mut out: Vec<T> = scratch(case.offset + len, 0x5a);
            dequantize(&book.values, how.blocksize, codes, scales, &mut out[case.offset..]);
            out
        });
        assert!(same(&want, &got), "decoded: {}", context());
    }
}

fn compare_rows<T: Lanes>(isa: Isa, case: Case, len: usize) {
    let (scalar, fast) = (Kernels::<T>::SCALAR, Kernels::<T>::of(isa));
    let context = || format!("{} int8 {:?} {len} {case:?}", isa.name(), T::DTYPE);
    // Pivots of a rounding are halves.
    let pivots: Vec<f32> = (-127..127).map(|i| (i as f32 + 0.5) / 127.0).collect();
    let x: Vec<T> = case.input(&pivots, len);
    let x = &x[case.offset..];
    let [want, got] = [scalar.quantize_row, fast.quantize_row].map(|quantize| {
        let mut codes: Vec<i8> = scratch(case.offset + len, 0xa5);
        let absmax = quantize(x, &mut codes[case.offset..]);
        (absmax, codes)
    });
    assert_eq!(want.0.to_bits(), got.0.to_bits(), "absmax: {}", context());
    if want.0.is_finite() {
        assert_eq!(want.1, got.1, "codes: {}", context());
    }
    let mut random = Random(case.seed ^ 2);
    let codes: Vec<i8> = (0..len).map(|_| random.next() as i8).collect();
    for absmax in [want.0, f32::from_bits(random.next() as u32)] {
        let [want, got] = [scalar.dequantize_row, fast.dequantize_row].map(|dequantize| {
            let mut out: Vec<T> = scratch(case.offset + len, 0x5a);
            dequantize(&codes, absmax, &mut out[case.offset..]);
            out
        });
        assert!(same(&want, &got), "decoded: {}", context());
    }
}

/// Statistics of blocks that are whole groups, and of short last ones.
fn compare_statistics<T: Lanes>(isa: Isa, case: Case, len: usize) {
    let (scalar, fast) = (Kernels::<T>::SCALAR, Kernels::<T>::of(isa));
    let mut random = Random(case.seed ^ 3);
    let mut number = || (random.next() as i32) as f32 / (1u64 << 30) as f32;
    let x: Vec<T> = (0..len).map(|_| T::from_f32(number())).collect();
    let decoded: Vec<f32> = (0..len).map(|_| number()).collect();
    for block in [32, 64, 4096, len] {
        let scales: Vec<f32> = (0..len.div_ceil(block)).map(|_| number().abs()).collect();
        let [want, got] = [scalar.compare, fast.compare].map(|compare| {
            let mut stats = Stats::default();
            compare(&x, &decoded, block, &scales, &mut stats);
            stats
        });
        assert_eq!(want, got, "{} {:?} {len} {block}", isa.name(), T::DTYPE);
    }
}

/// Scales of every length, from any place in the codes, and scales that no encoder makes.
fn compare_scales(isa: Isa, case: Case) {
    let (scalar, fast) = (Kernels::<f32>::SCALAR, Kernels::<f32>::of(isa));
    let mut random = Random(case.seed ^ 3);
    // All codes, then any: more than any step of vectors.
    let codes: Vec<u8> = (0..=255).chain((0..75).map(|_| random.next() as u8)).collect();
    let mut any = || f32::from_bits(random.next() as u32);
    for (absmax, offset) in [(0.03, 0.05), (any(), any()), (f32::INFINITY, 1.0), (1e-45, 0.0)] {
        for first in [0, 1, case.offset, 200] {
            for len in [0, 1, 31, 32, 33, 63, 64, 65, 127, codes.len() - first] {
                let codes = &codes[first..first + len];
                let context = || format!("{} {absmax} {offset} {first} {len}", isa.name());
                let [want, got] = [scalar.decode_nested, fast.decode_nested].map(|decode| {
                    let mut out: Vec<f32> = scratch(len + 3, 0x5a);
                    decode(codes, absmax, offset, &mut out[1..=len]);
                    out
                });
                assert!(same(&want, &got), "nested: {}", context());
                let [want, got] = [scalar.decode_e8m0, fast.decode_e8m0].map(|decode| {
                    let mut out: Vec<f32> = scratch(len + 3, 0x5a);
                    decode(codes, &mut out[1..=len]);
                    out
                });
                assert_eq!(bits(&want), bits(&got), "e8m0: {}", context());
            }
        }
    }
}

/// Every format, block size and length, for one element type.
fn compare_all<T: Lanes>(isa: Isa, case: Case) {
    let (scalar, fast) = (Kernels::<T>::SCALAR, Kernels::<T>::of(isa));
    for format in Format::ALL {
        let spec = format.spec();
        let name = format!("{} {format}", isa.name());
        for &blocksize in spec.blocksizes {
            let how = Blocks::new(blocksize, spec.scale, case.reference);
            for what in lengths(blocksize).into_iter().map(|len| (name.as_str(), case, len)) {
                match spec.decode {
                    Decode::Codebook4(book) => compare_blockwise(
                        what,
                        book,
                        how,
                        [scalar.quantize4, fast.quantize4],
                        [scalar.dequantize4, fast.dequantize4],
                    ),
                    Decode::Codebook8(book) => compare_blockwise(
                        what,
                        book,
                        how,
                        [scalar.quantize8, fast.quantize8],
                        [scalar.dequantize8, fast.dequantize8],
                    ),
                    Decode::Int8 | Decode::Dense(_) => {}
                }
            }
        }
    }
    for len in lengths(128) {
        compare_rows::<T>(isa, case, len);
        if len > 0 {
            compare_statistics::<T>(isa, case, len);
        }
    }
}

proptest! {
    #![proptest_config(config(12))]

    #[test]
    fn every_instruction_set_computes_what_scalar_computes(case in cases()) {
        for isa in Isa::available() {
            compare_scales(isa, case);
            compare_all::<f32>(isa, case);
            compare_all::<f16>(isa, case);
            compare_all::<bf16>(isa, case);
        }
    }
}

/// Widens and rounds through the kernels: 1.0 * scale, one scale a block.
fn rounded<T: Lanes>(isa: Isa, x: &[f32]) -> Vec<T> {
    let mut out = vec![T::default(); 32 * x.len()];
    (Kernels::<T>::of(isa).dequantize8)(&[1.0; 256], 32, &vec![7; out.len()], x, &mut out);
    let mut packed = vec![T::default(); 32 * x.len()];
    (Kernels::<T>::of(isa).dequantize4)(&[1.0; 16], 32, &vec![7; 16 * x.len()], x, &mut packed);
    assert!(same(&out, &packed));
    out.chunks(32).map(|lanes| lanes[0]).collect()
}

/// Values on, above and below every rounding border of `T`, and everything special.
fn borders<T: Lanes + Zeroable>() -> Vec<f32> {
    (0..=u16::MAX)
        .map(|bits| {
            let mut narrow = T::default();
            bytemuck::bytes_of_mut(&mut narrow)[..2].copy_from_slice(&bits.to_le_bytes());
            narrow.to_f32()
        })
        .flat_map(|x| {
            let half = f32::midpoint(x, T::from_f32(x * 1.004).to_f32());
            [x, half, half.next_up(), half.next_down()]
        })
        .collect()
}

fn rounds_like_the_definition<T: Lanes + Debug>() {
    let borders = borders::<T>();
    let want: Vec<T> = borders.iter().map(|x| T::from_f32(1.0 * x)).collect();
    for isa in Isa::available() {
        assert!(same(&rounded::<T>(isa, &borders), &want), "{} {:?}", isa.name(), T::DTYPE);
    }
}

#[test]
fn every_rounding_border_is_rounded_like_the_definition() {
    rounds_like_the_definition::<f16>();
    rounds_like_the_definition::<bf16>();
}

#[test]
fn the_fastest_is_last_and_names_differ() {
    let names: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
    assert_eq!(names[0], "scalar");
    assert!(names.iter().enumerate().all(|(i, name)| !names[..i].contains(name)));
    // NEON is part of every such machine, so nothing above was compared with itself only.
    let neon = names.iter().any(|name| name.starts_with("neon"));
    assert!(neon || cfg!(not(target_arch = "aarch64")));
}
