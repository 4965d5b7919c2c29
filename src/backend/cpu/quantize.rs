//! Quantization of a whole tensor, with refusal or repair of non-finite values and statistics.

use super::threads::share_items;
use super::{Cpu, Kernels, Lanes, RUN};
use crate::error::{Error, Result};
use crate::format::{Decode, Scale};
use crate::pack::check_len;
use crate::quant::blockwise::{self, Blocks};
use crate::quant::stats::Stats;
use crate::quant::{NonFinite, Reference, nested, rowwise};
use crate::tensor::{Layout, QTensor, Scales, ScalesMut};

/// Elements that are decoded at a time for statistics, or a block: what was read and what it
/// decodes to stay in the first-level cache until they are compared.
const PIECE: usize = 4096;

/// How to quantize, beside format and block size (which the layout has).
#[derive(Clone, Copy, Debug, Default)]
pub struct Quantizer {
    /// Whose bytes to make.
    pub reference: Reference,
    /// What to do with NaN and infinity.
    pub nonfinite: NonFinite,
    /// Whether to gather statistics.
    pub stats: bool,
}

/// What was found while quantizing.
pub type Found = Option<Stats>;

impl Cpu {
    /// Quantizes a tensor into `packed` and f32 `scales`, one scale a block or row.
    ///
    /// Scales that are stored otherwise (nested, E8M0) are made from these by
    /// [`crate::quant::nested::quantize`] and [`blockwise::e8m0_encode`].
    pub fn quantize<T: Lanes>(
        &self,
        layout: &Layout,
        how: Quantizer,
        x: &[T],
        packed: &mut [u8],
        scales: &mut [f32],
    ) -> Result<Found> {
        check_len("input", layout.elements, x.len())?;
        check_len("packed", layout.packed, packed.len())?;
        check_len("absmax", layout.scales, scales.len())?;
        if x.is_empty() {
            scales.fill(0.0);
            return Ok(how.stats.then(Stats::default));
        }
        let block = layout.blocksize;
        let run = (RUN / block).max(1) * block;
        let kernels = Kernels::<T>::of(self.isa);
        let packed_run = if layout.format.spec().bits == 4 { run / 2 } else { run };
        let runs = x.chunks(run).zip(packed.chunks_mut(packed_run));
        let runs = runs.zip(scales.chunks_mut(run / block)).enumerate();
        let runs = share_items(self.threads_for(x.len()), runs, |(i, ((x, packed), scales))| {
            let job = Run { layout, how, isa: self, kernels: &kernels };
            job.quantize(x, packed, scales).map_err(|error| shift(error, i * run))
        });
        runs.into_iter().try_fold(how.stats.then(Stats::default), |total, run| {
            Ok(match (total, run?) {
                (Some(mut total), Some(more)) => {
                    total.merge(&more);
                    Some(total)
                }
                (total, _) => total,
            })
        })
    }

    /// Quantizes a tensor and stores its scales as its layout says.
    pub fn quantize_stored<T: Lanes>(
        &self,
        layout: &Layout,
        how: Quantizer,
        x: &[T],
        packed: &mut [u8],
        scales: ScalesMut<'_>,
    ) -> Result<Found> {
        match scales {
            ScalesMut::Plain(scales) => self.quantize(layout, how, x, packed, scales),
            ScalesMut::E8M0(codes) => {
                check_len("absmax", layout.scales, codes.len())?;
                let mut scales = vec![0f32; layout.scales];
                let found = self.quantize(layout, how, x, packed, &mut scales)?;
                for (code, scale) in codes.iter_mut().zip(scales) {
                    *code = blockwise::e8m0_encode(scale);
                }
                Ok(found)
            }
            ScalesMut::Nested { codes, absmax, offset } => {
                let mut scales = vec![0f32; layout.scales];
                let found = self.quantize(layout, how, x, packed, &mut scales)?;
                *offset = self.quantize_scales(&scales, how.reference, codes, absmax)?;
                Ok(found)
            }
        }
    }

    /// [`nested::quantize`] with the kernels in use.
    pub fn quantize_scales(
        &self,
        scales: &[f32],
        reference: Reference,
        codes: &mut [u8],
        nested_absmax: &mut [f32],
    ) -> Result<f32> {
        let kernel = Kernels::<f32>::of(self.isa).quantize8;
        nested::quantize_by(kernel, scales, reference, codes, nested_absmax)
    }

