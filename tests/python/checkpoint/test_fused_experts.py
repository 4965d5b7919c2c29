"""Checkpoints that hold all experts of a layer in one tensor: quantized, read, loaded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import nybble as nb
from nybble.nn import Experts4bit, Experts8bit

transformers = pytest.importorskip("transformers", minversion="5.0")

HIDDEN, EXPERTS = 64, 3
CONFIG = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "num_experts_per_tok": 2,
}


def qwen(inner=32, device="cpu"):
    config = transformers.Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=inner, **CONFIG)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def gpt_oss(inner=96):
    config = transformers.GptOssConfig(
        num_local_experts=EXPERTS, **{**CONFIG, "intermediate_size": inner}
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def save(model, path):
    """As some publishers do: under the names of the model, experts in one tensor."""
    path.mkdir()
    save_file(dict(model.state_dict()), path / "model.safetensors")
    model.config.to_json_file(path / "config.json")
    return path


GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("format", "nested"), [("nf4", False), ("nf4", True), ("int8", False), ("mxfp4", False)]
)
@pytest.mark.parametrize("start", ["dense", "meta", "quantized"])
def test_experts_in_one_tensor_load_as_they_were_quantized(tmp_path, format, nested, start):
    source = save(qwen(), tmp_path / "source")
    nb.quantize_checkpoint(source, tmp_path / "out", format, nested=nested, experts=True)
    checkpoint = nb.open_checkpoint(tmp_path / "out")
    assert checkpoint[GATE_UP].format == format
    assert tuple(checkpoint[GATE_UP].shape) == (EXPERTS, 2 * 32, HIDDEN)
    assert checkpoint.verify().problems == []
    model = qwen(device="meta" if start == "meta" else "cpu")
    if start == "quantized":
        nb.quantize_model(model, "fp4")
    nb.load_model(model, tmp_path / "out")
    experts = model.model.layers[1].mlp.experts
    if start != "quantized":  # then the file decides about each layer, and the module stays
        assert type(experts) is (Experts8bit if format == "int8" else Experts4bit)
    parts = experts.dequantize(torch.float32)
    for name, tensor in parts.items():
        whole = checkpoint[f"model.layers.1.mlp.experts.{name}"]
        assert torch.equal(tensor, whole.dequantize(torch.float32))
    assert {layer.format for _, _, _, layer in experts.projections()} == {format}


@pytest.mark.parametrize("stored", ["dense", "quantized"])
@pytest.mark.parametrize("start", ["dense", "quantized"])
def test_experts_go_to_the_device_that_was_named(tmp_path, stored, start, to_a_device):
    path = save(qwen(), tmp_path / "source")
    if stored == "quantized":
        nb.quantize_checkpoint(path, tmp_path / "out", "nf4", experts=True)
        path = tmp_path / "out"
    model = qwen(device="meta")
    if start == "quantized":
        nb.quantize_model(model, "nf4")
    to_a_device(model, path, [].append)
    assert {str(parameter.device) for parameter in model.parameters()} == {"cuda:0"}
    experts = model.model.layers[1].mlp.experts
    assert (type(experts) is Experts4bit) == ("quantized" in (stored, start))


def test_dequantizing_gives_the_names_and_shapes_of_the_source(tmp_path):
    source = save(qwen(), tmp_path / "source")
    nb.quantize_checkpoint(source, tmp_path / "out", "nf4", experts=True)
    nb.dequantize_checkpoint(tmp_path / "out", tmp_path / "dense", "fp32")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "dense" / "model.safetensors")
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    q = nb.open_checkpoint(tmp_path / "out")[GATE_UP]
    assert torch.equal(after[GATE_UP], q.dequantize(torch.float32))
    model = nb.load_model(qwen(), tmp_path / "dense")
    assert torch.equal(model.model.layers[1].mlp.experts.gate_up_proj, after[GATE_UP])


def reasons(report):
    return {
        row.name.rpartition(".")[2]: row.kept for row in report.tensors if "experts" in row.name
    }


def test_matrices_that_are_no_whole_blocks_stay_dense(tmp_path):
    # 3 rows of 64: a block of 128 would lie across two of them.
    source = save(qwen(inner=3), tmp_path / "source")
    options = {"experts": True, "dry_run": True}
    report = nb.quantize_checkpoint(source, tmp_path / "out", "nf4", blocksize=128, **options)
    assert "not whole blocks" in reasons(report)["gate_up_proj"]
    assert "not whole blocks" in reasons(report)["down_proj"]
    report = nb.quantize_checkpoint(source, tmp_path / "out", "nf4", blocksize=64, **options)
    assert reasons(report) == {"gate_up_proj": None, "down_proj": None}


@pytest.mark.parametrize("inner", [96, HIDDEN])
def test_experts_that_lie_with_inputs_first_stay_dense_and_load(tmp_path, inner):
    model = gpt_oss(inner)
    source = save(model, tmp_path / "source")
    report = nb.quantize_checkpoint(source, tmp_path / "out", "nf4", experts=True)
    assert "[in, out]" in reasons(report)["gate_up_proj"]
    assert "[in, out]" in reasons(report)["down_proj"]
    again = nb.load_model(gpt_oss(inner), tmp_path / "out")
    experts, loaded = model.model.layers[0].mlp.experts, again.model.layers[0].mlp.experts
    assert torch.equal(loaded.gate_up_proj, experts.gate_up_proj)
    quantized = gpt_oss(inner)  # asked for in memory, they are quantized while they load
    nb.quantize_model(quantized, "nf4")
    nb.load_model(quantized, tmp_path / "out")
    want = Experts4bit.from_experts(experts, "nf4").state_dict()
    got = quantized.model.layers[0].mlp.experts.state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_one_tensor_that_cannot_be_taken_apart_is_refused_with_a_reason(tmp_path):
    model = gpt_oss()
    tensors = dict(model.state_dict())
    name = "model.layers.0.mlp.experts.down_proj"
    tensors.update(nb.quantize(tensors.pop(name), "nf4").state_dict(name))
    (tmp_path / "out").mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "out/model.safetensors")
    (tmp_path / "out" / "config.json").write_text(json.dumps(model.config.to_dict()))
    target = gpt_oss()
    with pytest.raises(nb.CheckpointError, match=r"down_proj'.*cannot be taken out"):
        nb.load_model(target, tmp_path / "out")
    assert type(target.model.layers[0].mlp.experts).__name__ == "GptOssExperts"
