"""The ops on CUDA tensors that have no memory: shapes, dtypes and devices, as tracers see them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import nybble as nb
from nybble import integer, ops
from nybble.cuda import place


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


def test_moving_keeps_the_bits_and_quantizes_nothing():
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    layer = nb.nn.Linear4bit.from_qtensor(nb.quantize(torch.randn(24, 64), nested=True))
    original = layer.qtensor
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Watch():
        parts = [mode.from_tensor(part) for part in original.parts]
        q = nb.QTensor(
            packed=parts[0],
            absmax=parts[1],
            nested_absmax=parts[2],
            nested_offset=parts[3],
            format=original.format,
            shape=original.shape,
            dtype=original.dtype,
            blocksize=original.blocksize,
        )
        there = q.to("cuda")
        back = there.cpu()
    assert not any("nybble" in name for name in called), called
    for on_device, again, part in zip(there.parts, back.parts, original.parts, strict=True):
        assert (on_device.device.type, again.device.type) == ("cuda", "cpu")
        assert (on_device.dtype, on_device.shape) == (again.dtype, again.shape)
        assert (on_device.dtype, on_device.shape) == (part.dtype, part.shape)


def test_a_module_that_moves_has_the_kernels_of_its_device_loaded(monkeypatch):
    followed = []
    monkeypatch.setattr(place, "follow", lambda moved: followed.append(moved))
    layer = nb.nn.Linear4bit.from_qtensor(nb.quantize(torch.randn(24, 64)))
    nb.quantize(torch.randn(64)).to("cpu")
    assert [tensor.shape for tensor in followed] == [(32,)]
    layer.to("cpu")
    assert followed[-1] is layer.weight


def test_tables_are_copied_to_a_device_only_after_its_kernels_are_loaded(monkeypatch):
    def refuse(index: int, device: torch.device) -> str:
        raise nb.DeviceError(f"no kernels for {device} of index {index} during a capture")

    monkeypatch.setattr(place, "_warm_up", refuse)
    device = torch.device("cuda", 7)
    for format, nested in (("nf4", True), ("dynamic8", False)):
        # torch's own word for a copy in a capture would name neither nybble nor a remedy.
        with pytest.raises(nb.DeviceError, match="cuda:7 of index 7"):
            place.tables_for(format, nested, device)
    assert place.tables_for("nf4", False, device) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a device")
def test_a_device_that_is_not_there_is_an_error_of_torch_not_a_crash():
    with pytest.raises((RuntimeError, AssertionError)):
        nb.quantize(torch.randn(8, 64)).to("cuda")
