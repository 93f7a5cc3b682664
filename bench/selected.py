"""Selected tokens on real pairs and tasks: answers, next tokens and time to first token, beside other ways to reuse a cache.

    python -m bench.selected --folder FOLDER --pairs lora linked spread-out
    python -m bench.selected --folder FOLDER --pairs lora --only time    # alone on the machine
    python -m bench.selected --folder FOLDER --only page --page docs/selected.md

Ways are plans that select tokens, ours and those of other work; the best single bands of some lengths that
``bench.paper.paper`` found when it profiled the pair; and the best plan of bands and maps that it had found for five times
before tokens were selected. `fitted` maps are regressions, `trained` ones were trained on what attention reads as well. Steps:

- `judge`: on test contexts, none of which maps were fitted to, with one question each; `PAIR/judged.csv` has a row for each
  context and way, and a later run adds those that are missing. `score` is that of the answer by the task's metric, `exact` its
  exact match; `same` is how often the likeliest next token is full prefill's along the answer that full prefill gives, and `kl`
  the mean divergence from its distributions there, in nats. In tasks without a metric nothing is generated: `same` and `kl` are
  along the example's answer, and `score` is the share of its tokens that are predicted.
- `time`: `PAIR/times.csv`, medians of ratios, each of full prefill and of a way right after it.
- `page`: tables in a page of text and `selected.png`, of all that is in the folder. `lost` and `won` count answers that score
  less or more than full prefill's by a tenth. Intervals are of 10,000 bootstrap samples of contexts; with one question to a
  context these are all the clusters there are.

The page also says what time single bands need for the divergence of a way, on the same contexts: the logarithm of the bands'
divergences is interpolated against their measured times, along the bands that no other beats in both. Where none of them
diverges as little, that time is at least the best one's.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import droidspeak_ops as ds
from bench import selected_page
from bench.common import Row, checkout, divergence, parser, read_csv, setting, show, write_csv
from bench.other_selectors import Selector, mean_attention, random_windows
from bench.pairs import CASES, RIDGE, TEST_CONTEXTS, TRAINED, Calibration, LoadedPair, fitted_maps
from bench.paper.paper import frontiers_of
from droidspeak_ops.demo.measure import MAX_ANSWER_TOKENS
from droidspeak_ops.example import TextExample, examples_digest
from droidspeak_ops.files import replacing
from droidspeak_ops.metrics import answer_logits, exact_match
from droidspeak_ops.profiling.frontier import Frontier
from droidspeak_ops.profiling.timing import first_token, next_logits, timed

TIMED_TOKENS = (900, 2048)
TIMED_SUFFIX = 24
BANDS = (6, 12, 18, 24)
"""Layers of the bands of which the profile's best one is judged."""


@dataclass(frozen=True)
class Way:
    """A way to fill the receiver's cache.

    Args:
        maps: what its maps are calibrated on; None for a plan without any.
        selector: makes the plan's selector, given the receiver, the context and what the plan selects; None for the plan's own.
    """

    name: str
    plan: ds.Plan
    maps: Calibration | None = None
    selector: Callable[[Any, ds.SharedContext, int | float], Selector] | None = None

    def fill(
        self, receiver: ds.Receiver, maps: ds.Maps | None, context: ds.SharedContext, prompt_ids: torch.Tensor
    ) -> ds.MixedCache:
        """Return the receiver's cache of a context."""
        plan = self.plan
        if self.selector is not None:
            plan = replace(plan, selector=self.selector(receiver.decoder().model, context, plan.select))
        return ds.partial_prefill(receiver, context, plan, prompt_ids=prompt_ids, maps=maps)


