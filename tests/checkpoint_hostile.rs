//! Reading checkpoints that nobody should have written: each is answered, none believed.

mod checkpoint_files;

use std::fs;
use std::path::Path;

use checkpoint_files::*;
use half::bf16;
use nybble::checkpoint::bitsandbytes::{Companion, quant_map};
use nybble::checkpoint::open::OwnedScales;
use nybble::checkpoint::quant_state::{Nested, QuantState};
use nybble::checkpoint::safetensors::TensorFile;
use nybble::checkpoint::{Checkpoint, Damage};
use nybble::dtype::Dtype;
use nybble::format::Format;
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

#[test]
fn a_damaged_save_is_named_and_repaired_on_demand() {
    let mut tensors = quantized(Format::Nf4, &[3, 128], false);
    let key = Companion::Absmax.key(W, Format::Nf4);
    let OwnedScales::Plain(scales) =
        Case::new(&tensors).open().unwrap().read_quantized(W).unwrap().scales
    else {
        panic!("nf4 without nesting has plain scales")
    };
    let rounded: Vec<bf16> = scales.iter().map(|scale| bf16::from_f32(*scale)).collect();
    let lying = [0, 2, 4, 1, 3, 5].map(|i: usize| rounded[i]);
    let data: Vec<u8> = lying.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    tensors.insert(key, tensor("BF16", &[2, 3], data));
    let case = Case::new(&tensors);
    let wrong = case.wrong();
    assert!(wrong.contains("transposed") && wrong.contains("repair=True"), "{wrong}");
    assert!(wrong.contains(W) && case.open().unwrap().read_quantized(W).is_err());

    let checkpoint = Checkpoint::open(case.path(), Damage::Repair).unwrap();
    assert_eq!(checkpoint.verify(), []);
    let repaired = rounded.iter().map(|scale| scale.to_f32()).collect();
    assert_eq!(checkpoint.read_quantized(W).unwrap().scales, OwnedScales::Plain(repaired));
}

#[test]
fn each_missing_or_changed_companion_is_named() {
    for (format, nest) in [(Format::Nf4, true), (Format::Int4, false), (Format::Int8, false)] {
        let tensors = quantized(format, &[4, 128], nest);
        for name in tensors.keys().filter(|name| !name.ends_with("weight_format")) {
            let mut without = tensors.clone();
            without.remove(name);
            let wrong = Case::new(&without).wrong();
            assert!(!wrong.is_empty(), "{format} without {name}");

            let mut shorter = tensors.clone();
            let last = shorter.get_mut(name).unwrap();
            let size = if last.dtype == "F32" { 4 } else { 1 };
            last.data.truncate(last.data.len() - size);
            last.shape = vec![last.data.len() / size];
            let wrong = Case::new(&shorter).wrong();
            assert!(wrong.contains(W), "{format} with short {name}: {wrong}");
        }
    }
}

#[test]
fn what_disagrees_is_refused() {
    let base = quantized(Format::Nf4, &[4, 64], true);
    let state = Companion::QuantState.key(W, Format::Nf4);
    let text = String::from_utf8(base[&state].data.clone()).unwrap();
    let with = |key: &str, tensor: Tensor| {
        let mut tensors = base.clone();
        tensors.insert(key.to_owned(), tensor);
        Case::new(&tensors).wrong()
    };
    for (from, to, named) in [
        ("\"nf4\"", "\"fp4\"", "quant_type"),
        ("[4, 64]", "[4, 65]", "shape"),
        ("[4, 64]", "[4611686018427387904, 8]", "shape"),
        ("\"blocksize\": 64", "\"blocksize\": 128", "absmax"),
        ("\"float32\"", "\"bfloat16\"", "repair=True"),
    ] {
        let changed = text.replacen(from, to, 1).into_bytes();
        let wrong = with(&state, tensor("U8", &[changed.len()], changed));
        assert!(wrong.contains(named) && wrong.contains(W), "{named}: {wrong}");
    }
    let mut map = quant_map(Format::Nf4).to_vec();
    map[3] += 0.01;
    let wrong = with("fc.weight.quant_map", tensor("F32", &[16], floats(&map)));
    assert!(wrong.contains("code 3"), "{wrong}");
    let wrong = with("fc.weight.nested_absmax", tensor("F32", &[1], floats(&[f32::NAN])));
    assert!(wrong.contains("nested_absmax is not finite"), "{wrong}");
    let wrong = with("gone.weight.absmax", tensor("F32", &[1], floats(&[1.0])));
    assert!(wrong.contains("gone.weight.absmax"), "{wrong}");
    let wrong = with("fc.SCB", tensor("F32", &[4], floats(&[1.0; 4])));
    assert!(wrong.contains("both 4 and 8 bits"), "{wrong}");
}

