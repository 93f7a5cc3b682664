"""The worth of fitted maps on real pairs of models, and the study behind them.

    python -m bench.variants.train code docs
    python -m bench.maps --folder docs/maps

Each part writes a table to the folder, a CSV file of that name; then plots are drawn of all that is there. `kl` is the
Kullback-Leibler divergence, in nats, of the next-token distributions from those of the receiver's own full prefill, from the
suffix's last token on, with the answer's tokens given; `of_reuse` and `of_band` are ratios of its mean to that of plain reuse,
and of the same band alone; `low` and `high` are where 95 % of 10,000 bootstrap values over contexts lie.

- `pairs`: every pair, on held-out test contexts, with maps that are trained and with regressions and shares alone, which all
  other parts are of but for `transfer`. What is fitted is kept beside the variants.
- `tokens`: calibration tokens against gain.
- `transfer`: maps calibrated on another domain, and trained ones tested on another.
- `rank`: maps of low rank.
- `layers`: how well layers and tokens are fitted, and the shares that layers get.
- `cost`: time of a projected layer and to first token, and bytes. To be run alone on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import droidspeak_ops as ds
from bench.common import (
    Row,
    divergence,
    mean_and_interval,
    parser,
    ratio_and_interval,
    setting,
    show,
    write_csv,
)
from bench.maps import plots
from bench.maps.layers import errors_by_layer, of_rank
from bench.pairs import (
    CALIBRATION_CONTEXTS,
    CODE,
    GLOSSARY,
    LONG,
    PAIRS,
    RIDGE,
    LoadedPair,
    context_tokens,
    fitted_maps,
)
from droidspeak_ops.example import by_context
from droidspeak_ops.fitting.run import FOLDS
from droidspeak_ops.metrics import answer_logits
from droidspeak_ops.profiling.timing import SUFFIX_TOKENS, first_token, timed

BAND = (15, 20)
"""The band that is compared, one of those whose starts are corrected."""
REST = ds.Plan(project="rest")
RANKS = (8, 32, 128)
DELIMITERS = ("\n", ":", ",", ".", "(", ")", "<|im_end|>")
STUDIED_CONTEXTS = 6  # of each split, of which errors are measured layer by layer
ANSWERED = 40  # test contexts whose answers are generated and scored, for the time it takes
ANSWERED_WAYS = (
    "reuse", "fitted", "fitted, no hidden states", "recent 10 % over fitted", "selected 10 % over fitted",
    "selected 10 % over ridge",
)  # fmt: skip
TIMED_WAYS = ("reuse", "projected", "fitted", "fitted, no hidden states")
TIMED_TOKENS = 2048
ROUNDS = 9


@dataclass(frozen=True)
class Way:
    """One way to fill the receiver's cache.

    Args:
        holds_hidden: whether the context holds hidden states.
    """

    plan: ds.Plan
    maps: ds.Maps | None = None
    holds_hidden: bool = True

    def context(self, context: ds.SharedContext) -> ds.SharedContext:
        """Return the context as the receiver gets it."""
        return context if self.holds_hidden else replace(context, hidden_states={})

    def fill(self, receiver: Any, context: ds.SharedContext, prompt_ids: torch.Tensor) -> ds.MixedCache:
        """Return the receiver's cache of a context that holds hidden states at every layer."""
        return ds.partial_prefill(receiver, self.context(context), self.plan, prompt_ids=prompt_ids, maps=self.maps)


REUSE = Way(ds.Plan())


def ways_with(maps: ds.Maps, ridge: ds.Maps) -> dict[str, Way]:
    """Return the ways that a pair is measured with: the paper's, then ours."""
    return {
        "reuse": REUSE,
        "projected": Way(REST),
        "band": Way(ds.Plan([BAND])),
        "fitted by ridge": Way(REST, ridge),
        "fitted by ridge, no hidden states": Way(REST, ridge, holds_hidden=False),
        "fitted": Way(REST, maps),
        "fitted, no hidden states": Way(REST, maps, holds_hidden=False),
        "band corrected, rest fitted": Way(ds.Plan([BAND], project="rest"), maps),
        "recent 10 % over fitted": Way(ds.Plan(project="rest", select=0.1, selector="recent"), maps),
        "selected 10 % over fitted": Way(ds.Plan(project="rest", select=0.1), maps),
        "selected 10 % over ridge": Way(ds.Plan(project="rest", select=0.1), ridge),
    }


