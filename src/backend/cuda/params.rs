//! What kernels are given: the structs of `cuda/params.h`, byte for byte.
//!
//! `tests/cuda_params.rs` compares every size and offset with what a C compiler says.

#![allow(missing_docs)] // The header documents the fields.

/// Device addresses.
pub type Address = u64;

/// Structs that kernels take by value.
pub trait Params: Copy + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

macro_rules! params {
    ($( $(#[$doc:meta])* struct $name:ident { $( $field:ident: $type:ty, )+ } )+) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug)]
            pub struct $name { $( pub $field: $type, )+ }
        )+

        /// (struct, its size, [(field, offset)]) of each.
        pub fn layouts() -> Vec<(&'static str, usize, Vec<(&'static str, usize)>)> {
            vec![ $( (
                stringify!($name),
                size_of::<$name>(),
                vec![ $( (stringify!($field), std::mem::offset_of!($name, $field)) ),+ ],
            ) ),+ ]
        }
    };
}

params! {
    /// Scales of blocks, in the form in which they are stored.
    struct Scales {
        absmax: Address,
        codes: Address,
        codebook: Address,
        nested_absmax: Address,
        offset: Address,
        log2_blocksize: u32,
        log2_nested_blocksize: u32,
    }
    /// Decodes a range of a tensor of four-bit codes.
    struct Dequantize4 {
        packed: Address,
        out: Address,
        first: u64,
        n: u64,
        scales: Scales,
        values: [f32; 16],
    }
    /// How the nearest of sixteen values is found.
    struct Encoder4 {
        step: f32,
        pivots: [f32; 32],
        below: [u8; 32],
        extra: [f32; 2],
        order: [u8; 16],
    }
    /// What becomes of NaN and infinity.
    struct NonFinite {
        first: Address,
        zero: u32,
        padding: u32,
    }
    /// Quantizes to four bits.
    struct Quantize4 {
        x: Address,
        packed: Address,
        scales: Address,
        n: u64,
        nonfinite: NonFinite,
        log2_blocksize: u32,
        scale: u32,
        encoder: Encoder4,
    }
    /// Decodes a codebook of 256.
    struct Dequantize8 {
        codes: Address,
        values: Address,
        absmax: Address,
        offset: Address,
        out: Address,
        n: u64,
        log2_blocksize: u32,
        padding: u32,
    }
    /// Quantizes blocks with a codebook of 256.
    struct Quantize8 {
        x: Address,
        subtract: Address,
        pivots: Address,
        order: Address,
        codes: Address,
        absmax: Address,
        n: u64,
        nonfinite: NonFinite,
        log2_blocksize: u32,
        padding: u32,
    }
    /// The offset of nested scales.
    struct Mean {
        x: Address,
        out: Address,
        n: u64,
    }
    /// Multiplies with a weight of four-bit codes.
    struct Linear4 {
        x: Address,
        packed: Address,
        bias: Address,
        y: Address,
        m: u64,
        n: u64,
        k: u64,
        scales: Scales,
        values: [f32; 16],
        bias_dtype: u32,
        tokens: u32,
        rows: u32,
        padding: u32,
    }
    /// Multiplies with a weight of byte codes.
    struct Linear8 {
        x: Address,
        codes: Address,
        values: Address,
        absmax: Address,
        bias: Address,
        y: Address,
        m: u64,
        n: u64,
        k: u64,
        log2_blocksize: u32,
        bias_dtype: u32,
    }
    /// Quantizes groups of activations to signed bytes.
    struct IntegerRows {
        x: Address,
        codes: Address,
        factors: Address,
        rows: u64,
        columns: u64,
        log2_group: u32,
        padding: u32,
    }
    /// Multiplies these with four-bit codes that stand for integers.
    struct IntegerLinear4 {
        codes: Address,
        factors: Address,
        packed: Address,
        bias: Address,
        y: Address,
        m: u64,
        n: u64,
        k: u64,
        scales: Scales,
        integers: [i8; 16],
        step: f32,
        log2_group: u32,
        bias_dtype: u32,
        padding: u32,
    }
    /// What a run of elements adds to statistics; kernels write it.
    #[derive(bytemuck::Pod, bytemuck::Zeroable)]
    struct RunStats {
        sums: [f64; 4],
        max_abs: f32,
        absmax_min: f32,
        absmax_max: f32,
        padding: u32,
        outliers: u64,
    }
    /// Compares decoded values with the original.
    struct Compare {
        x: Address,
        decoded: Address,
        out: Address,
        first: u64,
        n: u64,
        run: u64,
        block: u64,
        scales: Scales,
        outlier_factor: f32,
        padding: u32,
    }
    /// Columns of activations that are multiplied apart.
    struct Outliers {
        columns: Address,
        count: Address,
    }
    /// Marks columns with outliers.
    struct Int8Flags {
        x: Address,
        flags: Address,
        rows: u64,
        columns: u64,
        threshold: f32,
        padding: u32,
    }
    /// Lists the columns that are marked.
    struct Int8Outliers {
        flags: Address,
        columns: u64,
        outliers: Outliers,
    }
    /// Quantizes rows to signed bytes.
    struct Int8Rows {
        x: Address,
        flags: Address,
        codes: Address,
        absmax: Address,
        rows: u64,
        columns: u64,
        nonfinite: NonFinite,
    }
    /// Decodes rows of signed bytes.
    struct Int8Dequantize {
        codes: Address,
        absmax: Address,
        out: Address,
        rows: u64,
        columns: u64,
    }
    /// Multiplies signed bytes, or takes their sums, and puts scales, outliers and bias to it.
    struct Int8Linear {
        codes: Address,
        sums: Address,
        x_absmax: Address,
        weight: Address,
        absmax: Address,
        bias: Address,
        y: Address,
        x: Address,
        outliers: Outliers,
        m: u64,
        n: u64,
        k: u64,
        bias_dtype: u32,
        padding: u32,
    }
}

macro_rules! taken_by_kernels {
    ($($name:ident),+) => { $( impl sealed::Sealed for $name {} impl Params for $name {} )+ };
}
taken_by_kernels!(
    Dequantize4,
    Quantize4,
    Dequantize8,
    Quantize8,
    Mean,
    Linear4,
    Linear8,
    IntegerRows,
    IntegerLinear4,
    Compare,
    Int8Flags,
    Int8Outliers,
    Int8Rows,
    Int8Dequantize,
    Int8Linear
);

/// Scales are f32 (`SCALE_ABSMAX`).
pub const SCALE_ABSMAX: u32 = 0;
/// Scales are exponent bytes (`SCALE_E8M0`).
pub const SCALE_E8M0: u32 = 1;

/// How a dtype is named in a struct (`DTYPE_*`).
pub fn dtype_number(dtype: crate::dtype::Dtype) -> u32 {
    match dtype {
        crate::dtype::Dtype::F32 => 0,
        crate::dtype::Dtype::F16 => 1,
        crate::dtype::Dtype::BF16 => 2,
    }
}