#[test]
fn the_sign_of_zero_in_fp4s_codebook_is_free() {
    let mut tensors = quantized(Format::Fp4, &[4, 64], false);
    let map = tensors.get_mut("fc.weight.quant_map").unwrap();
    map.data[8 * 4 + 3] = 0x80;
    assert_eq!(Case::new(&tensors).wrong(), "");
}

#[test]
fn a_shard_outside_the_directory_is_refused() {
    let outside = Case::new(&quantized(Format::Int8, &[2, 32], false));
    let inside = TempDir::new_in(outside.path()).unwrap();
    for shard in ["../model.safetensors", "..", "/etc/passwd", "a\\b.safetensors", "model.bin"] {
        let index = json!({"weight_map": {W: shard}}).to_string();
        fs::write(inside.path().join("model.safetensors.index.json"), index).unwrap();
        let error = Checkpoint::open(inside.path(), Damage::Refuse).unwrap_err().to_string();
        assert!(error.contains("not the plain name") && error.contains(W), "{error}");
    }
}

#[test]
fn an_index_and_its_shards_must_agree() {
    let tensors = quantized(Format::Int8, &[2, 32], false);
    let case = Case { directory: TempDir::new().unwrap() };
    case.write("a.safetensors", &file(&tensors));
    let index = |map: &str| {
        case.write("model.safetensors.index.json", format!("{{\"weight_map\": {map}}}").as_bytes());
        case.wrong()
    };
    let all = r#""fc.weight":"a.safetensors","fc.SCB":"a.safetensors""#;
    assert!(index(&format!("{{{all}}}")).contains("weight_format"), "a stray tensor");
    assert!(index(&format!("{{{all},\"ghost\":\"a.safetensors\"}}")).contains("ghost"));
    assert!(index(&format!("{{{all},\"b\":\"b.safetensors\"}}")).contains("b.safetensors"));
    assert!(index(&format!("{{{all},{all}}}")).contains("twice"));
    assert!(index("[]").contains("weight_map"));
}

#[test]
fn other_methods_and_other_files_are_told_apart() {
    let tensors = quantized(Format::Int8, &[2, 32], false);
    let config = |quantization: Value| {
        let case = Case::new(&tensors);
        case.write(
            "config.json",
            json!({"quantization_config": quantization}).to_string().as_bytes(),
        );
        case.wrong()
    };
    assert_eq!(config(json!({"load_in_8bit": true})), "");
    assert_eq!(config(json!({"quant_method": "bitsandbytes"})), "");
    assert!(config(json!({"quant_method": "gptq", "bits": 4})).contains("gptq"));
    assert!(config(json!({"load_in_8bit": true, "load_in_4bit": true})).contains("both"));

    assert!(Case::of_bytes(b"GGUF\x03\0\0\0rest").wrong().contains("GGUF"));
    assert!(Case::of_bytes(b"PK\x03\x04....rest").wrong().contains("convert it to safetensors"));
    let pickled = Case { directory: TempDir::new().unwrap() };
    pickled.write("pytorch_model.bin", b"PK");
    assert!(pickled.wrong().contains("convert it to safetensors"));
}

#[test]
fn a_model_in_the_hub_cache_stands_for_its_snapshot() {
    let tensors = file(&quantized(Format::Int8, &[2, 32], false));
    let cache = TempDir::new().unwrap();
    let add = |revision: &str| {
        let snapshot = cache.path().join("snapshots").join(revision);
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(snapshot.join("model.safetensors"), &tensors).unwrap();
        snapshot
    };
    let open = || Checkpoint::open(cache.path(), Damage::Refuse);
    let only = add("abc");
    assert_eq!(open().unwrap().source().path(), only);
    let main = add("def");
    assert!(open().is_err(), "two snapshots and nothing to choose by");
    fs::create_dir(cache.path().join("refs")).unwrap();
    fs::write(cache.path().join("refs/main"), "def\n").unwrap();
    assert_eq!(open().unwrap().source().path(), main);
    fs::write(cache.path().join("refs/main"), "../snapshots/def").unwrap();
    assert!(open().is_err(), "a revision is no path");
}

#[cfg(unix)]
#[test]
fn a_fifo_or_a_loop_does_not_hang() {
    let case = Case { directory: TempDir::new().unwrap() };
    let path = case.path().join("model.safetensors");
    let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success() && case.wrong().contains("not a regular file"));
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&path, &path).unwrap();
    assert!(!case.wrong().is_empty());
}

