"""The ops on CUDA tensors that have no memory: shapes, dtypes and devices, as tracers see them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import nybble as nb
from nybble import integer, ops


@pytest.fixture
def traced() -> Iterator[FakeTensorMode]:
    # Allocating real memory on a device that is not there would be an error.
    with FakeTensorMode() as mode:
        yield mode


def weight(format: str, nested: bool) -> tuple[tuple[torch.Tensor | None, ...], tuple]:
    w = torch.empty(24, 64, device="cuda", dtype=torch.float16)
    size = nb.formats()[[row["name"] for row in nb.formats()].index(format)]["default_blocksize"]
    parts = ops.quantize(w, format, size or 64, nested, "exact", "error")
    keep = (*parts[:2], *(parts[2:] if nested else (None, None)))
    return keep, (format, size or 64, [24, 64])


@pytest.mark.parametrize(
    ("format", "nested"),
    [("nf4", False), ("nf4", True), ("mxfp4", False), ("dynamic8", False), ("int8", False)],
)
@pytest.mark.usefixtures("traced")
def test_ops_keep_the_device_and_their_shapes(format, nested):
    parts, how = weight(format, nested)
    x = torch.empty(2, 3, 64, device="cuda", dtype=torch.bfloat16)
    ids = torch.empty(5, device="cuda", dtype=torch.int64)
    results = {
        "dequantize": (ops.dequantize(*parts, *how, torch.float16), (24, 64)),
        "linear": (torch.ops.nybble.linear(x, *parts, None, *how), (2, 3, 24)),
        "backward": (
            torch.ops.nybble.linear_backward(
                torch.empty(7, 24, device="cuda", dtype=torch.bfloat16), *parts, *how
            ),
            (7, 64),
        ),
        "embedding": (ops.embedding(ids, *parts, *how, torch.bfloat16), (5, 64)),
    }
    if format == "int8":
        results["int8"] = (ops.int8_linear(x, *parts[:2], None, 6.0), (2, 3, 24))
    if format != "dynamic8":
        results["integer"] = (integer.integer_linear(x, *parts, None, *how), (2, 3, 24))
    for name, (result, shape) in results.items():
        assert result.device == torch.device("cuda", 0), name
        assert tuple(result.shape) == shape, name
    assert results["linear"][0].dtype == torch.bfloat16
    assert results["dequantize"][0].dtype == torch.float16


@pytest.mark.usefixtures("traced")
def test_results_on_the_device_have_gradients():
    parts, how = weight("nf4", True)
    x = torch.empty(2, 64, device="cuda", requires_grad=True)
    y = torch.ops.nybble.linear(x, *parts, None, *how)
    # The engine itself runs only where the device is there.
    assert y.requires_grad
    assert "linear" in type(y.grad_fn).__name__.lower()
    assert not torch.ops.nybble.linear(x.detach(), *parts, None, *how).requires_grad


def test_tensors_of_a_device_take_the_kernels_written_for_it():
    if torch.version.hip is not None:
        pytest.skip("with ROCm the ops stay plain torch code")
    names = ("quantize", "dequantize", "dequantize_out", "linear", "linear_backward")
    for name in (*names, "embedding", "int8_linear", "integer_linear"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nybble::{name}", "CUDA"), name


def test_a_quantized_layer_is_traced_on_the_device_in_one_piece():
    layer = nb.nn.Linear4bit.from_qtensor(nb.quantize(torch.randn(24, 64), nested=True))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        parts = [mode.from_tensor(part).to("cuda") for part in layer.qtensor.parts]
        x = torch.empty(3, 64, device="cuda")
        graph = torch.fx.experimental.proxy_tensor.make_fx(
            lambda x: torch.relu(torch.ops.nybble.linear(x, *parts, None, *layer.qtensor.how))
        )(x)
    assert graph.code.count("nybble.linear") == 1


def test_moving_does_not_quantize_again():
    q = nb.quantize(torch.randn(24, 64), nested=True)
    moved = q.to("cpu")
    assert all(a is b for a, b in zip(moved.parts, q.parts, strict=True))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        from nybble.cuda import place

        place_follow, place.follow = place.follow, lambda device: seen.append(str(device))
        seen: list[str] = []
        try:
            there = nb.QTensor(
                packed=mode.from_tensor(q.packed),
                absmax=mode.from_tensor(q.absmax),
                nested_absmax=mode.from_tensor(q.nested_absmax),
                nested_offset=mode.from_tensor(q.nested_offset),
                format=q.format,
                shape=q.shape,
                dtype=q.dtype,
                blocksize=q.blocksize,
            ).to("cuda")
            back = there.cpu()
        finally:
            place.follow = place_follow
    assert seen == ["cuda:0", "cpu"]
    for part, moved_part, original in zip(there.parts, back.parts, q.parts, strict=True):
        assert part.device.type == "cuda"
        assert (part.dtype, part.shape) == (original.dtype, original.shape)
        assert (moved_part.dtype, moved_part.shape) == (original.dtype, original.shape)
