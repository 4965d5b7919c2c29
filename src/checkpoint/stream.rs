//! Moves tensors from source to destination, a run of whole blocks at a time.
//!
//! A tensor is never held whole. The one thing that grows with it is the vector of scales where
//! they are nested: their mean is needed before the first is coded.

use std::ops::ControlFlow;

use bytemuck::cast_slice_mut;

use crate::backend::cpu::{Cpu, Lanes, Quantizer};
use crate::checkpoint::bitsandbytes::{Companion, nested_quant_map, owner, quant_map};
use crate::checkpoint::budget;
use crate::checkpoint::cast::convert;
use crate::checkpoint::open::{Checkpoint, OwnedScales};
use crate::checkpoint::plan::{Action, Item, float, state};
use crate::checkpoint::shard::Source;
use crate::checkpoint::stored::Stored;
use crate::checkpoint::writer::Writer;
use crate::dtype::{Dtype, Element};
use crate::error::{Error, Result};
use crate::format::{Format, Scale};
use crate::quant::blockwise::e8m0_encode;
use crate::quant::nested::NESTED_BLOCKSIZE;
use crate::quant::stats::{Stats, Summary};
use crate::tensor::{Layout, QTensor, Scales};
use crate::with_element;

/// Is told bytes done, bytes in all and the tensor at hand; may ask to stop.
pub type Progress<'a> = dyn FnMut(u64, u64, &str) -> ControlFlow<()> + 'a;

/// What was found out about a tensor on its way.
#[derive(Debug, Default)]
pub struct Done {
    /// Statistics of its quantization.
    pub stats: Option<Summary>,
    /// Finite values that a cast made infinite.
    pub overflowed: u64,
    /// Bytes saved against what the plan thought of texts.
    pub shorter: u64,
}

/// The way from a source to files that are being written.
pub struct Stream<'a> {
    /// Where tensors come from.
    pub source: &'a Source,
    /// The same with its quantized parameters; only to dequantize.
    pub checkpoint: Option<&'a Checkpoint>,
    /// The processor.
    pub cpu: Cpu,
    /// How to quantize.
    pub how: Quantizer,
    /// Threads, as `cpu` has them.
    pub threads: usize,
    /// Bytes that may be used.
    pub max_memory: Option<u64>,
    /// Bytes of the source that are done.
    pub done: u64,
    /// Bytes of the source.
    pub total: u64,
    /// Who is told.
    pub progress: &'a mut Progress<'a>,
    /// Bytes as read, where they need a conversion.
    pub raw: Vec<u8>,
}