#[test]
fn a_file_cut_after_opening_is_an_error_not_a_signal() {
    let case = Case::new(&quantized(Format::Nf4, &[64, 64], false));
    let checkpoint = case.open().unwrap();
    let path = case.path().join("model.safetensors");
    fs::OpenOptions::new().write(true).open(path).unwrap().set_len(1000).unwrap();
    assert!(checkpoint.read_quantized(W).unwrap_err().to_string().contains("truncated"));
    assert!(!checkpoint.verify().is_empty());
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = file(&quantized(Format::Nf4, &[2, 64], true));
    let case = Case::of_bytes(&bytes);
    for n in 0..bytes.len() {
        case.write("model.safetensors", &bytes[..n]);
        assert!(read_everything(case.path()).is_err(), "cut to {n} bytes");
    }
}

/// A flip may still be a valid header (another tensor name, for one): then what keeps its name
/// and shape keeps its bytes, or the change is to be seen in the names.
#[test]
fn every_bit_flip_in_a_header_is_an_error_or_changes_no_value() {
    let tensors = quantized(Format::Int8, &[2, 8], false);
    let bytes = file(&tensors);
    let data: usize = tensors.values().map(|tensor| tensor.data.len()).sum();
    let case = Case::of_bytes(&bytes);
    let path = case.path().join("model.safetensors");
    let contents = |path: &Path| {
        let file = TensorFile::open(path).ok()?;
        let tensors = file.header().tensors().iter().map(|info| {
            let mut out = vec![0; usize::try_from(info.bytes).unwrap()];
            file.read(info, 0, &mut out).unwrap();
            out
        });
        Some(tensors.collect::<Vec<_>>())
    };
    let expected = contents(&path).unwrap();
    let mut refused = 0;
    for bit in 0..(bytes.len() - data) * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &flipped).unwrap();
        let _ = read_everything(case.path());
        match contents(&path) {
            None => refused += 1,
            Some(found) => assert_eq!(found, expected, "bit {bit}"),
        }
    }
    assert!(refused > 500, "only {refused}");
}

#[test]
fn every_bit_flip_in_a_quant_state_is_an_error_or_changes_no_more_than_it_says() {
    let base = quantized(Format::Nf4, &[2, 64], true);
    let key = Companion::QuantState.key(W, Format::Nf4);
    let text = base[&key].data.clone();
    let expected = QuantState::parse(&text).unwrap();
    for bit in 0..text.len() * 8 {
        let mut flipped = base.clone();
        flipped.get_mut(&key).unwrap().data[bit / 8] ^= 1 << (bit % 8);
        let case = Case::new(&flipped);
        if read_everything(case.path()).is_err() {
            continue;
        }
        // What remains valid by luck: another shape with as many elements or an offset.
        let state = QuantState::parse(&flipped[&key].data).unwrap();
        assert_eq!((state.format, state.blocksize), (expected.format, expected.blocksize));
        assert_eq!(state.dtype, expected.dtype);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Case::of_bytes(&bytes).wrong();
        let _ = Case::of_bytes(&raw(&bytes, &[])).wrong();
        let _ = QuantState::parse(&bytes);
    }

    #[test]
    fn any_header_of_the_right_form_is_answered(
        entries in proptest::collection::vec(
            ("[ab]|a.absmax|a.SCB|a.quant_state.bitsandbytes__nf4|a.quant_map|a.weight|a.weight_format",
             prop_oneof![Just("U8"), Just("F32"), Just("I8"), Just("BF16"), Just("F4")],
             proptest::collection::vec(prop_oneof![0u64..9, Just(u64::MAX), Just(1 << 62)], 0..4),
             prop_oneof![0u64..40, Just(u64::MAX), Just(1 << 63)],
             prop_oneof![0u64..40, Just(u64::MAX)]),
            0..5),
        data in 0usize..40,
    ) {
        let entries: Vec<String> = entries
            .iter()
            .map(|(name, dtype, shape, begin, end)| {
                format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{begin},{end}]}}")
            })
            .collect();
        let header = format!("{{{}}}", entries.join(","));
        let case = Case::of_bytes(&raw(header.as_bytes(), &vec![0; data]));
        let _ = read_everything(case.path());
    }

    #[test]
    fn any_quant_state_comes_back(
        blocksize in prop_oneof![Just(32usize), Just(64), Just(4096)],
        shape in proptest::collection::vec(0usize..100_000, 0..4),
        offset in proptest::option::of(any::<f32>().prop_filter("finite", |x| x.is_finite())),
    ) {
        let nested = offset.map(|offset| Nested { dtype: Dtype::F32, offset });
        let state = QuantState { format: Format::Int4, blocksize, dtype: Dtype::F16, shape, nested };
        prop_assert_eq!(QuantState::parse(state.render().as_bytes()), Ok(state));
    }
}
