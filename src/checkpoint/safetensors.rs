//! One safetensors file: a checked header and positioned reads.
//!
//! The `safetensors` crate checks that tensors tile the data without hole or overlap and that
//! shape, dtype and range agree. It accepts some files that it should not: duplicate names (the
//! last one wins), shapes of any rank, sizes above `i64`, unknown fields; these are refused here. Nothing is
//! mapped into memory: a file that someone truncates while it is read gives an error, where a
//! mapping would give SIGBUS.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use ::safetensors::Dtype;
use ::safetensors::tensor::{self, Metadata};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::checkpoint::json::open_regular;
use crate::error::{Error, Result};

/// The largest header, in bytes; the cap of the safetensors format.
pub const MAX_HEADER: u64 = 100_000_000;

/// The most dimensions that a tensor may have; torch has no more.
pub const MAX_RANK: usize = 64;

/// The length of the header is a little-endian u64 in front of it.
const LENGTH_WORD: u64 = 8;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name, unique in its file.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// The shape; empty for a 0-d tensor.
    pub shape: Vec<usize>,
    /// Where the data begin, from the start of the file.
    pub offset: u64,
    /// Bytes of data.
    pub bytes: u64,
}

impl TensorInfo {
    /// The number of elements; the header's check has made sure that it can be counted.
    pub fn elements(&self) -> usize {
        self.shape.iter().fold(1, |product: usize, extent| product.saturating_mul(*extent))
    }
}

/// The checked header of a file.
#[derive(Clone, Debug)]
pub struct Header {
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
}

impl Header {
    /// Reads and checks the header of a file; no tensor data are read.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(TensorFile::open(path)?.header)
    }

    /// Checks the JSON text of a header against the length of its file.
    fn parse(path: &Path, text: &[u8], file_bytes: u64) -> Result<Self> {
        let damaged = |problem: String| Error::checkpoint(path, problem);
        let mut entries: Entries = serde_json::from_slice(text)
            .map_err(|error| damaged(format!("the header is not valid: {error}")))?;
        entries.tensors.sort_by(|(name, info), (other_name, other)| {
            info.data_offsets.cmp(&other.data_offsets).then_with(|| name.cmp(other_name))
        });

        let data_start = LENGTH_WORD + text.len() as u64;
        let mut tensors = Vec::with_capacity(entries.tensors.len());
        let mut by_name = HashMap::with_capacity(entries.tensors.len());
        for (name, raw) in &entries.tensors {
            let info = check(name, raw, data_start)
                .map_err(|problem| Error::tensor(path, name, problem))?;
            if by_name.insert(name.clone(), tensors.len()).is_some() {
                return Err(Error::tensor(path, name, "the name occurs twice in the header"));
            }
            tensors.push(info);
        }
        let infos =
            entries.tensors.into_iter().map(|(name, RawInfo { dtype, shape, data_offsets })| {
                (name, tensor::TensorInfo { dtype, shape, data_offsets })
            });
        let metadata = Metadata::new(None, infos.collect())
            .map_err(|error| damaged(format!("the header is not valid: {error}")))?;

        let expected = (metadata.data_len() as u64).checked_add(data_start);
        match expected {
            Some(expected) if expected == file_bytes => {
                Ok(Self { tensors, by_name, metadata: entries.metadata })
            }
            Some(expected) if expected < file_bytes => Err(damaged(format!(
                "{} bytes follow the last tensor; a file ends with its data",
                file_bytes - expected
            ))),
            _ => {
                let cut = tensors.iter().find(|info| info.offset + info.bytes > file_bytes);
                let name = cut.map_or("", |info| info.name.as_str());
                Err(Error::tensor(path, name, "the file ends before its data; copy it again"))
            }
        }
    }

    /// The tensors in the order of their data.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).and_then(|index| self.tensors.get(*index))
    }

    /// The `__metadata__` of the file.
    pub const fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

