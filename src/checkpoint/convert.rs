//! Quantizes and dequantizes whole checkpoints.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::backend::cpu::{Cpu, Quantizer, threads};
use crate::checkpoint::bitsandbytes::{Groups, owner};
use crate::checkpoint::budget;
use crate::checkpoint::config::{Config, Quantization};
use crate::checkpoint::destination::Destination;
use crate::checkpoint::names::{Names, module_of};
use crate::checkpoint::open::{Checkpoint, Entry};
use crate::checkpoint::plan::{Action, Choice, Item, LeftOut, Plan, float};
use crate::checkpoint::report::{Report, Row, SCHEMA_VERSION, Totals, text};
use crate::checkpoint::rules::Rules;
use crate::checkpoint::shard::{CONFIG, INDEX, Source};
use crate::checkpoint::sidecars::Sidecars;
use crate::checkpoint::stored::Damage;
use crate::checkpoint::stream::{Progress, Stream};
use crate::checkpoint::writer::{Writer, file_bytes};
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
    let mut report = job.run(target, plan, report, progress)?;
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
    let mut report = job.run(target, plan, report, progress)?;
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

/// What `config.json` says, and who understands it.
struct ConfigEntry {
    value: Value,
    method: &'static str,
}

impl ConfigEntry {
    /// None where nothing is quantized. transformers and bitsandbytes can read one format of
    /// theirs at a time; everything else needs nybble.
    fn of(plan: &Plan, options: &Options, compute: Option<Dtype>, tied: bool) -> Option<Self> {
        let mut layouts = plan.items().filter_map(|item| match &item.action {
            Action::Quantize { layout, .. } => Some(layout),
            _ => None,
        });
        let first = layouts.next()?;
        let uniform = layouts.all(|layout| layout.format == first.format);
        let theirs = first.format == Format::Int8 || owner(first.format) == Some("bitsandbytes");
        // The class default; a faster one is chosen where the bytes need not be theirs.
        let compute = match options.reference {
            Reference::BitsandbytesCpu => Dtype::F32,
            Reference::Exact => compute.unwrap_or(Dtype::F32),
        };
        let mut entry = Quantization {
            format: first.format,
            blocksize: first.blocksize,
            nested: first.nested,
            compute_dtype: compute,
            skip: options.skip.as_deref(),
            overrides: &options.overrides,
        };
        if uniform && theirs {
            let skip = skip_modules(plan, options, tied);
            entry.skip = skip.as_deref();
            return Some(Self { value: entry.bitsandbytes(), method: "bitsandbytes" });
        }
        entry.format = options.format;
        entry.blocksize = options.blocksize.unwrap_or(options.format.spec().default_blocksize);
        entry.nested = options.nested;
        Some(Self { value: entry.nybble(), method: "nybble" })
    }
}

/// The modules that transformers must leave alone when it loads the result; `None`: those that
/// it leaves alone anyway.
fn skip_modules(plan: &Plan, options: &Options, tied: bool) -> Option<Vec<String>> {
    let left_out = |kind: LeftOut| {
        plan.items()
            .filter(move |item| item.left_out == Some(kind))
            .map(|item| module_of(&item.info.name).to_owned())
    };
    let is_plain = |text: &String| !text.starts_with("re:") && !text.contains(['*', '?']);
    let plain = options.skip.as_ref().filter(|skip| skip.iter().all(is_plain));
    let by_rule = |item: &&Item| item.left_out == Some(LeftOut::Named);
    let covered = plain.is_some() && options.overrides.is_empty();
    let mut skip: Vec<String> = match plain {
        Some(skip) if covered => skip.clone(),
        _ if plan.items().filter(by_rule).count() == 0 && options.skip.is_none() => return None,
        _ => left_out(LeftOut::Named).collect(),
    };
    // A list replaces transformers' own, so what that had must be in it.
    for head in left_out(LeftOut::ByDefault) {
        let last = head.rsplit_once('.').map_or(head.as_str(), |(_, last)| last);
        skip.push(last.to_owned());
    }
    let exact = options.reference == Reference::BitsandbytesCpu;
    if tied && !exact && !skip.iter().any(|name| "lm_head".ends_with(name.as_str())) {
        skip.push("lm_head".to_owned());
    }
    skip.dedup();
    Some(skip)
}

