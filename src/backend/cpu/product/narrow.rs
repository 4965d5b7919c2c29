//! Codebooks in bf16.

use std::sync::OnceLock;

use half::bf16;

use crate::format::Format;

/// A codebook times a factor that makes it as exact in bf16 as it gets.
#[derive(Clone, Copy, Debug)]
pub struct Narrow {
    /// Numbers of bf16.
    pub values: [f32; 16],
    /// What brings them back.
    pub factor: f32,
}

impl Narrow {
    /// The codebook as it is.
    pub const fn exact(values: &[f32; 16]) -> Self {
        Self { values: *values, factor: 1.0 }
    }
}

/// The codebook of a format in bf16.
///
/// A factor shifts all values against the grid of bf16. For fp4, mxfp4 and int4 one exists for
/// which nothing is lost; for nf4 the best of [`STEPS`] factors is taken.
pub fn narrow(format: Format, values: &[f32; 16]) -> Narrow {
    static KNOWN: [OnceLock<Narrow>; Format::ALL.len()] =
        [const { OnceLock::new() }; Format::ALL.len()];
    let place = Format::ALL.iter().position(|other| *other == format).unwrap_or(0);
    *KNOWN[place].get_or_init(|| best(values))
}

/// Factors that are tried between 1 and 2; among them is 192 / 128, which makes bitsandbytes'
/// fp4, whose values are twelfths and their sixteenth parts, exact.
const STEPS: u16 = 1024;

fn best(values: &[f32; 16]) -> Narrow {
    let candidates = (0..STEPS).map(|i| {
        let factor = 1.0 + f32::from(i) / f32::from(STEPS);
        let narrow = values.map(|x| bf16::from_f32(x * factor).to_f32());
        let error: f64 = values
            .iter()
            .zip(narrow)
            .map(|(x, narrow)| (f64::from(*x) - f64::from(narrow) / f64::from(factor)).powi(2))
            .sum();
        (error, Narrow { values: narrow, factor: 1.0 / factor })
    });
    let best = candidates.min_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or(Narrow::exact(values), |(_, narrow)| narrow)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Decode;

    /// Root of the mean square of what is lost.
    fn lost(values: &[f32; 16], narrow: impl Fn(usize) -> f32) -> f64 {
        let square = |(i, x): (usize, &f32)| f64::from(*x - narrow(i)).powi(2);
        (values.iter().enumerate().map(square).sum::<f64>() / 16.0).sqrt()
    }

    #[test]
    fn codebooks_lose_little_and_most_of_them_nothing() {
        for format in Format::ALL {
            let Decode::Codebook4(book) = format.spec().decode else { continue };
            let narrow = narrow(*format, &book.values);
            assert!(narrow.values.iter().all(|x| bf16::from_f32(*x).to_f32() == *x));
            let error = lost(&book.values, |i| narrow.values[i] * narrow.factor);
            if *format == Format::Nf4 {
                let rounded = lost(&book.values, |i| bf16::from_f32(book.values[i]).to_f32());
                assert!(error < 0.7 * rounded, "{error:e} of {rounded:e}");
            } else {
                assert!(error < 1e-7, "{format}: {error:e}");
            }
        }
    }
}
