"""The command line: ``droidspeak demo``."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``droidspeak`` command."""
    parser = argparse.ArgumentParser(prog="droidspeak", description="Reuse of a KV cache across fine-tuned models.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="compare full prefill with reuse on a real model and its fine-tune")
    demo.add_argument("--sender", default="smollm2", help="local path or hub name (default: SmolLM2-135M-Instruct)")
    demo.add_argument("--receiver", help="local path, hub name or LoRA adapter (default: the shipped glossary variant)")
    demo.add_argument("--examples", type=_positive, default=12, help="held-out examples to answer (default: 12)")
    demo.add_argument("--plot", type=Path, default=Path("droidspeak-demo.png"), help="where the PNG is written")

    options = parser.parse_args(arguments)
    if options.command == "demo":
        from .demo.run import run

        run(options.sender, options.receiver, options.examples, options.plot)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; a number of 1 or more is needed")
    return value


if __name__ == "__main__":
    main()
