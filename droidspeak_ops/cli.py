"""The command line: ``droidspeak demo`` and ``droidspeak compile``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``droidspeak`` command."""
    parser = argparse.ArgumentParser(prog="droidspeak", description="Reuse of a KV cache across fine-tuned models.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="compare full prefill with reuse on a real model and its fine-tune")
    demo.add_argument(
        "--sender",
        default="smollm2",
        help="local path, hub name or LoRA adapter (default: SmolLM2-135M-Instruct); prompts are ChatML",
    )
    demo.add_argument("--receiver", help="local path, hub name or LoRA adapter (default: the shipped glossary variant)")
    demo.add_argument("--examples", type=_positive, default=12, help="held-out examples to answer (default: 12)")
    demo.add_argument("--plot", type=Path, default=Path("droidspeak-demo.png"), help="where the PNG is written")

    compiling = commands.add_parser("compile", help="compile all kernels ahead of time and show what they use")
    compiling.add_argument(
        "--targets", type=_targets, default="sm_80,sm_90a,sm_100a,gfx942", help="GPU architectures, with commas"
    )
    compiling.add_argument("--json", type=Path, help="also write the results to this file")

    options = parser.parse_args(arguments)
    if options.command == "demo":
        from .demo.run import run

        run(options.sender, options.receiver, options.examples, options.plot)
    else:
        _compile(options.targets, options.json)


def _compile(targets: list[str], path: Path | None) -> None:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from .proof import aot

    console = Console()
    steps = track(aot.compile_all(targets), "Compiling", total=aot.num_cases(targets), console=console)
    kernels = [kernel for step in steps for kernel in step]
    table = Table(
        caption="registers a thread, spills, shared memory in KiB, programs a multiprocessor holds, matrix instructions of"
        " all instructions in the inner loop and asynchronous copies there, bits of loads and stores, least microseconds"
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
    if path is not None:
        path.write_text(
            json.dumps({"kernels": [dataclasses.asdict(each) for each in kernels]}, indent=1) + "\n", encoding="utf-8"
        )


def _targets(text: str) -> list[str]:
    from .proof.targets import check_targets

    targets = text.split(",")
    try:
        check_targets(targets)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return targets


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; a number of 1 or more is needed")
    return value


if __name__ == "__main__":
    main()
