//! What products with activations of signed bytes take weights for.

use pyo3::prelude::*;

use crate::format::Format;
use crate::quant::integer::Integers;

/// The integers that stand for the sixteen codes of a format, and what they are multiplied by.
#[pyfunction]
pub fn integers(format: &str) -> PyResult<(Vec<i8>, f32)> {
    let integers = Integers::of(Format::parse_quantized(format)?)?;
    Ok((integers.values.to_vec(), integers.step))
}
