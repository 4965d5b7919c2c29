//! Products with weights of four-bit codes, for few rows of activations.
//!
//! Many rows are multiplied by torch with chunks of the decoded weight; see `nybble/cuda.py`.

use super::blocks::{dense, multiple};
use super::device::Cuda;
use super::launch::{Family, Grid, LINEAR4_GEMV, LINEAR4_SMALL8, LINEAR4_SMALL16, LINEAR4_SMALL32};
use super::memory::DeviceSlice;
use super::params;
use super::tensor::DeviceTensor;
use crate::dtype::{Dtype, Element};
use crate::error::Result;
use crate::format::{Decode, Format};
use crate::pack::check_len;

/// Kernels on tensor cores, and the most rows of activations that each takes.
static SMALL: [(u64, &Family<params::Linear4>); 3] =
    [(8, &LINEAR4_SMALL8), (16, &LINEAR4_SMALL16), (32, &LINEAR4_SMALL32)];

/// The most rows for which the kernel without tensor cores is worth it: it reads the weight again
/// for every four.
const GEMV_ROWS: u64 = 8;
/// Rows of the weight, and rows of activations, of a block of threads.
const SMALL_EACH: u64 = 16;
const GEMV_EACH: u64 = 8;
const GEMV_ROWS_EACH: u64 = 4;

/// Capability from which tensor cores multiply bf16.
const BF16_CAPABILITY: u32 = 80;

/// A bias of any element type.
#[derive(Clone, Copy, Debug)]
pub enum Bias {
    /// f32
    F32(DeviceSlice<f32>),
    /// f16
    F16(DeviceSlice<half::f16>),
    /// bf16
    BF16(DeviceSlice<half::bf16>),
}

impl Bias {
    /// Address and dtype as kernels take them, for `n` elements.
    pub(super) fn params(bias: Option<Self>, n: usize) -> Result<(u64, u32)> {
        let (address, len, dtype) = match bias {
            None => return Ok((0, 0)),
            Some(Bias::F32(bias)) => (bias.address("bias")?, bias.len(), Dtype::F32),
            Some(Bias::F16(bias)) => (bias.address("bias")?, bias.len(), Dtype::F16),
            Some(Bias::BF16(bias)) => (bias.address("bias")?, bias.len(), Dtype::BF16),
        };
        check_len("bias", n, len)?;
        Ok((address, params::dtype_number(dtype)))
    }
}

/// The kernel on tensor cores for `m` rows of activations, if one fits.
fn small(
    m: u64,
    k: u64,
    dtype: Dtype,
    capability: u32,
) -> Option<&'static Family<params::Linear4>> {
    let fits = match dtype {
        Dtype::F32 => false,
        Dtype::F16 => true,
        Dtype::BF16 => capability >= BF16_CAPABILITY,
    };
    let found = SMALL.iter().find(|(most, _)| m <= *most)?;
    (fits && k > 0 && k.is_multiple_of(64)).then_some(found.1)
}

/// The most rows of activations that one kernel multiplies, for a weight with rows of `k`
/// elements; 0 where there is no kernel for the format.
pub fn most_rows(format: Format, k: usize, dtype: Dtype, capability: u32) -> u64 {
    match format.spec().decode {
        Decode::Codebook4(_) => {
            let wide = SMALL.iter().map(|(most, _)| *most);
            let wide = wide.filter(|most| small(*most, k as u64, dtype, capability).is_some());
            wide.max().unwrap_or(GEMV_ROWS)
        }
        Decode::Codebook8(_) | Decode::Int8 | Decode::Dense(_) => 0,
    }
}

impl Cuda {
    /// `y = x @ q.T + bias` for the rows that `x` has; `shape` is that of the weight.
    pub fn linear<T: Element>(
        &self,
        q: &DeviceTensor,
        shape: [usize; 2],
        x: DeviceSlice<T>,
        bias: Option<Bias>,
        y: DeviceSlice<T>,
    ) -> Result<()> {
        let Decode::Codebook4(book) = q.layout().format.spec().decode else {
            return Err(dense(q.layout().format));
        };
        let [n, k] = shape;
        check_len("weight", q.layout().elements, n.saturating_mul(k))?;
        let (bias, bias_dtype) = Bias::params(bias, n)?;
        if y.is_empty() {
            return Ok(());
        }
        multiple("number of results", y.len(), n)?;
        let m = y.len() / n;
        check_len("x", m.saturating_mul(k), x.len())?;
        let params = params::Linear4 {
            x: x.address("x")?,
            packed: q.packed().wide("packed")?,
            bias,
            y: y.address("y")?,
            m: m as u64,
            n: n as u64,
            k: k as u64,
            scales: q.scales_of_blocks()?,
            values: book.values,
            bias_dtype,
            padding: 0,
        };
        let small = small(params.m, params.k, T::DTYPE, self.capability());
        if let Some(family) = small.filter(|_| x.wide("x").is_ok()) {
            return self.launch(family, Some(T::DTYPE), Grid::line(params.n, SMALL_EACH), params);
        }
        let grid = Grid::plane((params.n, GEMV_EACH), (params.m, GEMV_ROWS_EACH));
        self.launch(&LINEAR4_GEMV, Some(T::DTYPE), grid, params)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensor_cores_take_whole_tiles_of_what_they_multiply() {
        let most = |k, dtype, capability| most_rows(Format::Nf4, k, dtype, capability);
        assert_eq!(most(4096, Dtype::BF16, 90), 32);
        assert_eq!(most(4096, Dtype::BF16, 75), GEMV_ROWS);
        assert_eq!(most(4096, Dtype::F16, 75), 32);
        assert_eq!(most(4096, Dtype::F32, 90), GEMV_ROWS);
        assert_eq!(most(4100, Dtype::F16, 90), GEMV_ROWS);
        assert_eq!(most_rows(Format::Int8, 64, Dtype::F16, 90), 0);
    }
}
