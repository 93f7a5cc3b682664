"""Find the layers whose attention locates the answer: the setting of selected tokens, on calibration questions.

    python -m bench.located --csv docs/selected/located.csv

A question's suffix runs over the sender's K and V, and 40 and 48 tokens are selected around the peaks of its attention, taken
over layers `start` to ``stop - 1``. `found` is the share of questions whose whole answer, as it stands in the context, is among
them: what is recomputed around an answer is what decides whether it is given. Contexts are of the calibration split of pair
`lora`, whose answers are quoted from the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.progress import track

import droidspeak_ops as ds
from bench.common import Row, checkout, parser, setting, show, write_csv
from bench.pairs import PAIRS, LoadedPair
from droidspeak_ops.context.parts import SINKS
from droidspeak_ops.example import TextExample
from droidspeak_ops.prefill.select import around_peaks

STOPS = (8, 10, 12, 15, 18, 20)
PARTS = (0, 1 / 3, 1 / 2, 2 / 3, 4 / 5)
"""Where the layers start, as parts of their stop."""
COUNTS = (40, 48)
QUESTIONS = (1, 3, 5, 7)
"""Questions that are asked, of a context's eight."""


def peaks_by_layer(pair: LoadedPair, example: ds.Example, layers: int) -> torch.Tensor:
    """Return for each of the first layers the largest probability that the suffix's attention gives each token, ``[L, T]``."""
    context, tokens = pair.capture(example.context), example.context.shape[1]
    found: list[torch.Tensor] = []
    usual = ds.ops.attention_peaks

    def kept(
        q: torch.Tensor, keys: torch.Tensor, slots: torch.Tensor, at: torch.Tensor, peaks: Any, **how: Any
    ) -> None:
        of_layer = torch.zeros_like(peaks)
        usual(q, keys, slots, at, of_layer, **how)
        found.append(of_layer[0, :tokens])

    looked_at = mock.patch("droidspeak_ops.prefill.schedule.layers_looked_at", return_value=range(layers))
    with looked_at, mock.patch("droidspeak_ops.ops.attention_peaks", kept):
        ds.partial_prefill(pair.receiver, context, ds.Plan(select=1), prompt_ids=example.prompt)
    peaks = torch.stack(found)
    peaks[:, :SINKS] = 0
    return peaks


def answer_tokens(tokenizer: Any, text: TextExample) -> set[int]:
    """Return the tokens of the context that its answer's first quotation has a part in."""
    start = text.context.index(text.answer)
    spans = tokenizer(text.context, return_offsets_mapping=True)["offset_mapping"]
    return {place for place, (first, end) in enumerate(spans) if end > start and first < start + len(text.answer)}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command."""
    options = parser("located", __doc__)
    options.add_argument("--contexts", type=int, default=16, help="calibration contexts, with four questions each")
    options.add_argument("--csv", type=Path, help="also write the table to this file")
    args = options.parse_args(argv)
    pair = PAIRS["lora"].load()
    split = ("calibration", args.contexts)
    both = list(zip(pair.named.task.examples(*split), pair.examples(*split), strict=True))
    asked = [each for number, each in enumerate(both) if number % 8 in QUESTIONS]
    peaks, answers = [], []
    for text, example in track(asked, "Looking"):
        peaks.append(peaks_by_layer(pair, example, max(STOPS)))
        answers.append(answer_tokens(pair.tokenizer, text))
    rows: list[Row] = []
    for stop in STOPS:
        for start in dict.fromkeys(round(part * stop) for part in PARTS):
            row: Row = {"start": start, "stop": stop}
            for count in COUNTS:
                selected = [set(around_peaks(each[start:stop].amax(0), count).tolist()) for each in peaks]
                found = [answer <= of for answer, of in zip(answers, selected, strict=True)]
                row[f"found_{count}"] = f"{sum(found) / len(found):.3f}"
            rows.append({**row, "questions": len(asked)})
    show(rows, f"lora: answers among selected tokens, by the layers looked at, float32, {setting()}")
    if args.csv is not None:
        write_csv(args.csv, rows, setting=f"float32, {setting()}", **checkout())
    return rows


if __name__ == "__main__":
    main()
