#![allow(missing_docs, clippy::all, clippy::pedantic, clippy::print_stdout)]
use half::bf16;
use nybble::backend::cpu::*;
use nybble::format::Scale;
use nybble::format::codebook::*;
use nybble::quant::{Reference, blockwise::Blocks};
use std::time::Instant;
fn best(mut f: impl FnMut()) -> f64 {
    (0..400)
        .map(|_| {
            let t = Instant::now();
            f();
            t.elapsed().as_secs_f64()
        })
        .fold(1.0, f64::min)
}
fn go<T: Lanes>(isa: Isa) {
    let n = 65536;
    let mut s = 1u32;
    let mut u = || {
        s = s.wrapping_mul(1664525).wrapping_add(1013904223);
        (s >> 8) as f32 / 8388608.0 - 1.0
    };
    let x: Vec<T> = (0..n).map(|_| T::from_f32(u() * u() * u())).collect();
    let mut out = x.clone();
    let mut p = vec![0u8; n];
    let mut sc = vec![0f32; n / 64];
    let k = Kernels::<T>::of(isa);
    let how = Blocks::new(64, Scale::Absmax, Reference::Exact);
    let c = best(|| out.copy_from_slice(&x));
    let mut row = vec![0i8; n];
    let q4 = best(|| {
        (k.quantize4)(&NF4, how, &x, &mut p[..n / 2], &mut sc);
    });
    let d4 = best(|| (k.dequantize4)(&NF4.values, 64, &p[..n / 2], &sc, &mut out));
    let q8 = best(|| {
        (k.quantize8)(&DYNAMIC, how, &x, &mut p, &mut sc);
    });
    let d8 = best(|| (k.dequantize8)(&DYNAMIC.values, 64, &p, &sc, &mut out));
    let qr = best(|| {
        for (x, r) in x.chunks(4096).zip(row.chunks_mut(4096)) {
            (k.quantize_row)(x, r);
        }
    });
    let dr = best(|| {
        for (o, r) in out.chunks_mut(4096).zip(row.chunks(4096)) {
            (k.dequantize_row)(r, 0.7, o);
        }
    });
    let g = |t: f64| n as f64 / t / 1e9;
    println!(
        "{:7} {:4} copy {:.2} q4 {:.2} d4 {:.2} q8 {:.2} d8 {:.2} qrow {:.2} drow {:.2} Gel/s",
        isa.name(),
        T::DTYPE.short_name(),
        g(c),
        g(q4),
        g(d4),
        g(q8),
        g(d8),
        g(qr),
        g(dr)
    );
}
fn main() {
    for isa in Isa::available() {
        go::<f32>(isa);
        go::<bf16>(isa);
        go::<half::f16>(isa);
    }
}
