//! Tables of values, and how the nearest one is found.
//!
//! A code is the index of a value. The nearest value of `x` is found by counting the *pivots*
//! below `x`: pivots are the midpoints between neighbours in sorted order, and the count is the
//! sorted position. Values, pivots and the order all follow from one typed table.

use super::cells::{Cells, Octaves};

/// What happens to a value exactly half way between two neighbours.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ties {
    /// It goes to the lower neighbour, as in bitsandbytes.
    Down,
    /// It goes to the neighbour whose code is even, as the OCP MX specification rounds.
    EvenCode,
}

/// A codebook of `N` values with everything that encoding needs.
#[derive(Debug)]
pub struct Codebook<const N: usize> {
    /// The value of each code.
    pub values: [f32; N],
    /// Ascending; the first `N - 1` count, the last is infinite so that a search may run past
    /// the end. A value belongs at the sorted position that equals the number of pivots
    /// strictly below it.
    pub pivots: [f32; N],
    /// The code at each sorted position.
    pub order: [u8; N],
    /// The pivots as a binary search tree: the root is node 1, the children of node `n` are `2n`
    /// (not above the pivot) and `2n + 1` (above it). A search that starts at node 1 and steps
    /// down `log2(N)` times ends at `N` plus the sorted position. Node 0 is not used.
    pub tree: [f32; N],
    /// Cells that shorten a search among sixteen values.
    pub cells: Option<Cells>,
    /// Cells that shorten a search among 256 values.
    pub octaves: Option<Octaves>,
}

impl<const N: usize> Codebook<N> {
    const fn new(values: [f32; N], ties: Ties) -> Self {
        let mut order = [0u8; N];
        let mut i = 0;
        while i < N {
            // Insertion sort, stable: equal values keep the order of their codes, except that
            // -0.0 sorts below +0.0.
            let mut j = i;
            while j > 0 && below(values[i], values[order[j - 1] as usize]) {
                order[j] = order[j - 1];
                j -= 1;
            }
            order[j] = i as u8;
            i += 1;
        }
        let mut pivots = [f32::INFINITY; N];
        let mut i = 0;
        while i + 1 < N {
            let (lower, upper) = (order[i] as usize, order[i + 1] as usize);
            let middle = f32::midpoint(values[lower], values[upper]);
            let upward = match ties {
                Ties::Down => false,
                Ties::EvenCode => upper % 2 == 0,
            };
            pivots[i] = if upward { middle.next_down() } else { middle };
            i += 1;
        }
        let largest = values[order[N - 1] as usize];
        let cells = match pivots.first_chunk::<16>() {
            Some(pivots) if N == 16 => Cells::new(pivots, largest),
            _ => None,
        };
        let octaves = match pivots.first_chunk::<256>() {
            Some(pivots) => Octaves::new(pivots),
            None => None,
        };
        Self { values, pivots, order, tree: tree(&pivots), cells, octaves }
    }

    /// Whether the code of a value is its sorted position.
    pub fn is_sorted(&self) -> bool {
        self.order.iter().enumerate().all(|(i, code)| i == usize::from(*code))
    }

    /// The code of the value nearest to `x`. NaN counts as below everything.
    ///
    /// ```
    /// use nybble::format::codebook::NF4;
    /// assert_eq!(NF4.encode(0.0), 7);
    /// assert_eq!(NF4.encode(2.0), 15);
    /// ```
    #[inline(always)]
    pub fn encode(&self, x: f32) -> u8 {
        // The last pivot is infinite, so the count is at most N - 1.
        self.order[self.pivots.partition_point(|&pivot| x > pivot).min(N - 1)]
    }

    /// The largest distance between neighbours; half of it bounds the error of encoding.
    pub fn widest_gap(&self) -> f32 {
        self.order
            .iter()
            .zip(self.order.iter().skip(1))
            .map(|(&a, &b)| self.values[usize::from(b)] - self.values[usize::from(a)])
            .fold(0.0, f32::max)
    }
}

const fn tree<const N: usize>(pivots: &[f32; N]) -> [f32; N] {
    let mut tree = [f32::INFINITY; N];
    let mut node = 1;
    while node < N {
        // A level of `width` nodes cuts the pivots into twice as many equal parts.
        let width = 1 << node.ilog2();
        tree[node] = pivots[(2 * (node - width) + 1) * N / (2 * width) - 1];
        node += 1;
    }
    tree
}

