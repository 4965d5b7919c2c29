//! The floating point types that weights come in and go out as.

use std::fmt;

use bytemuck::Pod;
use half::{bf16, f16};

use crate::error::{Error, Result};

/// A floating point element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of single precision.
    BF16,
}

impl Dtype {
    /// All element types.
    pub const ALL: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

    /// The name that torch and bitsandbytes files use, for example `bfloat16`.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
        }
    }

    /// The short name of the format tables, for example `bf16`.
    pub const fn short_name(self) -> &'static str {
        match self {
            Dtype::F32 => "fp32",
            Dtype::F16 => "fp16",
            Dtype::BF16 => "bf16",
        }
    }

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
        }
    }

    /// Finds a type by its torch name or its short name.
    ///
    /// ```
    /// use nybble::dtype::Dtype;
    /// assert_eq!(Dtype::parse("bfloat16").unwrap(), Dtype::parse("bf16").unwrap());
    /// assert!(Dtype::parse("float17").is_err());
    /// ```
    pub fn parse(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|dtype| dtype.name() == name || dtype.short_name() == name)
            .ok_or_else(|| Error::unknown("dtype", name, Self::ALL.map(Self::name)))
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A Rust type behind a [`Dtype`]. All arithmetic happens in `f32`; storing rounds once, to
/// nearest with ties to even.
pub trait Element: sealed::Sealed + Pod + Default + Send + Sync + PartialEq + fmt::Debug {
    /// The run-time name of this type.
    const DTYPE: Dtype;
    /// Widens without loss.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(x: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::BF16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

/// Names the Rust type behind a run-time [`Dtype`]: `with_element!(dtype, T => f::<T>(x))`.
#[macro_export]
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::Dtype::F32 => {
                type $T = f32;
                $body
            }
            $crate::dtype::Dtype::F16 => {
                type $T = ::half::f16;
                $body
            }
            $crate::dtype::Dtype::BF16 => {
                type $T = ::half::bf16;
                $body
            }
        }
    };
}
