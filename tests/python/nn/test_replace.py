"""Quantizing whole models in place, and the receipt."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import nybble as nb
from nybble.nn import Embedding4bit, Linear4bit, Linear8bit


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(64, 96)
        self.down_proj = nn.Linear(96, 64, bias=False)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return x + self.norm(self.down_proj(torch.relu(self.up_proj(x))))


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(64, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 64))


IDS = torch.tensor([[1, 2, 3]])


def kinds(model):
    return {name: type(module).__name__ for name, module in model.named_modules()}


def test_linear_layers_are_replaced_and_the_head_and_embedding_are_kept():
    model = Model()
    total = sum(p.nbytes for p in model.parameters())
    coverage = nb.quantize_model(model)
    assert isinstance(model.layers[0].up_proj, Linear4bit)
    assert isinstance(model.lm_head, nn.Linear)
    assert len(coverage.quantized) == 4
    assert not coverage.unsupported
    reasons = {row.name: row.reason for row in coverage.kept}
    assert reasons["lm_head.weight"] == "output head (default skip)"
    assert "embedding" in reasons["embed.weight"]
    assert reasons["layers.0.norm.weight"] == "one-dimensional"
    assert reasons["layers.0.up_proj.bias"] == "one-dimensional"
    assert coverage.bytes_before == total
    assert coverage.bytes_after < total
    assert model(IDS).shape == (1, 3, 50)
    text = str(coverage)
    assert "4 quantized" in text
    assert "output head" in text


def test_rules_choose_and_leave_out():
    model = Model()
    coverage = nb.quantize_model(
        model,
        "nf4",
        nested=True,
        blocksize=128,
        skip=["re:layers\\.1\\.up", "nothing_like_this"],
        overrides={"re:layers\\.0\\.": "int8", "embed": "fp4", "*.down_proj": "bf16"},
    )
    assert isinstance(model.layers[0].up_proj, Linear8bit)
    assert isinstance(model.layers[0].down_proj, Linear8bit)  # the first override wins
    assert isinstance(model.layers[1].up_proj, nn.Linear)
    assert isinstance(model.layers[1].down_proj, nn.Linear)
    assert isinstance(model.lm_head, Linear4bit)  # a list of skips replaces the default
    assert isinstance(model.embed, Embedding4bit)
    assert model.lm_head.blocksize == 128
    assert coverage.unused == ["nothing_like_this"]
    reasons = {row.name: row.reason for row in coverage.kept}
    assert reasons["layers.1.down_proj.weight"] == "override to bf16"


def test_tied_weights_are_left_alone_by_default():
    model = Model(tied=True)
    model.head2 = nn.Linear(64, 50, bias=False)
    model.head2.weight = model.layers[0].down_proj.weight
    coverage = nb.quantize_model(model)
    assert model.lm_head.weight is model.embed.weight
    assert isinstance(model.head2, nn.Linear)
    assert sum(row.reason == "tied weight" for row in coverage.kept) >= 1


def test_a_module_used_twice_stays_one_module():
    model = nn.ModuleDict({"a": nn.Linear(64, 64)})
    model["b"] = model["a"]
    nb.quantize_model(model, skip=[])
    assert isinstance(model["a"], Linear4bit)
    assert model["a"] is model["b"]


def test_what_has_no_layer_is_listed_and_strict_refuses_it():
    model = nn.ModuleDict({"linear": nn.Linear(64, 64), "experts": Experts()})
    model["conv"] = nn.Conv2d(3, 4, 3)
    with pytest.raises(nb.FormatError, match=r"experts\.gate_up_proj \[4, 32, 64\]"):
        nb.quantize_model(model, strict=True)
    assert isinstance(model["linear"], nn.Linear)  # nothing was changed
    coverage = nb.quantize_model(model)
    assert {row.name for row in coverage.unsupported} == {
        "experts.gate_up_proj",
        "conv.weight",
    }
    assert "UNSUPPORTED experts.gate_up_proj" in str(coverage)
    skipped = nb.quantize_model(model, strict=True, skip=["experts", "conv"])
    assert not skipped.unsupported


def test_dequantizing_gives_dense_layers_with_the_decoded_weights():
    model = Model()
    nb.quantize_model(model, embeddings=True, skip=[])
    want = model(IDS)
    assert isinstance(model.embed, Embedding4bit)
    nb.dequantize_model(model)
    assert "Linear4bit" not in kinds(model).values()
    assert isinstance(model.embed, nn.Embedding)
    torch.testing.assert_close(model(IDS), want)


def test_a_model_round_trips_through_its_state_dict():
    model = Model()
    other = Model()
    nb.quantize_model(model, nested=True)
    nb.quantize_model(other, nested=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(IDS), other(IDS))
    assert torch.equal(copy.deepcopy(model)(IDS), model(IDS))


def test_conv1d_of_transformers_is_transposed_and_comes_back():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(96, 64))
    x = torch.randn(2, 64)
    dense = model(x)
    nb.quantize_model(model, "int8", skip=[])
    assert isinstance(model[0], Linear8bit)
    assert tuple(model[0].shape) == (96, 64)
    torch.testing.assert_close(model(x), dense, atol=0.02, rtol=0.1)
    nb.dequantize_model(model)
    assert isinstance(model[0], Conv1D)
    torch.testing.assert_close(model(x), dense, atol=0.02, rtol=0.1)


def test_a_model_on_the_meta_device_is_laid_out():
    with torch.device("meta"):
        model = Model()
    coverage = nb.quantize_model(model, nested=True)
    assert model.layers[0].up_proj.weight.device.type == "meta"
    assert coverage.bytes_after < coverage.bytes_before


def test_bad_names_fail_before_anything_is_changed():
    model = Model()
    for bad in (
        {"format": "nf5"},
        {"blocksize": 48},
        {"overrides": {"embed": "nf5"}},
        {"skip": ["re:("]},
    ):
        with pytest.raises(nb.FormatError):
            nb.quantize_model(model, **bad)
    assert "Linear4bit" not in kinds(model).values()


def test_a_nan_is_named_with_its_layer():
    model = Model()
    with torch.no_grad():
        model.layers[1].down_proj.weight[3, 5] = float("nan")
    with pytest.raises(nb.FormatError, match=r"layers\.1\.down_proj\.weight.*position 293"):
        nb.quantize_model(model)


def test_a_single_layer_cannot_be_replaced_in_place():
    with pytest.raises(nb.FormatError, match=r"from_linear"):
        nb.quantize_model(nn.Linear(64, 64), skip=[])
