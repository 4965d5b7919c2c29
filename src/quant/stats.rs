//! What quantization did to a tensor: errors, code histogram, range of scales, outliers.

use serde::Serialize;

use crate::dtype::Element;

/// Sums over all elements, from which the figures follow. Two of them add up.
///
/// Sums are f64 in eight lanes, merged in a fixed order: the same input gives the same bits,
/// whatever the number of threads.
#[derive(Clone, Debug, PartialEq)]
pub struct Stats {
    /// Elements seen.
    pub count: u64,
    /// Sum of squares of the original.
    pub original: f64,
    /// Sum of squares of the decoded values.
    pub decoded: f64,
    /// Sum of products of the two.
    pub product: f64,
    /// Sum of squared differences.
    pub error: f64,
    /// Largest difference.
    pub max_abs: f32,
    /// Smallest scale of a block or row; infinite if none was seen.
    pub absmax_min: f32,
    /// Largest scale of a block or row.
    pub absmax_max: f32,
    /// Elements above [`OUTLIER_FACTOR`] times the root mean square of their block or row.
    pub outliers: u64,
    /// NaN and infinite elements that were stored as 0.
    pub zeroed: u64,
    /// How often each code occurs; empty if it was not counted.
    pub histogram: Vec<u64>,
}

/// An element counts as an outlier above this many times the root mean square of its block: a
/// normal distribution has 6 in 100,000 there.
pub const OUTLIER_FACTOR: f32 = 4.0;

/// Lanes of the sums: element `i` of a block belongs to lane `i % LANES`, but for those of a last
/// group of fewer, which belong to the first.
pub const LANES: usize = 8;

/// The sums of one block or row, lane by lane.
#[derive(Clone, Debug, Default)]
pub struct Sums {
    /// Squares of the original and of the decoded values, products of the two, squared differences.
    pub sums: [[f64; LANES]; 4],
    /// The largest differences.
    pub max_abs: [f32; LANES],
}

impl Sums {
    /// Adds elements of a block: the original and what it decodes to.
    #[inline(always)]
    pub fn add(&mut self, original: &[f32], decoded: &[f32]) {
        let (x8, x1) = original.as_chunks::<LANES>();
        let (y8, y1) = decoded.as_chunks::<LANES>();
        for (x, y) in x8.iter().zip(y8) {
            for lane in 0..LANES {
                self.accumulate(lane, x[lane], y[lane]);
            }
        }
        for (x, y) in x1.iter().zip(y1) {
            self.accumulate(0, *x, *y);
        }
    }

    #[inline(always)]
    fn accumulate(&mut self, lane: usize, x: f32, y: f32) {
        let (wide, decoded) = (f64::from(x), f64::from(y));
        let difference = wide - decoded;
        self.sums[0][lane] += wide * wide;
        self.sums[1][lane] += decoded * decoded;
        self.sums[2][lane] += wide * decoded;
        self.sums[3][lane] += difference * difference;
        self.max_abs[lane] = self.max_abs[lane].max((x - y).abs());
    }
}

/// Elements of one run: a multiple of every block size, small enough for the second-level cache.
/// About as many are summed up before the sums are merged with those of others; sums in f64 depend
/// on it.
pub const RUN: usize = 64 * 1024;

impl Default for Stats {
    fn default() -> Self {
        Self {
            count: 0,
            original: 0.0,
            decoded: 0.0,
            product: 0.0,
            error: 0.0,
            max_abs: 0.0,
            absmax_min: f32::INFINITY,
            absmax_max: 0.0,
            outliers: 0,
            zeroed: 0,
            histogram: Vec::new(),
        }
    }
}

impl Stats {
    /// Adds one block or row: the original, what it decodes to, and its scale.
    #[inline(always)]
    pub fn add(&mut self, original: &[f32], decoded: &[f32], absmax: f32) {
        let mut sums = Sums::default();
        sums.add(original, decoded);
        self.add_sums(&sums, original, absmax);
    }

    /// Adds one block or row: the original, its sums, and its scale.
    #[inline(always)]
    pub fn add_sums(&mut self, sums: &Sums, original: &[f32], absmax: f32) {
        let [square, decoded_square, product, error] =
            sums.sums.map(|lanes| lanes.iter().sum::<f64>());
        self.count += original.len() as u64;
        self.original += square;
        self.decoded += decoded_square;
        self.product += product;
        self.error += error;
        self.max_abs = sums.max_abs.into_iter().fold(self.max_abs, f32::max);
        self.absmax_min = self.absmax_min.min(absmax);
        self.absmax_max = self.absmax_max.max(absmax);
        let limit = OUTLIER_FACTOR * (square / original.len().max(1) as f64).sqrt() as f32;
        // Counted in 32 bits, in which vectors count: no more than one in sixteen can be one.
        let outliers: u32 = original.iter().map(|x| u32::from(x.abs() > limit)).sum();
        self.outliers += u64::from(outliers);
    }

    /// Counts codes, one a byte.
    pub fn count_codes(&mut self, codes: &[u8]) {
        self.histogram.resize(256, 0);
        for (count, more) in self.histogram.iter_mut().zip(count_bytes(codes)) {
            *count += more;
        }
    }

    /// Counts the codes of `elements` elements, two a byte, the first one high.
    pub fn count_packed(&mut self, packed: &[u8], elements: usize) {
        self.histogram.resize(16, 0);
        let (pairs, odd) = packed.split_at((elements / 2).min(packed.len()));
        for (byte, more) in count_bytes(pairs).into_iter().enumerate() {
            self.histogram[byte >> 4] += more;
            self.histogram[byte & 15] += more;
        }
        if let (1, [last, ..]) = (elements % 2, odd) {
            self.histogram[usize::from(last >> 4)] += 1;
        }
    }

