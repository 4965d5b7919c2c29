//! What a product reads and where it writes.

use super::dot::Dot;
use super::spread::Cut;
use crate::backend::cpu::aligned::{Aligned, LINE};
use crate::backend::cpu::product::Out;
use crate::backend::cpu::threads::share;
use crate::backend::cpu::{Isa, Kernels, Lanes, scales};
use crate::quant::integer::{GROUP, Integers, group_scale};
use crate::tensor::{QTensor, Scales};

/// Activations up to which one thread quantizes them all.
pub const ALONE: usize = 1 << 16;

/// Quantized activations in the order in which a kernel reads them.
pub struct Arranged {
    /// Rows.
    pub tokens: usize,
    /// Bytes from one row to the next.
    pub stride: usize,
    /// The codes.
    pub codes: Aligned<i8>,
    /// For each row, minus the bias of the weights times sums of codes.
    pub starts: Vec<i32>,
    /// Scales of each row's groups, or of the row.
    pub scales: Vec<f32>,
    /// Scales of a row.
    pub groups: usize,
}

impl Arranged {
    /// Codes of a token.
    pub fn row(&self, token: usize) -> &[i8] {
        &self.codes[token * self.stride..][..self.stride]
    }

    /// Takes rows of `columns` codes, `stride` apart, with the scales of the rows.
    pub fn by_rows(
        (rows, columns): (&[i8], usize),
        stride: usize,
        bias: i32,
        scales: Vec<f32>,
    ) -> Self {
        let mut codes = Aligned::zeroed(scales.len() * stride);
        for (codes, row) in codes.chunks_exact_mut(stride).zip(rows.chunks_exact(columns)) {
            codes[..columns].copy_from_slice(row);
        }
        // The sum of up to 133,144 codes times 128 fits; sums of products wrap and come back.
        let start = |row: &[i8]| sum(row).wrapping_mul(bias).wrapping_neg();
        let starts = rows.chunks_exact(columns).map(start).collect();
        Self { tokens: scales.len(), stride, codes, starts, scales, groups: 1 }
    }

    /// Quantizes rows of `columns` activations by groups. In each `span` of elements those at even
    /// positions come first, as the halves of packed bytes do (a span of 1 keeps the order); `starts` writes what sums begin with.
    pub fn quantize<T: Lanes>(
        kernels: &Kernels<T>,
        threads: usize,
        (x, columns): (&[T], usize),
        span: usize,
        starts_of_row: usize,
        starts: impl Fn(&[i8], &mut [i32]) + Sync,
    ) -> Self {
        let tokens = x.len() / columns;
        let (stride, groups) = (stride(columns, span), columns.div_ceil(GROUP));
        let mut arranged = Self {
            tokens,
            stride,
            codes: Aligned::zeroed(tokens * stride),
            starts: vec![0; tokens * starts_of_row],
            scales: vec![0.0; tokens * groups],
            groups,
        };
        let codes = Out::new(&mut arranged.codes, stride);
        let sums = Out::new(&mut arranged.starts, starts_of_row);
        let scales = Out::new(&mut arranged.scales, groups);
        let threads = if x.len() <= ALONE { 1 } else { threads };
        share(threads, tokens, |token| {
            // SAFETY: each token has its own part of the three buffers, whose lengths are above.
            let (out, sums, scales) = unsafe {
                (
                    codes.part(token, 0, stride),
                    sums.part(token, 0, starts_of_row),
                    scales.part(token, 0, groups),
                )
            };
            let row = &x[token * columns..(token + 1) * columns];
            for ((x, scale), out) in row.chunks(GROUP).zip(scales).zip(out.chunks_mut(GROUP)) {
                let mut codes = [0; GROUP];
                *scale = group_scale((kernels.quantize_row)(x, &mut codes[..x.len()]));
                if span == 1 {
                    out.copy_from_slice(&codes[..out.len()]);
                    continue;
                }
                for (codes, out) in codes.chunks(span).zip(out.chunks_mut(span)) {
                    halve(codes, out);
                }
            }
            starts(out, sums);
        });
        arranged
    }
}

/// The distance of rows: whole cache lines and an odd number of them, so that the same columns of
/// many rows spread over all sets of a cache.
pub fn stride(columns: usize, multiple: usize) -> usize {
    let lines = columns.next_multiple_of(multiple).div_ceil(LINE);
    (lines | 1) * LINE
}

/// Even positions first.
fn halve(codes: &[i8], out: &mut [i8]) {
    let (even, odd) = out.split_at_mut(out.len() / 2);
    for ((pair, even), odd) in codes.as_chunks::<2>().0.iter().zip(even).zip(odd) {
        (*even, *odd) = (pair[0], pair[1]);
    }
}

/// Quantized activations in the order in which strips of a weight meet them: group by group, in a
/// group token by token.
pub struct Staged {
    /// [`GROUP`] codes of each token in each group, with zeros behind a short last group.
    pub codes: Aligned<i8>,
    /// For each token in each group, minus the bias of the weights times the sums of its units.
    pub starts: Vec<i32>,
    /// The scale of each token in each group.
    pub scales: Vec<f32>,
}

