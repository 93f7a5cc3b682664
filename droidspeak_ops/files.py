"""Files that are whole or not there."""

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
    """Give a path to write what is to stand at `path` once it is whole and on disk; it is removed if writing fails.

    Threads and processes that write to one path each have a place of their own, and the last to end wins. A link stays a link,
    and a file keeps its mode.
    """
    target = Path(os.path.realpath(path))
    scratch = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex}")
    try:
        yield scratch
        if target.exists():
            shutil.copymode(target, scratch)
        _synced(scratch)
        os.replace(scratch, target)
        _synced(target.parent)
    finally:
        scratch.unlink(missing_ok=True)


def _synced(path: Path) -> None:
    """Bring to disk what has been written to a file, or which names a folder has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """The finished parts of a long run, a line of JSON each: killed at any moment, it goes on from there.

    Args:
        path: of the file; None keeps nothing.
        of: what identifies the run.

    Raises:
        ValueError: the file is the journal of another run.
    """

    def __init__(self, path: str | os.PathLike[str] | None, of: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.done: list[Any] = []
        if self.path is None:
            return
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []  # the last line may be torn
        if lines and json.loads(lines[0]) != json.loads(json.dumps(of)):
            raise ValueError(f"journal: {self.path} is of another run; another path is needed, or remove it")
        self.done = [json.loads(line) for line in lines[1:]]
        with replacing(self.path) as scratch:
            scratch.write_bytes(b"".join(line + b"\n" for line in lines or [json.dumps(of).encode()]))

    def add(self, record: Any) -> None:
        """Note what is finished."""
        self.done.append(record)
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
