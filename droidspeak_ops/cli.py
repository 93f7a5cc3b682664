"""The command line: ``droidspeak demo``, ``fit``, ``profile`` and ``compile``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from .example import Example, TextExample, by_context
from .metrics import METRICS, of_tokens

_MIN_TOKENS = 64  # of a piece of text that is cut into a context, a suffix and an answer


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
    demo.add_argument("--examples", type=_positive, default=12, help="number of test examples to answer (default: 12)")
    demo.add_argument("--plot", type=Path, default=Path("droidspeak-demo.png"), help="PNG file to write")

    on_pair = argparse.ArgumentParser(add_help=False)
    on_pair.add_argument("sender", help="local path, hub name or LoRA adapter, or 'smollm2'")
    on_pair.add_argument("receiver", help="another fine-tune of the same model, named likewise")
    on_pair.add_argument(
        "texts",
        type=Path,
        nargs="+",
        help="text files like the expected contexts, or .jsonl files of objects with context, suffix and answer",
    )
    on_pair.add_argument(
        "--tokens", type=_positive, default=1024, help="tokens per piece that text files are cut into (default: 1024)"
    )

    fitting = commands.add_parser(
        "fit", parents=[on_pair], help="fit maps to a pair of models: better K/V at the cost of a projection"
    )
    fitting.add_argument(
        "--band", type=_band, action="append", default=[], help="band of intended plans, such as 15:20"
    )
    fitting.add_argument("--out", type=Path, default=Path("maps.safetensors"), help="file to write the maps to")

    profiling = commands.add_parser(
        "profile", parents=[on_pair], help="measure the quality and cost of plans for a pair of models"
    )
    profiling.add_argument("--maps", type=Path, help="maps of this pair, from droidspeak fit")
    profiling.add_argument(
        "--granularity",
        type=_positive,
        default=1,
        help="bands start and end at multiples of so many layers (default: 1)",
    )
    profiling.add_argument("--metric", choices=sorted(METRICS), help="also score generated answers (.jsonl files)")
    profiling.add_argument("--seed", type=int, default=0, help="seed of the order of contexts (default: 0)")
    profiling.add_argument(
        "--out", type=Path, default=Path("droidspeak-profile"), help="folder for frontier.json, plots and report.html"
    )

    compiling = commands.add_parser("compile", help="compile all kernels ahead of time and show the resources they use")
    compiling.add_argument(
        "--targets",
        type=_targets,
        default="sm_80,sm_90a,sm_100a,gfx942",
        help="GPU architectures, comma-separated (default: %(default)s)",
    )
    compiling.add_argument("--json", type=Path, help="also write the results to this file")

    options = parser.parse_args(arguments)
    if options.command == "demo":
        from .demo.run import run

        run(options.sender, options.receiver, options.examples, options.plot)
    elif options.command == "fit":
        _fit(_Inputs.read(options), options.band, options.out)
    elif options.command == "profile":
        _profile(_Inputs.read(options), options)
    else:
        _compile(options.targets, options.json)


@dataclasses.dataclass
class _Inputs:
    """The models of a command, and examples for them."""

    sender: Any
    receiver: Any
    tokenizer: Any
    examples: list[Example]

    @classmethod
    def read(cls, options: argparse.Namespace) -> _Inputs:
        from .hf.pretrained import load_pretrained

        texts = [(path, path.read_text(encoding="utf-8")) for path in options.texts]
        (sender, tokenizer), (receiver, _) = load_pretrained(options.sender), load_pretrained(options.receiver)
        examples: list[Example] = []
        for path, text in texts:
            if path.suffix == ".jsonl":
                examples += [each.encode(tokenizer) for each in _read_examples(path, text)]
            else:
                pieces = tokenizer(text, return_tensors="pt").input_ids.split(options.tokens, dim=1)
                examples += [Example.cut(piece) for piece in pieces if piece.shape[1] >= _MIN_TOKENS]
        contexts = len(by_context(examples))
        if contexts < 3:
            raise SystemExit(
                f"droidspeak {options.command}: texts: expected at least 3 contexts from pieces of {_MIN_TOKENS} to "
                f"{options.tokens} tokens, got {contexts}"
            )
        return cls(sender, receiver, tokenizer, examples)


def _read_examples(path: Path, text: str) -> list[TextExample]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found.append(TextExample(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            raise SystemExit(
                f"{path}, line {number}: expected a JSON object with the texts context, suffix and answer, got {line[:80]!r}"
            ) from None
    return found


def _fit(inputs: _Inputs, bands: list[tuple[int, int]], out: Path) -> None:
    from rich.console import Console

    from .fitting.run import fit

    maps = fit(inputs.sender, inputs.receiver, inputs.examples, bands=bands)
    maps.save(out)
    contexts = by_context(inputs.examples)
    mapped, mapped_without_hidden = (
        sum(source != "reuse" for source in choices) for choices in (maps.choices, maps.choices_without_hidden)
    )
    Console().print(
        f"{sum(group[0].context.shape[1] for group in contexts):,} tokens of {len(contexts)} contexts\n"
        f"mapped layers: {mapped} of {len(maps.choices)}, without hidden states {mapped_without_hidden}; "
        f"corrected band starts: {sorted(maps.corrections) or 'none'}\n"
        f"maps: {out.resolve()}, {out.stat().st_size / 2**20:.0f} MiB"
    )


def _profile(inputs: _Inputs, options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from .files import remove_journal
    from .prefill.maps import Maps
    from .profiling.report import rows, write_report
    from .profiling.run import profile

    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    journal = out / "journal.jsonl"
    frontier = profile(
        inputs.sender,
        inputs.receiver,
        inputs.examples,
        maps=None if options.maps is None else Maps.load(options.maps),
        granularity=options.granularity,
        score=None if options.metric is None else of_tokens(METRICS[options.metric], inputs.tokenizer),
        journal=journal,
        seed=options.seed,
    )
    frontier.save(out / "frontier.json")
    written = write_report(frontier, out, f"{options.sender} to {options.receiver}")
    remove_journal(journal)
    found = rows(frontier)
    table = Table(*found[0], caption=f"predicted for {frontier.mean_tokens} tokens on {frontier.costs.machine}")
    for row in found:
        table.add_row(*row.values())
    Console().print(table)
    Console().print(f"{written[-1].resolve()} and {(out / 'frontier.json').resolve()}")


def _compile(targets: list[str], path: Path | None) -> None:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from .proof import aot

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
            f"expected a band's first layer and its end, such as 15:20, got {text}"
        ) from None
    return start, end


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


if __name__ == "__main__":
    main()
