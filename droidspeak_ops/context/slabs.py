"""Memory for tensors that are read one after the other: slabs in huge pages, which several tensors share.

To touch new memory for the first time takes several times as long as to read a file from the page cache, above all in pages of
4 KiB. So slabs are used again, and a process that reads one context after the other touches little new memory.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from contextlib import suppress

import numpy as np

SLAB = 32 << 20
"""Bytes of a slab: many huge pages, and no more than that is held for the sake of one tensor."""
SPARE = 8
"""The most slabs that are kept to be used again, when nothing holds a piece of them any more."""
_PAGE = 4096
_LINE = 64


class Slabs:
    """Hands out memory, each piece once; a slab is given back when nothing holds a piece of it. Threads may share it.

    What a piece holds at first is undefined.

    Args:
        most: bytes that will be taken in all; a little more is allowed.
    """

    def __init__(self, most: int) -> None:
        self._size = min(SLAB, most)
        self._lock = threading.Lock()
        self._free = memoryview(b"")
        self._used = 0

    def take(self, nbytes: int, start: int) -> memoryview:
        """Return memory, aligned to 64 bytes, for `nbytes` that lie in a file from `start`.

        Raises:
            OSError: there is not enough memory.
        """
        with self._lock:
            first = _place_for(start, self._used)
            if first + nbytes > len(self._free):
                first = _place_for(start, 0)
                self._free = _slab(max(first + nbytes, self._size))
            self._used = first + nbytes
            return self._free[first : self._used]


def _place_for(start: int, used: int) -> int:
    """Return where in a slab, behind what is used, bytes go that lie in a file from `start`.

    Some processors (AMD's Zen 3) copy five times as slowly to a place that is less than a cache line behind its source, by
    their offsets in pages.
    """
    place = -(-used // _LINE) * _LINE
    return place + _LINE if 0 < (place - start) % _PAGE < _LINE else place


_spare: deque[mmap.mmap] = deque(maxlen=SPARE)


def _slab(nbytes: int) -> memoryview:
    """Return a slab, which goes to the spare ones when nothing holds a piece of it; one of another size is freed."""
    if nbytes != SLAB:
        return memoryview(_mapped(nbytes))
    try:
        slab = _spare.pop()
    except IndexError:
        slab = _mapped(nbytes)
    array = np.frombuffer(slab, np.uint8)
    weakref.finalize(array, _spare.append, slab).atexit = False
    return array.data


def _mapped(nbytes: int) -> mmap.mmap:
    mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux alone
        with suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped
