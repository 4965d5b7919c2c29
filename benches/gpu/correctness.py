"""Every kernel against the CPU: equal bits, or products within the error that is allowed."""

from __future__ import annotations

import functools
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import nybble as nb
from gpu import child
from gpu.backend import Backend, Check, backend, guarded
from gpu.records import Records
from nybble import cuda, integer

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: Relative error of a product, by norm.
ALLOWED = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
#: At most this times the error of decoding and multiplying.
BESIDE_DECODED = 1.2

FORMATS = (
    ("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int4", False),
    ("mxfp4", False), ("dynamic8", False), ("dynamic8u", False), ("int8", False),
)  # fmt: skip


#: Rows of activations: those of every kernel, and one beyond.
ROWS = (1, 2, 5, 8, 9, 17, 32, 33, 65, 200, 256, 257)


def run(records: Records, name: str, after: str | None) -> None:
    there = backend(name)
    # Memory that torch hands out for results is full of NaN, or of the largest integers.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    guarded(records, "correctness", there, _checks(there), after)


def _checks(there: Backend) -> Iterator[Check]:
    """What is quickest and says most first: a deadline cuts off the end."""
    yield "llm.int8", functools.partial(_int8, there)
    yield "a row that is not finite gives NaN", functools.partial(_not_finite, there)
    yield "misaligned codes are refused", functools.partial(_misaligned, there)
    yield "a value that is not finite is an error", functools.partial(_nonfinite, there)
    yield "a second thread", functools.partial(_thread, there)
    if not there.fake:
        yield "a stream of its own", functools.partial(_stream, there)
        yield "a capture as the first work", _first_capture
        yield "capture and replay", functools.partial(_capture, there)
        yield "gradients", functools.partial(_gradients, there)
        yield "a module that moves", functools.partial(_module, there)
        yield "a compiled module", functools.partial(_compiled, there)
        if torch.cuda.device_count() > 1:
            yield "a second device", _second_device
        yield "bitsandbytes decodes alike", functools.partial(_bitsandbytes, there)
    for format, nested in FORMATS:
        text = f"{format}{' nested' if nested else ''}"
        yield f"statistics {text}", functools.partial(_statistics, there, format, nested)
        if format in ("nf4", "fp4", "int4", "mxfp4"):
            yield f"integers {text}", functools.partial(_integers, there, format, nested)
    shapes = (
        [(33, 64), (7, 129)] if there.fake else [(1, 1), (129, 1024), (1000, 129), (4096, 4096)]
    )
    for shape in shapes:
        for format, nested in FORMATS:
            for blocksize in _blocksizes(there, format, shape):
                how = (format, nested, blocksize, shape)
                text = f"{format}{' nested' if nested else ''} {blocksize or ''} {shape}"
                yield f"blocks {text}", functools.partial(_blocks, there, *how)
                yield f"products {text}", functools.partial(_products, there, *how)


def _blocksizes(there: Backend, format: str, shape: tuple[int, int]) -> list[int] | list[None]:
    """Those to check a format with; a large weight takes too long for all of them."""
    spec = next(row for row in nb.formats() if row["name"] == format)
    sizes = (64,) if there.fake or shape[0] * shape[1] > 1 << 20 else (32, 64, 256, 4096)
    return [size for size in sizes if size in spec["blocksizes"]] or [None]


