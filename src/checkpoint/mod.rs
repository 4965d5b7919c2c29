//! Checkpoint files: reading what others wrote without trusting it, and writing what they read.
//!
//! [`safetensors`] is one file, [`shard`] the files of one model. Nothing that a file says is
//! believed before it is checked: a damaged or hostile file gives an error that names the file
//! and the tensor, never a panic and never an allocation that the file's own size does not
//! justify.

mod json;
pub mod safetensors;
pub mod shard;
