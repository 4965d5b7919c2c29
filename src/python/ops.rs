//! The primitives: unpack arguments, release the interpreter, call the core.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::memory::Memory;
use crate::backend::cpu::{Cpu, Isa, Quantizer, features, fresh, threads};
use crate::backend::cuda::tensor::{DeviceScales, DeviceTensor, Tables};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::format::{Decode, Format, Scale};
use crate::pack::{self, NibbleOrder};
use crate::quant::stats::Summary;
use crate::quant::{NonFinite, Reference};
use crate::tensor::{Layout, QTensor, Scales, ScalesMut};
use crate::with_element;

/// The table of formats, one dict a row.
#[pyfunction]
pub fn formats(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    Format::ALL
        .iter()
        .map(|format| {
            let spec = format.spec();
            let row = PyDict::new(py);
            row.set_item("name", spec.name)?;
            row.set_item("bits", spec.bits)?;
            let (decode, codebook) = match spec.decode {
                Decode::Codebook4(book) => ("codebook", Some(book.values.to_vec())),
                Decode::Codebook8(book) => ("codebook", Some(book.values.to_vec())),
                Decode::Int8 => ("integer", None),
                Decode::Dense(_) => ("dense", None),
            };
            row.set_item("decode", decode)?;
            row.set_item("codebook", codebook)?;
            let scale = match spec.scale {
                Scale::Absmax => "float32 absmax per block",
                Scale::E8M0 => "power of two (E8M0) per block",
                Scale::RowAbsmax => "float32 absmax per row",
                Scale::None => "none",
            };
            row.set_item("scale", scale)?;
            let scale_dtype = match spec.scale {
                Scale::Absmax | Scale::RowAbsmax => Some("float32"),
                Scale::E8M0 => Some("uint8"),
                Scale::None => None,
            };
            row.set_item("scale_dtype", scale_dtype)?;
            row.set_item("blocksizes", spec.blocksizes)?;
            row.set_item("default_blocksize", spec.default_blocksize)?;
            row.set_item("nestable", spec.nestable)?;
            row.set_item("source", spec.source)?;
            Ok(row)
        })
        .collect()
}

/// (blocksize, bytes of codes, number of scales, number of nested scales) of a tensor.
#[pyfunction]
#[pyo3(signature = (format, shape, blocksize=None, nested=false))]
pub fn layout(
    format: &str,
    shape: Vec<usize>,
    blocksize: Option<usize>,
    nested: bool,
) -> PyResult<(usize, usize, usize, usize)> {
    let layout = Layout::new(Format::parse_quantized(format)?, &shape, blocksize, nested)?;
    Ok((layout.blocksize, layout.packed, layout.scales, layout.nested_scales()))
}

/// A quantized tensor as the Python side passes it: (format, shape, blocksize, packed, absmax,
/// nested absmax or None, nested offset or None).
#[derive(FromPyObject)]
pub struct Weight(String, Vec<usize>, usize, Memory, Memory, Option<Memory>, Option<Memory>);

impl Weight {
    /// The shape.
    pub fn shape(&self) -> &[usize] {
        &self.1
    }

    /// Where codes, scales, and the scales and offset of nested scales are.
    pub fn addresses(&self) -> (usize, usize, Option<(usize, usize)>) {
        let nested = self.5.as_ref().zip(self.6.as_ref());
        let nested = nested.map(|(absmax, offset)| (absmax.address(), offset.address()));
        (self.3.address(), self.4.address(), nested)
    }

    /// The tensor in the memory of a CUDA device, with all lengths checked.
    pub fn on_device(&self, tables: Option<Tables>) -> Result<DeviceTensor> {
        let Weight(format, shape, blocksize, packed, absmax, nested_absmax, nested_offset) = self;
        let format = Format::parse_quantized(format)?;
        let layout = Layout::new(format, shape, Some(*blocksize), nested_absmax.is_some())?;
        let scales = match (nested_absmax, nested_offset) {
            (Some(nested_absmax), Some(offset)) => DeviceScales::Nested {
                codes: absmax.on_device()?,
                absmax: nested_absmax.on_device()?,
                offset: offset.on_device()?,
            },
            (None, None) if format.spec().scale == Scale::E8M0 => {
                DeviceScales::E8M0(absmax.on_device()?)
            }
            (None, None) => DeviceScales::Plain(absmax.on_device()?),
            _ => return Err(half_nested()),
        };
        DeviceTensor::new(layout, packed.codes_on_device()?, scales, tables)
    }

