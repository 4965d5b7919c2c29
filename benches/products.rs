//! Products with quantized weights and their gradients, beside what the machine can do.
//!
//! ```text
//! cargo bench --bench products -- nf4/bf16
//! ```
//!
//! For one and four rows of activations a group has a row `read`: the bytes of the weight, added
//! up on as many threads, once. For more rows it has a row `f32`: the same product with dense
//! numbers, as the compiler makes it of plain loops. A ratio to either says more than a time.
//! Weights are taken in turns from copies that no cache holds. `NYBBLE_CPU` and
//! `NYBBLE_NUM_THREADS` choose the instruction set and the threads.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use nybble::backend::cpu::{Cpu, Lanes, Quantizer, threads};
use nybble::format::Format;
use nybble::tensor::{Layout, QTensor, Scales};

/// Rows and columns of the weight.
const SHAPE: [usize; 2] = [2048, 2048];

/// Bytes of all copies of a weight: more than a last-level cache.
const COPIES: usize = 96 << 20;

/// Rows of activations.
const M: [usize; 4] = [1, 4, 16, 512];

/// The most rows for which a weight is read no faster than memory is.
const FEW: usize = 4;

/// Numbers between -1 and 1.
fn numbers<T: Lanes>(count: usize) -> Vec<T> {
    let mut state = 1u32;
    let mut unit = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| T::from_f32(unit() * unit())).collect()
}

/// Copies of a weight: packed codes and scales.
struct Copies {
    layout: Layout,
    stored: Vec<(Vec<u8>, Vec<f32>)>,
    next: usize,
}

impl Copies {
    fn new(cpu: &Cpu, format: Format) -> Self {
        let layout = Layout::new(format, &SHAPE, None, false).expect("the shape is small");
        let (mut packed, mut scales) = (vec![0; layout.packed], vec![0.0; layout.scales]);
        let weights = numbers::<f32>(SHAPE[0] * SHAPE[1]);
        cpu.quantize(&layout, Quantizer::default(), &weights, &mut packed, &mut scales)
            .expect("the lengths fit");
        let count = COPIES.div_ceil(packed.len());
        Self { layout, stored: vec![(packed, scales); count], next: 0 }
    }

    /// The next copy.
    fn next(&mut self) -> QTensor<'_> {
        self.next = (self.next + 1) % self.stored.len();
        let (packed, scales) = &self.stored[self.next];
        QTensor::new(self.layout, packed, Scales::Plain(scales)).expect("the lengths fit")
    }
}

/// Adds up all bytes as words, on some threads.
fn read(bytes: &[u8], threads: usize) -> u64 {
    let sum = AtomicU64::new(0);
    let length = bytes.len().div_ceil(8 * threads);
    threads::share(threads, bytes.len().div_ceil(length), |part| {
        let part = &bytes[part * length..bytes.len().min((part + 1) * length)];
        let (words, _) = part.as_chunks::<8>();
        let part = words.iter().fold(0u64, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)));
        sum.fetch_add(part, Ordering::Relaxed);
    });
    sum.into_inner()
}

/// `out = x @ weight` for f32: rows of the weight are added up, a block of them at a time.
fn dense(x: &[f32], weight: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    for (first, rows) in weight.chunks(32 * SHAPE[1]).enumerate() {
        for (x, out) in x.chunks_exact(SHAPE[0]).zip(out.chunks_exact_mut(SHAPE[1])) {
            for (x, row) in x[32 * first..].iter().zip(rows.chunks_exact(SHAPE[1])) {
                for (out, weight) in out.iter_mut().zip(row) {
                    *out += x * weight;
                }
            }
        }
    }
}

fn products<T: Lanes>(criterion: &mut Criterion, cpu: &Cpu, copies: &mut Copies) {
    let [rows, columns] = SHAPE;
    for m in M {
        let name = format!("{}/{}/{m}", copies.layout.format, T::DTYPE.short_name());
        let mut group = criterion.benchmark_group(&name);
        group.throughput(Throughput::Elements((m * rows * columns) as u64));
        if m <= FEW {
            let all: Vec<u8> =
                copies.stored.iter().flat_map(|(packed, _)| packed.clone()).collect();
            let size = copies.stored[0].0.len() + size_of_val(&copies.stored[0].1[..]);
            let mut at = 0;
            group.bench_function("read", |bench| {
                bench.iter(|| {
                    at = if at + 2 * size > all.len() { 0 } else { at + size };
                    read(black_box(&all[at..at + size]), threads::default_threads())
                });
            });
        } else if size_of::<T>() == 4 {
            let (x, weight) = (numbers::<f32>(m * rows), numbers::<f32>(rows * columns));
            let mut out = vec![0f32; m * columns];
            group.bench_function("f32", |bench| {
                bench.iter(|| dense(black_box(&x), black_box(&weight), &mut out));
            });
        }
        let (x, grad) = (numbers::<T>(m * columns), numbers::<T>(m * rows));
        let mut out = vec![T::default(); m * rows];
        group.bench_function("linear", |bench| {
            bench.iter(|| cpu.linear(&copies.next(), SHAPE, &x, None, &mut out).expect("it fits"));
        });
        let mut out = vec![T::default(); m * columns];
        group.bench_function("gradient", |bench| {
            bench.iter(|| {
                cpu.linear_backward(&copies.next(), SHAPE, &grad, &mut out).expect("it fits");
            });
        });
        group.finish();
    }
}

fn all(criterion: &mut Criterion) {
    let cpu = Cpu::new(None).expect("NYBBLE_CPU names an instruction set of this machine");
    for format in [Format::Nf4, Format::Int8] {
        let mut copies = Copies::new(&cpu, format);
        products::<f32>(criterion, &cpu, &mut copies);
        products::<bf16>(criterion, &cpu, &mut copies);
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500));
    targets = all
}
criterion_main!(benches);