    /// Quantizes activations for LLM.int8(): `[rows, columns]` to signed bytes with one scale a
    /// row. Columns with a magnitude of at least `threshold` (if that is above 0) are left out:
    /// their codes are 0, they do not count for the scales, and their indices are returned.
    pub fn quantize_activations<T: Lanes>(
        &self,
        x: &[T],
        columns: usize,
        threshold: f32,
        codes: &mut [i8],
        absmax: &mut [f32],
    ) -> Result<Vec<usize>> {
        check_len("codes", x.len(), codes.len())?;
        check_len("activations", absmax.len().saturating_mul(columns), x.len())?;
        if columns == 0 {
            absmax.fill(0.0);
            return Ok(Vec::new());
        }
        let outliers = if threshold > 0.0 {
            rowwise::outlier_columns(x, columns, threshold)
        } else {
            Vec::new()
        };
        let kernels = Kernels::<T>::of(self.isa);
        let together = RUN.div_ceil(columns);
        let runs = x.chunks(columns * together).zip(codes.chunks_mut(columns * together));
        let runs = runs.zip(absmax.chunks_mut(together));
        share_items(self.threads_for(x.len()), runs, |((x, codes), absmax)| {
            let rows = x.chunks_exact(columns).zip(codes.chunks_exact_mut(columns)).zip(absmax);
            for ((x, codes), absmax) in rows {
                *absmax = if outliers.is_empty() {
                    (kernels.quantize_row)(x, codes)
                } else {
                    let mut inliers = x.to_vec();
                    for column in &outliers {
                        inliers[*column] = T::default();
                    }
                    (kernels.quantize_row)(&inliers, codes)
                };
            }
        });
        match absmax.iter().position(|absmax| !absmax.is_finite()) {
            None => Ok(outliers),
            Some(row) => {
                let first = row * columns;
                let values = x[first..first + columns].iter().map(|x| x.to_f32());
                let (index, value) =
                    (first..).zip(values).find(|(_, x)| !x.is_finite()).unwrap_or_default();
                Err(Error::NonFinite { index, value })
            }
        }
    }

    /// Compares a tensor with its quantized form.
    pub fn error<T: Lanes>(&self, x: &[T], q: &QTensor<'_>) -> Result<Stats> {
        check_len("input", q.layout().elements, x.len())?;
        let block = q.layout().blocksize.max(1);
        let run = (RUN / block).max(1) * block;
        let one = Cpu { threads: 1, ..*self };
        let kernels = Kernels::<T>::of(self.isa);
        let runs = x.chunks(run).enumerate();
        let runs: Vec<Result<Stats>> = share_items(self.threads_for(x.len()), runs, |(i, x)| {
            let mut decoded = vec![0f32; x.len()];
            one.dequantize_range(q, i * run, &mut decoded)?;
            let mut scales = vec![0f32; x.len().div_ceil(block)];
            super::scales::decode(self.isa, q.scales(), i * run / block, &mut scales);
            let mut stats = Stats::default();
            (kernels.compare)(x, &decoded, block, &scales, &mut stats);
            Ok(stats)
        });
        runs.into_iter().try_fold(Stats::default(), |mut total, run| {
            total.merge(&run?);
            Ok(total)
        })
    }
}

/// One run of whole blocks.
struct Run<'a, T: 'static> {
    layout: &'a Layout,
    how: Quantizer,
    isa: &'a Cpu,
    kernels: &'a Kernels<T>,
}

