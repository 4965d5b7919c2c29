"""Layers of the compat package against those of bitsandbytes: attributes, files, products."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import nybble.compat.bitsandbytes as bnb
from strategies import FLOATS, same_bits

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
real = pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes")
parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")

FOUR_BIT: list[dict[str, Any]] = [
    {"quant_type": quant_type, "compress_statistics": nested, "quant_storage": storage}
    for quant_type in ("nf4", "fp4")
    for nested in (False, True)
    for storage in (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
]


def pair(kind: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """The same random layer of both libraries, quantized."""
    layers = []
    for library in (bnb, real):
        torch.manual_seed(5)
        layers.append(getattr(library.nn, kind)(*args, **options).to("cpu"))
    return layers[0], layers[1]


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name in b:
        assert same_bits(a[name], b[name]), name


@pytest.mark.parametrize("options", FOUR_BIT)
def test_a_4bit_layer_has_the_same_state_dict_and_attributes(options):
    ours, theirs = pair("Linear4bit", 64, 48, **options)
    assert_same_state(ours, theirs)
    assert vars(ours.weight).keys() == vars(theirs.weight).keys()
    for name, value in vars(theirs.weight).items():
        if name not in ("quant_state", "module"):
            assert getattr(ours.weight, name) == value, name
    state, wanted = ours.weight.quant_state, theirs.weight.quant_state
    for index in range(4):
        a, b = state[index], wanted[index]
        assert same_bits(a, b) if isinstance(b, torch.Tensor) else a == b
    assert (state[4] is None) == (wanted[4] is None)
    assert state[5] == wanted[5]


@pytest.mark.parametrize("options", FOUR_BIT)
def test_bitsandbytes_loads_what_a_4bit_layer_saves_and_the_reverse(options):
    ours, theirs = pair("Linear4bit", 64, 48, **options)
    x = torch.randn(3, 64)
    ours.eval()(x)
    for source, target in ((ours, real), (theirs, bnb)):
        state = source.state_dict()
        entries = {k.removeprefix("weight."): v for k, v in state.items() if k != "weight"}
        entries.pop("bias")
        layer = target.nn.Linear4bit(64, 48, **options)
        layer.weight = target.nn.Params4bit.from_prequantized(
            state["weight"], entries, device="cpu", module=layer
        )
        layer.bias.data = state["bias"]
        assert_same_state(layer, source)
        decoded = target.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        own = bnb.functional.dequantize_4bit(ours.weight.data, ours.weight.quant_state)
        assert torch.equal(decoded, own)
    loaded = bnb.nn.Linear4bit(64, 48, **options)
    loaded.load_state_dict(theirs.state_dict())
    assert_same_state(loaded, theirs)


@pytest.mark.parametrize("options", FOUR_BIT[::4])
@pytest.mark.parametrize("dtype", FLOATS)
def test_4bit_products_and_gradients_agree(options, dtype):
    ours, theirs = pair("Linear4bit", 64, 48, compute_dtype=dtype, **options)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        x = torch.randn(5, 64).to(dtype).requires_grad_()
        y = layer.train()(x)  # in eval mode bitsandbytes computes in bfloat16 on some CPUs
        y.float().square().sum().backward()
        results.append((y.detach().float(), x.grad.float(), layer.bias.grad.float()))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 2 * torch.finfo(dtype).eps * 8 * b.norm()


def test_matmul_4bit_takes_codes_either_way_round():
    x, w = torch.randn(5, 64), torch.randn(48, 64)
    for functions in (bnb, real):
        packed, state = functions.functional.quantize_nf4(w)
        straight = functions.matmul_4bit(x, packed, state)
        assert torch.equal(functions.matmul_4bit(x, packed.t(), state), straight)
        transposed, t_state = functions.functional.quantize_nf4(w.t().contiguous())
        with pytest.warns(DeprecationWarning, match="matmul_4bit"):
            product = functions.matmul_4bit(x, transposed, t_state)
        assert product.shape == (5, 48)
        with pytest.raises(ValueError, match=r"2D|out_features"):
            functions.matmul_4bit(x, *functions.functional.quantize_nf4(torch.randn(2, 8, 64)))
        with pytest.raises(ValueError, match="quant_state"):
            functions.matmul_4bit(x, packed, None)


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_int8_layer_has_the_same_state_dict_and_attributes(dtype):
    source = nn.Linear(64, 48, dtype=dtype)
    ours, theirs = (
        library.nn.Linear8bitLt(64, 48, has_fp16_weights=False, threshold=6.0)
        for library in (bnb, real)
    )
    for layer in (ours, theirs):
        layer.load_state_dict(source.state_dict())
        layer.to("cpu")
    assert vars(ours.weight).keys() == vars(theirs.weight).keys()
    assert_same_state(ours, theirs)
    for name in ("threshold", "has_fp16_weights", "is_training", "use_pool", "force_no_igemmlt"):
        assert getattr(ours.state, name) == getattr(theirs.state, name), name
    ours.eval()(torch.randn(2, 64))
    fresh = real.nn.Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu")
    fresh.load_state_dict(ours.state_dict())
    assert_same_state(fresh, ours)
    again = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    again.load_state_dict(theirs.state_dict())
    assert_same_state(again, theirs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_products_and_gradients_agree(dtype, threshold, training):
    ours, theirs = pair(
        "Linear8bitLt", 64, 48, bias=False, has_fp16_weights=False, threshold=threshold
    )
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        x = torch.randn(5, 64).to(dtype).requires_grad_()
        y = layer.train(training)(x)
        y.float().square().sum().backward()
        results.append((y.detach().float(), x.grad.float()))
    # In eval mode codes of activations differ by one where their scale leaves out the whole
    # column of an outlier (here) or its outlying elements (there): a part in 127 of a row.
    tolerance = 0.02 if not training else 8 * torch.finfo(dtype).eps
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_float_weights_of_an_int8_layer_get_the_same_gradients():
    ours, theirs = pair("Linear8bitLt", 64, 48)
    for layer in (ours, theirs):
        torch.manual_seed(3)
        layer.train()(torch.randn(5, 64)).square().sum().backward()
    # bitsandbytes rounds the weight to float16 before it quantizes: a code may differ by one.
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-2 * b.grad.norm()


@pytest.mark.parametrize("kind", ["EmbeddingNF4", "EmbeddingFP4", "Embedding4bit", "Embedding8bit"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_embeddings_decode_the_same_rows(kind, dtype):
    ours, theirs = pair(kind, 40, 64, dtype=dtype)
    ids = torch.tensor([[0, 39], [7, 7]])
    got, want = ours(ids), theirs(ids)
    assert got.dtype == want.dtype
    if kind == "Embedding8bit":  # SCB / 127 there, SCB * (1 / 127) here
        assert torch.allclose(got.float(), want.float(), rtol=2 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["StableEmbedding", "Embedding"])
def test_plain_embeddings_start_and_compute_alike(kind):
    ours, theirs = pair(kind, 40, 64, padding_idx=3)
    ids = torch.tensor([[0, 39], [3, 7]])
    assert_same_state(ours, theirs)
    assert same_bits(ours(ids).detach(), theirs(ids).detach())


def test_parametrized_parameters_save_the_same_entries():
    modules = []
    for replace in (bnb.nn.parametrize, parametrize):
        torch.manual_seed(2)
        module = nn.Linear(64, 32)
        replace.replace_parameter_4bit(module, "weight", compress_statistics=True)
        modules.append(module)
    ours, theirs = modules
    assert_same_state(ours, theirs)
    assert torch.equal(ours.weight, theirs.weight)
