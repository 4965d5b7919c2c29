//! Tokens in lanes: products of some rows of activations in bf16, with AVX512-BF16.
//!
//! `many` puts rows of the weight in lanes, for which the codes of every panel are transposed. Here
//! the activations are, once ([`spread`]), and weights stay in their order: a row is decoded into
//! the first-level cache, and each of its pairs is sent to all lanes ([`strip`]).
//!
//! A vector holds `Shape::pairs` pairs of activations of each of some tokens, and a load sends as
//! many pairs of weights to all of them. With more pairs fewer loads feed the units that multiply,
//! and fewer tokens fill a vector; but a block's sum, which is scaled at its end, is spread over
//! more of them.

mod spread;
mod strip;

use half::bf16;

use self::strip::Scratch;
use super::engine::Engine;
use super::narrow::narrow;
use super::out::Out;
use super::{Job, PARTS, parts};
use crate::backend::cpu::aligned::Aligned;
use crate::backend::cpu::{Isa, Lanes, scales, threads};
use crate::dtype::Dtype;
use crate::tensor::Scales;

/// Columns of a chunk: the codes of a vector.
const CHUNK: usize = 128;

/// Columns of a quarter of a chunk, the smallest block.
const QUAD: usize = CHUNK / 4;

/// Pairs of a quarter.
const PAIRS: usize = QUAD / 2;

/// Numbers in a vector.
const LANES: usize = 16;

/// Bytes of activations that meet all strips of a part of the work while they are near: a quarter
/// of a second-level cache of a megabyte.
const NEAR: usize = 256 * 1024;

/// How tokens lie in lanes, and how many rows of the weight they meet at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    /// Rows of the weight in a strip.
    rows: usize,
    /// Pairs of activations of each token in a vector: one or two.
    pairs: usize,
    /// Vectors of sums of each row.
    vectors: usize,
}

impl Shape {
    /// The quickest for so many tokens, where it beats panels: measured with each number of them.
    /// Lanes without a token take as long as others. With two pairs a vector, blocks of [`QUAD`]
    /// are too short for sums that are spread over more vectors, and rows whose activations do
    /// not stay near are slower.
    fn of(m: usize, columns: usize, blocksize: usize) -> Option<Self> {
        let near = m * columns * size_of::<bf16>() <= NEAR;
        let (rows, pairs, vectors) = match m {
            15..=16 if blocksize > QUAD && near => (8, 2, 2),
            31..=32 => (8, 1, 2),
            48 => (8, 1, 3),
            _ => return None,
        };
        Some(Self { rows, pairs, vectors })
    }

    /// Tokens of a vector.
    const fn tokens(self) -> usize {
        LANES / self.pairs
    }

    /// Words of the activations of a quarter of a chunk.
    const fn quad(self) -> usize {
        PAIRS / self.pairs * self.vectors * LANES
    }
}

/// A product with tokens in lanes.
struct Tokens<'a> {
    shape: Shape,
    /// Codes of all rows, first of a pair high.
    packed: &'a [u8],
    rows: usize,
    columns: usize,
    blocksize: usize,
    /// The codebook.
    values: [f32; 16],
    /// The activations, by [`spread`].
    x: &'a [u32],
    /// The scales, where they need no decoding.
    plain: &'a [f32],
}

impl Tokens<'_> {
    /// Blocks of a row.
    const fn blocks(&self) -> usize {
        self.columns / self.blocksize
    }

    /// The first row of the strip that wants to begin at `row`: the last ones begin before, where
    /// there are rows enough.
    fn lowest(&self, row: usize) -> usize {
        row.min(self.rows - self.shape.rows)
    }
    /// Columns that are multiplied before the next ones are.
    fn width(&self) -> usize {
        let fit = NEAR / (self.shape.tokens() * self.shape.vectors * size_of::<bf16>());
        let ranges = self.columns.div_ceil(fit);
        self.columns.div_ceil(ranges).next_multiple_of(CHUNK)
    }
}

/// `out[m][n]` for `m` rows of activations, if this is the quickest way and the machine can do it.
pub fn rows<T: Lanes>(
    job: &Job<'_, T>,
    values: &[f32; 16],
    x: &[T],
    m: usize,
    out: &Out<'_, T>,
) -> bool {
    let Isa::Avx512Ext(d) = job.cpu.isa else { return false };
    if T::DTYPE != Dtype::BF16 {
        return false;
    }
    let x: &[bf16] = bytemuck::cast_slice(x);
    let layout = job.q.layout();
    let shape = Shape::of(m, job.columns, layout.blocksize);
    let Some(shape) = shape.filter(|shape| shape.rows <= job.rows) else { return false };
    let threads = job.threads(m);
    let mut spread = Aligned::zeroed(job.columns / QUAD * shape.quad());
    spread::spread(d, shape, threads, (x, job.columns), &mut spread);
    let narrow = narrow(layout.format, values);
    let tokens = Tokens {
        shape,
        packed: job.q.packed(),
        rows: job.rows,
        columns: job.columns,
        blocksize: layout.blocksize,
        values: narrow.values,
        x: &spread,
        plain: match job.q.scales() {
            Scales::Plain(scales) => scales,
            _ => &[],
        },
    };
    let unit = 4 * shape.rows;
    let parts = parts(job.rows.div_ceil(unit), threads);
    threads::share_runs(threads, parts.len(), |part| {
        let first = parts[part].start * unit;
        let count = (parts[part].end * unit).min(job.rows) - first;
        let mut scratch = Scratch::default();
        let mut decoded = Vec::new();
        let blocks = tokens.lowest(first) * tokens.blocks()..(first + count) * tokens.blocks();
        let scales = scales::of_blocks(job.cpu.isa, job.q.scales(), blocks, &mut decoded);
        strip::strips(d, &tokens, (first, count), scales, &mut scratch);
        let sums = strip::rows_of_tokens(d, shape, (m, count), narrow.factor, &mut scratch);
        let bias = job.bias.map(|bias| &bias[first..first + count]);
        for (i, sums) in sums.chunks_exact(sums.len() / m).enumerate() {
            // SAFETY: every part of the work writes columns of its own.
            d.finish(&sums[..count], bias, unsafe { out.part(i, first, count) });
        }
    });
    true
}
