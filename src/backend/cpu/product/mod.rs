//! Products of activations with a quantized weight, which is decoded on the way and never as a
//! whole. The definition, and how far a result may be from it: `quant::product`.
//!
//! [`few`] reads packed rows once for up to four rows of activations; [`many`] decodes panels into
//! the cache for more, and `tokens` rows, where tokens fill vectors. Weights whose rows are not
//! whole blocks of four-bit codes are decoded row by row first.

mod ahead;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod backward;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod bytes;
mod dense;
mod down;
#[cfg(target_arch = "x86_64")]
mod down_bf16;
mod engine;
mod few;
mod lanes;
mod many;
mod narrow;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_bf16;
mod out;
mod portable;
mod stretch;
mod tiles;
#[cfg(target_arch = "x86_64")]
mod tokens;

use std::ops::Range;

pub(super) use self::ahead::{AHEAD, Ahead, Steps};
use self::bytes::Bytes;
use self::engine::{Engine, Rows};
use self::few::{FEW, Few};
use self::lanes::Dot;
pub(super) use self::lanes::Vector;
use self::many::{Codes, Many, STRIPS, Scratch, Source};
use self::narrow::{Narrow, narrow};
pub(super) use self::out::Out;
use self::portable::Portable;
use super::aligned::{Aligned, LINE};
use super::{Cpu, Isa, Lanes, scales, threads};
use crate::dtype::{Dtype, Element};
use crate::error::{Error, Result};
use crate::format::Decode;
use crate::pack::check_len;
use crate::tensor::{QTensor, Scales};

/// Rows of activations that are multiplied at a time; bounds the memory for prepared ones.
const BATCH: usize = 512;

/// Products for which it is worth to wake up another thread.
const WORTH: usize = 1 << 18;

/// Bytes of packed weights in one part of the work for few rows, at most.
const PART: usize = 64 * 1024;

/// Parts that each thread has of a small product, at least, so that none waits long for the last.
const PARTS: usize = 8;

/// Rows of the weight whose scales are decoded at a time, for few rows of activations.
const DECODED_ROWS: usize = 4;

/// Bytes of a page, and of the distance at which lines share a set of the first-level cache.
const PAGE: usize = 4096;

/// A product, checked.
struct Job<'a, T> {
    q: &'a QTensor<'a>,
    rows: usize,
    columns: usize,
    x: &'a [T],
    m: usize,
    bias: Option<&'a [f32]>,
    cpu: Cpu,
}

/// Names the kernels for activations of type `$T`: narrow ones if they and the machine allow it.
macro_rules! with_engine {
    ($isa:expr, $T:ident, $d:ident => $body:expr) => {
        match $isa {
            Isa::Scalar => {
                let $d = Portable;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2($d) => $body,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512($d) => $body,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Ext($d) if $T::DTYPE == Dtype::BF16 => $body,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Ext($d) => {
                let $d = $d.base();
                $body
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon($d) => $body,
            #[cfg(target_arch = "aarch64")]
            Isa::NeonBf16($d) if $T::DTYPE == Dtype::BF16 => $body,
            #[cfg(target_arch = "aarch64")]
            Isa::NeonBf16($d) => {
                let $d = $d.base();
                $body
            }
        }
    };
}

impl Cpu {
    /// `out[m, n] = sum over k of x[m, k] * W[n, k] + bias[n]` for a weight of shape
    /// `[rows, columns]`; `x` and `out` hold whole rows.
    pub fn linear<T: Lanes>(
        &self,
        q: &QTensor<'_>,
        [rows, columns]: [usize; 2],
        x: &[T],
        bias: Option<&[f32]>,
        out: &mut [T],
    ) -> Result<()> {
        let m = check_product(q, [rows, columns], (x.len(), columns), (out.len(), rows))?;
        if let Some(bias) = bias {
            check_len("bias", rows, bias.len())?;
        }
        if m == 0 || rows == 0 {
            return Ok(());
        }
        let job = Job { q, rows, columns, x, m, bias, cpu: *self };
        let out = Out::new(out, rows);
        with_engine!(self.isa, T, d => linear(d, &job, &out));
        Ok(())
    }

    /// The gradient of the activations of [`Cpu::linear`]:
    /// `out[m, k] = sum over n of grad[m, n] * W[n, k]`.
    pub fn linear_backward<T: Lanes>(
        &self,
        q: &QTensor<'_>,
        [rows, columns]: [usize; 2],
        grad: &[T],
        out: &mut [T],
    ) -> Result<()> {
        let m = check_product(q, [rows, columns], (grad.len(), rows), (out.len(), columns))?;
        out.fill(T::default());
        if m == 0 || rows == 0 || columns == 0 {
            return Ok(());
        }
        let job = Job { q, rows, columns, x: grad, m, bias: None, cpu: *self };
        let out = Out::new(out, columns);
        with_engine!(self.isa, T, d => backward::backward(d, &job, &out));
        Ok(())
    }

    /// Whether products of activations of this type use a codebook rounded to bf16.
    pub fn narrow_products(&self, dtype: Dtype) -> bool {
        let narrow = match self.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) | Isa::Avx512Ext(_) => true,
            #[cfg(target_arch = "aarch64")]
            Isa::NeonBf16(_) => true,
            _ => false,
        };
        narrow && dtype == Dtype::BF16
    }
}

