"""What this machine and this installation are: the facts that speed and errors depend on.

Every function answers with what it could find out and raises nothing: a fact that the system does
not tell is None. Only `torch_facts` imports torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from nybble import _core
from nybble.errors import DeviceError, Error

#: What nybble works with, by name of distribution; those that are not installed have no version.
PARTNERS = ("torch", "numpy", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes")

#: Variables that set the number of threads, the first that is set wins.
_THREAD_VARIABLES = ("NYBBLE_NUM_THREADS", "OMP_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Processor:
    """The processor and the kernels that run on it.

    Attributes:
        name: As the system gives it, or None.
        architecture: `x86_64`, `aarch64`, ...
        features: Extensions that matter to kernels, as the system lets programs use them.
        kernels: Instruction set of the kernels in use; None if `forced` cannot be had.
        available: Instruction sets that this build has kernels for and this machine can run,
            slowest first.
        forced: Value of `NYBBLE_CPU`, or None.
        problem: Why there are no kernels, or None.
    """

    name: str | None
    architecture: str
    features: list[str]
    kernels: str | None
    available: list[str]
    forced: str | None
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class Threads:
    """Threads of large tensors.

    Attributes:
        used: Number that nybble uses where the caller names none.
        source: The environment variable it comes from, or `machine`.
        cores: Processors that this process may run on.
    """

    used: int
    source: str
    cores: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Main memory, bytes.

    Attributes:
        total: Of the machine.
        available: What new programs can have without swapping.
        limit: Of the control group of this process, or None.
        huge_pages: Setting of transparent huge pages (`always`, `madvise`, `never`), or None.
    """

    total: int | None
    available: int | None
    limit: int | None
    huge_pages: str | None


@dataclass(frozen=True, kw_only=True)
class Torch:
    """What torch does on this processor.

    Attributes:
        threads: As `torch.get_num_threads()` says.
        native: Of float16 and bfloat16 those that it multiplies without widening to float32.
        problem: Why it cannot be imported, or None.
    """

    threads: int | None
    native: list[str]
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A CUDA device.

    Attributes:
        name: As the driver gives it.
        capability: Compute capability, like `9.0`.
        kernels: Which compiled kernels it gets.
    """

    name: str
    capability: str
    kernels: str


@dataclass(frozen=True, kw_only=True)
class Cuda:
    """The CUDA driver and its devices.

    Attributes:
        driver: Newest CUDA version that it supports, like `13.0`; None if it cannot be used.
        devices: GPUs that this process may use.
        problem: Why a driver that is there cannot be used, or None.
    """

    driver: str | None
    devices: list[Gpu]
    problem: str | None


def versions() -> dict[str, str | None]:
    """Versions of nybble, Python and the partners; None for one that is not installed."""
    found: dict[str, str | None] = {
        "nybble": _core.__version__,
        "python": platform.python_version(),
    }
    for name in PARTNERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def processor() -> Processor:
    """Ask the system for its name and the core for the rest."""
    forced = os.environ.get("NYBBLE_CPU") or None
    kernels, available, problem = None, list[str](), None
    try:
        kernels, available = _core.cpu()
    except Error as error:
        problem = str(error)
    return Processor(
        name=_processor_name(),
        architecture=platform.machine(),
        features=_core.cpu_features(),
        kernels=kernels,
        available=available,
        forced=forced,
        problem=problem,
    )


def threads() -> Threads:
    """The number of threads and where it comes from."""
    set_by = (name for name in _THREAD_VARIABLES if _positive(os.environ.get(name, "")))
    return Threads(
        used=_core.default_threads(), source=next(set_by, "machine"), cores=_usable_cores()
    )


def memory() -> Memory:
    """Memory of the machine and what this process may have of it."""
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE))
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    setting = re.search(r"\[(\w+)\]", _text("/sys/kernel/mm/transparent_hugepage/enabled"))
    return Memory(
        total=1024 * int(sizes["MemTotal"]) if "MemTotal" in sizes else None,
        available=1024 * int(sizes["MemAvailable"]) if "MemAvailable" in sizes else None,
        limit=int(limit) if limit.isdigit() else None,
        huge_pages=setting[1] if setting else None,
    )


def torch_facts() -> Torch:
    """What torch says; imports it."""
    try:
        import torch

        from nybble.ops import arithmetic
    except (ImportError, OSError, RuntimeError) as error:
        return Torch(threads=None, native=[], problem=f"torch cannot be imported: {error}")
    narrow = (torch.float16, torch.bfloat16)
    native = [str(dtype).removeprefix("torch.") for dtype in narrow if arithmetic(dtype) == dtype]
    return Torch(threads=torch.get_num_threads(), native=native, problem=None)


def cuda() -> Cuda:
    """Ask the driver. No device is used: nothing is loaded."""
    if not _core.cuda_driver_present():
        return Cuda(driver=None, devices=[], problem=None)
    try:
        from nybble.cuda.place import nvrtc_library

        nvrtc = nvrtc_library()
    except (ImportError, OSError, RuntimeError):  # what torch raises that cannot be imported
        nvrtc = None
    try:
        version, found = _core.cuda_devices(nvrtc)
    except DeviceError as error:
        return Cuda(driver=None, devices=[], problem=str(error))
    devices = [
        Gpu(
            name=device["name"],
            capability="{}.{}".format(*device["capability"]),
            kernels=device["kernels"],
        )
        for device in found
    ]
    # The driver writes 13.2 as 13020.
    return Cuda(driver=f"{version // 1000}.{version % 1000 // 10}", devices=devices, problem=None)


def _processor_name() -> str | None:
    listed = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return (listed[1].strip() if listed else platform.processor()) or None


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _positive(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def _text(path: str) -> str:
    """What a file of the system says; empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
