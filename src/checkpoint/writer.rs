//! Writes one safetensors file, in any order, without holding it in memory.
//!
//! All tensors and their sizes are declared first, so every position in the file is known and
//! data go straight to their place. One thing is not known: how long a text with a number in it
//! will be (`nested_offset`). Such a tensor is declared with the most it can take; what lies
//! behind it gets its position when its length is known, and small data wait in memory until
//! then.
//!
//! The header comes last: until [`Writer::finish`] the file starts with zeros, which no reader
//! takes for a safetensors file, whatever happens to this process.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ::safetensors::Dtype;
use ::safetensors::tensor::{Metadata, TensorInfo};

use crate::checkpoint::safetensors::Header;
use crate::error::{Error, Result};

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The name, unique in its file.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// The shape; of a text its length in bytes.
    pub shape: Vec<usize>,
    /// Bytes of data.
    pub bytes: u64,
    /// Whether it may turn out shorter than declared; only for bytes of one dimension.
    pub is_text: bool,
}

/// The length of the header is a little-endian u64 in front of it.
const LENGTH_WORD: u64 = 8;

/// The header is padded with spaces to a multiple of this, as the crate pads it.
const ALIGNMENT: usize = 8;

#[derive(Debug)]
struct Slot {
    output: Output,
    /// Bytes written so far.
    written: u64,
    /// Whether `output` has its final size.
    is_final: bool,
}

/// A file that is being written.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
    header_bytes: usize,
    /// In the order of the file.
    slots: Vec<Slot>,
    by_name: HashMap<String, usize>,
    /// Positions of the first slots; the rest wait for a length.
    positions: Vec<u64>,
    /// Whole tensors without a position yet.
    waiting: Vec<(usize, Vec<u8>)>,
}

