"""Where stored contexts lie: a local folder, or what a URL of fsspec names. Files appear and go as a whole.

Nothing waits for anything, so nothing can wait forever: a file is never written to once it has its name, a reader of a local
file holds it open, and so keeps its bytes when it is removed or replaced.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from .. import files

SUFFIX = ".safetensors"
# Of other folders and files nothing is looked at or removed.
_FOLDER = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(_FOLDER.pattern + r"/[0-9a-f]{32}\.[0-9a-f]{64}" + re.escape(SUFFIX))
_CHUNK = 1 << 20  # what is read stays in a processor's cache until it is hashed


class Stored(NamedTuple):
    """A file of a store: its name, as ``folder/file``, its bytes, and when it was last read or written, in seconds since 1970.

    Of remote files only writing is known, and where listings lack that or the bytes, they are 0.
    """

    name: str
    nbytes: int
    used: float


class OpenFile(Protocol):
    """A file that is read in parts, by several threads."""

    nbytes: int

    def read(self, start: int, into: memoryview) -> Iterator[memoryview]:
        """Fill `into` with the bytes from `start`, and yield it part by part as it is filled.

        Raises:
            OSError: the file is shorter, is gone, or cannot be read.
        """

    def use(self) -> None:
        """Count as used now, if that is kept."""


class Storage(Protocol):
    """A place for files."""

    def open(self, name: str) -> OpenFile:
        """Open a file.

        Raises:
            OSError: it cannot be opened; a FileNotFoundError where there is none.
        """

    def write(self, name: str, parts: Iterable[memoryview]) -> None:
        """Write a file as a whole, in place of one of its name."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def stored(self, folder: str | None = None) -> list[Stored]:
        """List the files of the store in a folder, or in all."""

    def sweep(self) -> None:
        """Remove what writers that were killed have left."""


def storage_at(url: str | os.PathLike[str]) -> Storage:
    """Return the storage at a path or a URL of fsspec.

    Raises:
        ValueError, ImportError: fsspec does not know such URLs, or lacks a module for them.
    """
    filesystem, root = url_to_fs(os.fspath(url), use_listings_cache=False)  # others write meanwhile
    return _Local(Path(root)) if isinstance(filesystem, LocalFileSystem) else _Remote(filesystem, root)


class _LocalFile:
    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.nbytes = os.fstat(self._descriptor).st_size

    def read(self, start: int, into: memoryview) -> Iterator[memoryview]:
        done = 0
        while done < len(into):
            count = os.preadv(self._descriptor, [into[done : done + _CHUNK]], start + done)
            if not count:
                raise OSError(f"expected {len(into)} bytes from {start}, got {done}")
            yield into[done : done + count]
            done += count

    def use(self) -> None:
        with suppress(OSError):  # who may read a file need not own it
            os.utime(self._descriptor)


class _Local:
    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self, name: str) -> OpenFile:
        return _LocalFile(self._root / name)

    def write(self, name: str, parts: Iterable[memoryview]) -> None:
        self.sweep()  # or a disk could stay full of what killed writers have left
        path = self._root / name
        try:
            for folder in (self._root, path.parent):
                files.make_private_folder(folder)
            with files.replacing(path, mode=0o600) as scratch, scratch.open("wb") as file:
                file.writelines(parts)
        except OSError as error:  # a full disk is not named by it
            raise OSError(error.errno, error.strerror, str(path)) from error

    def remove(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    def stored(self, folder: str | None = None) -> list[Stored]:
        found = []
        for path in self._folders() if folder is None else [self._root / folder]:
            with suppress(FileNotFoundError), os.scandir(path) as entries:
                for each in entries:
                    name = f"{path.name}/{each.name}"
                    if _NAME.fullmatch(name):
                        with suppress(FileNotFoundError):  # removed meanwhile
                            about = each.stat()
                            found.append(Stored(name, about.st_size, about.st_mtime))
        return found

    def sweep(self) -> None:
        for folder in self._folders():
            files.remove_abandoned(folder)

    def _folders(self) -> list[Path]:
        try:
            return [path for path in self._root.iterdir() if _FOLDER.fullmatch(path.name)]
        except FileNotFoundError:
            return []


class _RemoteFile:
    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        with _failures_named(path):
            nbytes = filesystem.size(path)
        if nbytes is None:
            raise OSError(f"expected a file of a known size, got none of {path}")
        self.nbytes = nbytes

    def read(self, start: int, into: memoryview) -> Iterator[memoryview]:
        with _failures_named(self._path):
            content = self._filesystem.cat_file(self._path, start=start, end=start + len(into))
        if len(content) != len(into):
            raise OSError(f"expected {len(into)} bytes from {start}, got {len(content)}")
        into[:] = content
        yield into

    def use(self) -> None:
        """Object stores know when a file was written alone."""


class _Remote:
    def __init__(self, filesystem: Any, root: str) -> None:
        self._filesystem, self._root = filesystem, root.rstrip("/")

    def open(self, name: str) -> OpenFile:
        return _RemoteFile(self._filesystem, f"{self._root}/{name}")

    def write(self, name: str, parts: Iterable[memoryview]) -> None:
        # In one put, which object stores do as a whole: leaving a file of fsspec by an error would write what there is of it.
        path = f"{self._root}/{name}"
        with _failures_named(path):
            self._filesystem.pipe_file(path, b"".join(parts))

    def remove(self, name: str) -> None:
        path = f"{self._root}/{name}"
        with suppress(FileNotFoundError), _failures_named(path):
            self._filesystem.rm_file(path)

    def stored(self, folder: str | None = None) -> list[Stored]:
        path = self._root if folder is None else f"{self._root}/{folder}"
        found: dict[str, Any] = {}
        with suppress(FileNotFoundError), _failures_named(path):
            found = self._filesystem.find(path, detail=True)
        names = {"/".join(each.split("/")[-2:]): about for each, about in found.items()}
        return [
            Stored(name, int(about["size"] or 0), _written(about))
            for name, about in names.items()
            if _NAME.fullmatch(name)
        ]

    def sweep(self) -> None:
        """Do nothing: a file that is put is there as a whole or not at all."""


@contextmanager
def _failures_named(path: str) -> Iterator[None]:
    """Have whatever a file system of fsspec fails with, which its libraries have errors of their own for, be an OSError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def _written(about: dict[str, Any]) -> float:
    """When a file was written, by whichever name a file system of fsspec gives it."""
    found = next(
        (about[name] for name in ("LastModified", "mtime", "last_modified", "modified", "created") if name in about),
        0.0,
    )
    return found.timestamp() if isinstance(found, datetime) else float(found) if isinstance(found, int | float) else 0.0
