//! Carries a plan out: space, memory, files, and the move to their final place.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;

use crate::backend::cpu::{Cpu, Quantizer, threads};
use crate::checkpoint::budget;
use crate::checkpoint::config::Config;
use crate::checkpoint::convert::Run;
use crate::checkpoint::destination::{Destination, is_file};
use crate::checkpoint::open::Checkpoint;
use crate::checkpoint::plan::{Item, Plan};
use crate::checkpoint::report::{Report, Row, text};
use crate::checkpoint::shard::{CONFIG, INDEX, Source};
use crate::checkpoint::sidecars::Sidecars;
use crate::checkpoint::stream::{Progress, Stream};
use crate::checkpoint::writer::{Writer, file_bytes};
use crate::error::{Error, Result};

/// Everything that a run needs beside its plan.
pub(crate) struct Job<'a> {
    /// Where tensors come from.
    pub(crate) source: &'a Source,
    /// The same with its quantized parameters, to dequantize.
    pub(crate) checkpoint: Option<&'a Checkpoint>,
    /// The config of the result.
    pub(crate) config: Option<Config>,
    /// How to quantize.
    pub(crate) how: Quantizer,
    /// How to run.
    pub(crate) run: Run,
}

impl Job<'_> {
    /// Writes everything that the plan says; a dry run only completes the report.
    pub(crate) fn run(
        &self,
        target: &Path,
        plan: &Plan,
        mut report: Report,
        progress: &mut Progress<'_>,
    ) -> Result<Report> {
        let threads = self.run.threads.unwrap_or_else(threads::default_threads).max(1);
        report.memory_bytes = budget::peak(plan.items(), threads, self.run.max_memory)?;
        report.files = plan.shards.iter().map(|shard| shard.name.clone()).collect();
        report.warnings.extend_from_slice(&plan.warnings);
        report.dry_run = self.run.dry_run;
        Destination::check(self.source.path(), target)?;
        if is_file(target) && plan.shards.len() > 1 {
            return Err(Error::Argument {
                what: "destination",
                got: text(target),
                expected: "the source has several files, so it must be a directory".to_owned(),
            });
        }
        if self.run.dry_run {
            report.tensors = plan.items().map(Row::new).collect();
            report.add_up();
            return Ok(report);
        }
        let destination = Destination::create(self.source.path(), target, self.run.overwrite)?;
        let sidecars = if is_file(target) || !self.source.path().is_dir() {
            Sidecars::default()
        } else {
            Sidecars::of(self.source.path())?
        };
        for path in &sidecars.too_large {
            report.warnings.push(format!("{} is too large to be copied along", path.display()));
        }
        check_space(plan, &destination, &sidecars)?;
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
        write_shards(plan, &destination, &mut stream, &mut report)?;
        for file in self.source.files() {
            file.check_length()?;
        }
        report.add_up();
        if !is_file(target) {
            sidecars.copy_to(destination.work())?;
            if plan.shards.len() > 1 {
                destination.write(INDEX, index(plan, &report)?.as_bytes())?;
            }
            if let Some(config) = &self.config {
                destination.write(CONFIG, config.render().as_bytes())?;
            }
        }
        destination.commit()?;
        Ok(report)
    }
}

fn check_space(plan: &Plan, destination: &Destination, sidecars: &Sidecars) -> Result<()> {
    let mut needed = sidecars.bytes();
    for shard in &plan.shards {
        let outputs: Vec<_> = shard.items.iter().flat_map(Item::outputs).collect();
        needed += file_bytes(&destination.work().join(&shard.name), &outputs)?;
    }
    destination.check_space(needed)
}

fn write_shards(
    plan: &Plan,
    destination: &Destination,
    stream: &mut Stream<'_>,
    report: &mut Report,
) -> Result<()> {
    for shard in &plan.shards {
        let outputs = shard.items.iter().flat_map(Item::outputs).collect();
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
            report.tensors.push(row);
        }
        writer.finish()?;
    }
    Ok(())
}

/// The text that says which file has which tensor.
fn index(plan: &Plan, report: &Report) -> Result<String> {
    let mut weight_map = BTreeMap::new();
    for shard in &plan.shards {
        let outputs = shard.items.iter().flat_map(Item::outputs);
        weight_map.extend(outputs.map(|output| (output.name, shard.name.clone())));
    }
    let metadata = json!({
        "total_parameters": report.totals.parameters,
        "total_size": report.totals.bytes_after,
    });
    let index = json!({ "metadata": metadata, "weight_map": weight_map });
    serde_json::to_string_pretty(&index)
        .map(|text| text + "\n")
        .map_err(|error| Error::checkpoint(Path::new(INDEX), error.to_string()))
}
