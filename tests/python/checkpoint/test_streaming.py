"""Loading into a model without memory: what it takes, where tensors go, one tensor at a time."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nybble as nb
from strategies import same_bits


def model(device: str = "cpu", seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    with torch.device(device):
        return nn.Sequential(
            nn.Embedding(10, 64), nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64)
        )


def dense(path: Path) -> tuple[nn.Module, Path]:
    original = model()
    source = path / "source"
    source.mkdir()
    save_file(original.state_dict(), source / "model.safetensors")
    return original, source


@pytest.mark.parametrize("format", ["nf4", "int8", "mxfp4"])
def test_a_dense_checkpoint_is_quantized_into_a_model_without_memory(tmp_path, format):
    original, path = dense(tmp_path)
    empty = model("meta", seed=2)
    nb.quantize_model(empty, format, skip=[])
    nb.load_model(empty, path)
    for i in (1, 3):
        want = nb.quantize(original[i].weight.detach(), format)
        assert type(empty[i]) is not nn.Linear
        assert same_bits(empty[i].qtensor.packed, want.packed)
        assert same_bits(empty[i].qtensor.absmax, want.absmax)
        assert torch.equal(empty[i].bias, original[i].bias)
    assert not any(p.is_meta for p in empty.parameters())
    ids = torch.tensor([3, 7])
    twin = model()
    nb.quantize_model(twin, format, skip=[])
    assert torch.equal(empty(ids), twin(ids))


def quantized(path: Path) -> Path:
    _, source = dense(path)
    nb.quantize_checkpoint(source, path / "out", "nf4", nested=True)
    return path / "out"


@pytest.mark.parametrize("stored", ["dense", "quantized"])
@pytest.mark.parametrize("start", ["dense", "quantized"])
def test_tensors_go_to_the_device_that_was_named(tmp_path, stored, start, to_a_device):
    path = dense(tmp_path)[1] if stored == "dense" else quantized(tmp_path)
    empty = model("meta")
    if start == "quantized":
        nb.quantize_model(empty, "nf4", skip=[])
    to_a_device(empty, path, [].append)
    assert {str(parameter.device) for parameter in empty.parameters()} == {"cuda:0"}
    expected = nn.Linear if stored == start == "dense" else nb.nn.Linear4bit
    for layer in (empty[1], empty[3]):
        assert type(layer) is expected
        if expected is nb.nn.Linear4bit:
            assert {str(part.device) for part in layer.qtensor.parts if part is not None} == {
                "cuda:0"
            }


def test_what_the_model_holds_stays_where_it_is(tmp_path):
    _, path = dense(tmp_path)
    filled = nb.load_model(model(seed=2), path, device="meta")
    assert not any(p.is_meta for p in filled.parameters())


@pytest.mark.parametrize("stored", ["dense", "quantized"])
def test_the_host_holds_one_tensor_of_the_file_at_a_time(tmp_path, stored, to_a_device):
    path = dense(tmp_path)[1] if stored == "dense" else quantized(tmp_path)
    held: list[list[weakref.ref]] = []
    alive: list[int] = []

    def seen(value: object) -> None:
        if value is None:  # before a tensor is read
            gc.collect()
            alive.append(sum(any(part() is not None for part in parts) for parts in held))
            return
        parts = [value] if isinstance(value, torch.Tensor) else value.parts
        held.append([weakref.ref(part) for part in parts if part is not None])

    empty = model("meta")
    nb.quantize_model(empty, "nf4", skip=[])
    to_a_device(empty, path, seen)
    assert len(alive) == 7
    # The loop's variable holds the last one until the next has been read.
    assert alive[0] == 0
    assert max(alive) == 1
