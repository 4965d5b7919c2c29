//! Products along the columns of a weight, from the packed bytes: what `backward` is made of.
//!
//! A chunk of a row decodes to eight vectors, and lane `l` of vector `v` is element
//! `8l + (v ^ 1)` of the chunk, whatever the instruction set. Sums stay in this order until
//! `stretch::ordered` puts them back.

#[cfg(target_arch = "aarch64")]
use super::super::neon::{Neon, NeonBf16};
#[cfg(target_arch = "x86_64")]
use super::super::{avx2::Avx2, avx512::Avx512};
use super::lanes::{CODES, Dot, Vector};
use super::portable::Portable;
use crate::dtype::Element;

/// Vectors that a chunk decodes to, one for each code of a word.
pub const VECTORS: usize = CODES;

/// The most blocks that share a chunk: 128 codes in blocks of 32.
pub const BLOCKS: usize = 4;

/// A chunk of some rows: codes, scales, and how far a row is from the next.
#[derive(Clone, Copy)]
pub struct Rows {
    /// Codes of the first row.
    pub packed: *const u8,
    /// Bytes of a whole row.
    pub row_bytes: usize,
    /// The scales of the blocks of the first row.
    pub scales: *const f32,
    /// Scales of a whole row.
    pub blocks: usize,
}

impl Rows {
    /// The same without the first `n` rows.
    ///
    /// # Safety
    /// There are that many.
    #[inline(always)]
    pub unsafe fn below(self, n: usize) -> Self {
        // SAFETY: the caller's.
        unsafe {
            let packed = self.packed.add(n * self.row_bytes);
            Self { packed, scales: self.scales.add(n * self.blocks), ..self }
        }
    }
}

/// What an instruction set does with chunks of rows.
pub trait Down: Dot {
    /// Rows that [`Down::chunk`] takes at once.
    const ROWS: usize;
    /// A codebook, as it is looked up here.
    type Book: Copy;

    /// Takes a codebook.
    fn book(self, values: &[f32; 16]) -> Self::Book;

    /// Adds a chunk of [`Down::ROWS`] rows times `M` gradients to the sums at `acc`, rows of
    /// which are `width` apart; gradients of one row are `stride` apart.
    ///
    /// # Safety
    /// A chunk of as many rows with `B` scales each, as many gradients of `M` rows, and `M` times
    /// [`VECTORS`] vectors of sums exist.
    unsafe fn chunk<const M: usize, const B: usize>(
        self,
        book: Self::Book,
        rows: Rows,
        gradients: (*const Self::X, usize),
        sums: (*mut f32, usize),
    );

    /// Decodes a chunk of one row, or of a pair where a unit is two narrow numbers, into a unit of
    /// each of four panels that are `apart` units of four bytes apart.
    ///
    /// # Safety
    /// A chunk of the rows with `B` scales each exists, and two vectors can be written in each of
    /// the panels.
    unsafe fn units<const B: usize>(self, book: Self::Book, rows: Rows, to: *mut u32, apart: usize);
}

/// [`Down::chunk`] of `R` rows, where numbers are f32.
///
/// # Safety
/// As there.
#[inline(always)]
pub unsafe fn wide_chunk<D, const M: usize, const B: usize, const R: usize>(
    d: D,
    table: D::Table,
    rows: Rows,
    gradients: [[f32; M]; R],
    (acc, width): (*mut f32, usize),
) where
    D: Dot<Values = <D as Vector>::F>,
{
    // SAFETY: the caller's.
    unsafe {
        let mut words = [d.words(rows.packed); R];
        let mut factors = [[d.splat(0.0); M]; R];
        for r in 0..R {
            let row = rows.below(r);
            words[r] = d.words(row.packed);
            let scales = d.scales::<B>(row.scales);
            for (factor, gradient) in factors[r].iter_mut().zip(gradients[r]) {
                *factor = d.mul(scales, d.splat(gradient));
            }
        }
        for v in 0..VECTORS {
            let at = |m: usize| acc.add(m * width + v * D::LANES);
            let mut sums = [d.splat(0.0); M];
            for (m, sum) in sums.iter_mut().enumerate() {
                *sum = d.load(at(m));
            }
            for (words, factors) in words.iter_mut().zip(factors) {
                let weights = d.decode(table, *words);
                *words = d.next(*words, v);
                for (sum, factor) in sums.iter_mut().zip(factors) {
                    *sum = d.dot(*sum, weights, factor);
                }
            }
            for (m, sum) in sums.into_iter().enumerate() {
                d.store(sum, at(m));
            }
        }
    }
}