WAYS = (
    Way(selected_page.REUSED, ds.Plan()),
    Way("selected 40 tokens", ds.Plan(select=40)),
    Way("selected 48 tokens", ds.Plan(select=48)),
    Way("selected 5 %", ds.Plan(select=0.05)),
    Way("selected 10 %", ds.Plan(select=0.1)),
    Way("recent 10 %", ds.Plan(select=0.1, selector="recent")),
    Way("deviation 10 %", ds.Plan(select=0.1, selector="deviation")),
    Way("random windows 10 %", ds.Plan(select=0.1, selector=random_windows)),
    Way("mean attention 10 %", ds.Plan(select=0.1), selector=mean_attention),
    Way("all fitted", ds.Plan(project="rest"), RIDGE),
    Way("selected 5 % over fitted", ds.Plan(project="rest", select=0.05), RIDGE),
    Way("selected 10 % over fitted", ds.Plan(project="rest", select=0.1), RIDGE),
    Way("recent 10 % over fitted", ds.Plan(project="rest", select=0.1, selector="recent"), RIDGE),
    Way("recent 20 % over fitted", ds.Plan(project="rest", select=0.2, selector="recent"), RIDGE),
    Way("all trained", ds.Plan(project="rest"), TRAINED),
    Way("selected 48 tokens over trained", ds.Plan(project="rest", select=48), TRAINED),
    Way("selected 10 % over trained", ds.Plan(project="rest", select=0.1), TRAINED),
    Way("recent 48 tokens over trained", ds.Plan(project="rest", select=48, selector="recent"), TRAINED),
    Way("recent 10 % over trained", ds.Plan(project="rest", select=0.1, selector="recent"), TRAINED),
)
BEST_OF_BANDS = "best of bands, rest fitted"
BEFORE = {"full": (21, 24), "tasks": (21, 24), "far": (18, 21)}
"""By pair the band of the best plan that ``bench.paper.paper`` found for a fifth of full prefill's time, of bands and maps by
regression."""


def profiled(pair: str, plain: Frontier) -> list[Way]:
    """Return what profiles of a pair found: the best single bands with the rest reused, and the best plan of before."""
    single = [each for each in plain.points if len(each.plan.bands) == 1 and each.plan == ds.Plan(each.plan.bands)]
    ways = []
    for layers in BANDS:
        of_length = [point for point in single if point.work.run == layers - 1]
        if of_length:
            plan = min(of_length, key=plain.typical_kl).plan
            ways.append(Way(str(plan), plan))
    if pair in BEFORE:
        ways.append(Way(BEST_OF_BANDS, ds.Plan([BEFORE[pair]], project="rest"), RIDGE))
    return ways


def maps_of(pair: LoadedPair, ways: Sequence[Way]) -> dict[Calibration | None, ds.Maps | None]:
    """Return the maps of a pair that ways have, by what they are calibrated on; None for those without."""
    calibrations = dict.fromkeys(way.maps for way in ways if way.maps is not None)
    return {None: None, **{each: fitted_maps(pair, each).maps for each in calibrations}}


@torch.no_grad()
def judge(pair: LoadedPair, ways: Sequence[Way], contexts: int, path: Path) -> list[Row]:
    """Add to a file the rows that it lacks of so many test contexts and the ways, and return all of it.

    Raises:
        ValueError: it has rows of other models, maps or examples.
    """
    rows = read_csv(path) if path.exists() else []
    weights, maps = f"{pair.weights}", maps_of(pair, ways)
    digests = {way.name: "" if way.maps is None else maps[way.maps].digest()[:16] for way in ways}
    receiver, measured_on = ds.Receiver(pair.receiver), {"setting": f"float32, {setting()}", **checkout()}
    texts, examples = pair.named.task.examples("test", contexts), pair.examples("test", contexts)
    for number, (text, example) in enumerate(zip(track(texts, f"{path.parent.name}: judging"), examples, strict=True)):
        of = hashlib.sha256((weights + examples_digest([example])).encode()).hexdigest()[:16]
        about = {"context": str(number), "tokens": example.context.shape[1], "of": of}
        there = [row for row in rows if row["context"] == about["context"]]
        if any(row["of"] != of or row["maps"] != digests.get(row["way"], row["maps"]) for row in there):
            raise ValueError(f"{path}: expected rows of these models, maps and examples, got others; remove it")
        missing = [way for way in ways if way.name not in {row["way"] for row in there}]
        if not missing:
            continue
        asked = example.prompt[:, : example.context.shape[1] + pair.known(text)]
        context, judged = pair.capture(example.context), Judged(pair, text, example)
        if not there:
            rows.append({"way": selected_page.FULL, **about, "maps": "", **judged.row(), **measured_on})
        for way in missing:
            cache = way.fill(receiver, maps[way.maps], context, asked)
            rows.append({"way": way.name, **about, "maps": digests[way.name], **judged.row(cache), **measured_on})
        with replacing(path) as scratch:
            write_csv(scratch, rows)
    return rows