def _on(there: Backend, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if there.fake else tensor.to(there.device)


def _weight(format: str, nested: bool, blocksize: int | None, shape: tuple[int, int]) -> Any:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return (w.abs() if format == "dynamic8u" else w), {
        "format": format,
        "nested": nested,
        "blocksize": blocksize,
    }


def _same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    a = a.cpu()
    if a.dtype != b.dtype or a.shape != b.shape:
        raise AssertionError(f"{what}: {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}")
    # A tensor without dimensions has no view in bytes.
    bits = [t.reshape(-1).view(torch.uint8) for t in (a, b)]
    if not torch.equal(*bits):
        raise AssertionError(f"{what}: {int((a != b).sum())} of {a.numel()} elements differ")


def _blocks(there: Backend, format: str, nested: bool, blocksize: int | None, shape: Any) -> None:
    w, how = _weight(format, nested, blocksize, shape)
    for dtype in FLOATS:
        q = nb.quantize(w.to(dtype), **how)
        x = _on(there, w.to(dtype))
        parts = there.op("quantize")(x, format, q.blocksize, nested, "exact", "error")
        for part, expected in zip(parts, q.parts, strict=True):
            if expected is not None:
                _same(part, expected, f"quantize {dtype}")
        moved = [None if part is None else _on(there, part) for part in q.parts]
        out = torch.full(shape, torch.nan, dtype=dtype, device=there.device)
        there.op("dequantize_out")(*moved, *q.how, out)
        _same(out, q.dequantize(dtype), f"dequantize {dtype}")


def _products(
    there: Backend, format: str, nested: bool, blocksize: int | None, shape: Any
) -> dict[str, Any]:
    w, how = _weight(format, nested, blocksize, shape)
    q = nb.quantize(w, **how)
    moved = [None if part is None else _on(there, part) for part in q.parts]
    # Decoded on the CPU, multiplied in float64 wherever that is quick.
    weight = {dtype: _on(there, q.dequantize(dtype)) for dtype in FLOATS}
    decoded = weight[torch.float32].double()
    worst: dict[str, Any] = {}
    for dtype in FLOATS:
        name = str(dtype).removeprefix("torch.")
        for rows in (1, 5, 33, 130) if there.fake else ROWS:
            for bias in (None, _on(there, torch.randn(shape[0]))):
                x = _on(there, torch.randn(rows, shape[1]).to(dtype))
                got = there.op("linear")(x, *moved, bias, *q.how).double()
                exact = x.double() @ decoded.T + (0 if bias is None else bias.double())
                error = _relative(got, exact)
                plain = x @ weight[dtype].T
                plain = plain if bias is None else plain + bias.to(dtype)
                beside = _relative(plain.double(), exact)
                limit = max(ALLOWED[dtype], BESIDE_DECODED * beside)
                if not error <= limit:
                    raise AssertionError(f"{dtype}, {rows} rows: error {error:.2e} > {limit:.2e}")
                worst[f"error_{name}"] = max(worst.get(f"error_{name}", 0.0), _short(error))
                if rows == 1 and bias is None:
                    worst[f"error_{name}_1_row"] = _short(error)
                    worst[f"error_{name}_1_row_decoded"] = _short(beside)
    return worst


def _short(figure: float) -> float:
    return float(f"{figure:.3g}")


def _relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got - exact).norm() / exact.norm().clamp(min=1e-30))


def _int8(there: Backend) -> None:
    q = nb.quantize(torch.randn(40, 96), "int8")
    packed, absmax = _on(there, q.packed), _on(there, q.absmax)
    for dtype in FLOATS:
        for rows, threshold in ((3, 0.0), (40, 0.0), (3, 2.0), (40, 2.0)):
            x = torch.randn(rows, 96).to(dtype)
            got = there.op("int8_linear")(_on(there, x), packed, absmax, None, threshold)
            exact = nb.ops.int8_linear(x, q.packed, q.absmax, None, threshold)
            error = _relative(got.cpu().double(), exact.double())
            if not error <= ALLOWED[dtype]:
                raise AssertionError(f"{dtype}, {rows} rows, {threshold}: error {error:.2e}")


def _statistics(there: Backend, format: str, nested: bool) -> None:
    """Equal to the CPU's in every bit, over several runs."""
    w, how = _weight(format, nested, None, (300, 500))
    for dtype in FLOATS:
        q = nb.quantize(w.to(dtype), **how)
        moved = [None if part is None else _on(there, part) for part in q.parts]
        got = cuda.ops.error_stats(_on(there, w.to(dtype)), *moved, *q.how)
        if (expected := nb.error(w.to(dtype), q)) != nb.ErrorStats(**got):
            raise AssertionError(f"{dtype}: {got}, not {expected}")


def _integers(there: Backend, format: str, nested: bool) -> None:
    for columns in (320, 77):
        q = nb.quantize(torch.randn(40, columns), format, nested=nested)
        moved = [None if part is None else _on(there, part) for part in q.parts]
        for dtype in FLOATS:
            for rows in (1, 5, 33):
                x = torch.randn(rows, columns).to(dtype)
                got = there.op("integer_linear")(_on(there, x), *moved, None, *q.how)
                exact = integer.definition(x.double(), *q.parts, None, *q.how)
                error = _relative(got.cpu().double(), exact)
                if not error <= ALLOWED[dtype]:
                    raise AssertionError(f"{dtype}, {rows} rows of {columns}: error {error:.2e}")


def _not_finite(there: Backend) -> None:
    q = nb.quantize(torch.randn(24, 64), "int8")
    packed, absmax = _on(there, q.packed), _on(there, q.absmax)
    for rows in (3, 20):
        for threshold in (0.0, 2.0):
            x = torch.randn(rows, 64)
            x[1, 7], x[2, 9] = torch.nan, torch.inf
            got = there.op("int8_linear")(_on(there, x), packed, absmax, None, threshold).cpu()
            if not got[1:3].isnan().all() or not got[0].isfinite().all():
                raise AssertionError(f"{rows} rows, threshold {threshold}")


