//! Quantization of neural network weights to eight and four bits.
//!
//! A weight is cut into blocks; each block keeps its largest magnitude (`absmax`) and one small
//! code per element, the index of the nearest value in a table. Everything here is built on
//! three ideas:
//!
//! - [`format`] is one table: a format is a row, and no code compares names.
//! - [`quant`] is the definition, in scalar code without tricks. [`backend`] is the same
//!   arithmetic made fast, and the tests compare the two bit for bit.
//! - [`checkpoint`] reads and writes files a piece at a time, so that a model need not fit in
//!   memory.
//!
//! ```
//! use nybble::backend::cpu::{Cpu, Quantizer};
//! use nybble::{format::Format, tensor::{Layout, QTensor, Scales}};
//!
//! let x: Vec<f32> = (0..128).map(|i| (i as f32 * 0.1).sin()).collect();
//! let layout = Layout::new(Format::Nf4, &[2, 64], Some(64), false)?;
//! let (mut packed, mut absmax) = (vec![0; layout.packed], vec![0.0; layout.scales]);
//! let cpu = Cpu::new(None)?;
//! cpu.quantize(&layout, Quantizer::default(), &x, &mut packed, &mut absmax)?;
//!
//! let q = QTensor::new(layout, &packed, Scales::Plain(&absmax))?;
//! let mut again = vec![0f32; 128];
//! cpu.dequantize(&q, &mut again)?;
//! assert!(x.iter().zip(&again).all(|(a, b)| (a - b).abs() < 0.16));
//! # Ok::<(), nybble::error::Error>(())
//! ```

pub mod backend;
pub mod checkpoint;
pub mod dtype;
pub mod error;
pub mod format;
pub mod pack;
#[cfg(feature = "python")]
mod python;
pub mod quant;
pub mod tensor;
