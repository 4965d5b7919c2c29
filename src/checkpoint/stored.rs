//! One quantized parameter as a file stores it: every length and codebook checked before a byte
//! of weights is read.

use std::path::Path;

use ::safetensors::Dtype as FileDtype;

use crate::checkpoint::bitsandbytes::{Companion, Named, nested_quant_map, owner, quant_map};
use crate::checkpoint::problem::{COPY_AGAIN, Problem};
use crate::checkpoint::quant_state::{self, QuantState};
use crate::checkpoint::safetensors::{MAX_RANK, TensorInfo, is_countable};
use crate::checkpoint::shard::Source;
use crate::dtype::Dtype;
use crate::format::{Format, Scale};
use crate::tensor::Layout;

/// A quantized parameter: what its buffers hold and where they lie.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Format, block size and the length of every buffer.
    pub layout: Layout,
    /// The shape of the weight.
    pub shape: Vec<usize>,
    /// The type that the weight had; for int8, which does not say, the model's.
    pub dtype: Dtype,
    /// The mean of the scales, where they are nested.
    pub nested_offset: Option<f32>,
    /// Bytes in the file, companions included.
    pub bytes: u64,
    pub(crate) absmax: String,
    pub(crate) nested_absmax: Option<String>,
    /// The scales are BF16 and lie as `[blocks of a row, rows]`, the defect that `repair` undoes.
    pub(crate) transposed: bool,
}

/// How [`Stored::read`] treats damage that can be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// It is an error that says how to repair.
    Refuse,
    /// It is undone as far as possible.
    Repair,
}

/// What a parameter is checked with.
#[derive(Clone, Copy)]
struct Group<'a> {
    source: &'a Source,
    parameter: &'a str,
    info: &'a TensorInfo,
    path: &'a Path,
    companions: &'a [Named],
}

const REPAIR: &str = "open it with repair=True, or write it again from the original";

impl Stored {
    /// Reads and checks what lies beside a parameter. `dtype` is what int8 weights had.
    pub fn read(
        source: &Source,
        parameter: &str,
        companions: &[Named],
        dtype: Dtype,
        damage: Damage,
    ) -> Result<Self, Problem> {
        let Some((file, info)) = source.find(parameter) else {
            let problem = "there is no such parameter".to_owned();
            return Err(Problem::tensor(source.path(), parameter, problem, "list the keys"));
        };
        let group = Group { source, parameter, info, path: file.path(), companions };
        let eight =
            |named: &&Named| matches!(named.companion, Companion::Scb | Companion::WeightFormat);
        match companions.iter().filter(eight).count() {
            0 => group.four_bits(damage),
            n if n == companions.len() => group.eight_bits(dtype),
            _ => Err(group.wrong("it has the companions of both 4 and 8 bits".to_owned())),
        }
    }
}

impl<'a> Group<'a> {
    fn wrong(&self, problem: String) -> Problem {
        Problem::tensor(self.path, self.parameter, problem, COPY_AGAIN)
    }

    /// The companion of this kind, if the file has one; two of a kind are refused.
    fn optional(
        &self,
        companion: Companion,
    ) -> Result<Option<(&'a Named, &'a TensorInfo)>, Problem> {
        let mut found = self.companions.iter().filter(|named| named.companion == companion);
        match (found.next(), found.next()) {
            (Some(first), Some(second)) => {
                Err(self.wrong(format!("it has both {} and {}", first.key, second.key)))
            }
            (Some(named), None) => Ok(self.source.find(&named.key).map(|(_, info)| (named, info))),
            (None, _) => Ok(None),
        }
    }

    fn required(&self, companion: Companion) -> Result<(&'a Named, &'a TensorInfo), Problem> {
        self.optional(companion)?.ok_or_else(|| {
            let has: Vec<&str> = self.companions.iter().map(|named| named.key.as_str()).collect();
            self.wrong(format!("its {} is missing (found {})", companion.suffix(), has.join(", ")))
        })
    }

