"""What the benches on real models print and write: rows of named values."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

Row = dict[str, object]


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
