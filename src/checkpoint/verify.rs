//! Reports over a whole checkpoint: what is in it, and what is wrong with it.

use std::collections::BTreeMap;
use std::path::Path;

use crate::checkpoint::open::{Checkpoint, Entry, OwnedScales, elements, format_name};
use crate::checkpoint::problem::{COPY_AGAIN, Problem};
use crate::checkpoint::stored::Stored;
use crate::error::Result;
use crate::quant::blockwise::e8m0_decode;

/// What a checkpoint holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Everything together.
    pub total: Row,
    /// The quantized parameters together.
    pub quantized: Row,
    /// By format or element type.
    pub formats: BTreeMap<String, Row>,
}

/// Sums over some parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Parameters.
    pub tensors: u64,
    /// Their elements.
    pub elements: u64,
    /// Bytes in the files, scales and codebooks included.
    pub bytes: u64,
}

impl Row {
    fn add(&mut self, elements: u64, bytes: u64) {
        self.tensors += 1;
        self.elements = self.elements.saturating_add(elements);
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// Bits that an element takes, everything included; 0 where there are no elements.
    pub fn bits_per_weight(&self) -> f64 {
        if self.elements == 0 { 0.0 } else { 8.0 * self.bytes as f64 / self.elements as f64 }
    }
}

impl Checkpoint {
    /// Counts what is in the checkpoint; reads no weights.
    pub fn summary(&self) -> Result<Summary> {
        let mut summary = Summary::default();
        for name in self.names() {
            let entry = self.entry(name)?;
            let (elements, bytes) = match &entry {
                Entry::Quantized(stored) => {
                    summary.quantized.add(elements(&entry), stored.bytes);
                    (elements(&entry), stored.bytes)
                }
                Entry::Dense { bytes, .. } => (elements(&entry), *bytes),
            };
            summary.total.add(elements, bytes);
            summary.formats.entry(format_name(&entry)).or_default().add(elements, bytes);
        }
        Ok(summary)
    }

    /// Everything that is wrong: lengths of files, names without a place, what describes each
    /// quantized parameter, and scales that are not finite. Reads all scales, no weights.
    pub fn verify(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for file in self.source.files() {
            if let Err(error) = file.check_length() {
                problems.push(Problem::from_error(file.path(), None, error));
            }
        }
        for (file, name) in self.source.stray() {
            let path =
                self.source.files().get(*file).map_or(self.source.path(), |file| file.path());
            let problem = "it is in the file, but the index does not place it there".to_owned();
            problems.push(Problem::tensor(path, name, problem, "write the index again"));
        }
        for name in self.groups.orphans() {
            let problem = "it belongs to a quantized parameter that is not there".to_owned();
            problems.push(Problem::tensor(self.file_of(name), name, problem, COPY_AGAIN));
        }
        problems.extend(self.names().filter_map(|name| self.check_parameter(name).err()));
        problems
    }

    fn file_of(&self, name: &str) -> &Path {
        self.source.find(name).map_or(self.source.path(), |(file, _)| file.path())
    }

    fn check_parameter(&self, name: &str) -> Result<(), Problem> {
        let Entry::Quantized(stored) = self.describe(name)? else { return Ok(()) };
        let path = self.file_of(name);
        let odd = self
            .odd_scale(&stored)
            .map_err(|error| Problem::from_error(path, Some(name), error))?;
        let remedy = "quantize it again from the original";
        odd.map_or(Ok(()), |problem| Err(Problem::tensor(path, name, problem, remedy)))
    }

    /// Names the first scale that is not finite.
    fn odd_scale(&self, stored: &Stored) -> Result<Option<String>> {
        let odd = |values: &[f32]| values.iter().position(|value| !value.is_finite());
        let (what, odd) = match &self.read_scales(stored)? {
            OwnedScales::Plain(scales) => (&stored.absmax, odd(scales)),
            OwnedScales::Nested { absmax, .. } => {
                (stored.nested_absmax.as_ref().unwrap_or(&stored.absmax), odd(absmax))
            }
            OwnedScales::E8M0(codes) => {
                let scales = codes.iter().map(|code| e8m0_decode(*code));
                (&stored.absmax, scales.into_iter().position(|scale| !scale.is_finite()))
            }
        };
        Ok(odd.map(|at| format!("{what} is not finite at position {at}")))
    }
}
