"""The device, and the ops on it: a CUDA device, or host memory with the fake driver."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import nybble as nb
from gpu.clock import DeviceClock, HostClock
from gpu.records import LOST, Records
from nybble import _core, cuda, integer
from nybble.cuda import place

STREAM = 0xBEEF

Check = tuple[str, Callable[[], "dict[str, Any] | None"]]


@dataclass(frozen=True)
class Backend:
    """Where tensors are, and how an op is called there.

    Attributes:
        fake: Whether kernels run on the CPU.
        device: Where torch puts tensors.
        clock: What tells times.
    """

    fake: bool
    device: torch.device
    clock: DeviceClock | HostClock

    def op(self, name: str) -> Callable[..., Any]:
        """An op of `torch.ops.nybble`, in the form that is registered for CUDA."""
        if not self.fake:
            found: Callable[..., Any] = getattr(torch.ops.nybble, name)
            return found
        if name == "integer_linear":
            return integer._integer_linear_cuda
        home = cuda.ops if hasattr(cuda.ops, name) else cuda.products
        straight: Callable[..., Any] = getattr(home, name)
        return straight

    def linear(self, x: torch.Tensor, q: nb.QTensor) -> torch.Tensor:
        """A product, the way a user has it."""
        y: torch.Tensor = (
            self.op("linear")(x, *q.parts, None, *q.how) if self.fake else nb.linear(x, q)
        )
        return y

    def product(self, x: torch.Tensor, q: nb.QTensor, fused: bool) -> torch.Tensor:
        """The same by one kernel, or by decoding and torch's product."""
        weight = place.weight(*q.parts, *q.how)
        return cuda.products.product(weight, x, q.packed, None, *q.how, fused=fused)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Numbers there."""
        return torch.randn(shape, device=self.device, dtype=dtype)

    def wait(self) -> None:
        """Until the device is done."""
        if not self.fake:
            torch.cuda.synchronize()

    def free_memory(self) -> int:
        """Bytes that can be allocated there."""
        return 1 << 20 if self.fake else torch.cuda.mem_get_info()[0]

    def is_usable(self) -> bool:
        """Whether it still does what it is told: after an illegal access a process is lost."""
        try:
            self.wait()
        except Exception:
            return False
        return True


def backend(name: str) -> Backend:
    """The backend, with its kernels loaded."""
    if name == "cuda":
        place.warmup(0)
        return Backend(False, torch.device("cuda", 0), DeviceClock())
    _core.cuda_warmup((0, STREAM), place.nvrtc_library())
    place.where = lambda _tensor: (0, STREAM)
    return Backend(True, torch.device("cpu"), HostClock())


def guarded(
    records: Records, stage: str, there: Backend, checks: Iterator[Check], after: str | None
) -> None:
    """Run checks one by one, those up to `after` left out; a failure is a finding, not the end.

    Where the device is lost with it, this process ends; another can go on after the check.
    """
    waiting = after is not None
    for name, check in checks:
        if waiting:
            waiting = name != after
            continue
        records.begin(stage, name)
        try:
            found = check()
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:300]}"
            records.add(stage, name, ok=False, error=text)
            if not there.is_usable():
                sys.exit(LOST)
        else:
            records.add(stage, name, ok=True, **(found or {}))
    records.begin(stage, None)
