//! What was done to a checkpoint, tensor by tensor, for people and for machines.

use std::path::Path;

use serde::Serialize;

use crate::checkpoint::plan::{Action, Item};
use crate::quant::stats::Summary;

/// Changes when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 1;

/// One tensor.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Its shape in the source.
    pub shape: Vec<usize>,
    /// What it is stored as now: a format, or an element type.
    pub format: String,
    /// Why it is not quantized.
    pub kept: Option<String>,
    /// Bytes in the source.
    pub bytes_before: u64,
    /// Bytes now, with everything that is needed to decode it.
    pub bytes_after: u64,
    /// Bits now for each element.
    pub bits_per_weight: f64,
    /// What quantization did to it.
    pub stats: Option<Summary>,
}

impl Row {
    /// The row of an item, with the sizes that the plan knows.
    pub fn new(item: &Item) -> Self {
        let elements = match &item.action {
            Action::Dequantize { stored, .. } => stored.layout.elements,
            _ => item.info.elements(),
        };
        let bytes_after = item.outputs().iter().map(|output| output.bytes).sum();
        Self {
            name: item.info.name.clone(),
            shape: match &item.action {
                Action::Dequantize { stored, .. } => stored.shape.clone(),
                _ => item.info.shape.clone(),
            },
            format: item.format(),
            kept: item.reason.clone(),
            bytes_before: item.bytes,
            bytes_after,
            bits_per_weight: bits(bytes_after, elements as u64),
            stats: None,
        }
    }

    fn elements(&self) -> u64 {
        self.shape.iter().fold(1, |n: u64, extent| n.saturating_mul(*extent as u64))
    }

    /// Corrects the size.
    pub fn shorten(&mut self, bytes: u64) {
        self.bytes_after = self.bytes_after.saturating_sub(bytes);
        self.bits_per_weight = bits(self.bytes_after, self.elements());
    }
}

/// Sums over all tensors.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Totals {
    /// Tensors of the source; a quantized parameter counts once.
    pub tensors: usize,
    /// Tensors that were quantized, or dequantized.
    pub changed: usize,
    /// Elements.
    pub parameters: u64,
    /// Bytes before.
    pub bytes_before: u64,
    /// Bytes after.
    pub bytes_after: u64,
    /// Bits for each element.
    pub bits_per_weight: f64,
    /// The same over what was quantized.
    pub quantized_bits_per_weight: Option<f64>,
}

/// What was done.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The version of this structure.
    pub schema_version: u32,
    /// `quantize` or `dequantize`.
    pub command: &'static str,
    /// Where the tensors came from.
    pub source: String,
    /// Where they went.
    pub destination: String,
    /// Whether this is only what would be done.
    pub dry_run: bool,
    /// The format of what no override names; after dequantization the element type.
    pub format: String,
    /// Elements that share a scale.
    pub blocksize: Option<usize>,
    /// Whether the scales are quantized too.
    pub nested: bool,
    /// Who can read the result: `bitsandbytes` (and transformers), `nybble`, or anyone (`none`).
    pub quant_method: &'static str,
    /// The tensors.
    pub tensors: Vec<Row>,
    /// Their sums.
    pub totals: Totals,
    /// The files of the result.
    pub files: Vec<String>,
    /// Memory that the work takes, in bytes.
    pub memory_bytes: u64,
    /// Time that it took.
    pub seconds: f64,
    /// What the user should know.
    pub warnings: Vec<String>,
}

impl Report {
    /// Computes the sums.
    pub fn add_up(&mut self) {
        let changed = |row: &&Row| row.kept.is_none();
        let sum = |rows: &mut dyn Iterator<Item = &Row>| {
            rows.fold((0, 0), |(bytes, n), row| (bytes + row.bytes_after, n + row.elements()))
        };
        let (bytes_after, parameters) = sum(&mut self.tensors.iter());
        let (quantized, elements) = sum(&mut self.tensors.iter().filter(changed));
        self.totals = Totals {
            tensors: self.tensors.len(),
            changed: self.tensors.iter().filter(changed).count(),
            parameters,
            bytes_before: self.tensors.iter().map(|row| row.bytes_before).sum(),
            bytes_after,
            bits_per_weight: bits(bytes_after, parameters),
            quantized_bits_per_weight: (elements > 0).then(|| bits(quantized, elements)),
        };
    }
}

fn bits(bytes: u64, elements: u64) -> f64 {
    if elements == 0 { 0.0 } else { 8.0 * bytes as f64 / elements as f64 }
}

/// A path as text.
pub fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
