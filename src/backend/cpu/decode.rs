//! Dequantization of a whole tensor, of any range of it, and of chosen rows.

use super::threads::share_items;
use super::{Cpu, Kernels, Lanes, RUN, scales};
use crate::error::{Error, Result};
use crate::format::Decode;
use crate::pack::check_len;
use crate::tensor::QTensor;

impl Cpu {
    /// Decodes a tensor: value = decode(code) * scale in f32, rounded once to `T`.
    pub fn dequantize<T: Lanes>(&self, q: &QTensor<'_>, out: &mut [T]) -> Result<()> {
        check_len("output", q.layout().elements, out.len())?;
        self.dequantize_range(q, 0, out)
    }

    /// Decodes the elements from flat position `first` on, as many as `out` holds. The range may
    /// start and end inside a block.
    pub fn dequantize_range<T: Lanes>(
        &self,
        q: &QTensor<'_>,
        first: usize,
        out: &mut [T],
    ) -> Result<()> {
        let end = first.checked_add(out.len()).filter(|end| *end <= q.layout().elements);
        if end.is_none() {
            return Err(Error::Length {
                what: "range of elements to decode",
                expected: q.layout().elements,
                got: first.saturating_add(out.len()),
            });
        }
        if out.is_empty() {
            return Ok(());
        }
        let block = q.layout().blocksize.max(1);
        // Up to the first block border, then runs of whole blocks.
        let head = (first.next_multiple_of(block) - first).min(out.len());
        let (head, body) = out.split_at_mut(head);
        let kernels = Kernels::<T>::of(self.isa);
        if !head.is_empty() {
            decode_inside_block(&kernels, q, first, head);
        }
        let first = first + head.len();
        let run = (RUN / block).max(1) * block;
        let elements = body.len();
        let runs = body.chunks_mut(run).enumerate();
        share_items(self.threads_for(elements), runs, |(i, out)| {
            decode_run(&kernels, q, first / block + i * (run / block), out);
        });
        Ok(())
    }

    /// Decodes chosen rows of a tensor whose rows have `columns` elements, one after the other.
    pub fn dequantize_rows<T: Lanes>(
        &self,
        q: &QTensor<'_>,
        columns: usize,
        rows: &[i64],
        out: &mut [T],
    ) -> Result<()> {
        let expected = rows.len().checked_mul(columns);
        check_len("output", expected.unwrap_or(usize::MAX), out.len())?;
        if columns == 0 {
            return Ok(());
        }
        let count = q.layout().elements / columns;
        if let Some(row) =
            rows.iter().find(|row| usize::try_from(**row).map_or(true, |r| r >= count))
        {
            return Err(Error::Row { index: *row, rows: count });
        }
        let one = Cpu { threads: 1, ..*self };
        let (elements, together) = (out.len(), RUN.div_ceil(columns));
        let runs = out.chunks_mut(columns * together).zip(rows.chunks(together));
        let done = share_items(self.threads_for(elements), runs, |(out, rows)| {
            let mut each = out.chunks_exact_mut(columns).zip(rows);
            each.try_for_each(|(out, row)| one.dequantize_range(q, *row as usize * columns, out))
        });
        done.into_iter().collect()
    }
}

/// Decodes whole blocks from block `first` on; the last may be short.
fn decode_run<T: Lanes>(kernels: &Kernels<T>, q: &QTensor<'_>, first: usize, out: &mut [T]) {
    let layout = q.layout();
    let block = layout.blocksize.max(1);
    let mut decoded = Vec::new();
    let blocks = out.len().div_ceil(block);
    let scales = scales::of_blocks(kernels.isa, q.scales(), first..first + blocks, &mut decoded);
    let decode = layout.format.spec().decode;
    let codes = match decode {
        Decode::Codebook4(_) => &q.packed()[first * block / 2..],
        _ => &q.packed()[first * block..],
    };
    decode_blocks(kernels, decode, block, codes, scales, out);
}

/// Decodes as many elements as `out` holds, beginning with a block.
fn decode_blocks<T: Lanes>(
    kernels: &Kernels<T>,
    decode: Decode,
    block: usize,
    codes: &[u8],
    scales: &[f32],
    out: &mut [T],
) {
    match decode {
        Decode::Codebook4(book) => {
            let packed = &codes[..out.len().div_ceil(2)];
            (kernels.dequantize4)(&book.values, block, packed, scales, out);
        }
        Decode::Codebook8(book) => {
            (kernels.dequantize8)(&book.values, block, &codes[..out.len()], scales, out);
        }
        Decode::Int8 => {
            let codes: &[i8] = bytemuck::cast_slice(&codes[..out.len()]);
            for ((out, codes), absmax) in out.chunks_mut(block).zip(codes.chunks(block)).zip(scales)
            {
                (kernels.dequantize_row)(codes, *absmax, out);
            }
        }
        Decode::Dense(_) => {}
    }
}

/// Decodes elements that lie inside one block.
fn decode_inside_block<T: Lanes>(
    kernels: &Kernels<T>,
    q: &QTensor<'_>,
    first: usize,
    out: &mut [T],
) {
    let layout = q.layout();
    let block = layout.blocksize.max(1);
    let mut scale = [0.0];
    q.scales().decode(first / block, &mut scale);
    let decode = layout.format.spec().decode;
    let (codes, out) = match decode {
        Decode::Codebook4(book) => {
            // The second of a pair is no beginning for a kernel.
            let (alone, out) = out.split_at_mut((first % 2).min(out.len()));
            for out in alone {
                let code = q.packed()[first / 2] & 15;
                *out = T::from_f32(book.values[usize::from(code)] * scale[0]);
            }
            (&q.packed()[first.div_ceil(2)..], out)
        }
        _ => (&q.packed()[first..], out),
    };
    decode_blocks(kernels, decode, block, codes, &scale, out);
}