/// Strict order on floats in which -0.0 is below +0.0.
const fn below(a: f32, b: f32) -> bool {
    a < b || (a == b && a.is_sign_negative() && b.is_sign_positive())
}

/// NormalFloat4: quantiles of N(0, 1) with an exact zero (QLoRA, arXiv:2305.14314, appendix E).
pub static NF4: Codebook<16> = Codebook::new(
    [
        -1.0,
        -0.696_192_8,
        -0.525_073_05,
        -0.394_917_5,
        -0.284_441_38,
        -0.184_773_43,
        -0.091_050_036,
        0.0,
        0.079_580_3,
        0.160_930_2,
        0.246_112_3,
        0.337_915_24,
        0.440_709_83,
        0.562_617,
        0.722_956_84,
        1.0,
    ],
    Ties::Down,
);

/// bitsandbytes' FP4: a sign and twelfths. Code 8 is a second +0.0, as its files have it.
pub static FP4: Codebook<16> = {
    const TWELFTHS: [f32; 8] = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];
    let mut values = [0.0; 16];
    let mut i = 1;
    while i < 8 {
        values[i] = TWELFTHS[i] / 12.0;
        values[i + 8] = -TWELFTHS[i] / 12.0;
        i += 1;
    }
    Codebook::new(values, Ties::Down)
};

/// Symmetric integers: value = (code - 8) / 7, so that codes 1 to 15 span -1 to 1. Code 0 is
/// decoded but never produced.
pub static INT4: Codebook<16> = {
    let mut values = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        values[i] = (i as f32 - 8.0) / 7.0;
        i += 1;
    }
    Codebook::new(values, Ties::Down)
};

/// E2M1 of the OCP Microscaling specification 1.0: sign, two exponent bits, one mantissa bit.
pub static E2M1: Codebook<16> = {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let mut values = [0.0; 16];
    let mut i = 0;
    while i < 8 {
        values[i] = MAGNITUDES[i];
        values[i + 8] = -MAGNITUDES[i];
        i += 1;
    }
    Codebook::new(values, Ties::EvenCode)
};

/// The signed dynamic 8-bit codebook of arXiv:2110.02861, as bitsandbytes computes it.
pub static DYNAMIC: Codebook<256> = Codebook::new(dynamic(true), Ties::Down);

/// The unsigned dynamic 8-bit codebook, for values that are never negative.
pub static DYNAMIC_UNSIGNED: Codebook<256> = Codebook::new(dynamic(false), Ties::Down);

/// Powers of ten from 1e-6 to 1, rounded to f32 each, not multiplied up.
const DECADES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];

/// Seven decades; each holds twice as many values as the one below, evenly spaced between 0.1
/// and 1. The values are the means of neighbours among the points of `torch.linspace(0.1, 1, n)`.
const fn dynamic(signed: bool) -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut filled = 1; // values[0] stays 0.0
    let mut decade = 0;
    while decade < DECADES.len() {
        let points = (1usize << if signed { decade } else { decade + 1 }) + 1;
        let mut i = 0;
        while i + 1 < points {
            let mean = f32::midpoint(linspace(i, points), linspace(i + 1, points));
            values[filled] = DECADES[decade] * mean;
            filled += 1;
            if signed {
                values[filled] = -values[filled - 1];
                filled += 1;
            }
            i += 1;
        }
        decade += 1;
    }
    values[filled] = 1.0;
    sorted(values)
}

/// Point `i` of `torch.linspace(0.1, 1, n)` in f32: torch counts from the nearer end with one
/// rounding per point, which f64 reproduces here since the product is exact in it.
const fn linspace(i: usize, n: usize) -> f32 {
    let (start, end) = (0.1f32, 1.0f32);
    let step = ((end - start) / (n - 1) as f32) as f64;
    if i < n / 2 {
        (start as f64 + step * i as f64) as f32
    } else {
        (end as f64 - step * (n - 1 - i) as f64) as f32
    }
}

