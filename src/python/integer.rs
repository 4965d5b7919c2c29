//! Products with activations of signed bytes.

use pyo3::prelude::*;

use super::memory::Memory;
use super::ops::{Weight, float};
use super::products::widened;
use crate::backend::cpu::Cpu;
use crate::backend::cpu::integer::{Integer, Product};
use crate::format::Format;
use crate::quant::integer::Integers;
use crate::with_element;

/// The integers that stand for the sixteen codes of a format, and what they are multiplied by.
#[pyfunction]
pub fn integers(format: &str) -> PyResult<(Vec<i8>, f32)> {
    let integers = Integers::of(Format::parse_quantized(format)?)?;
    Ok((integers.values.to_vec(), integers.step))
}

/// `out = x @ weight.T + bias` with activations rounded to integers.
#[pyfunction]
#[pyo3(signature = (x, weight, bias, out, threads=None))]
pub fn integer_linear(
    py: Python<'_>,
    x: Memory,
    weight: Weight,
    bias: Option<Memory>,
    out: Memory,
    threads: Option<usize>,
) -> PyResult<()> {
    let (q, bias) = (weight.checked()?, bias.map(widened).transpose()?);
    let product = Product { columns: weight.columns(), bias: bias.as_deref() };
    let integer = Integer::new(Cpu::new(threads)?);
    with_element!(float(x)?, T => {
        let (x, out) = (x.slice::<T>()?, out.slice_mut::<T>()?);
        py.detach(|| integer.linear(x, &q, product, out))
    })?;
    Ok(())
}

/// LLM.int8(): `out = x @ weight.T + bias`, columns of outliers apart.
#[pyfunction]
#[pyo3(signature = (x, weight, bias, threshold, out, threads=None))]
pub fn int8_linear(
    py: Python<'_>,
    x: Memory,
    weight: Weight,
    bias: Option<Memory>,
    threshold: f32,
    out: Memory,
    threads: Option<usize>,
) -> PyResult<()> {
    let (q, bias) = (weight.checked()?, bias.map(widened).transpose()?);
    let product = Product { columns: weight.columns(), bias: bias.as_deref() };
    let integer = Integer::new(Cpu::new(threads)?);
    with_element!(float(x)?, T => {
        let (x, out) = (x.slice::<T>()?, out.slice_mut::<T>()?);
        py.detach(|| integer.llm_int8(x, &q, threshold, product, out))
    })?;
    Ok(())
}
