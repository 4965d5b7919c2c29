//! Memory that Python owns: (address, number of elements, dtype) becomes a checked slice.
//!
//! Torch and numpy allocate; Rust reads and fills. The package's own modules (`_memory.py`) are
//! the only callers: they keep the tensor alive during the call and pass contiguous memory of the
//! CPU, or of the CUDA device that they name.
//! Here dtype, null and alignment are checked again; that the address is valid cannot be.

use bytemuck::Pod;
use pyo3::prelude::*;

use crate::backend::cuda::DeviceSlice;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// Contiguous memory of a torch tensor or numpy array.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    address: usize,
    elements: usize,
    kind: Kind,
}

/// A type of elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // torch's names, in short
pub enum Kind {
    F32,
    F16,
    BF16,
    U8,
    I8,
    I32,
    I64,
}

const KINDS: [(&str, Kind); 7] = [
    ("float32", Kind::F32),
    ("float16", Kind::F16),
    ("bfloat16", Kind::BF16),
    ("uint8", Kind::U8),
    ("int8", Kind::I8),
    ("int32", Kind::I32),
    ("int64", Kind::I64),
];

/// An element type that memory can be read as.
pub trait Stored: Pod {
    /// Which it is.
    const KIND: Kind;
}

macro_rules! stored {
    ($($T:ty => $kind:ident),+) => { $( impl Stored for $T { const KIND: Kind = Kind::$kind; } )+ };
}
stored!(f32 => F32, half::f16 => F16, half::bf16 => BF16, u8 => U8, i8 => I8, i32 => I32, i64 => I64);

impl Kind {
    /// The name in torch.
    fn name(self) -> &'static str {
        KINDS.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| *name)
    }
}

impl<'py> FromPyObject<'_, 'py> for Memory {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let (address, elements, dtype): (usize, usize, &str) = object.extract()?;
        let kind = KINDS.iter().find(|(name, _)| *name == dtype).ok_or_else(|| Error::Dtype {
            what: "a tensor",
            got: dtype.to_owned(),
            allowed: "float32, float16, bfloat16, uint8, int8, int32, int64",
        })?;
        Ok(Self { address, elements, kind: kind.1 })
    }
}

impl Memory {
    /// The torch name of the element type.
    pub fn dtype(&self) -> &'static str {
        self.kind.name()
    }

    /// The floating point type, if the elements are of one.
    pub fn float(self) -> Option<Dtype> {
        match self.kind {
            Kind::F32 => Some(Dtype::F32),
            Kind::F16 => Some(Dtype::F16),
            Kind::BF16 => Some(Dtype::BF16),
            Kind::U8 | Kind::I8 | Kind::I32 | Kind::I64 => None,
        }
    }

    /// Where it is.
    pub fn address(self) -> usize {
        self.address
    }

    /// The memory as elements to read.
    pub fn slice<'a, T: Stored>(self) -> Result<&'a [T]> {
        let pointer = self.pointer::<T>()?;
        if self.elements == 0 {
            return Ok(&[]);
        }
        // SAFETY: the caller keeps `elements` initialized elements alive at this address for the
        // whole call; dtype, null and alignment were checked by `pointer`.
        Ok(unsafe { std::slice::from_raw_parts(pointer, self.elements) })
    }

    /// The memory as elements to fill.
    pub fn slice_mut<'a, T: Stored>(self) -> Result<&'a mut [T]> {
        let pointer = self.pointer::<T>()?;
        if self.elements == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as in `slice`; the caller allocated this tensor for this call, so nothing else
        // refers to it.
        Ok(unsafe { std::slice::from_raw_parts_mut(pointer, self.elements) })
    }

    /// Bytes to fill, whatever the element type.
    pub fn bytes_mut<'a>(self) -> Result<&'a mut [u8]> {
        let size = match self.kind {
            Kind::F32 | Kind::I32 => 4,
            Kind::F16 | Kind::BF16 => 2,
            Kind::U8 | Kind::I8 => 1,
            Kind::I64 => 8,
        };
        let elements = self
            .elements
            .checked_mul(size)
            .ok_or(Error::TooLarge { shape: vec![self.elements, size] })?;
        Self { elements, kind: Kind::U8, ..self }.slice_mut()
    }

    /// Memory of a CUDA device, as elements.
    pub fn on_device<T: Stored>(self) -> Result<DeviceSlice<T>> {
        self.check_dtype::<T>()?;
        // SAFETY: the package's own module (`cuda.py`) passes tensors of the device whose stream
        // it passes, and torch keeps memory from other uses until that stream has come so far.
        Ok(unsafe { DeviceSlice::from_raw(self.address as u64, self.elements) })
    }

    /// Memory of a CUDA device with codes of one byte, signed or not.
    pub fn codes_on_device(self) -> Result<DeviceSlice<u8>> {
        let kind = if self.kind == Kind::I8 { Kind::U8 } else { self.kind };
        Self { kind, ..self }.on_device()
    }

    fn check_dtype<T: Stored>(self) -> Result<()> {
        if self.kind == T::KIND {
            return Ok(());
        }
        let got = self.dtype().to_owned();
        Err(Error::Dtype { what: "this argument", got, allowed: T::KIND.name() })
    }

    fn pointer<T: Stored>(self) -> Result<*mut T> {
        self.check_dtype::<T>()?;
        let pointer = std::ptr::with_exposed_provenance_mut::<T>(self.address);
        if self.elements > 0 && (pointer.is_null() || !pointer.is_aligned()) {
            return Err(Error::Argument {
                what: "address of a tensor",
                got: format!("{:#x}", self.address),
                expected: format!("it must be aligned to {} bytes", align_of::<T>()),
            });
        }
        Ok(pointer)
    }
}
