//! Tiles of results in registers: some rows of activations times a panel of weights.

use std::sync::atomic::{Ordering, compiler_fence};

use super::ahead::{Ahead, Steps};
use super::lanes::{CODES, Dot, panel_rows};

/// Rows of activations in a tile: two vectors of sums each, and both kinds of sums where scales
/// come late, leave registers for a unit of a panel.
pub const TILE: usize = 6;

/// The same where there is one kind of sums in registers, and enough of these: fewer units of the
/// weight are read, or decoded, for as many products.
pub const HIGH_TILE: usize = 2 * TILE;

/// Units of a panel without segments of its own between two fetches.
const SEGMENT: usize = 32;

/// Where the sums of a tile are.
#[derive(Clone, Copy)]
pub struct At {
    sums: *mut f32,
    /// Whether to begin at zero, whatever is there.
    fresh: bool,
}

/// Where sums go.
pub struct To<'a> {
    /// [`panel_rows`] sums for each row of activations; where `done` takes them, those of a tile.
    pub sums: &'a mut [f32],
    /// Whether they begin at zero, whatever is there.
    pub fresh: bool,
    /// Takes the sums of each tile, with the number of its first row of activations.
    pub done: Option<&'a dyn Fn(usize, &[f32])>,
}

/// Something that tiles of results are made from.
pub trait Tiles<D: Dot> {
    /// The most rows of activations in a tile.
    const ROWS: usize = TILE;

    /// Units of four bytes of a row of activations that are used.
    fn units(&self) -> usize;

    /// Stretches of units between which there is time for something else.
    fn segments(&self) -> usize;

    /// Adds the products with `H` rows of activations to sums.
    ///
    /// # Safety
    /// [`Tiles::units`] units of `H` rows of activations, `stride` apart, can be read, and `H`
    /// rows of [`panel_rows`] sums changed.
    unsafe fn tile<const H: usize>(
        &self,
        d: D,
        x: *const D::X,
        stride: usize,
        ahead: &mut Steps<'_>,
        sums: At,
    );
}

/// Decoded weights: units of [`panel_rows`] words.
pub struct Panel<'a> {
    /// The units.
    pub units: &'a [u32],
}

/// Codes: words of all rows, rows in lanes.
pub struct Coded<'a, D: Dot> {
    /// The words.
    pub words: &'a [u32],
    /// Words that share their scales.
    pub segment: usize,
    /// [`panel_rows`] scales of each segment.
    pub scales: &'a [f32],
    /// The codebook.
    pub table: D::Table,
}

/// Adds the products of a panel with `m` rows of activations, `stride` apart, to sums.
#[inline(always)]
pub fn tiles<D: Dot, T: Tiles<D>>(
    d: D,
    panel: &T,
    x: &[D::X],
    stride: usize,
    m: usize,
    ahead: Ahead<'_>,
    to: To<'_>,
) {
    let To { sums, fresh, done: take } = to;
    let rows = panel_rows::<D>();
    let used = panel.units() * (CODES / D::STEPS);
    let tiles = m.div_ceil(T::ROWS);
    let held = if take.is_some() { m.div_ceil(tiles.max(1)) } else { m };
    assert!(m > 0 && x.len() >= (m - 1) * stride + used && sums.len() >= held * rows);
    let mut ahead = ahead.steps(tiles * panel.segments());
    let high = T::ROWS == HIGH_TILE;
    let mut done = 0;
    for i in 0..tiles {
        // Tiles of nearly equal height, none higher than the first: a low one is slow.
        let height = (m - done).div_ceil(tiles - i);
        let first = if take.is_some() { 0 } else { done };
        // SAFETY: the assertion counts what a tile reads and writes.
        unsafe {
            let x = x.as_ptr().add(done * stride);
            let at = At { sums: sums.as_mut_ptr().add(first * rows), fresh };
            match height {
                1 => panel.tile::<1>(d, x, stride, &mut ahead, at),
                2 => panel.tile::<2>(d, x, stride, &mut ahead, at),
                3 => panel.tile::<3>(d, x, stride, &mut ahead, at),
                4 => panel.tile::<4>(d, x, stride, &mut ahead, at),
                5 => panel.tile::<5>(d, x, stride, &mut ahead, at),
                7 if high => panel.tile::<7>(d, x, stride, &mut ahead, at),
                8 if high => panel.tile::<8>(d, x, stride, &mut ahead, at),
                9 if high => panel.tile::<9>(d, x, stride, &mut ahead, at),
                10 if high => panel.tile::<10>(d, x, stride, &mut ahead, at),
                11 if high => panel.tile::<11>(d, x, stride, &mut ahead, at),
                12 if high => panel.tile::<HIGH_TILE>(d, x, stride, &mut ahead, at),
                _ => panel.tile::<TILE>(d, x, stride, &mut ahead, at),
            }
        }
        if let Some(take) = take {
            take(done, &sums[..height * rows]);
        }
        done += height;
    }
}

