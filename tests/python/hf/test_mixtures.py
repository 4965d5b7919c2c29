"""Mixtures of experts: quantized while loading, saved under each expert's name, loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nybble as nb
from nybble.nn.experts import QuantizedExperts
from nybble.nn.quantized import QuantizedModule

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("nybble.hf")

IDS = torch.arange(3, 35)[None]
Auto = transformers.AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "num_experts_per_tok": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 32},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    # transposed, interleaved, with biases, and one tensor for all experts in the file
    "gpt_oss": {"num_local_experts": 4, "head_dim": 32},
}


def make(kind: str, path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **COMMON, **MODELS[kind])
    model = Auto.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():  # some models begin with empty or zero experts
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(path / kind)
    return path / kind


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def experts(model: Any) -> dict[str, QuantizedExperts]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedExperts)}


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("kind", MODELS)
def test_experts_are_quantized_saved_and_loaded(tmp_path: Path, kind: str, format: str):
    path = make(kind, tmp_path)
    config = hf.NybbleConfig(format, nested=format == "nf4")
    model = Auto.from_pretrained(path, quantization_config=config, dtype=torch.float32)
    assert len(experts(model)) == 2
    model.save_pretrained(tmp_path / "saved")
    again, info = Auto.from_pretrained(
        tmp_path / "saved", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (
        tmp_path / "saved" / "model.safetensors"
    ).read_bytes()
    before = logits(again)
    again.dequantize()
    assert not experts(again)
    torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "dense")
    dense = Auto.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(dense), logits(again))


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_those_that_quantize_model_makes(tmp_path: Path, kind: str):
    path = make(kind, tmp_path)
    loaded = Auto.from_pretrained(path, quantization_config=hf.NybbleConfig("nf4"))
    dense = Auto.from_pretrained(path)
    nb.quantize_model(dense, "nf4")
    wanted = {n: m for n, m in dense.named_modules() if isinstance(m, QuantizedModule)}
    found = {n: m for n, m in loaded.named_modules() if isinstance(m, QuantizedModule)}
    assert wanted.keys() == found.keys()
    for name, module in wanted.items():
        assert torch.equal(module.weight, found[name].weight), name
        assert torch.equal(module.absmax, found[name].absmax), name
    assert torch.equal(logits(loaded), logits(dense))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_experts_of_one_layer_can_stay_dense(tmp_path: Path, kind: str):
    path = make(kind, tmp_path)
    config = hf.NybbleConfig("nf4", skip=["lm_head", "model.layers.0.mlp.experts"])
    model = Auto.from_pretrained(path, quantization_config=config)
    assert list(experts(model)) == ["model.layers.1.mlp.experts"]
    model.save_pretrained(tmp_path / "saved")
    again, info = Auto.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert list(experts(again)) == ["model.layers.1.mlp.experts"]
    assert torch.equal(logits(again), logits(model))


def test_experts_stay_dense_where_asked(tmp_path: Path):
    path = make("mixtral", tmp_path)
    config = hf.NybbleConfig("nf4", experts=False)
    model = Auto.from_pretrained(path, quantization_config=config)
    assert not experts(model)
    model.save_pretrained(tmp_path / "saved")
    again = Auto.from_pretrained(tmp_path / "saved")
    assert not experts(again)
    assert torch.equal(logits(again), logits(model))


def test_the_base_model_of_a_saved_mixture_loads(tmp_path: Path):
    path = make("mixtral", tmp_path)
    whole = Auto.from_pretrained(path, quantization_config=hf.NybbleConfig("nf4"))
    whole.save_pretrained(tmp_path / "saved")
    base = transformers.AutoModel.from_pretrained(tmp_path / "saved")
    assert len(experts(base)) == 2
    with torch.no_grad():
        hidden = base(input_ids=IDS, use_cache=False)[0]
        assert torch.equal(whole.lm_head(hidden), logits(whole))


def test_a_converted_checkpoint_with_quantized_experts_loads(golden: Path, tmp_path: Path):
    nb.quantize_checkpoint(
        golden / "mixtral" / "original", tmp_path / "out", "nf4", nested=True, experts=True
    )
    model = hf.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert len(experts(model)) == 2
    loaded = Auto.from_pretrained(
        golden / "mixtral" / "original",
        quantization_config=hf.NybbleConfig("nf4", nested=True),
        dtype=torch.float32,
    )
    # The error is that of bitsandbytes' own nf4 of the same weights, experts included.
    exact = load_file(golden / "mixtral" / "original" / "ref_logits.safetensors")["fp32"]
    theirs = load_file(golden / "mixtral" / "nf4_dq_legacy_experts" / "ref_logits.safetensors")
    wanted = float((theirs["dequant_fp32"] - exact).norm() / exact.norm())
    for found in (logits_of(model, golden), logits_of(loaded, golden)):
        assert float((found - exact).norm() / exact.norm()) == pytest.approx(wanted, rel=0.05)


def logits_of(model: Any, golden: Path) -> torch.Tensor:
    import numpy as np

    tokens = torch.from_numpy(np.load(golden / "mixtral" / "input_ids.npy")).long()
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def test_memory_is_what_the_bits_say(golden: Path):
    path = golden / "mixtral" / "original"
    model = Auto.from_pretrained(path, quantization_config=hf.NybbleConfig("nf4"))
    layers = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    elements = sum(m.shape.numel() for m in layers)
    assert sum(m.qtensor.nbytes for m in layers) == elements * 4.5 / 8
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    total = sum(p.numel() for p in Auto.from_pretrained(path).parameters())
    kept = total - elements
    assert held <= elements * 4.5 / 8 + 2 * kept + 1024  # and a buffer of frequencies


@pytest.mark.parametrize("nested", [False, True])
def test_experts_that_a_file_holds_in_one_tensor_load(tmp_path: Path, nested: bool):
    path = make("qwen3_moe", tmp_path)
    dense = Auto.from_pretrained(path)
    dense.save_pretrained(tmp_path / "fused", save_original_format=False)
    nb.quantize_checkpoint(tmp_path / "fused", tmp_path / "out", "nf4", nested=nested, experts=True)
    stored = nb.open_checkpoint(tmp_path / "out")
    assert stored.entry("model.layers.0.mlp.experts.gate_up_proj").format == "nf4"
    model, info = hf.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert len(experts(model)) == 2
    decoded = stored["model.layers.1.mlp.experts.down_proj"].dequantize(torch.float32)
    found = experts(model)["model.layers.1.mlp.experts"].dequantize(torch.float32)
    assert torch.equal(found["down_proj"], decoded)
    model.save_pretrained(tmp_path / "again")
    again = hf.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_fused_files_are_quantized_while_loading(tmp_path: Path):
    path = make("mixtral", tmp_path)
    Auto.from_pretrained(path).save_pretrained(tmp_path / "fused", save_original_format=False)
    config = hf.NybbleConfig("nf4")
    one = Auto.from_pretrained(path, quantization_config=config)
    other = Auto.from_pretrained(tmp_path / "fused", quantization_config=config)
    assert torch.equal(logits(one), logits(other))
