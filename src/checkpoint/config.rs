//! `config.json`: what a quantized model says about itself.
//!
//! Only the entries that change are touched. Everything else keeps its text, so that `1e-06`
//! does not become `0.000001` and a number of any size survives.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::checkpoint::bitsandbytes::owner;
use crate::checkpoint::json::{UniqueMap, from_python, read_capped, to_python};
use crate::checkpoint::shard::{CONFIG, MAX_CONFIG};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::format::Format;

/// The entry that says how a model is quantized.
pub const QUANTIZATION: &str = "quantization_config";

/// Spellings of the entry that names the model's dtype, the newer first.
const DTYPE_KEYS: [&str; 2] = ["dtype", "torch_dtype"];

/// Versions of transformers that read a config inside a config keep a dtype there too.
const INNER: &str = "_config";

type Entries = Vec<(String, Box<RawValue>)>;

/// The entries of a `config.json`, as text.
#[derive(Clone, Debug)]
pub struct Config {
    entries: Entries,
}

impl Config {
    /// Reads the config of a directory, if it has one.
    pub fn read(directory: &Path) -> Result<Option<Self>> {
        let path = directory.join(CONFIG);
        if std::fs::symlink_metadata(&path).is_err() {
            return Ok(None);
        }
        Self::parse(&path, &read_capped(&path, MAX_CONFIG)?).map(Some)
    }

    fn parse(path: &Path, text: &[u8]) -> Result<Self> {
        let UniqueMap(entries) = serde_json::from_slice(&from_python(text))
            .map_err(|error| Error::checkpoint(path, format!("not a config: {error}")))?;
        Ok(Self { entries })
    }

    /// The text of an entry.
    fn get(&self, key: &str) -> Option<&str> {
        self.entries.iter().find(|(name, _)| name == key).map(|(_, value)| value.get())
    }

    /// The dtype that the model's floating point tensors have, if the config says so.
    pub fn dtype(&self) -> Option<Dtype> {
        DTYPE_KEYS
            .iter()
            .filter_map(|key| self.get(key))
            .chain(self.inner_dtype())
            .find_map(|text| Dtype::parse(text.trim_matches('"').trim_start_matches("torch.")).ok())
    }

    fn inner_dtype(&self) -> Option<&str> {
        let text = self.get("text_config")?;
        let UniqueMap(entries): UniqueMap<&RawValue> = serde_json::from_str(text).ok()?;
        let found = entries.into_iter().find(|(name, _)| DTYPE_KEYS.contains(&name.as_str()));
        found.map(|(_, value)| value.get())
    }

    /// How the model is quantized already, if it is: the method's name.
    pub fn quantization(&self) -> Option<String> {
        let value: Value = serde_json::from_str(self.get(QUANTIZATION)?).ok()?;
        if value.is_null() {
            return None;
        }
        let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("bitsandbytes");
        Some(method.to_owned())
    }

    /// Whether the output head is the embedding and has no tensor of its own.
    pub fn is_tied(&self) -> bool {
        self.get("tie_word_embeddings") == Some("true")
    }

    /// Says how the model is quantized.
    pub fn set_quantization(&mut self, value: &Value) -> Result<()> {
        set(&mut self.entries, QUANTIZATION, pretty(value, 1)?)
    }

    /// Says that the model is not quantized.
    pub fn remove_quantization(&mut self) {
        self.entries.retain(|(name, _)| name != QUANTIZATION);
    }

    /// Changes the dtype, here and in configs inside this one that name it.
    pub fn set_dtype(&mut self, dtype: Dtype) -> Result<()> {
        let text = format!("\"{dtype}\"");
        let present = DTYPE_KEYS.iter().find(|key| self.get(key).is_some());
        set(&mut self.entries, present.unwrap_or(&DTYPE_KEYS[0]), text.clone())?;
        for (name, value) in &mut self.entries {
            if !name.ends_with(INNER) || name == QUANTIZATION {
                continue;
            }
            let Ok(UniqueMap(mut inner)) = serde_json::from_str::<UniqueMap<_>>(value.get()) else {
                continue;
            };
            if let Some(key) = DTYPE_KEYS.iter().find(|key| inner.iter().any(|(k, _)| k == *key)) {
                set(&mut inner, key, text.clone())?;
                *value = raw(render(&inner, 1))?;
            }
        }
        Ok(())
    }

    /// The file's text, indented as transformers indents it.
    pub fn render(&self) -> String {
        to_python(&render(&self.entries, 0)) + "\n"
    }
}

/// Replaces an entry, or adds it: in its place where the keys are sorted, else at the end.
fn set(entries: &mut Entries, key: &str, text: String) -> Result<()> {
    let value = raw(text)?;
    if let Some((_, old)) = entries.iter_mut().find(|(name, _)| name == key) {
        *old = value;
        return Ok(());
    }
    let place = if entries.is_sorted_by(|(a, _), (b, _)| a <= b) {
        entries.partition_point(|(name, _)| name.as_str() < key)
    } else {
        entries.len()
    };
    entries.insert(place, (key.to_owned(), value));
    Ok(())
}

fn raw(text: String) -> Result<Box<RawValue>> {
    RawValue::from_string(text)
        .map_err(|error| Error::checkpoint(Path::new(CONFIG), error.to_string()))
}

