"""``droidspeak fit``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from ..example import by_context
from ..fitting.run import fit
from ..fitting.training import STEPS
from ..prefill.plan import Plan
from ..prefill.schedule import resolve
from .inputs import Inputs, count_tokens

# Measured with 30 layers, on 3 and 9 contexts of 479 tokens: two thirds of it are both models reading.
_PREFILLS = 3  # that a context takes
_TOKENS_OF_SOLVING = 9_000  # that are prefilled in the time of all else but training
_PREFILLS_OF_A_STEP = 2.2  # of one context, in the time of a step of all layers; with 64 contexts of 470 tokens


def run(options: argparse.Namespace) -> None:
    """Fit maps to a pair, and save them."""
    out: Path = options.out
    if any(out.exists() and text.exists() and out.samefile(text) for text in options.texts):
        raise ValueError(f"--out: expected another file than the texts, got {out}")
    inputs = Inputs.read(options)
    for band in options.band:
        resolve(Plan([band]), inputs.receiver.num_layers)
    sender, receiver = inputs.load()
    steps, contexts = STEPS if options.steps is None else options.steps, by_context(inputs.examples)
    training = int(steps * _PREFILLS_OF_A_STEP * count_tokens(contexts) / len(contexts))
    inputs.announce(options.prog, receiver, _PREFILLS, _TOKENS_OF_SOLVING + training)
    maps = fit(sender, receiver, inputs.examples, bands=options.band, steps=steps, folder=options.folder)
    maps.save(out)
    mapped, mapped_without_hidden = (
        sum(source != "reuse" for source in choices) for choices in (maps.choices, maps.choices_without_hidden)
    )
    Console().print(
        f"{count_tokens(contexts):,} tokens of {len(contexts)} contexts\n"
        f"mapped layers: {mapped} of {len(maps.choices)}, without hidden states {mapped_without_hidden}; "
        f"corrected band starts: {sorted(maps.corrections) or 'none'}\n"
        f"maps: {out.resolve()}, {out.stat().st_size / 2**20:.0f} MiB"
    )
