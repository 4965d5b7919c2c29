//! Quantizes and dequantizes whole checkpoints.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use crate::backend::cpu::Quantizer;
use crate::checkpoint::bitsandbytes::Groups;
use crate::checkpoint::config::Config;
use crate::checkpoint::entry::ConfigEntry;
use crate::checkpoint::job::Job;
use crate::checkpoint::names::{Names, module_of};
use crate::checkpoint::open::{Checkpoint, Entry};
use crate::checkpoint::plan::{Action, Choice, Item, Plan, float};
use crate::checkpoint::report::{Report, SCHEMA_VERSION, Totals, text};
use crate::checkpoint::rules::Rules;
use crate::checkpoint::shard::{CONFIG, Source};
use crate::checkpoint::stored::Damage;
use crate::checkpoint::stream::Progress;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::format::Format;
use crate::quant::{NonFinite, Reference};

/// How to quantize a checkpoint.
#[derive(Clone, Debug)]
pub struct Options {
    /// The format of what no override names.
    pub format: Format,
    /// Elements that share a scale; `None`: the format's default.
    pub blocksize: Option<usize>,
    /// Double quantization: the scales are quantized too.
    pub nested: bool,
    /// Patterns of modules that are left out; `None`: the output head.
    pub skip: Option<Vec<String>>,
    /// Patterns of modules and the format that they get instead.
    pub overrides: Vec<(String, String)>,
    /// Whose bytes to make. Like bitsandbytes', the weights are cast to the config's dtype first.
    pub reference: Reference,
    /// What to do with NaN and infinity.
    pub nonfinite: NonFinite,
    /// What floating point tensors are cast to; `None`: they stay as they are.
    pub dtype: Option<Dtype>,
    /// Whether weights of a mixture of experts are quantized.
    pub experts: bool,
    /// How to run.
    pub run: Run,
}

/// How to run, whatever is done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Run {
    /// Threads; `None`: as many as the machine has.
    pub threads: Option<usize>,
    /// Bytes of memory that may be used.
    pub max_memory: Option<u64>,
    /// Whether an existing destination is replaced.
    pub overwrite: bool,
    /// Whether to stop after the plan, before anything is written.
    pub dry_run: bool,
}

impl Options {
    /// The defaults for a format.
    pub fn new(format: Format) -> Self {
        Self {
            format,
            blocksize: None,
            nested: false,
            skip: None,
            overrides: Vec::new(),
            reference: Reference::default(),
            nonfinite: NonFinite::default(),
            dtype: None,
            experts: false,
            run: Run::default(),
        }
    }
}

