"""Tables and a plot of what ``python -m bench.selected`` has written, put into a page between two marks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from bench.common import (
    Row,
    error_bars,
    interval,
    mean_and_interval,
    ratio_and_interval,
    read_csv,
)
from bench.pairs import CASES
from bench.paper.results_page import kl_axis, put_between, speed_axis
from droidspeak_ops.profiling import bootstrap

MARKS = ("<!-- tables: written by bench.selected -->", "<!-- end of tables -->")
FULL, REUSED, BAND = "full prefill", "all reused", "band"
ANSWER_MARGIN = 0.1
COLOURS = {
    BAND: "#7f7f7f",
    "all": "black",
    "selected": "#3182bd",
    "mean attention": "#e6550d",
    "recent": "#31a354",
    "deviation": "#756bb1",
    "random": "#bdbdbd",
    "best of bands": "#e7298a",
}
"""Colours of ways, by what their names start with."""

Judged = dict[str, dict[str, Row]]
"""Rows of contexts by the way's name."""


def write(folder: Path, page: Path) -> None:
    """Put tables of all pairs in the folder into the page, and draw `selected.png` beside them."""
    judged = {name: read_csv(path) for name in CASES if (path := folder / name / "judged.csv").exists()}
    tables, drawn = [], {}
    for name, rows in judged.items():
        timed = folder / CASES[name].pair.name / "times.csv"
        times = read_csv(timed) if timed.exists() else []
        summed = summary(rows)
        drawn[name] = (summed, times)
        tables += [_table(name, summed, times), *_bands_table(against_bands(rows, times))]
    plot(drawn, folder / "selected.png")
    put_between(page, MARKS, "\n\n".join(tables))


# --- judged -----------------------------------------------------------------------------------------------------------------


