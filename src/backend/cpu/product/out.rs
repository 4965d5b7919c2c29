//! A result whose columns are written by several threads.

use std::marker::PhantomData;

/// Rows of `columns` elements that threads fill side by side.
pub struct Out<'a, T> {
    start: *mut T,
    length: usize,
    columns: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is through `part`, whose caller keeps the threads apart.
unsafe impl<T: Send> Sync for Out<'_, T> {}

impl<'a, T> Out<'a, T> {
    /// Takes the memory for as long as this lives.
    pub fn new(out: &'a mut [T], columns: usize) -> Self {
        let (start, length) = (out.as_mut_ptr(), out.len());
        Self { start, length, columns, borrowed: PhantomData }
    }

    /// The rows from `first` on.
    pub fn below(&self, first: usize) -> Out<'_, T> {
        let skipped = (first * self.columns).min(self.length);
        Out {
            start: self.start.wrapping_add(skipped),
            length: self.length - skipped,
            columns: self.columns,
            borrowed: PhantomData,
        }
    }

    /// `count` elements of a row.
    ///
    /// # Panics
    /// If they are not all inside.
    ///
    /// # Safety
    /// No other slice of these elements exists while the result does.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, row: usize, first: usize, count: usize) -> &mut [T] {
        let at = row * self.columns + first;
        assert!(at + count <= self.length && first + count <= self.columns);
        // SAFETY: the range is inside the memory that `new` borrowed; the caller keeps it unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), count) }
    }
}