    /// What it says, understood once.
    pub fn placed(&self) -> Result<Placed> {
        let Weight(format, shape, blocksize, packed, absmax, nested_absmax, nested_offset) = self;
        let format = Format::parse_quantized(format)?;
        let layout = Layout::new(format, shape, Some(*blocksize), nested_absmax.is_some())?;
        let nested = match (nested_absmax, nested_offset) {
            (Some(absmax), Some(offset)) => Some((*absmax, *offset)),
            (None, None) => None,
            _ => return Err(half_nested()),
        };
        Ok(Placed { layout, packed: *packed, absmax: *absmax, nested })
    }

    /// The tensor, with all lengths checked.
    pub fn checked(&self) -> Result<QTensor<'static>> {
        self.placed()?.checked()
    }
}

/// Where a tensor of this layout is in host memory. It holds addresses and nothing that was read
/// there, since tensors may be changed in place.
pub struct Placed {
    layout: Layout,
    packed: Memory,
    absmax: Memory,
    nested: Option<(Memory, Memory)>,
}

impl Placed {
    /// Whether the codes, the scales, and the scales and offset of nested scales are there.
    pub fn is_at(&self, packed: usize, absmax: usize, nested: Option<(usize, usize)>) -> bool {
        let own = self.nested.map(|(absmax, offset)| (absmax.address(), offset.address()));
        self.packed.address() == packed && self.absmax.address() == absmax && own == nested
    }

    /// The tensor, with all lengths checked.
    pub fn checked(&self) -> Result<QTensor<'static>> {
        let spec = self.layout.format.spec();
        let scales = match self.nested {
            Some((absmax, offset)) => Scales::Nested {
                codes: self.absmax.slice()?,
                absmax: absmax.slice()?,
                offset: one(offset.slice()?)?,
            },
            None if spec.scale == Scale::E8M0 => Scales::E8M0(self.absmax.slice()?),
            None => Scales::Plain(self.absmax.slice()?),
        };
        let packed = match spec.decode {
            Decode::Int8 => bytemuck::cast_slice(self.packed.slice::<i8>()?),
            _ => self.packed.slice()?,
        };
        QTensor::new(self.layout, packed, scales)
    }
}

fn half_nested() -> Error {
    Error::Argument {
        what: "nested scales",
        got: "only one of nested_absmax and nested_offset".to_owned(),
        expected: "pass both or neither".to_owned(),
    }
}

fn one(offset: &[f32]) -> Result<f32> {
    match offset {
        [offset] => Ok(*offset),
        _ => Err(Error::Length { what: "nested_offset", expected: 1, got: offset.len() }),
    }
}

/// Quantizes `x` into `packed`, `absmax` and, for nested scales, `nested_absmax` and
/// `nested_offset`.
#[pyfunction]
#[pyo3(signature = (x, weight, reference="exact", nonfinite="error", threads=None))]
pub fn quantize(
    py: Python<'_>,
    x: Memory,
    weight: Weight,
    reference: &str,
    nonfinite: &str,
    threads: Option<usize>,
) -> PyResult<()> {
    let how = Quantizer {
        reference: Reference::parse(reference)?,
        nonfinite: NonFinite::parse(nonfinite)?,
        stats: false,
    };
    let cpu = Cpu::new(threads)?;
    let Weight(format, shape, blocksize, packed, absmax, nested_absmax, nested_offset) = weight;
    let format = Format::parse_quantized(&format)?;
    let layout = Layout::new(format, &shape, Some(blocksize), nested_absmax.is_some())?;
    let packed = match format.spec().decode {
        Decode::Int8 => bytemuck::cast_slice_mut(packed.slice_mut::<i8>()?),
        _ => packed.slice_mut()?,
    };
    let scales = match (nested_absmax, nested_offset) {
        (Some(nested_absmax), Some(offset)) => ScalesMut::Nested {
            codes: absmax.slice_mut()?,
            absmax: nested_absmax.slice_mut()?,
            offset: offset.slice_mut()?.first_mut().ok_or(Error::Length {
                what: "nested_offset",
                expected: 1,
                got: 0,
            })?,
        },
        _ if format.spec().scale == Scale::E8M0 => ScalesMut::E8M0(absmax.slice_mut()?),
        _ => ScalesMut::Plain(absmax.slice_mut()?),
    };
    with_element!(float(x)?, T => {
        let x = x.slice::<T>()?;
        py.detach(|| cpu.quantize_stored(&layout, how, x, packed, scales))
    })?;
    Ok(())
}

