//! The one table of formats.
//!
//! Code loops over [`Format::ALL`] or matches on the fields of a [`Spec`]; it never compares
//! names. To add a format that fits these fields, add a row.

pub mod cells;
pub mod codebook;

use std::fmt;

use codebook::Codebook;

use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// How a code becomes a number before it is multiplied by its scale.
#[derive(Clone, Copy, Debug)]
pub enum Decode {
    /// Four bits: one of sixteen values, two codes in a byte.
    Codebook4(&'static Codebook<16>),
    /// Eight bits: one of 256 values.
    Codebook8(&'static Codebook<256>),
    /// Eight bits: a signed integer in -127..=127; value = q * scale / 127.
    Int8,
    /// Not quantized.
    Dense(Dtype),
}

/// What a scale is and which elements share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// The largest magnitude of a block of consecutive elements, f32.
    Absmax,
    /// A power of two per block, stored as an eight-bit exponent (E8M0 of OCP MX).
    E8M0,
    /// The largest magnitude of a row, f32.
    RowAbsmax,
    /// No scale.
    None,
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// The name in every interface.
    pub name: &'static str,
    /// Bits of one code.
    pub bits: u8,
    /// How a code becomes a number.
    pub decode: Decode,
    /// What the numbers are multiplied by.
    pub scale: Scale,
    /// The block sizes on offer; empty where there are no blocks.
    pub blocksizes: &'static [usize],
    /// The block size when none is asked for; 0 where there are no blocks.
    pub default_blocksize: usize,
    /// Whether the scales may be quantized themselves (double quantization).
    pub nestable: bool,
    /// Where it comes from.
    pub source: &'static str,
}

const POWERS_OF_TWO: &[usize] = &[32, 64, 128, 256, 512, 1024, 2048, 4096];

/// The largest block of any format, in elements.
pub const MAX_BLOCKSIZE: usize = 4096;

macro_rules! formats {
    ($( $(#[$doc:meta])* $variant:ident => $spec:expr ),+ $(,)?) => {
        /// A storage format; [`Format::spec`] is its row in the table.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Format { $( $(#[$doc])* $variant ),+ }

        impl Format {
            /// Every format, in the order of the table.
            pub const ALL: &'static [Format] = &[ $( Format::$variant ),+ ];

            /// The row of the table that describes this format.
            pub const fn spec(self) -> &'static Spec {
                match self { $( Format::$variant => { static S: Spec = $spec; &S } ),+ }
            }
        }
    };
}

const fn blockwise4(name: &'static str, book: &'static Codebook<16>, source: &'static str) -> Spec {
    Spec {
        name,
        bits: 4,
        decode: Decode::Codebook4(book),
        scale: Scale::Absmax,
        blocksizes: POWERS_OF_TWO,
        default_blocksize: 64,
        nestable: true,
        source,
    }
}

const fn blockwise8(name: &'static str, book: &'static Codebook<256>) -> Spec {
    Spec {
        bits: 8,
        decode: Decode::Codebook8(book),
        nestable: false,
        source: "arXiv:2110.02861; bitsandbytes quantize_blockwise",
        ..blockwise4(name, &codebook::NF4, "")
    }
}

const fn dense(dtype: Dtype) -> Spec {
    Spec {
        name: dtype.short_name(),
        bits: 8 * dtype.size() as u8,
        decode: Decode::Dense(dtype),
        scale: Scale::None,
        blocksizes: &[],
        default_blocksize: 0,
        nestable: false,
        source: "not quantized",
    }
}

formats! {
    /// NormalFloat4: quantiles of the normal distribution.
    Nf4 => blockwise4("nf4", &codebook::NF4, "QLoRA, arXiv:2305.14314; bitsandbytes"),
    /// Four-bit floats: twelfths with a sign.
    Fp4 => blockwise4("fp4", &codebook::FP4, "bitsandbytes"),
    /// Symmetric four-bit integers, value = (code - 8) / 7 * absmax.
    Int4 => blockwise4("int4", &codebook::INT4, "group-wise symmetric INT4"),
    /// LLM.int8(): one scale per row.
    Int8 => Spec {
        name: "int8",
        bits: 8,
        decode: Decode::Int8,
        scale: Scale::RowAbsmax,
        blocksizes: &[],
        default_blocksize: 0,
        nestable: false,
        source: "LLM.int8(), arXiv:2208.07339; bitsandbytes",
    },
    /// Dynamic eight-bit floats with a sign.
    Dynamic8 => blockwise8("dynamic8", &codebook::DYNAMIC),
    /// Dynamic eight-bit floats for values that are never negative.
    Dynamic8Unsigned => blockwise8("dynamic8u", &codebook::DYNAMIC_UNSIGNED),
    /// OCP microscaling FP4: E2M1 codes, a power of two per 32.
    Mxfp4 => Spec {
        name: "mxfp4",
        bits: 4,
        decode: Decode::Codebook4(&codebook::E2M1),
        scale: Scale::E8M0,
        blocksizes: &[32],
        default_blocksize: 32,
        nestable: false,
        source: "OCP Microscaling Formats (MX) Specification 1.0",
    },
    /// Unquantized half precision.
    Fp16 => dense(Dtype::F16),
    /// Unquantized bfloat16.
    Bf16 => dense(Dtype::BF16),
    /// Unquantized single precision.
    Fp32 => dense(Dtype::F32),
}

impl Format {
    /// Finds a format by name.
    ///
    /// ```
    /// use nybble::format::Format;
    /// assert_eq!(Format::parse("nf4").unwrap(), Format::Nf4);
    /// assert!(Format::parse("nf5").unwrap_err().to_string().contains("did you mean 'nf4'"));
    /// ```
    pub fn parse(name: &str) -> Result<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|format| format.name() == name)
            .ok_or_else(|| Error::unknown("format", name, Self::ALL.iter().map(|f| f.name())))
    }

