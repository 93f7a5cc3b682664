"""Output of the demo: a table, example answers, and a plot of quality against time."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from ..example import TextExample
from ..prefill.plan import Plan
from ..prefill.schedule import resolve
from .measure import Strategy


def table(strategies: Sequence[Strategy], title: str, num_layers: int) -> Table:
    """Make the table of results, one row per strategy; the first strategy is the baseline."""
    caption = "EM exact match, NLL per answer token, TTFT median time to first token, speed-up median over examples"
    out = Table(title=title, caption=caption)
    for column in ("strategy", "recomputed", "EM", "F1", "NLL", "TTFT, ms", "speed-up"):
        out.add_column(column, justify="left" if column == "strategy" else "right", no_wrap=column == "strategy")
    for strategy in strategies:
        out.add_row(
            str(strategy),
            "all" if strategy.plan is None else _recomputed(strategy.plan, num_layers),
            f"{strategy.mean('exact_match'):.2f}",
            f"{strategy.mean('f1'):.2f}",
            f"{strategy.mean('nll'):.3f}",
            f"{strategy.median_seconds() * 1e3:.0f}",
            f"{strategy.speedup_over(strategies[0]):.1f}x",
        )
    return out


def _recomputed(plan: Plan, num_layers: int) -> str:
    """Describe how many of the receiver's layers or of the context's tokens are recomputed."""
    work = resolve(plan, num_layers).work
    if not work.select:
        return f"{work.run} of {num_layers} layers"
    return f"{work.select:.0%} of tokens" if isinstance(work.select, float) else f"{work.select} tokens"


def answers(strategies: Sequence[Strategy], examples: Sequence[TextExample], count: int = 2) -> Table:
    """Make a table of the answers of every strategy to the examples whose F1 differs most between strategies."""

    def spread(index: int) -> float:
        return statistics.pvariance([strategy.measured[index].f1 for strategy in strategies])

    shown = sorted(range(len(strategies[0].measured)), key=spread, reverse=True)[:count]
    out = Table(title="Example answers", show_lines=True)
    out.add_column("strategy")
    for index in shown:
        question = examples[index].suffix.split("user\n")[-1].split("<|im_end|>")[0].strip()
        out.add_column(textwrap.shorten(question, 120), overflow="fold")
    out.add_row("[bold]reference[/bold]", *(examples[index].answer for index in shown))
    for strategy in strategies:
        out.add_row(str(strategy), *(strategy.measured[index].answer for index in shown))
    return out


def plot(strategies: Sequence[Strategy], title: str, path: Path) -> None:
    """Plot quality against time to first token as a PNG, answer F1 on the left and NLL on the right."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, 2)
    quantities = (("f1", "answer F1 (higher is better)"), ("nll", "NLL per token (lower is better)"))
    for axes, (name, label) in zip(panels, quantities, strict=True):
        for index, strategy in enumerate(strategies):
            milliseconds = strategy.median_seconds() * 1e3
            axes.scatter(milliseconds, strategy.mean(name), s=60, color=f"C{index}", label=str(strategy), zorder=3)
        axes.axhline(strategies[0].mean(name), color="C0", linewidth=0.8, linestyle="--", zorder=1)
        axes.set_xlim(left=0)
        axes.set_xlabel("time to first token, ms (median)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130, format="png")
