"""A trace of what overlapped: spans of reading a context and of filling a cache with it, by thread."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from .files import replacing

_COLOURS = {"read": "#9ecae1", "wait": "#d9d9d9", "run": "#e6550d", "project": "#31a354", "reuse": "#756bb1"}


@dataclass
class Span:
    """A piece of work of one thread.

    Args:
        kind: ``"read"`` of a tensor, ``"wait"`` for parts of a context, or ``"run"``, ``"project"`` or ``"reuse"`` of layers.
        name: of the tensor, the parts or the layers.
        thread: name of the thread.
        start, end: in seconds of ``time.perf_counter``.
        nbytes: that were read.
    """

    kind: str
    name: str
    thread: str
    start: float = 0.0
    end: float = 0.0
    nbytes: int = 0


@dataclass(eq=False)
class Trace:
    """The spans of a prefill, in the order in which they end, for ``partial_prefill(..., trace=trace)``.

    Spans are the host's: a GPU may still be at work on what was launched in one.
    """

    spans: list[Span] = field(default_factory=list)

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write what ``chrome://tracing`` and https://ui.perfetto.dev show, atomically."""
        threads = {name: number for number, name in enumerate(self._threads)}
        events = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": name}}
            for name, number in threads.items()
        ]
        begin = min((span.start for span in self.spans), default=0.0)
        for span in self.spans:
            times = {"ts": (span.start - begin) * 1e6, "dur": (span.end - span.start) * 1e6}  # microseconds
            where = {"pid": 0, "tid": threads[span.thread]}
            name = f"{span.kind} {span.name}"
            events.append({"ph": "X", "name": name, "cat": span.kind, **where, **times, "args": {"bytes": span.nbytes}})
        with replacing(path) as scratch:
            scratch.write_text(json.dumps({"traceEvents": events}) + "\n", encoding="utf-8")

    def plot(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Draw the spans as a PNG, atomically: a row for each thread, time in milliseconds.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        threads, kinds = self._threads, dict.fromkeys(span.kind for span in self.spans)
        figure = Figure(figsize=(10, 1.5 + 0.5 * len(threads)), layout="constrained")
        axes = figure.subplots()
        begin = min((span.start for span in self.spans), default=0.0)
        for kind in kinds:
            for row, thread in enumerate(threads):
                bars = [
                    ((span.start - begin) * 1e3, (span.end - span.start) * 1e3)
                    for span in self.spans
                    if (span.kind, span.thread) == (kind, thread)
                ]
                axes.broken_barh(bars, (row - 0.4, 0.8), color=_COLOURS[kind], edgecolor="white", linewidth=0.3)
            axes.plot([], [], color=_COLOURS[kind], linewidth=6, label=kind)
        axes.set_yticks(range(len(threads)), threads)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds")
        axes.set_title(title)
        if kinds:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        with replacing(path) as scratch:
            figure.savefig(scratch, format="png", dpi=120)

    @property
    def _threads(self) -> list[str]:
        return list(dict.fromkeys(span.thread for span in sorted(self.spans, key=lambda each: each.start)))


def span(trace: Trace | None, kind: str, *name: object) -> AbstractContextManager[Span | None]:
    """Return what times the work within it for a trace, if there is one.

    Args:
        trace: takes the span.
        kind: of work.
        name: words, which are put together for a trace alone: in a prefill without one they would take time.

    Returns:
        A context manager; within it is the span, whose bytes the caller may set, or None.
    """
    if trace is None:
        return nullcontext()
    return _timed(trace, Span(kind, " ".join(map(str, name)), threading.current_thread().name))


@contextmanager
def _timed(trace: Trace, made: Span) -> Iterator[Span]:
    made.start = time.perf_counter()
    try:
        yield made
    finally:
        made.end = time.perf_counter()
        trace.spans.append(made)
