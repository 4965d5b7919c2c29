//! The kernels by name, their grids, and launching one.

use std::ffi::{CString, c_void};
use std::marker::PhantomData;

use super::device::Cuda;
use super::params::{self, Params};
use crate::dtype::Dtype;
use crate::error::{DeviceProblem, Result};

/// A kernel for some element types, and the struct that it takes.
#[derive(Debug)]
pub struct Family<P> {
    index: usize,
    params: PhantomData<fn(P)>,
}

/// Name, element types (none: its name has no type), threads of a block and the bytes of shared
/// memory that a block is given beyond those that the kernel declares.
struct Row {
    name: &'static str,
    dtypes: &'static [Dtype],
    block: u32,
    shared: u32,
}

/// For [`LINEAR4_MID`]: a table of 256 words for each lane, and two stages of 128 rows of activations
/// and 64 columns of them.
const MID_SHARED: u32 = 256 * 32 * 4 + 2 * 128 * 64 * 2;

const ALL: &[Dtype] = &Dtype::ALL;
const HALF: &[Dtype] = &[Dtype::F16, Dtype::BF16];

macro_rules! families {
    ($( $name:ident: $params:ident = $text:literal, $dtypes:expr, $block:literal $(+ $shared:ident)?; )+) => {
        #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
        enum Index { $($name),+ }
        const ROWS: &[Row] = &[ $( Row {
            name: $text,
            dtypes: $dtypes,
            block: $block,
            shared: 0 $(+ $shared)?,
        } ),+ ];
        $(
            #[doc = concat!("`", $text, "`")]
            pub const $name: Family<params::$params> =
                Family { index: Index::$name as usize, params: PhantomData };
        )+
    };
}

families! {
    DEQUANTIZE4: Dequantize4 = "dequantize4", ALL, 256;
    QUANTIZE4: Quantize4 = "quantize4", ALL, 256;
    DEQUANTIZE8: Dequantize8 = "dequantize8", ALL, 256;
    QUANTIZE8: Quantize8 = "quantize8", ALL, 256;
    MEAN: Mean = "mean", &[Dtype::F32], 1024;
    LINEAR4_SMALL8: Linear4 = "linear4_small8", HALF, 256;
    LINEAR4_SMALL16: Linear4 = "linear4_small16", HALF, 256;
    LINEAR4_SMALL32: Linear4 = "linear4_small32", HALF, 256;
    LINEAR4_MID: Linear4 = "linear4_mid", HALF, 256 + MID_SHARED;
    LINEAR4_GEMV: Linear4 = "linear4_gemv", ALL, 256;
    LINEAR8_GEMV: Linear8 = "linear8_gemv", ALL, 256;
    INTEGER_ROWS: IntegerRows = "integer_rows", ALL, 256;
    INTEGER_LINEAR4: IntegerLinear4 = "integer_linear4", ALL, 256;
    COMPARE: Compare = "compare", ALL, 256;
    INT8_FLAGS: Int8Flags = "int8_flags", ALL, 256;
    INT8_OUTLIERS: Int8Outliers = "int8_outliers", &[], 1024;
    INT8_ROWS: Int8Rows = "int8_rows", ALL, 256;
    INT8_DEQUANTIZE: Int8Dequantize = "int8_dequantize", ALL, 256;
    INT8_LINEAR_SMALL: Int8Linear = "int8_linear_small", ALL, 256;
    INT8_FINISH: Int8Linear = "int8_finish", ALL, 256;
}

/// The place of a kernel among those of a module: one for each family and element type.
fn slot(index: usize, dtype: Option<Dtype>) -> usize {
    index * Dtype::ALL.len() + dtype.map_or(0, |dtype| params::dtype_number(dtype) as usize)
}

fn name(row: &Row, dtype: Option<Dtype>) -> String {
    match dtype {
        Some(Dtype::F32) => format!("{}_f32", row.name),
        Some(Dtype::F16) => format!("{}_f16", row.name),
        Some(Dtype::BF16) => format!("{}_bf16", row.name),
        None => row.name.to_owned(),
    }
}

