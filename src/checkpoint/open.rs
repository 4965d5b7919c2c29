//! A checkpoint by parameter names: quantized or dense, read when asked for.

use std::path::Path;

use ::safetensors::Dtype as FileDtype;
use serde_json::Value;

use crate::checkpoint::bitsandbytes::Groups;
use crate::checkpoint::problem::Problem;
use crate::checkpoint::shard::{CONFIG, Source};
use crate::checkpoint::stored::{Damage, Stored};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::format::Scale;
use crate::pack::check_len;
use crate::tensor::{QTensor, Scales};

/// A model's parameters. Headers and config are read on opening; data when asked for.
#[derive(Debug)]
pub struct Checkpoint {
    pub(crate) source: Source,
    pub(crate) groups: Groups,
    dtype: Dtype,
    damage: Damage,
}

/// What a parameter is.
#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    /// An ordinary tensor.
    Dense {
        /// Its element type in the file.
        dtype: FileDtype,
        /// Its shape.
        shape: Vec<usize>,
        /// Its bytes.
        bytes: u64,
    },
    /// A quantized weight.
    Quantized(Stored),
}

/// A buffer of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The bytes of a dense tensor, or the codes of a quantized one.
    Data,
    /// The scales: f32, or one byte each where they are nested or exponents.
    Absmax,
    /// The f32 scales of nested scales.
    NestedAbsmax,
}

impl Part {
    /// Finds a part by name.
    pub fn parse(name: &str) -> Result<Self> {
        const PARTS: [(&str, Part); 3] =
            [("data", Part::Data), ("absmax", Part::Absmax), ("nested_absmax", Part::NestedAbsmax)];
        let found = PARTS.iter().find(|(known, _)| *known == name);
        found
            .map(|(_, part)| *part)
            .ok_or_else(|| Error::unknown("part", name, PARTS.map(|(known, _)| known)))
    }
}

impl Checkpoint {
    /// Opens a file or a directory of safetensors.
    ///
    /// A weight that bitsandbytes damaged on saving is an error when it is read, unless `damage`
    /// asks for repair.
    pub fn open(path: &Path, damage: Damage) -> Result<Self> {
        let source = Source::open(path)?;
        if let Some(config) = source.config() {
            check_method(config)
                .map_err(|problem| Error::checkpoint(&path.join(CONFIG), problem))?;
        }
        let groups = Groups::new(&source);
        let dtype = source.config().and_then(config_dtype).unwrap_or(Dtype::F16);
        Ok(Self { source, groups, dtype, damage })
    }

    /// The files that it lies in.
    pub const fn source(&self) -> &Source {
        &self.source
    }

    /// The names of the parameters, sorted; what belongs to a quantized one has no name here.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.groups.parameters().map(|(name, _)| name)
    }

    /// What a parameter is; reads and checks what describes it, not the weights.
    pub fn entry(&self, name: &str) -> Result<Entry> {
        Ok(self.describe(name)?)
    }

    /// As [`Checkpoint::entry`], with the remedy apart.
    pub(crate) fn describe(&self, name: &str) -> Result<Entry, Problem> {
        let source = &self.source;
        let Some(companions) = self.groups.get(name) else {
            let problem = "there is no such parameter".to_owned();
            return Err(Problem::tensor(source.path(), name, problem, "list the names"));
        };
        if let ([], Some((_, info))) = (companions, source.find(name)) {
            let (dtype, shape) = (info.dtype, info.shape.clone());
            return Ok(Entry::Dense { dtype, shape, bytes: info.bytes });
        }
        let stored = Stored::read(source, name, companions, self.dtype, self.damage)?;
        Ok(Entry::Quantized(stored))
    }

    /// Fills `out` with bytes of one buffer, from byte `first` on. Scales that lie otherwise in a
    /// damaged file must be read whole.
    pub fn read_part(&self, name: &str, part: Part, first: u64, out: &mut [u8]) -> Result<()> {
        let stored = match (part, self.entry(name)?) {
            (Part::Data, _) => return self.source.read(name, first, out),
            (_, Entry::Quantized(stored)) => stored,
            (_, Entry::Dense { .. }) => {
                return Err(Error::tensor(
                    self.source.path(),
                    name,
                    "not quantized, has no scales",
                ));
            }
        };
        match (part, &stored.nested_absmax) {
            (Part::NestedAbsmax, Some(key)) => self.source.read(key, first, out),
            (Part::NestedAbsmax, None) => {
                Err(Error::tensor(self.source.path(), name, "its scales are not nested"))
            }
            _ if stored.transposed => {
                check_len("absmax bytes", 4 * stored.layout.scales, out.len())?;
                let bytes = self.transposed_scales(&stored)?.into_iter().flat_map(f32::to_le_bytes);
                out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = byte);
                Ok(())
            }
            _ => self.source.read(&stored.absmax, first, out),
        }
    }

    /// Reads a quantized parameter whole.
    pub fn read_quantized(&self, name: &str) -> Result<OwnedQTensor> {
        let Entry::Quantized(stored) = self.entry(name)? else {
            return Err(Error::tensor(self.source.path(), name, "not quantized"));
        };
        // The lengths were compared with those of the file, so a lie cannot allocate.
        let mut packed = vec![0; stored.layout.packed];
        self.source.read(name, 0, &mut packed)?;
        let scales = self.read_scales(&stored)?;
        Ok(OwnedQTensor { stored, packed, scales })
    }

    /// Reads the scales of a quantized parameter.
    pub fn read_scales(&self, stored: &Stored) -> Result<OwnedScales> {
        let floats = |key: &str, n: usize| {
            let mut values = vec![0f32; n];
            self.source.read(key, 0, bytemuck::cast_slice_mut(&mut values))?;
            // Files are little-endian; on such machines this is nothing.
            for value in &mut values {
                *value = f32::from_bits(u32::from_le(value.to_bits()));
            }
            Ok::<_, Error>(values)
        };
        let codes = || {
            let mut codes = vec![0; stored.layout.scales];
            self.source.read(&stored.absmax, 0, &mut codes)?;
            Ok::<_, Error>(codes)
        };
        match (&stored.nested_absmax, stored.nested_offset) {
            (Some(key), Some(offset)) => Ok(OwnedScales::Nested {
                codes: codes()?,
                absmax: floats(key, stored.layout.nested_scales())?,
                offset,
            }),
            _ if stored.transposed => Ok(OwnedScales::Plain(self.transposed_scales(stored)?)),
            _ if stored.layout.format.spec().scale == Scale::E8M0 => {
                Ok(OwnedScales::E8M0(codes()?))
            }
            _ => Ok(OwnedScales::Plain(floats(&stored.absmax, stored.layout.scales)?)),
        }
    }

    /// BF16 scales `[blocks of a row, rows]` in the order they should have had.
    fn transposed_scales(&self, stored: &Stored) -> Result<Vec<f32>> {
        let mut bytes = vec![0; 2 * stored.layout.scales];
        self.source.read(&stored.absmax, 0, &mut bytes)?;
        let (lying, _) = bytes.as_chunks::<2>();
        let rows = stored.shape.first().copied().unwrap_or(0);
        let of_row = |row| lying.iter().skip(row).step_by(rows.max(1));
        let scales = (0..rows).flat_map(of_row);
        Ok(scales.map(|bytes| half::bf16::from_le_bytes(*bytes).to_f32()).collect())
    }
}

