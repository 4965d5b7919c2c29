//! The names under which bitsandbytes stores a quantized parameter, both ways.
//!
//! ```text
//! 4 bits   M.weight                  codes, whatever dtype they pose as
//!          M.weight.absmax           F32 scales; U8 codes of scales where nested
//!          M.weight.quant_map        F32 [16]
//!          M.weight.nested_absmax    F32       \ where nested
//!          M.weight.nested_quant_map F32 [256] /
//!          M.weight.quant_state.bitsandbytes__nf4   U8 JSON, see `quant_state`
//! 8 bits   M.weight                  I8 [rows, columns]
//!          M.SCB                     F32 [rows]
//!          M.weight_format           U8 [], 0 for rows; old files lack it
//! ```
//!
//! Formats that bitsandbytes does not have use the 4-bit scheme with `nybble__<format>` in the
//! last name, so that bitsandbytes refuses them by name instead of decoding them wrongly.
//! A parameter need not be called `weight`: fused experts are stored the same way.

use std::collections::{BTreeMap, BTreeSet};

use crate::checkpoint::shard::Source;
use crate::format::codebook::DYNAMIC;
use crate::format::{Decode, Format};

/// A tensor that belongs to a quantized parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Companion {
    /// Scales, or their codes.
    Absmax,
    /// The value of each code.
    QuantMap,
    /// Scales of the scales.
    NestedAbsmax,
    /// The value of each code of a scale.
    NestedQuantMap,
    /// The JSON text that describes the rest.
    QuantState,
    /// Scales of the rows, for eight bits.
    Scb,
    /// The order of the bytes, for eight bits.
    WeightFormat,
}

const SUFFIXES: [(Companion, &str); 7] = [
    (Companion::Absmax, "absmax"),
    (Companion::QuantMap, "quant_map"),
    (Companion::NestedAbsmax, "nested_absmax"),
    (Companion::NestedQuantMap, "nested_quant_map"),
    (Companion::QuantState, "quant_state"),
    (Companion::Scb, "SCB"),
    (Companion::WeightFormat, "weight_format"),
];

impl Companion {
    /// The last part of its name on disk; a format follows `quant_state`.
    pub fn suffix(self) -> &'static str {
        SUFFIXES.iter().find(|(companion, _)| *companion == self).map_or("", |(_, suffix)| *suffix)
    }

    /// Those of eight bits hang on the module, those of four bits on the parameter.
    const fn is_of_module(self) -> bool {
        matches!(self, Companion::Scb | Companion::WeightFormat)
    }

    /// The name on disk beside a parameter of this format.
    ///
    /// ```
    /// use nybble::{checkpoint::bitsandbytes::Companion, format::Format};
    /// let key = |companion: Companion| companion.key("fc.weight", Format::Nf4);
    /// assert_eq!(key(Companion::Absmax), "fc.weight.absmax");
    /// assert_eq!(key(Companion::QuantState), "fc.weight.quant_state.bitsandbytes__nf4");
    /// assert_eq!(Companion::Scb.key("fc.weight", Format::Int8), "fc.SCB");
    /// ```
    pub fn key(self, parameter: &str, format: Format) -> String {
        let suffix = self.suffix();
        match (self, owner(format)) {
            (Companion::QuantState, Some(owner)) => {
                format!("{parameter}.{suffix}.{owner}__{format}")
            }
            _ if self.is_of_module() => match parameter.strip_suffix("weight") {
                Some(module) if module.is_empty() || module.ends_with('.') => {
                    format!("{module}{suffix}")
                }
                _ => format!("{parameter}.{suffix}"),
            },
            _ => format!("{parameter}.{suffix}"),
        }
    }
}

/// Who defines the format as it is stored with a `quant_state`; none for int8, which has none,
/// and for what is not quantized.
pub const fn owner(format: Format) -> Option<&'static str> {
    match format {
        Format::Nf4 | Format::Fp4 => Some("bitsandbytes"),
        Format::Int4 | Format::Dynamic8 | Format::Dynamic8Unsigned | Format::Mxfp4 => {
            Some("nybble")
        }
        Format::Int8 | Format::Fp16 | Format::Bf16 | Format::Fp32 => None,
    }
}

