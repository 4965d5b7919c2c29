"""Quantized layers: state, moving, copying, training, compiling."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from torch import nn

import nybble as nb
from nybble.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bit
from nybble.nn.embedding import embedding_class
from nybble.nn.linear import linear_class
from strategies import (
    NAMES,
    SPEC,
    assert_product,
    dtypes,
    for_format,
    matrices,
    same_bits,
    seeds,
    settings_of,
)


def linear(shape, dtype=torch.float32, **how):
    dense = nn.Linear(shape[1], shape[0], dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(for_format(dense.weight, how["format"]))
    return dense, linear_class(SPEC[how["format"]]["bits"]).from_linear(dense, **how)


def options(how):
    return {**how, "blocksize": how["blocksize"]}


def state_bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert same_bits(a[name], b[name]), name


@given(settings_of(), matrices, dtypes, seeds)
def test_forward_equals_the_dequantized_layer(how, shape, dtype, seed):
    torch.manual_seed(seed)
    _, layer = linear(shape, dtype, **how)
    x = torch.randn(2, 3, shape[1]).to(dtype)
    assert_product(layer(x), x, layer.qtensor, layer.bias.detach())
    assert layer(x[0, 0]).shape == (shape[0],)


@given(settings_of(), matrices, dtypes, seeds)
def test_a_state_dict_survives_forward_and_backward(how, shape, dtype, seed):
    torch.manual_seed(seed)
    _, layer = linear(shape, dtype, **how)
    before = state_bits(layer)
    x = torch.randn(4, shape[1]).to(dtype).requires_grad_()
    layer.eval()(x)
    layer.train()(x).sum().backward()
    assert x.grad is not None
    assert_same_state(before, state_bits(layer))
    fresh = type(layer)(
        shape[1], shape[0], **{k: v for k, v in how.items() if v or k == "format"}, dtype=dtype
    )
    fresh.load_state_dict(before)
    assert torch.equal(fresh(x), layer(x))
    assert_same_state(before, state_bits(fresh))


def test_loading_takes_the_format_of_the_file_and_copies():
    _, saved = linear((16, 64), format="fp4", blocksize=32, nested=True)
    state = saved.state_dict()
    layer = Linear4bit(64, 16)
    layer.load_state_dict(state)
    assert (layer.format, layer.blocksize) == ("fp4", 32)
    state["weight"].zero_()
    x = torch.randn(1, 64)
    assert not torch.equal(layer(x), torch.zeros(1, 16))


def test_a_dense_state_dict_is_quantized_on_loading():
    dense, quantized = linear((16, 64), format="nf4", nested=True)
    layer = Linear4bit(64, 16, nested=True)
    layer.load_state_dict(dense.state_dict())
    assert_same_state(state_bits(layer), state_bits(quantized))


def test_bad_state_dicts_are_refused_like_torch_does():
    layer = Linear4bit(64, 16)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        layer.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match="absmax' is missing"):
        layer.load_state_dict({k: v for k, v in state.items() if k != "weight.absmax"})
    with pytest.raises(RuntimeError, match="shape"):
        layer.load_state_dict(Linear4bit(64, 15).state_dict() | {"bias": state["bias"]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        layer.load_state_dict({**state, "extra": torch.ones(1)})
    with pytest.raises(RuntimeError, match="companions are missing"):
        layer.load_state_dict({"weight": state["weight"], "bias": state["bias"]})
    with pytest.raises(RuntimeError, match="int8; a Linear4bit cannot hold it"):
        layer.load_state_dict(Linear8bit(64, 16).state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_are_equal_and_independent(name):
    _, layer = linear((16, 64), format=name)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert_same_state(state_bits(layer), state_bits(other))
        other.weight.data.zero_()
    x = torch.randn(2, 64)
    assert not torch.equal(layer(x), copies[0](x))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)])
@pytest.mark.parametrize("name", NAMES)
def test_no_cast_touches_codes_or_scales(name, cast):
    _, layer = linear((16, 64), format=name)
    before = state_bits(layer)
    after = state_bits(cast(layer))
    assert before.pop("bias").dtype != after.pop("bias").dtype
    assert_same_state(before, after)


@pytest.mark.parametrize("name", ["nf4", "int8", "mxfp4"])
def test_the_meta_device_and_back(name):
    _, layer = linear((16, 64), format=name)
    state = state_bits(layer)
    meta = copy.deepcopy(layer).to("meta")
    assert {t.device.type for t in (meta.weight, meta.absmax, meta.bias)} == {"meta"}
    with (
        pytest.warns(UserWarning, match="no-op"),  # torch's own, about the bias
        pytest.raises(RuntimeError, match="assign=True"),
    ):
        meta.load_state_dict(state)
    meta.load_state_dict(state, assign=True)
    assert_same_state(state, state_bits(meta))
    with torch.device("meta"):
        made = linear_class(SPEC[name]["bits"])(64, 16, format=name)
    assert made.weight.device.type == "meta"
    made.load_state_dict(state, assign=True)
    assert_same_state(state, state_bits(made))
    empty = meta.to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    assert_same_state(state, state_bits(empty))


def test_products_are_computed_in_the_compute_dtype():
    dense = nn.Linear(64, 16)
    exact = Linear4bit.from_linear(dense, "nf4")
    coarse = Linear4bit.from_linear(dense, "nf4", compute_dtype=torch.bfloat16)
    x = torch.randn(2, 64)
    assert coarse(x).dtype == torch.float32
    assert torch.equal(coarse(x), exact(x.bfloat16()).float())


def test_autocast_is_honoured_as_by_torchs_linear():
    _, layer = linear((16, 64), format="nf4")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_compiled_layer_has_no_graph_break(name):
    _, layer = linear((16, 64), format=name)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    assert torch.equal(compiled(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("threshold", [None, 6.0])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)])
def test_outputs_can_be_changed_in_place_in_training(shape, threshold):
    layers = [Linear4bit.from_linear(nn.Linear(64, 16), "nf4")]
    layers.append(Linear8bit.from_linear(nn.Linear(64, 16), "int8"))
    layers[1].threshold = threshold
    for layer in layers:
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        y *= 2
        torch.relu_(y).sum().backward()
        expected = 2 * (y > 0).float() @ layer.dequantize()
        torch.testing.assert_close(x.grad, expected)


def test_llm_int8_follows_its_threshold_and_trains():
    dense = nn.Linear(64, 16)
    layer = Linear8bit.from_linear(dense, "int8")
    x = torch.randn(20, 64)
    x[0, 3] = 50
    exact = layer(x)
    layer.threshold = 6.0
    assert 0 < (layer(x) - exact).abs().max() < 0.05
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(20, 64))
    assert "threshold=6.0" in repr(layer)


@given(settings_of(), matrices, dtypes, seeds)
def test_embeddings_look_up_rows_of_the_decoded_table(how, shape, dtype, seed):
    torch.manual_seed(seed)
    dense = nn.Embedding(*shape, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(for_format(dense.weight, how["format"]))
    layer = embedding_class(SPEC[how["format"]]["bits"]).from_embedding(dense, **how)
    ids = torch.randint(0, shape[0], (2, 5))
    assert torch.equal(layer(ids), nn.functional.embedding(ids, layer.dequantize()))
    assert torch.equal(layer(ids.int()), layer(ids))
    fresh = type(layer)(*shape, format=how["format"], dtype=dtype)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(ids), layer(ids))


def test_an_id_outside_the_table_is_an_index_error():
    for layer in (
        Embedding4bit(10, 33, format="nf4"),
        Embedding8bit(10, 33, format="int8"),
    ):
        for bad in (10, -1):
            with pytest.raises(IndexError, match=str(bad)):
                layer(torch.tensor([bad]))


def test_an_embedding_that_renormalizes_is_refused():
    with pytest.raises(nb.FormatError, match="max_norm"):
        Embedding4bit.from_embedding(nn.Embedding(4, 64, max_norm=1.0), "nf4")


def test_a_class_refuses_formats_of_another_width():
    with pytest.raises(nb.FormatError, match="8-bit class"):
        Linear4bit(64, 16, format="int8")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 64), (3, 7)])
def test_a_storage_dtype_changes_the_state_dict_and_nothing_else(
    storage: torch.dtype, shape: tuple[int, int]
) -> None:
    layer = nb.nn.Linear4bit.from_linear(nn.Linear(shape[1], shape[0], bias=False), "nf4")
    layer.storage = storage
    stored = layer.state_dict()["weight"]
    assert stored.dtype == storage
    assert layer.weight.dtype == torch.uint8
    other = nb.nn.Linear4bit(shape[1], shape[0], bias=False)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(other.dequantize(), layer.dequantize())
