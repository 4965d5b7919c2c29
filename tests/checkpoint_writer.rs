//! Checkpoints that nybble writes: equal to bitsandbytes', whole or not there, and read back.

// Helpers outside of test functions.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use half::bf16;
use nybble::backend::cpu::{Cpu, Quantizer};
use nybble::checkpoint::convert::{Options, Run, dequantize, quantize};
use nybble::checkpoint::report::Report;
use nybble::checkpoint::{Checkpoint, Damage, Entry};
use nybble::dtype::Dtype;
use nybble::error::{Error, Result};
use nybble::format::Format;
use nybble::quant::Reference;
use nybble::tensor::Layout;
use safetensors::tensor::{TensorView, serialize};
use safetensors::{Dtype as FileDtype, SafeTensors};

/// A checkpoint to be quantized.
struct Model {
    directory: tempfile::TempDir,
    tensors: Vec<(String, FileDtype, Vec<usize>, Vec<u8>)>,
}

/// Values that look like weights, the same for the same seed.
fn weights(seed: u32, n: usize) -> Vec<bf16> {
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
    fn new(config: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("source")).unwrap();
        fs::write(directory.path().join("source/config.json"), config).unwrap();
        Self { directory, tensors: Vec::new() }
    }

    fn llama() -> Self {
        Self::new("{\n  \"dtype\": \"bfloat16\",\n  \"model_type\": \"llama\",\n  \"rms_norm_eps\": 1e-06\n}\n")
            .with("model.embed_tokens.weight", &[32, 48])
            .with("model.layers.0.self_attn.q_proj.weight", &[48, 48])
            .with("model.layers.0.mlp.up_proj.weight", &[65, 48])
            .with("model.layers.0.mlp.up_proj.bias", &[65])
            .with("model.layers.1.mlp.up_proj.weight", &[33, 49])
            .with("model.norm.weight", &[48])
            .with("lm_head.weight", &[32, 48])
    }

    fn with(self, name: &str, shape: &[usize]) -> Self {
        let values = weights(self.tensors.len() as u32 + 1, shape.iter().product());
        self.with_data(name, FileDtype::BF16, shape, bytemuck::cast_slice(&values))
    }

    fn with_data(mut self, name: &str, dtype: FileDtype, shape: &[usize], data: &[u8]) -> Self {
        self.tensors.push((name.to_owned(), dtype, shape.to_vec(), data.to_vec()));
        self
    }

    /// Writes the tensors as one file.
    fn saved(self) -> Self {
        fs::write(self.source().join("model.safetensors"), self.bytes(|_| true)).unwrap();
        self
    }

    /// Writes the tensors as shards with an index.
    fn sharded(self, shard_of: impl Fn(&str) -> usize, count: usize) -> Self {
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

    fn values(&self, name: &str) -> Vec<bf16> {
        let (_, _, _, data) = self.tensors.iter().find(|tensor| tensor.0 == name).unwrap();
        elements(data)
    }

    fn source(&self) -> PathBuf {
        self.directory.path().join("source")
    }

    fn target(&self) -> PathBuf {
        self.directory.path().join("target")
    }

    fn quantize(&self, options: &Options) -> Result<Report> {
        quantize(&self.source(), &self.target(), options, &mut on)
    }

    /// What lies beside the source.
    fn left(&self) -> Vec<String> {
        let names = fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> =
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "source");
        names.sort();
        names
    }

    fn config(&self) -> serde_json::Value {
        serde_json::from_slice(&fs::read(self.target().join("config.json")).unwrap()).unwrap()
    }
}

/// Unaligned bytes as elements.
fn elements<T: bytemuck::Pod>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

fn on(_: u64, _: u64, _: &str) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn transposed(x: &[bf16], rows: usize, columns: usize) -> Vec<bf16> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| x[r * columns + c])).collect()
}

