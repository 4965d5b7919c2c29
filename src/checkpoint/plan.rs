//! What becomes of each tensor, decided from headers alone.
//!
//! Every size in the output follows from shapes and formats, so the plan knows the bytes of every
//! file, and the memory that the work takes, before a weight is read.

use std::collections::BTreeMap;

use ::safetensors::Dtype as FileDtype;

use crate::checkpoint::bitsandbytes::{Companion, nested_quant_map, owner, quant_map};
use crate::checkpoint::experts::Experts;
use crate::checkpoint::names::{Names, Role, module_of, must_be_named};
use crate::checkpoint::quant_state::{Nested, QuantState};
use crate::checkpoint::rules::{Decision, Rules};
use crate::checkpoint::safetensors::TensorInfo;
use crate::checkpoint::shard::{SINGLE, Source};
use crate::checkpoint::stored::Stored;
use crate::checkpoint::writer::Output;
use crate::dtype::Dtype;
use crate::error::Result;
use crate::format::{Decode, Format, Scale};
use crate::tensor::Layout;

/// What to quantize, and how.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// The format of what no override names.
    pub format: Format,
    /// Elements that share a scale; `None`: the format's default.
    pub blocksize: Option<usize>,
    /// Whether the scales are quantized too, in formats that have that.
    pub nested: bool,
    /// The user's patterns.
    pub rules: &'a Rules,
    /// Whether the user's list of what to leave out replaces the default one.
    pub has_skip_list: bool,
    /// Whether weights of a mixture of experts are quantized.
    pub experts: bool,
    /// What floating point tensors are cast to first; `None`: they stay as they are.
    pub dtype: Option<Dtype>,
}

/// What is done with a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Its bytes are copied.
    Keep,
    /// Its elements are rounded to another type.
    Cast(Dtype),
    /// It is quantized.
    Quantize {
        /// The lengths of the result.
        layout: Layout,
        /// What the elements are cast to first; the result remembers it.
        dtype: Dtype,
        /// Whether the file has `[in, out]` and the result `[out, in]`.
        transposed: bool,
    },
    /// A quantized parameter becomes an ordinary tensor.
    Dequantize {
        /// Where its parts lie.
        stored: Stored,
        /// The element type of the result.
        dtype: Dtype,
        /// Whether the result is `[in, out]`.
        transposed: bool,
    },
}

/// A linear layer that stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// transformers leaves it out too unless it gets a list.
    ByDefault,
    /// transformers must be told.
    Named,
    /// transformers does not take it for a linear layer.
    Unseen,
}

/// One tensor of the source.
#[derive(Clone, Debug)]
pub struct Item {
    /// The number of its file.
    pub file: usize,
    /// What the header says.
    pub info: TensorInfo,
    /// What is done with it.
    pub action: Action,
    /// Why it is not quantized.
    pub reason: Option<String>,
    /// Whether it is a weight that could have been quantized, and who must be told that it is not.
    pub left_out: Option<LeftOut>,
    /// Bytes in the source, companions included.
    pub bytes: u64,
}

impl Item {
    /// The tensors that it becomes.
    pub fn outputs(&self) -> Vec<Output> {
        let name = &self.info.name;
        match &self.action {
            Action::Keep => vec![tensor(name.clone(), self.info.dtype, self.info.shape.clone())],
            Action::Cast(dtype) => {
                vec![tensor(name.clone(), file_dtype(*dtype), self.info.shape.clone())]
            }
            Action::Quantize { layout, dtype, .. } => {
                quantized(name, layout, *dtype, &self.shape())
            }
            Action::Dequantize { dtype, .. } => {
                vec![tensor(name.clone(), file_dtype(*dtype), self.shape())]
            }
        }
    }

    /// The shape of the result.
    pub fn shape(&self) -> Vec<usize> {
        let (mut shape, transposed) = match &self.action {
            Action::Quantize { transposed, .. } => (self.info.shape.clone(), *transposed),
            Action::Dequantize { stored, transposed, .. } => (stored.shape.clone(), *transposed),
            Action::Keep | Action::Cast(_) => (self.info.shape.clone(), false),
        };
        if transposed {
            shape.reverse();
        }
        shape
    }

    /// The name of the result's format in reports: that of a format, or the element type.
    pub fn format(&self) -> String {
        match &self.action {
            Action::Quantize { layout, .. } => layout.format.name().to_owned(),
            Action::Cast(dtype) | Action::Dequantize { dtype, .. } => dtype.short_name().to_owned(),
            Action::Keep => dtype_name(self.info.dtype),
        }
    }
}

/// One file of the output.
#[derive(Clone, Debug)]
pub struct Shard {
    /// Its name.
    pub name: String,
    /// Its tensors, in the order in which they are written.
    pub items: Vec<Item>,
}

/// What becomes of a checkpoint.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The files of the output.
    pub shards: Vec<Shard>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

