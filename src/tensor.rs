//! A quantized tensor in memory: what its buffers are, how long they must be, and a checked view.

use crate::error::{Error, Result};
use crate::format::{Decode, Format, Scale};
use crate::pack::check_len;
use crate::quant::blockwise::e8m0_decode_all;
use crate::quant::nested::{self, NESTED_BLOCKSIZE};

/// Lengths of every buffer of a quantized tensor; they follow from format, shape and options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The storage format.
    pub format: Format,
    /// Elements that share a scale along the flattened tensor; for int8 the length of a row.
    pub blocksize: usize,
    /// Elements of the tensor.
    pub elements: usize,
    /// Bytes of codes.
    pub packed: usize,
    /// Number of scales.
    pub scales: usize,
    /// Whether the scales are quantized themselves.
    pub nested: bool,
}

impl Layout {
    /// The layout of a tensor of this shape. A 0-d tensor has one element; int8 takes the last
    /// dimension as the row.
    ///
    /// ```
    /// use nybble::{format::Format, tensor::Layout};
    /// let layout = Layout::new(Format::Nf4, &[3, 43], Some(64), false).unwrap();
    /// assert_eq!((layout.elements, layout.packed, layout.scales), (129, 65, 3));
    /// ```
    pub fn new(
        format: Format,
        shape: &[usize],
        blocksize: Option<usize>,
        nested: bool,
    ) -> Result<Self> {
        let spec = format.spec();
        if nested && !spec.nestable {
            return Err(Error::Unsupported {
                format: spec.name,
                what: "nested (double) quantization of its scales",
                remedy: "leave nested off for this format",
            });
        }
        let elements = elements(shape)?;
        let blocksize = match spec.scale {
            Scale::RowAbsmax => shape.last().copied().unwrap_or(1),
            _ => format.blocksize(blocksize)?,
        };
        let scales = match spec.scale {
            Scale::None => 0,
            // A matrix with no columns still has rows.
            Scale::RowAbsmax => elements_of_rows(shape)?,
            Scale::Absmax | Scale::E8M0 => elements.div_ceil(blocksize),
        };
        let packed = match spec.decode {
            Decode::Codebook4(_) => elements.div_ceil(2),
            Decode::Codebook8(_) | Decode::Int8 => elements,
            Decode::Dense(dtype) => elements
                .checked_mul(dtype.size())
                .ok_or_else(|| Error::TooLarge { shape: shape.to_vec() })?,
        };
        Ok(Self { format, blocksize, elements, packed, scales, nested })
    }

    /// Number of scales of the scales; 0 unless nested.
    pub const fn nested_scales(&self) -> usize {
        if self.nested { self.scales.div_ceil(NESTED_BLOCKSIZE) } else { 0 }
    }

    /// Bytes of all scales: one each where they are bytes, else four; nested ones add their own
    /// scales and the offset.
    pub const fn scale_bytes(&self) -> usize {
        match (self.nested, self.format.spec().scale) {
            (true, _) => self.scales + 4 * self.nested_scales() + 4,
            (false, Scale::E8M0) => self.scales,
            (false, _) => 4 * self.scales,
        }
    }
}

/// The number of elements of a shape.
pub fn elements(shape: &[usize]) -> Result<usize> {
    shape
        .iter()
        .try_fold(1usize, |product, &extent| product.checked_mul(extent))
        .filter(|product| isize::try_from(*product).is_ok_and(|n| n.checked_mul(4).is_some()))
        .ok_or_else(|| Error::TooLarge { shape: shape.to_vec() })
}

fn elements_of_rows(shape: &[usize]) -> Result<usize> {
    elements(shape.split_last().map_or(&[], |(_, rows)| rows))
}

