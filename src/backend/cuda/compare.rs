//! How far a tensor is from its quantized form: sums of runs on the device, figures from those.

use super::device::Cuda;
use super::launch::{COMPARE, Grid};
use super::memory::DeviceSlice;
use super::params::{self, RunStats};
use super::tensor::{DeviceScales, DeviceTensor};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::pack::check_len;
use crate::quant::stats::{OUTLIER_FACTOR, RUN, Stats};
use crate::tensor::Layout;

use super::blocks::multiple;

/// Numbers of 64 bits of what the device says about a run.
pub const WORDS: usize = size_of::<RunStats>() / size_of::<i64>();

/// Elements of a run: whole blocks or rows, as on the CPU, whose sums these are.
pub fn run(layout: &Layout) -> usize {
    let block = layout.blocksize.max(1);
    (RUN / block).max(1) * block
}

impl Cuda {
    /// Compares `x`, which begins at position `first` of the tensor, with what those elements
    /// decode to. `out` has [`WORDS`] numbers for each run.
    pub fn compare<T: Element>(
        &self,
        q: &DeviceTensor,
        first: usize,
        x: DeviceSlice<T>,
        decoded: DeviceSlice<f32>,
        out: DeviceSlice<i64>,
    ) -> Result<()> {
        let (layout, run) = (q.layout(), run(q.layout()));
        multiple("first element", first, run)?;
        let left = layout.elements.saturating_sub(first);
        if x.len() > left {
            return Err(Error::Length { what: "x", expected: left, got: x.len() });
        }
        check_len("decoded", x.len(), decoded.len())?;
        check_len("sums", x.len().div_ceil(run) * WORDS, out.len())?;
        if x.is_empty() {
            return Ok(());
        }
        let scales = match q.scales() {
            // Rows have any length; the kernel divides by it.
            DeviceScales::Plain(absmax) => params::Scales {
                absmax: absmax.address("absmax")?,
                codes: 0,
                codebook: 0,
                nested_absmax: 0,
                offset: 0,
                log2_blocksize: 0,
                log2_nested_blocksize: 0,
            },
            _ => q.scales_of_blocks()?,
        };
        let params = params::Compare {
            x: x.address("x")?,
            decoded: decoded.address("decoded")?,
            out: out.address("sums")?,
            first: first as u64,
            n: x.len() as u64,
            run: run as u64,
            block: layout.blocksize.max(1) as u64,
            scales,
            outlier_factor: OUTLIER_FACTOR,
            padding: 0,
        };
        self.launch(&COMPARE, Some(T::DTYPE), Grid::line(params.n, params.run), params)
    }
}

/// The statistics of `elements` elements, from what [`Cuda::compare`] wrote about all their runs.
pub fn total(words: &[i64], elements: usize) -> Result<Stats> {
    let runs: &[RunStats] = bytemuck::try_cast_slice(words).map_err(|_| Error::Argument {
        what: "sums",
        got: format!("{} numbers", words.len()),
        expected: format!("there are {WORDS} for each run"),
    })?;
    let mut total = Stats::default();
    for run in runs {
        let [original, decoded, product, error] = run.sums;
        let &RunStats { max_abs, absmax_min, absmax_max, outliers, .. } = run;
        total.merge(&Stats {
            original,
            decoded,
            product,
            error,
            max_abs,
            absmax_min,
            absmax_max,
            outliers,
            ..Stats::default()
        });
    }
    total.count = elements as u64;
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;

    #[test]
    fn runs_are_whole_blocks_or_rows() {
        let of = |format, shape: &[usize], blocksize| {
            run(&Layout::new(format, shape, blocksize, false).unwrap())
        };
        assert_eq!(of(Format::Nf4, &[300, 300], Some(64)), RUN);
        assert_eq!(of(Format::Int8, &[4, 1000], None), 65_000);
        assert_eq!(of(Format::Int8, &[4, 100_000], None), 100_000);
    }

    #[test]
    fn sums_of_runs_are_merged_in_turn() {
        let one = RunStats {
            sums: [1.0, 2.0, 3.0, 4.0],
            max_abs: 0.5,
            absmax_min: 1.0,
            absmax_max: 2.0,
            padding: 0,
            outliers: 7,
        };
        let two = RunStats { max_abs: 0.25, absmax_min: 0.5, ..one };
        let words: Vec<i64> = bytemuck::cast_slice(&[one, two]).to_vec();
        let found = total(&words, 99).unwrap();
        assert_eq!((found.count, found.outliers, found.error), (99, 14, 8.0));
        assert_eq!((found.max_abs, found.absmax_min, found.absmax_max), (0.5, 0.5, 2.0));
        assert!(total(&words[1..], 99).is_err());
        assert_eq!(total(&[], 0).unwrap(), Stats::default());
    }
}
