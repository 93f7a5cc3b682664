"""``droidspeak serve``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys

import torch

from ..vllm.plugin import CONNECTOR, LOAD_FORMAT

CPU_OPTIONS = (
    # A context fills whole pages, and vLLM computes the tokens behind them: of its 128 to a page, 64 or so.
    "--block-size", "32",
    # Layers that recompute tokens of a context run outside of vLLM's compiled graph, where norms and activations are slow
    # unless they are operators of its own.
    "--compilation-config", json.dumps({"custom_ops": ["all"]}),
)  # fmt: skip
"""Options of vLLM on a CPU, before those of the user, which win."""


def run(options: argparse.Namespace) -> None:
    """Become vLLM's server, and say what it is told."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vllm: expected it beside droidspeak-ops, got none; pip install vllm")
    command = command_of(options)
    print(shlex.join(command), file=sys.stderr, flush=True)
    os.execv(command[0], command)


def command_of(options: argparse.Namespace) -> list[str]:
    """Return the command line of vLLM: its server as a module, since the program `vllm` lacks in builds for CPUs.

    Raises:
        ValueError: the options ask for neither a sender nor a receiver, or for parts of one.
    """
    if not options.capture and options.sender is None:
        raise ValueError("expected --capture, --sender or both, got neither")
    if options.sender is None and (options.maps or options.plan or options.busy_plan):
        raise ValueError("--maps, --plan, --busy-plan: expected them with --sender, got none")
    if options.hidden_layers and not options.capture:
        raise ValueError("--hidden-layers: expected it with --capture, got none")
    extra = {
        "store": options.store,
        "namespace": options.namespace,
        "hidden_layers": options.hidden_layers,
        "read_seconds": options.read_seconds,
    }
    if options.sender is not None:
        sender = {"model": options.sender, "maps": options.maps}
        extra["senders"] = {"sender": {name: value for name, value in sender.items() if value is not None}}
        extra["plans"] = {} if options.plan is None else {"default": options.plan}
        extra["plans"] |= {f"from {waiting} waiting": file for waiting, file in options.busy_plan}
        extra["by_queue"] = {waiting: f"from {waiting} waiting" for waiting, _ in options.busy_plan}
    role = "kv_consumer" if not options.capture else "kv_producer" if options.sender is None else "kv_both"
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {name: value for name, value in extra.items() if value},
    }
    on_cpu = () if torch.cuda.is_available() else CPU_OPTIONS
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model, "--load-format", LOAD_FORMAT,
        "--kv-transfer-config", json.dumps(transfer), *on_cpu, *options.vllm,
    ]  # fmt: skip