/// Checks lengths; returns the rows of activations.
fn check_product(
    q: &QTensor<'_>,
    [rows, columns]: [usize; 2],
    (given, width): (usize, usize),
    (wanted, out_width): (usize, usize),
) -> Result<usize> {
    let elements = rows.checked_mul(columns);
    check_len("weight", q.layout().elements, elements.unwrap_or(usize::MAX))?;
    let m = given.checked_div(width).unwrap_or(wanted / out_width.max(1));
    check_len("activations", m.saturating_mul(width), given)?;
    check_len("output", m.saturating_mul(out_width), wanted)?;
    if let Decode::Dense(_) = q.layout().format.spec().decode {
        return Err(Error::Unsupported {
            format: q.layout().format.name(),
            what: "products",
            remedy: "multiply with the tensor itself",
        });
    }
    Ok(m)
}

impl<T> Job<'_, T> {
    /// The codebook, where rows are whole blocks of four-bit codes.
    fn codebook(&self) -> Option<&'static [f32; 16]> {
        let layout = self.q.layout();
        match layout.format.spec().decode {
            Decode::Codebook4(book)
                if self.columns.is_multiple_of(layout.blocksize) && layout.blocksize >= 32 =>
            {
                Some(&book.values)
            }
            _ => None,
        }
    }

    /// Codes and scales, where rows are signed bytes with a scale each.
    fn bytes(&self) -> Option<(&[i8], &[f32])> {
        let layout = self.q.layout();
        match (layout.format.spec().decode, self.q.scales()) {
            (Decode::Int8, Scales::Plain(absmax)) if layout.blocksize == self.columns => {
                Some((bytemuck::cast_slice(self.q.packed()), absmax))
            }
            _ => None,
        }
    }

    fn threads(&self, m: usize) -> usize {
        let products = self.rows.saturating_mul(self.columns).saturating_mul(m);
        self.cpu.threads.min(products / WORTH).max(1)
    }

    /// The threads for few rows of activations: one takes as long as two, to read the weight.
    fn threads_of_few(&self, m: usize) -> usize {
        self.threads(m.max(2))
    }
}

fn linear<D: Engine, T: Lanes>(d: D, job: &Job<'_, T>, out: &Out<'_, T>) {
    if job.columns == 0 {
        let sums = vec![0.0; job.rows];
        for m in 0..job.m {
            // SAFETY: nothing else writes while `out` is borrowed here.
            d.finish(&sums, job.bias, unsafe { out.part(m, 0, job.rows) });
        }
        return;
    }
    for first in (0..job.m).step_by(BATCH) {
        let m = BATCH.min(job.m - first);
        let x = &job.x[first * job.columns..(first + m) * job.columns];
        let out = out.below(first);
        match job.codebook() {
            Some(values) if m <= FEW && T::DTYPE == Dtype::BF16 => {
                few_rows((d, d.short()), job, values, x, m, &out);
            }
            Some(values) if m <= FEW => few_rows((d, d), job, values, x, m, &out),
            None if m <= FEW => match job.bytes() {
                Some(weight) => byte_rows(d, job, weight, x, m, &out),
                None => dense_rows(d, job, x, m, &out),
            },
            #[cfg(target_arch = "x86_64")]
            Some(values) if tokens::rows(job, values, x, m, &out) => {}
            codebook => many_rows(d, job, codebook, x, m, &out),
        }
    }
}

/// The activations in the type that the kernels take.
fn converted<'a, D: Engine, T: Lanes>(d: D, x: &'a [T], wide: &'a mut Aligned<f32>) -> &'a [D::X] {
    if T::DTYPE == <D::X as Element>::DTYPE {
        return bytemuck::cast_slice(x);
    }
    // Only f32 kernels take another type than their own.
    wide.resize(x.len());
    d.widen(x, wide);
    bytemuck::cast_slice(wide)
}

fn table<D: Dot>(job_format: crate::format::Format, values: &[f32; 16]) -> Narrow {
    if D::SHORT { narrow(job_format, values) } else { Narrow::exact(values) }
}

