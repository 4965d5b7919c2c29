"""Times contenders in turns, so that all of them see the machine at its best and its worst."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: A call that takes longer is repeated less often.
SLOW = 0.05

#: Pause before a contender's turn: idle threads of another library spin for a while.
_SETTLE = 0.002

#: Seconds that a turn of quick calls lasts.
_TURN = 0.01


@dataclass(frozen=True)
class Pace:
    """How often is measured.

    Attributes:
        rounds: Turns of each contender.
        calls: Least number of timed calls a turn, for calls quicker than `SLOW`.
    """

    rounds: int = 5
    calls: int = 3


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        name: In tables.
        call: Does the work once. Takes a running number, to rotate over copies.
        warm: Calls before the first that counts; at least one for each copy.
        per_call: Products that one call computes.
    """

    name: str
    call: Callable[[int], object]
    warm: int = 2
    per_call: int = 1


@dataclass(frozen=True)
class Sample:
    """Seconds that one contender takes.

    Attributes:
        seconds: Median of the calls during which no thread of this process lost its processor.
        best: Fastest call.
        calls: Calls behind the median.
        disturbed: Calls that were put aside. Where fewer than three are left, the median is that
            of the fastest quarter of all, and `calls` is their number.
    """

    seconds: float
    best: float
    calls: int
    disturbed: int


def measure(contenders: Sequence[Contender], pace: Pace) -> dict[str, Sample]:
    """Time all contenders in turns."""
    clean: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    dirty: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    numbers = dict.fromkeys(clean, 0)
    estimates = {contender.name: _warm(contender, numbers) for contender in contenders}
    for turn in range(pace.rounds):
        for contender in _rotated(contenders, turn):
            name, estimate = contender.name, estimates[contender.name]
            time.sleep(_SETTLE)
            calls = 1
            if estimate < SLOW:
                calls = min(10, max(pace.calls, round(_TURN / max(estimate, 1e-6))))
                contender.call(_next(numbers, name))
            for _ in range(calls):
                seconds, lost = _timed(contender, _next(numbers, name))
                (dirty if lost else clean)[name].append(seconds)
    return {name: _sample(clean[name], dirty[name], by) for name, by in _scale(contenders)}


def _scale(contenders: Sequence[Contender]) -> list[tuple[str, int]]:
    return [(contender.name, contender.per_call) for contender in contenders]


def _rotated(contenders: Sequence[Contender], turn: int) -> list[Contender]:
    """Another one begins each round: none always follows the same neighbour."""
    start = turn * 3 % max(1, len(contenders))
    return [*contenders[start:], *contenders[:start]]


def _next(numbers: dict[str, int], name: str) -> int:
    numbers[name] += 1
    return numbers[name]


def _warm(contender: Contender, numbers: dict[str, int]) -> float:
    seconds = 0.0
    for _ in range(max(1, contender.warm)):
        seconds, _lost = _timed(contender, _next(numbers, contender.name))
    return seconds


def _timed(contender: Contender, number: int) -> tuple[float, bool]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter()
    contender.call(number)
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw != before


def _sample(clean: list[float], dirty: list[float], per_call: int) -> Sample:
    used = clean
    if len(clean) < 3:
        both = sorted(clean + dirty)
        used = both[: max(1, len(both) // 4)]
    return Sample(
        seconds=statistics.median(used) / per_call,
        best=min(clean + dirty) / per_call,
        calls=len(used),
        disturbed=len(dirty),
    )
