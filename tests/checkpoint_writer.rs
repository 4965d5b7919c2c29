//! Checkpoints that nybble writes: equal to bitsandbytes', whole or not there, and read back.

// Helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod models;

use std::collections::HashMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use half::bf16;
use models::{Model, decoded, elements, formats, in_memory, on};
use nybble::checkpoint::convert::{Options, Run, dequantize, quantize};
use nybble::checkpoint::{Checkpoint, Damage};
use nybble::dtype::Dtype;
use nybble::error::Error;
use nybble::format::Format;
use nybble::quant::Reference;
use safetensors::tensor::serialize;
use safetensors::{Dtype as FileDtype, SafeTensors};

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
