//! `compute="int8"`: activations and four-bit codes as integers; see [`crate::quant::integer`].

use super::blocks::multiple;
use super::device::Cuda;
use super::launch::{Grid, INTEGER_LINEAR4, INTEGER_ROWS};
use super::memory::DeviceSlice;
use super::params;
use super::product::Bias;
use super::tensor::DeviceTensor;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::pack::check_len;
use crate::quant::integer::{GROUP, Integers};

/// Groups of activations, rows of the weight and rows of activations of a block of threads, by
/// `cuda/kernels.md`.
const GROUPS_EACH: u64 = 8;
const LINEAR_EACH: (u64, u64) = (8, 8);

/// Activations as signed bytes.
#[derive(Clone, Copy, Debug)]
pub struct Activations {
    /// The codes, [m, k]. Kernels write them; they begin at 16 bytes.
    pub codes: DeviceSlice<u8>,
    /// What each group of a row is multiplied by, [m, groups].
    pub factors: DeviceSlice<f32>,
}

impl Cuda {
    /// `y = x @ q.T + bias` with both factors as integers. `scratch` holds those of `x`.
    pub fn integer_linear<T: Element>(
        &self,
        q: &DeviceTensor,
        shape: [usize; 2],
        x: DeviceSlice<T>,
        scratch: Activations,
        bias: Option<Bias>,
        y: DeviceSlice<T>,
    ) -> Result<()> {
        let integers = Integers::of(q.layout().format)?;
        let [n, k] = shape;
        check_len("weight", q.layout().elements, n.saturating_mul(k))?;
        let (bias, bias_dtype) = Bias::params(bias, n)?;
        if y.is_empty() {
            return Ok(());
        }
        multiple("number of results", y.len(), n)?;
        let m = y.len() / n;
        check_len("x", m.saturating_mul(k), x.len())?;
        let Activations { codes, factors } = scratch;
        check_len("codes", x.len(), codes.len())?;
        check_len("factors", m.saturating_mul(k.div_ceil(GROUP)), factors.len())?;
        if x.is_empty() {
            let expected = "it must be above 0".to_owned();
            return Err(Error::Argument { what: "row length", got: k.to_string(), expected });
        }
        let rows = params::IntegerRows {
            x: x.address("x")?,
            codes: codes.wide("codes")?,
            factors: factors.address("factors")?,
            rows: m as u64,
            columns: k as u64,
            log2_group: GROUP.ilog2(),
            padding: 0,
        };
        let grid = Grid::line(factors.len() as u64, GROUPS_EACH);
        self.launch(&INTEGER_ROWS, Some(T::DTYPE), grid, rows)?;
        let params = params::IntegerLinear4 {
            codes: rows.codes,
            factors: rows.factors,
            packed: q.packed().wide("packed")?,
            bias,
            y: y.address("y")?,
            m: m as u64,
            n: n as u64,
            k: k as u64,
            scales: q.scales_of_blocks()?,
            integers: integers.values,
            step: integers.step,
            log2_group: rows.log2_group,
            bias_dtype,
            padding: 0,
        };
        let grid = Grid::plane((params.n, LINEAR_EACH.0), (params.m, LINEAR_EACH.1));
        self.launch(&INTEGER_LINEAR4, Some(T::DTYPE), grid, params)
    }
}
