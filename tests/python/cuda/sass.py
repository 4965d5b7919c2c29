"""What a cubin's kernels are made of: registers, instructions, and the loop that does the work."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
LABEL = re.compile(r"(\.L_x_\d+):$")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")


def tool(name: str) -> str | None:
    """A tool of NVIDIA's, from its package, from Triton's or from PATH."""
    for pattern in (f"nvidia/*/bin/{name}", f"triton/backends/nvidia/bin/{name}"):
        for directory in sys.path:
            for found in Path(directory or ".").glob(pattern):
                if os.access(found, os.X_OK):
                    return str(found)
    return shutil.which(name)


def nvdisasm() -> str | None:
    """NVIDIA's disassembler."""
    return tool("nvdisasm")


@dataclass(frozen=True)
class Loop:
    """A loop: the instructions from its label to the branch back."""

    instructions: tuple[str, ...]

    def count(self, *prefixes: str) -> int:
        """How many instructions begin with one of these."""
        return sum(name.startswith(prefixes) for name in self.instructions)


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin."""

    name: str
    registers: int
    instructions: tuple[str, ...]
    loops: tuple[Loop, ...]

    def count(self, *prefixes: str) -> int:
        """How many instructions begin with one of these."""
        return sum(name.startswith(prefixes) for name in self.instructions)


REGISTERS_OF = 0x2F04  # the attribute of .nv.info that gives a function's registers


def registers(cubin: bytes) -> dict[str, int]:
    """Registers of a thread by kernel, from the section .nv.info and the table of symbols."""
    sections = _sections(cubin)
    info, symbols, names = (sections[name] for name in (".nv.info", ".symtab", ".strtab"))
    found, at = {}, 0
    while at + 4 <= len(info):
        kind, size = struct.unpack_from("<HH", info, at)
        if kind == REGISTERS_OF:
            symbol, count = struct.unpack_from("<II", info, at + 4)
            (start,) = struct.unpack_from("<I", symbols, 24 * symbol)
            found[names[start : names.index(b"\0", start)].decode()] = count
        # Kinds whose low byte is 4 have a payload; the others keep their value in `size`.
        at += 4 + (size if kind & 0xFF == 4 else 0)
    return found


def _sections(elf: bytes) -> dict[str, bytes]:
    (table,) = struct.unpack_from("<Q", elf, 40)
    count, names = struct.unpack_from("<HH", elf, 60)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + 64 * i) for i in range(count)]
    start = headers[names][4]
    return {
        elf[start + header[0] : elf.index(b"\0", start + header[0])].decode(): elf[
            header[4] : header[4] + header[5]
        ]
        for header in headers
    }


def disassemble(cubin: bytes, folder: Path) -> Iterator[Kernel]:
    """Every kernel of a cubin."""
    program = nvdisasm()
    if program is None:
        raise RuntimeError("no nvdisasm")
    path = folder / "kernels.cubin"
    path.write_bytes(cubin)
    command = [program, "-c", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sizes = registers(cubin)
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition(":")
        if name in sizes:
            yield _kernel(name, sizes[name], body)


def _kernel(name: str, size: int, body: str) -> Kernel:
    names: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in body.splitlines():
        if label := LABEL.search(line.strip()):
            labels[label.group(1)] = len(names)
        if not (found := INSTRUCTION.search(line)):
            continue
        names.append(found.group(2))
        target = TARGET.search(found.group(3))
        if found.group(2).startswith("BRA") and target and target.group(1) in labels:
            loops.append(Loop(tuple(names[labels[target.group(1)] :])))
    return Kernel(name, size, tuple(names), tuple(loops))


def innermost(kernel: Kernel, prefix: str) -> list[Loop]:
    """Loops with such an instruction that hold no other such loop."""
    having = [loop for loop in kernel.loops if loop.count(prefix)]
    return [
        loop
        for loop in having
        if not any(
            other is not loop and len(other.instructions) < len(loop.instructions)
            and _contains(loop, other)
            for other in having
        )
    ]  # fmt: skip


def _contains(outer: Loop, inner: Loop) -> bool:
    """Whether the one ends in the other's body; loops are cut from one listing."""
    text, part = outer.instructions, inner.instructions
    return any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


def summary(loop: Loop) -> str:
    """The most frequent instructions, for a message."""
    return ", ".join(
        f"{count} {name}" for name, count in Counter(loop.instructions).most_common(12)
    )
