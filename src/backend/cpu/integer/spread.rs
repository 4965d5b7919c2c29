//! Cuts a product into parts and spreads them over threads.

use std::ops::Range;

use crate::backend::cpu::Lanes;
use crate::backend::cpu::product::Out;
use crate::backend::cpu::threads::share_runs;

/// Bytes of a weight, or outputs, below which a product stays on one thread.
const SMALL: usize = 1 << 17;

/// Bytes of a weight that one part of a product with few tokens reads.
const RUN_BYTES: usize = 1 << 18;

/// A product to be cut into parts.
#[derive(Clone, Copy)]
pub struct Cut<'a> {
    /// One number a row of the weight.
    pub bias: &'a [f32],
    /// Bytes of a row of the weight.
    pub row_bytes: usize,
    /// Rows of activations.
    pub tokens: usize,
}

impl Cut<'_> {
    /// A product that one thread finishes before another one wakes up stays on one.
    fn threads(&self, threads: usize) -> usize {
        let rows = self.bias.len();
        let small = rows.saturating_mul(self.row_bytes) < SMALL && rows * self.tokens < SMALL;
        if small { 1 } else { threads }
    }
}

/// Calls `work` with runs of rows of the weight and with where their products go: those with all
/// tokens, a row after the other. They get the bias and are written to `out` here.
pub fn rows<T: Lanes>(
    threads: usize,
    cut: Cut<'_>,
    out: &mut [T],
    work: impl Fn(Range<usize>, &mut [f32]) + Sync,
) {
    let Cut { bias, row_bytes, tokens } = cut;
    let rows = bias.len();
    let out = &Out::new(out, rows);
    let run = (RUN_BYTES / row_bytes).clamp(1, 4096).next_multiple_of(4);
    share_runs(cut.threads(threads), rows.div_ceil(run), |part| {
        let here = part * run..rows.min((part + 1) * run);
        let mut sums = vec![0.0; here.len() * tokens];
        work(here.clone(), &mut sums);
        for token in 0..tokens {
            // SAFETY: the outputs of these rows belong to this call alone.
            let out = unsafe { out.part(token, here.start, here.len()) };
            let sums = sums[token..].iter().step_by(tokens).zip(&bias[here.clone()]);
            for (out, (sum, bias)) in out.iter_mut().zip(sums) {
                *out = T::from_f32(sum + bias);
            }
        }
    });
}

/// Calls `work` with the number of each panel of `height` rows of the weight and the first of each
/// run of tokens.
pub fn panels<T: Lanes>(
    threads: usize,
    cut: Cut<'_>,
    (height, run): (usize, usize),
    out: &mut [T],
    work: impl Fn(usize, usize, &Out<'_, T>) + Sync,
) {
    let rows = cut.bias.len();
    let out = &Out::new(out, rows);
    let panels = rows.div_ceil(height);
    share_runs(cut.threads(threads), panels * cut.tokens.div_ceil(run), |part| {
        work(part % panels, part / panels * run, out);
    });
}
