//! Where the work is done. Today: the CPU.

pub mod cpu;