/// `R` gradients of each of `M` rows.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn widened<X: Element, const M: usize, const R: usize>(
    (from, stride): (*const X, usize),
) -> [[f32; M]; R] {
    let mut wide = [[0.0; M]; R];
    for (r, wide) in wide.iter_mut().enumerate() {
        for (m, wide) in wide.iter_mut().enumerate() {
            // SAFETY: the caller's.
            *wide = unsafe { *from.add(m * stride + r) }.to_f32();
        }
    }
    wide
}

macro_rules! wide {
    ($isa:ty, $rows:literal) => {
        impl Down for $isa {
            const ROWS: usize = $rows;
            type Book = <$isa as Dot>::Table;

            #[inline(always)]
            fn book(self, values: &[f32; 16]) -> Self::Book {
                self.table(values)
            }

            #[inline(always)]
            unsafe fn chunk<const M: usize, const B: usize>(
                self,
                book: Self::Book,
                rows: Rows,
                gradients: (*const f32, usize),
                sums: (*mut f32, usize),
            ) {
                // SAFETY: the caller's.
                unsafe {
                    let gradients = widened::<f32, M, $rows>(gradients);
                    wide_chunk::<_, M, B, $rows>(self, book, rows, gradients, sums);
                }
            }

            #[inline(always)]
            unsafe fn units<const B: usize>(
                self,
                book: Self::Book,
                rows: Rows,
                to: *mut u32,
                apart: usize,
            ) {
                // SAFETY: the caller's.
                unsafe {
                    let (mut words, scales) =
                        (self.words(rows.packed), self.scales::<B>(rows.scales));
                    for v in 0..VECTORS {
                        let weights = self.scaled(self.decode(book, words), scales);
                        words = self.next(words, v);
                        let to = to.add(v / 2 * apart + v % 2 * <Self as Vector>::LANES);
                        self.store_values(weights, to);
                    }
                }
            }
        }
    };
}
wide!(Portable, 2);
#[cfg(target_arch = "x86_64")]
wide!(Avx2, 4);
#[cfg(target_arch = "x86_64")]
wide!(Avx512, 4);
#[cfg(target_arch = "aarch64")]
wide!(Neon, 4);

/// Numbers are f32 but for the panels: there are instructions for pairs, but none that look up
/// sixteen-bit numbers in more than one table.
#[cfg(target_arch = "aarch64")]
impl Down for NeonBf16 {
    const ROWS: usize = 4;
    type Book = <Neon as Dot>::Table;

    #[inline(always)]
    fn book(self, values: &[f32; 16]) -> Self::Book {
        self.base().table(values)
    }

    #[inline(always)]
    unsafe fn chunk<const M: usize, const B: usize>(
        self,
        book: Self::Book,
        rows: Rows,
        gradients: (*const half::bf16, usize),
        sums: (*mut f32, usize),
    ) {
        // SAFETY: the caller's.
        unsafe {
            let gradients = widened::<half::bf16, M, 4>(gradients);
            wide_chunk::<_, M, B, 4>(self.base(), book, rows, gradients, sums);
        }
    }

    #[inline(always)]
    unsafe fn units<const B: usize>(
        self,
        book: Self::Book,
        rows: Rows,
        to: *mut u32,
        apart: usize,
    ) {
        // SAFETY: the caller's.
        unsafe { woven_units::<_, B>(self.base(), book, rows, to, apart) }
    }
}