/// The scales of a quantized tensor, as they are stored.
#[derive(Clone, Copy, Debug)]
pub enum Scales<'a> {
    /// One f32 per block or row.
    Plain(&'a [f32]),
    /// One exponent byte per block.
    E8M0(&'a [u8]),
    /// Double quantization.
    Nested {
        /// One byte per block.
        codes: &'a [u8],
        /// One scale per 256 codes.
        absmax: &'a [f32],
        /// What is added back.
        offset: f32,
    },
}

impl Scales<'_> {
    fn len(&self) -> usize {
        match self {
            Scales::Plain(scales) => scales.len(),
            Scales::E8M0(codes) | Scales::Nested { codes, .. } => codes.len(),
        }
    }

    /// Writes the f32 scales of the blocks from `first` on.
    pub fn decode(&self, first: usize, out: &mut [f32]) {
        self.decode_by(nested::decode_block, e8m0_decode_all, first, out);
    }

    /// [`Scales::decode`] with kernels that compute what [`nested::decode_block`] and
    /// [`e8m0_decode_all`] do.
    pub fn decode_by(
        &self,
        nested: fn(&[u8], f32, f32, &mut [f32]),
        e8m0: fn(&[u8], &mut [f32]),
        first: usize,
        out: &mut [f32],
    ) {
        let count = self.len().saturating_sub(first).min(out.len());
        if count == 0 {
            return; // `first` may be anywhere
        }
        let out = &mut out[..count];
        match *self {
            Scales::Plain(scales) => out.copy_from_slice(&scales[first..first + count]),
            Scales::E8M0(codes) => e8m0(&codes[first..first + count], out),
            Scales::Nested { codes, absmax, offset } => {
                let (mut at, mut out) = (first, out);
                while !out.is_empty() {
                    // Up to the end of the scales that share a scale.
                    let end = (NESTED_BLOCKSIZE - at % NESTED_BLOCKSIZE).min(out.len());
                    let (group, rest) = out.split_at_mut(end);
                    match absmax.get(at / NESTED_BLOCKSIZE) {
                        Some(absmax) => nested(&codes[at..at + end], *absmax, offset, group),
                        None => group.fill(0.0),
                    }
                    (at, out) = (at + end, rest);
                }
            }
        }
    }
}

/// Where the scales of a tensor are written, in the form in which they are stored.
#[derive(Debug)]
pub enum ScalesMut<'a> {
    /// One f32 per block or row.
    Plain(&'a mut [f32]),
    /// One exponent byte per block.
    E8M0(&'a mut [u8]),
    /// Double quantization.
    Nested {
        /// One byte per block.
        codes: &'a mut [u8],
        /// One scale per 256 codes.
        absmax: &'a mut [f32],
        /// What is added back.
        offset: &'a mut f32,
    },
}

/// A borrowed quantized tensor whose buffers have the lengths of its layout.
#[derive(Clone, Copy, Debug)]
pub struct QTensor<'a> {
    layout: Layout,
    packed: &'a [u8],
    scales: Scales<'a>,
}

impl<'a> QTensor<'a> {
    /// Checks every length against the layout.
    pub fn new(layout: Layout, packed: &'a [u8], scales: Scales<'a>) -> Result<Self> {
        check_len("packed", layout.packed, packed.len())?;
        check_len("absmax", layout.scales, scales.len())?;
        let kind = match (layout.nested, layout.format.spec().scale) {
            (true, _) => "nested scales (codes, nested_absmax, offset)",
            (false, Scale::E8M0) => "one byte a scale (E8M0)",
            (false, _) => "one f32 a scale",
        };
        match (&scales, layout.nested, layout.format.spec().scale) {
            (Scales::Nested { absmax, .. }, true, _) => {
                check_len("nested_absmax", layout.nested_scales(), absmax.len())?;
            }
            (Scales::E8M0(_), false, Scale::E8M0)
            | (Scales::Plain(_), false, Scale::Absmax | Scale::RowAbsmax | Scale::None) => {}
            _ => {
                return Err(Error::Argument {
                    what: "absmax",
                    got: format!("{scales:.0?}").chars().take(20).collect(),
                    expected: format!("{} stores {kind}", layout.format),
                });
            }
        }
        Ok(Self { layout, packed, scales })
    }

