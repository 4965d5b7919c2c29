//! Quantizing and decoding whole tensors and ranges of them.

use super::device::Cuda;
use super::launch::{
    DEQUANTIZE4, DEQUANTIZE8, Grid, INT8_DEQUANTIZE, INT8_ROWS, MEAN, QUANTIZE4, QUANTIZE8,
};
use super::memory::DeviceSlice;
use super::params;
use super::tensor::{DeviceScales, DeviceTensor, Report, Tables, log2};
use crate::dtype::{Dtype, Element};
use crate::error::{Error, Result};
use crate::format::codebook::Codebook;
use crate::format::{Decode, Format, Scale};
use crate::pack::check_len;
use crate::quant::nested::NESTED_BLOCKSIZE;

/// Elements of a block of threads, by `cuda/kernels.md`.
const DEQUANTIZE4_EACH: u64 = 8192;
const DEQUANTIZE8_EACH: u64 = 1024;
const INT8_DEQUANTIZE_EACH: u64 = 1024;

/// Elements that a block of threads quantizes: blocks for eight warps, or as much as those take.
fn quantize_each(blocksize: usize) -> u64 {
    8 * 256.max(blocksize as u64)
}

impl Cuda {
    /// Decodes the elements from flat position `first` on, as many as `out` holds.
    ///
    /// `first` is a multiple of 32 for codes of four bits, of the block size for a codebook of
    /// 256, and of the row for int8, where `out` holds whole rows.
    pub fn dequantize<T: Element>(
        &self,
        q: &DeviceTensor,
        first: usize,
        out: DeviceSlice<T>,
    ) -> Result<()> {
        let layout = q.layout();
        let end = first.checked_add(out.len()).filter(|end| *end <= layout.elements);
        if end.is_none() {
            let expected = layout.elements.saturating_sub(first);
            return Err(Error::Length { what: "out", expected, got: out.len() });
        }
        if out.is_empty() {
            return Ok(());
        }
        match layout.format.spec().decode {
            Decode::Codebook4(book) => self.dequantize4(q, book, first, out),
            Decode::Codebook8(_) => self.dequantize8(q, first, out),
            Decode::Int8 => self.dequantize_rows(q, first, out),
            Decode::Dense(_) => Err(dense(layout.format)),
        }
    }

    fn dequantize4<T: Element>(
        &self,
        q: &DeviceTensor,
        book: &Codebook<16>,
        first: usize,
        out: DeviceSlice<T>,
    ) -> Result<()> {
        multiple("first element", first, 32)?;
        let params = params::Dequantize4 {
            packed: q.packed().wide("packed")?,
            out: out.wide("out")?,
            first: first as u64,
            n: out.len() as u64,
            scales: q.scales_of_blocks()?,
            values: book.values,
        };
        let grid = Grid::line(params.n, DEQUANTIZE4_EACH);
        self.launch(&DEQUANTIZE4, Some(T::DTYPE), grid, params)
    }

    fn dequantize8<T: Element>(
        &self,
        q: &DeviceTensor,
        first: usize,
        out: DeviceSlice<T>,
    ) -> Result<()> {
        let blocksize = q.layout().blocksize;
        multiple("first element", first, blocksize)?;
        let absmax = q.plain_scales()?.skip(first / blocksize.max(1));
        let params = params::Dequantize8 {
            codes: q.packed().skip(first).wide("packed")?,
            values: q.tables()?.values.address("values of the codebook")?,
            absmax: absmax.address("absmax")?,
            offset: 0,
            out: out.wide("out")?,
            n: out.len() as u64,
            log2_blocksize: q.log2_blocksize()?,
            padding: 0,
        };
        let grid = Grid::line(params.n, DEQUANTIZE8_EACH);
        self.launch(&DEQUANTIZE8, Some(T::DTYPE), grid, params)
    }

