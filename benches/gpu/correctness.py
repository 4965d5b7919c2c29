"""Every kernel against the CPU: equal bits, or products within the error that is allowed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

import nybble as nb
from gpu.backend import Backend, backend, guarded
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

Check = tuple[str, Callable[[], "dict[str, Any] | None"]]


def run(records: Records, name: str) -> None:
    there = backend(name)
    # Memory that torch hands out for results is full of NaN, or of the largest integers.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    guarded(records, "correctness", _checks(there))


def _checks(there: Backend) -> Iterator[Check]:
    shapes = (
        [(33, 64), (7, 129)] if there.fake else [(4096, 4096), (1000, 129), (129, 1024), (1, 1)]
    )
    sizes = (64,) if there.fake else (32, 64, 256, 4096)
    for format, nested in FORMATS:
        spec = next(row for row in nb.formats() if row["name"] == format)
        for blocksize in [size for size in sizes if size in spec["blocksizes"]] or [None]:
            for shape in shapes:
                how = (format, nested, blocksize, shape)
                text = f"{format}{' nested' if nested else ''} {blocksize or ''} {shape}"
                yield f"blocks {text}", functools.partial(_blocks, there, *how)
                yield f"products {text}", functools.partial(_products, there, *how)
    yield "llm.int8", functools.partial(_int8, there)
    for format, nested in FORMATS:
        yield (
            f"statistics {format}{' nested' if nested else ''}",
            functools.partial(_statistics, there, format, nested),
        )
        if format in ("nf4", "fp4", "int4", "mxfp4"):
            yield (
                f"integers {format}{' nested' if nested else ''}",
                functools.partial(_integers, there, format, nested),
            )
    yield "a row that is not finite gives NaN", functools.partial(_not_finite, there)
    yield "misaligned codes are refused", functools.partial(_misaligned, there)
    yield "a value that is not finite is an error", functools.partial(_nonfinite, there)
    yield "a second thread", functools.partial(_thread, there)
    if not there.fake:
        yield "a stream of its own", functools.partial(_stream, there)
        yield "capture and replay", functools.partial(_capture, there)
        yield "gradients", functools.partial(_gradients, there)
        yield "a module that moves", functools.partial(_module, there)
        if torch.cuda.device_count() > 1:
            yield "a second device", _second_device
        yield "bitsandbytes decodes alike", functools.partial(_bitsandbytes, there)


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
    decoded = q.dequantize(torch.float32).double()
    worst: dict[str, Any] = {}
    for dtype in FLOATS:
        for rows in (1, 5, 33) if there.fake else (1, 2, 5, 8, 9, 17, 32, 33, 64, 65, 200):
            for bias in (None, torch.randn(shape[0])):
                x = torch.randn(rows, shape[1]).to(dtype)
                moved_bias = None if bias is None else _on(there, bias)
                got = there.op("linear")(_on(there, x), *moved, moved_bias, *q.how).cpu().double()
                exact = x.double() @ decoded.T + (0 if bias is None else bias.double())
                error = _relative(got, exact)
                plain = x @ q.dequantize(dtype).T
                plain = plain if bias is None else plain + bias.to(dtype)
                limit = max(ALLOWED[dtype], BESIDE_DECODED * _relative(plain.double(), exact))
                if not error <= limit:
                    raise AssertionError(f"{dtype}, {rows} rows: error {error:.2e} > {limit:.2e}")
                key = f"error_{str(dtype).removeprefix('torch.')}"
                worst[key] = max(worst.get(key, 0.0), float(f"{error:.3g}"))
    return worst


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
    for rows in (1, 8, 50, 200):
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
        _same(y, nb.linear(x.flip(0) * 2, q).cpu(), f"{rows} rows")


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
