"""The torch ops: registration, gradients, tracing, autocast."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import nybble as nb
from nybble import ops as nb_ops
from nybble import products, reference
from strategies import (
    NAMES,
    assert_product,
    dtypes,
    for_format,
    matrices,
    seeds,
    settings_of,
    tensor,
)

ops = torch.ops.nybble

# torch's own checker looks at `.grad` of tensors that have none.
leaf_warning = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@leaf_warning
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_ops_are_registered_as_torch_demands(name, nested):
    if nested and name not in ("nf4", "fp4", "int4"):
        return
    w = for_format(torch.randn(24, 40), name)
    q = nb.quantize(w, name, nested=nested)
    x = torch.randn(3, 40, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    ids = torch.tensor([[0, 3], [23, 1]])
    check = torch.library.opcheck
    check(ops.quantize.default, (w, name, q.blocksize, nested, "exact", "error"))
    check(ops.dequantize.default, (*q.parts, *q.how, torch.bfloat16))
    check(ops.dequantize_out.default, (*q.parts, *q.how, torch.empty(24, 40)))
    check(ops.linear.default, (x, *q.parts, bias, *q.how))
    check(ops.linear.default, (x.detach(), *q.parts, None, *q.how))
    check(ops.embedding.default, (ids, *q.parts, *q.how, torch.float32))
    if name == "int8":
        check(ops.int8_linear.default, (x, q.packed, q.absmax, bias, 2.0))


@given(settings_of(), matrices, dtypes, seeds)
def test_linear_is_dequantize_and_matmul(how, shape, dtype, seed):
    w = for_format(tensor(shape, dtype, seed), how["format"])
    q = nb.quantize(w, **how)
    x, bias = torch.randn(2, 3, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    assert_product(nb.linear(x, q, bias), x, q, bias)
    assert_product(reference.linear(x, *q.parts, bias, *q.how), x, q, bias)


def test_a_large_weight_is_multiplied_by_few_and_many_rows():
    w = torch.randn(2100, 2048)
    q = nb.quantize(w, "nf4", nested=True)
    for rows in (1, 5, 600):
        x, bias = torch.randn(rows, 2048), torch.randn(2100)
        assert_product(nb.linear(x, q, bias), x, q, bias)


@given(settings_of(), matrices, seeds)
def test_gradients_are_those_of_the_decoded_weight(how, shape, seed):
    w = for_format(tensor(shape, torch.float32, seed), how["format"])
    q = nb.quantize(w, **how)
    x = torch.randn(3, shape[1], requires_grad=True)
    bias = torch.randn(shape[0], requires_grad=True)
    grad = torch.randn(3, shape[0])
    nb.linear(x, q, bias).backward(grad)
    torch.testing.assert_close(x.grad, grad @ q.dequantize())
    torch.testing.assert_close(bias.grad, grad.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_and_their_gradients_are_those_of_the_decoded_weight(dtype):
    q = nb.quantize(torch.randn(6, 64), "nf4")
    weight = q.dequantize(torch.float32).to(dtype)
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    bias = torch.randn(6, dtype=dtype, requires_grad=True)
    found = []
    for product in (
        lambda: nb.linear(x, q, bias),
        lambda: torch.ops.nybble.linear(x, *q.parts, bias, *q.how),
        lambda: torch.nn.functional.linear(x, weight, bias),
    ):
        y = product()
        first = torch.autograd.grad(y.square().sum(), (x, bias), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (x, bias))
        found.append((y, *first, *second))
    for ours in found[:2]:
        for got, want in zip(ours, found[2], strict=True):
            # Sums of up to 64 terms of like sizes, thrice in a row.
            torch.testing.assert_close(
                got, want, rtol=1e-4, atol=1e-4 * float(want.detach().abs().max())
            )


def test_autocast_decides_the_dtype_as_for_torchs_linear():
    q = nb.quantize(torch.randn(8, 64))
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = nb.linear(x, q)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_linear_has_no_graph_break_and_the_same_values(backend):
    q = nb.quantize(torch.randn(16, 64), nested=True)

    def run(x):
        return nb.linear(torch.relu(x), q).sum(-1)

    x = torch.randn(4, 64)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), run(x))
    a, b = (x.clone().requires_grad_() for _ in range(2))
    compiled(a).sum().backward()
    run(b).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_wrong_shapes_are_refused_before_any_kernel():
    q = nb.quantize(torch.randn(8, 64))
    with pytest.raises((RuntimeError, ValueError), match=r"63|64"):
        nb.linear(torch.randn(2, 63), q)
    with pytest.raises((RuntimeError, ValueError), match="rank 2"):
        nb.linear(torch.randn(2, 64), nb.quantize(torch.randn(512)))
    with pytest.raises((RuntimeError, TypeError), match="floating"):
        nb.linear(torch.ones(2, 64, dtype=torch.int64), q)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (2, 0), (0, 2), (2, 1, 3)])
def test_results_are_laid_out_as_torch_does(monkeypatch, batch, rows, private):
    if not private:
        monkeypatch.setattr(products, "_empty", products._empty_strided)
    q = nb.quantize(torch.randn(rows, 32), "nf4")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = torch.randn(*batch, 32, dtype=torch.bfloat16)
            y, like = nb.linear(x, q), x.new_empty((*batch, rows))
        assert (y.shape, y.stride(), y.dtype) == (like.shape, like.stride(), like.dtype)
        assert y.is_inference() == like.is_inference()
        assert y.is_contiguous()


@given(matrices, seeds)
def test_int8_activations_are_within_their_rounding(shape, seed):
    q = nb.quantize(tensor(shape, torch.float32, seed), "int8")
    x = torch.randn(4, shape[1])
    got = ops.int8_linear(x, q.packed, q.absmax, None, 0.0)
    exact = nb.linear(x, q)
    # Each activation moves by at most half a step, absmax / 254.
    step = x.abs().amax(1, keepdim=True) / 254
    bound = step * q.dequantize().abs().sum(1) * 1.001 + 1e-6
    assert bool(((got - exact).abs() <= bound).all())
    torch.testing.assert_close(
        got, reference.int8_linear(x, q.packed, q.absmax, None, 0.0), rtol=1e-5, atol=1e-6
    )


def test_outlier_columns_are_multiplied_in_full_precision():
    q = nb.quantize(torch.randn(32, 64), "int8")
    x = torch.randn(20, 64)
    x[3, 5] = 90.0
    exact = nb.linear(x, q)
    coarse = (ops.int8_linear(x, q.packed, q.absmax, None, 0.0) - exact).abs().max()
    fine = (ops.int8_linear(x, q.packed, q.absmax, None, 6.0) - exact).abs().max()
    assert fine < coarse / 5


def test_the_short_way_is_not_taken_where_torch_wants_to_see_the_op():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q = nb.quantize(torch.randn(8, 64))
    x = torch.randn(2, 64)
    with Watch():
        watched = nb.linear(x, q)
    assert "nybble.linear.default" in seen
    assert torch.equal(watched, nb.linear(x, q))
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: nb.linear(x, q))(x)
    assert "nybble.linear" in graph.code
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert nb.linear(mode.from_tensor(x), q).shape == (2, 8)


def test_the_definition_of_llm_int8_rounds_a_factor_once():
    # torch takes 127 / tensor for 127 times the reciprocal, rounded twice. Values half way between
    # two codes, and their neighbours, tell the one from the other.
    scale = 1 + torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    half = (torch.arange(64, 127) + 0.5).repeat(20_000 // 63 + 1)[:20_000, None] * scale / 127
    x = torch.cat([scale, half, torch.nextafter(half, scale), torch.nextafter(half, 0 * half)], 1)
    x = torch.cat([x, torch.zeros_like(x)], 1)
    once, twice = torch.full_like(scale, 127) / scale, scale.reciprocal() * 127
    assert not torch.equal(torch.round(x * once), torch.round(x * twice))
    weight = torch.eye(8, dtype=torch.int8) * 127
    expected = reference.int8_linear(x, weight, torch.ones(8), None, 0.0)
    assert torch.equal(nb_ops.int8_linear(x, weight, torch.ones(8), None, 0.0), expected)
