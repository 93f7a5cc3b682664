"""A step of ``python -m bench.gpu``: what it is given, and its rows, which are on disk as soon as each exists."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.common import Row


@dataclass(frozen=True)
class Step:
    """The arguments of a step.

    Args:
        rows_path: file of its rows, a JSON object a line.
        folder: of the results of the whole run.
        seconds: that it may take.
        dry: whether to try everything at tiny sizes, on the CPU.
    """

    rows_path: Path
    folder: Path
    seconds: float
    dry: bool

    @property
    def device(self) -> str:
        """The device that is measured."""
        return "cpu" if self.dry else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """float32 on the CPU, where the operators are their references."""
        return torch.float32 if self.dry else torch.bfloat16

    def add(self, what: str, **values: Any) -> None:
        """Write a row."""
        row = {"what": what, **{name: _rounded(value) for name, value in values.items()}}
        with self.rows_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {name: value for name, value in row.items() if not isinstance(value, list)}
        print(json.dumps(shown), flush=True)

    @contextmanager
    def guarded(self, what: str, **values: Any) -> Iterator[None]:
        """Write a row that says what went wrong inside, and go on."""
        try:
            yield
        except Exception as error:  # whatever a compiler, a driver or a library raises costs its own row alone
            traceback.print_exc()
            self.add(what, **values, error=summary(error))


def summary(error: BaseException) -> str:
    """Return an error in a few words."""
    return f"{type(error).__name__}: {error}"[:600]


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


def read_rows(path: Path) -> list[Row]:
    """Read the rows that a step has written so far, the last count alone; a line that was cut off is not one."""
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["what"] == "counts":
            rows = [each for each in rows if each["what"] != "counts"]
        rows.append(row)
    return rows


def written(folder: Path, step: str, what: str) -> Row:
    """Return a row of an earlier step, empty if there is none."""
    path = folder / "gpu.json"
    steps = json.loads(path.read_text(encoding="utf-8"))["steps"] if path.exists() else {}
    return next((row for row in steps.get(step, {}).get("rows", []) if row["what"] == what), {})
