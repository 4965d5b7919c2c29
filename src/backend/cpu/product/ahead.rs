//! Memory that will be wanted soon, fetched into the second-level cache bit by bit.
//!
//! Many fetches at once would leave no room for those of the work at hand.

use super::lanes::Vector;
use crate::backend::cpu::aligned::LINE;

/// Bytes of a weight that are on their way from memory while few rows are multiplied with it.
pub const AHEAD: usize = 12 * 1024;

/// A part of packed rows, and scales.
#[derive(Clone, Copy)]
pub struct Ahead<'a> {
    /// From the first byte of the part in its first row on.
    packed: &'a [u8],
    row_bytes: usize,
    rows: usize,
    /// Bytes of a row in the part.
    width: usize,
    scales: &'a [u8],
}

impl<'a> Ahead<'a> {
    /// No memory.
    pub const NOTHING: Self = Self { packed: &[], row_bytes: 0, rows: 0, width: 0, scales: &[] };

    /// `width` bytes of each of `rows` packed rows of `row_bytes`, from byte `at` of row `first`
    /// on, or of as many rows as there are, and scales.
    pub fn new(
        (packed, row_bytes): (&'a [u8], usize),
        (first, rows): (usize, usize),
        (at, width): (usize, usize),
        scales: &'a [u8],
    ) -> Self {
        let rows = rows.min((packed.len() / row_bytes.max(1)).saturating_sub(first));
        let packed = packed.get(first * row_bytes + at..).unwrap_or_default();
        Self { packed, row_bytes, rows, width, scales }
    }

    /// Everything in `count` steps.
    pub fn steps(self, count: usize) -> Steps<'a> {
        let steps = |lines: usize| lines.div_ceil(count.max(1));
        let of_row = self.width.div_ceil(LINE);
        Steps {
            row: self.packed.as_ptr(),
            row_bytes: self.row_bytes,
            at: 0,
            width: self.width,
            lines: self.rows * of_row,
            each: steps(self.rows * of_row),
            scales: self.scales,
            each_scales: steps(self.scales.len().div_ceil(LINE)) * LINE,
        }
    }
}

/// What is left to fetch.
pub struct Steps<'a> {
    /// The first byte of the part in the row at hand.
    row: *const u8,
    row_bytes: usize,
    /// The next byte of it.
    at: usize,
    width: usize,
    /// Lines that are left, and those of a step.
    lines: usize,
    each: usize,
    scales: &'a [u8],
    /// Bytes of a step.
    each_scales: usize,
}

impl Steps<'_> {
    /// Fetches the next lines.
    #[inline(always)]
    pub fn fetch<V: Vector>(&mut self, v: V) {
        for _ in 0..self.each.min(self.lines) {
            v.prefetch_far(self.row.wrapping_add(self.at));
            self.at += LINE;
            if self.at >= self.width {
                (self.row, self.at) = (self.row.wrapping_add(self.row_bytes), 0);
            }
            self.lines -= 1;
        }
        if !self.scales.is_empty() {
            let (now, later) = self.scales.split_at(self.each_scales.min(self.scales.len()));
            for line in now.chunks(LINE) {
                v.prefetch_far(line.as_ptr());
            }
            self.scales = later;
        }
    }
}
