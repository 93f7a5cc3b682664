"""Atomic file writes, and journals of long runs."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a scratch path whose file replaces `path` atomically, once it is flushed to disk; on an error it is removed.

    Threads and processes may write to one path at once: each has a scratch file of its own, and the last to finish wins. A
    symbolic link stays a link, and a file keeps its mode.
    """
    target = Path(os.path.realpath(path))
    scratch = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex}")
    try:
        yield scratch
        if target.exists():
            shutil.copymode(target, scratch)
        _sync(scratch)
        os.replace(scratch, target)
        _sync(target.parent)
    finally:
        scratch.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """The records of a long run, one line of JSON each, from which it resumes after being killed at any moment.

    Args:
        path: the journal's file, or None to keep records in memory only.
        run: identifies the run; it is the first line of the file.

    Raises:
        ValueError: the file is the journal of another run.
    """

    def __init__(self, path: str | os.PathLike[str] | None, run: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.done: list[Any] = []
        if self.path is None:
            return
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []  # the last may be torn
        if lines and json.loads(lines[0]) != json.loads(json.dumps(run)):
            raise ValueError(
                f"journal: expected a journal of this run, got that of another, {self.path}; remove it or pass another path"
            )
        self.done = [json.loads(line) for line in lines[1:]]
        with replacing(self.path) as scratch:
            scratch.write_bytes(b"".join(line + b"\n" for line in lines or [json.dumps(run).encode()]))

    def add(self, record: Any) -> None:
        """Append a record, and flush it to disk."""
        self.done.append(record)
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