impl Stream<'_> {
    /// Brings one tensor to its file.
    pub fn item(&mut self, item: &Item, writer: &mut Writer) -> Result<Done> {
        let name = &item.info.name;
        let done = match &item.action {
            Action::Keep => self.copy(item, writer),
            Action::Cast(dtype) => with_element!(*dtype, T => self.cast::<T>(item, writer)),
            Action::Quantize { layout, dtype, transposed } => {
                with_element!(*dtype, T => self.quantize::<T>(item, layout, *transposed, writer))
            }
            Action::Dequantize { stored, dtype, transposed } => {
                with_element!(*dtype, T => self.dequantize::<T>(item, stored, *transposed, writer))
            }
        };
        done.map_err(|error| match error {
            error @ (Error::NonFinite { .. } | Error::Shape { .. } | Error::Length { .. }) => {
                error.in_tensor(name)
            }
            error => error,
        })
    }

    fn advance(&mut self, bytes: u64, name: &str) -> Result<()> {
        self.done += bytes;
        match (self.progress)(self.done, self.total, name) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Interrupted),
        }
    }

    fn run(&self, item: &Item) -> Result<usize> {
        budget::run(item, self.threads, self.max_memory)
    }

    fn copy(&mut self, item: &Item, writer: &mut Writer) -> Result<Done> {
        let name = &item.info.name;
        let total = item.info.bytes as usize;
        let mut buffer = vec![0; self.run(item)?.min(total)];
        let mut first = 0;
        while first < total {
            let n = buffer.len().min(total - first);
            self.source.read(name, first as u64, &mut buffer[..n])?;
            writer.write(name, first as u64, &buffer[..n])?;
            self.advance(n as u64, name)?;
            first += n;
        }
        Ok(Done::default())
    }

    fn cast<T: Element>(&mut self, item: &Item, writer: &mut Writer) -> Result<Done> {
        let name = &item.info.name;
        let total = item.info.elements();
        let mut out = vec![T::default(); self.run(item)?.min(total)];
        let (mut first, mut overflowed) = (0, 0);
        while first < total {
            let n = out.len().min(total - first);
            let out = &mut out[..n];
            overflowed += self.load(item, first, out)?;
            writer.write(name, (first * size_of::<T>()) as u64, bytemuck::cast_slice(out))?;
            self.advance(source_bytes(item, n), name)?;
            first += n;
        }
        Ok(Done { overflowed, ..Done::default() })
    }

    fn quantize<T: Lanes>(
        &mut self,
        item: &Item,
        layout: &Layout,
        transposed: bool,
        writer: &mut Writer,
    ) -> Result<Done> {
        let name = &item.info.name;
        let run = self.run(item)?.min(layout.elements);
        let largest = part(layout, run);
        let mut x = vec![T::default(); run];
        let (mut packed, mut scales) = (vec![0u8; largest.packed], vec![0f32; largest.scales]);
        let mut all_scales = Vec::with_capacity(if layout.nested { layout.scales } else { 0 });
        let mut stats = self.how.stats.then(Stats::default);
        let absmax = absmax_key(item, layout);
        let mut first = 0;
        while first < layout.elements {
            let n = run.min(layout.elements - first);
            let (part, block) = (part(layout, n), first / layout.blocksize);
            let (x, packed, scales) =
                (&mut x[..n], &mut packed[..part.packed], &mut scales[..part.scales]);
            if transposed {
                self.load_transposed(item, first, x)?;
            } else {
                self.load(item, first, x)?;
            }
            let found = self.cpu.quantize(&part, self.how, x, packed, scales);
            let found = found.map_err(|error| shift(error, first))?;
            if let (Some(stats), Some(found)) = (&mut stats, &found) {
                stats.merge(found);
            }
            writer.write(name, self::part(layout, first).packed as u64, packed)?;
            if layout.nested {
                all_scales.extend_from_slice(scales);
            } else if layout.format.spec().scale == Scale::E8M0 {
                let codes: Vec<u8> = scales.iter().map(|scale| e8m0_encode(*scale)).collect();
                writer.write(&absmax, block as u64, &codes)?;
            } else {
                writer.write(&absmax, 4 * block as u64, bytemuck::cast_slice(scales))?;
            }
            self.advance(source_bytes(item, n), name)?;
            first += n;
        }
        let shorter = self.finish(item, layout, T::DTYPE, &all_scales, writer)?;
        Ok(Done { stats: stats.map(|stats| stats.summary()), overflowed: 0, shorter })
    }

    /// Writes what lies beside the codes; returns how much shorter the text is than planned.
    fn finish(
        &self,
        item: &Item,
        layout: &Layout,
        dtype: Dtype,
        all_scales: &[f32],
        writer: &mut Writer,
    ) -> Result<u64> {
        let key = |companion: Companion| companion.key(&item.info.name, layout.format);
        if owner(layout.format).is_none() {
            // Row by row.
            writer.put(&key(Companion::WeightFormat), vec![0])?;
            return Ok(0);
        }
        let mut offset = None;
        if layout.nested {
            let mut codes = vec![0u8; layout.scales];
            let mut absmax = vec![0f32; layout.nested_scales()];
            let reference = self.how.reference;
            let cpu = &self.cpu;
            offset = Some(cpu.quantize_scales(all_scales, reference, &mut codes, &mut absmax)?);
            writer.put(&key(Companion::Absmax), codes)?;
            writer.put(&key(Companion::NestedAbsmax), f32_bytes(&absmax))?;
            writer.put(&key(Companion::NestedQuantMap), f32_bytes(nested_quant_map()))?;
        }
        writer.put(&key(Companion::QuantMap), f32_bytes(quant_map(layout.format)))?;
        let text = state(layout, dtype, &item.shape(), offset).render().into_bytes();
        let planned = item.outputs().into_iter().find(|output| output.is_text);
        let shorter = planned.map_or(0, |output| output.bytes.saturating_sub(text.len() as u64));
        writer.put(&key(Companion::QuantState), text)?;
        Ok(shorter)
    }

    fn dequantize<T: Lanes>(
        &mut self,
        item: &Item,
        stored: &Stored,
        transposed: bool,
        writer: &mut Writer,
    ) -> Result<Done> {
        let (name, layout) = (&item.info.name, &stored.layout);
        let Some(checkpoint) = self.checkpoint else { return Ok(Done::default()) };
        let scales = checkpoint.read_scales(stored)?;
        refuse_nonfinite(&scales)
            .map_err(|problem| Error::tensor(self.source.path(), name, problem))?;
        let run = self.run(item)?.min(layout.elements);
        let (mut packed, mut out) = (vec![0u8; part(layout, run).packed], vec![T::default(); run]);
        let columns = stored.shape.last().copied().unwrap_or(1);
        let mut first = 0;
        while first < layout.elements {
            let n = run.min(layout.elements - first);
            let part = part(layout, n);
            let (packed, out) = (&mut packed[..part.packed], &mut out[..n]);
            self.source.read(name, self::part(layout, first).packed as u64, packed)?;
            let view = scales_of(&scales, first / layout.blocksize, part.scales);
            let part = Layout { nested: layout.nested, ..part };
            self.cpu.dequantize(&QTensor::new(part, packed, view)?, out)?;
            if transposed {
                let rows = layout.elements / columns.max(1);
                write_transposed(writer, name, out, columns, first / columns.max(1), rows)?;
            } else {
                let bytes = bytemuck::cast_slice(out);
                writer.write(name, (first * size_of::<T>()) as u64, bytes)?;
            }
            self.advance(packed.len() as u64, name)?;
            first += n;
        }
        let companions = item.bytes.saturating_sub(item.info.bytes);
        self.advance(companions, name)?;
        Ok(Done::default())
    }

    /// Reads elements from flat position `first` on and rounds them to `T`; returns how many
    /// finite values became infinite.
    fn load<T: Element>(&mut self, item: &Item, first: usize, out: &mut [T]) -> Result<u64> {
        let (name, start) = (&item.info.name, source_bytes(item, first));
        if float(item.info.dtype) == Some(T::DTYPE) {
            self.source.read(name, start, cast_slice_mut(out))?;
            return Ok(0);
        }
        self.raw.resize(source_bytes(item, out.len()) as usize, 0);
        self.source.read(name, start, &mut self.raw)?;
        convert(self.threads, item.info.dtype, &self.raw, out)
    }

    /// Fills `out` with whole rows of the transposed matrix, the first beginning at `first`.
    fn load_transposed<T: Element>(
        &mut self,
        item: &Item,
        first: usize,
        out: &mut [T],
    ) -> Result<()> {
        let [inputs, outputs] = item.info.shape[..] else { return Ok(()) };
        let rows = out.len() / inputs.max(1);
        let mut column = vec![T::default(); rows];
        for input in 0..inputs {
            self.load(item, input * outputs + first / inputs, &mut column)?;
            for (to, from) in out.iter_mut().skip(input).step_by(inputs).zip(&column) {
                *to = *from;
            }
        }
        Ok(())
    }
}

