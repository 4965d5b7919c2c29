"""One measured figure, and what it is a ratio of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from compare.machine import BEYOND_CACHE, Limits
from compare.timing import Contender, Pace, Sample, measure


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A contender's time for one piece of work.

    Attributes:
        section: Which comparison.
        name: The contender.
        package: Its library.
        threads: Threads of everything in that run.
        kernels: nybble's instruction set in that run.
        shape: Of the weight, `4096x4096`, out and in features; empty where none.
        m: Rows of activations, or 0.
        dtype: Of the activations or values.
        seconds: See `timing.Sample`, also `best`, `calls` and `disturbed`.
        nbytes: Bytes that must be read (and written).
        elements: Of the weight.
        read: Read bandwidth around the cell, GB/s.
        t16: torch's dense bfloat16 rate at M=512, GFLOP/s, around the cell; t32 likewise.
    """

    section: str
    name: str
    package: str
    threads: int
    kernels: str
    shape: str = ""
    m: int = 0
    dtype: str = ""
    seconds: float
    best: float
    calls: int
    disturbed: int
    nbytes: int = 0
    elements: int = 0
    read: float
    t16: float
    t32: float

    @property
    def of_read(self) -> float:
        """Bytes a second as a share of the read bandwidth."""
        return self.nbytes / self.seconds / 1e9 / self.read

    @property
    def gflops(self) -> float:
        """Of the product."""
        return 2 * self.m * self.elements / self.seconds / 1e9

    @property
    def gelem(self) -> float:
        """Elements of the weight, 1e9 a second."""
        return self.elements / self.seconds / 1e9


@dataclass(kw_only=True)
class Run:
    """What the sections of one process share.

    Attributes:
        threads: Of all libraries.
        kernels: nybble's instruction set.
        quick: Whether to measure little.
        pace: How often.
        limits: The machine's own figures.
        figures: Read and copy GB/s, T16 and T32 GFLOP/s at the start.
        say: Progress.
        cells: What was measured.
        notes: What was left out, and why.
    """

    threads: int
    kernels: str
    quick: bool
    pace: Pace
    limits: Limits
    figures: dict[str, float]
    say: Callable[[str], None]
    cells: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def measure(
        self, section: str, entries: Iterable[Entry], *, beside: Iterable[Contender] = (), **of: Any
    ) -> None:
        """Time the entries of one cell in turns, with the limits `beside` them."""
        entries, beside = [each for each in entries if self._works(each)], list(beside)
        if not entries:
            return
        found = measure([*beside, *(entry.contender for entry in entries)], self.pace)
        read, t16, t32 = (self.figures[name] for name in ("read", "T16", "T32"))
        if "read" in found:
            read = BEYOND_CACHE / found["read"].seconds / 1e9
        dense = 2 * 512 * 4096 * 4096 / 1e9
        if "T16" in found:
            t16 = dense / found["T16"].seconds
        if "T32" in found:
            t32 = dense / found["T32"].seconds
        for entry in entries:
            sample: Sample = found[entry.contender.name]
            self.cells.append(
                Cell(
                    section=section,
                    name=entry.name,
                    package=entry.package,
                    threads=self.threads,
                    kernels=self.kernels,
                    dtype=entry.dtype,
                    seconds=sample.seconds,
                    best=sample.best,
                    calls=sample.calls,
                    disturbed=sample.disturbed,
                    nbytes=entry.nbytes,
                    read=read,
                    t16=t16,
                    t32=t32,
                    **of,
                )
            )
        self.say(f"{section} {of} {len(entries)} contenders")

    def _works(self, each: Entry) -> bool:
        """Call a peer once; one that fails is left out with a note. Ours must not fail."""
        try:
            each.contender.call(0)
        except Exception as error:
            if each.package == "nybble":
                raise
            said = str(error).strip().splitlines() or [type(error).__name__]
            self.notes.append(f"{each.package} {each.name} {each.dtype}: {said[0][:200]}")
            return False
        return True


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contender and what its cell says of it."""

    name: str
    package: str
    contender: Contender
    dtype: str = ""
    nbytes: int = 0


def entry(
    name: str,
    package: str,
    call: Callable[[int], object],
    *,
    dtype: str = "",
    nbytes: int = 0,
    warm: int = 2,
    per_call: int = 1,
) -> Entry:
    """An entry whose contender is told apart by name and dtype."""
    contender = Contender(f"{package} {name} {dtype}", call, warm, per_call)
    return Entry(name=name, package=package, contender=contender, dtype=dtype, nbytes=nbytes)
