//! Where the work is done: the CPU, and CUDA devices.

pub mod cpu;
pub mod cuda;
