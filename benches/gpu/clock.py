"""Timing on the device: a graph of launches, replayed, the median of many."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

LAUNCHES, REPEATS = 20, 30


def microseconds(launch: Callable[[int], object], launches: int = LAUNCHES) -> float:
    """Time of one launch; `launch(i)` is the i-th of a graph, so that weights can rotate."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(launches):
            launch(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            launch(i)
    return _median(graph.replay) / launches


def without_graph(launch: Callable[[], object]) -> float:
    """Time of one launch that takes so long that starting it does not matter."""
    launch()
    return _median(launch, 10)


def _median(run: Callable[[], object], repeats: int = REPEATS) -> float:
    times = []
    for _ in range(3):
        run()
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def copies(nbytes: int, least: int = 200 << 20) -> int:
    """How many weights of this size it takes that a cache cannot hold them."""
    return max(2, min(LAUNCHES, -(-least // nbytes)))


def rotate(weights: Sequence[object], i: int) -> object:
    """The weight of the i-th launch."""
    return weights[i % len(weights)]
