"""Times: a graph of launches that is replayed, or calls by the clock where there is no GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

LAUNCHES, REPEATS, LEAST_REPEATS = 20, 30, 5
# Microseconds that all repeats together should take at most.
_ENOUGH = 150_000.0


class DeviceClock:
    """The device's own clock; medians."""

    def microseconds(self, launch: Callable[[int], object], launches: int = LAUNCHES) -> float:
        """Time of one launch; `launch(i)` is the i-th of a graph, so that weights can rotate."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(launches):
                launch(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(launches):
                launch(i)
        return self._median(graph.replay) / launches

    def without_graph(self, launch: Callable[[], object]) -> float:
        """Time of one launch that takes so long that starting it does not matter."""
        return self._median(launch)

    def _median(self, run: Callable[[], object]) -> float:
        run()
        repeats = int(_ENOUGH / max(self._once(run), 1.0))
        repeats = max(LEAST_REPEATS, min(REPEATS, repeats))
        return statistics.median(self._once(run) for _ in range(repeats))

    def _once(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end)


class HostClock:
    """Stands in for a device's: what it tells is of no interest, only that it can be told."""

    def microseconds(self, launch: Callable[[int], object], launches: int = LAUNCHES) -> float:
        """As of `DeviceClock`."""
        return self.without_graph(lambda: [launch(i) for i in range(min(2, launches))])

    def without_graph(self, launch: Callable[[], object]) -> float:
        """As of `DeviceClock`."""
        start = time.perf_counter()
        launch()
        return 1e6 * (time.perf_counter() - start)


def copies(nbytes: int, least: int = 200 << 20) -> int:
    """How many weights of this size it takes that a cache cannot hold them."""
    return max(2, min(LAUNCHES, -(-least // nbytes)))


def rotate(weights: Sequence[object], i: int) -> object:
    """The weight of the i-th launch."""
    return weights[i % len(weights)]
