"""Rows of the benches, as tables and CSV files, the machine that they hold for, and quality with intervals.

A bench has ``main(argv) -> list[Row]``, which prints its rows, writes them where it is asked to, and returns them.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from droidspeak_ops import machine, metrics
from droidspeak_ops.profiling import bootstrap

Row = dict[str, Any]
"""A line of a table: values by column."""


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the command line of ``python -m bench.NAME``, whose help is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


# --- the machine ------------------------------------------------------------------------------------------------------------


def default_device() -> torch.device:
    """Return the GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment(device: torch.device | str) -> Row:
    """Return :func:`droidspeak_ops.machine.environment`, with the version of transformers."""
    return {**machine.environment(device), "transformers": version("transformers")}


def setting(device: torch.device | str = "cpu") -> str:
    """Return the device and the versions of torch and transformers in words, as titles and CSV files have them."""
    here = environment(device)
    return f"{here['device']}, torch {here['torch']}, transformers {here['transformers']}"


def checkout() -> Row:
    """Return the commit of the sources, and whether they were changed since; None where they are no checkout."""
    head = _git("rev-parse", "HEAD")
    changed = None if head is None else bool(_git("status", "--porcelain", "--untracked-files=no"))
    return {"commit": head, "changed_since_commit": changed}


def _git(*arguments: str) -> str | None:
    """Return what git prints about the sources; None where they are no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# --- tables -----------------------------------------------------------------------------------------------------------------


def show(rows: Sequence[Row], title: str, note: str | None = None) -> None:
    """Print rows as a table, with the columns of the first one, and intervals beside their values."""
    table = Table(title=title, caption=note)
    ends = {end for name in rows[0] for end in _names(name)[1:]}
    columns = [name for name in rows[0] if name not in ends]
    for name in columns:
        table.add_column(name, justify="right" if all(_is_number(row[name]) for row in rows) else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row, name) for name in columns))
    Console(width=180).print(table)


def _cell(row: Row, name: str) -> str:
    if row[name] is None or row[name] == "":
        return ""
    return interval(row, name) if f"{name}_low" in row else str(row[name])


def _is_number(value: object) -> bool:
    try:
        float(str(value or 0))
    except ValueError:
        return False
    return True


def write_csv(path: Path, rows: Sequence[Row], **same: Any) -> None:
    """Write rows, which need not have the same columns, and behind them columns whose value is the same in each."""
    names = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, *same])
        writer.writeheader()
        writer.writerows({**row, **same} for row in rows)


def read_csv(path: Path) -> list[Row]:
    """Read what :func:`write_csv` wrote; all values are texts."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- quality ----------------------------------------------------------------------------------------------------------------


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Return the mean divergence from a reference at the tokens of an answer, in nats."""
    return metrics.kl_divergence(reference, logits).mean().item()


def mean_and_interval(name: str, values: Sequence[float]) -> Row:
    """Return the columns of a mean, and of where 95 % of the means of bootstrap samples lie."""
    return _columns(name, bootstrap.mean(values))


def ratio_and_interval(name: str, values: Sequence[float], base: Sequence[float]) -> Row:
    """Return the columns of the ratio of two means over the same examples, and of its bootstrap interval."""
    data = torch.tensor([values, base], dtype=torch.float64).T
    return _columns(name, bootstrap.of_means(data, lambda means: means[..., 0] / means[..., 1]))


def _columns(name: str, estimate: bootstrap.Estimate) -> Row:
    return {column: f"{value:.3g}" for column, value in zip(_names(name), estimate, strict=True)}


def without_interval(name: str) -> Row:
    """Return the same columns, empty."""
    return dict.fromkeys(_names(name), "")


def _names(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def interval(row: Row, name: str) -> str:
    """Return a value with its interval in words."""
    value, low, high = (row[column] for column in _names(name))
    return f"{value} ({low} to {high})"


def error_bars(rows: Sequence[Row], name: str) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Return the values of a column, and how far their intervals reach below and above them, as matplotlib draws them."""
    values, lows, highs = ([float(row[column]) for row in rows] for column in _names(name))
    below = [value - low for value, low in zip(values, lows, strict=True)]
    above = [high - value for value, high in zip(values, highs, strict=True)]
    return values, (below, above)
