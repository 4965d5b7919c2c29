//! CUDA: tensors come as addresses, with the number of their device and the caller's stream.
//!
//! A launch takes a few microseconds and waits for nothing, so the interpreter is only released
//! where kernels are loaded or compiled.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::memory::Memory;
use super::ops::{Weight, figures_of, float};
use crate::backend::cuda::compare::{self, WORDS};
use crate::backend::cuda::device::{Cuda, facts, warmup};
use crate::backend::cuda::driver::{available, driver, present};
use crate::backend::cuda::integer::Activations;
use crate::backend::cuda::product::{Bias, most_rows};
use crate::backend::cuda::rows::{Integers, Outliers, Weight8};
use crate::backend::cuda::tensor::{DeviceTensor, Report, Tables};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::format::{Decode, Format};
use crate::with_element;

/// Where a kernel runs: the number of the device, and the handle of a stream of it.
#[derive(FromPyObject)]
pub struct Place(i32, u64);

impl Place {
    fn cuda(&self) -> Result<Cuda> {
        Cuda::new(self.0, self.1)
    }
}

/// A codebook of 256 on the device: values, pivots, order.
#[derive(FromPyObject)]
pub struct DeviceTables(Memory, Memory, Memory);

impl DeviceTables {
    fn checked(self) -> Result<Tables> {
        let DeviceTables(values, pivots, order) = self;
        Ok(Tables {
            values: values.on_device()?,
            pivots: pivots.on_device()?,
            order: order.on_device()?,
        })
    }
}

/// Nothing if there are a driver and a device.
#[pyfunction]
pub fn cuda_available() -> PyResult<()> {
    Ok(available()?)
}

/// Whether the library of a driver is there, whatever it can do.
#[pyfunction]
pub fn cuda_driver_present() -> bool {
    present()
}

/// (newest CUDA version of the driver, a dict for each device). Uses no device.
#[pyfunction]
#[pyo3(signature = (nvrtc=None))]
pub fn cuda_devices(
    py: Python<'_>,
    nvrtc: Option<PathBuf>,
) -> PyResult<(i32, Vec<Bound<'_, PyDict>>)> {
    let (found, version) = (py.detach(|| facts(nvrtc))?, driver()?.version());
    let rows = found.into_iter().map(|facts| {
        let row = PyDict::new(py);
        row.set_item("name", facts.name)?;
        row.set_item("capability", (facts.capability / 10, facts.capability % 10))?;
        row.set_item("kernels", facts.kernels)?;
        Ok(row)
    });
    Ok((version, rows.collect::<PyResult<_>>()?))
}

/// Loads the kernels of a device and says which. `nvrtc` is the library that compiles them where
/// none fit.
#[pyfunction]
#[pyo3(signature = (place, nvrtc=None))]
pub fn cuda_warmup(py: Python<'_>, place: Place, nvrtc: Option<PathBuf>) -> PyResult<String> {
    Ok(py.detach(|| warmup(place.0, place.1, nvrtc))?)
}

/// Values, pivots and order of a format's codebook of 256.
#[pyfunction]
pub fn codebook_tables(format: &str) -> PyResult<(Vec<f32>, Vec<f32>, Vec<u8>)> {
    let format = Format::parse_quantized(format)?;
    match format.spec().decode {
        Decode::Codebook8(book) => {
            Ok((book.values.to_vec(), book.pivots.to_vec(), book.order.to_vec()))
        }
        _ => Err(Error::Unsupported {
            format: format.spec().name,
            what: "codebook of 256",
            remedy: "name a format that has one",
        }
        .into()),
    }
}

/// The most rows of activations that one kernel multiplies with a weight whose rows have
/// `columns` elements; 0 where there is no kernel.
#[pyfunction]
pub fn cuda_most_rows(format: &str, columns: usize, dtype: &str, place: Place) -> PyResult<u64> {
    let (format, dtype) = (Format::parse_quantized(format)?, Dtype::parse(dtype)?);
    Ok(most_rows(format, columns, dtype, place.cuda()?.capability()))
}

/// A quantized tensor on a CUDA device. It holds addresses: the caller asks
/// [`CudaWeight::is_at`] whether the tensors are still there.
#[pyclass(frozen, module = "nybble._core")]
pub struct CudaWeight {
    tensor: DeviceTensor,
    weight: Weight,
}

