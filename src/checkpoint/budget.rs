//! How much of a tensor is worked on at once, and how much memory that takes.

use ::safetensors::Dtype as FileDtype;

use crate::checkpoint::plan::{Action, Item};
use crate::error::{Error, Result};
use crate::format::MAX_BLOCKSIZE;
use crate::quant::nested::NESTED_BLOCKSIZE;
use crate::tensor::Layout;

/// Elements of one run unless memory is short: large enough for a disk to be read in one go.
const RUN: usize = 4 << 20;

/// What the process takes before the first tensor: interpreter, headers, plan.
const BASE: u64 = 24 << 20;

/// Elements that one thread works on at a time, and bytes that it takes for each: decoded and
/// original values for the statistics, and repaired ones.
const THREAD_RUN: u64 = 64 * 1024;
const THREAD_BYTES: u64 = 12;

/// The memory that one tensor takes: `fixed` bytes and some bytes for each element of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cost {
    fixed: u64,
    /// In half bytes, since two codes fit in one.
    half_bytes: u64,
    /// Runs are a multiple of this many elements.
    unit: usize,
    elements: usize,
}

impl Cost {
    fn new(item: &Item, threads: usize) -> Self {
        let bytes = |dtype: FileDtype| dtype.bitsize() as u64 / 8;
        let source = item.info.dtype;
        let plain = |size: u64| Self {
            fixed: 0,
            half_bytes: 2 * size,
            unit: 1,
            elements: item.info.elements(),
        };
        match &item.action {
            // Bytes, whatever the element.
            Action::Keep => Self { elements: item.info.bytes as usize, ..plain(1) },
            Action::Cast(dtype) => plain(bytes(source) + dtype.size() as u64),
            Action::Quantize { layout, dtype, transposed } => {
                let whole = if layout.nested {
                    5 * layout.scales as u64 + 4 * layout.nested_scales() as u64
                } else {
                    0
                };
                let row = if *transposed { item.info.shape.first().copied() } else { None };
                let scratch = THREAD_BYTES * THREAD_RUN.max(layout.blocksize as u64);
                Self {
                    fixed: whole + threads as u64 * scratch,
                    half_bytes: 2 * (bytes(source) + dtype.size() as u64) + codes(layout) + 1,
                    unit: unit(layout.blocksize, row),
                    elements: layout.elements,
                }
            }
            Action::Dequantize { stored, dtype, transposed } => {
                let layout = &stored.layout;
                let blocks = if layout.nested { NESTED_BLOCKSIZE } else { 1 };
                let row = if *transposed { stored.shape.last().copied() } else { None };
                let scratch = 4 * THREAD_RUN * threads as u64;
                Self {
                    fixed: 4 * (layout.scales + layout.nested_scales()) as u64 + scratch,
                    half_bytes: 2 * dtype.size() as u64 + codes(layout),
                    unit: unit(layout.blocksize * blocks, row),
                    elements: layout.elements,
                }
            }
        }
    }

    fn bytes(&self, run: usize) -> u64 {
        BASE + self.fixed + (run.min(self.elements) as u64).saturating_mul(self.half_bytes) / 2
    }

    /// The largest run that fits, at most [`RUN`] if that holds a unit.
    fn run(&self, max_memory: Option<u64>) -> Result<usize> {
        let whole = (RUN / self.unit).max(1) * self.unit;
        let Some(available) = max_memory else { return Ok(whole) };
        let left = available.saturating_sub(BASE + self.fixed).saturating_mul(2) / self.half_bytes;
        let fits = usize::try_from(left).unwrap_or(usize::MAX);
        if fits >= self.elements {
            return Ok(whole);
        }
        match (fits / self.unit * self.unit).min(whole) {
            0 => Err(Error::Memory {
                what: "this tensor".to_owned(),
                needed: self.bytes(self.unit),
                available,
                remedy: "allow more with max_memory (--max-memory)",
            }),
            run => Ok(run),
        }
    }
}

/// Half bytes of a code.
fn codes(layout: &Layout) -> u64 {
    u64::from(layout.format.spec().bits) / 4
}

/// The least run: whole blocks and, where the tensor is transposed on the way, whole rows. Where
/// blocks are small, the largest block instead, which keeps reads aligned.
fn unit(block: usize, row: Option<usize>) -> usize {
    let block = block.max(1);
    match row {
        Some(row) => least_common_multiple(block, row.max(1)),
        None if MAX_BLOCKSIZE.is_multiple_of(block) => MAX_BLOCKSIZE,
        None => block,
    }
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    (a / x.max(1)).saturating_mul(b)
}

/// Elements of one run of this tensor (bytes, where it is only copied).
pub fn run(item: &Item, threads: usize, max_memory: Option<u64>) -> Result<usize> {
    Cost::new(item, threads).run(max_memory).map_err(|error| error.in_tensor(&item.info.name))
}

/// The memory that the whole work takes; fails where it is more than allowed.
pub fn peak<'a>(
    items: impl Iterator<Item = &'a Item>,
    threads: usize,
    max_memory: Option<u64>,
) -> Result<u64> {
    items.into_iter().try_fold(BASE, |peak, item| {
        let run = run(item, threads, max_memory)?;
        Ok(peak.max(Cost::new(item, threads).bytes(run)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::safetensors::TensorInfo;
    use crate::dtype::Dtype;
    use crate::format::Format;

    fn item(format: Format, shape: &[usize], transposed: bool) -> Item {
        let mut logical = shape.to_vec();
        if transposed {
            logical.reverse();
        }
        let layout = Layout::new(format, &logical, None, false).unwrap();
        let elements: usize = shape.iter().product();
        Item {
            file: 0,
            info: TensorInfo {
                name: "w".to_owned(),
                dtype: FileDtype::BF16,
                shape: shape.to_vec(),
                offset: 0,
                bytes: 2 * elements as u64,
            },
            action: Action::Quantize { layout, dtype: Dtype::BF16, transposed },
            reason: None,
            left_out: None,
            bytes: 2 * elements as u64,
        }
    }

    #[test]
    fn less_memory_means_shorter_runs_of_whole_blocks() {
        let item = item(Format::Nf4, &[8192, 8192], false);
        assert_eq!(run(&item, 1, None).unwrap(), RUN);
        let short = run(&item, 1, Some(BASE + (2 << 20))).unwrap();
        assert!(short < RUN && short.is_multiple_of(MAX_BLOCKSIZE), "{short}");
        assert!(matches!(run(&item, 1, Some(BASE)), Err(Error::InTensor { .. })));
        let peak = |memory| peak([&item].into_iter(), 1, memory).unwrap();
        assert!(peak(Some(BASE + (2 << 20))) <= BASE + (2 << 20));
        assert!(peak(None) < BASE + (32 << 20));
    }

    #[test]
    fn rows_are_not_cut_where_they_matter() {
        let rows = item(Format::Int8, &[10_000, 3000], false);
        assert!(run(&rows, 2, Some(BASE + (16 << 20))).unwrap().is_multiple_of(3000));
        let transposed = item(Format::Nf4, &[770, 10_000], true);
        let run = run(&transposed, 2, Some(BASE + (16 << 20))).unwrap();
        assert!(run.is_multiple_of(770) && run.is_multiple_of(64), "{run}");
    }
}
