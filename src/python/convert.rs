//! Whole checkpoints: rules, quantization and dequantization, progress and interruption.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::checkpoint::config::Quantization;
use crate::checkpoint::convert::{self, Options, Run};
use crate::checkpoint::report::Report;
use crate::checkpoint::rules::{self, Decision, SKIP};
use crate::checkpoint::stream::Progress;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::format::Format;
use crate::quant::{NonFinite, Reference};

/// How often Python hears of progress, and whether Ctrl-C was pressed.
const INTERVAL: Duration = Duration::from_millis(100);

/// Which modules are left out, and which get another format.
#[pyclass(frozen, module = "nybble._core")]
pub struct Rules(rules::Rules);

#[pymethods]
impl Rules {
    #[new]
    fn new(skip: Vec<String>, overrides: &Bound<'_, PyDict>) -> PyResult<Self> {
        Ok(Self(rules::Rules::new(&skip, &pairs(Some(overrides))?)?))
    }

    /// `"skip"`, the name of a format, or None where no rule says anything.
    fn decide(&self, name: &str) -> Option<&'static str> {
        match self.0.decide(name) {
            Decision::Default => None,
            Decision::Skip(_) => Some(SKIP),
            Decision::Format(format, _) => Some(format.name()),
        }
    }

    /// The patterns that have matched nothing so far.
    fn unused(&self) -> Vec<String> {
        self.0.unused()
    }
}

/// The `quantization_config` of a model, as JSON: bitsandbytes' where it can read the formats.
#[pyfunction]
pub fn quantization_config(
    format: &str,
    blocksize: usize,
    nested: bool,
    compute_dtype: &str,
    skip: Vec<String>,
    overrides: &Bound<'_, PyDict>,
) -> PyResult<String> {
    let overrides = pairs(Some(overrides))?;
    let described = Quantization {
        format: Format::parse_quantized(format)?,
        blocksize,
        nested,
        compute_dtype: Dtype::parse(compute_dtype)?,
        skip: Some(&skip),
        overrides: &overrides,
    };
    Ok(described.value().to_string())
}

/// Quantizes a checkpoint; returns the report as JSON.
#[pyfunction]
#[pyo3(signature = (
    source, destination, format, *, nested=false, blocksize=None, skip=None, overrides=None,
    max_memory=None, threads=None, overwrite=false, dry_run=false, on_progress=None,
    reference="exact", nonfinite="error", dtype=None, experts=false,
))]
#[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)]
pub fn quantize_checkpoint(
    py: Python<'_>,
    source: PathBuf,
    destination: PathBuf,
    format: &str,
    nested: bool,
    blocksize: Option<usize>,
    skip: Option<Vec<String>>,
    overrides: Option<Bound<'_, PyDict>>,
    max_memory: Option<u64>,
    threads: Option<usize>,
    overwrite: bool,
    dry_run: bool,
    on_progress: Option<Py<PyAny>>,
    reference: &str,
    nonfinite: &str,
    dtype: Option<&str>,
    experts: bool,
) -> PyResult<String> {
    let options = Options {
        format: Format::parse_quantized(format)?,
        blocksize,
        nested,
        skip,
        overrides: pairs(overrides.as_ref())?,
        reference: Reference::parse(reference)?,
        nonfinite: NonFinite::parse(nonfinite)?,
        dtype: dtype.map(Dtype::parse).transpose()?,
        experts,
        run: Run { threads, max_memory, overwrite, dry_run },
    };
    report(py, on_progress, |progress| convert::quantize(&source, &destination, &options, progress))
}

/// Makes an ordinary checkpoint of a quantized one; returns the report as JSON.
#[pyfunction]
#[pyo3(signature = (
    source, destination, dtype=None, *, max_memory=None, threads=None, overwrite=false,
    dry_run=false, on_progress=None,
))]
#[allow(clippy::too_many_arguments)]
pub fn dequantize_checkpoint(
    py: Python<'_>,
    source: PathBuf,
    destination: PathBuf,
    dtype: Option<&str>,
    max_memory: Option<u64>,
    threads: Option<usize>,
    overwrite: bool,
    dry_run: bool,
    on_progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let dtype = dtype.map(Dtype::parse).transpose()?;
    let run = Run { threads, max_memory, overwrite, dry_run };
    report(py, on_progress, |progress| {
        convert::dequantize(&source, &destination, dtype, run, progress)
    })
}

/// The overrides in the order in which the user wrote them.
fn pairs(overrides: Option<&Bound<'_, PyDict>>) -> PyResult<Vec<(String, String)>> {
    let Some(overrides) = overrides else { return Ok(Vec::new()) };
    overrides.iter().map(|(pattern, value)| Ok((pattern.extract()?, value.extract()?))).collect()
}

/// Runs the work without the interpreter; an exception of the callback, or one that a signal
/// raised, ends it and is passed on.
fn report(
    py: Python<'_>,
    on_progress: Option<Py<PyAny>>,
    work: impl FnOnce(&mut Progress<'_>) -> Result<Report> + Send,
) -> PyResult<String> {
    let mut raised = None;
    let result = py.detach(|| {
        let mut last: Option<Instant> = None;
        work(&mut |done, total, name| {
            let now = Instant::now();
            let due = last.is_none_or(|last| now.duration_since(last) >= INTERVAL);
            if !due && done < total {
                return ControlFlow::Continue(());
            }
            last = Some(now);
            let told = Python::attach(|py| {
                py.check_signals()?;
                match &on_progress {
                    Some(callback) => callback.call1(py, (done, total, name)).map(|_| ()),
                    None => Ok(()),
                }
            });
            match told {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    raised = Some(error);
                    ControlFlow::Break(())
                }
            }
        })
    });
    match (result, raised) {
        (Err(Error::Interrupted), Some(raised)) => Err(raised),
        (result, _) => {
            let report = result?;
            serde_json::to_string(&report).map_err(|error| {
                pyo3::exceptions::PyRuntimeError::new_err(format!("report: {error}"))
            })
        }
    }
}
