"""Selected tokens on a real pair: answers and next tokens, and time to first token, beside full prefill, reuse and bands.

    python -m bench.selected --pair lora --csv FILE --plot FILE
    python -m bench.selected --pair lora --only time --csv FILE    # alone on the machine

Judged are test contexts, none of which maps were fitted to, with one question each. `score` is the task's metric, `lost` and
`won` count answers that score less or more than full prefill's by a tenth; `same` is how often the likeliest next token is full
prefill's along the answer that full prefill gives, and `kl` the divergence from its distributions there, the mean and the
median over contexts. Intervals are of 10,000 bootstrap samples of contexts. Times are medians of ratios, each of full prefill
and of a way right after it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import track

import droidspeak_ops as ds
from bench.common import (
    Row,
    answer_logits,
    checkout,
    divergence,
    error_bars,
    mean_and_interval,
    parser,
    ratio_and_interval,
    setting,
    show,
    write_csv,
)
from bench.pairs import PAIRS, TEST_CONTEXTS, LoadedPair, fitted_maps
from droidspeak_ops.demo.measure import MAX_ANSWER_TOKENS
from droidspeak_ops.profiling.timing import first_token, timed

ANSWER_MARGIN = 0.1
TIMED_TOKENS = (900, 2048)
TIMED_SUFFIX = 24


@dataclass(frozen=True)
class Way:
    """A way to fill the receiver's cache."""

    name: str
    plan: ds.Plan
    with_maps: bool = False

    def fill(self, receiver: Any, maps: ds.Maps, context: ds.SharedContext, prompt_ids: torch.Tensor) -> ds.MixedCache:
        """Return the receiver's cache of a context."""
        used = maps if self.with_maps else None
        return ds.partial_prefill(receiver, context, self.plan, prompt_ids=prompt_ids, maps=used)


REST = ds.Plan(project="rest")
WAYS = (
    Way("all reused", ds.Plan()),
    Way("band [15, 20)", ds.Plan([(15, 20)])),
    Way("selected 5 %", ds.Plan(select=0.05)),
    Way("selected 10 %", ds.Plan(select=0.1)),
    Way("recent 10 %", ds.Plan(select=0.1, selector="recent")),
    Way("deviation 10 %", ds.Plan(select=0.1, selector="deviation")),
    Way("all fitted", REST, with_maps=True),
    Way("selected 5 % over fitted", ds.Plan(project="rest", select=0.05), with_maps=True),
)


