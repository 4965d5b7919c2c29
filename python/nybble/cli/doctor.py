"""`nybble doctor`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from nybble import _machine
from nybble.checkpoint.sizes import format_size
from nybble.cli.console import SCHEMA_VERSION, Console


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that the command found out."""

    versions: dict[str, str | None]
    processor: _machine.Processor
    threads: _machine.Threads
    memory: _machine.Memory
    torch: _machine.Torch
    cuda: _machine.Cuda


def doctor(_options: argparse.Namespace, console: Console) -> int:
    """Show what nybble runs on; 1 if something is broken."""
    facts = Facts(
        versions=_machine.versions(),
        processor=_machine.processor(),
        threads=_machine.threads(),
        memory=_machine.memory(),
        torch=_machine.torch_facts(),
        cuda=_machine.cuda(),
    )
    found_problems, found_hints = list(problems(facts)), list(hints(facts))
    lines = [f"{name:12} {text}" for name, text in _rows(facts)]
    lines += [f"problem: {text}" for text in found_problems]
    lines += [f"hint: {text}" for text in found_hints]
    document = {
        "schema_version": SCHEMA_VERSION,
        "command": "doctor",
        **asdict(facts),
        "problems": found_problems,
        "hints": found_hints,
    }
    console.result("\n".join(lines), json.dumps(document))
    return 1 if found_problems else 0


def problems(facts: Facts) -> Iterator[str]:
    """What keeps nybble from working."""
    if facts.processor.problem is not None:
        yield facts.processor.problem
    if facts.torch.problem is not None:
        yield facts.torch.problem


def hints(facts: Facts) -> Iterator[str]:
    """What makes nybble slower than it could be here, and what to do."""
    cpu, threads, memory = facts.processor, facts.threads, facts.memory
    if cpu.available and cpu.kernels != cpu.available[-1]:
        yield (
            f"NYBBLE_CPU={cpu.forced} forces {cpu.kernels} kernels; unset it to use "
            f"{cpu.available[-1]}"
        )
    elif cpu.available == ["scalar"]:
        yield (
            f"only scalar kernels run here: this build has none for {cpu.architecture} with "
            f"{', '.join(cpu.features) or 'no vector extension'}"
        )
    if threads.used < threads.cores:
        if threads.source == "machine":
            remedy = "a CPU quota allows no more; NYBBLE_NUM_THREADS sets another number"
        else:
            remedy = f"{threads.source} says so"
        yield f"{threads.used} of {threads.cores} processors are used: {remedy}"
    elif threads.used > threads.cores:
        yield (f"{threads.used} threads share {threads.cores} processors: lower {threads.source}")
    if facts.torch.threads is not None and facts.torch.threads != threads.used:
        yield f"torch uses {facts.torch.threads} threads, nybble {threads.used}"
    if memory.huge_pages == "never":
        yield "transparent huge pages are off: large new tensors take longer to make"
    if facts.cuda.problem is not None:
        yield facts.cuda.problem
    for device in facts.cuda.devices:
        if device.kernels.startswith("none"):
            yield f"{device.name} has no kernels: {device.kernels}"


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    """What is shown, by line."""
    cpu, threads, memory = facts.processor, facts.threads, facts.memory
    for name, version in facts.versions.items():
        yield name, version or "not installed"
    yield "processor", f"{cpu.name or 'unknown'} ({cpu.architecture})"
    yield "features", " ".join(cpu.features) or "none"
    if cpu.kernels is not None:
        forced = f", forced by NYBBLE_CPU={cpu.forced}" if cpu.forced else ""
        yield "kernels", f"{cpu.kernels}{forced} (this build can run: {' '.join(cpu.available)})"
    source = "all of them" if threads.source == "machine" else f"from {threads.source}"
    yield "threads", f"{threads.used} on {threads.cores} processors, {source}"
    sizes = {
        "total": memory.total,
        "available": memory.available,
        "limit of this process": memory.limit,
    }
    known = [f"{format_size(size)} {what}" for what, size in sizes.items() if size is not None]
    yield "memory", ", ".join(known) or "unknown"
    yield "huge pages", memory.huge_pages or "unknown"
    if facts.torch.problem is None:
        native = " ".join(["float32", *facts.torch.native])
        yield "torch on CPU", f"{facts.torch.threads} threads, multiplies natively: {native}"
    if facts.cuda.driver is None:
        yield "CUDA", "no driver" if facts.cuda.problem is None else "a driver that cannot be used"
    else:
        count = len(facts.cuda.devices)
        yield "CUDA", f"driver for {facts.cuda.driver}, {count} device{'s' if count != 1 else ''}"
    for device in facts.cuda.devices:
        yield "GPU", f"{device.name} ({device.capability}), kernels: {device.kernels}"