impl<D: Dot> Tiles<D> for Panel<'_> {
    const ROWS: usize = if D::LANES >= 16 { HIGH_TILE } else { TILE };

    #[inline(always)]
    fn units(&self) -> usize {
        self.units.len() / panel_rows::<D>()
    }

    #[inline(always)]
    fn segments(&self) -> usize {
        self.units.len().div_ceil(SEGMENT * panel_rows::<D>())
    }

    #[inline(always)]
    unsafe fn tile<const H: usize>(
        &self,
        d: D,
        x: *const D::X,
        stride: usize,
        ahead: &mut Steps<'_>,
        sums: At,
    ) {
        let (rows, lanes, per) = (panel_rows::<D>(), D::LANES, CODES / D::STEPS);
        // SAFETY: the caller's; chunks of the panel are whole units.
        unsafe {
            let mut acc = load_sums::<D, H>(d, sums);
            let mut x = x;
            for segment in self.units.chunks(SEGMENT * rows) {
                ahead.fetch(d);
                for unit in segment.chunks_exact(rows) {
                    let a = d.activations(unit.as_ptr().cast());
                    let b = d.activations(unit.as_ptr().add(lanes).cast());
                    for (h, acc) in acc.iter_mut().enumerate() {
                        let x = d.unit(x.add(h * stride).cast());
                        *acc = [d.dot(acc[0], a, x), d.dot(acc[1], b, x)];
                    }
                    x = x.add(per);
                }
            }
            store_sums(d, acc, sums.sums);
        }
    }
}

/// Decoded weights whose scales are applied to sums.
pub struct Unscaled<'a> {
    /// Units of [`panel_rows`] words.
    pub units: &'a [u32],
    /// Units that share their scales.
    pub segment: usize,
    /// [`panel_rows`] scales of each segment.
    pub scales: &'a [f32],
}

impl<D: Dot> Tiles<D> for Unscaled<'_> {
    #[inline(always)]
    fn units(&self) -> usize {
        self.units.len() / panel_rows::<D>()
    }

    #[inline(always)]
    fn segments(&self) -> usize {
        self.units.len().div_ceil(self.segment * panel_rows::<D>())
    }

    #[inline(always)]
    unsafe fn tile<const H: usize>(
        &self,
        d: D,
        x: *const D::X,
        stride: usize,
        ahead: &mut Steps<'_>,
        sums: At,
    ) {
        let (rows, lanes, per) = (panel_rows::<D>(), D::LANES, CODES / D::STEPS);
        let segments = self.units.chunks(self.segment * rows);
        // SAFETY: the caller's; chunks of units and scales are whole rows of lanes.
        unsafe {
            let mut acc = Sums::<D, H>::new(d, sums);
            let mut x = x;
            for (units, scales) in segments.zip(self.scales.chunks_exact(rows)) {
                ahead.fetch(d);
                let mut dot = [[d.splat(0.0); 2]; H];
                for unit in units.chunks_exact(rows) {
                    let a = d.activations(unit.as_ptr().cast());
                    let b = d.activations(unit.as_ptr().add(lanes).cast());
                    for (h, dot) in dot.iter_mut().enumerate() {
                        let x = d.unit(x.add(h * stride).cast());
                        *dot = [d.dot(dot[0], a, x), d.dot(dot[1], b, x)];
                    }
                    x = x.add(per);
                }
                acc.add(d, scales, dot);
            }
            acc.finish(d);
        }
    }
}

/// The sums of a tile: in registers if there are enough, else where they lie.
struct Sums<D: Dot, const H: usize> {
    acc: [[D::F; 2]; H],
    at: *mut f32,
}

impl<D: Dot, const H: usize> Sums<D, H> {
    const HELD: bool = H <= TILE;

    /// # Safety
    /// `H` rows of sums can be read and written, as long as this lives.
    #[inline(always)]
    unsafe fn new(d: D, At { sums: at, fresh }: At) -> Self {
        let acc = [[d.splat(0.0); 2]; H];
        if Self::HELD {
            // SAFETY: the caller's.
            return Self { acc: unsafe { load_sums::<D, H>(d, At { sums: at, fresh }) }, at };
        }
        if fresh {
            // SAFETY: the caller's.
            unsafe { store_sums(d, acc, at) }
        }
        Self { acc, at }
    }