    fn dequantize_rows<T: Element>(
        &self,
        q: &DeviceTensor,
        first: usize,
        out: DeviceSlice<T>,
    ) -> Result<()> {
        // Not 0: there are elements.
        let columns = q.layout().blocksize.max(1);
        multiple("first element", first, columns)?;
        multiple("number of elements", out.len(), columns)?;
        let params = params::Int8Dequantize {
            codes: q.packed().skip(first).address("packed")?,
            absmax: q.plain_scales()?.skip(first / columns).address("absmax")?,
            out: out.address("out")?,
            rows: (out.len() / columns) as u64,
            columns: columns as u64,
        };
        let grid = Grid::line(out.len() as u64, INT8_DEQUANTIZE_EACH);
        self.launch(&INT8_DEQUANTIZE, Some(T::DTYPE), grid, params)
    }

    /// Quantizes `x` into the buffers of `q`, as [`crate::quant::Reference::Exact`] does.
    /// Nested scales go through `scratch`, one f32 a block.
    pub fn quantize<T: Element>(
        &self,
        x: DeviceSlice<T>,
        q: &DeviceTensor,
        scratch: Option<DeviceSlice<f32>>,
        report: Report,
    ) -> Result<()> {
        let layout = *q.layout();
        check_len("x", layout.elements, x.len())?;
        match (layout.format.spec().decode, q.scales()) {
            (Decode::Codebook4(book), DeviceScales::Nested { codes, absmax, offset }) => {
                let scales = scratch.ok_or(Error::Length {
                    what: "scratch",
                    expected: layout.scales,
                    got: 0,
                })?;
                check_len("scratch", layout.scales, scales.len())?;
                self.quantize4(x, q, book, DeviceScales::Plain(scales), report)?;
                self.nest(scales, q.tables()?, codes, absmax, offset)
            }
            (Decode::Codebook4(book), scales) => self.quantize4(x, q, book, scales, report),
            (Decode::Codebook8(book), _) => {
                let (codes, absmax, tables) = (q.packed(), q.plain_scales()?, q.tables()?);
                let how = Blocks8 { subtract: None, sorted: book.is_sorted(), report };
                self.quantize8(x, tables, codes, absmax, layout.blocksize, how)
            }
            (Decode::Int8, _) => {
                let columns = layout.blocksize as u64;
                let rows = (layout.elements as u64).checked_div(columns).unwrap_or(0);
                self.quantize_rows(x, None, q.packed(), q.plain_scales()?, rows, report)
            }
            (Decode::Dense(_), _) => Err(dense(layout.format)),
        }
    }

    fn quantize4<T: Element>(
        &self,
        x: DeviceSlice<T>,
        q: &DeviceTensor,
        book: &Codebook<16>,
        scales: DeviceScales,
        report: Report,
    ) -> Result<()> {
        if x.is_empty() {
            return Ok(());
        }
        let (scales, scale) = match (scales, q.layout().format.spec().scale) {
            (DeviceScales::E8M0(scales), Scale::E8M0) => {
                (scales.address("absmax")?, params::SCALE_E8M0)
            }
            (DeviceScales::Plain(scales), _) => (scales.address("absmax")?, params::SCALE_ABSMAX),
            _ => return Err(dense(q.layout().format)),
        };
        let params = params::Quantize4 {
            x: x.wide("x")?,
            packed: q.packed().wide("packed")?,
            scales,
            n: x.len() as u64,
            nonfinite: report.params()?,
            log2_blocksize: q.log2_blocksize()?,
            scale,
            encoder: encoder(q.layout().format, book)?,
        };
        let each = quantize_each(q.layout().blocksize);
        self.launch(&QUANTIZE4, Some(T::DTYPE), Grid::line(params.n, each), params)
    }