/// What the crate's validation leaves open, and what it reports without naming the tensor.
fn check(name: &str, raw: &RawInfo, data_start: u64) -> Result<TensorInfo, String> {
    if name.is_empty() || name.contains('\0') {
        return Err("a tensor name must not be empty or contain a NUL".to_owned());
    }
    if raw.shape.len() > MAX_RANK {
        return Err(format!("{} dimensions, at most {MAX_RANK} are possible", raw.shape.len()));
    }
    if !is_countable(&raw.shape, raw.dtype.bitsize()) {
        return Err(format!("shape {:?} is more than an index can count", raw.shape));
    }
    let (begin, end) = raw.data_offsets;
    // Cannot overflow: even without its zeros the product is within bounds.
    let bits = raw.shape.iter().fold(raw.dtype.bitsize(), |bits, n| bits.saturating_mul(*n));
    if end.checked_sub(begin) != Some(bits / 8) || bits % 8 != 0 {
        return Err(format!(
            "data from {begin} to {end} do not fit {} of shape {:?}",
            raw.dtype, raw.shape
        ));
    }
    let offset = (begin as u64)
        .checked_add(data_start)
        .filter(|offset| offset.checked_add(bits as u64 / 8).is_some())
        .ok_or_else(|| format!("data at {begin} are beyond the end of any file"))?;
    Ok(TensorInfo {
        name: name.to_owned(),
        dtype: raw.dtype,
        shape: raw.shape.clone(),
        offset,
        bytes: bits as u64 / 8,
    })
}

/// Whether strides and bytes of a tensor of this shape fit in an `isize`. Zeros count as ones:
/// torch multiplies the other extents even where the product is nothing.
pub(crate) fn is_countable(shape: &[usize], bits: usize) -> bool {
    shape
        .iter()
        .try_fold(bits, |product, extent| product.checked_mul((*extent).max(1)))
        .is_some_and(|bits| isize::try_from(bits).is_ok())
}

/// A tensor as the header describes it. Other fields are refused: nobody knows what they mean.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawInfo {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// The header as it is written, duplicates included.
struct Entries {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawInfo)>,
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntryVisitor;

        impl<'de> Visitor<'de> for EntryVisitor {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let (mut metadata, mut tensors) = (None, Vec::new());
                while let Some(key) = map.next_key::<String>()? {
                    if key != "__metadata__" {
                        tensors.push((key, map.next_value()?));
                    } else if metadata.replace(map.next_value::<Option<_>>()?).is_some() {
                        return Err(A::Error::custom("__metadata__ occurs twice"));
                    }
                }
                Ok(Entries { metadata: metadata.flatten().unwrap_or_default(), tensors })
            }
        }

        deserializer.deserialize_map(EntryVisitor)
    }
}

/// An open file with its checked header.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    header: Header,
}

impl TensorFile {
    /// Opens a regular file and checks its header.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_regular(path)?;
        let file_bytes = file.metadata().map_err(|source| Error::io(path, source))?.len();
        let mut length = [0; LENGTH_WORD as usize];
        if file_bytes < LENGTH_WORD {
            let problem = format!("{file_bytes} bytes are too few for a safetensors file");
            return Err(Error::checkpoint(path, problem));
        }
        read_at(path, &file, 0, &mut length)?;
        let start = length;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER || length > file_bytes - LENGTH_WORD {
            let problem = known_magic(&start).map_or_else(
                || {
                    format!(
                        "not a safetensors file, or damaged: a header of {length} bytes in a file \
                         of {file_bytes} (at most {MAX_HEADER} are allowed)"
                    )
                },
                str::to_owned,
            );
            return Err(Error::checkpoint(path, problem));
        }
        let mut text = vec![0; length as usize];
        read_at(path, &file, LENGTH_WORD, &mut text)?;
        let header = Header::parse(path, &text, file_bytes)?;
        Ok(Self { path: path.to_owned(), file, header })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The checked header.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// Fills `out` with the bytes of a tensor from `first` on. May be called from several
    /// threads at once.
    pub fn read(&self, info: &TensorInfo, first: u64, out: &mut [u8]) -> Result<()> {
        let wanted = first.checked_add(out.len() as u64).filter(|end| *end <= info.bytes);
        if wanted.is_none() {
            let problem = format!(
                "{} bytes from byte {first} were asked of a tensor of {} bytes",
                out.len(),
                info.bytes
            );
            return Err(Error::tensor(&self.path, &info.name, problem));
        }
        read_at(&self.path, &self.file, info.offset + first, out)
    }

