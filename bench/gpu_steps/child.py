"""One step of ``python -m bench.gpu``, in a process of its own."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.common import Row, parser
from bench.gpu_steps.step import Step, read_rows, summary


def run_step(module: str, name: str, step: Step) -> None:
    """Run the function of a module of this package that is a step; the exit code is 1 where it fails."""
    try:
        function: Callable[[Step], None] = getattr(importlib.import_module(f"bench.gpu_steps.{module}"), name)
        with torch.no_grad():
            function(step)
    except Exception as error:
        traceback.print_exc()
        step.add("error", error=summary(error))
        sys.exit(1)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command that :mod:`bench.gpu` starts."""
    options = parser("gpu.child", __doc__)
    options.add_argument("module")
    options.add_argument("name")
    options.add_argument("--rows", type=Path, required=True, help="file that its rows are added to")
    options.add_argument("--out", type=Path, required=True, help="folder of the results of the whole run")
    options.add_argument("--seconds", type=float, required=True, help="that it may take")
    options.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    args = options.parse_args(argv)
    run_step(args.module, args.name, Step(args.rows, args.out, args.seconds, args.dry))
    return read_rows(args.rows)


if __name__ == "__main__":
    main()