/// The number of slots.
pub const SLOTS: usize = ROWS.len() * Dtype::ALL.len();

/// A kernel to look for in a module.
pub struct Wanted {
    /// Where it belongs among those of a module.
    pub slot: usize,
    /// The name that it has there.
    pub name: CString,
    /// Bytes of shared memory that its launches must be allowed.
    pub shared: u32,
}

/// Every kernel.
pub fn kernels() -> impl Iterator<Item = Wanted> {
    ROWS.iter().enumerate().flat_map(|(index, row)| {
        let typed = row.dtypes.iter().copied().map(Some);
        let untyped = row.dtypes.is_empty().then_some(None);
        typed.chain(untyped).map(move |dtype| Wanted {
            slot: slot(index, dtype),
            // Names are typed in this file; none has a NUL.
            name: CString::new(name(row, dtype)).unwrap_or_default(),
            shared: row.shared,
        })
    })
}

/// Blocks of a grid in two dimensions. Kernels loop, so a grid that has no more blocks than a
/// device takes still covers everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    x: u32,
    y: u32,
}

impl Grid {
    /// The most blocks that a device takes along x and y.
    const MOST: (u64, u64) = (i32::MAX as u64, 65_535);

    /// A block for each `each` of `count`.
    pub fn line(count: u64, each: u64) -> Self {
        Self::plane((count, each), (1, 1))
    }

    /// Blocks for (count, each) along x and along y.
    pub fn plane(x: (u64, u64), y: (u64, u64)) -> Self {
        let blocks = |(count, each): (u64, u64), most: u64| {
            count.div_ceil(each.max(1)).clamp(1, most) as u32
        };
        Self { x: blocks(x, Self::MOST.0), y: blocks(y, Self::MOST.1) }
    }
}

impl Cuda {
    /// Launches the kernel of a family for an element type.
    pub(super) fn launch<P: Params>(
        &self,
        family: &Family<P>,
        dtype: Option<Dtype>,
        grid: Grid,
        mut params: P,
    ) -> Result<()> {
        let row = &ROWS[family.index];
        let Some(function) = self.function(slot(family.index, dtype)) else {
            let remedy = "multiply in float16 or float32 there, or use the CPU";
            return Err(DeviceProblem::NoKernel { kernel: name(row, dtype), remedy }.into());
        };
        let driver = self.driver();
        let _current = self.enter()?;
        let argument = (&raw mut params).cast::<c_void>();
        // SAFETY: the function was found by the name of this family, which takes a `P`; whoever
        // made the slices whose addresses are in it vouched for them; the context was entered.
        let result = unsafe {
            let block = (row.block, row.shared);
            driver.launch(function, (grid.x, grid.y), block, self.stream(), argument)
        };
        if result == super::driver::code::SUCCESS {
            return Ok(());
        }
        let (error, text) = driver.describe(result);
        let kernel = name(row, dtype);
        Err(DeviceProblem::Launch { kernel, code: result, name: error, text }.into())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn grids_of_huge_tensors_stay_within_what_a_device_takes() {
        assert_eq!(Grid::line(8193, 8192), Grid { x: 2, y: 1 });
        assert_eq!(Grid::line(0, 16), Grid { x: 1, y: 1 });
        assert_eq!(Grid::line(1 << 60, 8), Grid { x: i32::MAX as u32, y: 1 });
        assert_eq!(Grid::plane((9, 8), (1 << 40, 4)), Grid { x: 2, y: 65_535 });
    }

    #[test]
    fn every_kernel_has_a_slot_of_its_own() {
        let slots: BTreeSet<_> = kernels().map(|kernel| kernel.slot).collect();
        assert_eq!(slots.len(), kernels().count());
        assert!(slots.iter().all(|slot| *slot < SLOTS));
        let names: Vec<_> = kernels().map(|kernel| kernel.name.into_string().unwrap()).collect();
        for expected in ["dequantize4_bf16", "mean_f32", "linear4_small32_f16", "int8_outliers"] {
            assert!(names.iter().any(|name| name == expected), "{names:?}");
        }
        assert!(!names.iter().any(|name| name == "linear4_small8_f32"));
    }
}
