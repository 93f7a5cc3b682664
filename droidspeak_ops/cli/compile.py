"""``droidspeak compile``."""

from __future__ import annotations

import argparse
import dataclasses
import json

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..files import replacing
from ..proof import aot


def run(options: argparse.Namespace) -> None:
    """Compile all kernels, and show the resources that they use."""
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
