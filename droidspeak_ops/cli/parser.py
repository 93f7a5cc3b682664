"""The parser of the command line."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import NoReturn

from ..metrics import METRICS
from .arguments import (
    MIN_TOKENS,
    argument,
    at_least,
    band,
    busy_plan,
    layers,
    number_of_contexts,
    output_file,
    output_folder,
    png_file,
    seconds,
    size,
    targets,
    whole_number,
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; `command` of what it gives is the name of a module beside this one."""
    parser = _Parser(prog="droidspeak", description="Reuse of a KV cache across fine-tuned models.")
    added = parser.add_subparsers(dest="command", required=True)

    with_base = _Parser(add_help=False)
    with_base.add_argument(
        "--base",
        help="base model of a LoRA adapter where the one that its configuration names is gone (default: the sender's)",
    )

    demo = added.add_parser(
        "demo", parents=[with_base], help="compare full prefill with reuse on a real model and its fine-tune"
    )
    demo.add_argument(
        "--sender",
        default="smollm2",
        help="local path, hub name or LoRA adapter (default: SmolLM2-135M-Instruct); prompts are ChatML",
    )
    demo.add_argument("--receiver", help="local path, hub name or LoRA adapter (default: the shipped glossary variant)")
    demo.add_argument(
        "--examples",
        type=argument(at_least(1)),
        default=12,
        help="number of test examples to answer (default: 12)",
    )
    demo.add_argument(
        "--plot",
        type=argument(png_file),
        default="droidspeak-demo.png",
        help="PNG file to write, in a folder that exists",
    )

    on_pair = _Parser(add_help=False, parents=[with_base])
    on_pair.add_argument("sender", help="local path, hub name or LoRA adapter, or 'smollm2'")
    on_pair.add_argument("receiver", help="another fine-tune of the same model, named likewise")
    on_pair.add_argument(
        "texts",
        type=Path,
        nargs="+",
        help="text files like the expected contexts, or .jsonl files of objects with context, suffix and answer",
    )
    on_pair.add_argument(
        "--tokens",
        type=argument(at_least(MIN_TOKENS)),
        default=1024,
        help="tokens per piece that text files are cut into (default: 1024)",
    )
    on_pair.add_argument(
        "--contexts",
        type=argument(number_of_contexts),
        default="24",
        help="number of contexts to use, drawn evenly from the files by the seed; 'all' or 0 for all (default: 24)",
    )
    on_pair.add_argument(
        "--seed", type=argument(whole_number), default=0, help="seed of the choice and order of contexts (default: 0)"
    )

    fitting = added.add_parser(
        "fit", parents=[on_pair], help="fit maps to a pair of models: better K/V at the cost of a projection"
    )
    fitting.add_argument(
        "--band",
        type=argument(band),
        action="append",
        default=[],
        help="band of an intended plan, such as 15:20; repeatable",
    )
    fitting.add_argument(
        "--steps",
        type=argument(at_least(0)),
        help="of training in each layer, behind the regressions; 0 for these alone (default: 140)",
    )
    fitting.add_argument(
        "--folder",
        type=argument(output_folder),
        help="where the run keeps what it has read and trained, to go on after it was killed (default: a temporary one)",
    )
    fitting.add_argument(
        "--out",
        type=argument(output_file),
        default="maps.safetensors",
        help="file to write the maps to, in a folder that exists (default: maps.safetensors)",
    )

    profiling = added.add_parser(
        "profile", parents=[on_pair], help="measure the quality and cost of plans for a pair of models"
    )
    profiling.add_argument("--maps", type=Path, help="maps of this pair, from droidspeak fit")
    profiling.add_argument(
        "--granularity",
        type=argument(at_least(1)),
        default=1,
        help="bands start and end at multiples of so many layers (default: 1)",
    )
    profiling.add_argument("--metric", choices=sorted(METRICS), help="also score generated answers (.jsonl files)")
    profiling.add_argument(
        "--out",
        type=argument(output_folder),
        default="droidspeak-profile",
        help="folder for frontier.json, plots and report.html, made if it is not there (default: droidspeak-profile)",
    )

    compiling = added.add_parser("compile", help="compile all kernels ahead of time and show the resources they use")
    compiling.add_argument(
        "--targets",
        type=argument(targets),
        default="sm_80,sm_90a,sm_100a,gfx942",
        help="GPU architectures, comma-separated (default: %(default)s)",
    )
    compiling.add_argument(
        "--json", type=argument(output_file), help="also write the results to this file, in a folder that exists"
    )

    storing = added.add_parser("store", help="look at, check and empty a store of contexts")
    actions = storing.add_subparsers(dest="action", required=True)
    with_store = _Parser(add_help=False)
    with_store.add_argument("store", help="folder, or URL of fsspec")
    actions.add_parser(
        "ls", parents=[with_store], help="list the contexts of all tenants, those that were used last first"
    )
    showing = actions.add_parser("show", parents=[with_store], help="show what a context is, and who made it")
    showing.add_argument("key", help="the beginning of its key, as ls gives it")
    actions.add_parser("verify", parents=[with_store], help="read all contexts, and name those that are damaged")
    pruning = actions.add_parser(
        "prune", parents=[with_store], help="remove the contexts that were not used for longest"
    )
    pruning.add_argument(
        "--budget", type=argument(size), required=True, help="what all files may have together, such as 500MiB or 20GiB"
    )

    serving = added.add_parser("serve", help="serve a model by vLLM, which captures contexts, reuses them, or both")
    serving.add_argument("model", help="local path or hub name, as vLLM takes it")
    serving.add_argument("--store", required=True, help="folder, or URL of fsspec, of the contexts")
    serving.add_argument("--namespace", default="", help="of the contexts' tenant")
    serving.add_argument("--sender", help="local path or hub name of the model whose contexts are reused")
    serving.add_argument("--maps", help="maps from it to this model, from droidspeak fit")
    serving.add_argument("--plan", help="JSON file of the plan of requests that name none")
    serving.add_argument(
        "--busy-plan",
        type=argument(busy_plan),
        action="append",
        default=[],
        metavar="WAITING=FILE",
        help="JSON file of the plan that takes its place while so many requests wait; may be given for several numbers",
    )
    serving.add_argument(
        "--read-seconds",
        type=argument(seconds),
        help="that a context may take to be found, and to be read, before its request runs as it is (default: 10)",
    )
    serving.add_argument("--capture", action="store_true", help="capture contexts of requests that ask for it")
    serving.add_argument(
        "--hidden-layers",
        type=argument(layers),
        default=[],
        help="layers at which they have hidden states, comma-separated, such as 10,15",
    )
    serving.add_argument(
        "--vllm", type=shlex.split, default=[], help="more options of vllm serve, such as --vllm='--port 8001'"
    )

    for each in (*added.choices.values(), *actions.choices.values()):
        each.set_defaults(prog=each.prog)  # for messages
    return parser
