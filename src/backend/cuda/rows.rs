//! LLM.int8(): activations and weights of signed bytes, columns of outliers apart.

use super::blocks::multiple;
use super::device::Cuda;
use super::launch::{Grid, INT8_FINISH, INT8_FLAGS, INT8_LINEAR_SMALL, INT8_OUTLIERS};
use super::memory::DeviceSlice;
use super::params;
use super::product::Bias;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::pack::check_len;

/// Extents of a block of threads, by `cuda/kernels.md`.
const FLAGS_EACH: (u64, u64) = (256, 64);
const LINEAR_EACH: (u64, u64) = (8, 8);
const FINISH_EACH: u64 = 1024;

/// Columns of activations that are multiplied in full precision.
#[derive(Clone, Copy, Debug)]
pub struct Outliers<T> {
    /// The activations, [m, k].
    pub x: DeviceSlice<T>,
    /// Room for k numbers; the first ones are used.
    pub columns: DeviceSlice<i32>,
    /// How many there are, one element.
    pub count: DeviceSlice<i32>,
}

/// The integers that are multiplied, or their sums.
#[derive(Clone, Copy, Debug)]
pub enum Integers {
    /// Codes of the activations, [m, k].
    Codes(DeviceSlice<u8>),
    /// Sums of products, [m, n], which were made elsewhere.
    Sums(DeviceSlice<i32>),
}

/// A weight of signed bytes [n, k] and its scales.
#[derive(Clone, Copy, Debug)]
pub struct Weight8 {
    /// The codes.
    pub codes: DeviceSlice<u8>,
    /// One scale a row.
    pub absmax: DeviceSlice<f32>,
    /// n, k
    pub shape: [usize; 2],
}

impl Cuda {
    /// Lists the columns of `x` [rows, columns] in which a magnitude reaches `threshold`.
    /// `flags`, one for each column, must be 0 before.
    pub fn find_outliers<T: Element>(
        &self,
        threshold: f32,
        flags: DeviceSlice<u8>,
        outliers: &Outliers<T>,
    ) -> Result<()> {
        let (x, columns) = (outliers.x, flags.len());
        check_len("columns", columns, outliers.columns.len())?;
        check_len("count", 1, outliers.count.len())?;
        if threshold.is_nan() || threshold <= 0.0 {
            let expected = "it must be above 0".to_owned();
            return Err(Error::Argument {
                what: "threshold",
                got: threshold.to_string(),
                expected,
            });
        }
        if u32::try_from(columns).is_err() {
            return Err(Error::TooLarge { shape: vec![columns] });
        }
        if !x.is_empty() {
            multiple("number of activations", x.len(), columns)?;
            let rows = (x.len() / columns) as u64;
            let params = params::Int8Flags {
                x: x.address("x")?,
                flags: flags.address("flags")?,
                rows,
                columns: columns as u64,
                threshold,
                padding: 0,
            };
            let grid = Grid::plane((params.columns, FLAGS_EACH.0), (rows, FLAGS_EACH.1));
            self.launch(&INT8_FLAGS, Some(T::DTYPE), grid, params)?;
        }
        let params = params::Int8Outliers {
            flags: flags.address("flags")?,
            columns: columns as u64,
            outliers: outliers.params()?,
        };
        self.launch(&INT8_OUTLIERS, None, Grid::line(1, 1), params)
    }

    /// `y = x @ weight.T + bias` from integers that stand for `x`, scaled by `x_absmax`.
    pub fn int8_linear<T: Element>(
        &self,
        integers: Integers,
        x_absmax: DeviceSlice<f32>,
        weight: &Weight8,
        outliers: Option<&Outliers<T>>,
        bias: Option<Bias>,
        y: DeviceSlice<T>,
    ) -> Result<()> {
        let ([n, k], m) = (weight.shape, x_absmax.len());
        let product = |a: usize, b: usize| {
            a.checked_mul(b).ok_or_else(|| Error::TooLarge { shape: vec![a, b] })
        };
        check_len("weight", product(n, k)?, weight.codes.len())?;
        check_len("absmax", n, weight.absmax.len())?;
        check_len("y", product(m, n)?, y.len())?;
        let (bias, bias_dtype) = Bias::params(bias, n)?;
        let (codes, sums) = match integers {
            Integers::Codes(codes) => {
                check_len("codes", product(m, k)?, codes.len())?;
                (codes.address("codes")?, 0)
            }
            Integers::Sums(sums) => {
                check_len("sums", product(m, n)?, sums.len())?;
                (0, sums.address("sums")?)
            }
        };
        let mut x = 0;
        let mut listed = params::Outliers { columns: 0, count: 0 };
        if let Some(outliers) = outliers {
            check_len("x", product(m, k)?, outliers.x.len())?;
            check_len("columns", k, outliers.columns.len())?;
            check_len("count", 1, outliers.count.len())?;
            (x, listed) = (outliers.x.address("x")?, outliers.params()?);
        }
        if y.is_empty() {
            return Ok(());
        }
        let params = params::Int8Linear {
            codes,
            sums,
            x_absmax: x_absmax.address("x_absmax")?,
            weight: weight.codes.address("weight")?,
            absmax: weight.absmax.address("absmax")?,
            bias,
            y: y.address("y")?,
            x,
            outliers: listed,
            m: m as u64,
            n: n as u64,
            k: k as u64,
            bias_dtype,
            padding: 0,
        };
        if sums == 0 {
            let grid = Grid::plane((params.n, LINEAR_EACH.0), (params.m, LINEAR_EACH.1));
            self.launch(&INT8_LINEAR_SMALL, Some(T::DTYPE), grid, params)
        } else {
            let grid = Grid::line(y.len() as u64, FINISH_EACH);
            self.launch(&INT8_FINISH, Some(T::DTYPE), grid, params)
        }
    }
}

impl<T> Outliers<T> {
    fn params(&self) -> Result<params::Outliers> {
        let columns = self.columns.address("columns")?;
        Ok(params::Outliers { columns, count: self.count.address("count")? })
    }
}