/// Quantizes the checkpoint at `source` (a directory or one safetensors file) to `target`.
pub fn quantize(
    source: &Path,
    target: &Path,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<Report> {
    let start = Instant::now();
    let opened = Source::open(source)?;
    let mut config = if source.is_dir() { Config::read(source)? } else { None };
    refuse_quantized(source, &opened, config.as_ref())?;
    let rules = Rules::new(options.skip.as_deref().unwrap_or_default(), &options.overrides)?;
    let main = config.as_ref().and_then(Config::dtype).or_else(|| first_float(&opened));
    let like_bitsandbytes = options.reference == Reference::BitsandbytesCpu;
    let dtype = options.dtype.or(if like_bitsandbytes { main } else { None });
    let choice = Choice {
        format: options.format,
        blocksize: options.blocksize,
        nested: options.nested,
        rules: &rules,
        has_skip_list: options.skip.is_some(),
        experts: options.experts,
        dtype,
    };
    let mut plan = Plan::quantize(&opened, &choice)?;
    let tied = config.as_ref().is_some_and(Config::is_tied);
    if tied {
        // A tied head has no tensor, and naming it is not a mistake.
        rules.decide("lm_head");
    }
    for pattern in rules.unused() {
        plan.warnings.push(format!("pattern '{pattern}' matches nothing"));
    }

    let entry = ConfigEntry::of(&plan, options, dtype.or(main), tied);
    let quant_method = entry.as_ref().map_or("none", |entry| entry.method);
    match (&entry, &mut config) {
        (None, _) => plan.warnings.push("no tensor is quantized".to_owned()),
        (Some(entry), Some(config)) => config.set_quantization(&entry.value)?,
        (Some(_), None) => {}
    }
    if let (Some(dtype), Some(config)) = (dtype, &mut config)
        && config.dtype() != Some(dtype)
    {
        config.set_dtype(dtype)?;
    }
    let how = Quantizer { reference: options.reference, nonfinite: options.nonfinite, stats: true };
    let layout = plan.items().find_map(|item| match &item.action {
        Action::Quantize { layout, .. } if layout.format == options.format => Some(*layout),
        _ => None,
    });
    let has_blocks = options.format.spec().default_blocksize > 0;
    let report = Report {
        command: "quantize",
        format: options.format.name().to_owned(),
        blocksize: layout.filter(|_| has_blocks).map(|layout| layout.blocksize),
        nested: options.nested,
        quant_method,
        ..empty(source, target)
    };
    let job = Job { source: &opened, checkpoint: None, config, how, run: options.run };
    let mut report = job.run(target, &plan, report, progress)?;
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

/// Makes an ordinary checkpoint of a quantized one. `dtype` is what quantized weights become;
/// `None`: what each had before.
pub fn dequantize(
    source: &Path,
    target: &Path,
    dtype: Option<Dtype>,
    run: Run,
    progress: &mut Progress<'_>,
) -> Result<Report> {
    let start = Instant::now();
    let checkpoint = Checkpoint::open(source, Damage::Refuse)?;
    let opened = checkpoint.source();
    let mut config = if source.is_dir() { Config::read(source)? } else { None };
    let names = Names::new(opened.config(), opened.tensors().map(|(_, info)| info));
    let files: HashMap<&str, usize> =
        opened.tensors().map(|(file, info)| (info.name.as_str(), file)).collect();
    let mut items = Vec::new();
    for name in checkpoint.names() {
        let Some((_, info)) = opened.find(name) else { continue };
        let file = files.get(name).copied().unwrap_or(0);
        let (action, reason, bytes) = match checkpoint.entry(name)? {
            Entry::Dense { bytes, .. } => (Action::Keep, Some("not quantized"), bytes),
            Entry::Quantized(stored) => {
                let dtype = dtype.unwrap_or(stored.dtype);
                let transposed = stored.shape.len() == 2 && names.is_transposed(module_of(name));
                let bytes = stored.bytes;
                (Action::Dequantize { stored, dtype, transposed }, None, bytes)
            }
        };
        let (info, reason) = (info.clone(), reason.map(str::to_owned));
        items.push(Item { file, info, action, reason, left_out: None, bytes });
    }
    let found = items.iter().find_map(|item| match &item.action {
        Action::Dequantize { dtype, .. } => Some(*dtype),
        _ => None,
    });
    let Some(found) = found else {
        return Err(Error::checkpoint(source, "nothing here is quantized"));
    };
    if let Some(config) = &mut config {
        config.remove_quantization();
        config.set_dtype(found)?;
    }
    let mut plan = Plan::of(items);
    let orphans = checkpoint.groups.orphans().len();
    if orphans > 0 {
        plan.warnings.push(format!("{orphans} tensors belong to no parameter and are left out"));
    }
    let report = Report {
        command: "dequantize",
        format: found.short_name().to_owned(),
        ..empty(source, target)
    };
    let how = Quantizer::default();
    let job = Job { source: opened, checkpoint: Some(&checkpoint), config, how, run };
    let mut report = job.run(target, &plan, report, progress)?;
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

/// A source that is quantized already would be quantized twice.
fn refuse_quantized(path: &Path, source: &Source, config: Option<&Config>) -> Result<()> {
    let remedy = "make an ordinary checkpoint of it first (nybble dequantize)";
    if let Some(method) = config.and_then(Config::quantization) {
        let problem = format!("is quantized already ({method}); {remedy}");
        return Err(Error::checkpoint(&path.join(CONFIG), problem));
    }
    let groups = Groups::new(source);
    let quantized = groups.parameters().find(|(_, companions)| !companions.is_empty());
    match quantized {
        Some((name, _)) => {
            Err(Error::tensor(path, name, format!("is quantized already; {remedy}")))
        }
        None => Ok(()),
    }
}

/// transformers loads a model without a dtype in its config as its first floating point tensor.
fn first_float(source: &Source) -> Option<Dtype> {
    source.tensors().find_map(|(_, info)| float(info.dtype))
}

fn empty(source: &Path, target: &Path) -> Report {
    Report {
        schema_version: SCHEMA_VERSION,
        command: "",
        source: text(source),
        destination: text(target),
        dry_run: false,
        format: String::new(),
        blocksize: None,
        nested: false,
        quant_method: "none",
        tensors: Vec::new(),
        totals: Totals::default(),
        files: Vec::new(),
        memory_bytes: 0,
        seconds: 0.0,
        warnings: Vec::new(),
    }
}