impl Plan {
    /// Decides about every tensor of a source that is not quantized yet.
    pub fn quantize(source: &Source, choice: &Choice<'_>) -> Result<Self> {
        let names = Names::new(source.config(), source.tensors().map(|(_, info)| info));
        let experts = Experts::new(source.config(), source.tensors().map(|(_, info)| info));
        let items = source
            .tensors()
            .map(|(file, info)| {
                let (action, reason, left_out) = decide(info, &names, &experts, choice)
                    .map_err(|error| error.in_tensor(&info.name))?;
                let (info, bytes) = (info.clone(), info.bytes);
                Ok(Item { file, info, action, reason, left_out, bytes })
            })
            .collect::<Result<Vec<_>>>()?;
        let mut warnings = Vec::new();
        if names.has_own_layers() {
            warnings.push(
                "transformers has layers of its own for this model and cannot load them quantized"
                    .to_owned(),
            );
        }
        let stray = source.stray().len();
        if stray > 0 {
            warnings.push(format!("{stray} tensors are in no index and are left out"));
        }
        Ok(Self { shards: shards(items), warnings })
    }

    /// A plan of given items, in the shards of their source.
    pub fn of(items: Vec<Item>) -> Self {
        Self { shards: shards(items), warnings: Vec::new() }
    }

    /// Every tensor of the source.
    pub fn items(&self) -> impl Iterator<Item = &Item> {
        self.shards.iter().flat_map(|shard| &shard.items)
    }
}

/// What is done with a tensor, why it is not quantized, and who must know.
type Verdict = (Action, Option<String>, Option<LeftOut>);

fn decide(
    info: &TensorInfo,
    names: &Names<'_>,
    experts: &Experts<'_>,
    choice: &Choice<'_>,
) -> Result<Verdict> {
    let module = module_of(&info.name);
    let role = names.role(info);
    let keep = |dtype, reason: String, left_out| Ok((cast(info, dtype), Some(reason), left_out));
    let is_float32 = names.is_float32(&info.name);
    let default = choice.dtype.map(|dtype| if is_float32 { Dtype::F32 } else { dtype });
    let (format, pattern) = match choice.rules.decide(module) {
        Decision::Format(format, pattern) => (format, Some(pattern)),
        Decision::Skip(pattern) if !matches!(role, Role::Other(_) | Role::KeepPrecise(_)) => {
            let reason = format!("matches skip pattern '{pattern}'");
            return keep(default, reason, Some(LeftOut::Named));
        }
        Decision::Skip(_) | Decision::Default => (choice.format, None),
    };
    // A dense format casts anything that is floating point.
    if let (Decode::Dense(dtype), Some(pattern)) = (format.spec().decode, pattern) {
        let left_out = (!matches!(role, Role::Other(_))).then_some(LeftOut::Named);
        return keep(Some(dtype), format!("matches '{pattern}'"), left_out);
    }
    let by_default = if must_be_named(module, role) { LeftOut::Named } else { LeftOut::Unseen };
    match role {
        Role::Other(reason) => return keep(default, reason.to_owned(), None),
        Role::KeepPrecise(reason) => {
            let dtype = default.map(|dtype| if dtype == Dtype::F16 { Dtype::F32 } else { dtype });
            return keep(dtype, reason.to_owned(), Some(LeftOut::ByDefault));
        }
        Role::Router if pattern.is_none() => {
            return keep(default, "router".to_owned(), Some(by_default));
        }
        Role::Expert if !choice.experts => {
            let reason = "mixture-of-experts (experts=True quantizes it)";
            return keep(default, reason.to_owned(), Some(by_default));
        }
        Role::Head if pattern.is_none() && !choice.has_skip_list => {
            let reason = "output head (default skip)";
            return keep(default, reason.to_owned(), Some(LeftOut::ByDefault));
        }
        Role::Linear | Role::Head | Role::Expert | Role::Router => {}
    }
    if info.shape.contains(&0) {
        return keep(default, "empty".to_owned(), None);
    }
    let transposed = info.shape.len() == 2 && names.is_transposed(module);
    let mut shape = info.shape.clone();
    if transposed {
        shape.reverse();
    }
    let layout = layout(format, &shape, choice)?;
    if role == Role::Expert
        && let Some(reason) = experts.obstacle(info, &layout)
    {
        return keep(default, reason.to_owned(), Some(by_default));
    }
    // Every other role than `Other` has one of these types.
    let stored = float(info.dtype).unwrap_or(Dtype::F32);
    let dtype = default.unwrap_or(stored);
    Ok((Action::Quantize { layout, dtype, transposed }, None, None))
}

/// The layout of a weight. Block size and nesting are the main format's; another one takes them
/// where it has them.
fn layout(format: Format, shape: &[usize], choice: &Choice<'_>) -> Result<Layout> {
    let spec = format.spec();
    let is_main = format == choice.format;
    let blocksize = choice.blocksize.filter(|size| is_main || spec.blocksizes.contains(size));
    Layout::new(format, shape, blocksize, choice.nested && (is_main || spec.nestable))
}

