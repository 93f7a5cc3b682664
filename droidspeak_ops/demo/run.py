"""Run ``droidspeak demo``: load the models, measure, report."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import droidspeak_ops as ds

from ..files import replacing
from ..hf.pretrained import find_pair, load_pretrained
from ..machine import environment
from . import report
from .measure import Strategy, glossary_examples, measure

_GLOSSARY = files(__package__).joinpath("glossary")
_MIN_LAYERS = 6  # of which a sixth is the shortest band


SELECTED = 48
"""Tokens that the plan recomputes which the demo is about."""


def plans(num_layers: int) -> list[ds.Plan]:
    """Return the compared plans: selected tokens, reuse, projection, bands of a sixth and a third of the layers."""
    short, long = ((num_layers // 2, num_layers // 2 + num_layers // part) for part in (6, 3))
    return [ds.Plan(select=SELECTED), ds.Plan(), ds.Plan(project="rest"), ds.Plan([short]), ds.Plan([long])]


def load_glossary_variant() -> tuple[Any, Any]:
    """Load the shipped receiver, SmolLM2 with the glossary adapter merged into it, and its tokenizer."""
    with as_file(_GLOSSARY) as adapter:
        return load_pretrained(adapter)


def run(sender_name: str, receiver_name: str | None, num_examples: int, plot: Path, base: str | None = None) -> None:
    """Run the demo and print its report.

    Args:
        sender_name, receiver_name, base: as :func:`find_pair` takes them; the receiver is the shipped glossary adapter if None.
        num_examples: number of test examples to answer.
        plot: PNG file to write.

    Raises:
        ValueError: there are fewer examples, the models do not fit together, or have fewer layers than the compared plans need.
    """
    console = Console()
    examples = glossary_examples()
    if not 1 <= num_examples <= len(examples):
        raise ValueError(f"examples: expected 1 to {len(examples)}, the shipped ones, got {num_examples}")
    examples = examples[:num_examples]
    with as_file(_GLOSSARY) as adapter:
        found = find_pair(sender_name, adapter if receiver_name is None else receiver_name, base)
        layers = found[1].num_layers
        if layers < _MIN_LAYERS:
            raise ValueError(f"{found[1].name}: expected a model of {_MIN_LAYERS} layers or more, got {layers}")
        sender, receiver = (each.load() for each in found)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sender, receiver = sender.to(device), receiver.to(device)

    strategies = [Strategy(None), *map(Strategy, plans(layers))]
    tokenizers = found[0].tokenizer, found[1].tokenizer
    steps = measure(sender, receiver, tokenizers, strategies, examples)
    tokens = list(track(steps, "Answering questions", total=len(examples), console=console))

    where = environment(device)["device"]
    title = (
        f"{sender_name} -> {receiver_name or 'glossary variant'}: {len(examples)} test examples, contexts of "
        f"{min(tokens)} to {max(tokens)} tokens, {str(receiver.dtype).removeprefix('torch.')}, {where}"
    )
    console.print(report.table(strategies, title, layers))
    console.print(report.answers(strategies, examples))
    with replacing(plot) as scratch:
        report.plot(strategies, title, scratch)
    console.print(f"Quality against time: {plot.resolve()}")
