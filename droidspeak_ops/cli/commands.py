"""The commands, as functions of their options; each imports what it needs when it runs, as that takes seconds."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..files import remove_journal, replacing
from .arguments import output_file

_PREFILLS_OF_FIT = 4  # per context, of docs/maps.md: twice as long as the two models read it
_PREFILLS_PER_START = 0.8  # per context and layer that bands start at, of docs/profile.md: 24 for 30 layers
_TOKENS_OF_COSTS = 20_000  # that are prefilled where the cost model is measured


def demo(options: argparse.Namespace) -> None:
    """Run the demo."""
    from ..demo.run import run

    run(options.sender, options.receiver, options.examples, options.plot, options.base)


def fit(options: argparse.Namespace) -> None:
    """Fit maps and save them."""
    from ..example import by_context
    from ..fitting.run import fit
    from ..prefill.plan import Plan
    from ..prefill.schedule import resolve
    from .inputs import Inputs, count_tokens

    out: Path = options.out
    if any(out.exists() and text.exists() and out.samefile(text) for text in options.texts):
        raise ValueError(f"--out: expected another file than the texts, got {out}")
    inputs = Inputs.read(options)
    for band in options.band:
        resolve(Plan([band]), inputs.receiver.num_layers)
    sender, receiver = inputs.load()
    inputs.announce(options.prog, receiver, _PREFILLS_OF_FIT)
    maps = fit(sender, receiver, inputs.examples, bands=options.band)
    maps.save(out)
    contexts = by_context(inputs.examples)
    mapped, mapped_without_hidden = (
        sum(source != "reuse" for source in choices) for choices in (maps.choices, maps.choices_without_hidden)
    )
    Console().print(
        f"{count_tokens(contexts):,} tokens of {len(contexts)} contexts\n"
        f"mapped layers: {mapped} of {len(maps.choices)}, without hidden states {mapped_without_hidden}; "
        f"corrected band starts: {sorted(maps.corrections) or 'none'}\n"
        f"maps: {out.resolve()}, {out.stat().st_size / 2**20:.0f} MiB"
    )


def profile(options: argparse.Namespace) -> None:
    """Profile a pair, and write the frontier and its report."""
    from ..metrics import METRICS, of_tokens
    from ..prefill.maps import Maps
    from ..profiling.report import PLOTS, rows, write_report
    from ..profiling.run import profile
    from .inputs import Inputs, is_jsonl

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


def kept_of_profile(options: argparse.Namespace) -> str:
    """Say what is left of a profile that was interrupted."""
    journal = _journal(options)
    if not journal.exists():
        return "no result was written"
    return f"the journal {journal} keeps what was measured, and the same command resumes from it"


def _journal(options: argparse.Namespace) -> Path:
    return options.out / "journal.jsonl"


def compile_kernels(options: argparse.Namespace) -> None:
    """Compile all kernels, and show the resources that they use."""
    from ..proof import aot

    targets: list[str] = options.targets
    console = Console()
    steps = track(aot.compile_all(targets), "Compiling", total=aot.num_cases(targets), console=console)
    kernels = [kernel for step in steps for kernel in step]
    table = Table(
        caption="registers per thread, spills, KiB of shared memory, programs per multiprocessor, matrix instructions of all"
        " instructions in the inner loop, asynchronous copies there, bits per load and store, minimum time in microseconds"
        f" at {aot.FLOOR_TOKENS[1]:,} tokens"
    )
    for column in ("kernel", "configuration", "target"):
        table.add_column(column, no_wrap=True)
    for column in ("regs", "spills", "KiB", "occ", "MMA", "async", "ld", "st", "floor"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in kernels:
        table.add_row(
            each.kernel.removeprefix("_").removesuffix("_kernel"),
            each.config,
            each.target,
            str(each.registers),
            str(each.spills),
            f"{each.shared_bytes / 1024:.0f}",
            str(each.occupancy),
            f"{each.loop_matrix_instructions}/{each.loop_instructions}" if each.loop_instructions else "-",
            str(each.loop_async_copies) if each.loop_instructions else "-",
            str(each.load_bits),
            str(each.store_bits),
            f"{each.floor_us[aot.FLOOR_TOKENS[1]]:,.1f}",
        )
    console.print(table)
    if options.json is not None:
        described = {"kernels": [dataclasses.asdict(each) for each in kernels]}
        with replacing(options.json) as scratch:
            scratch.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
