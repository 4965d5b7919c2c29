//! What an instruction set does for products of integers.

use crate::backend::cpu::Lanes;

/// Vectors of [`Dot::LANES`] lanes of 32 bits: an i32, an f32, or four bytes. A value of the
/// implementing type proves that the machine has the instructions.
pub trait Dot: Copy {
    /// Lanes of integers.
    type Ints: Copy;
    /// Lanes of f32.
    type Floats: Copy;
    /// Lanes of a vector; at most 16.
    const LANES: usize;
    /// Rows of activations that are multiplied at a time; at most 6.
    const TILE: usize;
    /// What is added to the bytes of a weight before they are multiplied, so that they have no
    /// sign: 128, or 0 where signs need no help.
    const BIAS: u8;

    /// Loads `4 * LANES` bytes.
    ///
    /// # Safety
    /// - That many bytes can be read.
    unsafe fn load(self, at: *const u8) -> Self::Ints;
    /// Stores `4 * LANES` bytes.
    ///
    /// # Safety
    /// - That many bytes can be written.
    unsafe fn store(self, x: Self::Ints, at: *mut u8);
    /// The same four bytes in every lane.
    ///
    /// # Safety
    /// - Four bytes can be read.
    unsafe fn broadcast(self, at: *const i8) -> Self::Ints;
    /// Loads `LANES` numbers.
    ///
    /// # Safety
    /// - That many can be read.
    unsafe fn floats(self, at: *const f32) -> Self::Floats;
    /// Stores `LANES` numbers.
    ///
    /// # Safety
    /// - That many can be written.
    unsafe fn store_floats(self, x: Self::Floats, at: *mut f32);
    /// Rounds to `T`, nearest, ties to even.
    ///
    /// # Safety
    /// - `LANES` elements can be written.
    unsafe fn write<T: Lanes>(self, x: Self::Floats, at: *mut T);
    /// `count` (1, 2 or 4) numbers, each in as many neighbouring lanes.
    ///
    /// # Safety
    /// - `count` numbers can be read.
    unsafe fn spread(self, at: *const f32, count: usize) -> Self::Floats;

    /// The same number in every lane.
    fn splat(self, x: f32) -> Self::Floats;
    /// The same number in every lane.
    fn splat_int(self, x: i32) -> Self::Ints;
    /// `a * b + c`
    fn fma(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// The products of floats.
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// Nearest floats.
    fn to_floats(self, x: Self::Ints) -> Self::Floats;
    /// The sum of the lanes.
    fn sum(self, x: Self::Floats) -> f32;
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
    /// Lane j of vector i becomes lane i of vector j, for the first `LANES` vectors.
    fn transpose(self, rows: &mut [Self::Ints; 16]);
    /// Asks for the cache line at an address, which need not exist.
    fn prefetch(self, at: *const u8);
}
