//! The JSON text that a file keeps beside each quantized weight (`quant_state`).
//!
//! bitsandbytes writes it with Python's `json.dumps`; [`QuantState::render`] gives the same
//! bytes, down to how Python spells floats.

use serde::Deserialize;

use crate::checkpoint::json::explain;
use crate::dtype::Dtype;
use crate::format::Format;
use crate::quant::nested::NESTED_BLOCKSIZE;

/// The longest text that makes sense; real ones have 80 to 200 bytes.
pub const MAX_BYTES: u64 = 4096;

/// What the text says. That shape and tensors agree is for the reader to check.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantState {
    /// The format; on disk `quant_type`.
    pub format: Format,
    /// Elements that share a scale.
    pub blocksize: usize,
    /// The type that the weight had when it was quantized.
    pub dtype: Dtype,
    /// The shape of the weight.
    pub shape: Vec<usize>,
    /// Present where the scales are quantized themselves.
    pub nested: Option<Nested>,
}

/// How the scales were quantized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nested {
    /// The type that the scales had: `float32`, unless they went through a defect.
    pub dtype: Dtype,
    /// The mean of the scales.
    pub offset: f32,
}

/// The fields under their names on disk, in bitsandbytes' order.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

impl QuantState {
    /// Reads the text; keys may come in any order, but only the known ones and each once.
    ///
    /// ```
    /// use nybble::checkpoint::quant_state::QuantState;
    /// let text = br#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 3]}"#;
    /// let state = QuantState::parse(text).unwrap();
    /// assert_eq!(state.render().as_bytes(), text);
    /// assert!(QuantState::parse(b"{}").is_err());
    /// ```
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let raw: Raw = serde_json::from_slice(text).map_err(|error| explain(text, &error))?;
        let format =
            Format::parse(&raw.quant_type).map_err(|error| format!("quant_type: {error}"))?;
        let nested = match (raw.nested_blocksize, raw.nested_dtype, raw.nested_offset) {
            (None, None, None) => None,
            (Some(blocksize), _, _) if blocksize != NESTED_BLOCKSIZE => {
                return Err(format!(
                    "nested_blocksize is {blocksize}, only {NESTED_BLOCKSIZE} exists"
                ));
            }
            (Some(_), Some(dtype), Some(offset)) => {
                let offset = offset as f32;
                if !offset.is_finite() {
                    return Err("nested_offset is not finite".to_owned());
                }
                Some(Nested { dtype: torch_dtype("nested_dtype", &dtype)?, offset })
            }
            (blocksize, dtype, _) => {
                let missing = match (blocksize, dtype) {
                    (None, _) => "nested_blocksize",
                    (_, None) => "nested_dtype",
                    _ => "nested_offset",
                };
                return Err(format!("{missing} is missing beside the other nested fields"));
            }
        };
        format.blocksize(Some(raw.blocksize)).map_err(|error| error.to_string())?;
        let dtype = torch_dtype("dtype", &raw.dtype)?;
        Ok(Self { format, blocksize: raw.blocksize, dtype, shape: raw.shape, nested })
    }

    /// The text as Python's `json.dumps` writes it.
    pub fn render(&self) -> String {
        let shape: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        let nested = self.nested.map_or_else(String::new, |nested| {
            format!(
                ", \"nested_blocksize\": {NESTED_BLOCKSIZE}, \"nested_dtype\": \"{}\", \
                 \"nested_offset\": {}",
                nested.dtype,
                python_float(f64::from(nested.offset))
            )
        });
        format!(
            "{{\"quant_type\": \"{}\", \"blocksize\": {}, \"dtype\": \"{}\", \"shape\": [{}]{nested}}}",
            self.format,
            self.blocksize,
            self.dtype,
            shape.join(", ")
        )
    }
}

/// Only torch's own names: bitsandbytes looks the text up as an attribute of torch.
fn torch_dtype(key: &str, name: &str) -> Result<Dtype, String> {
    Dtype::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| {
        format!("{key} is '{name}', not one of {}", Dtype::ALL.map(Dtype::name).join(" "))
    })
}

/// Python's `repr`: the fewest digits that come back as the same number, with an exponent of at
/// least two digits below 1e-4 and from 1e16 on. Of two candidates that are equally near, Python
/// takes the even one and Rust's shortest form the upper, so only the count is Rust's.
fn python_float(x: f64) -> String {
    let shortest = format!("{x:e}");
    let Some((digits, _)) = shortest.split_once('e') else { return shortest };
    let decimals = digits.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    let even = format!("{x:.decimals$e}");
    match even.split_once('e').map(|(digits, exponent)| (digits, exponent.parse::<i32>())) {
        Some((digits, Ok(exponent))) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        Some((_, Ok(exponent))) => {
            let decimals = (decimals as i32 - exponent).max(1) as usize;
            format!("{x:.decimals$}")
        }
        _ => even,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NESTED: &str = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 352], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05173388496041298}"#;

    #[test]
    fn the_text_of_bitsandbytes_comes_back_byte_for_byte() {
        let state = QuantState::parse(NESTED.as_bytes()).unwrap();
        assert_eq!((state.shape.as_slice(), state.blocksize), ([128, 352].as_slice(), 64));
        assert_eq!(state.render(), NESTED);
    }

    #[test]
    fn floats_are_spelled_as_python_spells_them() {
        for (x, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (f64::from(0.1f32), "0.10000000149011612"),
            (f64::from(0.180_881_5f32), "0.18088150024414062"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (-1.5e-7, "-1.5e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e22, "1.25e+22"),
            (1e-300, "1e-300"),
            (f64::from(f32::MIN_POSITIVE), "1.1754943508222875e-38"),
        ] {
            assert_eq!(python_float(x), text);
        }
    }

    #[test]
    fn order_and_white_space_are_free() {
        let text = "\n{ \"shape\":[128,352],\"nested_offset\":0.05173388496041298, \"dtype\":\"bfloat16\",
            \"nested_dtype\":\"float32\",\"nested_blocksize\":256,\"blocksize\":64,\"quant_type\":\"nf4\"}\n";
        assert_eq!(QuantState::parse(text.as_bytes()).unwrap().render(), NESTED);
    }

    #[test]
    fn an_error_names_the_key() {
        for (from, to, named) in [
            ("64", "0", "blocksize"),
            ("64", "-64", "blocksize"),
            ("64", "1099511627776", "blocksize"),
            ("\"nf4\"", "\"nf3\"", "quant_type"),
            ("\"bfloat16\"", "\"load\"", "dtype"),
            ("\"bfloat16\"", "\"bf16\"", "dtype"),
            ("[128, 352]", "[128, -352]", "shape"),
            ("[128, 352]", "[128, 352.0]", "shape"),
            ("256", "128", "nested_blocksize"),
            ("0.05173388496041298", "NaN", "nested_offset"),
            ("0.05173388496041298", "1e39", "nested_offset"),
            (", \"nested_offset\": 0.05173388496041298", "", "nested_offset"),
            ("\"nested_dtype\"", "\"colour\"", "colour"),
            ("\"nested_dtype\"", "\"dtype\"", "dtype"),
        ] {
            let text = NESTED.replacen(from, to, 1);
            let error = QuantState::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
