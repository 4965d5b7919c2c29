"""What the machine itself can do, measured by torch in the same process as everything else."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import torch

from compare.timing import Contender, Pace, measure
from nybble import _machine

#: Bytes that are read to measure the bandwidth: more than a last-level cache holds.
BEYOND_CACHE = 128 << 20


def beyond_cache(fill: float = 1.0) -> torch.Tensor:
    """float32 of `BEYOND_CACHE` bytes, in huge pages where the system has them."""
    memory = mmap.mmap(-1, BEYOND_CACHE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(fill)


class Limits:
    """Bandwidth and dense matmul: contenders to stand in a cell, and figures of their own."""

    def __init__(self, pace: Pace) -> None:
        self._source, self._target = beyond_cache(), beyond_cache(2.0)
        ways: dict[str, Callable[[], object]] = {
            "aminmax": self._source.aminmax,
            "amax": self._source.amax,
            "dot": lambda: torch.dot(self._source, self._source),
        }
        found = measure([Contender(name, _ignore(way)) for name, way in ways.items()], pace)
        self.read_by = min(found, key=lambda name: found[name].seconds)
        #: Reads all of the source, by the quickest of torch's reductions.
        self.read = Contender("read", _ignore(ways[self.read_by]))
        self.copy = Contender("copy", lambda _: self._target.copy_(self._source))

    def figures(self, pace: Pace) -> dict[str, float]:
        """Read and copy in GB/s, torch's matmul at 512x4096 by 4096x4096 in GFLOP/s."""
        found = measure([self.read, self.copy, *dense()], pace)
        rates = {name: BEYOND_CACHE / found[name].seconds / 1e9 for name in ("read", "copy")}
        work = 2 * 512 * 4096 * 4096
        rates |= {name: work / found[name].seconds / 1e9 for name in ("T32", "T16")}
        return rates


def dense() -> list[Contender]:
    """T32 and T16: torch's linear in float32 and bfloat16 at M=512, 4096x4096."""
    made = []
    for name, dtype in (("T32", torch.float32), ("T16", torch.bfloat16)):
        x, weight = torch.randn(512, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)
        made.append(Contender(name, _linear(x, weight)))
    return made


def facts() -> dict[str, Any]:
    """Processor and versions, for the head of a table."""
    processor = _machine.processor()
    return {
        "processor": processor.name,
        "features": processor.features,
        "kernels": processor.kernels,
        "threads": _machine.threads().used,
        "torch_threads": torch.get_num_threads(),
        "versions": _machine.versions(),
    }


def _linear(x: torch.Tensor, weight: torch.Tensor) -> Callable[[int], object]:
    return lambda _: torch.nn.functional.linear(x, weight)


def _ignore(function: Callable[[], object]) -> Callable[[int], object]:
    return lambda _: function()