impl<T: Lanes> Run<'_, T> {
    fn quantize(&self, x: &[T], packed: &mut [u8], scales: &mut [f32]) -> Result<Found> {
        if self.encode(x, packed, scales) {
            return Ok(self.stats(x, packed, scales, 0));
        }
        let found = x.iter().map(|x| x.to_f32()).enumerate().find(|(_, x)| !x.is_finite());
        match (found, self.how.nonfinite) {
            (Some((index, value)), NonFinite::Refuse) => Err(Error::NonFinite { index, value }),
            (Some(_), NonFinite::Zero) => {
                let repaired: Vec<f32> = x
                    .iter()
                    .map(|x| x.to_f32())
                    .map(|x| if x.is_finite() { x } else { 0.0 })
                    .collect();
                let zeroed = x.iter().filter(|x| !x.to_f32().is_finite()).count() as u64;
                let run = Run {
                    layout: self.layout,
                    how: self.how,
                    isa: self.isa,
                    kernels: &Kernels::<f32>::of(self.isa.isa),
                };
                run.refuse_overflow(&repaired, packed, scales)?;
                Ok(run.stats(&repaired, packed, scales, zeroed))
            }
            // Finite values that overflow fp16 on their way to int8 (reference mode only).
            (None, _) => self.refuse_overflow(x, packed, scales).map(|()| None),
        }
    }

    /// Encodes values known to be finite: only a cast to fp16 can still overflow.
    fn refuse_overflow(&self, x: &[T], packed: &mut [u8], scales: &mut [f32]) -> Result<()> {
        if self.encode(x, packed, scales) {
            return Ok(());
        }
        let (index, value) = x
            .iter()
            .map(|x| x.to_f32())
            .enumerate()
            .find(|(_, x)| !half::f16::from_f32(*x).is_finite())
            .unwrap_or_default();
        Err(Error::NonFinite { index, value })
    }

    fn stats(&self, x: &[T], packed: &[u8], scales: &[f32], zeroed: u64) -> Found {
        if !self.how.stats {
            return None;
        }
        let (block, bits) = (self.layout.blocksize, self.layout.format.spec().bits);
        let piece = (PIECE / block).max(1) * block;
        let mut decoded = vec![0f32; piece.min(x.len())];
        let mut stats = Stats { zeroed, ..Stats::default() };
        let pieces = x.chunks(piece).zip(packed.chunks(if bits == 4 { piece / 2 } else { piece }));
        for ((x, packed), scales) in pieces.zip(scales.chunks(piece / block)) {
            let layout = Layout {
                elements: x.len(),
                packed: packed.len(),
                scales: scales.len(),
                nested: false,
                // The scales are still f32 here, whatever the format stores.
                ..*self.layout
            };
            let decoded = &mut decoded[..x.len()];
            decode_plain(self.isa, &layout, packed, scales, decoded);
            (self.kernels.compare)(x, decoded, block, scales, &mut stats);
        }
        match bits {
            4 => stats.count_packed(packed, x.len()),
            _ => stats.count_codes(packed),
        }
        Some(stats)
    }

    /// Runs the kernel of the format; returns whether all values were finite.
    fn encode(&self, x: &[T], packed: &mut [u8], scales: &mut [f32]) -> bool {
        let spec = self.layout.format.spec();
        let block = self.layout.blocksize;
        let reference = self.how.reference;
        let how = Blocks::new(block, spec.scale, reference);
        match spec.decode {
            Decode::Codebook4(book) => {
                let finite = (self.kernels.quantize4)(book, how, x, packed, scales);
                let tail = x.len() % block;
                if reference == Reference::BitsandbytesCpu
                    && spec.scale == Scale::Absmax
                    && tail > 0
                    && let Some(scale) = scales.last_mut()
                {
                    let first = x.len() - tail;
                    blockwise::quantize4_tail_like_bitsandbytes(
                        book,
                        &x[first..],
                        &mut packed[first / 2..],
                        scale,
                    );
                }
                finite
            }
            Decode::Codebook8(book) => (self.kernels.quantize8)(book, how, x, packed, scales),
            Decode::Int8 => self.rows(block, x, bytemuck::cast_slice_mut(packed), scales),
            Decode::Dense(_) => true,
        }
    }

    fn rows(&self, columns: usize, x: &[T], codes: &mut [i8], scales: &mut [f32]) -> bool {
        let mut finite = true;
        for ((x, codes), scale) in x.chunks(columns).zip(codes.chunks_mut(columns)).zip(scales) {
            *scale = match self.how.reference {
                Reference::Exact => (self.kernels.quantize_row)(x, codes),
                Reference::BitsandbytesCpu => rowwise::quantize_row_like_bitsandbytes(x, codes),
            };
            finite &= scale.is_finite();
        }
        finite
    }
}

fn decode_plain(cpu: &Cpu, layout: &Layout, packed: &[u8], scales: &[f32], out: &mut [f32]) {
    let kernels = Kernels::<f32>::of(cpu.isa);
    let block = layout.blocksize;
    match layout.format.spec().decode {
        Decode::Codebook4(book) => (kernels.dequantize4)(&book.values, block, packed, scales, out),
        Decode::Codebook8(book) => (kernels.dequantize8)(&book.values, block, packed, scales, out),
        Decode::Int8 => {
            let one = Cpu { threads: 1, ..*cpu };
            if let Ok(q) = QTensor::new(*layout, packed, Scales::Plain(scales)) {
                let _ = one.dequantize(&q, out);
            }
        }
        Decode::Dense(_) => {}
    }
}

fn shift(error: Error, by: usize) -> Error {
    match error {
        Error::NonFinite { index, value } => Error::NonFinite { index: index + by, value },
        other => other,
    }
}
