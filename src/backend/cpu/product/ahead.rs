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
        let stream = |bytes: &'a [u8]| {
            let lines = bytes.len().div_ceil(LINE).div_ceil(count.max(1));
            Stream { bytes, at: 0, lines }
        };
        Steps([stream(self.packed), stream(self.scales)])
    }
}

/// What is left to fetch.
pub struct Steps<'a>([Stream<'a>; 2]);

/// Bytes that follow one another.
struct Stream<'a> {
    bytes: &'a [u8],
    /// The next line.
    at: usize,
    /// Lines of a step.
    lines: usize,
}

impl Steps<'_> {
    /// Fetches the next lines. Every step takes as many, whether there are any left or not: a
    /// branch that depends on it would cost more than a fetch.
    #[inline(always)]
    pub fn fetch<D: Dot>(&mut self, d: D) {
        for stream in &mut self.0 {
            for _ in 0..stream.lines {
                let at = stream.at.min(stream.bytes.len());
                d.prefetch_far(stream.bytes.as_ptr().wrapping_add(at));
                stream.at += LINE;
            }
        }
    }
}
