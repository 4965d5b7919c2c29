"""`compute="int8"`: the op against the definition, the layers, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nybble as nb
from nybble import integer, ops
from nybble.nn import Linear4bit, Linear8bit

FORMATS = ("nf4", "fp4", "int4", "mxfp4", "int8")


def _weight(format: str, shape: tuple[int, int] = (70, 384), nested: bool = False) -> nb.QTensor:
    generator = torch.Generator().manual_seed(0)
    return nb.quantize(torch.randn(shape, generator=generator), format, nested=nested)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 4, 9])
@pytest.mark.parametrize("format", FORMATS)
def test_the_kernel_is_close_to_the_definition(
    format: str, tokens: int, dtype: torch.dtype
) -> None:
    q = _weight(format, nested=format == "nf4")
    x = torch.randn(2, tokens, 384).to(dtype)
    bias = torch.randn(70)
    got = nb.linear(x, q, bias, compute="int8")
    expected = integer.definition(x.float(), *q.parts, bias, *q.how)
    assert got.dtype == dtype
    assert got.shape == (2, tokens, 70)
    # Both sum float32 terms in some order, then round to the dtype.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.05}[dtype]
    assert (got.float() - expected).abs().max() <= tolerance


@pytest.mark.parametrize(("format", "limit"), [("int4", 0.008), ("mxfp4", 0.008), ("nf4", 0.02)])
def test_the_result_moves_by_about_the_rounding_of_activations(format: str, limit: float) -> None:
    q = _weight(format, (64, 4096))
    x = torch.randn(32, 4096)
    exact = x @ q.dequantize(torch.float32).T
    error = nb.linear(x, q, compute="int8") - exact
    # Rounding to 255 steps of a group's range is about 1 % of a normal value.
    assert error.norm() / exact.norm() < limit


def test_the_documented_errors_of_the_tables_hold() -> None:
    for format, bound in (("nf4", 0.004), ("fp4", 0.0053), ("int4", 1e-7), ("mxfp4", 1e-7)):
        values = torch.tensor(ops.reference.spec(format)["codebook"])
        integers, step = nb._core.integers(format)
        assert (torch.tensor(integers) * step - values).abs().max() <= bound, format


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_are_those_of_the_exact_product(format: str) -> None:
    q = _weight(format)
    x = torch.randn(3, 384, requires_grad=True)
    bias = torch.randn(70, requires_grad=True)
    grad = torch.randn(3, 70)
    nb.linear(x, q, bias, compute="int8").backward(grad)
    assert x.grad is not None
    assert bias.grad is not None
    torch.testing.assert_close(x.grad, grad @ q.dequantize(torch.float32).T.T)
    torch.testing.assert_close(bias.grad, grad.sum(0))


# torch's own checker looks at `.grad` of tensors that have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_the_op_is_well_formed(format: str) -> None:
    q = _weight(format)
    x = torch.randn(2, 384, requires_grad=True)
    bias = torch.randn(70, requires_grad=True)
    args = (x, *q.parts, bias, *q.how)
    torch.library.opcheck(torch.ops.nybble.integer_linear.default, args)


def test_a_compiled_layer_computes_the_same() -> None:
    layer = Linear4bit.from_qtensor(_weight("nf4"), compute="int8")
    x = torch.randn(5, 384)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_layers_take_and_show_it() -> None:
    layer = Linear4bit(384, 70, compute="int8")
    assert layer.compute == "int8"
    assert "compute=int8" in repr(layer)
    assert Linear4bit(384, 70).compute is None
    assert "compute=" not in repr(Linear4bit(384, 70))
    dense = nn.Linear(384, 70)
    layer = Linear8bit.from_linear(dense, "int8", compute="int8")
    x = torch.randn(3, 384)
    assert torch.equal(layer(x), nb.linear(x, layer.qtensor, layer.bias, compute="int8"))
    assert torch.equal(layer(x), ops.int8_linear(x, layer.weight, layer.absmax, layer.bias, 0.0))


def test_a_model_is_quantized_with_it_where_the_codes_are_integers() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nb.quantize_model(model, "nf4", compute="int8", overrides={"1": "dynamic8"})
    assert [layer.compute for layer in model] == ["int8", None]
    assert model(torch.randn(2, 64)).shape == (2, 64)


def test_what_cannot_be_is_refused() -> None:
    x = torch.randn(2, 384)
    with pytest.raises(nb.FormatError, match="no integer codes"):
        nb.linear(x, _weight("dynamic8"), compute="int8")
    with pytest.raises(nb.FormatError, match="must be 'int8' or None"):
        nb.linear(x, _weight("nf4"), compute="int4")  # type: ignore[arg-type]
    with pytest.raises(nb.FormatError):
        nb.quantize_model(nn.Sequential(nn.Linear(64, 64)), "dynamic8", compute="int8")
    with pytest.raises(RuntimeError, match="the weight takes 384"):
        nb.linear(torch.randn(2, 383), _weight("nf4"), compute="int8")


def test_a_token_that_is_not_finite_is_nan() -> None:
    x = torch.randn(3, 384)
    x[1, 5] = torch.inf
    out = nb.linear(x, _weight("nf4"), compute="int8")
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_odd_shapes_take_the_general_path() -> None:
    q = _weight("nf4", (9, 77))
    x = torch.randn(3, 77)
    expected = integer.definition(x, *q.parts, None, *q.how)
    torch.testing.assert_close(nb.linear(x, q, compute="int8"), expected, rtol=1e-5, atol=1e-5)
    assert nb.linear(x[:0], q, compute="int8").shape == (0, 9)


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_llm_int8_keeps_the_definition(tokens: int) -> None:
    q = _weight("int8")
    x = torch.randn(tokens, 384)
    x[:, [3, 200]] *= 12
    bias = torch.randn(70)
    got = ops.int8_linear(x, q.packed, q.absmax, bias, 6.0)
    expected = ops.reference.int8_linear(x, q.packed, q.absmax, bias, 6.0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
