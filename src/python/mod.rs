//! The extension module `nybble._core`: names only. The work is in the modules below it, and
//! those only take arguments apart, check them and call the core.

// PyO3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

mod checkpoint;
mod convert;
mod cuda;
mod error;
mod integer;
mod memory;
mod ops;
mod products;
mod quant_state;

use pyo3::prelude::*;

/// Rust core of nybble. Private: use the package `nybble`.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::checkpoint::Checkpoint;
    #[pymodule_export]
    use super::convert::{Rules, dequantize_checkpoint, quantization_config, quantize_checkpoint};
    #[pymodule_export]
    use super::cuda::{
        CudaWeight, codebook_tables, cuda_available, cuda_devices, cuda_driver_present,
        cuda_error_stats, cuda_int8_linear, cuda_int8_outliers, cuda_int8_rows, cuda_most_rows,
        cuda_quantize, cuda_warmup, refuse_nonfinite,
    };
    #[pymodule_export]
    use super::integer::integers;
    #[pymodule_export]
    use super::ops::{
        cpu, cpu_features, default_threads, dequantize, dequantize_rows, error_stats, formats,
        layout, pack_codes, prefer_huge_pages, quantize, unpack_codes,
    };
    #[pymodule_export]
    use super::products::Prepared;
    #[pymodule_export]
    use super::quant_state::{parse_quant_state, quant_state_key, render_quant_state};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
