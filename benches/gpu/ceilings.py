"""What the machine can do at best: copying, reading, multiplying."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from gpu.backend import Backend, Check, backend, guarded
from gpu.records import Records
from gpu.timing import shapes

BYTES = 4 << 30


def run(records: Records, name: str, after: str | None) -> None:
    there = backend(name)
    guarded(records, "ceilings", there, _checks(there), after)


def _checks(there: Backend) -> Iterator[Check]:
    yield "copy", functools.partial(_copy, there)
    yield "read", functools.partial(_read, there)
    size = 64 if there.fake else 8192
    yield f"bf16 matmul {size}", functools.partial(_matmul, there, size)
    for n, k in shapes(there):
        for rows in (1, 8, 2048) if not there.fake else (1, 8):
            yield f"bf16 linear {n}x{k} M={rows}", functools.partial(_linear, there, n, k, rows)


def _numbers(there: Backend) -> torch.Tensor:
    return torch.zeros(min(BYTES, there.free_memory() // 4) // 4, device=there.device)


def _copy(there: Backend) -> dict[str, Any]:
    a = _numbers(there)
    b = torch.empty_like(a)
    us = there.clock.without_graph(lambda: b.copy_(a))
    return {"us": us, "gb_s": 2 * a.nbytes / us / 1e3}


def _read(there: Backend) -> dict[str, Any]:
    a = _numbers(there)
    us = there.clock.without_graph(a.sum)
    return {"us": us, "gb_s": a.nbytes / us / 1e3}


def _matmul(there: Backend, size: int) -> dict[str, Any]:
    x = there.random(size, size)
    us = there.clock.without_graph(lambda: x @ x)
    return {"us": us, "tflops": 2 * size**3 / us / 1e6}


def _linear(there: Backend, n: int, k: int, rows: int) -> dict[str, Any]:
    w, x = there.random(n, k), there.random(rows, k)
    return {"us": there.clock.microseconds(lambda _i: torch.nn.functional.linear(x, w), 5)}
