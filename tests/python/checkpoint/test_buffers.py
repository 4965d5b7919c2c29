"""Buffers of models that were built without memory."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nybble as nb
from nybble.errors import CheckpointError

transformers = pytest.importorskip("transformers")


def llama(device: str) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rope_theta=5000.0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(3)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).eval()


class Shifted(nn.Module):
    """A layer with buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.register_buffer("kept", torch.arange(64.0))
        self.register_buffer("scale", torch.arange(64.0), persistent=False)


def stored(model: nn.Module, path) -> None:
    path.mkdir()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, path / "model.safetensors")


def test_a_transformers_model_on_meta_computes_what_no_file_has(tmp_path, caplog):
    original = llama("cpu")
    original.model.embed_tokens.weight.data[7] = 2.0
    state = {n: t for n, t in original.state_dict().items() if n != "lm_head.weight"}
    (tmp_path / "dense").mkdir()
    save_file({n: t.clone() for n, t in state.items()}, tmp_path / "dense" / "model.safetensors")
    empty = llama("meta")
    nb.quantize_model(empty, "nf4")
    assert empty.model.rotary_emb.inv_freq.is_meta
    with caplog.at_level(logging.WARNING, logger="nybble"):
        nb.load_model(empty, tmp_path / "dense")
    assert caplog.records == []
    rotary = empty.model.rotary_emb
    assert torch.equal(rotary.inv_freq, original.model.rotary_emb.inv_freq)
    assert "inv_freq" not in empty.state_dict()
    nb.quantize_model(original, "nf4")
    ids = torch.tensor([[1, 7, 33, 2]])
    with torch.no_grad():
        assert torch.equal(empty(ids).logits, original(ids).logits)
    # Nothing that was loaded was initialized again, and no trace is left.
    assert torch.equal(empty.model.embed_tokens.weight, original.model.embed_tokens.weight)
    assert not any(hasattr(p, "_is_hf_initialized") for p in empty.model.rotary_emb.buffers())


def test_loaded_weights_beside_computed_buffers_stay_as_they_are(tmp_path):
    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(1)
    original = transformers.CLIPTextModel(config)
    stored(original, tmp_path / "clip")
    with torch.device("meta"):
        empty = transformers.CLIPTextModel(config)
    nb.load_model(empty, tmp_path / "clip")
    for (name, one), (_, other) in zip(
        sorted([*empty.named_parameters(), *empty.named_buffers()]),
        sorted([*original.named_parameters(), *original.named_buffers()]),
        strict=True,
    ):
        assert not one.is_meta, name
        assert torch.equal(one, other), name


def test_buffers_that_nobody_computes_are_named(tmp_path, caplog):
    stored(Shifted(), tmp_path / "shifted")
    with torch.device("meta"):
        empty = Shifted()
    with caplog.at_level(logging.WARNING, logger="nybble"):
        nb.load_model(empty, tmp_path / "shifted")
    assert empty.scale.is_meta
    assert torch.equal(empty.kept, torch.arange(64.0))
    (record,) = caplog.records
    assert "Shifted: scale stay on the meta device" in record.getMessage()


def test_stored_buffers_that_are_missing_are_an_error_before_anything_is_changed(tmp_path):
    (tmp_path / "model").mkdir()
    save_file(nn.Linear(64, 64).state_dict(prefix="inner."), tmp_path / "model/model.safetensors")
    with torch.device("meta"):
        empty = Shifted()
    with pytest.raises(CheckpointError, match="'kept' is missing"):
        nb.load_model(empty, tmp_path / "model")
    assert empty.inner.weight.is_meta
    nb.load_model(Shifted(), tmp_path / "model")  # has its own
