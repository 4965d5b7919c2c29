//! A quantized tensor in device memory: the counterpart of [`crate::tensor::QTensor`].

use super::memory::DeviceSlice;
use super::params::{self, Address};
use crate::error::{Error, Result};
use crate::format::Scale;
use crate::pack::check_len;
use crate::quant::nested::NESTED_BLOCKSIZE;
use crate::tensor::Layout;

/// A codebook of 256 on the device. Kernels take such tables from memory; they are copied there
/// once, since a launch must not.
#[derive(Clone, Copy, Debug)]
pub struct Tables {
    /// The value of each code.
    pub values: DeviceSlice<f32>,
    /// [`crate::format::codebook::Codebook::pivots`].
    pub pivots: DeviceSlice<f32>,
    /// [`crate::format::codebook::Codebook::order`].
    pub order: DeviceSlice<u8>,
}

/// Scales as they are stored; see [`crate::tensor::Scales`].
#[derive(Clone, Copy, Debug)]
pub enum DeviceScales {
    /// One f32 per block or row.
    Plain(DeviceSlice<f32>),
    /// One exponent byte per block.
    E8M0(DeviceSlice<u8>),
    /// Double quantization.
    Nested {
        /// One byte per block.
        codes: DeviceSlice<u8>,
        /// One scale per 256 codes.
        absmax: DeviceSlice<f32>,
        /// What is added back, one element.
        offset: DeviceSlice<f32>,
    },
}

/// Buffers of a quantized tensor, whose lengths are those of its layout.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTensor {
    layout: Layout,
    packed: DeviceSlice<u8>,
    scales: DeviceScales,
    tables: Option<Tables>,
}

impl DeviceTensor {
    /// Checks every length. `tables` are those of the format's codebook of 256, or of `dynamic8`
    /// where the scales are nested.
    pub fn new(
        layout: Layout,
        packed: DeviceSlice<u8>,
        scales: DeviceScales,
        tables: Option<Tables>,
    ) -> Result<Self> {
        check_len("packed", layout.packed, packed.len())?;
        let kind = layout.format.spec().scale;
        let found = match (scales, layout.nested, kind) {
            (DeviceScales::Nested { codes, absmax, offset }, true, _) => {
                check_len("nested_absmax", layout.nested_scales(), absmax.len())?;
                check_len("nested_offset", 1, offset.len())?;
                codes.len()
            }
            (DeviceScales::E8M0(scales), false, Scale::E8M0) => scales.len(),
            (DeviceScales::Plain(scales), false, Scale::Absmax | Scale::RowAbsmax) => scales.len(),
            _ => {
                return Err(Error::Argument {
                    what: "absmax",
                    got: format!("{scales:.0?}").chars().take(12).collect(),
                    expected: format!("it is not what {} stores", layout.format),
                });
            }
        };
        check_len("absmax", layout.scales, found)?;
        if let Some(tables) = tables {
            check_len("values of the codebook", 256, tables.values.len())?;
            check_len("pivots of the codebook", 256, tables.pivots.len())?;
            check_len("order of the codebook", 256, tables.order.len())?;
        }
        Ok(Self { layout, packed, scales, tables })
    }

    /// Format, block size and lengths.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The codes.
    pub fn packed(&self) -> DeviceSlice<u8> {
        self.packed
    }

    /// The scales.
    pub fn scales(&self) -> DeviceScales {
        self.scales
    }

    /// The scales where they are f32 that no code stands for.
    pub fn plain_scales(&self) -> Result<DeviceSlice<f32>> {
        match self.scales {
            DeviceScales::Plain(scales) => Ok(scales),
            _ => Err(Error::Argument {
                what: "absmax",
                got: "codes".to_owned(),
                expected: format!("{} stores one f32 a scale", self.layout.format),
            }),
        }
    }

    /// The tables of the codebook of 256.
    pub fn tables(&self) -> Result<Tables> {
        self.tables.ok_or_else(|| Error::Argument {
            what: "tables",
            got: "None".to_owned(),
            expected: format!("{} needs a codebook of 256 on the device", self.layout.format),
        })
    }

    /// log2 of the block size, as kernels take it.
    pub fn log2_blocksize(&self) -> Result<u32> {
        log2(self.layout.blocksize)
    }

    pub(super) fn scales_of_blocks(&self) -> Result<params::Scales> {
        let none = params::Scales {
            absmax: 0,
            codes: 0,
            codebook: 0,
            nested_absmax: 0,
            offset: 0,
            log2_blocksize: self.log2_blocksize()?,
            log2_nested_blocksize: NESTED_BLOCKSIZE.ilog2(),
        };
        Ok(match self.scales {
            DeviceScales::Plain(absmax) => {
                params::Scales { absmax: absmax.address("absmax")?, ..none }
            }
            DeviceScales::E8M0(codes) => params::Scales { codes: codes.address("absmax")?, ..none },
            DeviceScales::Nested { codes, absmax, offset } => params::Scales {
                codes: codes.address("absmax")?,
                codebook: self.tables()?.values.address("values of the codebook")?,
                nested_absmax: absmax.address("nested_absmax")?,
                offset: offset.address("nested_offset")?,
                ..none
            },
        })
    }
}

/// log2 of a block size, which is a power of two.
pub fn log2(blocksize: usize) -> Result<u32> {
    if !blocksize.is_power_of_two() {
        return Err(Error::Argument {
            what: "blocksize",
            got: blocksize.to_string(),
            expected: "kernels take powers of two".to_owned(),
        });
    }
    Ok(blocksize.ilog2())
}

/// Where NaN and infinity are reported; see `NonFinite` of `cuda/params.h`.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// Lowered to the position of the first such value; the caller sets it to the largest u64.
    pub first: Option<DeviceSlice<i64>>,
    /// Whether such values are stored as 0.
    pub zero: bool,
}

impl Report {
    pub(super) fn params(self) -> Result<params::NonFinite> {
        let mut first: Address = 0;
        if let Some(slice) = self.first {
            check_len("first non-finite", 1, slice.len())?;
            first = slice.address("first non-finite")?;
        }
        Ok(params::NonFinite { first, zero: u32::from(self.zero), padding: 0 })
    }
}
