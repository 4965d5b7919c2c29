//! The text beside a quantized weight, for state dicts that Python puts together itself.

use pyo3::prelude::*;

use super::error::CheckpointError;
use crate::checkpoint::bitsandbytes::owner;
use crate::checkpoint::quant_state::{Nested, QuantState};
use crate::dtype::Dtype;
use crate::format::Format;

/// The last part of the key under which a format's text is stored, `bitsandbytes__nf4`; None for
/// a format that keeps no text.
#[pyfunction]
pub fn quant_state_key(format: &str) -> PyResult<Option<String>> {
    let format = Format::parse(format)?;
    Ok(owner(format).map(|owner| format!("{owner}__{format}")))
}

/// The text of a quantized weight.
#[pyfunction]
#[pyo3(signature = (format, blocksize, dtype, shape, nested_offset=None))]
pub fn render_quant_state(
    format: &str,
    blocksize: usize,
    dtype: &str,
    shape: Vec<usize>,
    nested_offset: Option<f32>,
) -> PyResult<String> {
    let state = QuantState {
        format: Format::parse(format)?,
        blocksize,
        dtype: Dtype::parse(dtype)?,
        shape,
        nested: nested_offset.map(|offset| Nested { dtype: Dtype::F32, offset }),
    };
    Ok(state.render())
}

/// (format, blocksize, dtype, shape, nested offset or None) from the text of a weight.
#[pyfunction]
#[pyo3(signature = (text, repair=false))]
pub fn parse_quant_state(
    text: &[u8],
    repair: bool,
) -> PyResult<(&'static str, usize, &'static str, Vec<usize>, Option<f32>)> {
    let state = QuantState::parse(text).map_err(CheckpointError::new_err)?;
    if let Some(nested) = state.nested
        && nested.dtype != Dtype::F32
        && !repair
    {
        return Err(CheckpointError::new_err(format!(
            "nested_dtype is {}, not float32: bitsandbytes damaged the scales by saving on a CPU \
             after a forward pass; read the file with open_checkpoint(path, repair=True)",
            nested.dtype
        )));
    }
    let offset = state.nested.map(|nested| nested.offset);
    Ok((state.format.name(), state.blocksize, state.dtype.name(), state.shape, offset))
}
