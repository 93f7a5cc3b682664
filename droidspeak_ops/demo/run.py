"""Run ``droidspeak demo``: load the models, measure, report."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import droidspeak_ops as ds

from ..hf.pretrained import load_pretrained
from ..machine import environment
from . import report
from .measure import Strategy, glossary_examples, measure


def plans(num_layers: int) -> list[ds.Plan]:
    """Return the compared plans: reuse, projection, bands of a sixth and a third of the layers, band and projection."""
    short, long = ((num_layers // 2, num_layers // 2 + num_layers // part) for part in (6, 3))
    return [ds.Plan(), ds.Plan(project="rest"), ds.Plan([short]), ds.Plan([long]), ds.Plan([long], project="rest")]


def load_glossary_variant() -> tuple[Any, Any]:
    """Load the shipped receiver, SmolLM2 with the glossary adapter merged into it, and its tokenizer."""
    with as_file(files(__package__).joinpath("glossary")) as adapter:
        return load_pretrained(adapter)


def run(sender_name: str, receiver_name: str | None, num_examples: int, plot: Path) -> None:
    """Run the demo and print its report; `receiver_name` is None for the shipped glossary adapter."""
    console = Console()
    sender, sender_tokenizer = load_pretrained(sender_name)
    receiver, tokenizer = load_glossary_variant() if receiver_name is None else load_pretrained(receiver_name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sender, receiver = sender.to(device), receiver.to(device)

    examples = glossary_examples()[:num_examples]
    strategies = [Strategy(None), *map(Strategy, plans(receiver.config.num_hidden_layers))]
    steps = measure(sender, receiver, (sender_tokenizer, tokenizer), strategies, examples)
    tokens = list(track(steps, "Answering questions", total=len(examples), console=console))

    where = environment(device)["device"]
    title = (
        f"{sender_name} -> {receiver_name or 'glossary variant'}: {len(examples)} test examples, contexts of "
        f"{min(tokens)} to {max(tokens)} tokens, {str(receiver.dtype).removeprefix('torch.')}, {where}"
    )
    console.print(report.table(strategies, title, receiver.config.num_hidden_layers))
    console.print(report.answers(strategies, examples))
    report.plot(strategies, title, plot)
    console.print(f"Quality against time: {plot.resolve()}")