fn few_rows<D: Engine, R: Rows<X = D::X>, T: Lanes>(
    (d, of_rows): (D, R),
    job: &Job<'_, T>,
    values: &[f32; 16],
    x: &[T],
    m: usize,
    out: &Out<'_, T>,
) {
    let (layout, columns) = (job.q.layout(), job.columns);
    let mut wide = Aligned::default();
    let x = converted(d, x, &mut wide);
    let padded = columns.next_multiple_of(8 * R::LANES);
    // Rows a power of two apart would be taken for each other by the first-level cache.
    let stride = padded + if m > 1 { LINE / size_of::<D::X>() } else { 0 };
    let mut prepared = Aligned::zeroed(m * stride);
    for (row, out) in x.chunks_exact(columns).zip(prepared.chunks_exact_mut(stride)) {
        few::prepare::<R>(row, R::LANES, &mut out[..padded]);
    }
    let Narrow { values, factor } = table::<R>(layout.format, values);
    let blocksize = layout.blocksize;
    let few = Few { packed: job.q.packed(), columns, blocksize, values, factor, m, x: &prepared };
    let threads = job.threads_of_few(m);
    // With one thread a part less is a start less.
    let parts = if threads == 1 { 1 } else { threads * PARTS };
    let most = job.rows.div_ceil(parts).next_multiple_of(4);
    let rows = (PART / (columns / 2)).max(4).min(most) / 4 * 4;
    // Scales are decoded a few rows at a time: while they are, codes arrive.
    let together = match job.q.scales() {
        Scales::Plain(_) => rows,
        _ => DECODED_ROWS.min(rows),
    };
    let own = || (Vec::new(), Vec::new());
    threads::share_runs_with(threads, job.rows.div_ceil(rows), own, |(decoded, sums), part| {
        let first = part * rows;
        let count = rows.min(job.rows - first);
        sums.resize(count * m, 0.0);
        let runs = (first..).step_by(together).zip(sums.chunks_mut(together * m));
        for (first, sums) in runs {
            let blocks = first * few.blocks()..(first + sums.len() / m) * few.blocks();
            let scales = scales::of_blocks(job.cpu.isa, job.q.scales(), blocks, decoded);
            of_rows.rows(&few, first, scales, sums);
        }
        finish(d, job.bias, sums, m, first, count, out);
    });
}

/// Turns `[n][m]` into rows of the output.
fn finish<D: Engine, T: Lanes>(
    d: D,
    bias: Option<&[f32]>,
    sums: &[f32],
    m: usize,
    first: usize,
    count: usize,
    out: &Out<'_, T>,
) {
    let bias = bias.map(|bias| &bias[first..first + count]);
    let mut column = Vec::new();
    for i in 0..m {
        let sums = if m == 1 {
            sums
        } else {
            column.clear();
            column.extend(sums.iter().skip(i).step_by(m));
            &column
        };
        // SAFETY: every part of the work writes columns of its own.
        d.finish(sums, bias, unsafe { out.part(i, first, count) });
    }
}

fn byte_rows<D: Engine, T: Lanes>(
    d: D,
    job: &Job<'_, T>,
    (codes, absmax): (&[i8], &[f32]),
    x: &[T],
    m: usize,
    out: &Out<'_, T>,
) {
    let columns = job.columns;
    let mut wide = Aligned::zeroed(x.len());
    d.widen(x, &mut wide);
    let bytes = Bytes { codes, absmax, columns, m, x: &wide };
    let rows = (PART / columns).clamp(1, job.rows);
    threads::share_runs(job.threads(m), job.rows.div_ceil(rows), |part| {
        let first = part * rows;
        let count = rows.min(job.rows - first);
        let mut sums = vec![0.0; count * m];
        d.byte_rows(&bytes, first, &mut sums);
        finish(d, job.bias, &sums, m, first, count, out);
    });
}

fn dense_rows<D: Engine, T: Lanes>(d: D, job: &Job<'_, T>, x: &[T], m: usize, out: &Out<'_, T>) {
    let mut wide = Aligned::zeroed(x.len());
    d.widen(x, &mut wide);
    let rows = (PART / job.columns).clamp(1, job.rows);
    let one = Cpu { threads: 1, ..job.cpu };
    threads::share(job.threads(m), job.rows.div_ceil(rows), |part| {
        let first = part * rows;
        let count = rows.min(job.rows - first);
        let (mut weights, mut sums) = (Aligned::zeroed(job.columns), vec![0.0; count * m]);
        for (row, sums) in (first..).zip(sums.chunks_exact_mut(m)) {
            decode_dense(&one, job, row, 0, &mut weights);
            d.dense_row(&weights, &wide, sums);
        }
        finish(d, job.bias, &sums, m, first, count, out);
    });
}