fn cast(info: &TensorInfo, dtype: Option<Dtype>) -> Action {
    match (dtype, info.dtype) {
        (Some(dtype), FileDtype::F64) => Action::Cast(dtype),
        (Some(dtype), found) if float(found).is_some_and(|found| found != dtype) => {
            Action::Cast(dtype)
        }
        _ => Action::Keep,
    }
}

/// The element type that quantization takes, if it takes this one.
pub const fn float(dtype: FileDtype) -> Option<Dtype> {
    match dtype {
        FileDtype::F32 => Some(Dtype::F32),
        FileDtype::F16 => Some(Dtype::F16),
        FileDtype::BF16 => Some(Dtype::BF16),
        _ => None,
    }
}

const fn file_dtype(dtype: Dtype) -> FileDtype {
    match dtype {
        Dtype::F32 => FileDtype::F32,
        Dtype::F16 => FileDtype::F16,
        Dtype::BF16 => FileDtype::BF16,
    }
}

fn dtype_name(dtype: FileDtype) -> String {
    float(dtype)
        .map_or_else(|| dtype.to_string().to_lowercase(), |dtype| dtype.short_name().to_owned())
}

fn tensor(name: String, dtype: FileDtype, shape: Vec<usize>) -> Output {
    let elements = shape.iter().fold(1u64, |n, extent| n.saturating_mul(*extent as u64));
    let bytes = elements.saturating_mul(dtype.bitsize() as u64) / 8;
    Output { name, dtype, shape, bytes, is_text: false }
}

/// The tensors of a quantized parameter.
fn quantized(name: &str, layout: &Layout, dtype: Dtype, shape: &[usize]) -> Vec<Output> {
    let key = |companion: Companion| companion.key(name, layout.format);
    let f32s = |companion, n| tensor(key(companion), FileDtype::F32, vec![n]);
    if owner(layout.format).is_none() {
        return vec![
            tensor(name.to_owned(), FileDtype::I8, shape.to_vec()),
            f32s(Companion::Scb, layout.scales),
            tensor(key(Companion::WeightFormat), FileDtype::U8, vec![]),
        ];
    }
    let scale = match (layout.nested, layout.format.spec().scale) {
        (false, Scale::Absmax | Scale::RowAbsmax | Scale::None) => FileDtype::F32,
        (true, _) | (_, Scale::E8M0) => FileDtype::U8,
    };
    let longest = longest_state(layout, dtype, shape);
    let mut outputs = vec![
        tensor(name.to_owned(), FileDtype::U8, vec![layout.packed, 1]),
        tensor(key(Companion::Absmax), scale, vec![layout.scales]),
        f32s(Companion::QuantMap, quant_map(layout.format).len()),
        Output {
            is_text: true,
            ..tensor(key(Companion::QuantState), FileDtype::U8, vec![longest])
        },
    ];
    if layout.nested {
        outputs.push(f32s(Companion::NestedAbsmax, layout.nested_scales()));
        outputs.push(f32s(Companion::NestedQuantMap, nested_quant_map().len()));
    }
    outputs
}

/// What describes a quantized parameter.
pub(crate) fn state(
    layout: &Layout,
    dtype: Dtype,
    shape: &[usize],
    offset: Option<f32>,
) -> QuantState {
    QuantState {
        format: layout.format,
        blocksize: layout.blocksize,
        dtype,
        shape: shape.to_vec(),
        nested: offset.map(|offset| Nested { dtype: Dtype::F32, offset }),
    }
}

/// The most bytes that the text about a parameter can have: only the offset is not known yet,
/// and no double takes more than 24 characters.
fn longest_state(layout: &Layout, dtype: Dtype, shape: &[usize]) -> usize {
    const LONGEST_FLOAT: usize = 24;
    let text = state(layout, dtype, shape, layout.nested.then_some(0.0)).render();
    text.len() + if layout.nested { LONGEST_FLOAT - "0.0".len() } else { 0 }
}

/// Groups items as their source does; a weight's companions stay in its file.
fn shards(items: Vec<Item>) -> Vec<Shard> {
    let mut files: BTreeMap<usize, Vec<Item>> = BTreeMap::new();
    for item in items {
        files.entry(item.file).or_default().push(item);
    }
    let count = files.len();
    files
        .into_values()
        .enumerate()
        .map(|(i, mut items)| {
            // Texts of unknown length are U8: with names ascending, and what the file has behind
            // all U8 last, every position is known when it is needed.
            items.sort_by(|a, b| {
                let key = |item: &Item| (item.info.dtype < FileDtype::U8, item.info.name.clone());
                key(a).cmp(&key(b))
            });
            Shard { name: shard_name(i, count), items }
        })
        .collect()
}

fn shard_name(i: usize, count: usize) -> String {
    if count == 1 {
        SINGLE.to_owned()
    } else {
        format!("model-{:05}-of-{count:05}.safetensors", i + 1)
    }
}
