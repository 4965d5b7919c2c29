//! Where a search for the nearest value may start: cells of numbers with few pivots in each.
//!
//! The cell of a number follows from a few operations that never decrease as the number grows, so
//! all pivots of lower cells are below it and all of higher cells are not. What remains is one
//! comparison with the pivot of the cell. The counts equal those of the whole search.

/// Cells of a four-bit codebook, of equal width.
#[derive(Clone, Copy, Debug)]
pub struct Cells {
    /// A number `x` of the codebook's range is in cell `round(x * step) + 16`, rounded to nearest
    /// with ties to even, which lies in 0..32.
    pub step: f32,
    /// The pivot of each cell; infinite where there is none.
    pub pivots: [f32; 32],
    /// How many of the cells' pivots are below those numbers of a cell that are not above its own
    /// pivot.
    pub below: [u8; 32],
    /// Pivots whose cell has another one; infinite where there are fewer. Each one below a number
    /// counts as well.
    pub extra: [f32; 2],
}

/// Cells on each side of the one around zero, of 32 in all.
const SIDE: f64 = 15.0;

impl Cells {
    /// Cells for ascending pivots, of which the first fifteen count; none if too many would share
    /// a cell.
    pub(super) const fn new(pivots: &[f32; 16], largest: f32) -> Option<Self> {
        // Numbers are scaled to at most 1, or by a power of two to less than the next one.
        let mut range = 1.0;
        while range < largest {
            range *= 2.0;
        }
        let step = SIDE as f32 / range;
        let mut cells =
            Self { step, pivots: [f32::INFINITY; 32], below: [0; 32], extra: [f32::INFINITY; 2] };
        let (mut i, mut extras) = (0, 0);
        while i < 15 {
            let cell = cell(pivots[i], step);
            if cell >= 32 {
                return None;
            }
            if cells.pivots[cell] == f32::INFINITY {
                cells.pivots[cell] = pivots[i];
                let mut above = cell + 1;
                while above < 32 {
                    cells.below[above] += 1;
                    above += 1;
                }
            } else if extras < cells.extra.len() {
                cells.extra[extras] = pivots[i];
                extras += 1;
            } else {
                return None;
            }
            i += 1;
        }
        Some(cells)
    }

    /// Whether pivots share cells.
    pub const fn has_extra(&self) -> bool {
        self.extra[0] != f32::INFINITY
    }

    /// The number of pivots below `x`, which lies in the range of the codebook.
    pub fn position(&self, x: f32) -> usize {
        let cell = cell(x, self.step) % 32;
        let extra = self.extra.iter().filter(|pivot| x > **pivot).count();
        usize::from(self.below[cell]) + usize::from(x > self.pivots[cell]) + extra
    }
}

/// The cell of a number; beyond 31 for one out of range.
const fn cell(x: f32, step: f32) -> usize {
    // Adding 1.5 * 2^52 rounds an f64 to an integer, ties to even. The product is exact.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    let rounded = (x as f64 * step as f64 + ROUND) - ROUND + 16.0;
    if rounded < 0.0 { usize::MAX } else { rounded as usize }
}

/// Cells of an eight-bit codebook: octaves of the magnitude, cut into as many parts as it takes.
#[derive(Clone, Copy, Debug)]
pub struct Octaves {
    /// The magnitude's bits are shifted right by this, by the five low bits of the exponent ...
    pub shift: [u32; 32],
    /// ... and increased by this, which gives a cell in 0..256. Smaller magnitudes than
    /// [`Octaves::SMALLEST`] count as that.
    pub offset: [i32; 32],
    /// How many pivots are below all numbers of a cell: positive ones, negative ones.
    pub below: [[u8; 256]; 2],
}

impl Octaves {
    /// The bits of the smallest magnitude that is told apart: 2^-30.
    pub const SMALLEST: u32 = (127 - 30) << 23;

    /// The last octave begins at 1: numbers are scaled to at most 1, but for rounding.
    const LAST: u32 = 127;