def by_way(rows: Sequence[Row]) -> Judged:
    """Return rows by way and context."""
    found: Judged = {}
    for row in rows:
        found.setdefault(row["way"], {})[row["context"]] = row
    return found


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each way, over the contexts on which it was judged: means and ratios, with intervals."""
    judged = by_way(rows)

    def row(way: str) -> Row:
        contexts = list(judged[way])

        def values(column: str, of: str = way) -> list[float]:
            return [float(judged[of][context][column]) for context in contexts]

        mine, full, kl = values("score"), values("score", FULL), values("kl")
        has_answers = judged[way][contexts[0]]["exact"] != ""
        return {
            "way": way,
            **mean_and_interval("score", mine),
            **ratio_and_interval("of_full_prefill", mine, full),
            "exact": f"{statistics.fmean(values('exact')):.3f}" if has_answers else "",
            "lost": sum(a < b - ANSWER_MARGIN for a, b in zip(mine, full, strict=True)) if has_answers else "",
            "won": sum(a > b + ANSWER_MARGIN for a, b in zip(mine, full, strict=True)) if has_answers else "",
            **mean_and_interval("same", values("same")),
            **mean_and_interval("kl", kl),
            "kl_median": f"{statistics.median(kl):.3g}",
            **ratio_and_interval("of_reuse", kl, values("kl", REUSED)),
            "contexts": len(contexts),
        }

    return [row(way) for way in judged]


def against_bands(rows: Sequence[Row], times: Sequence[Row]) -> list[Row]:
    """Return for each timed way the time that single bands need for its divergence, over its own time.

    `times_longer` is that ratio; it is `at_least` so much where no band diverges as little as the way in the mean. Its interval
    is of the divergences, and ends at the best band's time; times are taken as they were measured. All reused is the shortest
    band.
    """
    judged, found = by_way(rows), []
    for tokens in dict.fromkeys(row["tokens"] for row in times):
        relative = {row["way"]: 1 / float(row["ttft_speedup"]) for row in times if row["tokens"] == tokens}
        bands = sorted((way for way in judged if way in relative and _is_band(way)), key=relative.__getitem__)
        if not bands:
            continue
        for way in judged:
            if way not in relative or _is_band(way):
                continue
            contexts = [context for context in judged[way] if all(context in judged[band] for band in bands)]
            by_context = [[float(judged[each][context]["kl"]) for each in (*bands, way)] for context in contexts]
            kl = torch.tensor(by_context, dtype=torch.float64)
            seconds = torch.tensor([relative[band] for band in bands], dtype=torch.float64)
            estimate = bootstrap.of_means(
                kl,
                lambda means, seconds=seconds, own=relative[way]: (
                    time_for(means[..., -1], means[..., :-1], seconds) / own
                ),
            )
            means = kl.mean(0)
            names = ("times_longer", "times_longer_low", "times_longer_high")
            found.append(
                {
                    "way": way,
                    "tokens": tokens,
                    "faster": f"{1 / relative[way]:.2f}",
                    "bands_faster": f"{1 / time_for(means[-1], means[:-1], seconds).item():.2f}",
                    "at_least": bool(means[-1] < means[:-1].min()),
                    **{name: f"{value:.3g}" for name, value in zip(names, estimate, strict=True)},
                    "contexts": len(contexts),
                }
            )
    return found


def time_for(kl: torch.Tensor, bands: torch.Tensor, seconds: torch.Tensor) -> torch.Tensor:
    """Return the time that bands need for a divergence, by interpolation of its logarithm along their Pareto front.

    Args:
        kl: ``[...]``.
        bands: divergences ``[..., N]`` of bands.
        seconds: their times ``[N]``, ascending.

    Returns:
        Times ``[...]``: the first band's where it diverges no more, the best band's where none diverges as little.
    """
    least = torch.finfo(bands.dtype).tiny  # of which there is a logarithm
    front, at = bands.clamp(min=least).cummin(-1)  # a band that another beats stands for that one once more
    enough = front <= kl.clamp(min=least)[..., None]
    after = enough.to(torch.int64).argmax(-1, keepdim=True)
    ends = torch.cat(((after - 1).clamp(min=0), after), dim=-1)
    (more, less), (early, late) = (each.gather(-1, ends).unbind(-1) for each in (front.log(), seconds[at]))
    part = ((more - kl.clamp(min=least).log()) / (more - less)).nan_to_num(0.0)
    return torch.where(enough.any(-1), early + part * (late - early), seconds[at][..., -1])


def _is_band(way: str) -> bool:
    return way == REUSED or way.startswith(BAND)


# --- shown ------------------------------------------------------------------------------------------------------------------


def plot(drawn: dict[str, tuple[list[Row], list[Row]]], path: Path) -> None:
    """Draw for each pair the same next tokens, and the divergence of that of reuse, of every way against its measured speed.

    Args:
        drawn: by name, the summary and the times of a pair, of which the shortest contexts' are taken.
    """
    drawn = {name: each for name, each in drawn.items() if each[1]}
    if not drawn:
        return
    figure = Figure(figsize=(1 + 3.6 * len(drawn), 7), layout="constrained")
    panels = figure.subplots(2, len(drawn), squeeze=False, sharex=True)
    for column, (name, (summed, times)) in zip(panels.T, drawn.items(), strict=True):
        faster = _speedups(times)[min(_speedups(times), key=int)]
        some = [row for row in summed if row["way"] in faster]
        for axes, value in zip(column, ("same", "of_reuse"), strict=True):
            for start, colour in COLOURS.items():
                points = [row for row in some if row["way"].startswith(start)]
                if points:
                    at = [float(faster[row["way"]]) for row in points]
                    axes.errorbar(at, *error_bars(points, value), fmt="o", ms=4, color=colour, label=start)
            for row in some:
                for maps in ("fitted", "trained"):
                    if maps in row["way"]:
                        at = float(faster[row["way"]]), float(row[value])
                        axes.annotate(f"over {maps}", at, xytext=(3, 3), textcoords="offset points", fontsize=6)
            speed_axis(axes)
        kl_axis(column[1])
        column[0].set_title(name, fontsize=10)
    panels[0, 0].set_ylabel("next tokens that are full prefill's")
    panels[1, 0].set_ylabel("KL from full prefill, of reuse's")
    drawn_ways = {
        label: handle
        for axes in panels[0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)  # no panel has all
    }
    panels[0, -1].legend(drawn_ways.values(), drawn_ways.keys(), fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)


def _speedups(times: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Return speeds by tokens and way."""
    found: dict[str, dict[str, str]] = {}
    for row in times:
        found.setdefault(row["tokens"], {})[row["way"]] = row["ttft_speedup"]
    return found


def _table(name: str, summed: Sequence[Row], times: Sequence[Row]) -> str:
    speedups, case = _speedups(times), CASES[name]
    contexts = max(row["contexts"] for row in summed)
    firsts = [f"first token, {tokens} tokens" for tokens in speedups]
    columns = ["way", *firsts, case.task.metric or "right tokens", "of full prefill's", "exact", "lost", "won"]
    columns += ["same next token", "kl", "median kl", "kl of reuse's"]
    lines = [f"### `{name}`", "", f"{case.description[:1].upper()}{case.description[1:]}; {contexts} contexts.", ""]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in summed:
        first = [f"{each[row['way']]}x" if row["way"] in each else "" for each in speedups.values()]
        score, of_full, same, kl, of_reuse = (
            interval(row, value) for value in ("score", "of_full_prefill", "same", "kl", "of_reuse")
        )
        cells = [row["way"], *first, score, of_full, row["exact"], row["lost"], row["won"], same, kl]
        lines.append(f"| {' | '.join(map(str, (*cells, row['kl_median'], of_reuse)))} |")
    return "\n".join(lines)


def _bands_table(rows: Sequence[Row]) -> list[str]:
    """Return the table of :func:`against_bands`, or nothing where nothing was timed."""
    if not rows:
        return []
    columns = "way | tokens timed | faster | bands of the same kl, faster | times longer"
    lines = [f"| {columns} |", "|---" * len(columns.split("|")) + "|"]
    for row in rows:
        least = "at least " if row["at_least"] else ""
        cells = (
            row["way"],
            row["tokens"],
            f"{row['faster']}x",
            f"{row['bands_faster']}x",
            least + interval(row, "times_longer"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return ["\n".join(lines)]
