"""Rows of a step of ``bench/gpu.py``, on disk as soon as each exists, and how times are taken there."""

from __future__ import annotations

import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Step:
    """The arguments of a step.

    Args:
        partial: file of its rows, a JSON object a line.
        folder: of the results of the whole run.
        seconds: that it may take.
        dry: whether to try everything at tiny sizes, on the CPU.
    """

    partial: Path
    folder: Path
    seconds: float
    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """float32 on the CPU, where the operators are their references."""
        return torch.float32 if self.dry else torch.bfloat16

    def add(self, what: str, **values: Any) -> None:
        """Write a row."""
        row = {"what": what, **{name: _rounded(value) for name, value in values.items()}}
        with self.partial.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {name: value for name, value in row.items() if not isinstance(value, list)}
        print(json.dumps(shown), flush=True)

    @contextmanager
    def guarded(self, what: str, **values: Any) -> Iterator[None]:
        """Write a row that says what went wrong, and go on."""
        try:
            yield
        except Exception as error:  # whatever a compiler, a driver or a library raises costs its own row alone
            traceback.print_exc()
            self.add(what, **values, error=summary(error))


def summary(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:600]


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


def read_rows(partial: Path) -> list[Row]:
    """The rows that a step has written so far, the last count alone; a line that was cut off is not one."""
    rows: list[Row] = []
    for line in partial.read_text(encoding="utf-8").splitlines() if partial.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["what"] == "counts":
            rows = [each for each in rows if each["what"] != "counts"]
        rows.append(row)
    return rows


def written(folder: Path, step: str, what: str) -> Row:
    """A row of an earlier step, empty if there is none."""
    path = folder / "gpu.json"
    steps = json.loads(path.read_text(encoding="utf-8"))["steps"] if path.exists() else {}
    return next((row for row in steps.get(step, {}).get("rows", []) if row["what"] == what), {})


# --- times ----------------------------------------------------------------------------------------------------------------


def milliseconds(run: Run) -> float:
    """One call, by CUDA events where there is a GPU: gaps in which it waits for the host count."""
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
    """Milliseconds of a call."""
    for _ in range(warm_up):
        run()
    return statistics.median(milliseconds(run) for _ in range(rounds))


def host_microseconds(run: Run, calls: int, rounds: int = 3) -> float:
    """Time of a call on the host: of so few in a row that it need not wait for a place in the GPU's queue of launches."""
    spent = []
    for _ in range(rounds):
        synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        spent.append((time.perf_counter() - began) / calls * 1e6)
    synchronize()
    return statistics.median(spent)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Replay:
    """A CUDA graph of calls, whose time is without the host's; and the calls, which keep the tensors that it reads."""

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
        """Milliseconds of a call, of one replay."""
        return milliseconds(self.graph.replay) / (self.repeats * len(self.runs))

    def median(self, rounds: int = 10) -> float:
        """Milliseconds of a call."""
        self.graph.replay()
        return statistics.median(self.milliseconds() for _ in range(rounds))

    def against(self, other: Replay, rounds: int = 10) -> tuple[float, float]:
        """Milliseconds of a call, and how often it fits in the other's: timed in turn, since a GPU slows as it heats."""
        self.graph.replay()
        pairs = [(other.milliseconds(), self.milliseconds()) for _ in range(rounds)]
        return statistics.median(own for _, own in pairs), statistics.median(theirs / own for theirs, own in pairs)