    /// Finds a quantized format by name: the dense rows are refused.
    pub fn parse_quantized(name: &str) -> Result<Self> {
        let format = Self::parse(name)?;
        if let Decode::Dense(_) = format.spec().decode {
            return Err(Error::Unsupported {
                format: format.name(),
                what: "quantization",
                remedy: "cast the tensor instead",
            });
        }
        Ok(format)
    }

    /// The name in every interface.
    pub const fn name(self) -> &'static str {
        self.spec().name
    }

    /// The block size to use: the default for `None`, an error for one that is not on offer.
    /// Formats without blocks take any and give 0.
    pub fn blocksize(self, asked: Option<usize>) -> Result<usize> {
        let spec = self.spec();
        match asked {
            Some(got) if !spec.blocksizes.is_empty() && !spec.blocksizes.contains(&got) => {
                Err(Error::Blocksize { got, format: spec.name, allowed: spec.blocksizes })
            }
            Some(got) if !spec.blocksizes.is_empty() => Ok(got),
            _ => Ok(spec.default_blocksize),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found_again() {
        for &format in Format::ALL {
            assert_eq!(Format::parse(format.name()).unwrap(), format);
        }
    }

    #[test]
    fn every_blocksize_is_even_and_within_the_largest() {
        for format in Format::ALL {
            let spec = format.spec();
            assert!(spec.blocksizes.iter().all(|size| size % 2 == 0 && *size <= MAX_BLOCKSIZE));
            assert!(
                spec.blocksizes.is_empty() || spec.blocksizes.contains(&spec.default_blocksize)
            );
        }
    }

    #[test]
    fn a_blocksize_that_is_not_on_offer_is_refused_with_the_list() {
        let error = Format::Nf4.blocksize(Some(48)).unwrap_err().to_string();
        assert!(error.contains("48") && error.contains("4096"), "{error}");
        assert_eq!(Format::Mxfp4.blocksize(None).unwrap(), 32);
        assert!(Format::Mxfp4.blocksize(Some(64)).is_err());
    }
}
