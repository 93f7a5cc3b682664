"""Times on a GPU: of a call with the gaps in which it waits for the host, of the host alone, and without the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from droidspeak_ops.profiling.timing import synchronize

Run = Callable[[], Any]
"""A call to time."""


def milliseconds(run: Run) -> float:
    """Return the time of one call, by CUDA events where there is a GPU: gaps in which it waits for the host count."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def median(run: Run, rounds: int, warm_up: int = 1) -> float:
    """Return the median milliseconds of a call."""
    for _ in range(warm_up):
        run()
    return statistics.median(milliseconds(run) for _ in range(rounds))


def host_microseconds(run: Run, calls: int, rounds: int = 3) -> float:
    """Return the time of a call on the host, of so few in a row that none waits for a place in the GPU's queue of launches."""
    spent = []
    for _ in range(rounds):
        synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        spent.append((time.perf_counter() - began) / calls * 1e6)
    synchronize()
    return statistics.median(spent)


@dataclass(frozen=True)
class Replay:
    """A CUDA graph of calls, whose time is without the host's.

    Args:
        runs: the calls, which keep the tensors that the graph reads.
        repeats: of all of them in the graph.
    """

    graph: torch.cuda.CUDAGraph
    runs: Sequence[Run]
    repeats: int

    @classmethod
    def of(cls, runs: Sequence[Run], launches: int = 16) -> Replay:
        """Capture so many launches or more over all of `runs` in turn."""
        for run in runs:
            run()
        repeats = -(-launches // len(runs))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for run in runs:
                    run()
        return cls(graph, runs, repeats)

    def milliseconds(self) -> float:
        """Return the milliseconds of a call, of one replay."""
        return milliseconds(self.graph.replay) / (self.repeats * len(self.runs))

    def median(self, rounds: int = 10) -> float:
        """Return the median milliseconds of a call."""
        self.graph.replay()
        return statistics.median(self.milliseconds() for _ in range(rounds))

    def against(self, other: Replay, rounds: int = 10) -> tuple[float, float]:
        """Return milliseconds of a call, and how often it fits in the other's: timed in turn, as a GPU slows when it heats."""
        self.graph.replay()
        pairs = [(other.milliseconds(), self.milliseconds()) for _ in range(rounds)]
        return statistics.median(own for _, own in pairs), statistics.median(theirs / own for theirs, own in pairs)
