"""Times of products, decoding and quantizing, beside bitsandbytes and dense bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import nybble as nb
from gpu.clock import LAUNCHES, copies, microseconds, rotate
from gpu.records import Records

#: (out, in) of the weights.
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (28672, 8192))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
BF16 = torch.bfloat16


def run(records: Records, _name: str) -> None:
    known = {r["name"]: r for r in records.read()["records"] if r["stage"] == "ceilings"}
    peak = known.get("copy", {}).get("gb_s")
    # The shapes of the targets first: a deadline cuts off the end.
    for n, k in SHAPES:
        for nested in (False, True):
            _shape(records, n, k, nested, peak)
    for format in ("int8", "dynamic8"):
        _bytes(records, format, peak)


def _shape(records: Records, n: int, k: int, nested: bool, peak: float | None) -> None:
    w = torch.randn(n, k, device="cuda", dtype=BF16)
    q = nb.quantize(w, "nf4", nested=nested)
    count = copies(q.nbytes)
    weights = [q] + [_copied(q) for _ in range(count - 1)]
    text = f"{n}x{k}{' nested' if nested else ''}"
    rest = Others(w, weights, nested, count)

    def add(name: str, us: float, nbytes: int, peers: dict[str, Callable[[int], object]]) -> None:
        found: dict[str, Any] = {"us": us, "gb_s": nbytes / us / 1e3}
        if peak:
            found["of_peak"] = found["gb_s"] / peak
        for peer, launch in peers.items():
            try:
                found[f"{peer}_us"] = microseconds(launch)
                found[peer] = found[f"{peer}_us"] / us
            except Exception as error:
                found[f"{peer}_error"] = str(error)[:200]
        records.add("timing", name, **found)

    for rows in ROWS:
        x = torch.randn(rows, k, device="cuda", dtype=BF16)
        us = microseconds(lambda i, x=x: nb.linear(x, rotate(weights, i)))
        nbytes = q.nbytes + 2 * rows * (n + k)
        add(f"linear nf4 {text} M={rows}", us, nbytes, dict(rest.linear(x)))
    us = microseconds(lambda i: rotate(weights, i).dequantize(BF16))
    add(f"dequantize nf4 {text}", us, q.nbytes + 2 * n * k, dict(rest.dequantize()))
    # Reading back whether all values are finite would stop a graph.
    us = microseconds(
        lambda _i: torch.ops.nybble.quantize(w, "nf4", 64, nested, "exact", "zero"), 5
    )
    add(f"quantize nf4 {text}", us, q.nbytes + 2 * n * k, {})


def _bytes(records: Records, format: str, peak: float | None) -> None:
    """Few rows of activations with codes of a byte, beside decoding them."""
    n, k = SHAPES[1]
    q = nb.quantize(torch.randn(n, k, device="cuda", dtype=BF16), format)
    weights = [q] + [_copied(q) for _ in range(copies(q.nbytes) - 1)]
    for rows in (1, 8):
        x = torch.randn(rows, k, device="cuda", dtype=BF16)
        us = microseconds(lambda i, x=x: nb.linear(x, rotate(weights, i)))
        decoded = microseconds(
            lambda i, x=x: torch.nn.functional.linear(x, rotate(weights, i).dequantize(BF16))
        )
        found: dict[str, Any] = {"us": us, "gb_s": q.nbytes / us / 1e3}
        found |= {"dequantize_and_linear_us": decoded, "dequantize_and_linear": decoded / us}
        if peak:
            found["of_peak"] = found["gb_s"] / peak
        records.add("timing", f"linear {format} {n}x{k} M={rows}", **found)


def _copied(q: nb.QTensor) -> nb.QTensor:
    from dataclasses import replace

    parts = [None if part is None else part.clone() for part in q.parts]
    packed, absmax, nested_absmax, nested_offset = parts
    return replace(
        q, packed=packed, absmax=absmax, nested_absmax=nested_absmax, nested_offset=nested_offset
    )


def _torch_int4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A weight of the same size for torch's own int4 product, which no cache rotation spares."""
    n, k = w.shape
    codes = torch.randint(0, 256, (n, k // 2), device=w.device, dtype=torch.uint8)
    try:
        packed = torch._convert_weight_to_int4pack(codes, 8)
    except RuntimeError:
        return None  # this torch takes another layout
    return packed, torch.ones(k // 64, n, 2, device=w.device, dtype=BF16)


class Others:
    """The same work by others; what is not installed is left out."""

    def __init__(
        self, w: torch.Tensor, weights: list[nb.QTensor], nested: bool, count: int
    ) -> None:
        self._dense = [w] + [w.clone() for _ in range(min(count, 4) - 1)]
        self._weights = weights
        self._int4 = _torch_int4(w)
        self._bnb: Any = None
        try:
            import bitsandbytes
            from bitsandbytes import functional
        except ImportError:
            return
        self._module, self._functional = bitsandbytes, functional
        self._bnb = [
            functional.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
            for _ in range(min(count, LAUNCHES))
        ]

    def linear(self, x: torch.Tensor) -> Iterator[tuple[str, Callable[[int], object]]]:
        """Peers of a product, by name."""
        if self._bnb:

            def bnb(i: int) -> object:
                packed, state = rotate(self._bnb, i)
                return self._module.matmul_4bit(x, packed.t(), quant_state=state)

            yield "bitsandbytes", bnb
        yield "dequantize_and_linear", lambda i: self._decode_and_multiply(x, i)
        if self._int4 is not None:
            packed, scales = self._int4
            yield "torch_int4", lambda _i: torch._weight_int4pack_mm(x, packed, 64, scales)
        yield "dense", lambda i: torch.nn.functional.linear(x, rotate(self._dense, i))

    def _decode_and_multiply(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return torch.nn.functional.linear(x, rotate(self._weights, i).dequantize(BF16))

    def dequantize(self) -> Iterator[tuple[str, Callable[[int], object]]]:
        """Peers of decoding, by name."""
        if self._bnb:
            yield "bitsandbytes", lambda i: self._functional.dequantize_4bit(*rotate(self._bnb, i))
