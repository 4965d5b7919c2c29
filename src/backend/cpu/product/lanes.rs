//! What the product kernels ask of an instruction set.
//!
//! Everything here is inlined into entry points that enable the instruction set (`entry_points!`);
//! nothing may become a function of its own, closures included.

use super::super::Lanes;

/// Vectors of `LANES` f32. A value of the implementing type proves that the machine has the
/// instructions.
pub trait Vector: Copy {
    /// Numbers in a vector.
    const LANES: usize;
    /// A vector.
    type F: Copy;

    /// The same number in every lane.
    fn splat(self, x: f32) -> Self::F;
    /// `LANES` numbers.
    ///
    /// # Safety
    /// `LANES` numbers can be read at `from`.
    unsafe fn load(self, from: *const f32) -> Self::F;
    /// Writes `LANES` numbers.
    ///
    /// # Safety
    /// `LANES` numbers can be written at `to`.
    unsafe fn store(self, x: Self::F, to: *mut f32);
    /// `LANES` numbers of any type, widened.
    ///
    /// # Safety
    /// `LANES` elements can be read at `from`.
    unsafe fn load_as<T: Lanes>(self, from: *const T) -> Self::F;
    /// `LANES` signed bytes, as numbers.
    ///
    /// # Safety
    /// `LANES` bytes can be read at `from`.
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const i8) -> Self::F {
        let mut wide = [0f32; 16];
        for (i, wide) in wide.iter_mut().take(Self::LANES).enumerate() {
            // SAFETY: the caller's.
            *wide = f32::from(unsafe { from.add(i).read() });
        }
        // SAFETY: no machine has more than sixteen lanes.
        unsafe { self.load(wide.as_ptr()) }
    }
    /// Rounds to nearest, ties to even.
    ///
    /// # Safety
    /// `LANES` elements can be written at `to`.
    unsafe fn store_as<T: Lanes>(self, x: Self::F, to: *mut T);
    /// Sums.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// Products.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once where the machine can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The sum of all lanes.
    fn sum(self, x: Self::F) -> f32;
    /// Transposes a square of `LANES` by `LANES` four-byte words; strides are in words.
    ///
    /// # Safety
    /// Every word of both squares is inside an allocation, and they do not overlap.
    unsafe fn transpose(self, from: *const u32, stride: usize, to: *mut u32, to_stride: usize);
    /// Asks for the cache line at `address`, which need not exist.
    fn prefetch(self, address: *const u8);
    /// The same, but only as near as the second-level cache.
    fn prefetch_far(self, address: *const u8);
}

/// Dot products of packed four-bit codes with prepared activations.
///
/// A chunk is `LANES` words of four bytes, so `8 * LANES` codes. Each of `STEPS` steps takes
/// `8 / STEPS` codes out of every word: in step `s` those of elements `8l + i * STEPS + (s ^ 1)`
/// for `i` below `8 / STEPS`, since the first element of a byte is in its high half.
pub trait Dot: Vector {
    /// Steps to use all codes of a word; as many units of four bytes hold the activations that
    /// belong to them.
    const STEPS: usize;
    /// Whether scales are applied to sums, because a scaled weight does not fit an `X`. There
    /// must be registers for two kinds of sums.
    const LATE: bool;
    /// Whether the sixteen values have to be numbers of bf16.
    const SHORT: bool;
    /// Rows of the weight that meet few rows of activations together, if these stay near.
    const TOGETHER: usize = 1;
    /// An activation, or a dense weight: f32, or half as wide.
    type X: Lanes;
    /// A chunk of codes.
    type Words: Copy;
    /// The sixteen values.
    type Table: Copy;
    /// Decoded values, or activations, of one step.
    type Values: Copy;