def divergences(pair: LoadedPair, ways: dict[str, Way], examples: Sequence[ds.Example]) -> dict[str, list[float]]:
    """Return by way the divergence from the receiver's own prefill, example by example."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for example in track(examples, description=f"{pair.named.name}: test contexts"):
        context = pair.capture(example.context)
        own = answer_logits(pair.receiver, example)
        for name, way in ways.items():
            cache = way.fill(pair.receiver, context, example.prompt)
            found[name].append(divergence(own, answer_logits(pair.receiver, example, cache)))
    return found


# --- parts ------------------------------------------------------------------------------------------------------------------


def measure_pair(pair: LoadedPair, contexts: int) -> list[Row]:
    """Measure every way on the test contexts of a pair."""
    fitted = fitted_maps(pair)
    test = pair.examples("test", contexts)
    ways = ways_with(fitted.maps, fitted_maps(pair, RIDGE).maps)
    found = divergences(pair, ways, test)
    scores = answer_scores(pair, {way: ways[way] for way in ANSWERED_WAYS}, contexts)
    lengths = [example.context.shape[1] for example in test]
    long = [number for number, length in enumerate(lengths) if length > LONG]

    def of_reuse_long(kl: Sequence[float]) -> str:
        ours, reuse = (sum(values[number] for number in long) for values in (kl, found["reuse"]))
        return f"{ours / reuse:.3g}" if long else ""

    of_pair = {
        "score_full_prefill": scores["full prefill"],
        "metric": pair.named.task.metric,
        "contexts": len(test),
        "tokens": f"{min(lengths)}-{max(lengths)}",
        "fit_seconds": f"{fitted.seconds:.0f}",
        "fit_tokens": fitted.tokens,
        "distance": f"{relative_distance(pair.sender, pair.receiver):.3f}",
    }
    return [
        {
            "way": way,
            **mean_and_interval("kl", kl),
            **ratio_and_interval("of_reuse", kl, found["reuse"]),
            **ratio_and_interval("of_band", kl, found["band"]),
            **ratio_and_interval("of_ridge", kl, found["fitted by ridge"]),
            "of_reuse_long": of_reuse_long(kl),
            "score": scores.get(way, ""),
            **of_pair,
        }
        for way, kl in found.items()
    ]


def answer_scores(pair: LoadedPair, ways: dict[str, Way], contexts: int) -> dict[str, str]:
    """Return the mean score of what the receiver answers, by way, and by full prefill."""
    texts = pair.named.task.examples("test", min(contexts, ANSWERED))
    totals = dict.fromkeys(("full prefill", *ways), 0.0)
    for text in track(texts, description=f"{pair.named.name}: answers"):
        example = text.encode(pair.tokenizer, pair.receiver.device)
        context = pair.capture(example.context)
        filled = {name: way.fill(pair.receiver, context, example.prompt) for name, way in ways.items()}
        caches = {"full prefill": None, **filled}
        for name, cache in caches.items():
            totals[name] += pair.named.task.score(pair.answer(example, cache), text.answer)
    return {name: f"{total / len(texts):.3f}" for name, total in totals.items()}


def relative_distance(one: Any, other: Any) -> float:
    """Return the norm of the difference of two models' weights, relative to that of the first one's."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        apart = sum(float((a - b).double().square().sum()) for a, b in pairs)
        return (apart / sum(float(a.double().square().sum()) for a, _ in pairs)) ** 0.5


