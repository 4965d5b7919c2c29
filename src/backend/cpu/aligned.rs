//! Memory at the border of a cache line, so that no vector lies across two.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

/// Bytes of a cache line, and of the longest vector.
pub const LINE: usize = 64;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// A vector of numbers that starts at a cache line.
pub struct Aligned<T> {
    lines: Vec<Line>,
    length: usize,
    numbers: PhantomData<T>,
}

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Self { lines: Vec::new(), length: 0, numbers: PhantomData }
    }
}

impl<T: Pod> Aligned<T> {
    /// `length` zeros.
    pub fn zeroed(length: usize) -> Self {
        let mut new = Self::default();
        new.resize(length);
        new
    }

    /// Changes the length; new numbers are zero or what was there before.
    pub fn resize(&mut self, length: usize) {
        self.lines.resize((length * size_of::<T>()).div_ceil(LINE), Line([0; LINE]));
        self.length = length;
    }
}

impl<T: Pod> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.length]
    }
}

impl<T: Pod> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.length]
    }
}
