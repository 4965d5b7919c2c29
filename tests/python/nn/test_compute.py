"""`compute="int8"` stays with a layer: whatever makes, copies, moves or fills one keeps it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nybble as nb
from nybble.nn import Linear4bit, Linear8bit
from nybble.nn.linear import QuantizedLinear

INTEGERS = ("nf4", "fp4", "int4", "mxfp4", "int8")


def layer(format: str, compute: str | None = "int8") -> QuantizedLinear:
    kind = Linear8bit if format in ("int8", "dynamic8") else Linear4bit
    return kind.from_linear(nn.Linear(512, 64), format, compute=compute)


def model(format: str | None = None, **options: Any) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    if format is not None:
        nb.quantize_model(made, format, **options)
    return made


def computes(made: nn.Module) -> list[str | None]:
    return [m.compute for m in made.modules() if isinstance(m, QuantizedLinear)]


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def _reloaded(module: nn.Module) -> nn.Module:
    module.load_state_dict(module.state_dict())
    return module


WAYS: dict[str, Callable[[Any], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": _saved,
    "to a device": lambda module: module.to("cpu"),
    "to a dtype": lambda module: module.to(torch.float32),
    "load_state_dict": _reloaded,
    "eval": lambda module: module.eval(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("format", INTEGERS)
def test_a_layer_keeps_it(format: str, way: str) -> None:
    module, x = layer(format), torch.randn(3, 512)
    before = module(x)
    kept = WAYS[way](module)
    assert kept.compute == "int8"
    assert torch.equal(kept(x), before)
    # What was computed really are products of integers.
    assert torch.equal(before, nb.linear(x, module.qtensor, module.bias, compute="int8"))
    assert not torch.equal(before, nb.linear(x, module.qtensor, module.bias))


def test_another_device_and_another_weight_leave_it() -> None:
    module = layer("nf4")
    module.requantize_(torch.randn(64, 512))
    assert module.compute == "int8"
    assert module.to("meta").compute == "int8"


@pytest.mark.parametrize("format", INTEGERS)
def test_every_layer_of_a_model_gets_it(format: str) -> None:
    assert computes(model(format, compute="int8")) == ["int8", "int8"]


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_experts_get_it(format: str) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = transformers.MixtralConfig(
        num_local_experts=2, hidden_size=64, intermediate_size=64, num_hidden_layers=1
    )
    made = nn.ModuleDict({"experts": MixtralExperts(config), "head": nn.Linear(64, 64)})
    for parameter in made.parameters():
        nn.init.normal_(parameter)  # transformers leaves what memory held
    nb.quantize_model(made, format, compute="int8")
    assert computes(made) == ["int8"] * 7


def test_a_transposed_layer_gets_it() -> None:
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D
    made = nn.Sequential(conv(32, 64))
    nb.quantize_model(made, "nf4", compute="int8")
    assert computes(made) == ["int8"]


def test_a_state_dict_does_not_carry_it() -> None:
    fresh = layer("nf4", None)
    fresh.load_state_dict(layer("nf4").state_dict())
    assert fresh.compute is None


def test_a_weight_without_integer_codes_ends_it() -> None:
    module, x = layer("int8"), torch.randn(3, 512)
    module.load_state_dict(layer("dynamic8", None).state_dict())
    assert (module.format, module.compute) == ("dynamic8", None)
    assert torch.equal(module(x), nb.linear(x, module.qtensor, module.bias))


@pytest.mark.parametrize("stored", ["nf4", "int4", "int8", "dynamic8"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_loaded_model_keeps_what_its_layers_had(tmp_path: Path, format: str, stored: str) -> None:
    nb.save_model(model(stored), tmp_path)
    filled = nb.load_model(model(format, compute="int8"), tmp_path)
    assert computes(filled) == [None if stored == "dynamic8" else "int8"] * 2
    assert computes(nb.load_model(model(format), tmp_path, compute="int8")) == [None, None]
    assert filled(torch.randn(2, 64)).shape == (2, 32)


@pytest.mark.parametrize("stored", ["nf4", "int8", "dynamic8"])
def test_dense_layers_get_what_load_model_is_told(tmp_path: Path, stored: str) -> None:
    nb.save_model(model(stored, compute=None), tmp_path)
    expected = None if stored == "dynamic8" else "int8"
    assert computes(nb.load_model(model(), tmp_path, compute="int8")) == [expected] * 2
    assert computes(nb.load_model(model(), tmp_path)) == [None, None]


def test_an_unknown_name_changes_nothing(tmp_path: Path) -> None:
    nb.save_model(model("nf4"), tmp_path)
    dense = model()
    with pytest.raises(nb.FormatError, match="must be 'int8' or None"):
        nb.load_model(dense, tmp_path, compute="int4")
    assert all(type(module) is nn.Linear for module in dense)


@pytest.mark.parametrize("features", [256, 77])
def test_llm_int8_layers_compute_what_the_op_does(features: int) -> None:
    module = Linear8bit.from_linear(nn.Linear(features, 9), "int8")
    module.threshold = 6.0
    x = torch.randn(3, features)
    x[:, 5] *= 30
    parts = (module.weight, module.absmax, module.bias, 6.0)
    with torch.no_grad():
        for _ in range(2):  # the second time the weight is remembered
            assert torch.equal(module(x), torch.ops.nybble.int8_linear(x, *parts))
        module.requantize_(torch.randn(9, features))  # elsewhere in memory
        parts = (module.weight, module.absmax, module.bias, 6.0)
        assert torch.equal(module(x), torch.ops.nybble.int8_linear(x, *parts))
        module.weight.data = module.weight.T.contiguous().T  # codes with gaps
        assert torch.equal(module(x), torch.ops.nybble.int8_linear(x, *parts))
    x.requires_grad_()
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.dequantize().sum(0).expand(3, -1))