const fn sorted(mut values: [f32; 256]) -> [f32; 256] {
    let mut i = 1;
    while i < values.len() {
        let mut j = i;
        while j > 0 && values[j] < values[j - 1] {
            let swap = values[j];
            values[j] = values[j - 1];
            values[j - 1] = swap;
            j -= 1;
        }
        i += 1;
    }
    values
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    fn bits<const N: usize>(values: &[f32; N]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    fn hash(values: &[f32]) -> String {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let digest = Sha256::digest(bytes);
        let start = digest.first_chunk().map_or(0, |start| u64::from_be_bytes(*start));
        format!("{start:016x}")
    }

    #[test]
    fn nf4_has_the_bits_of_bitsandbytes() {
        let values = [
            0xbf80_0000,
            0xbf32_39b1,
            0xbf06_6b30,
            0xbeca_32a0,
            0xbe91_a24d,
            0xbe3d_353f,
            0xbdba_7871,
            0x0000_0000,
            0x3da2_faff,
            0x3e24_cae3,
            0x3e7c_04dd,
            0x3ead_033a,
            0x3ee1_a4b8,
            0x3f10_07ab,
            0x3f39_13b3,
            0x3f80_0000u32,
        ];
        assert_eq!(bits(&NF4.values), values);
        let pivots = [
            0xbf59_1cd8,
            0xbf1c_5270,
            0xbeeb_8480,
            0xbead_ea76,
            0xbe70_3cec,
            0xbe0d_38bc,
            0xbd3a_7871,
            0x3d22_faff,
            0x3df6_4862,
            0x3e50_67e0,
            0x3e95_82d4,
            0x3ec7_53f9,
            0x3f00_6d04,
            0x3f24_8daf,
            0x3f5c_89da,
            0x7f80_0000u32,
        ];
        assert_eq!(bits(&NF4.pivots), pivots);
    }

    #[test]
    fn fp4_has_the_bits_of_bitsandbytes() {
        let magnitudes = [
            0x0000_0000,
            0x3baa_aaab,
            0x3f2a_aaab,
            0x3f80_0000,
            0x3eaa_aaab,
            0x3f00_0000,
            0x3e2a_aaab,
            0x3e80_0000u32,
        ];
        for (code, bits) in magnitudes.into_iter().enumerate() {
            assert_eq!(FP4.values[code].to_bits(), bits);
            let negative = if code == 0 { 0 } else { bits | 0x8000_0000 };
            assert_eq!(FP4.values[code + 8].to_bits(), negative);
        }
        assert_eq!((FP4.encode(1e-9), FP4.encode(-1e-9), FP4.encode(0.0)), (8, 0, 0));
    }

    #[test]
    fn dynamic_maps_have_the_bits_of_bitsandbytes() {
        assert_eq!(hash(&DYNAMIC.values), "e732639a65f497b4");
        assert_eq!(hash(&DYNAMIC_UNSIGNED.values), "305f002cc11278fb");
        assert_eq!(DYNAMIC.values[DYNAMIC.encode(0.0) as usize], 0.0);
        assert_eq!(DYNAMIC_UNSIGNED.values[DYNAMIC_UNSIGNED.encode(0.0) as usize], 0.0);
    }

    #[test]
    fn e2m1_rounds_ties_to_even_and_keeps_the_sign() {
        let ties = [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0)];
        for (tie, want) in ties.into_iter().chain([(5.0, 4.0), (5.1, 6.0), (9.0, 6.0)]) {
            assert_eq!(E2M1.values[E2M1.encode(tie) as usize], want, "{tie}");
            assert_eq!(E2M1.values[E2M1.encode(-tie) as usize], -want, "-{tie}");
        }
        assert_eq!((E2M1.encode(0.0), E2M1.encode(-0.1)), (0, 8));
    }

    #[test]
    fn the_tree_leads_to_the_number_of_pivots_below() {
        for x in NF4.values.iter().chain(&NF4.pivots).flat_map(|x| [*x, x.next_up()]) {
            let node = (0..4).fold(1, |node, _| 2 * node + usize::from(x > NF4.tree[node]));
            assert_eq!(NF4.order[node - 16], NF4.encode(x));
        }
    }

    #[test]
    fn encoding_a_value_gives_it_back() {
        for book in [&NF4, &FP4, &INT4, &E2M1] {
            for value in book.values {
                assert_eq!(book.values[book.encode(value) as usize], value);
            }
        }
        for book in [&DYNAMIC, &DYNAMIC_UNSIGNED] {
            for value in book.values {
                assert_eq!(book.values[book.encode(value) as usize], value);
            }
        }
    }
}
