"""Pieces of a fit that do not depend on each other, several at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch

AT_A_TIME = 4
"""Most pieces that are in memory together."""

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(compute: Callable[[T], R], pieces: Sequence[T], device: torch.device) -> Iterator[R]:
    """Yield what is computed of each piece, in their order.

    On a CPU several are computed at a time, each on its share of PyTorch's threads: their operators are too small to gain from
    more. A piece's result does not depend on what is computed beside it. Gradients are off, but where `compute` turns them on.
    """
    threads = torch.get_num_threads()
    workers = min(threads, AT_A_TIME, len(pieces)) if device.type == "cpu" else 1
    if workers <= 1:
        yield from map(torch.no_grad()(compute), pieces)
        return
    pool = ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, threads // workers))
    try:
        with pool:
            yield from pool.map(torch.no_grad()(compute), pieces)
    finally:
        torch.set_num_threads(threads)  # a new thread takes what was last set in any
        with suppress(AttributeError):  # other C libraries have no such function, and need none
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what a thread has freed for threads to come
