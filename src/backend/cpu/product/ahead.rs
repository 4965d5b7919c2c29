//! Memory that will be wanted soon, fetched into the second-level cache bit by bit.
//!
//! Many fetches at once would leave no room for those of the work at hand.

use super::lanes::Dot;
use crate::backend::cpu::aligned::LINE;

/// Packed rows and their scales.
#[derive(Clone, Copy)]
pub struct Ahead<'a> {
    packed: &'a [u8],
    scales: &'a [u8],
}

/// Bytes of a weight that are on their way from memory while few rows are multiplied with it.
pub const AHEAD: usize = 12 * 1024;

impl<'a> Ahead<'a> {
    /// No memory.
    pub const NOTHING: Self = Self { packed: &[], scales: &[] };

    /// `rows` rows of `row_bytes` packed bytes and `scale_bytes` of scales from row `first` on, or
    /// as many as there are.
    pub fn new(
        (packed, row_bytes): (&'a [u8], usize),
        (scales, scale_bytes): (&'a [u8], usize),
        first: usize,
        rows: usize,
    ) -> Self {
        let cut = |bytes: &'a [u8], row: usize| {
            let rest = bytes.get(first * row..).unwrap_or_default();
            &rest[..rest.len().min(rows * row)]
        };
        Self { packed: cut(packed, row_bytes), scales: cut(scales, scale_bytes) }
    }

    /// The share of `width` of `columns` columns.
    pub fn part(self, k: usize, width: usize, columns: usize) -> Self {
        let cut = |bytes: &'a [u8]| {
            &bytes[bytes.len() * k / columns..bytes.len() * (k + width) / columns]
        };
        Self { packed: cut(self.packed), scales: cut(self.scales) }
    }

    /// Everything in `count` steps.
    pub fn steps(self, count: usize) -> Steps<'a> {
        let share = |bytes: &[u8]| bytes.len().div_ceil(count.max(1)).next_multiple_of(LINE);
        Steps { each: [share(self.packed), share(self.scales)], rest: [self.packed, self.scales] }
    }
}

/// What is left to fetch.
pub struct Steps<'a> {
    rest: [&'a [u8]; 2],
    /// Bytes of a step.
    each: [usize; 2],
}

impl Steps<'_> {
    /// Fetches the next lines.
    #[inline(always)]
    pub fn fetch<D: Dot>(&mut self, d: D) {
        for (rest, each) in self.rest.iter_mut().zip(self.each) {
            let (now, later) = rest.split_at(each.min(rest.len()));
            for line in now.chunks(LINE) {
                d.prefetch_far(line.as_ptr());
            }
            *rest = later;
        }
    }
}