    /// Adds sums over a segment, times their scales.
    ///
    /// # Safety
    /// There are [`panel_rows`] scales.
    #[inline(always)]
    unsafe fn add(&mut self, d: D, scales: &[f32], dot: [[D::F; 2]; H]) {
        if !Self::HELD {
            // Else the compiler carries these sums to the next segment through the stack.
            compiler_fence(Ordering::SeqCst);
        }
        // SAFETY: the caller's, and that of `new`.
        unsafe {
            let (a, b) = (d.load(scales.as_ptr()), d.load(scales.as_ptr().add(D::LANES)));
            for (h, (acc, dot)) in self.acc.iter_mut().zip(dot).enumerate() {
                if Self::HELD {
                    *acc = [d.fma(dot[0], a, acc[0]), d.fma(dot[1], b, acc[1])];
                } else {
                    let at = self.at.add(h * panel_rows::<D>());
                    d.store(d.fma(dot[0], a, d.load(at)), at);
                    let at = at.add(D::LANES);
                    d.store(d.fma(dot[1], b, d.load(at)), at);
                }
            }
        }
    }

    /// # Safety
    /// That of [`Sums::new`].
    #[inline(always)]
    unsafe fn finish(self, d: D) {
        if Self::HELD {
            // SAFETY: the caller's.
            unsafe { store_sums(d, self.acc, self.at) }
        }
    }
}

impl<D: Dot> Tiles<D> for Coded<'_, D> {
    const ROWS: usize = if D::LANES >= 16 { HIGH_TILE } else { TILE };

    #[inline(always)]
    fn units(&self) -> usize {
        self.words.len() / panel_rows::<D>() * D::STEPS
    }

    #[inline(always)]
    fn segments(&self) -> usize {
        self.words.len().div_ceil(self.segment * panel_rows::<D>())
    }

    #[inline(always)]
    unsafe fn tile<const H: usize>(
        &self,
        d: D,
        x: *const D::X,
        stride: usize,
        ahead: &mut Steps<'_>,
        sums: At,
    ) {
        let (rows, lanes, per) = (panel_rows::<D>(), D::LANES, CODES / D::STEPS);
        let segments = self.words.chunks(self.segment * rows);
        // SAFETY: the caller's; chunks of words and scales are whole rows of lanes.
        unsafe {
            let mut acc = Sums::<D, H>::new(d, sums);
            let mut x = x;
            for (words, scales) in segments.zip(self.scales.chunks_exact(rows)) {
                ahead.fetch(d);
                let mut dot = [[d.splat(0.0); 2]; H];
                for word in words.chunks_exact(rows) {
                    let mut low = d.words(word.as_ptr().cast());
                    let mut high = d.words(word.as_ptr().add(lanes).cast());
                    for s in 0..D::STEPS {
                        let (a, b) = (d.decode(self.table, low), d.decode(self.table, high));
                        (low, high) = (d.next(low, s), d.next(high, s));
                        for (h, dot) in dot.iter_mut().enumerate() {
                            let x = d.unit(x.add(h * stride).cast());
                            *dot = [d.dot(dot[0], a, x), d.dot(dot[1], b, x)];
                        }
                        x = x.add(per);
                    }
                }
                acc.add(d, scales, dot);
            }
            acc.finish(d);
        }
    }
}

/// # Safety
/// `H` rows of sums can be read.
#[inline(always)]
unsafe fn load_sums<D: Dot, const H: usize>(d: D, at: At) -> [[D::F; 2]; H] {
    let mut acc = [[d.splat(0.0); 2]; H];
    if at.fresh {
        return acc;
    }
    for (h, acc) in acc.iter_mut().enumerate() {
        // SAFETY: the caller's.
        unsafe {
            let sums = at.sums.add(h * panel_rows::<D>());
            *acc = [d.load(sums), d.load(sums.add(D::LANES))];
        }
    }
    acc
}

/// # Safety
/// `H` rows of sums can be written.
#[inline(always)]
unsafe fn store_sums<D: Dot, const H: usize>(d: D, acc: [[D::F; 2]; H], sums: *mut f32) {
    for (h, acc) in acc.into_iter().enumerate() {
        // SAFETY: the caller's.
        unsafe {
            let sums = sums.add(h * panel_rows::<D>());
            d.store(acc[0], sums);
            d.store(acc[1], sums.add(D::LANES));
        }
    }
}