class Judged:
    """An example that is judged, and what full prefill makes of it."""

    def __init__(self, pair: LoadedPair, text: TextExample, example: ds.Example) -> None:
        self._pair, self._text, self._example = pair, text, example
        self._is_answered = pair.named.task.metric is not None
        self._given = example._replace(answer=self._answer(None)) if self._is_answered else example
        self._own = answer_logits(pair.receiver, self._given)

    def _answer(self, cache: ds.MixedCache | None) -> torch.Tensor:
        prompt, receiver = self._example.prompt, self._pair.receiver
        ids = receiver.generate(prompt, past_key_values=cache, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        return ids[:, prompt.shape[1] :]

    def row(self, cache: ds.MixedCache | None = None) -> Row:
        """Return what a cache, which is used up, makes of it; without one, full prefill."""
        answer, found = self._given.answer, self._own
        if cache is not None:
            answer = self._answer(deepcopy(cache)) if self._is_answered else answer
            found = answer_logits(self._pair.receiver, self._given, cache)
        top = found.argmax(-1)
        scores: Row = {"score": _share(top == self._given.answer[0]), "exact": ""}
        if self._is_answered:
            text = self._pair.tokenizer.decode(answer[0], skip_special_tokens=True).strip()
            scores = {
                "score": self._pair.named.task.score(text, self._text.answer),
                "exact": exact_match(text, self._text.answer),
            }
        return {**scores, "same": _share(top == self._own.argmax(-1)), "kl": divergence(self._own, found)}


def _share(held: torch.Tensor) -> float:
    return held.double().mean().item()


@torch.no_grad()
def time(pair: LoadedPair, ways: Sequence[Way], rounds: int) -> list[Row]:
    """Time full prefill and the ways in turn."""
    receiver, maps, rows = pair.receiver, maps_of(pair, ways), []
    serving = ds.Receiver(receiver)
    for tokens in TIMED_TOKENS:
        prompt = pair.text(tokens + TIMED_SUFFIX)
        context = pair.capture(prompt[:, :tokens])

        def start(way: Way, context: ds.SharedContext = context, prompt: torch.Tensor = prompt) -> None:
            next_logits(receiver, prompt, way.fill(serving, maps[way.maps], context, prompt))

        full: Callable[[], Any] = partial(first_token, receiver, context, prompt, None)
        seconds: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
        full()
        for way in ways:
            start(way)  # warm-up
        for _ in track(range(rounds), f"{pair.named.name}: {tokens} tokens"):
            for way in ways:
                seconds[way.name].append((timed(full)[1], timed(partial(start, way))[1]))
        rows += [
            {
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
            for way in ways
        ]
    return rows


STEPS = ("judge", "time", "page")


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command; the rows are those of the tables that it shows."""
    options = parser("selected", __doc__)
    options.add_argument("--folder", type=Path, required=True, help="where all is written")
    options.add_argument("--only", choices=STEPS, default="judge")
    options.add_argument(
        "--pairs", nargs="+", choices=CASES, default=list(CASES), metavar="PAIR", help=", ".join(CASES)
    )
    options.add_argument(
        "--ways", nargs="+", metavar="WAY", help="some of them, by name; all reused is always among them"
    )
    options.add_argument("--contexts", type=int, default=TEST_CONTEXTS, help="to judge on")
    options.add_argument("--rounds", type=int, default=5, help="of timing")
    options.add_argument(
        "--results", type=Path, default=Path("docs/results"), help="what bench.paper.paper has profiled"
    )
    options.add_argument("--page", type=Path, help="a page of text with marks between which tables are put")
    args = options.parse_args(argv)
    if args.only == "page":
        if args.page is None:
            options.error("--page: expected a page of text, got none")
        selected_page.write(args.folder, args.page)
        return []
    written: list[Row] = []
    for name in args.pairs if args.only == "judge" else dict.fromkeys(CASES[name].pair.name for name in args.pairs):
        case = CASES[name]
        plain, _ = frontiers_of(args.results / case.pair.name)
        ways = _chosen(args.ways, [*WAYS, *profiled(case.pair.name, plain)], options)
        pair, folder = case.pair.load(), args.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        if args.only == "judge":
            pair = replace(pair, named=replace(pair.named, task=case.task))
            rows = selected_page.summary(judge(pair, ways, args.contexts, folder / "judged.csv"))
        else:
            rows = time(pair, ways, args.rounds)
            with replacing(folder / "times.csv") as scratch:
                write_csv(scratch, rows, setting=f"float32, {setting()}", **checkout())
        show(rows, f"{name}: {case.description}, float32, {setting()}")
        written += [{"pair": name, **row} for row in rows]
    return written


def _chosen(names: Sequence[str] | None, ways: Sequence[Way], options: argparse.ArgumentParser) -> list[Way]:
    known = [way.name for way in ways]
    for name in names or ():
        if name not in known:
            options.error(f"--ways: expected some of {', '.join(map(repr, known))}, got {name!r}")
    return [way for way in ways if names is None or way.name in (selected_page.REUSED, *names)]


if __name__ == "__main__":
    main()