/// Decodes the elements from flat position `first` on, as many as `out` holds.
#[pyfunction]
#[pyo3(signature = (weight, out, first=0, threads=None))]
pub fn dequantize(
    py: Python<'_>,
    weight: Weight,
    out: Memory,
    first: usize,
    threads: Option<usize>,
) -> PyResult<()> {
    let (q, cpu) = (weight.checked()?, Cpu::new(threads)?);
    with_element!(float(out)?, T => {
        let out = out.slice_mut::<T>()?;
        py.detach(|| cpu.dequantize_range(&q, first, out))
    })?;
    Ok(())
}

/// Asks for large pages under memory that was just allocated and is to be filled.
#[pyfunction]
pub fn prefer_huge_pages(fresh: Memory) -> PyResult<()> {
    fresh::prefer_huge_pages(fresh.bytes_mut()?);
    Ok(())
}

/// Decodes the rows named by `rows` (int64), one after the other.
#[pyfunction]
#[pyo3(signature = (weight, rows, out, threads=None))]
pub fn dequantize_rows(
    py: Python<'_>,
    weight: Weight,
    rows: Memory,
    out: Memory,
    threads: Option<usize>,
) -> PyResult<()> {
    let columns = weight.1.split_first().map_or(1, |(_, rest)| rest.iter().product());
    let (q, cpu, rows) = (weight.checked()?, Cpu::new(threads)?, rows.slice::<i64>()?);
    with_element!(float(out)?, T => {
        let out = out.slice_mut::<T>()?;
        py.detach(|| cpu.dequantize_rows(&q, columns, rows, out))
    })?;
    Ok(())
}

/// Compares a tensor with its quantized form: a dict of figures.
#[pyfunction]
#[pyo3(signature = (x, weight, threads=None))]
pub fn error_stats(
    py: Python<'_>,
    x: Memory,
    weight: Weight,
    threads: Option<usize>,
) -> PyResult<Bound<'_, PyDict>> {
    let (q, cpu) = (weight.checked()?, Cpu::new(threads)?);
    let figures = with_element!(float(x)?, T => {
        let x = x.slice::<T>()?;
        py.detach(|| cpu.error(x, &q))
    })?
    .summary();
    figures_of(py, &figures)
}

/// Figures about a quantized tensor as Python takes them.
pub fn figures_of<'py>(py: Python<'py>, figures: &Summary) -> PyResult<Bound<'py, PyDict>> {
    let row = PyDict::new(py);
    row.set_item("count", figures.count)?;
    row.set_item("sqnr_db", figures.sqnr_db)?;
    row.set_item("mse", figures.mse)?;
    row.set_item("max_abs", figures.max_abs)?;
    row.set_item("rel_rms", figures.rel_rms)?;
    row.set_item("cosine", figures.cosine)?;
    row.set_item("absmax_min", figures.absmax_min)?;
    row.set_item("absmax_max", figures.absmax_max)?;
    row.set_item("outliers", figures.outliers)?;
    Ok(row)
}

/// Packs one code a byte into nibbles of the given order.
#[pyfunction]
pub fn pack_codes(codes: Memory, order: &str, packed: Memory) -> PyResult<()> {
    Ok(pack::pack(codes.slice()?, NibbleOrder::parse(order)?, packed.slice_mut()?)?)
}

/// Unpacks nibbles of the given order to one code a byte.
#[pyfunction]
pub fn unpack_codes(packed: Memory, order: &str, codes: Memory) -> PyResult<()> {
    Ok(pack::unpack(packed.slice()?, NibbleOrder::parse(order)?, codes.slice_mut()?)?)
}

/// (kernels in use, kernels this machine can run)
#[pyfunction]
pub fn cpu() -> PyResult<(&'static str, Vec<&'static str>)> {
    Ok((Isa::chosen()?.name(), Isa::available().into_iter().map(Isa::name).collect()))
}

/// The extensions of this processor that matter to kernels.
#[pyfunction]
pub fn cpu_features() -> Vec<&'static str> {
    features()
}

/// The number of threads that large tensors are split over.
#[pyfunction]
pub fn default_threads() -> usize {
    threads::default_threads()
}

/// The floating point type of some memory.
pub fn float(memory: Memory) -> Result<Dtype> {
    memory.float().ok_or_else(|| Error::Dtype {
        what: "values",
        got: memory.dtype().to_owned(),
        allowed: "float32, float16, bfloat16",
    })
}
