"""The device, and the ops on it: a CUDA device, or host memory with the fake driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nybble import _core, cuda, integer
from nybble.cuda import place

STREAM = 0xBEEF


@dataclass(frozen=True)
class Backend:
    """Where tensors are, and how an op is called there.

    Attributes:
        fake: Whether kernels run on the CPU.
        device: Where torch puts tensors.
    """

    fake: bool
    device: torch.device

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

    def wait(self) -> None:
        """Until the device is done."""
        if not self.fake:
            torch.cuda.synchronize()


def backend(name: str) -> Backend:
    """The backend, with its kernels loaded."""
    if name == "cuda":
        place.warmup(0)
        return Backend(False, torch.device("cuda", 0))
    _core.cuda_warmup((0, STREAM), place.nvrtc_library())
    place.where = lambda _tensor: (0, STREAM)
    return Backend(True, torch.device("cpu"))


def guarded(records: Any, stage: str, checks: Iterator[tuple[str, Callable[[], Any]]]) -> None:
    """Run checks one by one; a failure is a finding, not the end."""
    for name, check in checks:
        try:
            found = check()
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:300]}"
            records.add(stage, name, ok=False, error=text)
        else:
            records.add(stage, name, ok=True, **(found or {}))
