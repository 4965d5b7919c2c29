"""Times of products, decoding and quantizing, beside bitsandbytes and dense bf16."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import nybble as nb
from gpu.backend import Backend, Check, backend, guarded
from gpu.clock import LAUNCHES, copies, rotate
from gpu.records import Records

#: (out, in) of the weights: those of the targets first, since a deadline cuts off the end.
SHAPES = ((14336, 4096), (4096, 4096), (4096, 14336), (1024, 4096), (28672, 8192))
ROWS = (1, 8, 2048, 2, 4, 16, 32, 64, 128, 256, 512)
#: Rows at which one kernel and decoding are both timed, whichever is chosen.
BOTH_WAYS = (32, 64, 128, 256, 512)
BF16 = torch.bfloat16

Peers = dict[str, Callable[[int], object]]


def shapes(there: Backend) -> tuple[tuple[int, int], ...]:
    """Shapes of weights; tiny ones without a GPU."""
    return ((48, 128), (130, 64)) if there.fake else SHAPES


def run(records: Records, name: str, after: str | None) -> None:
    there = backend(name)
    ceilings = records.of("ceilings")
    peaks = {kind: ceilings.get(kind, {}).get("gb_s") for kind in ("copy", "read")}
    guarded(records, "timing", there, _checks(there, peaks), after)


def _checks(there: Backend, peaks: dict[str, float | None]) -> Iterator[Check]:
    rows = (1, 33, 256) if there.fake else ROWS
    for nested in (False, True):
        for n, k in shapes(there):
            work = Work(there, peaks, n, k, nested)
            for m in rows:
                yield f"linear nf4 {work.name} M={m}", functools.partial(work.linear, m)
            yield f"dequantize nf4 {work.name}", work.dequantize
            yield f"quantize nf4 {work.name}", work.quantize
    n, k = shapes(there)[0]
    for format in ("int8", "dynamic8"):
        for m in (1, 8):
            name = f"linear {format} {n}x{k} M={m}"
            yield name, functools.partial(_bytes, there, peaks, format, (n, k), m)


class Work:
    """What is timed with one weight. It is made when the first time is wanted."""

    def __init__(
        self, there: Backend, peaks: dict[str, float | None], n: int, k: int, nested: bool
    ) -> None:
        self.there, self.peaks, self.shape, self.nested = there, peaks, (n, k), nested
        self.name = f"{n}x{k}{' nested' if nested else ''}"

    @functools.cached_property
    def dense(self) -> torch.Tensor:
        return self.there.random(*self.shape)

    @functools.cached_property
    def weights(self) -> list[nb.QTensor]:
        q = nb.quantize(self.dense, "nf4", nested=self.nested)
        return [q] + [_copied(q) for _ in range(copies(q.nbytes) - 1)]

    @functools.cached_property
    def others(self) -> Others:
        return Others(self.dense, self.weights, self.nested)

    def linear(self, rows: int) -> dict[str, Any]:
        n, k = self.shape
        x = self.there.random(rows, k)
        us = self.there.clock.microseconds(lambda i: self.there.linear(x, rotate(self.weights, i)))
        peers = dict(self.others.linear(x))
        if rows in BOTH_WAYS:
            for name, fused in (("fused", True), ("decoded", False)):
                peers[name] = functools.partial(self._product, x, fused)
        return self._figures(us, self.weights[0].nbytes + 2 * rows * (n + k), peers)

    def _product(self, x: torch.Tensor, fused: bool, i: int) -> torch.Tensor:
        return self.there.product(x, rotate(self.weights, i), fused)

    def dequantize(self) -> dict[str, Any]:
        decode = self.there.op("dequantize")

        def launch(i: int) -> object:
            q = rotate(self.weights, i)
            return decode(*q.parts, *q.how, BF16)

        us = self.there.clock.microseconds(launch)
        nbytes = self.weights[0].nbytes + self.dense.nbytes
        return self._figures(us, nbytes, dict(self.others.dequantize()))

    def quantize(self) -> dict[str, Any]:
        # Reading back whether all values are finite would stop a graph.
        how = ("nf4", self.weights[0].blocksize, self.nested, "exact", "zero")
        quantize = self.there.op("quantize")
        us = self.there.clock.microseconds(lambda _i: quantize(self.dense, *how), 5)
        found = self._figures(us, self.weights[0].nbytes + self.dense.nbytes, {})
        if self.peaks["read"]:
            found["of_read"] = self.dense.nbytes / us / 1e3 / self.peaks["read"]
        return found

    def _figures(self, us: float, nbytes: int, peers: Peers) -> dict[str, Any]:
        found = _rate(us, nbytes, self.peaks)
        for peer, launch in peers.items():
            try:
                found[f"{peer}_us"] = self.there.clock.microseconds(launch)
                found[peer] = found[f"{peer}_us"] / us
            except Exception as error:
                if not self.there.is_usable():
                    raise
                found[f"{peer}_error"] = str(error)[:200]
        return found


def _rate(us: float, nbytes: int, peaks: dict[str, float | None]) -> dict[str, Any]:
    found: dict[str, Any] = {"us": us, "gb_s": nbytes / us / 1e3}
    if peaks["copy"]:
        found["of_peak"] = found["gb_s"] / peaks["copy"]
    return found


def _bytes(
    there: Backend,
    peaks: dict[str, float | None],
    format: str,
    shape: tuple[int, int],
    rows: int,
) -> dict[str, Any]:
    """Few rows of activations with codes of a byte, beside decoding them."""
    q = nb.quantize(there.random(*shape), format)
    weights = [q] + [_copied(q) for _ in range(copies(q.nbytes) - 1)]
    x = there.random(rows, shape[1])
    found = _rate(
        there.clock.microseconds(lambda i: there.linear(x, rotate(weights, i))), q.nbytes, peaks
    )
    decoded = there.clock.microseconds(lambda i: there.product(x, rotate(weights, i), False))
    return found | {"decoded_us": decoded, "decoded": decoded / found["us"]}


def _copied(q: nb.QTensor) -> nb.QTensor:
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
    except (RuntimeError, NotImplementedError):
        return None  # this torch takes another layout
    return packed, torch.ones(k // 64, n, 2, device=w.device, dtype=BF16)


class Others:
    """The same work by others; what is not installed is left out."""

    def __init__(self, w: torch.Tensor, weights: list[nb.QTensor], nested: bool) -> None:
        self._dense = [w] + [w.clone() for _ in range(min(len(weights), 4) - 1)]
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
            functional.quantize_4bit(
                w, blocksize=weights[0].blocksize, quant_type="nf4", compress_statistics=nested
            )
            for _ in range(min(len(weights), LAUNCHES))
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