/// A JSON text whose inner lines are indented for this depth.
fn pretty(value: &Value, depth: usize) -> Result<String> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::checkpoint(Path::new(CONFIG), error.to_string()))?;
    Ok(text.replace('\n', &format!("\n{}", "  ".repeat(depth))))
}

fn render(entries: &[(String, Box<RawValue>)], depth: usize) -> String {
    if entries.is_empty() {
        return "{}".to_owned();
    }
    let mut out = "{".to_owned();
    for (i, (name, value)) in entries.iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        let indent = "  ".repeat(depth + 1);
        let name = Value::from(name.as_str());
        // Writing to a String cannot fail.
        let _ = write!(out, "{comma}\n{indent}{name}: {}", value.get());
    }
    out + "\n" + &"  ".repeat(depth) + "}"
}

/// What the entry says about a quantized model.
#[derive(Clone, Debug)]
pub struct Quantization<'a> {
    /// The format of what no override names.
    pub format: Format,
    /// Elements that share a scale.
    pub blocksize: usize,
    /// Whether the scales are quantized too.
    pub nested: bool,
    /// The dtype of the products.
    pub compute_dtype: Dtype,
    /// Patterns of modules that are left out; `None`: the default.
    pub skip: Option<&'a [String]>,
    /// Patterns of modules that have another format.
    pub overrides: &'a [(String, String)],
}

impl Quantization<'_> {
    /// Whether bitsandbytes has a format.
    pub fn is_theirs(format: Format) -> bool {
        format == Format::Int8 || owner(format) == Some("bitsandbytes")
    }

    /// The entry for the reader that can load every format in it.
    pub fn value(&self) -> Value {
        if self.overrides.is_empty() && Self::is_theirs(self.format) {
            self.bitsandbytes()
        } else {
            self.nybble()
        }
    }

    /// The entry that transformers writes for a model that bitsandbytes quantized.
    pub fn bitsandbytes(&self) -> Value {
        let eight = self.format == Format::Int8;
        // What BitsAndBytesConfig holds when 4-bit options are not in use.
        let (quant_type, nested) =
            if eight { (Format::Fp4, false) } else { (self.format, self.nested) };
        let compute = if eight { Dtype::F32 } else { self.compute_dtype };
        json!({
            "_load_in_4bit": !eight,
            "_load_in_8bit": eight,
            "bnb_4bit_compute_dtype": compute.name(),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": quant_type.name(),
            "bnb_4bit_use_double_quant": nested,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": self.skip,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": !eight,
            "load_in_8bit": eight,
            "quant_method": "bitsandbytes",
        })
    }

    /// The entry of a model that only nybble reads. It names no dtype of products: that is the
    /// input's unless somebody asks for another.
    pub fn nybble(&self) -> Value {
        let overrides: Map<String, Value> = self
            .overrides
            .iter()
            .map(|(pattern, value)| (pattern.clone(), Value::from(value.as_str())))
            .collect();
        json!({
            "blocksize": self.blocksize,
            "compute_dtype": Value::Null,
            "format": self.format.name(),
            "nested": self.nested,
            "overrides": overrides,
            "quant_method": "nybble",
            "skip": self.skip,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(Path::new("config.json"), text.as_bytes()).unwrap()
    }

    #[test]
    fn numbers_keep_their_text_and_entries_their_order() {
        let text = "{\n  \"rms_norm_eps\": 1e-06,\n  \"theta\": 10000.0,\n  \"limit\": Infinity,\n  \"a\": [\n    1\n  ]\n}\n";
        assert_eq!(config(text).render(), text);
    }

    #[test]
    fn the_quantization_goes_to_its_place_among_sorted_keys() {
        let mut config = config(r#"{"a": 1, "vocab_size": 2}"#);
        config.set_quantization(&json!({"k": [1]})).unwrap();
        let want = "{\n  \"a\": 1,\n  \"quantization_config\": {\n    \"k\": [\n      1\n    ]\n  },\n  \"vocab_size\": 2\n}\n";
        assert_eq!(config.render(), want);
        assert_eq!(config.quantization().as_deref(), Some("bitsandbytes"));
        config.remove_quantization();
        assert!(config.quantization().is_none());
    }

    #[test]
    fn the_dtype_changes_under_either_name_and_inside() {
        let mut old = config(r#"{"torch_dtype": "float32"}"#);
        old.set_dtype(Dtype::BF16).unwrap();
        assert_eq!((old.dtype(), old.entries.len()), (Some(Dtype::BF16), 1));
        let mut inner = config(r#"{"text_config": {"dtype": "float32", "eps": 1e-06}}"#);
        assert_eq!(inner.dtype(), Some(Dtype::F32));
        inner.set_dtype(Dtype::F16).unwrap();
        assert!(
            inner.render().contains(
                "\"text_config\": {\n    \"dtype\": \"float16\",\n    \"eps\": 1e-06\n  }"
            )
        );
        let mut none = config("{}");
        assert_eq!(none.dtype(), None);
        none.set_dtype(Dtype::F16).unwrap();
        assert_eq!(none.render(), "{\n  \"dtype\": \"float16\"\n}\n");
    }

    #[test]
    fn a_key_that_occurs_twice_is_refused() {
        assert!(Config::parse(Path::new("x"), br#"{"a": 1, "a": 2}"#).is_err());
        assert!(Config::parse(Path::new("x"), b"[]").is_err());
    }
}
