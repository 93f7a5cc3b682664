"""Output of the benches on real models: rows of named values."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

Row = dict[str, object]
ReadRows = list[dict[str, str]]


def show(rows: Sequence[Row], title: str, note: str | None = None) -> None:
    table = Table(title=title, caption=note)
    texts = ("context", "plan", "format", "rope", "reused_keys", "what")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in texts else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=180).print(table)


def write_csv(rows: Sequence[Row], title: str, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "setting"])
        writer.writeheader()
        writer.writerows({**row, "setting": title.replace("\n", ", ")} for row in rows)


def read_csv(path: Path) -> ReadRows:
    """Read what :func:`write_csv` wrote."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def with_bars(row: dict[str, str], name: str) -> tuple[float, float, float]:
    """A value, and how far its interval reaches below and above it."""
    value, low, high = (float(row[key]) for key in (name, f"{name}_low", f"{name}_high"))
    return value, value - low, high - value