impl Staged {
    /// Quantizes rows of `columns` activations by groups. In each eight elements those at even
    /// positions come first, as the halves of packed bytes do.
    pub fn quantize<T: Lanes>(
        kernels: &Kernels<T>,
        threads: usize,
        (x, columns): (&[T], usize),
        (unit, bias): (usize, u8),
    ) -> Self {
        let (tokens, groups) = (x.len() / columns, columns.div_ceil(GROUP));
        let mut staged = Self {
            codes: Aligned::zeroed(groups * tokens * GROUP),
            starts: vec![0; groups * tokens * (GROUP / unit)],
            scales: vec![0.0; groups * tokens],
        };
        let codes = Out::new(&mut staged.codes, GROUP);
        let starts = Out::new(&mut staged.starts, GROUP / unit);
        let scales = Out::new(&mut staged.scales, 1);
        let threads = if x.len() <= ALONE { 1 } else { threads };
        share(threads, tokens, |token| {
            let row = &x[token * columns..(token + 1) * columns];
            for (group, x) in row.chunks(GROUP).enumerate() {
                let at = group * tokens + token;
                // SAFETY: each token has its own part of the three buffers.
                let (out, starts, scale) = unsafe {
                    (
                        codes.part(at, 0, GROUP),
                        starts.part(at, 0, GROUP / unit),
                        scales.part(at, 0, 1),
                    )
                };
                let mut codes = [0; GROUP];
                scale[0] = group_scale((kernels.quantize_row)(x, &mut codes[..x.len()]));
                for (codes, out) in codes.chunks(8).zip(out.chunks_mut(8)) {
                    halve(codes, out);
                }
                for (codes, start) in codes.chunks(unit).zip(starts) {
                    *start = -i32::from(bias) * sum(codes);
                }
            }
        });
        staged
    }
}

/// A product with four-bit weights whose rows are whole blocks, with activations of some kind.
pub struct Four<'a, X = Arranged> {
    /// The weight.
    pub q: &'a QTensor<'a>,
    /// What decodes its scales.
    pub isa: Isa,
    /// What its codes stand for.
    pub integers: &'a Integers,
    /// Length of a row of the weight.
    pub columns: usize,
    /// Rows of activations.
    pub tokens: usize,
    /// Activations.
    pub x: X,
    /// One number a row of the weight.
    pub bias: &'a [f32],
}

impl<'a, X> Four<'a, X> {
    /// The same with these activations.
    pub fn with<Y>(self, x: Y) -> Four<'a, Y> {
        let Self { q, isa, integers, columns, tokens, bias, .. } = self;
        Four { q, isa, integers, columns, tokens, x, bias }
    }

    /// Scales of `blocks` of a row from its block `first` on, from the tensor or decoded.
    #[inline(always)]
    pub fn scales<'b>(&'b self, first: usize, blocks: usize, decoded: &'b mut [f32]) -> &'b [f32] {
        match self.q.scales() {
            Scales::Plain(scales) => &scales[first..first + blocks],
            quantized => {
                let decoded = &mut decoded[..blocks];
                scales::decode(self.isa, quantized, first, decoded);
                decoded
            }
        }
    }

    /// What of it tells how to cut it.
    pub fn cut(&self) -> Cut<'_> {
        Cut { bias: self.bias, row_bytes: self.columns / 2, tokens: self.tokens }
    }

    /// Elements whose products are summed as integers: as many as have one scale on both sides.
    pub fn unit(&self) -> usize {
        self.q.layout().blocksize.min(GROUP)
    }
}

impl Eight<'_> {
    /// A multiple of the lanes of any vector.
    pub const PADDING: usize = 16;

    /// What of it tells how to cut it.
    pub fn cut(&self) -> Cut<'_> {
        Cut { bias: self.bias, row_bytes: self.columns, tokens: self.x.tokens }
    }
}

/// A product with int8 weights.
pub struct Eight<'a> {
    /// The codes of the weight.
    pub weight: &'a [i8],
    /// A scale for each of its rows.
    pub absmax: &'a [f32],
    /// Length of a row of the weight.
    pub columns: usize,
    /// Activations, one scale a row.
    pub x: Arranged,
    /// Columns that are multiplied as they are.
    pub outliers: &'a [usize],
    /// Those columns of the activations, a row after the other.
    pub outlying: &'a [f32],
    /// Numbers from one of these rows to the next, a multiple of [`Eight::PADDING`]; zeros fill them.
    pub apart: usize,
    /// One number a row of the weight.
    pub bias: &'a [f32],
}

/// What the sums of a row begin with, for a kernel whose lanes lie along the row: for each vector
/// of `LANES` lanes minus the bias times the activations of the lane.
pub fn lane_starts<D: Dot>(codes: &[i8], starts: &mut [i32]) {
    let half = 4 * D::LANES;
    for (codes, starts) in codes.chunks_exact(2 * half).zip(starts.chunks_exact_mut(D::LANES)) {
        let (even, odd) = codes.split_at(half);
        let lanes = even.as_chunks::<4>().0.iter().zip(odd.as_chunks::<4>().0);
        for ((even, odd), start) in lanes.zip(starts) {
            *start = -i32::from(D::BIAS) * (sum(even) + sum(odd));
        }
    }
}

fn sum(codes: &[i8]) -> i32 {
    codes.iter().map(|code| i32::from(*code)).sum()
}
