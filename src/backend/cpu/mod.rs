//! The CPU: chooses the kernels once and splits tensors over threads.
//!
//! Work is cut into runs of whole blocks (or rows); every run is done by one kernel call, so a
//! result does not depend on the number of threads.

mod aligned;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod decode;
mod features;
pub mod fresh;
pub mod integer;
pub mod kernels;
#[cfg(target_arch = "aarch64")]
mod neon;
mod openmp;
mod product;
mod quantize;
mod scales;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod simd;
pub mod threads;
#[cfg(target_arch = "x86_64")]
mod vbmi;

pub use features::features;
pub use kernels::{Isa, Kernels, Lanes};
pub use quantize::{Found, Quantizer};

use crate::error::Result;
use crate::quant::stats::RUN;

/// The CPU backend.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    isa: Isa,
    threads: usize,
}

impl Cpu {
    /// The fastest kernels of this machine, or those that `NYBBLE_CPU` names, on `threads`
    /// threads (`None`: see [`threads::default_threads`]).
    pub fn new(threads: Option<usize>) -> Result<Self> {
        let threads = threads.filter(|threads| *threads > 0);
        Ok(Self { isa: Isa::chosen()?, threads: threads.unwrap_or_else(threads::default_threads) })
    }

    /// Given kernels on given threads.
    pub const fn with(isa: Isa, threads: usize) -> Self {
        Self { isa, threads }
    }

    /// The kernels in use.
    pub const fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads that a tensor of `elements` is worth.
    const fn threads_for(&self, elements: usize) -> usize {
        if elements <= RUN { 1 } else { self.threads }
    }
}