    /// Fails when the file has become shorter or longer since it was opened.
    pub fn check_length(&self) -> Result<()> {
        let found = self.file.metadata().map_err(|source| Error::io(&self.path, source))?.len();
        let last = self.header.tensors.last();
        match last.map(|info| info.offset + info.bytes) {
            Some(expected) if expected != found => Err(Error::checkpoint(
                &self.path,
                format!("has {found} bytes now, {expected} when it was opened"),
            )),
            _ => Ok(()),
        }
    }
}

/// Files that people take for safetensors, told by their first bytes once those cannot be the
/// length of a header (640 is `80 02 00 ...`, which is how a pickle may start).
fn known_magic(start: &[u8]) -> Option<&'static str> {
    if start.starts_with(b"GGUF") {
        Some("a GGUF file; this version does not read GGUF yet, use the safetensors of the model")
    } else if start.starts_with(b"PK\x03\x04") || start.starts_with(b"\x80\x02") {
        Some("a pickled torch file, which could run code; convert it to safetensors first")
    } else {
        None
    }
}

/// Positioned reads until `out` is full.
fn read_at(path: &Path, file: &File, mut offset: u64, mut out: &mut [u8]) -> Result<()> {
    while !out.is_empty() {
        match read_some(file, offset, out) {
            Ok(0) => {
                let problem = format!("the file ends at byte {offset}, it has been truncated");
                return Err(Error::checkpoint(path, problem));
            }
            Ok(n) => {
                offset += n as u64;
                out = out.get_mut(n..).unwrap_or_default();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io(path, error)),
        }
    }
    Ok(())
}

#[cfg(unix)]
fn read_some(file: &File, offset: u64, out: &mut [u8]) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, out, offset)
}

#[cfg(windows)]
fn read_some(file: &File, offset: u64, out: &mut [u8]) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, out, offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, data: u64) -> Result<Header> {
        Header::parse(Path::new("x"), text.as_bytes(), 8 + text.len() as u64 + data)
    }

    #[test]
    fn offsets_count_from_the_start_of_the_file() {
        let text = r#"{"b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]},
            "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"__metadata__":{"format":"pt"}}"#;
        let header = parse(text, 7).unwrap();
        let names: Vec<_> = header.tensors().iter().map(|info| info.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        let b = header.get("b").unwrap();
        assert_eq!((b.offset, b.bytes, b.elements()), (8 + text.len() as u64 + 4, 3, 3));
        assert_eq!(header.metadata()["format"], "pt");
    }

    #[test]
    fn a_name_that_occurs_twice_is_refused() {
        let text = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
            "a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}"#;
        assert!(parse(text, 4).unwrap_err().to_string().contains("'a': the name occurs twice"));
        let text = r#"{"__metadata__":{},"__metadata__":{}}"#;
        assert!(parse(text, 0).is_err());
    }

    #[test]
    fn a_header_length_is_not_taken_for_the_start_of_a_pickle() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.safetensors");
        let header = format!("{{{:638}}}", "");
        let bytes = [&640u64.to_le_bytes(), header.as_bytes()].concat();
        assert!(bytes.starts_with(b"\x80\x02"));
        std::fs::write(&path, bytes).unwrap();
        assert!(Header::read(&path).unwrap().tensors().is_empty());
        std::fs::write(&path, b"\x80\x02}q\0X\x0b\0\0\0").unwrap();
        assert!(Header::read(&path).unwrap_err().to_string().contains("pickled"));
    }

    #[test]
    fn odd_names_and_shapes_are_refused() {
        let one = |name: &str, shape: &str| {
            let text =
                format!(r#"{{"{name}":{{"dtype":"U8","shape":{shape},"data_offsets":[0,0]}}}}"#);
            parse(&text, 0).map(|_| ()).map_err(|error| error.to_string())
        };
        assert!(one("a", "[0]").is_ok());
        assert!(one("", "[0]").is_err());
        assert!(one("a\\u0000b", "[0]").is_err());
        assert!(one("a", "[0,9223372036854775808]").unwrap_err().contains("9223372036854775808"));
        assert!(one("a", "[0,4611686018427387904,4]").unwrap_err().contains("shape"));
        assert!(one("a", &format!("[0{}]", ",1".repeat(64))).unwrap_err().contains("65"));
    }
}
