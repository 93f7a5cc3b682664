"""A plot of the times that ``python -m bench.serving`` has measured, and its table for a page of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bench.common import Row, interval
from bench.paper.results_page import put_between

MARKS = ("<!-- table: written by bench.serving -->", "<!-- end of table -->")
COLOURS = {"off": "#7f7f7f", "on": "#3182bd"}
LABELS = {"off": "plain vLLM", "on": "contexts shared"}


def draw(rates: Sequence[Row], path: Path) -> None:
    """Draw times to first token against the rate, with a panel for each pair and number of questions."""
    panels = list(dict.fromkeys((row["pair"], row["questions"]) for row in rates))
    figure = Figure(figsize=(1 + 3.6 * len(panels), 3.8), layout="constrained")
    (all_axes,) = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axes, (pair, questions) in zip(all_axes, panels, strict=True):
        for way, colour in COLOURS.items():
            some = [row for row in rates if (row["pair"], row["questions"], row["sharing"]) == (pair, questions, way)]
            at = [float(row["rate"]) for row in some]
            for column, style in (("p50_ms", "-"), ("p95_ms", "--")):
                seconds = [float(row[column]) / 1e3 for row in some]
                label = f"{LABELS[way]}, {column.removesuffix('_ms')}"
                axes.plot(at, seconds, style, marker="o", ms=4, color=colour, label=label)
        axes.set_title(f"pair '{pair}', {questions} to a context", fontsize=10)
        ticks = sorted({float(row["rate"]) for row in rates})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel("requests per second")
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("seconds to first token")
    all_axes[-1].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)


def write(rows: Sequence[Row], page: Path) -> None:
    """Put a table of the summary into a page."""
    columns = (
        "pair | questions to a context | first token, plain | shared | faster | requests per second at the knee, plain | "
        "shared | times | most answers per second, plain | shared | times | score, plain | shared | of plain's"
    )
    lines = [f"| {columns} |", "|---" * len(columns.split("|")) + "|"]
    for row in rows:
        least = "at least " if row["at_least"] else ""
        times = f"{least}{row['knee_ratio']}" if row["knee_ratio"] else ""
        milliseconds = f"{row['off_p50_ms']} ms | {row['on_p50_ms']} ms | {row['faster']}x"
        scores = (interval(row, name) for name in ("off_score", "on_score", "of_off"))
        cells = (
            f"`{row['pair']}`",
            row["questions"],
            milliseconds,
            row["off_knee"],
            f"{least}{row['on_knee']}",
            times,
            row["off_most"],
            row["on_most"],
            row["most_ratio"],
            *scores,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    put_between(page, MARKS, "\n".join(lines))