#[pymethods]
impl CudaWeight {
    #[new]
    #[pyo3(signature = (weight, tables=None))]
    fn new(weight: Weight, tables: Option<DeviceTables>) -> PyResult<Self> {
        let tables = tables.map(DeviceTables::checked).transpose()?;
        Ok(Self { tensor: weight.on_device(tables)?, weight })
    }

    /// Whether the tensors are at these addresses: codes, scales, and those of nested scales.
    #[pyo3(signature = (packed, absmax, nested=None))]
    fn is_at(&self, packed: usize, absmax: usize, nested: Option<(usize, usize)>) -> bool {
        self.weight.addresses() == (packed, absmax, nested)
    }

    /// Decodes the elements from flat position `first` on, as many as `out` holds.
    fn dequantize(&self, out: Memory, first: usize, place: Place) -> PyResult<()> {
        let cuda = place.cuda()?;
        with_element!(float(out)?, T => {
            cuda.dequantize(&self.tensor, first, out.on_device::<T>()?)
        })?;
        Ok(())
    }

    /// `out = x @ weight.T + bias` for few rows of activations.
    fn linear(&self, x: Memory, bias: Option<Memory>, out: Memory, place: Place) -> PyResult<()> {
        let cuda = place.cuda()?;
        let [rows, columns] = self.weight.matrix()?;
        let bias = bias.map(bias_of).transpose()?;
        with_element!(float(x)?, T => {
            let (x, out) = (x.on_device::<T>()?, out.on_device::<T>()?);
            cuda.linear(&self.tensor, [rows, columns], x, bias, out)
        })?;
        Ok(())
    }

    /// `out = x @ weight.T + bias` with both factors as integers. `codes` (int8, as many as `x`
    /// has) and `factors` (one a group) hold those of the activations meanwhile.
    fn integer_linear(
        &self,
        x: Memory,
        scratch: (Memory, Memory),
        bias: Option<Memory>,
        out: Memory,
        place: Place,
    ) -> PyResult<()> {
        let cuda = place.cuda()?;
        let [rows, columns] = self.weight.matrix()?;
        let (codes, factors) = (scratch.0.codes_on_device()?, scratch.1.on_device()?);
        let bias = bias.map(bias_of).transpose()?;
        with_element!(float(x)?, T => {
            let (x, out) = (x.on_device::<T>()?, out.on_device::<T>()?);
            let scratch = Activations { codes, factors };
            cuda.integer_linear(&self.tensor, [rows, columns], x, scratch, bias, out)
        })?;
        Ok(())
    }

    /// Elements that are compared at a time, and numbers (int64) that say what was found.
    fn run(&self) -> (usize, usize) {
        (compare::run(self.tensor.layout()), WORDS)
    }

    /// Compares `x` from flat position `first` on with `decoded`, into `out`.
    fn compare(
        &self,
        x: Memory,
        decoded: Memory,
        first: usize,
        out: Memory,
        place: Place,
    ) -> PyResult<()> {
        let (cuda, decoded, out) = (place.cuda()?, decoded.on_device()?, out.on_device()?);
        with_element!(float(x)?, T => {
            cuda.compare(&self.tensor, first, x.on_device::<T>()?, decoded, out)
        })?;
        Ok(())
    }
}

/// A dict of figures about `elements` elements, from what [`CudaWeight::compare`] wrote of all
/// their runs, in host memory now.
#[pyfunction]
pub fn cuda_error_stats(
    py: Python<'_>,
    runs: Memory,
    elements: usize,
) -> PyResult<Bound<'_, PyDict>> {
    figures_of(py, &compare::total(runs.slice()?, elements)?.summary())
}

fn bias_of(memory: Memory) -> Result<Bias> {
    Ok(match float(memory)? {
        Dtype::F32 => Bias::F32(memory.on_device()?),
        Dtype::F16 => Bias::F16(memory.on_device()?),
        Dtype::BF16 => Bias::BF16(memory.on_device()?),
    })
}

