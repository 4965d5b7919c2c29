//! What `config.json` says about a quantized model, and who understands it.

use serde_json::Value;

use crate::checkpoint::config::Quantization;
use crate::checkpoint::convert::Options;
use crate::checkpoint::names::module_of;
use crate::checkpoint::plan::{Action, Item, LeftOut, Plan};
use crate::dtype::Dtype;
use crate::quant::Reference;

/// The entry.
pub(crate) struct ConfigEntry {
    /// `quantization_config`.
    pub(crate) value: Value,
    /// `bitsandbytes` or `nybble`.
    pub(crate) method: &'static str,
}

impl ConfigEntry {
    /// None where nothing is quantized. transformers and bitsandbytes can read one format of
    /// theirs at a time; everything else needs nybble.
    pub(crate) fn of(
        plan: &Plan,
        options: &Options,
        compute: Option<Dtype>,
        tied: bool,
    ) -> Option<Self> {
        let mut layouts = plan.items().filter_map(|item| match &item.action {
            Action::Quantize { layout, .. } => Some(layout),
            _ => None,
        });
        let first = layouts.next()?;
        let uniform = layouts.all(|layout| layout.format == first.format);
        let theirs = Quantization::is_theirs(first.format);
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
