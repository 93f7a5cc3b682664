"""Plots of what ``python -m bench.maps`` has written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.common import Row, error_bars, read_csv

WAYS = {
    "reuse": "#b8b8b8",
    "fitted by ridge": "#c6dbef",
    "fitted, no hidden states": "#9ecae1",
    "fitted": "#3182bd",
    "recent 10 % over fitted": "#08306b",
    "selected 10 % over fitted": "#31a354",
    "band": "#fdae6b",
    "band corrected, rest fitted": "#a63603",
}
"""Colours, by way."""


def draw(folder: Path) -> None:
    """Draw each part whose CSV file is in `folder`, beside it."""
    for part, plot in (("pairs", _pairs), ("tokens", _tokens), ("layers", _layers)):
        path = folder / f"{part}.csv"
        if path.exists():
            plot(read_csv(path), folder / f"{part}.png")


def _pairs(rows: Sequence[Row], path: Path) -> None:
    names = list(dict.fromkeys(row["pair"] for row in rows))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(WAYS)
    for number, (way, colour) in enumerate(WAYS.items()):
        values, bars = error_bars(
            [row for name in names for row in rows if (row["pair"], row["way"]) == (name, way)], "of_reuse"
        )
        places = [place + (number - len(WAYS) / 2 + 0.5) * width for place in range(len(names))]
        axes.bar(places, values, width, yerr=bars, label=way, color=colour, error_kw={"lw": 1, "capsize": 2})
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("KL from the receiver's own prefill,\nrelative to plain reuse")
    axes.set_title(
        "Held-out contexts, 95 % bootstrap intervals; a band is [15, 20), all else runs no layer", fontsize=10
    )
    figure.legend(loc="outside lower center", fontsize=8, ncols=4, frameon=False)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _tokens(rows: Sequence[Row], path: Path) -> None:
    names = list(dict.fromkeys(row["pair"] for row in rows))
    figure = Figure(figsize=(2 + 4 * len(names), 3.8), layout="constrained")
    (row_of_axes,) = figure.subplots(1, len(names), squeeze=False, sharey=True)
    for axes, name in zip(row_of_axes, names, strict=True):
        of_pair = [row for row in rows if row["pair"] == name]
        for way in dict.fromkeys(row["way"] for row in of_pair):
            of_way = [row for row in of_pair if row["way"] == way]
            tokens = [int(row["tokens"]) for row in of_way]
            axes.errorbar(tokens, *error_bars(of_way, "of_reuse"), label=way, color=WAYS[way], marker="o")
        axes.axhline(1, color="black", lw=0.8)
        axes.set_xscale("log")
        axes.set_xlabel("calibration tokens")
        axes.set_title(f"pair '{name}'", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    row_of_axes[0].set_ylabel("KL relative to plain reuse")
    row_of_axes[-1].legend(frameon=False)
    figure.savefig(path, dpi=130)


def _layers(rows: Sequence[Row], path: Path) -> None:
    names = list(dict.fromkeys(row["pair"] for row in rows))
    figure = Figure(figsize=(3.3 * len(names), 5.4), layout="constrained")
    grid = figure.subplots(2, len(names), squeeze=False, sharex=True, sharey="row")
    for column, name in enumerate(names):
        of_pair = [row for row in rows if row["pair"] == name]
        layers = [int(row["layer"]) for row in of_pair]
        above, below = grid[:, column]
        for what, colour in (("reused", "#b8b8b8"), ("projected", "#31a354"), ("fitted", "#3182bd")):
            above.plot(layers, [float(row[what]) for row in of_pair], color=colour, label=what)
        for side, style in (("K", "-"), ("V", "--")):
            shares = [float(row[f"share of {side}"]) for row in of_pair]
            below.plot(layers, shares, style, color="#3182bd", label=side)
        above.set_title(name, fontsize=10)
        below.set_xlabel("layer")
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("squared error of K and V,\nover their variance")
    grid[1, 0].set_ylabel("share of what is fitted")
    grid[0, -1].legend(fontsize=8, frameon=False)
    grid[1, -1].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
