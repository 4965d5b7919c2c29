//! Products with quantized weights.

use pyo3::prelude::*;

use super::memory::Memory;
use super::ops::{Placed, Weight, float};
use crate::backend::cpu::Cpu;
use crate::backend::cpu::integer::{Integer, Product};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::with_element;

/// A description of a weight of rank 2, to be multiplied with again and again. It holds addresses:
/// the caller asks [`Prepared::is_at`] whether the tensors are still there.
#[pyclass(frozen, module = "nybble._core")]
pub struct Prepared(Placed, [usize; 2]);

#[pymethods]
impl Prepared {
    #[new]
    fn new(weight: Weight) -> PyResult<Self> {
        let placed = weight.placed()?;
        placed.checked()?;
        Ok(Self(placed, weight.matrix()?))
    }

    /// (rows, columns)
    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.1[0], self.1[1])
    }

    /// Whether the tensors are at these addresses: codes, scales, and those of nested scales.
    #[pyo3(signature = (packed, absmax, nested=None))]
    fn is_at(&self, packed: usize, absmax: usize, nested: Option<(usize, usize)>) -> bool {
        self.0.is_at(packed, absmax, nested)
    }

    /// `out = x @ weight.T + bias`; `x` and `out` of one dtype hold whole rows.
    #[pyo3(signature = (x, bias, out, threads=None))]
    fn linear(
        &self,
        py: Python<'_>,
        x: Memory,
        bias: Option<Memory>,
        out: Memory,
        threads: Option<usize>,
    ) -> PyResult<()> {
        let (q, cpu) = (self.0.checked()?, Cpu::new(threads)?);
        let bias = bias.map(widened).transpose()?;
        with_element!(float(x)?, T => {
            let (x, out) = (x.slice::<T>()?, out.slice_mut::<T>()?);
            py.detach(|| cpu.linear(&q, self.1, x, bias.as_deref(), out))
        })?;
        Ok(())
    }

    /// `out = x @ weight.T + bias` with activations rounded to integers.
    #[pyo3(signature = (x, bias, out, threads=None))]
    fn integer_linear(
        &self,
        py: Python<'_>,
        x: Memory,
        bias: Option<Memory>,
        out: Memory,
        threads: Option<usize>,
    ) -> PyResult<()> {
        let (q, integer) = (self.0.checked()?, Integer::new(Cpu::new(threads)?));
        let bias = bias.map(widened).transpose()?;
        let product = Product { columns: self.1[1], bias: bias.as_deref() };
        with_element!(float(x)?, T => {
            let (x, out) = (x.slice::<T>()?, out.slice_mut::<T>()?);
            py.detach(|| integer.linear(x, &q, product, out))
        })?;
        Ok(())
    }

    /// LLM.int8(): `out = x @ weight.T + bias`, columns of outliers apart.
    #[pyo3(signature = (x, bias, out, threads, threshold))]
    fn int8_linear(
        &self,
        py: Python<'_>,
        x: Memory,
        bias: Option<Memory>,
        out: Memory,
        threads: Option<usize>,
        threshold: f32,
    ) -> PyResult<()> {
        let (q, integer) = (self.0.checked()?, Integer::new(Cpu::new(threads)?));
        let bias = bias.map(widened).transpose()?;
        let product = Product { columns: self.1[1], bias: bias.as_deref() };
        with_element!(float(x)?, T => {
            let (x, out) = (x.slice::<T>()?, out.slice_mut::<T>()?);
            py.detach(|| integer.llm_int8(x, &q, threshold, product, out))
        })?;
        Ok(())
    }

    /// `out = grad @ weight`; `grad` and `out` of one dtype hold whole rows.
    #[pyo3(signature = (grad, out, threads=None))]
    fn linear_backward(
        &self,
        py: Python<'_>,
        grad: Memory,
        out: Memory,
        threads: Option<usize>,
    ) -> PyResult<()> {
        let (q, cpu) = (self.0.checked()?, Cpu::new(threads)?);
        with_element!(float(grad)?, T => {
            let (grad, out) = (grad.slice::<T>()?, out.slice_mut::<T>()?);
            py.detach(|| cpu.linear_backward(&q, self.1, grad, out))
        })?;
        Ok(())
    }
}

fn widened(memory: Memory) -> Result<Vec<f32>> {
    with_element!(float(memory)?, T => {
        Ok(memory.slice::<T>()?.iter().map(|x| x.to_f32()).collect())
    })
}

impl Weight {
    /// Rows and columns.
    pub(super) fn matrix(&self) -> Result<[usize; 2]> {
        <[usize; 2]>::try_from(self.shape()).map_err(|_| Error::Argument {
            what: "shape of the weight of a product",
            got: format!("{:?}", self.shape()),
            expected: "two dimensions".to_owned(),
        })
    }
}
