"""Atomic file writes, and journals of long runs."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from . import schema

T = TypeVar("T")


@contextmanager
def replacing(path: str | os.PathLike[str], mode: int = 0o666) -> Iterator[Path]:
    """Yield a scratch file, to be written to, which replaces `path` atomically once it is flushed to disk.

    Threads and processes may write to one path at once: each has a scratch file of its own, and the last to finish wins. A
    symbolic link stays a link, and a file keeps its mode. On an error the scratch file is removed, and what writers that were
    killed have left beside `path` is removed by the next one.

    Args:
        path: the file.
        mode: of a file that is new, before the umask.
    """
    target = Path(os.path.realpath(path))
    remove_abandoned(target.parent, target.name)
    scratch, descriptor = _locked_scratch(target, mode)
    try:
        yield scratch
        with suppress(FileNotFoundError):  # it is new, or was removed meanwhile
            shutil.copymode(target, scratch)
        _sync(scratch)
        os.replace(scratch, target)
        _sync(target.parent)
    finally:
        scratch.unlink(missing_ok=True)
        os.close(descriptor)


def make_private_folder(path: Path) -> None:
    """Make a folder that its owner alone can enter, and its parents, unless they are there."""
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        return
    _sync(path.parent)


def _machine() -> str:
    """A word for this machine, which is part of the names of scratch files: locks need not reach others that share a folder."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _locked_scratch(target: Path, mode: int) -> tuple[Path, int]:
    """Make a scratch file that is locked for as long as its descriptor is open: until it is closed or the process ends."""
    while True:
        scratch = target.with_name(f".{target.name}.{_machine()}.{uuid.uuid4().hex}")
        descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        with suppress(OSError):  # where there are no locks, none is found free either, and nothing is removed
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if scratch.exists():  # nobody took it for abandoned before it was locked
            return scratch, descriptor
        os.close(descriptor)


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove the scratch files in a folder whose writers on this machine were killed: nobody holds their locks.

    Args:
        folder: where to look.
        name: of the file that was to be replaced; None for any.
    """
    ours = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.{_machine()}\.[0-9a-f]{{32}}")
    beside: list[str] = []
    with suppress(OSError):  # a folder can be written to that cannot be listed
        beside = os.listdir(folder)
    for scratch in (folder / each for each in beside if ours.fullmatch(each)):
        with suppress(OSError):  # held, gone meanwhile, or somebody else's
            descriptor = os.open(scratch, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                scratch.unlink()
            finally:
                os.close(descriptor)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """The records of a long run, a line each, from which it resumes after being killed at any moment.

    A line is a checksum and JSON. Only one run at a time holds a journal: use it in a ``with`` statement. Records are read with
    :meth:`read`, by the type that they are expected to be of.

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
        content = path.read_bytes() if path.exists() else b""
        *lines, torn = content.split(b"\n")
        if torn and not lines:  # a journal begins with a whole line: this is another file, which is not to be lost
            raise ValueError(f"journal: expected a journal, got a file without a whole line, {path}")
        records = [_checked(path, number, line) for number, line in enumerate(lines, start=1)]
        if records and records[0] != json.loads(_json(run)):
            raise ValueError(
                f"journal: expected a journal of this run, got that of another, {path}; remove it or pass another path"
            )
        self.done = records[1:]
        with replacing(path) as scratch:
            scratch.write_bytes(b"".join(line + b"\n" for line in lines or [_line(_json(run))]))

    def read(self, index: int, kind: type[T]) -> T:
        """Return a record as a value of a type.

        Raises:
            ValueError: it is not of this type; the message names the file and the line.
        """
        return schema.convert(self.done[index], kind, self.where(index))

    def where(self, index: int) -> str:
        """The place of a record, for errors."""
        return f"journal: {self.path}, line {index + 2}"

    def check_end(self, count: int) -> None:
        """Raise a ValueError if there are more than `count` records."""
        if len(self.done) > count:
            raise ValueError(f"{self.where(count)}: expected the end of the journal, got another record")

    def add(self, record: Any) -> None:
        """Append a record, and flush it to disk.

        Raises:
            ValueError: it has a number that is NaN or infinite.
        """
        text = _json(record)
        self.done.append(json.loads(text))
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(_line(text) + b"\n")
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
    """Remove a journal whose run is over, and its lock; nothing of it if another run holds it."""
    path = Path(path)
    lock = FileLock(_lock_of(path))
    with suppress(Timeout), lock.acquire(blocking=False):
        path.unlink(missing_ok=True)
        _lock_of(path).unlink(missing_ok=True)  # held meanwhile, so whoever waits for it sees that it is gone


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _json(record: Any) -> str:
    return json.dumps(record, allow_nan=False)


def _line(text: str) -> bytes:
    return b"%08x %b" % (zlib.crc32(text.encode()), text.encode())


def _checked(path: Path, number: int, line: bytes) -> Any:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError(f"journal: expected a line that its checksum fits, got another in {path}, line {number}")
    return schema.parse(text, f"journal: {path}, line {number}")
