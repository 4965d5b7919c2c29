//! Checkpoints: rows of facts out, bytes into memory that torch allocated.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::memory::Memory;
use crate::checkpoint::{self, Damage, Entry, Part, Problem, Row};
use crate::format::{Decode, Scale};

/// An open checkpoint; see `nybble.open_checkpoint`.
#[pyclass(frozen, module = "nybble._core")]
pub struct Checkpoint(checkpoint::Checkpoint);

#[pymethods]
impl Checkpoint {
    #[new]
    #[pyo3(signature = (path, repair=false))]
    fn new(py: Python<'_>, path: PathBuf, repair: bool) -> PyResult<Self> {
        let damage = if repair { Damage::Repair } else { Damage::Refuse };
        Ok(Self(py.detach(|| checkpoint::Checkpoint::open(&path, damage))?))
    }

    /// The file or directory that was opened; a snapshot where its cache was asked for.
    #[getter]
    fn path(&self) -> PathBuf {
        self.0.source().path().to_owned()
    }

    /// The names of the parameters, sorted.
    fn keys(&self) -> Vec<&str> {
        self.0.names().collect()
    }

    /// What a parameter is. Quantized ones have the keys `format`, `blocksize`, `nested`,
    /// `packed`, `packed_dtype`, `scales`, `scale_dtype`, `nested_scales` and `nested_offset` (None
    /// unless nested) too.
    fn entry<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyDict>> {
        let row = PyDict::new(py);
        match py.detach(|| self.0.entry(name))? {
            Entry::Dense { dtype, shape, bytes } => {
                row.set_item("quantized", false)?;
                row.set_item("dtype", dtype.to_string())?;
                row.set_item("shape", shape)?;
                row.set_item("bytes", bytes)?;
            }
            Entry::Quantized(stored) => {
                row.set_item("quantized", true)?;
                row.set_item("dtype", stored.dtype.name())?;
                row.set_item("shape", &stored.shape)?;
                row.set_item("bytes", stored.bytes)?;
                row.set_item("format", stored.layout.format.name())?;
                row.set_item("blocksize", stored.layout.blocksize)?;
                row.set_item("nested", stored.layout.nested)?;
                let spec = stored.layout.format.spec();
                let signed = matches!(spec.decode, Decode::Int8);
                let bytes = stored.layout.nested || spec.scale == Scale::E8M0;
                row.set_item("packed", stored.layout.packed)?;
                row.set_item("packed_dtype", if signed { "int8" } else { "uint8" })?;
                row.set_item("scales", stored.layout.scales)?;
                row.set_item("scale_dtype", if bytes { "uint8" } else { "float32" })?;
                row.set_item("nested_scales", stored.layout.nested_scales())?;
                row.set_item("nested_offset", stored.nested_offset)?;
            }
        }
        Ok(row)
    }

    /// Fills `out` with the bytes of `data`, `absmax` or `nested_absmax` from byte `first` on.
    #[pyo3(signature = (name, part, out, first=0))]
    fn read_into(
        &self,
        py: Python<'_>,
        name: &str,
        part: &str,
        out: Memory,
        first: u64,
    ) -> PyResult<()> {
        let (part, out) = (Part::parse(part)?, out.bytes_mut()?);
        Ok(py.detach(|| self.0.read_part(name, part, first, out))?)
    }

    /// Counts: a dict of `total`, `quantized` and, by name, `formats`.
    fn summary<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let summary = py.detach(|| self.0.summary())?;
        let (all, formats) = (PyDict::new(py), PyDict::new(py));
        for (name, row) in &summary.formats {
            formats.set_item(name, counts(py, row)?)?;
        }
        all.set_item("total", counts(py, &summary.total)?)?;
        all.set_item("quantized", counts(py, &summary.quantized)?)?;
        all.set_item("formats", formats)?;
        Ok(all)
    }

    /// Everything that is wrong: (file, tensor or None, problem, remedy) each.
    fn verify(&self, py: Python<'_>) -> Vec<(PathBuf, Option<String>, String, String)> {
        let problems = py.detach(|| self.0.verify());
        let row = |Problem { file, tensor, problem, remedy }| (file, tensor, problem, remedy);
        problems.into_iter().map(row).collect()
    }
}

fn counts<'py>(py: Python<'py>, row: &Row) -> PyResult<Bound<'py, PyDict>> {
    let counts = PyDict::new(py);
    counts.set_item("tensors", row.tensors)?;
    counts.set_item("elements", row.elements)?;
    counts.set_item("bytes", row.bytes)?;
    counts.set_item("bits_per_weight", row.bits_per_weight())?;
    Ok(counts)
}