impl Writer {
    /// Creates a file that did not exist, with room for all tensors.
    ///
    /// Fails at once where the disk is too full, not in the middle.
    pub fn create(path: &Path, mut outputs: Vec<Output>) -> Result<Self> {
        sort(&mut outputs);
        let by_name: HashMap<String, usize> =
            outputs.iter().enumerate().map(|(slot, output)| (output.name.clone(), slot)).collect();
        if by_name.len() < outputs.len() {
            let twice = outputs.windows(2).find(|pair| pair[0].name == pair[1].name);
            let name = twice.map_or("", |pair| pair[0].name.as_str());
            return Err(Error::tensor(path, name, "two tensors would have this name"));
        }
        let header_bytes = header(path, outputs.iter())?.len().next_multiple_of(ALIGNMENT);
        let total = outputs.iter().map(|output| output.bytes).sum::<u64>();
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|source| Error::io(path, source))?;
        reserve(path, &file, LENGTH_WORD + header_bytes as u64 + total)?;
        let slots = outputs
            .into_iter()
            .map(|output| Slot { is_final: !output.is_text, output, written: 0 })
            .collect();
        let mut writer = Self {
            path: path.to_owned(),
            file,
            header_bytes,
            slots,
            by_name,
            positions: Vec::new(),
            waiting: Vec::new(),
        };
        writer.place()?;
        Ok(writer)
    }

    /// Writes a part of a tensor, from byte `first` of it on.
    pub fn write(&mut self, name: &str, first: u64, bytes: &[u8]) -> Result<()> {
        let slot = self.slot(name)?;
        match (self.positions.get(slot), self.slots.get_mut(slot)) {
            (Some(position), Some(entry)) if entry.is_final => {
                let end = first.checked_add(bytes.len() as u64);
                if end.is_none_or(|end| end > entry.output.bytes) {
                    return Err(Error::tensor(&self.path, name, "more data than were declared"));
                }
                entry.written += bytes.len() as u64;
                write_all(&self.path, &self.file, position + first, bytes)
            }
            _ => {
                let problem = "its position follows from a tensor that is not written yet";
                Err(Error::tensor(&self.path, name, problem))
            }
        }
    }

    /// Writes a whole tensor, now or as soon as its position is known.
    pub fn put(&mut self, name: &str, bytes: Vec<u8>) -> Result<()> {
        let slot = self.slot(name)?;
        let Some(entry) = self.slots.get_mut(slot) else { return Ok(()) };
        let got = bytes.len() as u64;
        if entry.output.is_text && !entry.is_final && got <= entry.output.bytes {
            entry.output.bytes = got;
            entry.output.shape = vec![bytes.len()];
            entry.is_final = true;
        }
        if got != entry.output.bytes {
            return Err(Error::tensor(
                &self.path,
                name,
                format!("{got} bytes of data, {} were declared", entry.output.bytes),
            ));
        }
        self.waiting.push((slot, bytes));
        self.place()
    }

    /// Writes the header, makes sure that everything is on the disk and that the file can be
    /// read; returns its length.
    pub fn finish(self) -> Result<u64> {
        let missing = self.slots.iter().find(|slot| slot.written != slot.output.bytes);
        if let Some(slot) = missing {
            let problem = format!("{} of {} bytes are written", slot.written, slot.output.bytes);
            return Err(Error::tensor(&self.path, &slot.output.name, problem));
        }
        let io = |source| Error::io(&self.path, source);
        let text = header(&self.path, self.slots.iter().map(|slot| &slot.output))?;
        let total = self.slots.iter().map(|slot| slot.output.bytes).sum::<u64>();
        let length = LENGTH_WORD + self.header_bytes as u64 + total;
        self.file.set_len(length).map_err(io)?;
        // Sizes only ever shrink, so the text fits in what was planned for it.
        let mut start = (self.header_bytes as u64).to_le_bytes().to_vec();
        start.extend_from_slice(text.as_bytes());
        start.resize(LENGTH_WORD as usize + self.header_bytes, b' ');
        let (word, text) = start.split_at(LENGTH_WORD as usize);
        write_all(&self.path, &self.file, LENGTH_WORD, text)?;
        self.file.sync_all().map_err(io)?;
        write_all(&self.path, &self.file, 0, word)?;
        self.file.sync_all().map_err(io)?;

        let back = Header::read(&self.path)?;
        let same = back.tensors().len() == self.slots.len()
            && self.slots.iter().all(|slot| {
                back.get(&slot.output.name).is_some_and(|info| {
                    info.dtype == slot.output.dtype
                        && info.shape == slot.output.shape
                        && info.bytes == slot.output.bytes
                })
            });
        if !same {
            return Err(Error::checkpoint(&self.path, "reads back differently than written"));
        }
        Ok(length)
    }

    fn slot(&self, name: &str) -> Result<usize> {
        let slot = self.by_name.get(name).copied();
        slot.ok_or_else(|| Error::tensor(&self.path, name, "was not declared"))
    }

    /// Gives positions as far as lengths are known, and writes what waited for them.
    fn place(&mut self) -> Result<()> {
        let mut next = match self.positions.len().checked_sub(1) {
            Some(last) => self.positions[last] + self.slots[last].output.bytes,
            None => LENGTH_WORD + self.header_bytes as u64,
        };
        for slot in self.slots.get(self.positions.len()..).unwrap_or_default() {
            // The position of a text is known before its length, but nobody may use it yet.
            if !slot.is_final {
                break;
            }
            self.positions.push(next);
            next += slot.output.bytes;
        }
        let known = self.positions.len();
        let (ready, waiting) =
            std::mem::take(&mut self.waiting).into_iter().partition(|(slot, _)| *slot < known);
        self.waiting = waiting;
        let ready: Vec<(usize, Vec<u8>)> = ready;
        for (slot, bytes) in ready {
            write_all(&self.path, &self.file, self.positions[slot], &bytes)?;
            self.slots[slot].written = bytes.len() as u64;
        }
        Ok(())
    }
}

/// The order of the safetensors crate: wide types first, then by name.
fn sort(outputs: &mut [Output]) {
    outputs.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
}

/// Bytes of a file with these tensors at most, header included.
pub fn file_bytes(path: &Path, outputs: &[Output]) -> Result<u64> {
    let mut outputs = outputs.to_vec();
    sort(&mut outputs);
    let header = header(path, outputs.iter())?.len().next_multiple_of(ALIGNMENT) as u64;
    Ok(LENGTH_WORD + header + outputs.iter().map(|output| output.bytes).sum::<u64>())
}

