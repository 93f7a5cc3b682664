"""Single arguments of the commands: what they are, and whether they can be that."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TypeVar

from ..prefill.plan import Plan
from ..proof.targets import check_targets

MIN_TOKENS = 64
"""Fewest tokens of a piece of text that is cut into a context, a suffix and an answer."""
MIN_CONTEXTS = 3
"""Fewest contexts that maps are fitted to, or plans measured on."""

T = TypeVar("T")


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return `parse` with errors whose message argparse shows."""

    @wraps(parse)
    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def output_file(text: str) -> Path:
    """Return the path of a file that can be written, or replaced.

    Raises:
        ValueError: it cannot.
    """
    path = Path(text)
    if path.exists() and not path.is_file():
        raise ValueError(f"expected a file, got {path}, which is {'a folder' if path.is_dir() else 'another thing'}")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise ValueError(f"expected a file in a folder that exists, got {path}")
    _check_writable(folder)
    return path


def png_file(text: str) -> Path:
    """Return the path of a PNG file that can be written; errors as :func:`output_file`."""
    if not text.lower().endswith(".png"):
        raise ValueError(f"expected a file that ends in .png, got {text}")
    return output_file(text)


def output_folder(text: str) -> Path:
    """Return the path of a folder that can be written, or made with its parents.

    Raises:
        ValueError: it cannot.
    """
    path = Path(os.path.realpath(text))
    existing = next(each for each in (path, *path.parents) if each.exists())
    if not existing.is_dir():
        raise ValueError(f"expected a folder, got {text}, where {existing} is a file")
    _check_writable(existing)
    return Path(text)


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"expected a folder that can be written, got {folder}")


def whole_number(text: str) -> int:
    """Return a whole number.

    Raises:
        ValueError: it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected a whole number, got {text!r}") from None


def at_least(lowest: int) -> Callable[[str], int]:
    """Return what parses a whole number of `lowest` or more, and raises ValueError for any other."""

    def parse(text: str) -> int:
        value = whole_number(text)
        if value < lowest:
            raise ValueError(f"expected {lowest} or more, got {text}")
        return value

    return parse


def size(text: str) -> int:
    """Return bytes from a number with a unit or without, such as ``20GiB``.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(B|KiB|MiB|GiB|TiB)?", text)
    if found is None:
        raise ValueError(f"expected bytes, such as 500MiB or 20GiB, got {text!r}")
    return int(float(found[1]) * 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(found[2] or "B"))


def number_of_contexts(text: str) -> int | None:
    """Return how many contexts to use, or None for all of them.

    Raises:
        ValueError: they are too few, or no number.
    """
    return None if text in ("all", "0") else at_least(MIN_CONTEXTS)(text)


def band(text: str) -> tuple[int, int]:
    """Return a band from ``START:END``.

    Raises:
        ValueError: it is none.
    """
    try:
        start, end = map(int, text.split(":"))
    except ValueError:
        raise ValueError(f"expected a band's first layer and its end, such as 15:20, got {text}") from None
    ((start, end),) = Plan([(start, end)]).bands
    return start, end


def layers(text: str) -> list[int]:
    """Return layers from a list with commas.

    Raises:
        ValueError: one is no layer.
    """
    try:
        found = [int(each) for each in text.split(",")]
    except ValueError:
        raise ValueError(f"expected layers with commas between them, such as 10,15, got {text}") from None
    return list(Plan(project=found).project)  # type: ignore[arg-type]


def seconds(text: str) -> float:
    """Return seconds.

    Raises:
        ValueError: they are none, or not positive.
    """
    with suppress(ValueError):
        if 0 < (found := float(text)) < math.inf:
            return found
    raise ValueError(f"expected a positive number of seconds, got {text!r}")


def busy_plan(text: str) -> tuple[int, str]:
    """Return from ``WAITING=FILE`` the number of requests, and the file.

    Raises:
        ValueError: it is none.
    """
    waiting, _, file = text.partition("=")
    if not file:
        raise ValueError(f"expected a number of requests and a file, such as 8=cheap.json, got {text!r}")
    return at_least(1)(waiting), file


def targets(text: str) -> list[str]:
    """Return GPU architectures from a list with commas.

    Raises:
        ValueError: one is not known.
    """
    found = text.split(",")
    check_targets(found)
    return found