def measure_tokens(pair: LoadedPair, contexts: int, sizes: Sequence[int]) -> list[Row]:
    """Measure maps that were calibrated on ever more tokens."""
    groups = by_context(pair.examples("calibration", max(sizes) // 500))
    ways, calibrations = {"reuse": REUSE}, {}
    for size in sizes:
        examples = cut_to_tokens(groups, size)
        began = time.perf_counter()
        maps = ds.fit(pair.sender, pair.receiver, examples, steps=0)
        calibration = {"tokens": context_tokens(examples), "fit_seconds": f"{time.perf_counter() - began:.0f}"}
        for way, holds_hidden in (("fitted", True), ("fitted, no hidden states", False)):
            ways[f"{way}, {size}"] = Way(REST, maps, holds_hidden)
            calibrations[f"{way}, {size}"] = {"way": way, **calibration}
    found = divergences(pair, ways, pair.examples("test", contexts))
    return [
        {**calibration, **ratio_and_interval("of_reuse", found[way], found["reuse"])}
        for way, calibration in calibrations.items()
    ]


def cut_to_tokens(groups: Sequence[Sequence[ds.Example]], tokens: int) -> list[ds.Example]:
    """Return the examples of the first contexts that have about so many tokens together; for few, those of three cut ones."""
    kept: list[ds.Example] = []
    for number, group in enumerate(groups):
        if number >= FOLDS and context_tokens(kept) >= tokens:
            break
        kept += group
    longest = tokens // FOLDS if context_tokens(kept) > 2 * tokens else None
    return [each._replace(context=each.context[:, -longest:] if longest else each.context) for each in kept]


def measure_transfer(pair: LoadedPair, contexts: int) -> list[Row]:
    """Measure the maps of a pair, and others that were calibrated on another's domain, on the test contexts of both."""
    elsewhere = replace(pair, named=replace(pair.named, task=CODE if pair.named.task is GLOSSARY else GLOSSARY))
    abroad = ds.fit(pair.sender, pair.receiver, elsewhere.examples("calibration", CALIBRATION_CONTEXTS), steps=0)
    ways = {
        "own domain": Way(REST, fitted_maps(pair, RIDGE).maps),
        "other domain": Way(REST, abroad),
        "own domain, trained": Way(REST, fitted_maps(pair).maps),
    }
    rows: list[Row] = []
    for domain, source in (("own domain", pair), ("other domain", elsewhere)):
        found = divergences(source, {"reuse": REUSE, **ways}, source.examples("test", contexts))
        for way in ways:
            of_reuse = ratio_and_interval("of_reuse", found[way], found["reuse"])
            rows.append({"calibrated_on": way, "tested_on": domain, **of_reuse})
    return rows


def measure_rank(pair: LoadedPair, contexts: int) -> list[Row]:
    """Measure maps whose difference from what they replace is cut to a rank."""
    maps = fitted_maps(pair, RIDGE).maps
    ways = {"full": Way(REST, maps)}
    ways |= {str(rank): Way(REST, of_rank(pair.sender, pair.receiver, maps, rank)) for rank in RANKS}
    found = divergences(pair, {"reuse": REUSE, **ways}, pair.examples("test", contexts))
    return [{"rank": way, **ratio_and_interval("of_reuse", found[way], found["reuse"])} for way in ways]


def measure_layers(pair: LoadedPair) -> list[Row]:
    """Measure how well each layer is fitted."""
    calibration, test = (
        [group[0].context for group in by_context(pair.examples(split, STUDIED_CONTEXTS))]
        for split in ("calibration", "test")
    )
    ids = [pair.tokenizer(text).input_ids[-1] for text in DELIMITERS]
    delimiters = torch.tensor(ids, device=pair.receiver.device)
    return errors_by_layer(pair.sender, pair.receiver, fitted_maps(pair, RIDGE).maps, calibration, test, delimiters)


def measure_cost(pair: LoadedPair) -> list[Row]:
    """Time full prefill in turn with each way that runs no layer, and each way's filling in turn with projection."""
    ids = pair.text(TIMED_TOKENS + SUFFIX_TOKENS)
    context = pair.capture(ids[:, :TIMED_TOKENS])
    full = partial(first_token, pair.receiver, context, ids, None)
    project = partial(Way(REST).fill, pair.receiver, context, ids)
    rows: list[Row] = []
    maps = fitted_maps(pair, RIDGE).maps
    ways = ways_with(maps, maps)
    for name_of_way in TIMED_WAYS:
        way = ways[name_of_way]
        held = way.context(context)
        start = partial(first_token, pair.receiver, held, ids, way.plan, maps=way.maps)
        fill = partial(way.fill, pair.receiver, context, ids)
        needed = replace(held, hidden_states={}) if way is REUSE else held
        rows.append(
            {
                "way": name_of_way,
                "context_tokens": TIMED_TOKENS,
                "ttft_speedup": f"{speedup(full, start, ROUNDS):.1f}",
                "of_projected_time": f"{1 / speedup(project, fill, 5 * ROUNDS):.3f}",  # a small difference
                "context_MiB": f"{needed.nbytes / 2**20:.0f}",
            }
        )
    return rows


def speedup(slow: Callable[[], object], fast: Callable[[], object], rounds: int) -> float:
    """Return the median of the ratios of two times taken one after the other, warm."""
    slow(), fast()
    return statistics.median(timed(slow)[1] / timed(fast)[1] for _ in range(rounds))


# --- the command ------------------------------------------------------------------------------------------------------------


PARTS: dict[str, Callable[[LoadedPair, argparse.Namespace], list[Row]]] = {
    "pairs": lambda pair, args: measure_pair(pair, args.contexts),
    "tokens": lambda pair, args: measure_tokens(pair, _few(args.contexts), args.sizes),
    "transfer": lambda pair, args: measure_transfer(pair, _few(args.contexts)),
    "rank": lambda pair, args: measure_rank(pair, _few(args.contexts)),
    "layers": lambda pair, args: measure_layers(pair),
    "cost": lambda pair, args: measure_cost(pair),
}
"""By part the function that measures it for a pair."""


def _few(contexts: int) -> int:
    return max(1, contexts // 4)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command; the rows are those of all parts, with `part` in front."""
    options = parser("maps", __doc__)
    options.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    options.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS, metavar="PAIR", help=", ".join(PAIRS))
    options.add_argument(
        "--contexts", type=int, default=64, help="test contexts of each pair; the other parts take a quarter"
    )
    options.add_argument(
        "--sizes", type=int, nargs="+", default=[1_000, 3_000, 12_000, 50_000], help="calibration tokens"
    )
    options.add_argument("--device", type=torch.device, default="cpu", help="of the models")
    options.add_argument("--folder", type=Path, required=True, help="where CSV files and plots are written")
    args = options.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)

    where, found = f"float32, {setting(args.device)}", []
    for part in args.only:
        rows: list[Row] = []
        for name in args.pairs:
            rows += [{"pair": name, **row} for row in PARTS[part](PAIRS[name].load(args.device), args)]
            write_csv(args.folder / f"{part}.csv", rows, setting=where)
        show(rows, f"{part}: SmolLM2-135M-Instruct and variants of it, {where}")
        found += [{"part": part, **row} for row in rows]
    plots.draw(args.folder)
    return found