/// Quantizes `x` into the tensors of `weight`. `scratch` has a float32 for each block where scales
/// are nested; `first` is lowered to the position of the first value that is not finite.
#[pyfunction]
#[pyo3(signature = (x, weight, tables, scratch, first, zero, place))]
pub fn cuda_quantize(
    x: Memory,
    weight: Weight,
    tables: Option<DeviceTables>,
    scratch: Option<Memory>,
    first: Option<Memory>,
    zero: bool,
    place: Place,
) -> PyResult<()> {
    let cuda = place.cuda()?;
    let tensor = weight.on_device(tables.map(DeviceTables::checked).transpose()?)?;
    let scratch = scratch.map(Memory::on_device).transpose()?;
    let report = Report { first: first.map(Memory::on_device).transpose()?, zero };
    with_element!(float(x)?, T => cuda.quantize(x.on_device::<T>()?, &tensor, scratch, report))?;
    Ok(())
}

/// Raises the error for a value that is not finite, which only the caller has read.
#[pyfunction]
pub fn refuse_nonfinite(index: usize, value: f32) -> PyResult<()> {
    Err(Error::NonFinite { index, value }.into())
}

/// Quantizes the rows of `x` to signed bytes, one scale each; columns with a flag count as 0.
#[pyfunction]
#[pyo3(signature = (x, flags, codes, absmax, rows, place))]
pub fn cuda_int8_rows(
    x: Memory,
    flags: Option<Memory>,
    codes: Memory,
    absmax: Memory,
    rows: u64,
    place: Place,
) -> PyResult<()> {
    let cuda = place.cuda()?;
    let (codes, absmax) = (codes.codes_on_device()?, absmax.on_device()?);
    let flags = flags.map(Memory::on_device).transpose()?;
    let report = Report { first: None, zero: false };
    with_element!(float(x)?, T => {
        cuda.quantize_rows(x.on_device::<T>()?, flags, codes, absmax, rows, report)
    })?;
    Ok(())
}

/// Columns that are multiplied apart: the activations, room for the columns, and their number.
#[derive(FromPyObject)]
pub struct OutlierColumns(Memory, Memory, Memory);

impl OutlierColumns {
    fn checked<T: super::memory::Stored>(&self) -> Result<Outliers<T>> {
        let OutlierColumns(x, columns, count) = self;
        Ok(Outliers { x: x.on_device()?, columns: columns.on_device()?, count: count.on_device()? })
    }
}

/// Lists the columns in which a magnitude reaches `threshold`; `flags` must be 0 before.
#[pyfunction]
pub fn cuda_int8_outliers(
    outliers: OutlierColumns,
    flags: Memory,
    threshold: f32,
    place: Place,
) -> PyResult<()> {
    let (cuda, flags) = (place.cuda()?, flags.on_device()?);
    with_element!(float(outliers.0)?, T => {
        cuda.find_outliers(threshold, flags, &outliers.checked::<T>()?)
    })?;
    Ok(())
}

/// `out = x @ weight.T + bias` from the codes of `x` [rows, columns] (int8), or from the sums of
/// their products with the weight (int32), scaled by `x_absmax`.
#[pyfunction]
#[pyo3(signature = (integers, x_absmax, weight, outliers, bias, out, place))]
pub fn cuda_int8_linear(
    integers: Memory,
    x_absmax: Memory,
    weight: Weight,
    outliers: Option<OutlierColumns>,
    bias: Option<Memory>,
    out: Memory,
    place: Place,
) -> PyResult<()> {
    let cuda = place.cuda()?;
    let tensor = weight.on_device(None)?;
    let weight =
        Weight8 { codes: tensor.packed(), absmax: tensor.plain_scales()?, shape: weight.matrix()? };
    let integers = match integers.dtype() {
        "int32" => Integers::Sums(integers.on_device()?),
        _ => Integers::Codes(integers.codes_on_device()?),
    };
    let (x_absmax, bias) = (x_absmax.on_device()?, bias.map(bias_of).transpose()?);
    with_element!(float(out)?, T => {
        let outliers = outliers.map(|outliers| outliers.checked::<T>()).transpose()?;
        cuda.int8_linear(integers, x_absmax, &weight, outliers.as_ref(), bias, out.on_device::<T>()?)
    })?;
    Ok(())
}
