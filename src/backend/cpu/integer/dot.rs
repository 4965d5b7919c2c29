//! What an instruction set does for products of integers.

use crate::backend::cpu::product::Vector;

/// Vectors of integers beside those of f32: each lane is an i32 or four bytes. There are at most 16
/// lanes.
pub trait Dot: Vector {
    /// A vector.
    type Ints: Copy;
    /// Rows of activations for whose products, two vectors each, there are registers, with as many
    /// sums of f32 beside; at most 6.
    const TILE: usize;
    /// The same without counting the sums of f32, where two such tiles do better than three; at
    /// most 8.
    const HIGH: usize;
    /// What is added to the bytes of a weight before they are multiplied, so that they have no
    /// sign: 128, or 0 where signs need no help.
    const BIAS: u8;

    /// Loads `4 * LANES` bytes.
    ///
    /// # Safety
    /// - That many bytes can be read.
    unsafe fn ints(self, at: *const u8) -> Self::Ints;
    /// Stores `4 * LANES` bytes.
    ///
    /// # Safety
    /// - That many bytes can be written.
    unsafe fn store_ints(self, x: Self::Ints, at: *mut u8);
    /// The same four bytes in every lane.
    ///
    /// # Safety
    /// - Four bytes can be read.
    unsafe fn broadcast(self, at: *const i8) -> Self::Ints;
    /// `BLOCKS` (1, 2 or 4) numbers, each in as many neighbouring lanes.
    ///
    /// # Safety
    /// - `BLOCKS` numbers can be read.
    unsafe fn spread<const BLOCKS: usize>(self, at: *const f32) -> Self::F;

    /// The same number in every lane.
    fn splat_int(self, x: i32) -> Self::Ints;
    /// Nearest floats.
    fn to_floats(self, x: Self::Ints) -> Self::F;
    /// The wrapping sum of the lanes.
    fn sum_ints(self, x: Self::Ints) -> i32;

    /// `sum` plus, in each lane, the products of four biased weights and four activations, neither
    /// of which is an activation of -128.
    fn dot(self, sum: Self::Ints, weights: Self::Ints, x: Self::Ints) -> Self::Ints;
    /// Adds the bias to signed bytes.
    fn biased(self, x: Self::Ints) -> Self::Ints;
    /// Takes a table of sixteen integers.
    fn table(self, values: &[i8; 16]) -> Self::Ints;
    /// The biased integers of the high halves and of the low halves of packed bytes.
    fn lookup(self, table: Self::Ints, packed: Self::Ints) -> [Self::Ints; 2];
    /// Sixteen bytes of each of `LANES` rows that lie `stride` apart: lane r of vector i is dword i
    /// of row r.
    ///
    /// # Safety
    /// - That many bytes can be read from each row.
    unsafe fn columns(self, rows: *const u8, stride: usize) -> [Self::Ints; 4];
    /// Lane j of vector i becomes lane i of vector j, for the first `LANES` vectors.
    fn exchange(self, rows: &mut [Self::Ints; 16]);
}