/// The JSON text of the header; transformers wants to know that tensors are torch's.
fn header<'a>(path: &Path, outputs: impl Iterator<Item = &'a Output>) -> Result<String> {
    let mut end = 0usize;
    let tensors = outputs
        .map(|output| {
            let begin = end;
            end = begin.saturating_add(output.bytes as usize);
            let info = TensorInfo {
                dtype: output.dtype,
                shape: output.shape.clone(),
                data_offsets: (begin, end),
            };
            (output.name.clone(), info)
        })
        .collect();
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let damaged = |error: String| Error::checkpoint(path, format!("cannot be written: {error}"));
    let metadata =
        Metadata::new(Some(metadata), tensors).map_err(|error| damaged(error.to_string()))?;
    serde_json::to_string(&metadata).map_err(|error| damaged(error.to_string()))
}

/// Takes the space now where the file system can, else only sets the length.
fn reserve(path: &Path, file: &File, bytes: u64) -> Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    use rustix::io::Errno;
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
            file.set_len(bytes).map_err(|source| Error::io(path, source))
        }
        Err(error) => Err(Error::io(path, error.into())),
    }
}

fn write_all(path: &Path, file: &File, position: u64, bytes: &[u8]) -> Result<()> {
    file.write_all_at(bytes, position).map_err(|source| Error::io(path, source))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ::safetensors::tensor::{TensorView, serialize};

    use super::*;

    fn output(name: &str, dtype: Dtype, shape: &[usize], is_text: bool) -> Output {
        let elements: usize = shape.iter().product();
        let bytes = (elements * dtype.bitsize() / 8) as u64;
        Output { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes, is_text }
    }

    fn serialized(tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            ((*name).to_owned(), TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        serialize(views, Some(metadata)).unwrap()
    }

    #[test]
    fn the_file_is_what_the_crate_would_write_in_any_order_of_writes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.safetensors");
        let outputs = vec![
            output("b.weight", Dtype::U8, &[4, 1], false),
            output("b.weight.state", Dtype::U8, &[9], true),
            output("a", Dtype::BF16, &[2], false),
            output("c", Dtype::U8, &[2], false),
            output("flag", Dtype::BOOL, &[1], false),
            output("m", Dtype::F32, &[1], false),
            output("scalar", Dtype::U8, &[], false),
        ];
        let mut writer = Writer::create(&path, outputs).unwrap();
        writer.write("b.weight", 2, &[3, 4]).unwrap();
        assert!(writer.write("c", 0, &[7, 8]).is_err(), "its position is not known yet");
        writer.put("flag", vec![1]).unwrap();
        writer.put("c", vec![7, 8]).unwrap();
        writer.write("b.weight", 0, &[1, 2]).unwrap();
        writer.put("b.weight.state", b"{\"x\":1}".to_vec()).unwrap();
        writer.put("scalar", vec![0]).unwrap();
        writer.put("m", vec![0; 4]).unwrap();
        writer.put("a", vec![9; 4]).unwrap();
        assert!(Header::read(&path).is_err(), "no file before the end");
        let length = writer.finish().unwrap();

        let want = serialized(&[
            ("b.weight", Dtype::U8, vec![4, 1], vec![1, 2, 3, 4]),
            ("b.weight.state", Dtype::U8, vec![7], b"{\"x\":1}".to_vec()),
            ("a", Dtype::BF16, vec![2], vec![9; 4]),
            ("c", Dtype::U8, vec![2], vec![7, 8]),
            ("flag", Dtype::BOOL, vec![1], vec![1]),
            ("m", Dtype::F32, vec![1], vec![0; 4]),
            ("scalar", Dtype::U8, vec![], vec![0]),
        ]);
        assert_eq!(fs::read(&path).unwrap(), want);
        assert_eq!(length, want.len() as u64);
    }

    #[test]
    fn too_much_too_little_and_twice_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.safetensors");
        let twice = vec![output("a", Dtype::U8, &[1], false); 2];
        assert!(Writer::create(&path, twice).is_err());
        let mut writer = Writer::create(&path, vec![output("a", Dtype::U8, &[2], false)]).unwrap();
        assert!(writer.write("a", 1, &[1, 2]).is_err());
        assert!(writer.write("a", u64::MAX, &[1, 2]).is_err());
        assert!(writer.put("a", vec![1]).is_err());
        assert!(writer.put("b", vec![1]).is_err());
        writer.write("a", 0, &[1]).unwrap();
        assert!(writer.finish().unwrap_err().to_string().contains("1 of 2"));
        assert!(Writer::create(&path, vec![]).is_err(), "the file exists");
    }

    #[test]
    fn a_file_without_tensors_is_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.safetensors");
        Writer::create(&path, vec![]).unwrap().finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), serialized(&[]));
    }
}
