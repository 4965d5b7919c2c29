"""`compute` of a `NybbleConfig`: in the layers, in `config.json`, and after loading again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nybble as nb
from nybble.nn.linear import QuantizedLinear

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("nybble.hf")


def load(path: Path, **kwargs: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **kwargs)


def computes(model: Any) -> set[str | None]:
    return {m.compute for m in model.modules() if isinstance(m, QuantizedLinear)}


def entry(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("format", ["nf4", "int4", "mxfp4", "int8"])
def test_save_pretrained_and_from_pretrained_keep_it(
    make: Callable[..., Path], tmp_path: Path, format: str
) -> None:
    config = hf.NybbleConfig(format, compute="int8")
    model = load(make("llama"), quantization_config=config)
    assert computes(model) == {"int8"}
    model.save_pretrained(tmp_path)
    assert entry(tmp_path)["compute"] == "int8"
    assert computes(load(tmp_path)) == {"int8"}
    assert computes(hf.from_pretrained(tmp_path)) == {"int8"}


def test_save_model_writes_it_in_an_entry_of_nybble(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(make("llama"))
    nb.quantize_model(model, "int4", compute="int8")
    nb.save_model(model, tmp_path)
    assert entry(tmp_path)["compute"] == "int8"
    assert computes(load(tmp_path)) == {"int8"}


def test_a_bitsandbytes_checkpoint_does_not_say_it(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(make("llama"), quantization_config=hf.NybbleConfig("nf4", compute="int8"))
    hf.save_bitsandbytes(model, tmp_path)
    assert "compute" not in entry(tmp_path)
    assert computes(model) == {"int8"}
    assert computes(hf.from_pretrained(tmp_path)) == {None}
