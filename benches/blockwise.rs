//! Quantizing and dequantizing against a copy of the same bytes, on one thread.
//!
//! ```text
//! cargo bench --bench blockwise -- nf4
//! ```
//!
//! Every group has a row `memcpy` that reads and writes as many bytes as the others do together.
//! A ratio to it says more than a time: both see the same memory in the same minute.
//! `NYBBLE_CPU` chooses the instruction set.

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use nybble::backend::cpu::{Cpu, Lanes, Quantizer};
use nybble::format::Format;
use nybble::tensor::{Layout, QTensor, Scales};

/// Elements: a row of a large model is 4096; the working set stays in the last-level cache.
const SHAPE: [usize; 2] = [256, 4096];

/// Numbers between -1 and 1 that look normal enough for every branch to be taken.
fn weights<T: Lanes>() -> Vec<T> {
    let mut state = 1u32;
    let mut unit = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..SHAPE[0] * SHAPE[1]).map(|_| T::from_f32(unit() * unit() * unit())).collect()
}

fn memcpy(group: &mut BenchmarkGroup<'_, criterion::measurement::WallTime>, bytes: usize) {
    let (from, mut to) = (vec![1u8; bytes / 2], vec![0u8; bytes / 2]);
    group.bench_function("memcpy", |bench| bench.iter(|| to.copy_from_slice(&from)));
}

fn format<T: Lanes>(criterion: &mut Criterion, format: Format) {
    let cpu = Cpu::new(Some(1)).expect("NYBBLE_CPU names an instruction set of this machine");
    let layout = Layout::new(format, &SHAPE, None, false).expect("the shape is small");
    let name = format!("{format}/{}", T::DTYPE.short_name());
    let x = weights::<T>();
    let (mut packed, mut scales) = (vec![0; layout.packed], vec![0.0; layout.scales]);
    let bytes = size_of_val(&x[..]) + layout.packed + layout.scale_bytes();

    let mut group = criterion.benchmark_group(&name);
    group.throughput(Throughput::Elements(x.len() as u64));
    memcpy(&mut group, bytes);
    group.bench_function(format!("quantize/{}", cpu.isa().name()), |bench| {
        bench.iter(|| {
            cpu.quantize(&layout, Quantizer::default(), &x, &mut packed, &mut scales)
                .expect("the lengths fit")
        });
    });
    let how = Quantizer { stats: true, ..Quantizer::default() };
    group.bench_function(format!("quantize with statistics/{}", cpu.isa().name()), |bench| {
        bench.iter(|| {
            cpu.quantize(&layout, how, &x, &mut packed, &mut scales).expect("the lengths fit")
        });
    });
    let mut out = x.clone();
    let q = QTensor::new(layout, &packed, Scales::Plain(&scales)).expect("the lengths fit");
    group.bench_function(format!("dequantize/{}", cpu.isa().name()), |bench| {
        bench.iter(|| cpu.dequantize(&q, &mut out).expect("the lengths fit"));
    });
    group.finish();
}

fn blockwise(criterion: &mut Criterion) {
    for kind in [Format::Nf4, Format::Int8, Format::Dynamic8] {
        format::<f32>(criterion, kind);
        format::<bf16>(criterion, kind);
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(1));
    targets = blockwise
}
criterion_main!(benches);
