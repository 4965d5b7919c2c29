//! Kernels on CUDA devices, launched through the driver on the caller's stream.
//!
//! torch owns the memory, the stream and (with us) the primary context of each device. A launch
//! allocates nothing, waits for nothing and reads nothing back, so it can be captured in a graph.
//! The kernels are `cuda/*.cu`; `cuda/kernels.md` says how each is launched.
//!
//! - [`driver`]: the functions of the driver, and whether there is one. Asked at first use, never
//!   at import.
//! - [`archive`], [`image`], [`nvrtc`], [`cache`]: which compiled kernels a device gets.
//! - [`device`]: a device's context and its loaded kernels.
//! - [`params`]: what each kernel is given. [`launch`]: kernels by name, grids.
//! - [`tensor`], [`blocks`], [`product`], [`rows`], [`integer`], [`compare`]: the operations.

pub mod archive;
pub mod blocks;
pub mod cache;
pub mod compare;
pub mod device;
pub mod driver;
mod embedded;
pub mod image;
pub mod integer;
pub mod launch;
pub mod memory;
pub mod nvrtc;
pub mod params;
pub mod product;
pub mod rows;
pub mod tensor;

pub use device::{Cuda, warmup};
pub use memory::DeviceSlice;