    /// Scales to bytes: their mean is the offset, what is left is quantized in blocks of 256.
    fn nest(
        &self,
        scales: DeviceSlice<f32>,
        tables: Tables,
        codes: DeviceSlice<u8>,
        absmax: DeviceSlice<f32>,
        offset: DeviceSlice<f32>,
    ) -> Result<()> {
        if scales.is_empty() {
            return Ok(()); // the caller's offset stays
        }
        let mean = params::Mean {
            x: scales.address("scratch")?,
            out: offset.address("nested_offset")?,
            n: scales.len() as u64,
        };
        self.launch(&MEAN, Some(Dtype::F32), Grid::line(1, 1), mean)?;
        let how = Blocks8 {
            subtract: Some(offset),
            sorted: crate::format::codebook::DYNAMIC.is_sorted(),
            report: Report { first: None, zero: false },
        };
        self.quantize8(scales, tables, codes, absmax, NESTED_BLOCKSIZE, how)
    }

    fn quantize8<T: Element>(
        &self,
        x: DeviceSlice<T>,
        tables: Tables,
        codes: DeviceSlice<u8>,
        absmax: DeviceSlice<f32>,
        blocksize: usize,
        how: Blocks8,
    ) -> Result<()> {
        if x.is_empty() {
            return Ok(());
        }
        let subtract = how.subtract.map_or(Ok(0), |offset| offset.address("nested_offset"))?;
        let order = if how.sorted { 0 } else { tables.order.address("order of the codebook")? };
        let params = params::Quantize8 {
            x: x.wide("x")?,
            subtract,
            pivots: tables.pivots.address("pivots of the codebook")?,
            order,
            codes: codes.wide("codes")?,
            absmax: absmax.address("absmax")?,
            n: x.len() as u64,
            nonfinite: how.report.params()?,
            log2_blocksize: log2(blocksize)?,
            padding: 0,
        };
        let grid = Grid::line(params.n, quantize_each(blocksize));
        self.launch(&QUANTIZE8, Some(T::DTYPE), grid, params)
    }

    /// Quantizes rows to signed bytes with one scale each; columns that are flagged count as 0.
    pub fn quantize_rows<T: Element>(
        &self,
        x: DeviceSlice<T>,
        flags: Option<DeviceSlice<u8>>,
        codes: DeviceSlice<u8>,
        absmax: DeviceSlice<f32>,
        rows: u64,
        report: Report,
    ) -> Result<()> {
        check_len("codes", x.len(), codes.len())?;
        if x.is_empty() || rows == 0 {
            return Ok(());
        }
        check_len("absmax", rows as usize, absmax.len())?;
        multiple("number of elements", x.len(), rows as usize)?;
        let columns = x.len() as u64 / rows;
        if let Some(flags) = flags {
            check_len("flags", columns as usize, flags.len())?;
        }
        let params = params::Int8Rows {
            x: x.address("x")?,
            flags: flags.map_or(Ok(0), |flags| flags.address("flags"))?,
            codes: codes.address("codes")?,
            absmax: absmax.address("absmax")?,
            rows,
            columns,
            nonfinite: report.params()?,
        };
        self.launch(&INT8_ROWS, Some(T::DTYPE), Grid::line(rows, 1), params)
    }
}

/// How blocks are quantized with a codebook of 256.
#[derive(Clone, Copy)]
struct Blocks8 {
    subtract: Option<DeviceSlice<f32>>,
    sorted: bool,
    report: Report,
}

fn encoder(format: Format, book: &Codebook<16>) -> Result<params::Encoder4> {
    let cells = book.cells.ok_or(Error::Unsupported {
        format: format.spec().name,
        what: "cells for its codebook",
        remedy: "quantize on the CPU",
    })?;
    Ok(params::Encoder4 {
        step: cells.step,
        pivots: cells.pivots,
        below: cells.below,
        extra: cells.extra,
        order: book.order,
    })
}

pub(super) fn multiple(what: &'static str, got: usize, of: usize) -> Result<()> {
    if of != 0 && got.is_multiple_of(of) {
        return Ok(());
    }
    let expected = format!("it must be a multiple of {of}");
    Err(Error::Argument { what, got: got.to_string(), expected })
}

pub(super) fn dense(format: Format) -> Error {
    Error::Unsupported {
        format: format.spec().name,
        what: "kernels",
        remedy: "name a format that is quantized",
    }
}
