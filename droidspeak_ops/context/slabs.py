"""Memory for tensors that are read one after the other: slabs in huge pages, which several tensors share.

To touch new memory in pages of 4 KiB for the first time takes several times as long as to read a file from the page cache.
"""

from __future__ import annotations

import mmap
import threading
from contextlib import suppress

SLAB = 32 << 20
"""Bytes of a slab: many huge pages, and no more than that is held for the sake of one tensor."""
_PAGE = 4096
_LINE = 64


class Slabs:
    """Hands out memory, each piece once; a slab is freed when nothing holds a piece of it. Threads may share it.

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


def _slab(nbytes: int) -> memoryview:
    slab = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux alone
        with suppress(OSError):  # a kernel without them
            slab.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(slab)