/// What a weight decodes to when it is quantized in memory.
fn in_memory(options: &Options, shape: &[usize], x: &[bf16]) -> Vec<f32> {
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

fn decoded(path: &Path, name: &str) -> Vec<f32> {
    let checkpoint = Checkpoint::open(path, Damage::Refuse).unwrap();
    let q = checkpoint.read_quantized(name).unwrap();
    let mut out = vec![0f32; q.stored.layout.elements];
    Cpu::new(Some(1)).unwrap().dequantize(&q.view().unwrap(), &mut out).unwrap();
    out
}

fn formats() -> Vec<Options> {
    let quantized = Format::ALL.iter().filter(|f| f.spec().scale != nybble::format::Scale::None);
    let plain = quantized.map(|format| Options::new(*format));
    let nested = plain.clone().filter(|options| options.format.spec().nestable);
    let nested: Vec<_> = nested.map(|options| Options { nested: true, ..options }).collect();
    plain.chain(nested).filter(|o| o.format != Format::Dynamic8Unsigned).collect()
}

#[test]
fn every_format_comes_back_as_it_was_quantized_in_memory() {
    for options in formats() {
        let model = Model::llama().saved();
        let report = model.quantize(&options).unwrap();
        for (name, shape) in [
            ("model.layers.0.self_attn.q_proj.weight", [48, 48]),
            ("model.layers.0.mlp.up_proj.weight", [65, 48]),
            ("model.layers.1.mlp.up_proj.weight", [33, 49]),
        ] {
            let want = in_memory(&options, &shape, &model.values(name));
            assert_eq!(decoded(&model.target(), name), want, "{name} {options:?}");
            let row = report.tensors.iter().find(|row| row.name == name).unwrap();
            assert!(row.stats.as_ref().unwrap().sqnr_db > 15.0);
        }
        let kept = report.tensors.iter().filter(|row| row.kept.is_some()).count();
        assert_eq!((kept, report.tensors.len()), (4, 7));
        let checkpoint = Checkpoint::open(&model.target(), Damage::Refuse).unwrap();
        assert!(checkpoint.verify().is_empty());
        assert_eq!(model.left(), ["target"]);
    }
}

#[test]
fn dequantized_checkpoints_hold_what_the_codes_decode_to() {
    for options in formats() {
        let model = Model::llama().saved();
        model.quantize(&options).unwrap();
        let dense = model.directory.path().join("dense");
        let run = Run::default();
        let report = dequantize(&model.target(), &dense, Some(Dtype::F32), run, &mut on).unwrap();
        assert_eq!(report.totals.changed, 3);
        let bytes = fs::read(dense.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let name = "model.layers.1.mlp.up_proj.weight";
        let tensor = file.tensor(name).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (FileDtype::F32, &[33, 49][..]));
        let found: Vec<f32> = elements(tensor.data());
        assert_eq!(found, decoded(&model.target(), name));
        let config = fs::read_to_string(dense.join("config.json")).unwrap();
        assert!(!config.contains("quantization_config"));
        assert!(config.contains("\"dtype\": \"float32\"") && config.contains("1e-06"));
    }
}

#[test]
fn the_bytes_are_those_of_bitsandbytes() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bnb_checkpoints");
    let tied = golden.join("llama_tied");
    let k_proj = Some(vec!["lm_head".to_owned(), "k_proj".to_owned()]);
    for (name, format, nested, skip) in [
        ("nf4_dq", Format::Nf4, true, None),
        ("fp4", Format::Fp4, false, None),
        ("int8", Format::Int8, false, k_proj),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        let reference = Reference::BitsandbytesCpu;
        let options = Options { nested, skip, reference, ..Options::new(format) };
        quantize(&tied.join("original"), &target, &options, &mut on).unwrap();
        for file in ["model.safetensors", "generation_config.json"] {
            let (ours, theirs) = (target.join(file), tied.join(name).join(file));
            assert!(fs::read(ours).unwrap() == fs::read(theirs).unwrap(), "{name} {file}");
        }
        let config = |path: PathBuf| fs::read_to_string(path.join("config.json")).unwrap();
        // The compute dtype is the user's choice; theirs is the default of the class.
        let theirs = config(tied.join(name)).replace(
            "\"bnb_4bit_compute_dtype\": \"bfloat16\"",
            "\"bnb_4bit_compute_dtype\": \"float32\"",
        );
        assert_eq!(config(target), theirs);
    }
}

#[test]
fn files_are_those_that_the_safetensors_crate_would_write() {
    let model = Model::llama()
        .with_data("mask", FileDtype::BOOL, &[3], &[1, 0, 1])
        .with_data("ids", FileDtype::I64, &[1], &[0; 8])
        .with_data("a.bytes", FileDtype::U8, &[3], &[1, 2, 3])
        .with_data("zz.bytes", FileDtype::U8, &[3], &[1, 2, 3])
        .saved();
    model.quantize(&Options { nested: true, ..Options::new(Format::Nf4) }).unwrap();
    let bytes = fs::read(model.target().join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let again = serialize(file.iter(), Some(HashMap::from([("format".into(), "pt".into())])));
    assert!(again.unwrap() == bytes);
}

#[test]
fn little_memory_gives_the_same_bytes() {
    let model = Model::new("{}")
        .with("a.c_fc.weight", &[1000, 2100])
        .with("b.weight", &[2048, 1024])
        .saved();
    for options in formats() {
        let target = |name: &str| model.directory.path().join(name);
        let small =
            Run { max_memory: Some(30 << 20), threads: Some(1), overwrite: true, dry_run: false };
        let plain = Run { overwrite: true, ..Run::default() };
        let mut bytes = Vec::new();
        for (name, run) in [("small", small), ("large", plain)] {
            let options = Options { run, ..options.clone() };
            let report = quantize(&model.source(), &target(name), &options, &mut on).unwrap();
            assert_eq!(report.memory_bytes <= 30 << 20, name == "small");
            bytes.push(fs::read(target(name).join("model.safetensors")).unwrap());
        }
        assert!(bytes[0] == bytes[1], "{options:?}");
        bytes.clear();
        for (name, run) in [("dense_small", small), ("dense_large", plain)] {
            dequantize(&target("small"), &target(name), None, run, &mut on).unwrap();
            bytes.push(fs::read(target(name).join("model.safetensors")).unwrap());
        }
        assert!(bytes[0] == bytes[1], "{options:?}");
    }
    let run = Run { max_memory: Some(1), ..Run::default() };
    let error = model.quantize(&Options { run, ..Options::new(Format::Nf4) }).unwrap_err();
    assert!(matches!(error, Error::InTensor { .. }) && error.to_string().contains("max_memory"));
    assert!(!model.target().exists());
}

#[test]
fn an_error_at_the_end_leaves_nothing() {
    let mut data = vec![bf16::ONE; 300];
    data[217] = bf16::NAN;
    let bad = |model: Model| {
        model.with_data("z.weight", FileDtype::BF16, &[3, 100], bytemuck::cast_slice(&data))
    };
    let model = bad(Model::llama()).saved();
    let error = model.quantize(&Options::new(Format::Nf4)).unwrap_err().to_string();
    assert!(error.contains("z.weight") && error.contains("217"), "{error}");
    assert!(model.left().is_empty());

    // A model that is there stays as it is until the new one is whole.
    fs::create_dir(model.target()).unwrap();
    fs::write(model.target().join("config.json"), "old").unwrap();
    let run = Run { overwrite: true, ..Run::default() };
    let options = Options { run, ..Options::new(Format::Nf4) };
    assert!(model.quantize(&options).is_err());
    assert_eq!(model.left(), ["target"]);
    assert_eq!(fs::read(model.target().join("config.json")).unwrap(), b"old");

    let zero = Options { nonfinite: nybble::quant::NonFinite::Zero, ..options };
    let report = model.quantize(&zero).unwrap();
    let row = report.tensors.iter().find(|row| row.name == "z.weight").unwrap();
    assert_eq!(row.stats.as_ref().unwrap().zeroed, 1);
}

#[test]
fn an_interruption_leaves_nothing() {
    let model = Model::llama().saved();
    for stop_after in 1..6 {
        let mut calls = 0;
        let mut progress = |done: u64, total: u64, _: &str| {
            assert!(done <= total);
            calls += 1;
            if calls == stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let options = Options::new(Format::Nf4);
        let result = quantize(&model.source(), &model.target(), &options, &mut progress);
        assert!(matches!(result, Err(Error::Interrupted)));
        assert!(model.left().is_empty());
    }
}

#[test]
fn what_exists_is_not_overwritten_unasked() {
    let model = Model::llama().saved();
    let options = Options::new(Format::Nf4);
    model.quantize(&options).unwrap();
    let before = fs::read(model.target().join("model.safetensors")).unwrap();
    let error = model.quantize(&Options::new(Format::Int8)).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert!(fs::read(model.target().join("model.safetensors")).unwrap() == before);
    let run = Run { overwrite: true, ..Run::default() };
    model.quantize(&Options { run, ..Options::new(Format::Int8) }).unwrap();
    assert_eq!(model.config()["quantization_config"]["load_in_8bit"], true);
    assert_eq!(model.left(), ["target"]);
}

#[test]
fn a_dry_run_writes_nothing_and_knows_the_sizes() {
    let model = Model::llama().saved();
    let run = Run { dry_run: true, ..Run::default() };
    let planned = model.quantize(&Options { run, ..Options::new(Format::Nf4) }).unwrap();
    assert!(model.left().is_empty() && planned.dry_run);
    let done = model.quantize(&Options::new(Format::Nf4)).unwrap();
    assert_eq!(planned.totals.bytes_after, done.totals.bytes_after);
    let size = fs::metadata(model.target().join("model.safetensors")).unwrap().len();
    assert!(size > done.totals.bytes_after);
}

#[test]
fn shards_stay_shards_and_the_index_says_what_is_where() {
    let model = Model::llama().sharded(|name| usize::from(name.contains("layers.1")) * 2, 4);
    let parameters: usize = model.tensors.iter().map(|t| t.2.iter().product::<usize>()).sum();
    let report = model.quantize(&Options { nested: true, ..Options::new(Format::Nf4) }).unwrap();
    // Shards without tensors are gone.
    let files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    assert_eq!(report.files, files);
    let index = fs::read(model.target().join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["metadata"]["total_parameters"], parameters);
    let (mut total, mut names) = (0, 0);
    for file in files {
        let bytes = fs::read(model.target().join(file)).unwrap();
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            assert_eq!(index["weight_map"][name], file);
            total += tensor.data().len();
            names += 1;
        }
    }
    assert_eq!(index["metadata"]["total_size"], total);
    assert_eq!(index["weight_map"].as_object().unwrap().len(), names);
    assert!(Checkpoint::open(&model.target(), Damage::Refuse).unwrap().verify().is_empty());
}

#[test]
fn an_index_cannot_lead_outside() {
    let model = Model::llama().saved();
    fs::rename(
        model.source().join("model.safetensors"),
        model.directory.path().join("outside.safetensors"),
    )
    .unwrap();
    let index = r#"{"weight_map": {"lm_head.weight": "../outside.safetensors"}}"#;
    fs::write(model.source().join("model.safetensors.index.json"), index).unwrap();
    assert!(matches!(model.quantize(&Options::new(Format::Nf4)), Err(Error::Checkpoint { .. })));
    assert_eq!(model.left(), ["outside.safetensors"]);
}

#[test]
fn conv1d_weights_are_turned_and_turned_back() {
    let model = Model::new(r#"{"model_type": "gpt2"}"#)
        .with("h.0.attn.c_attn.weight", &[40, 120])
        .with("h.0.mlp.c_fc.weight", &[40, 161])
        .with("wte.weight", &[10, 40])
        .saved();
    for options in formats() {
        let run = Run { overwrite: true, ..Run::default() };
        let options = Options { run, ..options };
        model.quantize(&options).unwrap();
        for (name, [rows, columns]) in
            [("h.0.attn.c_attn.weight", [40, 120]), ("h.0.mlp.c_fc.weight", [40, 161])]
        {
            let checkpoint = Checkpoint::open(&model.target(), Damage::Refuse).unwrap();
            let Entry::Quantized(stored) = checkpoint.entry(name).unwrap() else { panic!() };
            assert_eq!(stored.shape, [columns, rows]);
            let turned = transposed(&model.values(name), rows, columns);
            let want = in_memory(&options, &[columns, rows], &turned);
            assert_eq!(decoded(&model.target(), name), want);

            let dense = model.directory.path().join("dense");
            dequantize(&model.target(), &dense, Some(Dtype::BF16), run, &mut on).unwrap();
            let bytes = fs::read(dense.join("model.safetensors")).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let tensor = file.tensor(name).unwrap();
            assert_eq!(tensor.shape(), [rows, columns]);
            let want: Vec<bf16> = want.iter().map(|x| bf16::from_f32(*x)).collect();
            let found: Vec<bf16> = elements(tensor.data());
            assert_eq!(found, transposed(&want, columns, rows));
        }
    }
}

#[test]
fn experts_are_quantized_only_when_asked() {
    let model = Model::new(r#"{"model_type": "mixtral"}"#)
        .with("m.experts.gate_up_proj", &[3, 32, 48])
        .with("m.other.experts.0.w1.weight", &[32, 48])
        .with("m.gate.weight", &[3, 48])
        .with("q_proj.weight", &[48, 48])
        .saved();
    for (experts, changed) in [(false, 1), (true, 3)] {
        let run = Run { overwrite: true, ..Run::default() };
        for options in formats() {
            let options = Options { experts, run, ..options };
            let report = model.quantize(&options).unwrap();
            assert_eq!(report.totals.changed, changed);
            if experts {
                let name = "m.experts.gate_up_proj";
                let want = in_memory(&options, &[3, 32, 48], &model.values(name));
                assert_eq!(decoded(&model.target(), name), want);
            }
        }
    }
}

#[test]
fn rules_decide_and_the_config_tells_who_can_read_the_result() {
    let strings = |names: &[&str]| Some(names.iter().map(|&name| name.to_owned()).collect());
    let pair = |pattern: &str, value: &str| (pattern.to_owned(), value.to_owned());
    let run = Run { overwrite: true, ..Run::default() };
    let base = Options { run, ..Options::new(Format::Nf4) };
    let model = Model::llama().saved();
    let formats = |options: &Options| {
        let report = model.quantize(options).unwrap();
        let of = |name: &str| {
            let row = report.tensors.iter().find(|row| row.name.contains(name)).unwrap();
            row.format.clone()
        };
        let formats = ["q_proj", "0.mlp.up_proj.weight", "1.mlp.up_proj", "lm_head"].map(of);
        (formats, model.config()["quantization_config"].clone(), report)
    };
    let skip_modules = |config: &serde_json::Value| config["llm_int8_skip_modules"].clone();

    let (found, config, _) = formats(&base);
    assert_eq!(found, ["nf4", "nf4", "nf4", "bf16"]);
    assert!(skip_modules(&config).is_null());

    let (found, config, _) = formats(&Options { skip: strings(&["q_proj"]), ..base.clone() });
    assert_eq!(found, ["bf16", "nf4", "nf4", "nf4"], "a list replaces the default");
    assert_eq!(skip_modules(&config), serde_json::json!(["q_proj"]));

    let skip = strings(&["*layers.1*", "lm_head"]);
    let (found, config, _) = formats(&Options { skip, ..base.clone() });
    assert_eq!(found, ["nf4", "nf4", "bf16", "bf16"]);
    assert_eq!(skip_modules(&config), serde_json::json!(["lm_head", "model.layers.1.mlp.up_proj"]));

    let overrides = vec![pair("q_proj", "fp16"), pair("nothing", "int8")];
    let (found, config, report) = formats(&Options { overrides, ..base.clone() });
    assert_eq!(found, ["fp16", "nf4", "nf4", "bf16"]);
    assert_eq!(report.warnings, ["pattern 'nothing' matches nothing"]);
    assert_eq!(
        skip_modules(&config),
        serde_json::json!(["model.layers.0.self_attn.q_proj", "lm_head"])
    );

    let overrides = vec![pair("re:layers\\.0\\.", "int8"), pair("lm_head", "int4")];
    let (found, config, report) = formats(&Options { overrides, ..base.clone() });
    assert_eq!(found, ["int8", "int8", "nf4", "int4"]);
    assert_eq!((config["quant_method"].as_str(), report.quant_method), (Some("nybble"), "nybble"));
    assert_eq!(config["overrides"]["lm_head"], "int4");
}

#[test]
fn what_keeps_its_precision_is_float32_beside_float16() {
    let model = Model::new(r#"{"model_type": "t5", "dtype": "bfloat16"}"#)
        .with("encoder.block.0.layer.1.DenseReluDense.wo.weight", &[32, 32])
        .with("encoder.block.0.layer.1.DenseReluDense.wi.weight", &[32, 32])
        .with("shared.weight", &[8, 32])
        .saved();
    let options = Options { dtype: Some(Dtype::F16), ..Options::new(Format::Int8) };
    let report = model.quantize(&options).unwrap();
    let formats: Vec<&str> = report.tensors.iter().map(|row| row.format.as_str()).collect();
    assert_eq!(formats, ["int8", "fp32", "fp16"]);
    assert_eq!(model.config()["dtype"], "float16");
}

#[test]
fn a_cast_that_overflows_is_reported() {
    let large: Vec<u8> = [1f32, 1e30].iter().flat_map(|x| x.to_le_bytes()).collect();
    let model = Model::llama().with_data("a.bias", FileDtype::F32, &[2], &large).saved();
    let options = Options { dtype: Some(Dtype::F16), ..Options::new(Format::Nf4) };
    let report = model.quantize(&options).unwrap();
    assert_eq!(report.warnings, ["a.bias: 1 values became infinite as fp16"]);
}

#[test]
fn nothing_is_quantized_twice_or_dequantized_for_nothing() {
    let model = Model::llama().saved();
    model.quantize(&Options::new(Format::Nf4)).unwrap();
    let again = model.directory.path().join("again");
    for remove_config in [false, true] {
        if remove_config {
            fs::write(model.target().join("config.json"), "{}").unwrap();
        }
        let options = Options::new(Format::Int8);
        let error = quantize(&model.target(), &again, &options, &mut on).unwrap_err().to_string();
        assert!(error.contains("dequantize"), "{error}");
    }
    assert!(dequantize(&model.source(), &again, None, Run::default(), &mut on).is_err());
    assert!(!again.exists());
}

#[test]
fn a_scale_that_is_no_number_is_not_passed_on() {
    for nested in [false, true] {
        let model = Model::llama().saved();
        model.quantize(&Options { nested, ..Options::new(Format::Nf4) }).unwrap();
        let path = model.target().join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let key = if nested { "nested_absmax" } else { "absmax" };
        let name = format!("model.layers.1.mlp.up_proj.weight.{key}");
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let data = file.tensor(&name).unwrap().data();
        let start = data.as_ptr() as usize - bytes.as_ptr() as usize;
        bytes[start..start + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        fs::write(&path, bytes).unwrap();
        let dense = model.directory.path().join("dense");
        let error = dequantize(&model.target(), &dense, None, Run::default(), &mut on);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("up_proj.weight") && error.contains("NaN"), "{error}");
        assert!(!dense.exists());
    }
}

#[test]
fn one_file_becomes_one_file() {
    let model = Model::llama().saved();
    let file = model.source().join("model.safetensors");
    let target = model.directory.path().join("out.safetensors");
    quantize(&file, &target, &Options::new(Format::Nf4), &mut on).unwrap();
    assert_eq!(model.left(), ["out.safetensors"]);
    assert_eq!(decoded(&target, "model.layers.0.mlp.up_proj.weight").len(), 65 * 48);
    let sharded = Model::llama().sharded(|name| usize::from(name.contains("mlp")), 2);
    let target = sharded.directory.path().join("out.safetensors");
    let error = quantize(&sharded.source(), &target, &Options::new(Format::Nf4), &mut on);
    assert!(matches!(error, Err(Error::Argument { .. })));
    assert!(sharded.left().is_empty());
}

#[test]
fn empty_and_odd_tensors_go_along() {
    let model = Model::new("{}")
        .with("empty.weight", &[0, 7])
        .with("scalar", &[])
        .with("one.weight", &[1, 1])
        .with_data("double.weight", FileDtype::F64, &[1, 2], &[0; 16])
        .with_data("fp8.weight", FileDtype::F8_E4M3, &[2, 2], &[0; 4])
        .with("conv.weight", &[2, 3, 4])
        .saved();
    let report = model.quantize(&Options::new(Format::Nf4)).unwrap();
    assert_eq!(report.totals.changed, 1);
    assert_eq!(
        decoded(&model.target(), "one.weight"),
        in_memory(&Options::new(Format::Nf4), &[1, 1], &model.values("one.weight"))
    );
    let only_kept = Model::new("{}").with("x", &[2]).saved();
    let report = only_kept.quantize(&Options::new(Format::Nf4)).unwrap();
    assert_eq!(report.warnings, ["no tensor is quantized"]);
    assert!(only_kept.config().get("quantization_config").is_none());
}
