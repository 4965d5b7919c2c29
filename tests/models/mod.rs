//! Small models to quantize, and what their tensors should become.

// Each test file uses a part of it.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use half::bf16;
use nybble::backend::cpu::{Cpu, Quantizer};
use nybble::checkpoint::convert::{Options, quantize};
use nybble::checkpoint::report::Report;
use nybble::checkpoint::{Checkpoint, Damage};
use nybble::error::Result;
use nybble::format::Format;
use nybble::tensor::Layout;
use safetensors::Dtype as FileDtype;
use safetensors::tensor::{TensorView, serialize};

/// A checkpoint to be quantized.
pub struct Model {
    pub directory: tempfile::TempDir,
    pub tensors: Vec<(String, FileDtype, Vec<usize>, Vec<u8>)>,
}

/// Values that look like weights, the same for the same seed.
pub fn weights(seed: u32, n: usize) -> Vec<bf16> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        f64::from(state) / f64::from(u32::MAX) - 0.5
    };
    (0..n).map(|_| bf16::from_f64(0.05 * (next() + next() + next()))).collect()
}

impl Model {
    pub fn new(config: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("source")).unwrap();
        fs::write(directory.path().join("source/config.json"), config).unwrap();
        Self { directory, tensors: Vec::new() }
    }

    pub fn llama() -> Self {
        Self::new("{\n  \"dtype\": \"bfloat16\",\n  \"model_type\": \"llama\",\n  \"rms_norm_eps\": 1e-06\n}\n")
            .with("model.embed_tokens.weight", &[32, 48])
            .with("model.layers.0.self_attn.q_proj.weight", &[48, 48])
            .with("model.layers.0.mlp.up_proj.weight", &[65, 48])
            .with("model.layers.0.mlp.up_proj.bias", &[65])
            .with("model.layers.1.mlp.up_proj.weight", &[33, 49])
            .with("model.norm.weight", &[48])
            .with("lm_head.weight", &[32, 48])
    }

    pub fn with(self, name: &str, shape: &[usize]) -> Self {
        let values = weights(self.tensors.len() as u32 + 1, shape.iter().product());
        self.with_data(name, FileDtype::BF16, shape, bytemuck::cast_slice(&values))
    }

    pub fn with_data(mut self, name: &str, dtype: FileDtype, shape: &[usize], data: &[u8]) -> Self {
        self.tensors.push((name.to_owned(), dtype, shape.to_vec(), data.to_vec()));
        self
    }

    /// Writes the tensors as one file.
    pub fn saved(self) -> Self {
        fs::write(self.source().join("model.safetensors"), self.bytes(|_| true)).unwrap();
        self
    }

    /// Writes the tensors as shards with an index.
    pub fn sharded(self, shard_of: impl Fn(&str) -> usize, count: usize) -> Self {
        let mut map = serde_json::Map::new();
        for shard in 0..count {
            let name = format!("model-{:05}-of-{count:05}.safetensors", shard + 1);
            let bytes = self.bytes(|tensor| shard_of(tensor) == shard);
            fs::write(self.source().join(&name), bytes).unwrap();
            let names = self.tensors.iter().filter(|tensor| shard_of(&tensor.0) == shard);
            map.extend(names.map(|tensor| (tensor.0.clone(), name.as_str().into())));
        }
        let index = serde_json::json!({ "metadata": {}, "weight_map": map });
        fs::write(self.source().join("model.safetensors.index.json"), index.to_string()).unwrap();
        self
    }

    fn bytes(&self, wanted: impl Fn(&str) -> bool) -> Vec<u8> {
        let tensors = self.tensors.iter().filter(|(name, ..)| wanted(name));
        let views = tensors.map(|(name, dtype, shape, data)| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        serialize(views, Some(HashMap::from([("format".into(), "pt".into())]))).unwrap()
    }

    pub fn values(&self, name: &str) -> Vec<bf16> {
        let (_, _, _, data) = self.tensors.iter().find(|tensor| tensor.0 == name).unwrap();
        elements(data)
    }

    pub fn source(&self) -> PathBuf {
        self.directory.path().join("source")
    }

    pub fn target(&self) -> PathBuf {
        self.directory.path().join("target")
    }

    pub fn quantize(&self, options: &Options) -> Result<Report> {
        quantize(&self.source(), &self.target(), options, &mut on)
    }

    /// What lies beside the source.
    pub fn left(&self) -> Vec<String> {
        let names = fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> =
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "source");
        names.sort();
        names
    }

    pub fn config(&self) -> serde_json::Value {
        serde_json::from_slice(&fs::read(self.target().join("config.json")).unwrap()).unwrap()
    }
}

/// Unaligned bytes as elements.
pub fn elements<T: bytemuck::Pod>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

pub fn on(_: u64, _: u64, _: &str) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

pub fn transposed(x: &[bf16], rows: usize, columns: usize) -> Vec<bf16> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| x[r * columns + c])).collect()
}

/// What a weight decodes to when it is quantized in memory.
pub fn in_memory(options: &Options, shape: &[usize], x: &[bf16]) -> Vec<f32> {
    let format = options.format;
    let layout = Layout::new(format, shape, options.blocksize, options.nested).unwrap();
    let cpu = Cpu::new(Some(1)).unwrap();
    let how = Quantizer { reference: options.reference, ..Quantizer::default() };
    let plain = Layout { nested: false, ..layout };
    let (mut packed, mut scales) = (vec![0; layout.packed], vec![0f32; layout.scales]);
    cpu.quantize(&plain, how, x, &mut packed, &mut scales).unwrap();
    let mut codes = vec![0; layout.scales];
    let mut absmax = vec![0f32; layout.nested_scales()];
    let view = if layout.nested {
        let offset =
            nybble::quant::nested::quantize(&scales, how.reference, &mut codes, &mut absmax);
        nybble::tensor::Scales::Nested { codes: &codes, absmax: &absmax, offset: offset.unwrap() }
    } else if format == Format::Mxfp4 {
        codes = scales.iter().map(|s| nybble::quant::blockwise::e8m0_encode(*s)).collect();
        nybble::tensor::Scales::E8M0(&codes)
    } else {
        nybble::tensor::Scales::Plain(&scales)
    };
    let mut out = vec![0f32; layout.elements];
    let q = nybble::tensor::QTensor::new(layout, &packed, view).unwrap();
    cpu.dequantize(&q, &mut out).unwrap();
    out
}

pub fn decoded(path: &Path, name: &str) -> Vec<f32> {
    let checkpoint = Checkpoint::open(path, Damage::Refuse).unwrap();
    let q = checkpoint.read_quantized(name).unwrap();
    let mut out = vec![0f32; q.stored.layout.elements];
    Cpu::new(Some(1)).unwrap().dequantize(&q.view().unwrap(), &mut out).unwrap();
    out
}

pub fn formats() -> Vec<Options> {
    let quantized = Format::ALL.iter().filter(|f| f.spec().scale != nybble::format::Scale::None);
    let plain = quantized.map(|format| Options::new(*format));
    let nested = plain.clone().filter(|options| options.format.spec().nestable);
    let nested: Vec<_> = nested.map(|options| Options { nested: true, ..options }).collect();
    plain.chain(nested).filter(|o| o.format != Format::Dynamic8Unsigned).collect()
}
