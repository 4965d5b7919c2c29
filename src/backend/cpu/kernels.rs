//! The kernels of one instruction set, as a table of functions.
//!
//! [`Kernels::SCALAR`] is the definition. A specialised table overrides what it has and inherits
//! the rest, and the tests compare the table of every [`Isa::available`] with the scalar one.

use std::sync::OnceLock;

use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::format::codebook::Codebook;
use crate::quant::blockwise::{self, Blocks};
use crate::quant::stats::{self, Stats};
use crate::quant::{nested, rowwise};

#[cfg(target_arch = "aarch64")]
use super::neon::{self, Lanes4, Neon, NeonBf16};
#[cfg(target_arch = "x86_64")]
use super::{
    avx2::{self, Avx2, Lanes8},
    avx512::{self, Avx512, Avx512Ext, Lanes16},
    vbmi::{self, Vbmi},
};

/// An element type that every instruction set of this build can load and store.
#[cfg(target_arch = "x86_64")]
pub trait Lanes: Element + Lanes8 + Lanes16 {}
#[cfg(target_arch = "x86_64")]
impl<T: Element + Lanes8 + Lanes16> Lanes for T {}

/// An element type that every instruction set of this build can load and store.
#[cfg(target_arch = "aarch64")]
pub trait Lanes: Element + Lanes4 {}
#[cfg(target_arch = "aarch64")]
impl<T: Element + Lanes4> Lanes for T {}

/// An element type that every instruction set of this build can load and store.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub trait Lanes: Element {}
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
impl<T: Element> Lanes for T {}

/// Entry points for one element type; each is documented at its scalar definition.
#[derive(Clone, Copy)]
pub struct Kernels<T: 'static> {
    /// The instruction set.
    pub isa: Isa,
    /// [`blockwise::quantize4`]
    pub quantize4: fn(&Codebook<16>, Blocks, &[T], &mut [u8], &mut [f32]) -> bool,
    /// [`blockwise::quantize8`]
    pub quantize8: fn(&Codebook<256>, Blocks, &[T], &mut [u8], &mut [f32]) -> bool,
    /// [`blockwise::dequantize4`]
    pub dequantize4: fn(&[f32; 16], usize, &[u8], &[f32], &mut [T]),
    /// [`blockwise::dequantize8`]
    pub dequantize8: fn(&[f32; 256], usize, &[u8], &[f32], &mut [T]),
    /// [`rowwise::quantize_row`]
    pub quantize_row: fn(&[T], &mut [i8]) -> f32,
    /// [`rowwise::dequantize_row`]
    pub dequantize_row: fn(&[i8], f32, &mut [T]),
    /// [`nested::decode_block`]
    pub decode_nested: fn(&[u8], f32, f32, &mut [f32]),
    /// [`blockwise::e8m0_decode_all`]
    pub decode_e8m0: fn(&[u8], &mut [f32]),
    /// [`stats::compare`]
    pub compare: fn(&[T], &[f32], usize, &[f32], &mut Stats),
}

impl<T: Lanes> Kernels<T> {
    /// The definition.
    pub const SCALAR: Self = Self {
        isa: Isa::Scalar,
        quantize4: blockwise::quantize4::<T>,
        quantize8: blockwise::quantize8::<T>,
        dequantize4: blockwise::dequantize4::<T>,
        dequantize8: blockwise::dequantize8::<T>,
        quantize_row: rowwise::quantize_row::<T>,
        dequantize_row: rowwise::dequantize_row::<T>,
        decode_nested: nested::decode_block,
        decode_e8m0: blockwise::e8m0_decode_all,
        compare: stats::compare::<T>,
    };

    /// The kernels of an instruction set.
    pub fn of(isa: Isa) -> Self {
        match isa {
            Isa::Scalar => Self::SCALAR,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(proof) => neon::kernels(proof),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonBf16(proof) => Self { isa, ..neon::kernels(proof.base()) },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(proof) => avx2::kernels(proof),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(proof) => avx512::kernels(proof),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Ext(proof) => match Vbmi::detect(proof.base()) {
                Some(proof) => Self { isa, ..vbmi::kernels(proof) },
                None => Self { isa, ..avx512::kernels(proof.base()) },
            },
        }
    }
}

/// An instruction set that this machine has: holding one is the proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust.
    Scalar,
    /// NEON.
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    /// BF16 beside everything of [`Isa::Neon`].
    #[cfg(target_arch = "aarch64")]
    NeonBf16(NeonBf16),
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-512 F, BW, DQ and VL, beside everything of [`Isa::Avx2`].
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// AVX512-BF16, VNNI and VBMI, beside everything of [`Isa::Avx512`].
    #[cfg(target_arch = "x86_64")]
    Avx512Ext(Avx512Ext),
}

impl Isa {
    /// What this machine can run, slowest first.
    pub fn available() -> Vec<Isa> {
        let scalar = [Some(Isa::Scalar)];
        #[cfg(target_arch = "aarch64")]
        let vectors = [Neon::detect().map(Isa::Neon), NeonBf16::detect().map(Isa::NeonBf16)];
        #[cfg(target_arch = "x86_64")]
        let vectors = [
            Avx2::detect().map(Isa::Avx2),
            Avx512::detect().map(Isa::Avx512),
            Avx512Ext::detect().map(Isa::Avx512Ext),
        ];
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let vectors = [];
        scalar.into_iter().chain(vectors).flatten().collect()
    }

    /// The name, as `NYBBLE_CPU` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(_) => "neon-base",
            #[cfg(target_arch = "aarch64")]
            Isa::NeonBf16(_) => "neon",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512-base",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Ext(_) => "avx512",
        }
    }

    /// The name without what a processor may lack beside it: `NYBBLE_CPU=avx512` takes the best
    /// that there is of AVX-512, and `neon` of NEON.
    const fn family(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) | Isa::Avx512Ext(_) => "avx512",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(_) | Isa::NeonBf16(_) => "neon",
            other => other.name(),
        }
    }

    /// The fastest available, or the one named by the environment variable `NYBBLE_CPU`.
    pub fn chosen() -> Result<Isa> {
        static CHOSEN: OnceLock<Isa> = OnceLock::new();
        if let Some(isa) = CHOSEN.get() {
            return Ok(*isa);
        }
        let available = Self::available();
        let fastest = available.last().copied().unwrap_or(Isa::Scalar);
        let isa = match std::env::var("NYBBLE_CPU") {
            Ok(name) if !name.is_empty() => {
                let named = |isa: &Isa| isa.name() == name || isa.family() == name;
                available.iter().rev().copied().find(named).ok_or_else(|| {
                    Error::unknown("NYBBLE_CPU", &name, available.iter().map(|isa| isa.name()))
                })?
            }
            _ => fastest,
        };
        Ok(*CHOSEN.get_or_init(|| isa))
    }
}
