"""Checkpoints that bitsandbytes made: served bit for bit, and written again as they were."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nybble as nb
from nybble.errors import CheckpointError, FormatError
from nybble.nn.quantized import QuantizedModule

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("nybble.hf")

KINDS = [
    "llama_tied/fp4",
    "llama_tied/int8",
    "llama_tied/nf4_dq",
    "llama_untied/nf4_dq",
    "llama_untied/nf4_stbf16",
    "mixtral/nf4_dq",
    "mixtral/nf4_dq_legacy_experts",
]
Load = Callable[..., Any]


def _by_config(path: Path, **kwargs: Any) -> Any:
    return hf.from_pretrained(path, **kwargs)


def _by_opting_in(path: Path, **kwargs: Any) -> Any:
    hf.enable_bitsandbytes_checkpoints()
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(path, **kwargs)
    finally:
        hf.disable_bitsandbytes_checkpoints()


@pytest.fixture(params=[_by_config, _by_opting_in])
def load(request: pytest.FixtureRequest) -> Load:
    """Both routes by which nybble comes to serve a checkpoint."""
    return request.param


def ids(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path.parent / "input_ids.npy")).long()


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def quantized(model: nn.Module) -> dict[str, QuantizedModule]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}


def stored(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in path.glob("model*.safetensors"):
        tensors.update(load_file(file))
    return tensors


def assert_same_files(found: Path, wanted: Path) -> None:
    ours, theirs = stored(found), stored(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(
            ours[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)
        )
    texts = [json.loads((path / "config.json").read_text()) for path in (found, wanted)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_decoded_weights(load: Load, golden: Path, kind: str):
    model = load(golden / kind, dtype=torch.float32)
    want = load_file(golden / kind / "ref_logits.safetensors")["dequant_fp32"]
    found = logits(model, ids(golden / kind))
    assert float((found - want).norm() / want.norm()) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_weights_decode_to_the_same_bits(load: Load, golden: Path, kind: str):
    described = json.loads((golden / kind / "dequant.json").read_text())
    model = load(golden / kind)
    hashes = {entry["float32"]["sha256"] for entry in described.values()}
    found = {
        hashlib.sha256(module.dequantize(torch.float32).numpy().tobytes()).hexdigest()
        for module in quantized(model).values()
    }
    assert found == hashes != set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_saved_as_it_was_after_any_use(
    load: Load, golden: Path, tmp_path: Path, kind: str
):
    # bitsandbytes raises NotImplementedError here (no reverse_op), and on some CPUs a forward
    # pass before saving damages the scales.
    model = load(golden / kind)
    logits(model, ids(golden / kind))
    model.save_pretrained(tmp_path / "saved")
    assert_same_files(tmp_path / "saved", golden / kind)
    if "legacy" in kind:  # transformers 5 and bitsandbytes would not load it again
        with pytest.raises(FormatError, match="quantized expert"):
            hf.save_bitsandbytes(model, tmp_path / "theirs")
        return
    hf.save_bitsandbytes(model, tmp_path / "theirs")
    assert_same_files(tmp_path / "theirs", golden / kind)


@pytest.mark.parametrize("kind", ["llama_tied/fp4", "llama_tied/nf4_dq", "mixtral/nf4_dq"])
@pytest.mark.parametrize("asks", ["nybble", "bitsandbytes"])
def test_quantizing_while_loading_writes_what_bitsandbytes_wrote(
    golden: Path, tmp_path: Path, kind: str, asks: str
):
    format, _, nested = kind.rpartition("/")[2].partition("_")
    if asks == "nybble":
        config: Any = hf.NybbleConfig(
            format,
            nested=bool(nested),
            compute_dtype="float32",
            experts=False,
            reference="bitsandbytes-cpu",
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            (golden / kind).parent / "original", quantization_config=config
        )
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=format, bnb_4bit_use_double_quant=bool(nested)
        )
        model = _by_opting_in((golden / kind).parent / "original", quantization_config=config)
    hf.save_bitsandbytes(model, tmp_path)
    assert_same_files(tmp_path, golden / kind)


def test_dtype_holds_for_weights_without_companions_too(load: Load, golden: Path):
    # With bitsandbytes, embeddings, norms and skipped layers keep the file's bfloat16.
    model = load(golden / "llama_tied" / "int8", dtype=torch.float32)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    assert type(model.model.layers[0].self_attn.k_proj) is nn.Linear


def test_a_model_trains_after_an_evaluation(load: Load, golden: Path):
    # bitsandbytes' CPU path has no gradient once an evaluation has repacked the weights.
    model = load(golden / "llama_tied" / "nf4_dq", dtype=torch.float32)
    tokens = ids(golden / "llama_tied" / "nf4_dq")
    logits(model.eval(), tokens)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model.train()(inputs_embeds=embedded, labels=tokens, use_cache=False).loss.backward()
    assert embedded.grad is not None
    assert float(embedded.grad.abs().sum()) > 0


def test_a_tied_head_stays_dense_where_the_skip_list_forgets_it(golden: Path):
    # bitsandbytes puts the shared weight into a quantized layer and fails in forward.
    source = golden / "llama_tied" / "original"
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["k_proj"])
    model = _by_opting_in(source, quantization_config=config)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert logits(model, ids(source)).isfinite().all()


def test_an_all_cpu_map_with_the_offload_flag_still_quantizes(golden: Path):
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True
    )
    source = golden / "llama_tied" / "original"
    model = _by_opting_in(source, quantization_config=config, device_map={"": "cpu"})
    assert len(quantized(model)) == 14


def test_a_loaded_model_dequantizes_after_it_was_saved(load: Load, golden: Path, tmp_path: Path):
    model = load(golden / "llama_tied" / "nf4_dq")
    before = {name: module.dequantize() for name, module in quantized(model).items()}
    model.save_pretrained(tmp_path)
    model.dequantize()
    assert not quantized(model)
    for name, weight in before.items():
        assert torch.equal(model.get_submodule(name).weight, weight)


def test_the_file_decides_what_is_quantized_not_the_skip_list(
    load: Load, golden: Path, tmp_path: Path
):
    shutil.copytree(golden / "llama_tied" / "int8", tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["q_proj"]
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    model = load(tmp_path / "copy", dtype=torch.float32)
    layer = model.model.layers[0].self_attn
    assert isinstance(layer.q_proj, nb.nn.Linear8bit)  # quantized in the file
    assert type(layer.k_proj) is nn.Linear  # dense in the file
    want = load_file(golden / "llama_tied" / "int8" / "ref_logits.safetensors")["dequant_fp32"]
    found = logits(model, ids(golden / "llama_tied" / "int8"))
    assert float((found - want).norm() / want.norm()) <= 1e-5


def test_opting_in_can_be_undone():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before = dict(AUTO_QUANTIZER_MAPPING)
    hf.enable_bitsandbytes_checkpoints()
    hf.enable_bitsandbytes_checkpoints()
    assert before != AUTO_QUANTIZER_MAPPING
    hf.disable_bitsandbytes_checkpoints()
    hf.disable_bitsandbytes_checkpoints()
    assert before == AUTO_QUANTIZER_MAPPING


@pytest.fixture
def altered(golden: Path, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of a checkpoint, and its tensors."""
    source = golden / "llama_tied" / "fp4"
    shutil.copytree(source, tmp_path / "altered")
    return tmp_path / "altered", load_file(source / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj.weight"


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_scales_that_bitsandbytes_damaged_are_repaired_with_a_warning(
    load: Load, altered: Any, caplog: pytest.LogCaptureFixture
):
    path, tensors = altered
    absmax = tensors[f"{Q}.absmax"]
    tensors[f"{Q}.absmax"] = absmax.reshape(256, 4).T.bfloat16().contiguous()
    _write(path, tensors)
    module = load(path).model.layers[0].self_attn.q_proj
    assert torch.equal(module.absmax, absmax.bfloat16().float())
    assert "1 weights are damaged and were repaired" in caplog.text
    assert str(path / "model.safetensors") in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.absmax"), "absmax"),
        (lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"][:-1].clone()}), "absmax"),
        (lambda t: t.update({Q: t[Q][:-1].clone()}), "bytes of codes"),
        (lambda t: t.update({f"{Q}.quant_map": t[f"{Q}.quant_map"] + 1}), "codebook"),
        (
            lambda t: t.update(
                {f"{Q}.quant_state.bitsandbytes__fp4": torch.zeros(8, dtype=torch.uint8)}
            ),
            "quant_state",
        ),
    ],
)
def test_a_weight_and_a_description_that_disagree_are_refused_before_loading(
    load: Load, altered: Any, change: Callable[[dict[str, torch.Tensor]], Any], message: str
):
    path, tensors = altered
    change(tensors)
    _write(path, tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert Q in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_shard_is_named(load: Load, golden: Path, tmp_path: Path):
    shutil.copytree(golden / "llama_untied" / "nf4_dq", tmp_path / "copy")
    (tmp_path / "copy" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises((OSError, CheckpointError), match="model-00002-of-00003"):
        load(tmp_path / "copy")


def _with_entry(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {**config["quantization_config"], **changes}
    (path / "config.json").write_text(json.dumps(config))


def test_an_unknown_format_is_refused(altered: Any):
    path, _ = altered
    _with_entry(path, bnb_4bit_quant_type="nf3")
    with pytest.raises(CheckpointError, match="nf3"):
        hf.from_pretrained(path)


def test_a_checkpoint_of_another_method_is_refused_with_its_name(altered: Any):
    path, _ = altered
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantized by 'gptq'"):
        hf.from_pretrained(path)


def test_a_checkpoint_is_not_quantized_twice(golden: Path):
    with pytest.raises(CheckpointError, match="quantized already, by 'bitsandbytes'"):
        hf.from_pretrained(
            golden / "llama_tied" / "fp4", quantization_config=hf.NybbleConfig("nf4")
        )


def test_files_of_old_versions_with_fewer_keys_load(load: Load, altered: Any):
    path, _ = altered
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_threshold": 6.0,
        "quant_method": "bitsandbytes",
    }
    (path / "config.json").write_text(json.dumps(config))
    assert len(quantized(load(path))) == 14


def test_a_snapshot_of_the_hub_is_read_through_its_links(load: Load, altered: Any, tmp_path: Path):
    path, _ = altered
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in path.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", path.name, file.name))
    assert len(quantized(load(snapshot))) == 14


def test_a_config_of_another_size_is_refused(altered: Any):
    path, _ = altered
    config = json.loads((path / "config.json").read_text())
    config["intermediate_size"] = 256
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, RuntimeError)):
        hf.from_pretrained(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int4"}, "int4, which bitsandbytes does not have"),
        ({"overrides": {"*.k_proj": "int8"}}, "differ in kind"),
        ({"skip": ["*_proj"]}, "no quantized layers"),
    ],
)
def test_what_bitsandbytes_lacks_is_not_written(
    golden: Path, tmp_path: Path, options: dict[str, Any], message: str
):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        golden / "llama_tied" / "original", quantization_config=hf.NybbleConfig(**options)
    )
    with pytest.raises(FormatError, match=message):
        hf.save_bitsandbytes(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
