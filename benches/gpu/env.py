"""What the machine is, what loading the kernels costs, and what a launch costs."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import nybble as nb
from gpu import child
from gpu.backend import backend
from gpu.records import Records
from nybble import _core, cuda
from nybble.cuda import place

LAUNCHES = 10_000
#: Ways to have kernels on a device, each in a process of its own; the cache is empty at first.
LOADS: dict[str, dict[str, str]] = {
    "first": {},
    "again": {},
    "PTX": {"NYBBLE_CUDA_IMAGES": "ptx"},
    "compiled here": {"NYBBLE_CUDA_IMAGES": "compiled"},
    "compiled here before": {"NYBBLE_CUDA_IMAGES": "cached"},
}

#: What is said where there is no such way: no compiled kernels in this build, or no NVRTC.
ABSENT = ("names none of", "NVRTC is not installed", "none is in the cache")

# Loads the kernels in a fresh process; what it prints is how long that took, and which they are.
_LOAD = """
import sys, time
from nybble import _core
import torch
if sys.argv[1] == "cuda":
    torch.zeros(1, device="cuda")  # torch's own start is not ours
start = time.perf_counter()
which = _core.cuda_warmup((0, 0), sys.argv[2] or None)
print(time.perf_counter() - start, which, sep="\\t")
"""


def run(records: Records, name: str, _after: str | None) -> None:
    version, devices = _core.cuda_devices(place.nvrtc_library())
    facts: dict[str, Any] = {
        "device": devices[0]["name"],
        "devices": len(devices),
        "capability": list(devices[0]["capability"]),
        "kernels": devices[0]["kernels"],
        "driver": f"{version // 1000}.{version % 1000 // 10}",
        "torch": torch.__version__,
        "nybble": nb.__version__,
        "python": sys.version.split()[0],
    }
    if name == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["multiprocessors"] = properties.multi_processor_count
        facts["l2_bytes"] = properties.L2_cache_size
        facts["memory_bytes"] = properties.total_memory
    records.add("env", "device", **facts)
    with tempfile.TemporaryDirectory() as cache:
        for how, settings in LOADS.items():
            records.add("env", f"load kernels, {how}", **_load(name, cache, settings))
    _launch_overhead(records, name)


def _load(name: str, cache: str, settings: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-c", _LOAD, name, place.nvrtc_library() or ""]
    env = os.environ | {"XDG_CACHE_HOME": cache} | settings
    code, text = child.run(command, 25, Path(cache) / "load.log", env=env)
    if code != 0:
        why = text.strip()[-300:] or f"ended with {code}"
        # One way alone that this build or machine has not is no failure of it.
        absent = bool(settings) and any(text in why for text in ABSENT)
        return {"skipped": why} if absent else {"ok": False, "error": why}
    seconds, which = text.strip().splitlines()[-1].split("\t")
    return {"ok": True, "ms": round(1000 * float(seconds), 2), "kernels": which}


def _launch_overhead(records: Records, name: str) -> None:
    there = backend(name)
    q = (
        nb.quantize(torch.randn(64)).to(there.device)
        if not there.fake
        else nb.quantize(torch.randn(64))
    )
    out = torch.empty(64, device=there.device)
    dequantize = there.op("dequantize_out")
    weight, at = place.weight(*q.parts, *q.how), place.where(q.packed)
    described = cuda.place.memory(out)
    launches = LAUNCHES if not there.fake else 50
    for what, launch in (
        ("torch op", lambda: dequantize(*q.parts, *q.how, out)),
        ("prepared", lambda: weight.dequantize(described, 0, at)),
    ):
        launch()
        there.wait()
        start = time.perf_counter()
        for _ in range(launches):
            launch()
        issued = time.perf_counter() - start
        there.wait()
        records.add("env", f"launch, {what}", us_each=round(1e6 * issued / launches, 2))