/// Decodes a part of a row. The range was checked with the job.
fn decode_dense<T, X: Lanes>(one: &Cpu, job: &Job<'_, T>, row: usize, at: usize, out: &mut [X]) {
    let decoded = one.dequantize_range(job.q, row * job.columns + at, out);
    debug_assert!(decoded.is_ok());
}

fn many_rows<D: Engine, T: Lanes>(
    d: D,
    job: &Job<'_, T>,
    codebook: Option<&[f32; 16]>,
    x: &[T],
    m: usize,
    out: &Out<'_, T>,
) {
    let (layout, columns) = (job.q.layout(), job.columns);
    let mut own = Aligned::default();
    let (x, stride) = activations(d, job, codebook.is_some(), x, m, &mut own);
    let one = Cpu { threads: 1, ..job.cpu };
    let isa = job.cpu.isa;
    let scales = |first: usize, out: &mut [f32]| scales::decode(isa, job.q.scales(), first, out);
    let decode = |row: usize, at: usize, out: &mut [D::X]| decode_dense(&one, job, row, at, out);
    let source = match codebook {
        Some(values) => {
            let Narrow { values, factor } = if many::late::<D>(m) {
                table::<D>(layout.format, values)
            } else {
                Narrow::exact(values)
            };
            let (packed, blocksize) = (job.q.packed(), layout.blocksize);
            let plain = match job.q.scales() {
                Scales::Plain(scales) => scales,
                _ => &[],
            };
            Source::Codes(Codes { packed, blocksize, values, factor, scales: &scales, plain })
        }
        None => Source::Dense(&decode),
    };
    let rows = lanes::panel_rows::<D>();
    let finish = |of: Range<usize>, i: usize, sums: &[f32]| {
        let bias = job.bias.map(|bias| &bias[of.clone()]);
        // SAFETY: every part of the work writes columns of its own.
        unsafe { d.finish_rows((sums, rows), bias, out, (i, of.start, of.len())) };
    };
    let many = Many { source, columns, m, x, stride, finish: &finish };
    let threads = job.threads(m);
    let parts = parts(job.rows.div_ceil(rows), threads);
    threads::share_runs_with(threads, parts.len(), Scratch::default, |scratch, part| {
        let first = parts[part].start * rows;
        let count = (parts[part].end * rows).min(job.rows) - first;
        d.strips(&many, first, count, scratch);
    });
}

/// The activations as [`Many`] wants them, and how far a row is from the next.
fn activations<'a, D: Engine, T: Lanes>(
    d: D,
    job: &Job<'_, T>,
    coded: bool,
    x: &'a [T],
    m: usize,
    own: &'a mut Aligned<D::X>,
) -> (&'a [D::X], usize) {
    let (columns, same) = (job.columns, T::DTYPE == <D::X as Element>::DTYPE);
    let late = coded && many::late::<D>(m);
    let bytes = columns * size_of::<D::X>();
    // Pairs come whole.
    let whole = columns.is_multiple_of(8 / D::STEPS);
    if same && !late && whole && !(coded && bytes.is_multiple_of(PAGE / 2)) {
        return (bytemuck::cast_slice(x), columns);
    }
    let mut stride = columns.next_multiple_of(8);
    if (stride * size_of::<D::X>()).is_multiple_of(PAGE / 4) {
        // Rows a power of two apart would share a few sets of the cache.
        stride += LINE / size_of::<D::X>();
    }
    own.resize(m * stride);
    let rows = Out::new(own, stride);
    let threads = job.threads(m);
    // Rows one by one would be taken in less time than it takes to agree on who takes which.
    let together = m.div_ceil(threads * PARTS);
    threads::share(threads, m.div_ceil(together), |part| {
        let mut wide = Aligned::default();
        for i in part * together..m.min((part + 1) * together) {
            let row = &x[i * columns..(i + 1) * columns];
            // SAFETY: every part of the work writes rows of its own.
            let out = unsafe { rows.part(i, 0, columns) };
            if late {
                d.prepare(converted(d, row, &mut wide), out);
            } else if same {
                out.copy_from_slice(bytemuck::cast_slice(row));
            } else {
                // Only f32 kernels take another type than their own.
                d.widen(row, bytemuck::cast_slice_mut(out));
            }
        }
    });
    (own, stride)
}

/// Parts of so many strips, for each thread those of a run: [`STRIPS`] at a time, for which
/// activations stay near, but fewer towards the end, where one thread helps another.
fn parts(strips: usize, threads: usize) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    for thread in 0..threads {
        let end = strips * (thread + 1) / threads;
        let mut first = strips * thread / threads;
        while first < end {
            let count = ((end - first) / 2).clamp(1, STRIPS);
            parts.push(first..first + count);
            first += count;
        }
    }
    parts
}
