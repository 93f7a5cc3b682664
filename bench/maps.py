"""The worth of fitted maps on real pairs of models, and the study behind them.

    python bench/variants/train.py code docs
    python bench/maps.py --folder docs/maps

Each part writes a CSV file to the folder; then plots are drawn of all that is there. `kl` is the Kullback-Leibler divergence,
in nats, of the next-token distributions from those of the receiver's own full prefill, from the suffix's last token on, with
the answer's tokens given; `of_reuse` and `of_band` are ratios of its mean to that of plain reuse, and of the same band alone;
`low` and `high` are where 95 % of 10,000 bootstrap values over contexts lie.

- `pairs`: every pair, on held-out test contexts. What is fitted is kept beside the variants and used by the other parts.
- `tokens`: calibration tokens against gain.
- `transfer`: maps calibrated on another domain.
- `rank`: maps of low rank.
- `layers`: how well layers and tokens are fitted, and the shares that layers get.
- `cost`: time of a projected layer and to first token, and bytes. To be run alone on the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from quality import answer_distributions, divergence, mean_and_interval, ratio_and_interval
from reporting import Row, show, write_csv
from rich.progress import track

import droidspeak_ops as ds
from droidspeak_ops.demo.measure import continued
from droidspeak_ops.example import by_context
from droidspeak_ops.fitting.pair import Pair
from droidspeak_ops.fitting.run import FOLDS
from droidspeak_ops.hf.decoder import Decoder
from droidspeak_ops.hf.pretrained import cache_folder
from droidspeak_ops.profiling.timing import SUFFIX_TOKENS, first_token, timed

sys.path.insert(0, str(Path(__file__).parent / "variants"))
import maps_study
from pairs import CODE, GLOSSARY, PAIRS, NamedPair, relative_distance

BAND = (15, 20)
BANDS = ((3, 8), (9, 14), BAND, (21, 26))  # whose starts are corrected
REST = ds.Plan(project="rest")
PARTS = ("pairs", "tokens", "transfer", "rank", "layers", "cost")
SPLITS = ("calibration", "test")
DELIMITERS = ("\n", ":", ",", ".", "(", ")", "<|im_end|>")
RANKS = (8, 32, 128)
CALIBRATION_CONTEXTS = 13
LONG = 2_000  # tokens, of contexts longer than most that are calibrated on
ANSWERED = 12  # test contexts whose answers are generated and scored, for the time it takes


@dataclass(frozen=True)
class Way:
    """One way to fill the receiver's cache."""

    plan: ds.Plan
    maps: ds.Maps | None = None
    holds_hidden: bool = True

    def context(self, context: ds.SharedContext) -> ds.SharedContext:
        return context if self.holds_hidden else replace(context, hidden_states={})


