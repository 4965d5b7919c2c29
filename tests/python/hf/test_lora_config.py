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
from nybble.nn.linear import Linear4bit
from tiny import RENAMED, adapted, dense, quantized

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


class Experts4bit(nn.Module):
    """Stands for the block of that name: a layer for each projection of each expert."""

    def __init__(self):
        super().__init__()
        for i in range(2):
            expert = nn.ModuleDict({"up_proj": Linear4bit(64, 64), "down_proj": Linear4bit(64, 64)})
            self.add_module(str(i), expert)


def test_layers_of_expert_blocks_are_left_out_unless_they_are_named(monkeypatch):
    monkeypatch.setattr(Experts4bit, "__module__", "nybble.nn.experts")
    model = nn.ModuleDict({"experts": Experts4bit(), "up_proj": Linear4bit(64, 64)})
    config = nybble.hf.lora_config(model)
    assert wrapped(peft.get_peft_model(model, config)) == ["up_proj"]
    inner = nn.ModuleDict({"experts": Experts4bit(), "up_proj": Linear4bit(64, 64)})
    model = nn.ModuleDict({"block": inner})
    config = nybble.hf.lora_config(model)
    assert config.target_modules == {"block.up_proj"}
    assert wrapped(peft.get_peft_model(model, config)) == ["block.up_proj"]
    model = nn.ModuleDict({"experts": Experts4bit(), "up_proj": Linear4bit(64, 64)})
    config = nybble.hf.lora_config(model, target_modules=["down_proj"])
    names = wrapped(peft.get_peft_model(model, config))
    assert names == ["experts.0.down_proj", "experts.1.down_proj"]


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
    code = "import sys, nybble.hf; print('peft' in sys.modules, nybble.hf.merge.__module__)"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "nybble.hf.adapters.merge"]


def test_without_peft_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (
        lambda: nybble.hf.lora_config(torch.nn.Linear(2, 2)),
        lambda: nybble.hf.load_adapter(torch.nn.Linear(2, 2), "somewhere"),
        lambda: nybble.hf.merge(torch.nn.Linear(2, 2)),
    ):
        with pytest.raises(ImportError, match="pip install 'peft"):
            call()
