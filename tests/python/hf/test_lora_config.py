"""Which layers a config names, and what it says of mistakes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import nybble as nb
import nybble.hf
from nybble.hf.adapters.targets import shortest_names
from nybble.nn.experts import QuantizedExperts
from nybble.nn.linear import Linear4bit
from tiny import RENAMED, adapted, dense, logits, mixture, quantized, stir

pytestmark = RENAMED
PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def wrapped(model):
    """Names of the layers that carry an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner = model.get_base_model()
    return sorted(n for n, m in inner.named_modules() if isinstance(m, BaseTunerLayer))


@pytest.mark.parametrize("targets", [None, "all-linear", "All-Linear", ["all-linear"]])
def test_all_linear_means_every_linear_layer_except_the_head(targets):
    model = quantized("nf4")
    config = nybble.hf.lora_config(model, target_modules=targets)
    assert sorted(config.target_modules) == PROJECTIONS
    assert config.task_type == "CAUSAL_LM"
    names = wrapped(peft.get_peft_model(model, config))
    expected = [n for n, m in dense().named_modules() if isinstance(m, nn.Linear)]
    assert names == sorted(set(expected) - {"lm_head"})


def test_all_linear_takes_quantized_and_dense_layers_as_peft_does_on_the_dense_model():
    model = dense()
    nb.quantize_model(model, overrides={"re:.*layers\\.1\\.": "skip", "*v_proj": "int8"})
    ours = wrapped(peft.get_peft_model(model, nybble.hf.lora_config(model)))
    other = dense()
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    assert ours == wrapped(peft.get_peft_model(other, config))


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "v_proj"], 4),
        (["model.layers.1.mlp.up_proj"], 1),
        (r"model\.layers\.0\..*(up|down)_proj", 2),
    ],
)
def test_names_and_regular_expressions_mean_what_they_mean_to_peft(targets, count):
    model = quantized("nf4")
    config = nybble.hf.lora_config(model, target_modules=targets)
    assert len(wrapped(peft.get_peft_model(model, config))) == count


def test_a_quantized_head_is_left_out_unless_it_is_named():
    model = dense()
    nb.quantize_model(model, skip=[])
    assert isinstance(model.lm_head, Linear4bit)
    assert "lm_head" not in nybble.hf.lora_config(model).target_modules
    config = nybble.hf.lora_config(model, target_modules=[*PROJECTIONS, "lm_head"])
    assert "lm_head" in wrapped(peft.get_peft_model(model, config))


def test_the_head_of_a_classifier_is_left_out_and_trained_whole():
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config)
    nb.quantize_model(model, skip=["score"])
    lora = nybble.hf.lora_config(model)
    assert lora.task_type == "SEQ_CLS"
    assert sorted(lora.target_modules) == PROJECTIONS
    model = peft.get_peft_model(model, lora)
    assert [n for n, p in model.named_parameters() if "score" in n and p.requires_grad]


def test_layers_of_expert_blocks_are_left_out_unless_they_are_named():
    model = mixture("Qwen2Moe")
    before = logits(model)
    names = wrapped(peft.get_peft_model(model, nybble.hf.lora_config(model)))
    dense_layers = ["mlp.shared_expert.down_proj", "mlp.shared_expert.gate_proj",
                    "mlp.shared_expert.up_proj", "mlp.shared_expert_gate", "self_attn.k_proj",
                    "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]  # fmt: skip
    assert names == [f"model.layers.0.{name}" for name in dense_layers]
    model = mixture("Qwen2Moe")
    config = nybble.hf.lora_config(model, target_modules=r".*\.experts\.\d\.(gate|down)_proj")
    model = peft.get_peft_model(model, config).eval()
    assert len(wrapped(model)) == 2 * 4
    assert torch.equal(logits(model), before)
    stir(model)
    changed = logits(model)
    assert (changed - before).norm() > 0.02 * before.norm()
    merged = nybble.hf.merge(model, to="fp32")
    assert not any(isinstance(m, QuantizedExperts) for m in merged.modules())
    torch.testing.assert_close(logits(merged), changed, rtol=1e-4, atol=1e-4)


def test_layers_that_peft_takes_for_experts_are_not_lost_silently(caplog):
    model = mixture("Qwen3Moe", num_hidden_layers=2, mlp_only_layers=[1])
    config = nybble.hf.lora_config(model)
    assert "PEFT takes 3 layers of this qwen3_moe, such as 'model.layers.1.mlp" in caplog.text
    assert sorted(config.target_modules) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    for targets in (["q_proj", "up_proj", "gate_proj"], r".*layers\.0\..*q_proj"):
        with pytest.raises(nb.FormatError, match="PEFT rewrites targets of this model"):
            nybble.hf.lora_config(model, target_modules=targets)
    with pytest.raises(nb.FormatError, match=r"w1 without also targeting w3.*name other layers"):
        nybble.hf.lora_config(mixture("Mixtral"), target_modules=["w1", "w2"])


def test_whole_names_that_are_ends_of_others_do_not_match_those():
    model = nn.ModuleDict({"a": nn.ModuleDict({"up": nn.Linear(4, 4)}), "up": nn.Linear(4, 4)})
    names = shortest_names(model, ["up"])
    config = nybble.hf.lora_config(model, target_modules=names)
    assert wrapped(peft.get_peft_model(model, config)) == ["up"]


def test_a_second_adapter_finds_the_same_layers():
    model = adapted(quantized("nf4"))
    before = wrapped(model)
    model.add_adapter("second", nybble.hf.lora_config(model, r=2))
    assert wrapped(model) == before
    assert all("second" in model.get_base_model().get_submodule(name).lora_A for name in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_drop": 0.1}, "no option 'lora_drop'; did you mean 'lora_dropout'"),
        ({"target_modules": ["qproj"]}, r"nor ends in '\.qproj'; did you mean 'q_proj'"),
        ({"target_modules": ["zzz"]}, "example: 'model.layers.0.self_attn.q_proj'"),
        ({"target_modules": "q_proj"}, "matches no whole name of a module"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_named_with_a_remedy(options, message):
    with pytest.raises(nb.FormatError, match=message):
        nybble.hf.lora_config(quantized("nf4", layers=1), **options)


def test_targets_that_are_no_linear_layers_are_refused():
    model = dense(layers=1)
    nb.quantize_model(model, embeddings=True)
    with pytest.raises(nb.FormatError, match=r"'model\.embed_tokens' is a Embedding4bit"):
        nybble.hf.lora_config(model, target_modules=["embed_tokens"])
    with pytest.raises(nb.FormatError, match="no linear layer"):
        nybble.hf.lora_config(nn.Sequential(nn.ReLU()))


def test_quantized_modules_cannot_be_trained_whole():
    model = quantized("nf4", layers=1)
    with pytest.raises(nb.FormatError, match=r"modules_to_save.*'o_proj'.*quantized"):
        nybble.hf.lora_config(model, target_modules=["q_proj"], modules_to_save=["o_proj"])


def test_importing_the_package_does_not_import_peft():
    code = "import sys, nybble.hf; print('peft' in sys.modules)"
    command = [sys.executable, "-W", "error", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_without_peft_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (
        lambda: nybble.hf.lora_config(torch.nn.Linear(2, 2)),
        lambda: nybble.hf.load_adapter(torch.nn.Linear(2, 2), "somewhere"),
        lambda: nybble.hf.merge(torch.nn.Linear(2, 2)),
    ):
        with pytest.raises(ImportError, match="pip install 'peft"):
            call()