    /// Puts a chunk of activations in the order in which steps take them.
    #[inline(always)]
    fn arrange(x: &[Self::X], out: &mut [Self::X]) {
        let per = CODES / Self::STEPS;
        let (words, _) = x.as_chunks::<CODES>();
        for (step, out) in out.chunks_exact_mut(words.len() * per).enumerate() {
            let place = step ^ 1; // the first of a pair is in the high half of its byte
            for (word, out) in words.iter().zip(out.chunks_exact_mut(per)) {
                for (i, out) in out.iter_mut().enumerate() {
                    *out = word[i * Self::STEPS + place];
                }
            }
        }
    }
    /// Takes a codebook.
    fn table(self, values: &[f32; 16]) -> Self::Table;
    /// A chunk.
    ///
    /// # Safety
    /// `4 * LANES` bytes can be read at `from`.
    unsafe fn words(self, from: *const u8) -> Self::Words;
    /// The codes of the step behind `step`.
    fn next(self, words: Self::Words, step: usize) -> Self::Words;
    /// Looks up the codes of this step.
    fn decode(self, table: Self::Table, words: Self::Words) -> Self::Values;
    /// Activations of one step.
    ///
    /// # Safety
    /// `LANES * 8 / STEPS` activations can be read at `from`.
    unsafe fn activations(self, from: *const Self::X) -> Self::Values;
    /// The same unit in every lane.
    ///
    /// # Safety
    /// Four bytes can be read at `from`.
    unsafe fn unit(self, from: *const u32) -> Self::Values;
    /// Writes `LANES` units.
    ///
    /// # Safety
    /// `LANES` units can be written at `to`.
    unsafe fn store_values(self, values: Self::Values, to: *mut u32);
    /// Decoded values times the scales of their lanes; unchanged where scales come late.
    fn scaled(self, values: Self::Values, scales: Self::F) -> Self::Values;
    /// Rows of activations from which on even weights whose scales come late are scaled and
    /// rounded to an `X`, once for all rows, because it takes less time than to scale all sums.
    const ROUNDED_FROM: usize = usize::MAX;
    /// Writes the units of a chunk times the scales of their lanes, rounded once to `X`, in the
    /// order in which their elements lie in a row; `apart` is how far one is from the next. The
    /// codebook is given as it is and as a table.
    ///
    /// # Safety
    /// `LANES` units can be written at `to` and at each of the other places.
    #[inline(always)]
    unsafe fn store_scaled(
        self,
        _values: &[f32; 16],
        table: Self::Table,
        mut words: Self::Words,
        scales: Self::F,
        to: *mut u32,
        apart: usize,
    ) {
        for step in 0..Self::STEPS {
            let values = self.scaled(self.decode(table, words), scales);
            // SAFETY: the caller's. The first of a pair is in the high half of its byte.
            unsafe { self.store_values(values, to.add((step ^ 1) * apart)) };
            words = self.next(words, step);
        }
    }
    /// `a * b`, added up within a word.
    fn first(self, a: Self::Values, b: Self::Values) -> Self::F;
    /// `sum + a * b`, added up within a word.
    fn dot(self, sum: Self::F, a: Self::Values, b: Self::Values) -> Self::F;
    /// The scales of a chunk that `BLOCKS` blocks share equally, in the lanes of their words.
    ///
    /// # Safety
    /// `BLOCKS` numbers can be read at `from`.
    unsafe fn scales<const BLOCKS: usize>(self, from: *const f32) -> Self::F;
    /// The same where only the first blocks are there; zeros for the others.
    #[inline(always)]
    fn first_scales<const BLOCKS: usize>(self, scales: &[f32]) -> Self::F {
        let mut all = [0f32; BLOCKS];
        for (all, scale) in all.iter_mut().zip(scales) {
            *all = *scale; // one by one: a call to copy them would spill every register
        }
        // SAFETY: these are as many.
        unsafe { self.scales::<BLOCKS>(all.as_ptr()) }
    }
}

/// Codes of a word of four bytes.
pub const CODES: usize = 8;

/// Rows of the weight in a panel.
pub const fn panel_rows<D: Dot>() -> usize {
    2 * D::LANES
}