    /// Cells for ascending pivots, of which the first 255 count; none if there are too many, or a
    /// pivot is out of range.
    pub(super) const fn new(pivots: &[f32; 256]) -> Option<Self> {
        let mut octaves = Self { shift: [23; 32], offset: [0; 32], below: [[0; 256]; 2] };
        let mut exponent = Self::SMALLEST >> 23;
        let mut used = 0;
        while exponent <= Self::LAST {
            let mut bits = 0;
            while !apart(pivots, exponent, 23 - bits) {
                bits += 1;
                if bits > 8 {
                    return None;
                }
            }
            let octave = (exponent % 32) as usize;
            octaves.shift[octave] = 23 - bits;
            octaves.offset[octave] = used - (exponent << bits) as i32;
            used += 1 << bits;
            exponent += 1;
        }
        if used > 256 {
            return None;
        }
        let mut i = 0;
        while i < 255 {
            let bits = pivots[i].to_bits();
            let Some(cell) = octaves.cell(bits & 0x7fff_ffff) else { return None };
            let negative = bits >> 31 == 1;
            // Positive numbers are above all negative pivots, and above those in lower cells;
            // negative ones above those in higher cells.
            let mut other = 0;
            while other < 256 {
                octaves.below[0][other] += (negative || cell < other) as u8;
                octaves.below[1][other] += (negative && cell > other) as u8;
                other += 1;
            }
            i += 1;
        }
        Some(octaves)
    }

    /// The cell of a magnitude's bits; none out of range.
    const fn cell(&self, magnitude: u32) -> Option<usize> {
        let magnitude = if magnitude < Self::SMALLEST { Self::SMALLEST } else { magnitude };
        if magnitude >> 23 > Self::LAST {
            return None;
        }
        let octave = (magnitude >> 23) as usize % 32;
        Some(((magnitude >> self.shift[octave]) as i32 + self.offset[octave]) as usize)
    }

    /// The number of pivots below `x`, whose magnitude is below 2.
    pub fn position(&self, pivots: &[f32; 256], x: f32) -> usize {
        let cell = self.cell(x.to_bits() & i32::MAX.cast_unsigned()).unwrap_or(0) & 255;
        let below = self.below[usize::from(x.is_sign_negative())][cell];
        usize::from(below) + usize::from(x > pivots[usize::from(below)])
    }
}

/// Whether no two pivots of one sign and this exponent agree in their bits above `shift`.
const fn apart(pivots: &[f32; 256], exponent: u32, shift: u32) -> bool {
    let mut i = 0;
    while i + 1 < 255 {
        let (a, b) = (pivots[i].to_bits(), pivots[i + 1].to_bits());
        // Of neighbours with one exponent; further ones are further apart.
        if (a >> 23) & 0xff == exponent && a >> shift == b >> shift {
            return false;
        }
        i += 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use crate::format::codebook::{Codebook, DYNAMIC, DYNAMIC_UNSIGNED, E2M1, FP4, INT4, NF4};

    /// Numbers around every pivot and between them, within `range`.
    fn numbers<const N: usize>(book: &Codebook<N>, range: f32) -> Vec<f32> {
        let around = |x: f32| {
            let near = [x, x.next_up(), x.next_down(), x * 1.004, x * 0.99];
            near.into_iter().flat_map(|x| [x, -x])
        };
        let steps = (0..=40_000).map(|i| (f32::from(i as u16) / 20_000.0 - 1.0) * range);
        let tiny = (0..150).map(|i| 2f32.powi(-i));
        book.pivots[..N - 1]
            .iter()
            .copied()
            .chain(steps)
            .chain(tiny)
            .flat_map(around)
            .filter(|x| x.abs() <= range)
            .collect()
    }

    #[test]
    fn cells_count_the_pivots_below_a_number() {
        for (book, range) in
            [(&NF4, 1.000_001), (&FP4, 1.000_001), (&INT4, 1.000_001), (&E2M1, 8.0)]
        {
            let cells = book.cells.as_ref().expect("four-bit codebooks have cells");
            for x in numbers(book, range) {
                assert_eq!(cells.position(x), book.pivots.partition_point(|p| x > *p), "{x:e}");
            }
        }
    }

    #[test]
    fn octaves_count_the_pivots_below_a_number() {
        assert!(DYNAMIC.octaves.is_some());
        for book in [&DYNAMIC, &DYNAMIC_UNSIGNED] {
            // The unsigned one has twice as many values a decade: too many cells.
            let Some(octaves) = &book.octaves else { continue };
            for x in numbers(book, 1.000_001) {
                let want = book.pivots.partition_point(|p| x > *p);
                assert_eq!(octaves.position(&book.pivots, x), want, "{x:e}");
            }
        }
    }
}
