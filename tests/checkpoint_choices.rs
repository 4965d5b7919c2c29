//! What of a checkpoint is quantized, to which format, and what the config says about it.

// Helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod models;

use std::fs;

use half::bf16;
use models::{Model, decoded, elements, formats, in_memory, on, transposed};
use nybble::checkpoint::convert::{Options, Run, dequantize, quantize};
use nybble::checkpoint::{Checkpoint, Damage, Entry};
use nybble::dtype::Dtype;
use nybble::format::Format;
use safetensors::{Dtype as FileDtype, SafeTensors};

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
