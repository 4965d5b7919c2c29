"""Quantizing the experts of whole transformers models in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nybble as nb
from nybble.nn import Experts4bit, Experts8bit, Linear4bit, Linear8bit

transformers = pytest.importorskip("transformers", minversion="5.0")

LAYERS, EXPERTS, HIDDEN, INNER = 2, 4, 64, 96
COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "num_experts_per_tok": 2,
}
IDS = torch.arange(24).reshape(2, 12)


def configs():
    return {
        "mixtral": transformers.MixtralConfig(num_local_experts=EXPERTS, **COMMON),
        "qwen3_moe": transformers.Qwen3MoeConfig(
            num_experts=EXPERTS, moe_intermediate_size=INNER, **COMMON
        ),
        "gpt_oss": transformers.GptOssConfig(num_local_experts=EXPERTS, **COMMON),
    }


def model_of(kind, device="cpu"):
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(configs()[kind]).eval()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_are_quantized_and_the_router_stays(kind):
    model = model_of(kind)
    total = sum(p.nbytes for p in model.parameters())
    coverage = nb.quantize_model(model, strict=True)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, Experts4bit)
    rows = {row.name: row for row in coverage.rows}
    row = rows["model.layers.1.mlp.experts.down_proj"]
    assert row.shape[0] == EXPERTS
    # Four bits, and a float32 scale for each block of 64.
    assert row.bytes_before == EXPERTS * INNER * HIDDEN * 4
    assert row.bytes_after == EXPERTS * INNER * HIDDEN * 4.5 / 8
    router = [row for name, row in rows.items() if "gate.weight" in name or "router.weight" in name]
    assert len(router) == LAYERS
    assert {row.reason for row in router} == {"router (chooses experts)"}
    assert coverage.bytes_before == total
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    buffers = sum(t.nbytes for t in model_of(kind).buffers())
    assert coverage.bytes_after == held - buffers
    logits = model(IDS).logits
    nb.dequantize_model(model)
    assert type(model.model.layers[1].mlp.experts).__name__.endswith("Experts")
    assert not any("4bit" in type(module).__name__ for module in model.modules())
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_layers_are_called_as_the_files_of_the_model_call_them():
    names = {}
    for kind in ("mixtral", "qwen3_moe", "gpt_oss"):
        model = model_of(kind, "meta")
        nb.quantize_model(model)
        names[kind] = list(model.model.layers[0].mlp.experts.names.values())
    assert names["mixtral"] == ["w1", "w3", "w2"]
    assert names["qwen3_moe"] == names["gpt_oss"] == ["gate_proj", "up_proj", "down_proj"]


def test_a_model_inside_another_module_gets_the_same_names():
    wrapped = nn.ModuleDict({"inner": model_of("mixtral", "meta")})
    nb.quantize_model(wrapped)
    assert wrapped.get_submodule("inner.model.layers.0.mlp.experts.2.w3").shape == (INNER, HIDDEN)


def test_patterns_name_a_layer_of_experts_or_one_projection():
    model = model_of("mixtral")
    coverage = nb.quantize_model(
        model,
        skip=["lm_head", "model.layers.0.mlp.experts", "model.layers.1.mlp.experts.0.w1"],
        overrides={"re:layers\\.1\\.mlp\\.experts\\.\\d\\.w2$": "int8", "*.3.w3": "bf16"},
    )
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts.get_submodule("0.w1"), nn.Linear)
    assert isinstance(experts.get_submodule("3.w3"), nn.Linear)
    assert isinstance(experts.get_submodule("1.w1"), Linear4bit)
    assert all(isinstance(experts.projection(i, "down"), Linear8bit) for i in range(EXPERTS))
    formats = {row.name: row.format for row in coverage.quantized}
    assert formats["model.layers.1.mlp.experts.2.w2.weight"] == "int8"
    assert formats["model.layers.1.mlp.experts.2.w1.weight"] == "nf4"
    reasons = {row.name: (row.format, row.reason) for row in coverage.kept}
    assert reasons["model.layers.0.mlp.experts.gate_up_proj"] == ("float32", "skip")
    assert reasons["model.layers.1.mlp.experts.0.w1.weight"][1] == "skip"
    assert not coverage.unused
    before = sum(p.nbytes for p in model_of("mixtral").parameters())
    assert coverage.bytes_before == before
    want = model(IDS).logits
    nb.dequantize_model(model)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)


def test_experts_can_be_left_alone_and_have_their_own_format():
    model = model_of("mixtral")
    coverage = nb.quantize_model(model, experts=False)
    kept = {row.name: row.reason for row in coverage.kept}
    assert kept["model.layers.0.mlp.experts.down_proj"] == "experts (pass experts=True)"
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    nb.quantize_model(model, overrides={"*.experts": "int8"}, experts=False)
    assert isinstance(model.model.layers[0].mlp.experts, Experts8bit)


def test_experts_without_flags_are_unsupported_and_strict_says_so():
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    config = transformers.Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=2
    )
    model = nn.ModuleDict({"experts": Llama4TextExperts(config)})
    coverage = nb.quantize_model(model)
    assert {row.name for row in coverage.unsupported} == {
        "experts.gate_up_proj",
        "experts.down_proj",
    }
    assert "does not say how its experts lie in memory" in coverage.unsupported[0].reason
    with pytest.raises(nb.FormatError, match=r"experts\.gate_up_proj"):
        nb.quantize_model(model, strict=True)


def test_a_bad_weight_is_named_with_its_expert():
    model = model_of("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 3] = float("nan")
    with pytest.raises(nb.FormatError, match=r"layers\.1\.mlp\.experts\.2\.down_proj\.weight.* 3"):
        nb.quantize_model(model)


def test_a_quantized_model_round_trips_through_its_state_dict():
    model, other = model_of("gpt_oss"), model_of("gpt_oss", "meta")
    for each in (model, other):
        nb.quantize_model(each, nested=True)
    state = model.state_dict()
    other.load_state_dict(state, assign=True)
    assert torch.equal(
        other.model.layers[0].mlp.experts.projection(3, "gate").dequantize(),
        model.model.layers[0].mlp.experts.projection(3, "gate").dequantize(),
    )
    assert other.state_dict().keys() == state.keys()