@torch.no_grad()
def judge(pair: LoadedPair, maps: ds.Maps, contexts: int) -> list[Row]:
    """Judge the ways on so many test contexts."""
    receiver, task = pair.receiver, pair.named.task
    texts, examples = task.examples("test", contexts), pair.examples("test", contexts)
    scores: dict[str, list[float]] = {name: [] for name in ("full prefill", *(way.name for way in WAYS))}
    same: dict[str, list[float]] = {way.name: [] for way in WAYS}
    kl: dict[str, list[float]] = {way.name: [] for way in WAYS}
    for text, example in zip(track(texts, f"{pair.named.name}: judging"), examples, strict=True):
        context = pair.capture(example.context)
        ids = receiver.generate(example.prompt, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        given = example._replace(answer=ids[:, example.prompt.shape[1] :])
        decoded = pair.tokenizer.decode(given.answer[0], skip_special_tokens=True).strip()
        scores["full prefill"].append(task.score(decoded, text.answer))
        own = answer_logits(receiver, given)
        for way in WAYS:
            cache = way.fill(receiver, maps, context, example.prompt)
            scores[way.name].append(task.score(pair.answer(example, deepcopy(cache)), text.answer))
            found = answer_logits(receiver, given, cache)
            same[way.name].append((own.argmax(-1) == found.argmax(-1)).double().mean().item())
            kl[way.name].append(divergence(own, found))

    def row(way: Way) -> Row:
        mine, full = scores[way.name], scores["full prefill"]
        return {
            "pair": pair.named.name,
            "way": way.name,
            **mean_and_interval("score", mine),
            **ratio_and_interval("of_full_prefill", mine, full),
            "lost": sum(a < b - ANSWER_MARGIN for a, b in zip(mine, full, strict=True)),
            "won": sum(a > b + ANSWER_MARGIN for a, b in zip(mine, full, strict=True)),
            **mean_and_interval("same", same[way.name]),
            **mean_and_interval("kl", kl[way.name]),
            "kl_median": f"{statistics.median(kl[way.name]):.3g}",
            **ratio_and_interval("of_reuse", kl[way.name], kl["all reused"]),
            "metric": task.metric,
            "full_prefill": f"{statistics.fmean(full):.3f}",
            "contexts": len(full),
        }

    return [row(way) for way in WAYS]


@torch.no_grad()
def time(pair: LoadedPair, maps: ds.Maps, rounds: int) -> list[Row]:
    """Time full prefill and the ways in turn."""
    receiver, rows = pair.receiver, []
    serving = ds.Receiver(receiver)
    for tokens in TIMED_TOKENS:
        prompt = pair.text(tokens + TIMED_SUFFIX)
        context = pair.capture(prompt[:, :tokens])

        def start(way: Way, context: ds.SharedContext = context, prompt: torch.Tensor = prompt) -> None:
            cache = way.fill(serving, maps, context, prompt)
            if cache.next_logits is None:
                suffix = prompt[:, context.tokens.shape[1] :]
                receiver(suffix, past_key_values=cache, use_cache=True, logits_to_keep=1)

        full: Callable[[], Any] = partial(first_token, receiver, context, prompt, None)
        seconds: dict[str, list[tuple[float, float]]] = {way.name: [] for way in WAYS}
        full()
        for way in WAYS:
            start(way)  # warm-up
        for _ in track(range(rounds), f"{pair.named.name}: {tokens} tokens"):
            for way in WAYS:
                seconds[way.name].append((timed(full)[1], timed(partial(start, way))[1]))
        rows += [
            {
                "pair": pair.named.name,
                "way": way.name,
                "tokens": tokens,
                "suffix": TIMED_SUFFIX,
                "milliseconds": f"{statistics.median(own for _, own in seconds[way.name]) * 1e3:.0f}",
                "full_prefill_milliseconds": f"{statistics.median(of for of, _ in seconds[way.name]) * 1e3:.0f}",
                "ttft_speedup": f"{statistics.median(of / own for of, own in seconds[way.name]):.2f}",
                "lowest": f"{min(of / own for of, own in seconds[way.name]):.2f}",
                "highest": f"{max(of / own for of, own in seconds[way.name]):.2f}",
                "rounds": rounds,
            }
            for way in WAYS
        ]
    return rows


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot how often next tokens are the same and what answers score, for each way."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    labels = (
        ("of_full_prefill", f"{rows[0]['metric']} of answers, of full prefill's"),
        ("same", "next tokens that are full prefill's"),
    )
    for axes, (name, label) in zip(panels, labels, strict=True):
        values, (below, above) = error_bars(rows, name)
        places = list(range(len(rows)))[::-1]
        axes.barh(places, values, xerr=(below, above), color=[f"C{place}" for place in range(len(rows))], capsize=3)
        axes.set_yticks(places, [row["way"] for row in rows])
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(f"{rows[0]['pair']}, {rows[0]['contexts']} test contexts")
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command."""
    options = parser("selected", __doc__)
    options.add_argument("--pair", choices=PAIRS, default="lora")
    options.add_argument("--only", choices=("judge", "time"), default="judge")
    options.add_argument("--contexts", type=int, default=TEST_CONTEXTS, help="to judge on")
    options.add_argument("--rounds", type=int, default=5, help="of timing")
    options.add_argument("--csv", type=Path, help="also write the table to this file")
    options.add_argument("--plot", type=Path, help="PNG file of what was judged")
    args = options.parse_args(argv)
    pair = PAIRS[args.pair].load()
    maps = fitted_maps(pair).maps
    rows = time(pair, maps, args.rounds) if args.only == "time" else judge(pair, maps, args.contexts)
    show(rows, f"{args.pair}: {PAIRS[args.pair].description}, float32, {setting()}")
    if args.csv is not None:
        write_csv(args.csv, rows, setting=f"float32, {setting()}", **checkout())
    if args.plot is not None and args.only == "judge":
        plot(rows, args.plot)
    return rows


if __name__ == "__main__":
    main()