    /// A companion of this type and number of elements.
    fn sized(
        &self,
        companion: Companion,
        dtype: FileDtype,
        elements: usize,
    ) -> Result<&'a Named, Problem> {
        let (named, info) = self.required(companion)?;
        if info.dtype != dtype || info.elements() != elements {
            return Err(self.wrong(format!(
                "{} is {} of shape {:?}, expected {dtype} of {elements} elements",
                named.key, info.dtype, info.shape
            )));
        }
        Ok(named)
    }

    fn bytes(&self) -> u64 {
        let of = |key: &str| self.source.find(key).map_or(0, |(_, info)| info.bytes);
        self.companions
            .iter()
            .map(|named| of(&named.key))
            .fold(self.info.bytes, u64::saturating_add)
    }

    fn eight_bits(&self, dtype: Dtype) -> Result<Stored, Problem> {
        if self.info.dtype != FileDtype::I8 {
            let found = self.info.dtype;
            return Err(self.wrong(format!("an int8 weight is I8, found {found}")));
        }
        let shape = self.eight_bit_shape()?;
        let layout = Layout::new(Format::Int8, &shape, None, false)
            .map_err(|error| self.wrong(error.to_string()))?;
        let scb = self.sized(Companion::Scb, FileDtype::F32, layout.scales)?;
        if self.optional(Companion::WeightFormat)?.is_some() {
            let named = self.sized(Companion::WeightFormat, FileDtype::U8, 1)?;
            let format = self.read_all(&named.key, 1)?;
            if format != [0] {
                return Err(self.wrong(format!(
                    "{} is {format:?}; only 0 (row by row) is supported",
                    named.key
                )));
            }
        }
        Ok(Stored {
            layout,
            shape,
            dtype,
            nested_offset: None,
            bytes: self.bytes(),
            absmax: scb.key.clone(),
            nested_absmax: None,
            transposed: false,
        })
    }

    /// Files for transformers hold int8 codes as `[n, 1]`: a loader that took them for a dense
    /// weight would then notice. The scales tell the rows.
    fn eight_bit_shape(&self) -> Result<Vec<usize>, Problem> {
        let (_, scb) = self.required(Companion::Scb)?;
        match (&self.info.shape[..], &scb.shape[..]) {
            (&[n, 1], &[rows]) if rows != 0 && n % rows == 0 => Ok(vec![rows, n / rows]),
            (shape, _) => Ok(shape.to_vec()),
        }
    }

    fn four_bits(&self, damage: Damage) -> Result<Stored, Problem> {
        let state = self.quant_state()?;
        let QuantState { format, shape, nested, .. } = &state;
        if shape.len() > MAX_RANK || !is_countable(shape, 32) {
            return Err(self.wrong(format!("quant_state says shape {shape:?}, which cannot be")));
        }
        let layout = Layout::new(*format, shape, Some(state.blocksize), nested.is_some())
            .map_err(|error| self.wrong(format!("quant_state: shape or format: {error}")))?;
        if self.info.bytes != layout.packed as u64 {
            return Err(self.wrong(format!(
                "quant_state says shape {shape:?}, which needs {} bytes of codes; the tensor has {}",
                layout.packed, self.info.bytes
            )));
        }
        self.same_map(Companion::QuantMap, quant_map(*format))?;
        let transposed = self.has_transposed_absmax(&state)?;
        if let (Some(problem), Damage::Refuse) = (damage_of(&state, transposed), damage) {
            return Err(Problem::tensor(self.path, self.parameter, problem, REPAIR));
        }
        let scale = match (layout.nested, format.spec().scale) {
            (true, _) | (_, Scale::E8M0) => FileDtype::U8,
            _ if transposed => FileDtype::BF16,
            _ => FileDtype::F32,
        };
        let absmax = self.sized(Companion::Absmax, scale, layout.scales).map_err(|problem| {
            let of = format!("shape {shape:?}, blocksize {}", layout.blocksize);
            Problem { problem: format!("{} ({of})", problem.problem), ..problem }
        })?;
        Ok(Stored {
            layout,
            shape: shape.clone(),
            dtype: state.dtype,
            nested_offset: nested.map(|nested| nested.offset),
            bytes: self.bytes(),
            absmax: absmax.key.clone(),
            nested_absmax: self.nested_absmax(&layout)?,
            transposed,
        })
    }

    /// The scales of the scales; none, and nothing else of theirs, where they are not nested.
    fn nested_absmax(&self, layout: &Layout) -> Result<Option<String>, Problem> {
        if layout.nested {
            self.same_map(Companion::NestedQuantMap, nested_quant_map())?;
            let n = layout.nested_scales();
            return Ok(Some(self.sized(Companion::NestedAbsmax, FileDtype::F32, n)?.key.clone()));
        }
        for companion in [Companion::NestedAbsmax, Companion::NestedQuantMap] {
            if let Some((named, _)) = self.optional(companion)? {
                let key = &named.key;
                return Err(
                    self.wrong(format!("{key} is there, but no nested_offset in quant_state"))
                );
            }
        }
        Ok(None)
    }

    fn quant_state(&self) -> Result<QuantState, Problem> {
        let (named, info) = self.required(Companion::QuantState)?;
        if info.dtype != FileDtype::U8 {
            return Err(self.wrong(format!("{} is {}, expected U8 text", named.key, info.dtype)));
        }
        let text = self.read_all(&named.key, quant_state::MAX_BYTES)?;
        let state = QuantState::parse(&text)
            .map_err(|problem| self.wrong(format!("quant_state is not valid: {problem}")))?;
        let expected = owner(state.format).map(|owner| format!(".{owner}__{}", state.format));
        match expected {
            Some(expected) if named.key.ends_with(&expected) => Ok(state),
            _ => Err(self.wrong(format!(
                "quant_type is '{}', but the text is stored as {}",
                state.format, named.key
            ))),
        }
    }

    /// The codebook of the file must be the format's: bit for bit or a few units in the last
    /// place, since old versions of torch rounded `linspace` otherwise. The sign of 0 is free.
    fn same_map(&self, companion: Companion, map: &[f32]) -> Result<(), Problem> {
        let named = self.sized(companion, FileDtype::F32, map.len())?;
        let bytes = self.read_all(&named.key, 4 * map.len() as u64)?;
        let found = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        let near =
            |found: f32, value: f32| (found - value).abs() <= 4.0 * f32::EPSILON * value.abs();
        match found.zip(map).position(|(found, value)| !near(found, *value)) {
            None => Ok(()),
            Some(code) => Err(self.wrong(format!(
                "{} differs from the codebook of the format at code {code}; files with a codebook \
                 of their own are not supported",
                named.key
            ))),
        }
    }

    /// Whether the scales are BF16 `[columns / blocksize, rows]` instead of F32 `[n / blocksize]`.
    fn has_transposed_absmax(&self, state: &QuantState) -> Result<bool, Problem> {
        let (_, info) = self.required(Companion::Absmax)?;
        let [rows, columns] = state.shape[..] else { return Ok(false) };
        Ok(state.nested.is_none()
            && info.dtype == FileDtype::BF16
            && columns % state.blocksize == 0
            && info.shape == [columns / state.blocksize, rows])
    }

    fn read_all(&self, key: &str, cap: u64) -> Result<Vec<u8>, Problem> {
        self.source
            .read_all(key, cap)
            .map_err(|error| Problem::from_error(self.path, Some(self.parameter), error))
    }
}

/// The traces of a bitsandbytes defect: on a CPU a forward pass repacks weights, and saving them
/// afterwards does not bring the scales back as they were.
fn damage_of(state: &QuantState, transposed: bool) -> Option<String> {
    let what = if transposed {
        "its absmax is transposed and rounded to bfloat16".to_owned()
    } else {
        let dtype = state.nested.map(|nested| nested.dtype).filter(|dtype| *dtype != Dtype::F32)?;
        format!("its scales were rounded to {dtype} (nested_dtype)")
    };
    Some(format!("{what}, as bitsandbytes saves it on a CPU after a forward pass"))
}