/// Writes whole rows of a matrix as columns of the transposed one, which has `rows` columns.
fn write_transposed<T: Element>(
    writer: &mut Writer,
    name: &str,
    x: &[T],
    columns: usize,
    first_row: usize,
    rows: usize,
) -> Result<()> {
    for column in 0..columns {
        let values: Vec<T> = x.iter().skip(column).step_by(columns).copied().collect();
        let start = (column * rows + first_row) * size_of::<T>();
        writer.write(name, start as u64, bytemuck::cast_slice(&values))?;
    }
    Ok(())
}

/// The lengths of a run of whole blocks; its scales are plain.
fn part(layout: &Layout, elements: usize) -> Layout {
    let packed = match layout.format.spec().bits {
        4 => elements.div_ceil(2),
        _ => elements,
    };
    let scales = elements.div_ceil(layout.blocksize.max(1));
    Layout { elements, packed, scales, nested: false, ..*layout }
}

/// The scales of some blocks. The first is a multiple of 256 where they are nested.
fn scales_of(scales: &OwnedScales, first: usize, blocks: usize) -> Scales<'_> {
    fn cut<T>(all: &[T], first: usize, n: usize) -> &[T] {
        all.get(first..(first + n).min(all.len())).unwrap_or_default()
    }
    match scales {
        OwnedScales::Plain(scales) => Scales::Plain(cut(scales, first, blocks)),
        OwnedScales::E8M0(codes) => Scales::E8M0(cut(codes, first, blocks)),
        OwnedScales::Nested { codes, absmax, offset } => Scales::Nested {
            codes: cut(codes, first, blocks),
            absmax: cut(absmax, first / NESTED_BLOCKSIZE, blocks.div_ceil(NESTED_BLOCKSIZE)),
            offset: *offset,
        },
    }
}

/// A scale that is no number would spoil its whole block in silence.
fn refuse_nonfinite(scales: &OwnedScales) -> Result<(), String> {
    let (what, values) = match scales {
        OwnedScales::Plain(scales) => ("absmax", scales),
        OwnedScales::Nested { absmax, .. } => ("nested_absmax", absmax),
        OwnedScales::E8M0(_) => return Ok(()),
    };
    match values.iter().enumerate().find(|(_, scale)| !scale.is_finite()) {
        Some((i, scale)) => Err(format!("{what} is {scale} at {i}; copy the checkpoint again")),
        None => Ok(()),
    }
}

fn absmax_key(item: &Item, layout: &Layout) -> String {
    let companion = if layout.format == Format::Int8 { Companion::Scb } else { Companion::Absmax };
    companion.key(&item.info.name, layout.format)
}

fn source_bytes(item: &Item, elements: usize) -> u64 {
    elements as u64 * (item.info.dtype.bitsize() as u64 / 8)
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn shift(error: Error, by: usize) -> Error {
    match error {
        Error::NonFinite { index, value } => Error::NonFinite { index: index + by, value },
        other => other,
    }
}