/// The scales of a quantized tensor in memory; see [`Scales`].
#[derive(Clone, Debug, PartialEq)]
pub enum OwnedScales {
    /// One f32 per block or row.
    Plain(Vec<f32>),
    /// One exponent byte per block.
    E8M0(Vec<u8>),
    /// Double quantization.
    Nested {
        /// One byte per block.
        codes: Vec<u8>,
        /// One scale per 256 codes.
        absmax: Vec<f32>,
        /// What is added back.
        offset: f32,
    },
}

impl OwnedScales {
    /// Borrowed.
    pub fn view(&self) -> Scales<'_> {
        match self {
            OwnedScales::Plain(scales) => Scales::Plain(scales),
            OwnedScales::E8M0(codes) => Scales::E8M0(codes),
            OwnedScales::Nested { codes, absmax, offset } => {
                Scales::Nested { codes, absmax, offset: *offset }
            }
        }
    }
}

/// A quantized parameter in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct OwnedQTensor {
    /// Layout, shape and original type.
    pub stored: Stored,
    /// The codes.
    pub packed: Vec<u8>,
    /// The scales.
    pub scales: OwnedScales,
}

impl OwnedQTensor {
    /// Borrowed and checked, as the backends take it.
    pub fn view(&self) -> Result<QTensor<'_>> {
        QTensor::new(self.stored.layout, &self.packed, self.scales.view())
    }
}

/// Refuses checkpoints that other tools quantized, since their tensors mean something else.
fn check_method(config: &Value) -> Result<(), String> {
    let Some(quantization) = config.get("quantization_config") else { return Ok(()) };
    let method = quantization.get("quant_method").and_then(Value::as_str);
    if let Some(method) = method.filter(|method| !["bitsandbytes", "nybble"].contains(method)) {
        return Err(format!(
            "quantized with {method}, which is not read here; start from the original model"
        ));
    }
    let set = |key: &str| quantization.get(key).and_then(Value::as_bool) == Some(true);
    if set("load_in_4bit") && set("load_in_8bit") {
        return Err("load_in_4bit and load_in_8bit are both set; keep the one that is true".into());
    }
    Ok(())
}

/// The model's type; old files call it `torch_dtype`.
fn config_dtype(config: &Value) -> Option<Dtype> {
    let name = ["dtype", "torch_dtype"].iter().find_map(|key| config.get(key)?.as_str())?;
    Dtype::parse(name).ok()
}

/// The name under which reports count a tensor: the format, or the element type.
pub(crate) fn format_name(entry: &Entry) -> String {
    match entry {
        Entry::Quantized(stored) => stored.layout.format.name().to_owned(),
        Entry::Dense { dtype, .. } => {
            let known = match dtype {
                FileDtype::F32 => Some(Dtype::F32),
                FileDtype::F16 => Some(Dtype::F16),
                FileDtype::BF16 => Some(Dtype::BF16),
                _ => None,
            };
            known
                .map_or_else(|| dtype.to_string().to_lowercase(), |known| known.short_name().into())
        }
    }
}

/// Elements whose codes or values the entry holds.
pub(crate) fn elements(entry: &Entry) -> u64 {
    match entry {
        Entry::Quantized(stored) => stored.layout.elements as u64,
        Entry::Dense { shape, .. } => {
            shape.iter().fold(1u64, |product, extent| product.saturating_mul(*extent as u64))
        }
    }
}