/// Everything that a run needs beside its plan.
struct Job<'a> {
    source: &'a Source,
    checkpoint: Option<&'a Checkpoint>,
    config: Option<Config>,
    how: Quantizer,
    run: Run,
}

impl Job<'_> {
    fn run(
        &self,
        target: &Path,
        plan: Plan,
        mut report: Report,
        progress: &mut Progress<'_>,
    ) -> Result<Report> {
        let threads = self.run.threads.unwrap_or_else(threads::default_threads).max(1);
        report.memory_bytes = budget::peak(plan.items(), threads, self.run.max_memory)?;
        report.files = plan.shards.iter().map(|shard| shard.name.clone()).collect();
        report.warnings.clone_from(&plan.warnings);
        report.dry_run = self.run.dry_run;
        if self.run.dry_run {
            report.tensors = plan.items().map(Row::new).collect();
            report.add_up();
            return Ok(report);
        }

        let destination = Destination::create(self.source.path(), target, self.run.overwrite)?;
        let sidecars = if destination.is_file() || !self.source.path().is_dir() {
            Sidecars::default()
        } else {
            Sidecars::of(self.source.path())?
        };
        for path in &sidecars.too_large {
            report.warnings.push(format!("{} is too large to be copied along", path.display()));
        }
        if destination.is_file() && plan.shards.len() > 1 {
            return Err(Error::Argument {
                what: "destination",
                got: text(target),
                expected: "the source has several files, so it must be a directory".to_owned(),
            });
        }
        let mut needed = sidecars.bytes();
        for shard in &plan.shards {
            let outputs: Vec<_> = shard.items.iter().flat_map(Item::outputs).collect();
            needed += file_bytes(&destination.work().join(&shard.name), &outputs)?;
        }
        destination.check_space(needed)?;

        let mut stream = Stream {
            source: self.source,
            checkpoint: self.checkpoint,
            cpu: Cpu::new(Some(threads))?,
            how: self.how,
            threads,
            max_memory: self.run.max_memory,
            done: 0,
            total: plan.items().map(|item| item.bytes).sum(),
            progress,
            raw: Vec::new(),
        };
        let mut index = BTreeMap::new();
        let mut total_size = 0;
        for shard in &plan.shards {
            let outputs: Vec<_> = shard.items.iter().flat_map(Item::outputs).collect();
            index.extend(outputs.iter().map(|output| (output.name.clone(), shard.name.clone())));
            let mut writer = Writer::create(&destination.work().join(&shard.name), outputs)?;
            for item in &shard.items {
                let done = stream.item(item, &mut writer)?;
                let mut row = Row::new(item);
                row.shorten(done.shorter);
                row.stats = done.stats;
                if done.overflowed > 0 {
                    report.warnings.push(format!(
                        "{}: {} values became infinite as {}",
                        row.name, done.overflowed, row.format
                    ));
                }
                total_size += row.bytes_after;
                report.tensors.push(row);
            }
            writer.finish()?;
        }
        for file in self.source.files() {
            file.check_length()?;
        }
        report.add_up();
        if !destination.is_file() {
            sidecars.copy_to(destination.work())?;
            if plan.shards.len() > 1 {
                let metadata = json!({
                    "total_parameters": report.totals.parameters,
                    "total_size": total_size,
                });
                let index = json!({ "metadata": metadata, "weight_map": index });
                let text = serde_json::to_string_pretty(&index)
                    .map_err(|error| Error::checkpoint(target, error.to_string()))?;
                destination.write(INDEX, (text + "\n").as_bytes())?;
            }
            if let Some(config) = &self.config {
                destination.write(CONFIG, config.render().as_bytes())?;
            }
        }
        destination.commit()?;
        Ok(report)
    }
}
