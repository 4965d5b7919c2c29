//! Plain Rust: four f32 a vector.

use super::super::Lanes;
use super::lanes::{Dot, Vector};

/// No instruction set is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

/// Numbers in a vector.
const FOUR: usize = 4;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; FOUR] {
    [f(0), f(1), f(2), f(3)]
}

impl Vector for Portable {
    const LANES: usize = FOUR;
    type F = [f32; FOUR];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; FOUR]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::F {
        // SAFETY: the caller vouches for four numbers.
        unsafe { from.cast::<[f32; FOUR]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, x: Self::F, to: *mut f32) {
        // SAFETY: the caller vouches for four numbers.
        unsafe { to.cast::<[f32; FOUR]>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_as<T: Lanes>(self, from: *const T) -> Self::F {
        // SAFETY: the caller vouches for four elements.
        let x = unsafe { from.cast::<[T; FOUR]>().read_unaligned() };
        x.map(T::to_f32)
    }
    #[inline(always)]
    unsafe fn store_as<T: Lanes>(self, x: Self::F, to: *mut T) {
        // SAFETY: the caller vouches for four elements.
        unsafe { to.cast::<[T; FOUR]>().write_unaligned(x.map(T::from_f32)) }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        each(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        (x[0] + x[1]) + (x[2] + x[3])
    }
    #[inline(always)]
    unsafe fn transpose(self, from: *const u32, stride: usize, to: *mut u32, to_stride: usize) {
        for i in 0..FOUR {
            for j in 0..FOUR {
                // SAFETY: the caller vouches for both squares.
                unsafe { *to.add(j * to_stride + i) = *from.add(i * stride + j) };
            }
        }
    }
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
    #[inline(always)]
    fn prefetch_far(self, _: *const u8) {}
}

impl Dot for Portable {
    const STEPS: usize = 8;
    const LATE: bool = false;
    const SHORT: bool = false;
    const TOGETHER: usize = 2;
    type X = f32;
    type Words = [u32; FOUR];
    type Table = [f32; 16];
    type Values = [f32; FOUR];

    #[inline(always)]
    fn table(self, values: &[f32; 16]) -> [f32; 16] {
        *values
    }
    #[inline(always)]
    unsafe fn words(self, from: *const u8) -> [u32; FOUR] {
        // SAFETY: the caller vouches for sixteen bytes.
        unsafe { from.cast::<[u32; FOUR]>().read_unaligned() }.map(u32::from_le)
    }
    #[inline(always)]
    fn next(self, words: [u32; FOUR], _: usize) -> [u32; FOUR] {
        words.map(|word| word >> 4)
    }
    #[inline(always)]
    fn decode(self, table: [f32; 16], words: [u32; FOUR]) -> [f32; FOUR] {
        each(|i| table[(words[i] & 15) as usize])
    }
    #[inline(always)]
    unsafe fn activations(self, from: *const f32) -> [f32; FOUR] {
        // SAFETY: the caller's.
        unsafe { self.load(from) }
    }
    #[inline(always)]
    unsafe fn unit(self, from: *const u32) -> Self::Values {
        // SAFETY: the caller vouches for four bytes.
        [unsafe { from.cast::<f32>().read_unaligned() }; FOUR]
    }
    #[inline(always)]
    unsafe fn store_values(self, values: Self::Values, to: *mut u32) {
        // SAFETY: the caller's.
        unsafe { self.store(values, to.cast()) }
    }
    #[inline(always)]
    fn scaled(self, values: Self::Values, scales: Self::F) -> Self::Values {
        self.mul(values, scales)
    }
    #[inline(always)]
    fn first(self, a: [f32; FOUR], b: [f32; FOUR]) -> [f32; FOUR] {
        self.mul(a, b)
    }
    #[inline(always)]
    fn dot(self, sum: [f32; FOUR], a: [f32; FOUR], b: [f32; FOUR]) -> [f32; FOUR] {
        self.fma(a, b, sum)
    }
    #[inline(always)]
    unsafe fn scales<const BLOCKS: usize>(self, from: *const f32) -> [f32; FOUR] {
        // SAFETY: the caller vouches for a number; 32 elements never belong to two blocks.
        [unsafe { *from }; FOUR]
    }
}