@dataclass
class Loaded:
    """A pair that is loaded, with its examples as token ids."""

    named: NamedPair
    sender: Any
    receiver: Any
    tokenizer: Any

    @classmethod
    def of(cls, name: str) -> Loaded:
        return cls(PAIRS[name], *PAIRS[name].load())

    def examples(self, split: str, contexts: int) -> list[ds.Example]:
        return [each.encode(self.tokenizer, self.receiver.device) for each in self.named.task.examples(split, contexts)]

    def text(self, tokens: int) -> torch.Tensor:
        """Token ids ``[1, tokens]`` of the longest test example, repeated if need be: maps are not used for random ones."""
        longest = max((each.prompt for each in self.examples("test", 64)), key=lambda prompt: prompt.shape[1])
        return longest.repeat(1, 1 + tokens // longest.shape[1])[:, :tokens]

    def divergences(self, ways: dict[str, Way], test: Sequence[ds.Example], description: str) -> dict[str, list[float]]:
        """By way the divergence on every example."""
        found: dict[str, list[float]] = {name: [] for name in ways}
        for example in track(test, description=description):
            context = self.read(example)
            own = answer_distributions(self.receiver, ds.capture(self.receiver, example.context), example, ds.Plan())
            for name, way in ways.items():
                given = answer_distributions(self.receiver, way.context(context), example, way.plan, way.maps)
                found[name].append(divergence(own, given))
        return found

    def read(self, example: ds.Example) -> ds.SharedContext:
        """The sender's context of an example, with hidden states at every layer."""
        return ds.capture(self.sender, example.context, layers=range(self.receiver.config.num_hidden_layers))

    @torch.no_grad()
    def answer(self, way: Way | None, context: ds.SharedContext, example: ds.Example) -> str:
        """Return the receiver's answer, by full prefill where there is no way."""
        plan, maps = (None, None) if way is None else (way.plan, way.maps)
        _, cache = first_token(self.receiver, context, example.prompt, plan, maps=maps)
        return continued(self.receiver, self.tokenizer, example.prompt, cache)


def maps_of(name: str, pair: Loaded, contexts: int = CALIBRATION_CONTEXTS) -> tuple[ds.Maps, float, int]:
    """The maps of a pair, the seconds their fit took and on how many tokens; fitted once, then kept for these weights."""
    digests = "".join(str(Decoder(model).fingerprint(weights=True).weights) for model in (pair.sender, pair.receiver))
    identity = hashlib.sha256(digests.encode()).hexdigest()[:16]
    path = cache_folder() / "variants" / f"maps-{name}-{contexts}-{identity}.safetensors"
    note = path.with_suffix(".txt")
    if not note.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        examples = pair.examples("calibration", contexts)
        began = time.perf_counter()
        ds.fit(pair.sender, pair.receiver, examples, bands=BANDS).save(path)
        note.write_text(f"{time.perf_counter() - began} {tokens_of(examples)}")
    seconds, tokens = note.read_text().split()
    return ds.Maps.load(path), float(seconds), int(tokens)


def tokens_of(examples: Sequence[ds.Example]) -> int:
    """Count the tokens of their contexts, each once."""
    return sum(group[0].context.shape[1] for group in by_context(examples))


def ways_of(maps: ds.Maps) -> dict[str, Way]:
    """The ways that a pair is measured with: the paper's ways, then ours."""
    return {
        "reuse": Way(ds.Plan()),
        "projected": Way(REST),
        "band": Way(ds.Plan([BAND])),
        "fitted": Way(REST, maps),
        "fitted, no hidden states": Way(REST, maps, holds_hidden=False),
        "band corrected, rest fitted": Way(ds.Plan([BAND], project="rest"), maps),
    }


def measure_pair(name: str, contexts: int) -> list[Row]:
    pair = Loaded.of(name)
    maps, seconds, tokens = maps_of(name, pair)
    test = pair.examples("test", contexts)
    ways = ways_of(maps)
    found = pair.divergences(ways, test, f"{name}: test contexts")
    scores = answer_scores(pair, {"full prefill": None, **ways}, contexts, f"{name}: answers")
    distance = relative_distance(pair.sender, pair.receiver)
    lengths = [example.context.shape[1] for example in test]
    long = [number for number, length in enumerate(lengths) if length > LONG]
    rows: list[Row] = []
    for way in ways:
        kl = found[way]
        of_long = [[found[each][number] for number in long] for each in (way, "reuse")]
        rows.append(
            {
                "pair": name,
                "way": way,
                **mean_and_interval("kl", kl),
                **ratio_and_interval("of_reuse", kl, found["reuse"]),
                **ratio_and_interval("of_band", kl, found["band"]),
                "of_reuse_long": f"{sum(of_long[0]) / sum(of_long[1]):.3g}" if long else "",
                "score": scores.get(way, ""),
                "score_full_prefill": scores["full prefill"],
                "metric": pair.named.task.metric,
                "contexts": len(test),
                "tokens": f"{min(lengths)}-{max(lengths)}",
                "fit_seconds": f"{seconds:.0f}",
                "fit_tokens": tokens,
                "distance": f"{distance:.3f}",
            }
        )
    return rows


def answer_scores(pair: Loaded, ways: dict[str, Way | None], contexts: int, description: str) -> dict[str, str]:
    """The mean score of what the receiver answers, for the ways that a user would choose between."""
    texts = pair.named.task.examples("test", min(contexts, ANSWERED))
    names = ("full prefill", "reuse", "fitted", "band corrected, rest fitted")
    totals = dict.fromkeys(names, 0.0)
    for text in track(texts, description=description):
        example = text.encode(pair.tokenizer, pair.receiver.device)
        context = pair.read(example)
        for name in names:
            totals[name] += pair.named.task.score(pair.answer(ways[name], context, example), text.answer)
    return {name: f"{total / len(texts):.3f}" for name, total in totals.items()}


def of_tokens(groups: Sequence[Sequence[ds.Example]], tokens: int) -> list[ds.Example]:
    """The examples of the first contexts that have about so many tokens together; of three that are cut, where it is few."""
    kept: list[ds.Example] = []
    for number, group in enumerate(groups):
        if number >= FOLDS and tokens_of(kept) >= tokens:
            break
        kept += group
    longest = tokens // FOLDS if tokens_of(kept) > 2 * tokens else None
    return [each._replace(context=each.context[:, -longest:] if longest else each.context) for each in kept]


def measure_tokens(name: str, contexts: int, sizes: Sequence[int]) -> list[Row]:
    """Calibration on ever more tokens of a pair."""
    pair = Loaded.of(name)
    groups = by_context(pair.examples("calibration", max(sizes) // 500))
    ways, tokens, seconds = {"reuse": Way(ds.Plan())}, {}, {}
    for size in sizes:
        examples = of_tokens(groups, size)
        began = time.perf_counter()
        maps = ds.fit(pair.sender, pair.receiver, examples)
        for way, holds_hidden in (("fitted", True), ("fitted, no hidden states", False)):
            ways[f"{way}, {size}"] = Way(REST, maps, holds_hidden)
            tokens[f"{way}, {size}"], seconds[f"{way}, {size}"] = tokens_of(examples), time.perf_counter() - began
    found = pair.divergences(ways, pair.examples("test", contexts), f"{name}: test contexts")
    return [
        {
            "pair": name,
            "way": way.rsplit(", ", 1)[0],
            "tokens": tokens[way],
            "fit_seconds": f"{seconds[way]:.0f}",
            **ratio_and_interval("of_reuse", kl, found["reuse"]),
        }
        for way, kl in found.items()
        if way in tokens
    ]


def measure_transfer(name: str, contexts: int) -> list[Row]:
    """The maps of a pair, and others of it that were calibrated on another's domain: on the test contexts of both."""
    pair = Loaded.of(name)
    elsewhere = replace(pair, named=replace(pair.named, task=CODE if pair.named.task is GLOSSARY else GLOSSARY))
    maps, _, _ = maps_of(name, pair)
    abroad = ds.fit(pair.sender, pair.receiver, elsewhere.examples("calibration", CALIBRATION_CONTEXTS))
    ways = {"reuse": Way(ds.Plan()), "own domain": Way(REST, maps), "other domain": Way(REST, abroad)}
    rows: list[Row] = []
    for domain, source in (("own", pair), ("other", elsewhere)):
        found = source.divergences(ways, source.examples("test", contexts), f"{name}: {domain} domain")
        rows += [
            {
                "pair": name,
                "calibrated_on": way,
                "tested_on": f"{domain} domain",
                **ratio_and_interval("of_reuse", kl, found["reuse"]),
            }
            for way, kl in found.items()
            if way != "reuse"
        ]
    return rows


def measure_rank(name: str, contexts: int, ranks: Sequence[int]) -> list[Row]:
    """Maps whose difference from what they replace is cut to a rank."""
    pair = Loaded.of(name)
    maps, _, _ = maps_of(name, pair)
    ways = {"reuse": Way(ds.Plan()), "full": Way(REST, maps)}
    ways |= {str(rank): Way(REST, maps_study.of_rank(pair.sender, pair.receiver, maps, rank)) for rank in ranks}
    found = pair.divergences(ways, pair.examples("test", contexts), f"{name}: test contexts")
    return [
        {"pair": name, "rank": way, **ratio_and_interval("of_reuse", kl, found["reuse"])}
        for way, kl in found.items()
        if way != "reuse"
    ]


def measure_layers(name: str) -> list[Row]:
    pair = Loaded.of(name)
    maps, _, _ = maps_of(name, pair)
    calibration, test = ([group[0].context for group in by_context(pair.examples(split, 6))] for split in SPLITS)
    delimiters = torch.tensor([pair.tokenizer(text).input_ids[-1] for text in DELIMITERS])
    both = Pair(Decoder(pair.sender), Decoder(pair.receiver), [])
    return [{"pair": name, **row} for row in maps_study.by_layer(both, maps, calibration, test, delimiters)]


def measure_cost(name: str, tokens: int, rounds: int) -> list[Row]:
    """Full prefill and what fills all layers, timed in turn."""
    pair = Loaded.of(name)
    maps, _, _ = maps_of(name, pair)
    depth = pair.receiver.config.num_hidden_layers
    ids = pair.text(tokens + SUFFIX_TOKENS)
    context = ds.capture(pair.sender, ids[:, :tokens], layers=range(depth))
    ways = {way: each for way, each in ways_of(maps).items() if "band" not in way}
    full = partial(first_token, pair.receiver, context, ids, None)
    rows: list[Row] = []
    for way, each in ways.items():
        held = each.context(context)
        fill = partial(ds.partial_prefill, pair.receiver, held, each.plan, maps=each.maps)
        project = partial(ds.partial_prefill, pair.receiver, context, REST)
        start = partial(first_token, pair.receiver, held, ids, each.plan, maps=each.maps)
        needed = replace(held, hidden_states={} if way == "reuse" else held.hidden_states)
        rows.append(
            {
                "pair": name,
                "way": way,
                "context_tokens": tokens,
                "ttft_speedup": f"{ratio(full, start, rounds):.1f}",
                "of_projected_time": f"{1 / ratio(project, fill, 5 * rounds):.3f}",  # a small difference
                "context_MiB": f"{needed.nbytes / 2**20:.0f}",
            }
        )
    return rows


def ratio(slow: Callable[[], object], fast: Callable[[], object], rounds: int) -> float:
    """The median of the ratios of two times taken one after the other, warm."""
    slow(), fast()
    return statistics.median(timed(slow)[1] / timed(fast)[1] for _ in range(rounds))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="PAIR", help=", ".join(PAIRS))
    parser.add_argument(
        "--contexts", type=int, default=64, help="test contexts of each pair; the other parts take a quarter"
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1_000, 3_000, 12_000, 50_000], help="calibration tokens"
    )
    parser.add_argument("--folder", type=Path, required=True, help="where CSV files and plots are written")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)

    few = max(1, args.contexts // 4)
    measures: dict[str, Callable[[str], list[Row]]] = {
        "pairs": lambda name: measure_pair(name, args.contexts),
        "tokens": lambda name: measure_tokens(name, few, args.sizes),
        "transfer": lambda name: measure_transfer(name, few),
        "rank": lambda name: measure_rank(name, few, RANKS),
        "layers": measure_layers,
        "cost": lambda name: measure_cost(name, 2048, 9),
    }
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    where = f"float32, {torch.get_num_threads()} CPU threads, {versions}"
    for part in args.only:
        rows: list[Row] = []
        for name in args.pairs:
            rows += measures[part](name)
            write_csv(rows, where, args.folder / f"{part}.csv")
        show(rows, f"{part}: SmolLM2-135M-Instruct and variants of it, {where}")
    maps_study.plot(args.folder)


if __name__ == "__main__":
    main()
