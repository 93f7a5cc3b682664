"""Atomic file writes, and journals of long runs."""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


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
    """The records of a long run, a line each, from which it resumes after being killed at any moment.

    A line is a checksum and JSON. Only one run at a time holds a journal: use it in a ``with`` statement.

    Args:
        path: the journal's file, or None to keep records in memory only.
        run: identifies the run; it is the first line of the file.

    Raises:
        ValueError: another run holds the file, it is the journal of another run, or it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str] | None, run: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.done: list[Any] = []
        self._lock: FileLock | None = None
        if self.path is None:
            return
        self._lock = FileLock(_lock_of(self.path))
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(f"journal: expected one run at a time, got another that holds {self.path}") from None
        try:
            self._resume(self.path, run)
        except BaseException:
            self.close()
            raise

    def _resume(self, path: Path, run: dict[str, Any]) -> None:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last may be torn
        records = [_checked(path, number, line) for number, line in enumerate(lines, start=1)]
        if records and records[0] != json.loads(json.dumps(run)):
            raise ValueError(
                f"journal: expected a journal of this run, got that of another, {path}; remove it or pass another path"
            )
        self.done = records[1:]
        with replacing(path) as scratch:
            scratch.write_bytes(b"".join(line + b"\n" for line in lines or [_line(run)]))

    def add(self, record: Any) -> None:
        """Append a record, and flush it to disk."""
        self.done.append(record)
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(_line(record) + b"\n")
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """Let other runs hold the journal."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def remove_journal(path: str | os.PathLike[str]) -> None:
    """Remove a journal whose run is over, and its lock."""
    path = Path(path)
    path.unlink(missing_ok=True)
    _lock_of(path).unlink(missing_ok=True)


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _line(record: Any) -> bytes:
    text = json.dumps(record).encode()
    return b"%08x %b" % (zlib.crc32(text), text)


def _checked(path: Path, number: int, line: bytes) -> Any:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError(f"journal: expected a line that its checksum fits, got another in {path}, line {number}")
    return json.loads(text)