def _misaligned(there: Backend) -> None:
    q = nb.quantize(torch.randn(64, 64))
    packed = _on(there, torch.cat([q.packed[:1], q.packed]))[1:]
    try:
        there.op("dequantize")(packed, _on(there, q.absmax), None, None, *q.how, torch.float32)
    except nb.DeviceError:
        return
    raise AssertionError("no error")


def _nonfinite(there: Backend) -> None:
    x = torch.randn(64, 64)
    x[5, 3] = torch.inf
    try:
        there.op("quantize")(_on(there, x), "nf4", 64, False, "exact", "error")
    except nb.FormatError as error:
        if "position 323 " not in str(error):
            raise AssertionError(str(error)) from error
        return
    raise AssertionError("no error")


def _thread(there: Backend) -> None:
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            _blocks(there, "nf4", True, 64, (64, 64))
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if wrong:
        raise wrong[0]


def _stream(there: Backend) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a kernel on another stream would be done before this
        _blocks(there, "nf4", True, 64, (1000, 128))


def _capture(there: Backend) -> None:
    q = nb.quantize(torch.randn(256, 512), nested=True).to(there.device)
    for rows in (1, 8, 50, 200, 300):
        x = torch.randn(rows, 512, device=there.device, dtype=torch.bfloat16)
        static = x.clone()
        graph = torch.cuda.CUDAGraph()
        nb.linear(static, q)
        with torch.cuda.graph(graph):
            y = nb.linear(static, q)
        static.copy_(x.flip(0) * 2)
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        again = nb.linear(x.flip(0) * 2, q)
        if rows <= 256:
            _same(y, again.cpu(), f"{rows} rows")
        else:  # torch may multiply in another order in a graph
            torch.testing.assert_close(y, again, rtol=2e-2, atol=2e-2)


_CAPTURE = """
import torch, nybble as nb
q = nb.quantize(torch.randn(256, 512))
x = torch.randn(9, 512, device="cuda", dtype=torch.bfloat16)
packed = q.to("cuda")  # loads the kernels
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = nb.linear(x, packed)
graph.replay()
torch.cuda.synchronize()
assert torch.equal(y, nb.linear(x, packed))
"""


def _first_capture() -> None:
    """Kernels that were loaded but never launched can be captured."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        code, text = child.run([sys.executable, "-c", _CAPTURE], 40, log)
    if code != 0:
        raise AssertionError(text[-250:])


def _compiled(there: Backend) -> None:
    layer = nb.nn.Linear4bit.from_qtensor(nb.quantize(torch.randn(96, 128))).to(there.device)
    x = torch.randn(3, 128, device=there.device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def _gradients(there: Backend) -> None:
    q = nb.quantize(torch.randn(256, 512))
    x = torch.randn(70, 512, requires_grad=True)
    y = nb.linear(x.to(there.device), q.to(there.device))
    y.sum().backward()
    expected = torch.ones(70, 256) @ q.dequantize()
    assert x.grad is not None
    error = _relative(x.grad.double(), expected.double())
    if not error <= 1e-4:
        raise AssertionError(f"error {error:.2e}")


def _module(there: Backend) -> None:
    layer = nb.nn.Linear4bit.from_qtensor(nb.quantize(torch.randn(96, 128), nested=True))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    moved = layer.to(there.device)
    moved(torch.randn(2, 128, device=there.device))
    for key, value in moved.to("cpu").state_dict().items():
        _same(value, before[key], key)


def _second_device() -> None:
    q = nb.quantize(torch.randn(64, 64))
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        _same(q.to(device).dequantize(), q.dequantize(), device)
    if torch.cuda.current_device() != 0:
        raise AssertionError("the current device is another one")
    try:
        cuda.products.linear(
            torch.randn(1, 64, device="cuda:0"), *q.to("cuda:1").parts, None, *q.how
        )
    except nb.DeviceError:
        return
    raise AssertionError("tensors of two devices were multiplied")


def _bitsandbytes(there: Backend) -> dict[str, Any]:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        return {"skipped": str(error)[:200]}
    w = torch.randn(512, 1024, device=there.device, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = there.op("dequantize")(
        packed.flatten(), state.absmax, None, None, "nf4", 64, [512, 1024], torch.bfloat16
    )
    theirs = functional.dequantize_4bit(packed, state)
    # Their fast-math decoding is not the gate; how many differ is reported.
    return {"differ": int((ours != theirs).sum()), "of": ours.numel()}
