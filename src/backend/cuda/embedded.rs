//! What the build put into this library: the sources of the kernels, and their archive.

include!(concat!(env!("OUT_DIR"), "/cuda_kernels.rs"));
