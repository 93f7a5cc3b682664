"""The report of a profile: plots, and an HTML page with a table and the plots."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from . import bootstrap
from .bootstrap import Estimate
from .frontier import Frontier, Point, Rest

MAX_LOSSES = (0.01, 0.05, 0.1)
"""Limits of the quality loss for which the report shows the chosen plan."""

COLOURS: dict[Rest, str] = {"reuse": "#7f7f7f", "project": "#31a354", "fitted": "#3182bd"}
NAMES: dict[Rest, str] = {"reuse": "rest reused", "project": "rest projected", "fitted": "rest fitted"}
MARKERS = {"": ".", "scattered layers": "x", "tokens by attention": "^", "last tokens": "v", "tokens by deviation": "d"}
"""Markers of points, by what they recompute."""
_MIN_KL = 1e-5  # lower end of logarithmic axes; smaller divergences are rounding

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: right }}
th:first-child, td:first-child, td:nth-child(2) {{ text-align: left }}
img {{ max-width: 100% }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
{table}
{figures}
</html>
"""


def write_report(frontier: Frontier, folder: Path, title: str) -> list[Path]:
    """Write the plots as PNG files and a self-contained `report.html`; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written, images = [], []
    for name, (heading, draw) in PLOTS.items():
        figure = draw(frontier)
        target = folder / f"{name}.png"
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=130)
        target.write_bytes(buffer.getvalue())
        written.append(target)
        image = base64.b64encode(buffer.getvalue()).decode()
        images.append(f'<h2>{html.escape(heading)}</h2>\n<img alt="{name}" src="data:image/png;base64,{image}">')
    page = _PAGE.format(
        title=html.escape(title),
        summary=html.escape(summary(frontier)),
        table=_table(frontier),
        figures="\n".join(images),
    )
    target = folder / "report.html"
    target.write_text(page, encoding="utf-8")
    return [*written, target]


def summary(frontier: Frontier) -> str:
    """Summarize the measurements and define the terms of the report."""
    tokens = frontier.contexts
    return (
        f"{len(frontier.points)} plans measured on {len(tokens)} contexts of {min(tokens)} to {max(tokens)} tokens; bands "
        f"start and end at multiples of {frontier.granularity} layers. Tokens that are selected run through all of them. Plans "
        f"are chosen by their expected loss on {len(tokens) - frontier.held_out} contexts and evaluated on {frontier.held_out} "
        f"held-out ones. Quality loss is the {_loss(frontier)}. KL is the divergence of next-token distributions from those "
        f"after full prefill, in nats: the mean over contexts, or the geometric mean where it is called typical. Brackets hold "
        f"95 % bootstrap intervals. Times are predicted for {frontier.mean_tokens} tokens, from measurements on "
        f"{frontier.costs.machine}."
    )


def _loss(frontier: Frontier) -> str:
    if frontier.scores is None:
        return "top-1 disagreement with full prefill"
    return "relative loss of answer score against full prefill"


def rows(frontier: Frontier) -> list[dict[str, str]]:
    """Return the table: for each limit of the quality loss the chosen plan, its speed-up and its held-out loss."""
    found = []
    for max_loss in MAX_LOSSES:
        point = frontier.point(frontier.choose(max_quality_loss=max_loss))
        found.append(
            {
                "quality loss up to": f"{max_loss:.0%}",
                "plan": str(point),
                "faster than full prefill": f"{frontier.speedup(point):.1f}x",
                "expected loss": f"{frontier.expected_loss(point):.1%}",
                "loss, held out": _percent(frontier.quality_loss(point, held_out=True)),
                "KL, held out": "{:.3g} ({:.2g} to {:.2g})".format(*frontier.kl(point, held_out=True)),
            }
        )
    return found


def sensitivity(frontier: Frontier) -> Figure:
    """Plot the sensitivity of each layer, or group of `granularity` layers, to reuse (the paper's figure 7)."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    estimates = [bootstrap.mean(each.kl) for each in frontier.sensitivity]
    axes.bar(
        [each.start for each in frontier.sensitivity],
        [each.value for each in estimates],
        [each.end - each.start for each in frontier.sensitivity],
        yerr=list(zip(*(each.error_bars for each in estimates), strict=True)),
        align="edge",
        color=COLOURS["reuse"],
        edgecolor="white",
        ecolor="black",
        capsize=2,
    )
    axes.set_xlabel("layer that alone is reused")
    axes.set_ylabel("KL from full prefill, nats")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def bands(frontier: Frontier) -> Figure:
    """Plot the divergence of every band by its start and end."""
    rests = [rest for rest in NAMES if _bands(frontier, rest)]
    figure = Figure(figsize=(1 + 4.2 * len(rests), 4.2), layout="constrained")
    (panels,) = figure.subplots(1, len(rests), squeeze=False, sharey=True)
    values = {
        rest: {each.plan.bands[0]: frontier.typical_kl(each) for each in _bands(frontier, rest)} for rest in rests
    }
    every = [kl for of_rest in values.values() for kl in of_rest.values() if _MIN_KL < kl < math.inf] or [_MIN_KL]
    image = None
    for axes, rest in zip(panels, rests, strict=True):
        starts = sorted({start for start, _ in values["reuse"]})
        ends = sorted({end for _, end in values["reuse"]})
        grid = [[max(values[rest].get((s, e), float("nan")), min(every)) for e in ends] for s in starts]
        image = axes.imshow(grid, norm="log", cmap="viridis_r", vmin=min(every), vmax=max(every), origin="lower")
        axes.set_xticks(range(len(ends)), map(str, ends), fontsize=6)
        axes.set_yticks(range(len(starts)), map(str, starts), fontsize=6)
        axes.set_title(NAMES[rest], fontsize=10)
        axes.set_xlabel("end of the band")
    panels[0].set_ylabel("start of the band")
    figure.colorbar(image, ax=panels, label="typical KL from full prefill, nats", shrink=0.8)  # type: ignore[arg-type]
    return figure


def frontier_plot(frontier: Frontier) -> Figure:
    """Plot all plans by speed-up and divergence, with the Pareto front and the chosen plans."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for rest, name in NAMES.items():
        for kind, marker in MARKERS.items():
            some = [each for each in frontier.points if each.rest == rest and _kind(each) == kind]
            label = f"{name}, {kind}" if kind else name
            if some:
                _scatter(axes, frontier, some, marker=marker, color=COLOURS[rest], label=label, alpha=0.6)
    best = _drawable(frontier, frontier.pareto())
    axes.plot(
        [frontier.speedup(point) for point in best], [frontier.typical_kl(point) for point in best], color="black", lw=1
    )
    for number, max_loss in enumerate(MAX_LOSSES):
        chosen = frontier.point(frontier.choose(max_quality_loss=max_loss))
        label = f"chosen for a loss up to {max_loss:.0%}: {chosen}"
        _scatter(
            axes,
            frontier,
            [chosen],
            marker="*",
            s=160,
            color=f"C{number + 1}",
            edgecolor="black",
            label=label,
            zorder=3,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [1, 1.5, 2, 3, 5, 7, 10, 15, 20]
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axes.set_xlabel(f"predicted speed-up of time to first token over full prefill ({frontier.mean_tokens} tokens)")
    axes.set_ylabel("typical KL from full prefill, nats")
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def quality(frontier: Frontier) -> Figure:
    """Plot the losses of the Pareto-optimal plans: expected, and with intervals on the choosing and the held-out contexts."""
    best = _drawable(frontier, frontier.pareto())
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(best)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    measures: Sequence[tuple[Callable[..., Estimate], str]] = (
        (frontier.quality_loss, _loss(frontier)),
        (frontier.kl, "KL from full prefill, nats"),
    )
    for axes, (measure, label) in zip((left, right), measures, strict=True):
        for held_out, offset, colour in ((False, -0.12, "#9ecae1"), (True, 0.12, "#08519c")):
            estimates = [measure(point, held_out=held_out) for point in best]
            values = [each.value for each in estimates]
            error_bars = list(zip(*(each.error_bars for each in estimates), strict=True))
            heights = [index + offset for index in range(len(best))]
            name = "held-out contexts" if held_out else "choosing contexts"
            axes.errorbar(values, heights, xerr=error_bars, fmt="o", color=colour, ms=4, label=name)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(0, color="black", lw=0.6)
    expected = [frontier.expected_loss(point) for point in best]
    left.plot(expected, range(len(best)), "|", color="black", ms=9, label="expected")
    left.set_yticks(range(len(best)), [f"{point}, {frontier.speedup(point):.1f}x" for point in best], fontsize=7)
    left.invert_yaxis()
    left.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


PLOTS: dict[str, tuple[str, Callable[[Frontier], Figure]]] = {
    "frontier": ("Quality against time", frontier_plot),
    "quality": ("Quality loss of the Pareto-optimal plans", quality),
    "bands": ("Every band", bands),
    "sensitivity": ("Sensitivity by layer", sensitivity),
}


def _kind(point: Point) -> str:
    """Name what a point recomputes; empty for one band or none."""
    if point.plan.select:
        return "last tokens" if point.plan.selector == "recent" else f"tokens by {point.plan.selector}"
    return "scattered layers" if len(point.plan.bands) > 1 else ""


def _bands(frontier: Frontier, rest: Rest) -> list[Point]:
    """Return the points with one band."""
    return [point for point in frontier.points if point.rest == rest and len(point.plan.bands) == 1]


def _drawable(frontier: Frontier, points: Sequence[Point]) -> list[Point]:
    """Return the points that are not off a logarithmic axis."""
    return [point for point in points if frontier.typical_kl(point) > _MIN_KL]


def _scatter(axes, frontier: Frontier, points: Sequence[Point], **style) -> None:  # type: ignore[no-untyped-def]
    shown = _drawable(frontier, points)
    axes.scatter([frontier.speedup(each) for each in shown], [frontier.typical_kl(each) for each in shown], **style)


def _table(frontier: Frontier) -> str:
    found = rows(frontier)
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in found[0])
    lines = ["".join(f"<td>{html.escape(value)}</td>" for value in row.values()) for row in found]
    return f"<table><tr>{heads}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _percent(estimate: Estimate) -> str:
    return "{:.1%} ({:.1%} to {:.1%})".format(*estimate)