    /// Format, block size and lengths.
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The codes.
    pub const fn packed(&self) -> &'a [u8] {
        self.packed
    }

    /// The scales.
    pub const fn scales(&self) -> Scales<'a> {
        self.scales
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_of_odd_shapes() {
        let layout = |format, shape: &[usize]| {
            let layout = Layout::new(format, shape, None, false).unwrap();
            (layout.elements, layout.packed, layout.scales)
        };
        assert_eq!(layout(Format::Nf4, &[]), (1, 1, 1));
        assert_eq!(layout(Format::Nf4, &[0, 7]), (0, 0, 0));
        assert_eq!(layout(Format::Int8, &[5, 0]), (0, 0, 5));
        assert_eq!(layout(Format::Int8, &[2, 3, 4]), (24, 24, 6));
        assert_eq!(layout(Format::Mxfp4, &[33]), (33, 17, 2));
        assert_eq!(layout(Format::Bf16, &[3]), (3, 6, 0));
    }

    #[test]
    fn a_shape_that_no_index_can_count_is_an_error() {
        let huge = [usize::MAX / 2, 3];
        assert!(matches!(
            Layout::new(Format::Nf4, &huge, None, false),
            Err(Error::TooLarge { .. })
        ));
        // More elements than 2^31 is no trouble.
        let layout = Layout::new(Format::Nf4, &[1 << 17, 1 << 16], Some(64), true).unwrap();
        assert_eq!((layout.elements, layout.scales), (1 << 33, 1 << 27));
        assert_eq!(layout.nested_scales(), 1 << 19);
    }

    #[test]
    fn scales_from_any_block_on_are_those_of_all_blocks() {
        let codes: Vec<u8> = (0..700).map(|i| (i * 37 % 256) as u8).collect();
        let plain: Vec<f32> = (0..700).map(|i| i as f32).collect();
        let nested = [0.5, 0.25, 2.0];
        let all = [
            Scales::Plain(&plain),
            Scales::E8M0(&codes),
            Scales::Nested { codes: &codes, absmax: &nested, offset: 0.125 },
        ];
        for scales in all {
            let mut whole = vec![-1.0; 700];
            scales.decode(0, &mut whole);
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            for (first, count) in [(0, 1), (255, 2), (250, 300), (511, 189), (699, 1)] {
                let mut part = vec![-1.0; count];
                scales.decode(first, &mut part);
                assert_eq!(bits(&part), bits(&whole[first..first + count]), "{first} {scales:.0?}");
            }
            // Beyond the last block nothing is written.
            for first in [699, 700, usize::MAX] {
                let mut part = [-1.0; 3];
                scales.decode(first, &mut part);
                assert_eq!(part[1..], [-1.0; 2]);
            }
        }
        let want = |code: u8, absmax: f32| nested::decode(code, absmax, 0.125);
        let mut some = [0.0; 2];
        all[2].decode(511, &mut some);
        assert_eq!(some, [want(codes[511], 0.25), want(codes[512], 2.0)]);
    }

    #[test]
    fn wrong_lengths_and_kinds_are_refused() {
        let layout = Layout::new(Format::Nf4, &[64], None, false).unwrap();
        let packed = [0; 32];
        assert!(QTensor::new(layout, &packed, Scales::Plain(&[1.0])).is_ok());
        assert!(QTensor::new(layout, &packed[1..], Scales::Plain(&[1.0])).is_err());
        assert!(QTensor::new(layout, &packed, Scales::Plain(&[])).is_err());
        assert!(QTensor::new(layout, &packed, Scales::E8M0(&[1])).is_err());
        let nested = Layout { nested: true, ..layout };
        let scales = |absmax| Scales::Nested { codes: &[0], absmax, offset: 0.0 };
        assert!(QTensor::new(nested, &packed, scales(&[1.0])).is_ok());
        assert!(QTensor::new(nested, &packed, scales(&[])).is_err());
        assert!(QTensor::new(nested, &packed, Scales::Plain(&[1.0])).is_err());
    }

    #[test]
    fn nested_scales_cannot_be_asked_of_int8() {
        assert!(Layout::new(Format::Int8, &[4, 4], None, true).is_err());
        assert!(Layout::new(Format::Mxfp4, &[64], None, true).is_err());
    }
}
