//! The scalar definition of quantization, and what is measured about it.

pub mod blockwise;
pub mod integer;
pub mod nested;
pub mod product;
pub mod rowwise;
pub mod stats;
pub mod torch_sum;

use crate::error::{Error, Result};

/// Whose bytes to make where exact rounding and bitsandbytes' CPU code differ.
///
/// | case | `Exact` | `BitsandbytesCpu` |
/// |---|---|---|
/// | short last block | multiplied by 1/absmax like every block | divided by absmax |
/// | short last block of zeros | absmax 0 | absmax 1e-38 |
/// | absmax so small that 1/absmax overflows | divided by absmax | multiplied by 1e38 |
/// | nested scale codes | nearest value, ties down | a table of 65,536 steps |
/// | nested block of equal scales | the code of 0.0 | code 0 |
/// | int8 | rounded from the given dtype | cast to fp16 first; 1/absmax is rounded before it is times 127 |
///
/// Everything else is equal, so nf4 and fp4 files nearly always agree to the last byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reference {
    /// Nearest rounding by IEEE arithmetic.
    #[default]
    Exact,
    /// Byte for byte what bitsandbytes 0.50 writes on a CPU.
    BitsandbytesCpu,
}

impl Reference {
    const NAMES: [(&'static str, Reference); 2] =
        [("exact", Reference::Exact), ("bitsandbytes-cpu", Reference::BitsandbytesCpu)];

    /// Finds a rule by name: `exact` or `bitsandbytes-cpu`.
    pub fn parse(name: &str) -> Result<Self> {
        parse_name("reference", name, &Self::NAMES)
    }

    /// The least divisor: bitsandbytes divides by at least 1e-38.
    const fn floor(self) -> f32 {
        match self {
            Reference::Exact => 0.0,
            Reference::BitsandbytesCpu => 1e-38,
        }
    }
}

/// What to do with NaN and infinity among the values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NonFinite {
    /// Fail and name the position.
    #[default]
    Refuse,
    /// Store them as 0 and count them.
    Zero,
}

impl NonFinite {
    const NAMES: [(&'static str, NonFinite); 2] =
        [("error", NonFinite::Refuse), ("zero", NonFinite::Zero)];

    /// Finds a rule by name: `error` or `zero`.
    pub fn parse(name: &str) -> Result<Self> {
        parse_name("nonfinite rule", name, &Self::NAMES)
    }
}

fn parse_name<T: Copy>(what: &'static str, name: &str, table: &[(&'static str, T)]) -> Result<T> {
    table
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, value)| *value)
        .ok_or_else(|| Error::unknown(what, name, table.iter().map(|(known, _)| *known)))
}
