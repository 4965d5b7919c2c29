//! Small JSON files from strangers: capped in size, duplicate keys refused.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::io::Read;
use std::marker::PhantomData;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use crate::error::{Error, Result};

/// Opens a regular file; anything else (a directory, a FIFO, a device) is an error at once, not
/// a hang.
pub(crate) fn open_regular(path: &Path) -> Result<fs::File> {
    let io = |source| Error::io(path, source);
    // Opening a FIFO blocks until someone writes, so its kind is looked up first.
    if !fs::metadata(path).map_err(io)?.is_file() {
        return Err(Error::checkpoint(path, "not a regular file"));
    }
    fs::File::open(path).map_err(io)
}

/// Reads a whole file of at most `cap` bytes.
pub(crate) fn read_capped(path: &Path, cap: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut file = open_regular(path)?.take(cap.saturating_add(1));
    file.read_to_end(&mut bytes).map_err(|source| Error::io(path, source))?;
    if bytes.len() as u64 > cap {
        return Err(Error::checkpoint(path, format!("larger than {cap} bytes, which is too much")));
    }
    Ok(bytes)
}

/// What is wrong with a one-line JSON text, with the last string before the place of the error,
/// which is usually the key.
pub(crate) fn explain(text: &[u8], error: &serde_json::Error) -> String {
    let before = text.get(..error.column().min(text.len())).unwrap_or(text);
    let mut quoted = before.rsplit(|byte| *byte == b'"').skip(1);
    match quoted.next().map(String::from_utf8_lossy) {
        Some(key) if error.line() == 1 && (1..=64).contains(&key.len()) => {
            format!("{error}, near '{}'", key.escape_debug())
        }
        _ => error.to_string(),
    }
}

/// What Python's `json` writes for floats that JSON has no word for, longest first.
const PYTHON_FLOATS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

const MARK: &str = "__python_float__";

/// Makes JSON of a text that Python wrote: `Infinity` outside of strings becomes a marked string.
/// Configs of some models have it (`time_step_limit` of Mamba 2).
pub(crate) fn from_python(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let (mut rest, mut in_string) = (text, false);
    while let Some((byte, after)) = rest.split_first() {
        let float = PYTHON_FLOATS.iter().find(|float| rest.starts_with(float.as_bytes()));
        if let (false, Some(float)) = (in_string, float) {
            out.extend_from_slice(format!("\"{MARK}{float}\"").as_bytes());
            rest = rest.get(float.len()..).unwrap_or_default();
            continue;
        }
        out.push(*byte);
        rest = after;
        match (byte, in_string, after.split_first()) {
            (b'\\', true, Some((escaped, after))) => {
                out.push(*escaped);
                rest = after;
            }
            (b'"', ..) => in_string = !in_string,
            _ => {}
        }
    }
    out
}

/// The way back.
pub(crate) fn to_python(text: &str) -> String {
    let unmark = |text: String, float: &&str| text.replace(&format!("\"{MARK}{float}\""), float);
    PYTHON_FLOATS.iter().fold(text.to_owned(), unmark)
}

/// A JSON object in its order, each key once.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct UniqueMap<V>(pub Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for Entries<V> {
            type Value = UniqueMap<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let (mut entries, mut seen) = (Vec::new(), HashSet::new());
                while let Some((key, value)) = map.next_entry::<String, V>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format_args!("key '{key}' occurs twice")));
                    }
                    entries.push((key, value));
                }
                Ok(UniqueMap(entries))
            }
        }

        deserializer.deserialize_map(Entries(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_may_occur_once() {
        let parse = serde_json::from_str::<UniqueMap<u8>>;
        assert_eq!(parse(r#"{"b":1,"a":2}"#).unwrap().0.len(), 2);
        assert!(parse(r#"{"b":1,"b":2}"#).unwrap_err().to_string().contains("'b'"));
    }

    #[test]
    fn floats_that_only_python_writes_survive() {
        let text = r#"{"limit": [0.0, Infinity, -Infinity], "NaN \" Infinity": NaN, "x": 1e-06}"#;
        let json = from_python(text.as_bytes());
        assert!(serde_json::from_slice::<serde_json::Value>(&json).is_ok());
        assert_eq!(to_python(std::str::from_utf8(&json).unwrap()), text);
        assert_eq!(from_python(b"{\"a\\"), b"{\"a\\");
    }

    #[test]
    fn an_error_names_the_key_before_it() {
        let text = br#"{"shape": [1], "offset": NaN}"#;
        let error = serde_json::from_slice::<serde_json::Value>(text).unwrap_err();
        assert!(explain(text, &error).ends_with("near 'offset'"), "{}", explain(text, &error));
    }
}
