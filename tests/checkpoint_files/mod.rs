//! Small checkpoints for tests, good and bad.

// Each test program uses a part.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use nybble::backend::cpu::{Cpu, Lanes, Quantizer};
use nybble::checkpoint::bitsandbytes::{Companion, nested_quant_map, quant_map};
use nybble::checkpoint::open::OwnedQTensor;
use nybble::checkpoint::quant_state::{Nested, QuantState};
use nybble::checkpoint::{Checkpoint, Damage, Entry, Part};
use nybble::dtype::Dtype;
use nybble::format::{Format, Scale};
use nybble::quant::nested;
use nybble::tensor::Layout;
use serde_json::json;
use tempfile::TempDir;

#[derive(Clone)]
pub struct Tensor {
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

pub type Tensors = BTreeMap<String, Tensor>;

pub fn tensor(dtype: &'static str, shape: &[usize], data: impl Into<Vec<u8>>) -> Tensor {
    Tensor { dtype, shape: shape.to_vec(), data: data.into() }
}

pub fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub fn file(tensors: &Tensors) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, tensor) in tensors {
        let begin = data.len();
        data.extend(&tensor.data);
        let offsets = [begin, data.len()];
        header.insert(
            name.clone(),
            json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}),
        );
    }
    raw(&serde_json::to_vec(&header).unwrap(), &data)
}

pub fn raw(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

pub fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect()
}

pub const W: &str = "fc.weight";

/// A weight of any format under the keys that a file has.
pub fn quantized(format: Format, shape: &[usize], nest: bool) -> Tensors {
    let layout = Layout::new(format, shape, None, nest).unwrap();
    let x = values(layout.elements);
    let (mut packed, mut absmax) = (vec![0; layout.packed], vec![0.0; layout.scales]);
    let cpu = Cpu::new(Some(1)).unwrap();
    cpu.quantize(&layout, Quantizer::default(), &x, &mut packed, &mut absmax).unwrap();

    let key = |companion: Companion| companion.key(W, format);
    let mut tensors = Tensors::new();
    if format == Format::Int8 {
        tensors.insert(W.into(), tensor("I8", shape, packed));
        tensors.insert(key(Companion::Scb), tensor("F32", &[layout.scales], floats(&absmax)));
        tensors.insert(key(Companion::WeightFormat), tensor("U8", &[], [0]));
        return tensors;
    }
    tensors.insert(W.into(), tensor("U8", &[packed.len(), 1], packed));
    let mut state = QuantState {
        format,
        blocksize: layout.blocksize,
        dtype: Dtype::BF16,
        shape: shape.to_vec(),
        nested: None,
    };
    let mut put = |companion: Companion, dtype, data: Vec<u8>| {
        let n = if dtype == "F32" { data.len() / 4 } else { data.len() };
        tensors.insert(key(companion), tensor(dtype, &[n], data));
    };
    if nest {
        let (mut codes, mut scales) = (vec![0; layout.scales], vec![0.0; layout.nested_scales()]);
        let offset =
            nested::quantize(&absmax, Quantizer::default().reference, &mut codes, &mut scales)
                .unwrap();
        state.nested = Some(Nested { dtype: Dtype::F32, offset });
        put(Companion::Absmax, "U8", codes);
        put(Companion::NestedAbsmax, "F32", floats(&scales));
        put(Companion::NestedQuantMap, "F32", floats(nested_quant_map()));
    } else if format.spec().scale == Scale::E8M0 {
        let codes = absmax.iter().map(|scale| (scale.to_bits() >> 23) as u8).collect();
        put(Companion::Absmax, "U8", codes);
    } else {
        put(Companion::Absmax, "F32", floats(&absmax));
    }
    put(Companion::QuantMap, "F32", floats(quant_map(format)));
    put(Companion::QuantState, "U8", state.render().into_bytes());
    tensors
}

pub struct Case {
    pub directory: TempDir,
}

impl Case {
    pub fn new(tensors: &Tensors) -> Self {
        Self::of_bytes(&file(tensors))
    }

    pub fn of_bytes(bytes: &[u8]) -> Self {
        let case = Self { directory: TempDir::new().unwrap() };
        case.write("model.safetensors", bytes);
        case
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> &Self {
        fs::write(self.directory.path().join(name), bytes).unwrap();
        self
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn open(&self) -> nybble::error::Result<Checkpoint> {
        Checkpoint::open(self.path(), Damage::Refuse)
    }

    /// What is wrong, whether on opening or later; empty if nothing is.
    pub fn wrong(&self) -> String {
        match self.open() {
            Err(error) => error.to_string(),
            Ok(checkpoint) => {
                let problems = checkpoint.verify();
                problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
            }
        }
    }
}

/// Everything that can be read, as bytes by name; an error if anything cannot.
pub fn read_everything(path: &Path) -> Result<BTreeMap<String, Vec<u8>>, String> {
    let checkpoint = Checkpoint::open(path, Damage::Refuse).map_err(|error| error.to_string())?;
    let mut all = BTreeMap::new();
    for name in checkpoint.names() {
        let bytes = match checkpoint.entry(name).map_err(|error| error.to_string())? {
            Entry::Dense { bytes, .. } => {
                let mut data = vec![0; usize::try_from(bytes).unwrap()];
                let read = checkpoint.read_part(name, Part::Data, 0, &mut data);
                read.map_err(|error| error.to_string())?;
                data
            }
            Entry::Quantized(_) => {
                let q = checkpoint.read_quantized(name).map_err(|error| error.to_string())?;
                floats(&decode::<f32>(&q))
            }
        };
        all.insert(name.to_owned(), bytes);
    }
    match checkpoint.verify().first() {
        Some(problem) => Err(problem.to_string()),
        None => Ok(all),
    }
}

pub fn decode<T: Lanes>(q: &OwnedQTensor) -> Vec<T> {
    let mut out = vec![T::default(); q.stored.layout.elements];
    Cpu::new(Some(1)).unwrap().dequantize(&q.view().unwrap(), &mut out).unwrap();
    out
}
