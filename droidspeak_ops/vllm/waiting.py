"""Waiting for a store no longer than a server can, which does nothing else meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, steps: Iterable[Callable[[], T]]) -> list[T]:
    """Return what steps return that run one after the other, in a thread of their own.

    Raises:
        TimeoutError: they take longer. The step that runs then is left to end by itself, and no other begins.
        Exception: whatever a step raises.
    """
    end, done = time.monotonic() + seconds, Future[list[T]]()

    def run() -> None:
        found = []
        try:
            for step in steps:
                if time.monotonic() > end:
                    return
                found.append(step())
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(found)

    threading.Thread(target=run, name="within", daemon=True).start()
    if wait([done], seconds).not_done:
        raise TimeoutError(f"store: expected to read it within {seconds:g} s, got no answer")
    return done.result()
