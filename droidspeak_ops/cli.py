"""The command line: ``droidspeak demo``, ``droidspeak fit`` and ``droidspeak compile``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

_SHORTEST = 64  # tokens of a text that a context to fit maps on, and what follows it, can be cut from


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

    fitting = commands.add_parser("fit", help="fit maps to a pair of models: better K/V at the price of a projection")
    fitting.add_argument("sender", help="local path, hub name, LoRA adapter, or 'smollm2'")
    fitting.add_argument("receiver", help="a fine-tune of the same model, named the same ways")
    fitting.add_argument("texts", type=Path, nargs="+", help="text files such as the contexts that the maps are for")
    fitting.add_argument("--tokens", type=_positive, default=1024, help="that texts are cut into (default: 1024)")
    fitting.add_argument("--band", type=_band, action="append", default=[], help="of plans to come, such as 15:20")
    fitting.add_argument("--out", type=Path, default=Path("maps.safetensors"), help="where the maps are written")

    compiling = commands.add_parser("compile", help="compile all kernels ahead of time and show what they use")
    compiling.add_argument(
        "--targets", type=_targets, default="sm_80,sm_90a,sm_100a,gfx942", help="GPU architectures, with commas"
    )
    compiling.add_argument("--json", type=Path, help="also write the results to this file")

    options = parser.parse_args(arguments)
    if options.command == "demo":
        from .demo.run import run

        run(options.sender, options.receiver, options.examples, options.plot)
    elif options.command == "fit":
        _fit(options.sender, options.receiver, options.texts, options.tokens, options.band, options.out)
    else:
        _compile(options.targets, options.json)


def _fit(
    sender_name: str, receiver_name: str, texts: list[Path], tokens: int, bands: list[tuple[int, int]], out: Path
) -> None:
    from rich.console import Console

    from .example import Example
    from .hf import fit
    from .hf.pretrained import load_pretrained

    read = [text.read_text(encoding="utf-8") for text in texts]
    (sender, tokenizer), (receiver, _) = load_pretrained(sender_name), load_pretrained(receiver_name)
    pieces = [piece for text in read for piece in tokenizer(text, return_tensors="pt").input_ids.split(tokens, dim=1)]
    examples = [Example.cut(piece) for piece in pieces if piece.shape[1] >= _SHORTEST]
    if len(examples) < 3:
        raise SystemExit(
            f"droidspeak fit: texts: got {len(examples)} contexts of {_SHORTEST} to {tokens} tokens; three or more are needed"
        )
    maps = fit(sender, receiver, examples, bands=bands)
    maps.save(out)
    used = [sum(role != "reuse" for role in choices) for choices in (maps.choices, maps.choices_without_hidden)]
    Console().print(
        f"{sum(each.context.shape[1] for each in examples):,} tokens of {len(examples)} contexts\n"
        f"layers that are mapped: {used[0]} of {len(maps.choices)}, without hidden states {used[1]}; "
        f"band starts that are corrected: {sorted(maps.corrections) or 'none'}\n"
        f"maps: {out.resolve()}, {out.stat().st_size / 2**20:.0f} MiB"
    )


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


def _band(text: str) -> tuple[int, int]:
    try:
        start, end = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text}; a band's first layer and its end, such as 15:20, is needed"
        ) from None
    return start, end


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; a number of 1 or more is needed")
    return value


if __name__ == "__main__":
    main()
