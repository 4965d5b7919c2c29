//! Checkpoint files: reading what others wrote without trusting it, and writing what they read.
//!
//! [`safetensors`] is one file, [`shard`] the files of one model, [`bitsandbytes`] the names and
//! [`quant_state`] the text that describe a quantized parameter, [`stored`] the check that they
//! agree, and [`open`] a whole model by parameter names. Nothing that a file says is believed
//! before it is checked: a damaged or hostile file gives an error that names the file and the
//! tensor, never a panic and never an allocation that the file's own size does not justify.

#![forbid(unsafe_code)]

pub mod bitsandbytes;
mod budget;
mod cast;
pub mod config;
pub mod convert;
mod destination;
mod entry;
mod experts;
mod job;
mod json;
pub mod names;
pub mod open;
pub mod plan;
mod problem;
pub mod quant_state;
pub mod report;
pub mod rules;
pub mod safetensors;
pub mod shard;
mod sidecars;
pub mod stored;
pub mod stream;
mod verify;
pub mod writer;

pub use open::{Checkpoint, Entry, Part};
pub use problem::Problem;
pub use stored::Damage;
pub use verify::{Row, Summary};