/// [`Down::units`] of a pair of rows, by way of f32.
///
/// # Safety
/// As there.
#[inline(always)]
#[cfg(any(test, target_arch = "aarch64"))]
pub unsafe fn woven_units<D, const B: usize>(
    d: D,
    table: D::Table,
    rows: Rows,
    to: *mut u32,
    apart: usize,
) where
    D: Dot<Values = <D as Vector>::F>,
{
    // SAFETY: the caller's; a vector has at most sixteen lanes.
    unsafe {
        let pair = [rows, rows.below(1)];
        let mut words = pair.map(|row| d.words(row.packed));
        let scales = pair.map(|row| d.scales::<B>(row.scales));
        for v in 0..VECTORS {
            let mut narrow = [[half::bf16::ZERO; 16]; 2];
            for ((words, scales), narrow) in words.iter_mut().zip(scales).zip(&mut narrow) {
                d.store_as(d.mul(d.decode(table, *words), scales), narrow.as_mut_ptr());
                *words = d.next(*words, v);
            }
            let to = to.add(v / 2 * apart + v % 2 * D::LANES);
            for (l, (low, high)) in narrow[0].iter().zip(narrow[1]).take(D::LANES).enumerate() {
                *to.add(l) = u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::lanes::panel_rows;
    use super::*;

    /// Units of a pair of rows of a chunk against the definition, bit for bit.
    fn check(lanes: usize, blocks: usize, units: impl Fn(&[f32; 16], Rows, *mut u32)) {
        let values: [f32; 16] = std::array::from_fn(|i| (i as f32 - 7.3) / 7.0);
        let packed: [[u8; 64]; 2] =
            std::array::from_fn(|r| std::array::from_fn(|i| (i * 37 + r * 91 + 5) as u8));
        let scales: [[f32; BLOCKS]; 2] =
            std::array::from_fn(|r| std::array::from_fn(|b| 0.3 + r as f32 + b as f32 * 1.7));
        let rows = Rows {
            packed: packed.as_ptr().cast(),
            row_bytes: 64,
            scales: scales.as_ptr().cast(),
            blocks: BLOCKS,
        };
        let mut panels = vec![0u32; VECTORS * lanes];
        units(&values, rows, panels.as_mut_ptr());
        for k in 0..CODES * lanes {
            let at = ((k % CODES) ^ 1) * lanes + k / CODES;
            let weight = |r: usize| {
                let byte = packed[r][k / 2];
                let code = if k % 2 == 0 { byte >> 4 } else { byte & 15 };
                let scale = scales[r][k * blocks / (CODES * lanes)];
                u32::from(bf16::from_f32(values[usize::from(code)] * scale).to_bits())
            };
            assert_eq!(panels[at], weight(0) | weight(1) << 16, "element {k}, {blocks} blocks");
        }
    }

    #[test]
    fn pairs_of_rows_are_decoded_by_way_of_f32() {
        check(Portable::LANES, 1, |values, rows, to| {
            // SAFETY: `check` has a chunk of two rows, and two vectors for each panel.
            unsafe { woven_units::<_, 1>(Portable, *values, rows, to, panel_rows::<Portable>()) }
        });
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn pairs_of_rows_are_decoded_with_tables_of_their_blocks() {
        use super::super::super::avx512::Avx512Ext;
        let Some(d) = Avx512Ext::detect() else { return };
        let apart = panel_rows::<Avx512Ext>();
        // SAFETY: `check` has a chunk of two rows, and two vectors for each panel.
        unsafe {
            check(16, 1, |values, rows, to| d.units::<1>(d.book(values), rows, to, apart));
            check(16, 2, |values, rows, to| d.units::<2>(d.book(values), rows, to, apart));
            check(16, 4, |values, rows, to| d.units::<4>(d.book(values), rows, to, apart));
        }
    }
}