    /// Adds what was gathered elsewhere, for example by another thread.
    pub fn merge(&mut self, other: &Stats) {
        self.count += other.count;
        self.original += other.original;
        self.decoded += other.decoded;
        self.product += other.product;
        self.error += other.error;
        self.max_abs = self.max_abs.max(other.max_abs);
        self.absmax_min = self.absmax_min.min(other.absmax_min);
        self.absmax_max = self.absmax_max.max(other.absmax_max);
        self.outliers += other.outliers;
        self.zeroed += other.zeroed;
        self.histogram.resize(self.histogram.len().max(other.histogram.len()), 0);
        for (count, more) in self.histogram.iter_mut().zip(&other.histogram) {
            *count += more;
        }
    }

    /// The figures.
    pub fn summary(&self) -> Summary {
        let count = self.count.max(1) as f64;
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { f64::from(a > 0.0) };
        let relative = ratio(self.error, self.original);
        Summary {
            count: self.count,
            sqnr_db: if self.error > 0.0 { -10.0 * relative.log10() } else { f64::INFINITY },
            mse: self.error / count,
            max_abs: self.max_abs,
            rel_rms: relative.sqrt(),
            cosine: if self.error == 0.0 {
                1.0
            } else {
                ratio(self.product, (self.original * self.decoded).sqrt())
            },
            absmax_min: if self.absmax_min.is_finite() { self.absmax_min } else { 0.0 },
            absmax_max: self.absmax_max,
            outliers: self.outliers,
            zeroed: self.zeroed,
            histogram: self.histogram.clone(),
        }
    }
}

/// How often each byte occurs.
fn count_bytes(bytes: &[u8]) -> [u64; 256] {
    // Four tables: a count that was just written need not be waited for when a byte repeats.
    let mut counts = [[0u64; 256]; 4];
    let (fours, rest) = bytes.as_chunks::<4>();
    for four in fours {
        for (counts, byte) in counts.iter_mut().zip(four) {
            counts[usize::from(*byte)] += 1;
        }
    }
    for byte in rest {
        counts[0][usize::from(*byte)] += 1;
    }
    std::array::from_fn(|byte| counts.iter().map(|counts| counts[byte]).sum())
}

/// Adds blocks or rows of `block` elements to `total`: the original, what it decodes to, and a
/// scale each.
pub fn compare<T: Element>(
    x: &[T],
    decoded: &[f32],
    block: usize,
    scales: &[f32],
    total: &mut Stats,
) {
    for ((x, decoded), scale) in x.chunks(block).zip(decoded.chunks(block)).zip(scales) {
        let wide: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
        total.add(&wide, decoded, *scale);
    }
}

/// Figures about one quantized tensor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Elements.
    pub count: u64,
    /// Signal to quantization noise in decibels: 10 log10(sum x² / sum (x - y)²); infinite
    /// without error.
    pub sqnr_db: f64,
    /// Mean squared error.
    pub mse: f64,
    /// Largest error.
    pub max_abs: f32,
    /// Root of squared error over squared signal.
    pub rel_rms: f64,
    /// Cosine between the original and the decoded tensor.
    pub cosine: f64,
    /// Smallest scale.
    pub absmax_min: f32,
    /// Largest scale.
    pub absmax_max: f32,
    /// Elements above four times the root mean square of their block or row.
    pub outliers: u64,
    /// NaN and infinite elements stored as 0.
    pub zeroed: u64,
    /// Count of each code.
    pub histogram: Vec<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_the_formulas() {
        let mut stats = Stats::default();
        stats.add(&[3.0, -4.0], &[3.0, -3.0], 4.0);
        let figures = stats.summary();
        assert_eq!((figures.count, figures.mse, figures.max_abs), (2, 0.5, 1.0));
        assert!((figures.sqnr_db - 10.0 * 25f64.log10()).abs() < 1e-12);
        assert!((figures.rel_rms - 0.2).abs() < 1e-12);
        assert!((figures.cosine - 21.0 / (25f64 * 18.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn packed_codes_are_counted_without_the_padding_of_an_odd_end() {
        let mut stats = Stats::default();
        stats.count_packed(&[0x12, 0x11, 0x11, 0x11, 0x11, 0x37], 11);
        let mut want = vec![0; 16];
        (want[1], want[2], want[3]) = (9, 1, 1);
        assert_eq!(stats.histogram, want);
        let mut bytes = Stats::default();
        bytes.count_codes(&[7, 7, 200, 0, 7]);
        assert_eq!((bytes.histogram[7], bytes.histogram[200], bytes.histogram[0]), (3, 1, 1));
    }

    #[test]
    fn merging_equals_adding_in_turn() {
        let blocks: [&[f32]; 2] = [&[1.0, 2.0, 90.0], &[0.5]];
        let mut together = Stats::default();
        let mut apart = Stats::default();
        for x in blocks {
            let mut one = Stats::default();
            one.add(x, &[0.0; 3][..x.len()], 90.0);
            apart.merge(&one);
            together.add(x, &[0.0; 3][..x.len()], 90.0);
        }
        assert_eq!(together, apart);
    }

    #[test]
    fn one_value_in_a_calm_block_is_an_outlier() {
        let mut block = [0.01f32; 64];
        block[17] = 5.0;
        let mut stats = Stats::default();
        stats.add(&block, &block, 5.0);
        assert_eq!(stats.outliers, 1);
        assert_eq!(stats.summary().sqnr_db, f64::INFINITY);
    }
}
