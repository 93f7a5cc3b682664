"""Tables and a plot of what ``python -m bench.paper.paper`` has written, put into a page between two marks."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.common import Row, error_bars, interval, read_csv

MARKS = ("<!-- tables: written by bench.paper.paper -->", "<!-- end of tables -->")
COLOURS = {
    "contiguous band": "#7f7f7f",
    "scattered layers": "#fdae6b",
    "selected tokens": "#9e9ac8",
    "ours in the same time": "#3182bd",
}
KL_MARKS = [digit * 10.0**exponent for exponent in range(-5, 2) for digit in (1, 2, 5)]


def write(folder: Path, page: Path) -> None:
    """Put tables of all pairs in the folder into the page, and draw `results.png` beside them."""
    judged, answers, times, choices = (
        {path.parent.name: read_csv(path) for path in sorted(folder.glob(f"*/{name}.csv"))}
        for name in ("judged", "answers", "times", "choice")
    )
    speedups = {name: {row["plan"]: row["ttft_speedup"] for row in times.get(name, [])} for name in judged}
    plot(judged, speedups, folder / "results.png")
    of_pairs = (_table(name, rows, answers.get(name, []), speedups[name]) for name, rows in judged.items())
    tables = "\n\n".join((_losses(judged, answers, speedups), _choices(choices), *of_pairs))
    put_between(page, MARKS, tables)


def put_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Put text into a page between two marks, in place of what is there."""
    before, rest = page.read_text(encoding="utf-8").split(marks[0])
    after = rest.split(marks[1])[1]
    page.write_text(f"{before}{marks[0]}\n\n{text}\n\n{marks[1]}{after}", encoding="utf-8")


def plot(judged: dict[str, list[Row]], speedups: dict[str, dict[str, str]], path: Path) -> None:
    """Draw for each pair the divergence of every way against its measured speed."""
    figure = Figure(figsize=(1 + 3.6 * len(judged), 4.2), layout="constrained")
    (panels,) = figure.subplots(1, len(judged), squeeze=False)
    for axes, (name, rows) in zip(panels, judged.items(), strict=True):
        timed = speedups[name]
        bands = {row["band"]: row["plan"] for row in rows if row["way"] == "contiguous band"}
        for way, colour in COLOURS.items():
            # What stands for a band is drawn at the band's time, unless it was timed itself.
            faster = {
                row["plan"]: timed.get(row["plan"], timed.get(bands[row["band"]])) for row in rows if row["way"] == way
            }
            some = [row for row in rows if row["way"] == way and faster[row["plan"]]]
            some.sort(key=lambda row, faster=faster: float(faster[row["plan"]]))
            if some:
                at = [float(faster[row["plan"]]) for row in some]
                axes.errorbar(at, *error_bars(some, "kl"), color=colour, marker="o", ms=4, label=way)
        for way, marker in (("all reused", "s"), ("all projected", "v"), ("all fitted", "*")):
            some = [row for row in rows if row["way"] == way and row["plan"] in timed]
            if some:
                at = [float(timed[row["plan"]]) for row in some]
                axes.errorbar(at, *error_bars(some, "kl"), fmt=marker, color="black", label=way)
        speed_axis(axes)
        kl_axis(axes)
        axes.set_title(f"pair '{name}'", fontsize=10)
    panels[0].set_ylabel("KL from full prefill, nats")
    panels[-1].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)


def speed_axis(axes: Axes) -> None:
    """Have the horizontal axis of a drawn plot say how many times faster than full prefill the first token is."""
    axes.set_xscale("log")
    ticks = [1.5, 2, 3, 5, 10, 20]
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("faster to the first token")
    axes.spines[["top", "right"]].set_visible(False)


def kl_axis(axes: Axes) -> None:
    """Have the vertical axis of a drawn plot be of divergences, on a logarithmic scale."""
    axes.set_yscale("log")
    limits = axes.get_ylim()
    marks = [mark for mark in KL_MARKS if limits[0] <= mark <= limits[1]]
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.set_ylim(limits)
    axes.minorticks_off()


def _losses(judged: dict[str, list[Row]], answers: dict[str, list[Row]], speedups: dict[str, dict[str, str]]) -> str:
    """Return a table of the share of full prefill's quality that the best plan for a speed keeps."""
    lines = [
        "### Quality kept, by speed",
        "",
        "| pair | way | plan | first token | same next token | right tokens, of full prefill's | score, of full prefill's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in judged.items():
        scores = {row["plan"]: interval(row, "of_full_prefill") for row in answers.get(name, [])}
        for row in rows:
            if row["way"].startswith(("all reused", "all fitted", "best at", "chosen")):
                kept = " | ".join(interval(row, which) for which in ("agreement", "of_accuracy"))
                first, score = _speedup(row, speedups[name]), scores.get(row["plan"], "")
                lines.append(f"| `{name}` | {row['way']} | {row['plan']} | {first} | {kept} | {score} |")
    return "\n".join(lines)


def _choices(choices: dict[str, list[Row]]) -> str:
    """Return a table of the next tokens lost beyond the best plan's, by speed and pair."""
    lines = ["### Loss beyond the best plan's", "", f"| times faster | {' | '.join(f'`{name}`' for name in choices)} |"]
    lines.append("|---" * (1 + len(choices)) + "|")
    by_speed = [{row["faster"]: interval(row, "points") for row in rows} for rows in choices.values()]
    speeds = sorted({speed for each in by_speed for speed in each}, key=float)
    lines += [f"| {speed} | {' | '.join(each.get(speed, '') for each in by_speed)} |" for speed in speeds]
    return "\n".join(lines)


def _table(name: str, rows: list[Row], answers: list[Row], speedups: dict[str, str]) -> str:
    lines = [
        f"### Pair `{name}`",
        "",
        f"| way | plan | first token | kl | of the band | same next token, {rows[0]['contexts']} contexts |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        of_band = interval(row, "of_band") if row["of_band"] else ""
        way = f"{row['way']} ({row['band']} layers)" if row["way"] == "contiguous band" else row["way"]
        first, kl, agreement = _speedup(row, speedups), interval(row, "kl"), interval(row, "agreement")
        lines.append(f"| {way} | {row['plan']} | {first} | {kl} | {of_band} | {agreement} |")
    if answers:
        lines += [
            "",
            f"| plan | first token | {answers[0]['metric']}, {answers[0]['contexts']} answers | of full prefill |",
        ]
        lines.append("|---|---|---|---|")
        for row in answers:
            first, score = _speedup(row, speedups), interval(row, "score")
            lines.append(f"| {row['plan'] or row['way']} | {first} | {score} | {interval(row, 'of_full_prefill')} |")
    return "\n".join(lines)


def _speedup(row: Row, speedups: dict[str, str]) -> str:
    return f"{speedups[row['plan']]}x" if row["plan"] in speedups else ""
