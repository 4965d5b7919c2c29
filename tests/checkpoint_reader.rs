//! Reading checkpoints that bitsandbytes or nybble wrote.

mod checkpoint_files;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use checkpoint_files::*;
use half::{bf16, f16};
use nybble::checkpoint::open::OwnedScales;
use nybble::checkpoint::quant_state::QuantState;
use nybble::checkpoint::{Checkpoint, Damage};
use nybble::dtype::Element;
use nybble::format::{Decode, Format};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bnb_checkpoints")
}

fn sha256<T: Element>(values: &[T]) -> String {
    format!("{:x}", Sha256::digest(bytemuck::cast_slice(values)))
}

#[test]
fn every_golden_weight_decodes_to_the_bits_of_bitsandbytes() {
    let mut compared = 0;
    for directory in [
        "llama_tied/nf4_dq",
        "llama_tied/fp4",
        "llama_tied/int8",
        "llama_untied/nf4_dq",
        "mixtral/nf4_dq_legacy_experts",
    ] {
        let path = golden().join(directory);
        let checkpoint = Checkpoint::open(&path, Damage::Refuse).unwrap();
        assert_eq!(checkpoint.verify(), []);
        let text = fs::read(path.join("dequant.json")).unwrap();
        let wanted: BTreeMap<String, Value> = serde_json::from_slice(&text).unwrap();
        for (module, wanted) in &wanted {
            let q = checkpoint.read_quantized(&format!("{module}.weight")).unwrap();
            assert_eq!(json!(q.stored.shape), wanted["shape"]);
            for (dtype, found) in [
                ("float32", sha256(&decode::<f32>(&q))),
                ("bfloat16", sha256(&decode::<bf16>(&q))),
                ("float16", sha256(&decode::<f16>(&q))),
            ] {
                assert_eq!(wanted[dtype]["sha256"], found, "{directory} {module} {dtype}");
                compared += 1;
            }
        }
        let summary = checkpoint.summary().unwrap();
        assert_eq!(summary.quantized.tensors, wanted.len() as u64);
    }
    assert!(compared > 200, "only {compared}");
}

#[test]
fn every_golden_quant_state_is_rendered_byte_for_byte() {
    let mut compared = 0;
    for directory in ["llama_tied/nf4_dq", "llama_tied/fp4", "llama_untied/nf4_dq"] {
        let checkpoint = Checkpoint::open(&golden().join(directory), Damage::Refuse).unwrap();
        let source = checkpoint.source();
        for (_, info) in source.tensors().filter(|(_, info)| info.name.contains(".quant_state.")) {
            let text = source.read_all(&info.name, 4096).unwrap();
            let state = QuantState::parse(&text).unwrap();
            assert_eq!(state.render(), String::from_utf8(text).unwrap());
            compared += 1;
        }
    }
    assert!(compared > 30, "only {compared}");
}

// --- what is stored comes back --------------------------------------------------------------

#[test]
fn every_format_is_read_back_from_its_keys() {
    for &format in Format::ALL.iter().filter(|f| !matches!(f.spec().decode, Decode::Dense(_))) {
        for shape in [&[4usize, 96][..], &[3, 43], &[2, 3, 32]] {
            for nest in [false, true] {
                if nest && !format.spec().nestable {
                    continue;
                }
                let tensors = quantized(format, shape, nest);
                let case = Case::new(&tensors);
                assert_eq!(case.wrong(), "");
                let checkpoint = case.open().unwrap();
                assert_eq!(checkpoint.names().collect::<Vec<_>>(), [W]);
                let q = checkpoint.read_quantized(W).unwrap();
                assert_eq!((q.stored.layout.format, q.stored.shape.as_slice()), (format, shape));
                assert_eq!(q.packed, tensors[W].data);
                assert_eq!(matches!(q.scales, OwnedScales::Nested { .. }), nest);
                let bytes = tensors.values().map(|tensor| tensor.data.len() as u64).sum::<u64>();
                assert_eq!(checkpoint.summary().unwrap().total.bytes, bytes);
            }
        }
    }
}

#[test]
fn codes_may_pose_as_another_dtype() {
    let mut tensors = quantized(Format::Nf4, &[4, 64], true);
    let expected = read_everything(Case::new(&tensors).path()).unwrap();
    let codes = tensors.get_mut(W).unwrap();
    (codes.dtype, codes.shape) = ("BF16", vec![64, 1]);
    assert_eq!(read_everything(Case::new(&tensors).path()).unwrap(), expected);
}

#[test]
fn a_parameter_need_not_be_called_weight() {
    for format in [Format::Nf4, Format::Int8] {
        let renamed: Tensors = quantized(format, &[2, 4, 64], false)
            .into_iter()
            .map(|(name, tensor)| {
                (name.replace("fc.weight", "experts.up").replace("fc.", "experts.up."), tensor)
            })
            .collect();
        let case = Case::new(&renamed);
        assert_eq!(case.wrong(), "");
        assert_eq!(
            case.open().unwrap().read_quantized("experts.up").unwrap().stored.shape,
            [2, 4, 64]
        );
    }
}

#[test]
fn companions_may_lie_in_another_shard() {
    let tensors = quantized(Format::Fp4, &[4, 64], false);
    let expected = read_everything(Case::new(&tensors).path()).unwrap();
    let (first, second): (Tensors, Tensors) = tensors.into_iter().partition(|(name, _)| name == W);
    let mut map = serde_json::Map::new();
    map.extend(first.keys().map(|name| (name.clone(), json!("a.safetensors"))));
    map.extend(second.keys().map(|name| (name.clone(), json!("b.safetensors"))));
    let case = Case { directory: TempDir::new().unwrap() };
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
    case.write("a.safetensors", &file(&first)).write("b.safetensors", &file(&second));
    case.write("model.safetensors.index.json", index.as_bytes());
    assert_eq!(read_everything(case.path()).unwrap(), expected);
}