/// The values that a file stores as `quant_map`.
pub const fn quant_map(format: Format) -> &'static [f32] {
    match format.spec().decode {
        Decode::Codebook4(book) => &book.values,
        Decode::Codebook8(book) => &book.values,
        Decode::Int8 | Decode::Dense(_) => &[],
    }
}

/// The values that a file stores as `nested_quant_map`.
pub const fn nested_quant_map() -> &'static [f32] {
    &DYNAMIC.values
}

/// A companion with its full name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// What it is.
    pub companion: Companion,
    /// The whole name of the tensor.
    pub key: String,
}

/// Which tensors are parameters and which belong to one.
#[derive(Clone, Debug, Default)]
pub struct Groups {
    parameters: BTreeMap<String, Vec<Named>>,
    orphans: Vec<String>,
}

impl Groups {
    /// Sorts the tensors of a checkpoint.
    pub fn new(source: &Source) -> Self {
        let names: BTreeSet<&str> = source.tensors().map(|(_, info)| info.name.as_str()).collect();
        let mut groups = Self::default();
        let mut companions = Vec::new();
        for name in &names {
            match split(name) {
                None => {
                    groups.parameters.insert((*name).to_owned(), Vec::new());
                }
                Some((companion, owner)) => companions.push((*name, companion, owner)),
            }
        }
        for (name, companion, owner) in companions {
            let named = Named { companion, key: name.to_owned() };
            let of_module =
                if owner.is_empty() { "weight".to_owned() } else { format!("{owner}.weight") };
            let hangs_on_module =
                companion.is_of_module() && groups.parameters.contains_key(&of_module);
            let parameter = if hangs_on_module { of_module } else { owner.to_owned() };
            match groups.parameters.get_mut(&parameter) {
                Some(group) => group.push(named),
                None => groups.orphans.push(named.key),
            }
        }
        groups
    }

    /// Every parameter with its companions; none where it is not quantized.
    pub fn parameters(&self) -> impl ExactSizeIterator<Item = (&str, &[Named])> {
        self.parameters.iter().map(|(name, companions)| (name.as_str(), companions.as_slice()))
    }

    /// The companions of a parameter; none for a name that is no parameter.
    pub fn get(&self, parameter: &str) -> Option<&[Named]> {
        self.parameters.get(parameter).map(Vec::as_slice)
    }

    /// Companions without a parameter.
    pub fn orphans(&self) -> &[String] {
        &self.orphans
    }
}

/// What a tensor is by its name, and the name of the parameter (or module) that it hangs on.
fn split(name: &str) -> Option<(Companion, &str)> {
    if let Some((parameter, state)) = name.rsplit_once(".quant_state.") {
        let known = state.split_once("__").is_some_and(|(owner, _)| {
            Format::ALL.iter().any(|format| self::owner(*format) == Some(owner))
        });
        return (known && !parameter.is_empty()).then_some((Companion::QuantState, parameter));
    }
    let (parent, last) = name.rsplit_once('.').unwrap_or(("", name));
    let (companion, _) = SUFFIXES.iter().find(|(_, suffix)| *suffix == last)?;
    let possible = match companion {
        Companion::QuantState => false,
        companion => companion.is_of_module() || !parent.is_empty(),
    };
    possible.then_some((*companion, parent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_recognised_again() {
        for parameter in ["fc.weight", "experts.gate_up_proj", "a.b.weight"] {
            for &format in Format::ALL {
                for (companion, _) in SUFFIXES {
                    let key = companion.key(parameter, format);
                    let Some((found, on)) = split(&key) else {
                        assert!(companion == Companion::QuantState && owner(format).is_none());
                        continue;
                    };
                    let module = parameter.strip_suffix(".weight").unwrap_or(parameter);
                    let expected = if companion.is_of_module() { module } else { parameter };
                    assert_eq!((found, on), (companion, expected));
                }
            }
        }
    }

    #[test]
    fn ordinary_names_are_no_companions() {
        for name in ["weight", "absmax", "fc.bias", "quant_state", "x.quant_state.other", "SCBx"] {
            assert_eq!(split(name), None, "{name}");
        }
        assert_eq!(split("SCB"), Some((Companion::Scb, "")));
        assert_eq!(Companion::Scb.key("weight", Format::Int8), "SCB");
        assert_eq!(Companion::Scb.key("overweight", Format::Int8), "overweight.SCB");
    }
}
