"""``droidspeak profile``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..files import remove_journal
from ..metrics import METRICS, of_tokens
from ..prefill.maps import Maps
from ..profiling.report import PLOTS, rows, write_report
from ..profiling.run import profile
from .arguments import output_file
from .inputs import Inputs, is_jsonl

_PREFILLS_PER_START = 0.8  # per context and layer that bands start at, of docs/profile.md: 24 for 30 layers
_TOKENS_OF_COSTS = 20_000  # that are prefilled where the cost model is measured


def run(options: argparse.Namespace) -> None:
    """Profile a pair, and write the frontier and its report."""
    out: Path = options.out
    frontier_path = out / "frontier.json"
    if out.is_dir():
        for path in (frontier_path, out / "report.html", *(out / f"{name}.png" for name in PLOTS)):
            output_file(str(path))
    metric = None if options.metric is None else METRICS[options.metric]
    if metric is not None:
        if not all(map(is_jsonl, options.texts)):
            raise ValueError("--metric: expected .jsonl files, which have answers to compare with, got plain text")
        metric("a", "a")  # imports what it needs
    maps = None if options.maps is None else Maps.load(options.maps)
    inputs = Inputs.read(options)
    layers = inputs.receiver.num_layers
    if options.granularity > layers:
        raise ValueError(f"--granularity: expected 1 to {layers}, the number of layers, got {options.granularity}")
    sender, receiver = inputs.load()
    prefills = _PREFILLS_PER_START * -(-layers // options.granularity)
    inputs.announce(options.prog, receiver, prefills, _TOKENS_OF_COSTS)
    out.mkdir(parents=True, exist_ok=True)
    frontier = profile(
        sender,
        receiver,
        inputs.examples,
        maps=maps,
        granularity=options.granularity,
        score=None if metric is None else of_tokens(metric, inputs.receiver.tokenizer),
        journal=_journal(options),
        seed=options.seed,
    )
    frontier.save(frontier_path)
    written = write_report(frontier, out, f"{options.sender} to {options.receiver}")
    remove_journal(_journal(options))
    found = rows(frontier)
    table = Table(*found[0], caption=f"predicted for {frontier.mean_tokens} tokens on {frontier.costs.machine}")
    for row in found:
        table.add_row(*row.values())
    Console().print(table)
    Console().print(f"{written[-1].resolve()} and {frontier_path.resolve()}")


def kept(options: argparse.Namespace) -> str:
    """Say what a profile leaves that is interrupted."""
    journal = _journal(options)
    if not journal.exists():
        return "no result was written"
    return f"the journal {journal} keeps what was measured, and the same command resumes from it"


def _journal(options: argparse.Namespace) -> Path:
    return options.out / "journal.jsonl"
