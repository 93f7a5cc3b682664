"""The paper's comparisons on real pairs of models: quality against time for its ways to reuse a KV cache, and for ours.

    python -m bench.variants.train code docs
    python -m bench.paper.paper --folder docs/results --page docs/results.md

For each pair maps are trained and plans profiled; then what is chosen, and what the paper compares, is judged on other test
contexts. Steps, each of which writes to the folder and is skipped with `--only` others:

- `costs`: times of the receiver on this machine. To be run alone on it.
- `profiler`: what profiling a context costs, every band of all layers. To be run alone on the machine.
- `without_maps`, `with_maps`: quality against cost of plans, with a report: the paper's ways; and ours, with trained maps.
- `choose`: what plans that few contexts choose lose beyond the best ones, `choice.csv`.
- `expect`: what they lose beyond what was expected of them, `expected.csv`.
- `judge`: on contexts that no plan was chosen by, `judged.csv`. `kl` is the divergence of next-token distributions from those
  of the receiver's own full prefill, from the suffix's last token on, with the answer's tokens given; `agreement` is how
  often the likeliest token is the same, `accuracy` how often it is the answer's, and `of_accuracy` that of full prefill's;
  `low` and `high` are where 95 % of 10,000 bootstrap values over contexts lie.
- `answer`: what the answers to some of those contexts score, `answers.csv`.
- `time`: measured time to first token of the same ways, `times.csv`. To be run alone on the machine.
- `page`: a plot, and the tables in a page of text, of what is in the folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
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
    without_interval,
    write_csv,
)
from bench.pairs import LONG, PAIRS, TEST_CONTEXTS, TRAINED, LoadedPair, fitted_maps
from bench.paper import results_page
from bench.paper.choice import measure_choice, measure_expectations
from bench.paper.ways import SPEEDS, Way, best_at, ways_of
from droidspeak_ops.files import remove_journal
from droidspeak_ops.hf.decoder import Decoder
from droidspeak_ops.metrics import answer_logits
from droidspeak_ops.profiling.candidates import Candidates
from droidspeak_ops.profiling.frontier import Frontier
from droidspeak_ops.profiling.report import write_report
from droidspeak_ops.profiling.run import EVAL_TOKENS, measure_context
from droidspeak_ops.profiling.timing import SUFFIX_TOKENS, first_token, next_logits, timed

WITH_MAPS = "with_maps"
PROFILES = ("without_maps", WITH_MAPS)
"""Profiles of a pair: the steps that write them, and their folders."""
CHOSEN_AT = (2.0, 2.6, 3.5, 5.0, 9.0)
"""Times faster than full prefill, at which it is measured what choosing costs."""
ANSWERED = ("all reused", "all fitted", *map(best_at, SPEEDS))
"""Ways whose answers are scored: those that a user would choose between."""
AT_THE_BANDS_TIME = ("scattered layers", "selected tokens")
"""Ways that are not timed: they take their band's time or less."""
TIMED_TOKENS = 2048


class Comparison:
    """The steps for one pair.

    Args:
        args: the command line.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args, self.folder = name, args, args.folder / name

    @cached_property
    def pair(self) -> LoadedPair:
        """Both models."""
        return PAIRS[self.name].load()

    @cached_property
    def maps(self) -> ds.Maps:
        """The maps that are trained for them."""
        calibration = TRAINED._replace(contexts=self.args.calibrated, steps=self.args.trained)
        return fitted_maps(self.pair, calibration).maps

    @cached_property
    def test(self) -> list[ds.Example]:
        """All test examples."""
        return self.pair.examples("test", TEST_CONTEXTS)

    @property
    def judged(self) -> list[ds.Example]:
        """Test examples to judge on."""
        return self.test[: self.args.judged]

    @property
    def profiled(self) -> list[ds.Example]:
        """Others to profile on, none of them long for the time that takes."""
        others = self.test[self.args.judged :]
        return [example for example in others if example.context.shape[1] <= LONG][: self.args.profiled]

    @property
    def ways(self) -> list[Way]:
        """The ways that are compared."""
        return list(ways_of(*frontiers_of(self.folder), TIMED_TOKENS))

    def profile(self, which: str) -> None:
        """Write one of :data:`PROFILES`, and a report of it."""
        costs = ds.CostModel(**json.loads((self.args.folder / "costs.json").read_text(encoding="utf-8")))
        named, folder = self.pair.named, self.folder / which
        folder.mkdir(parents=True, exist_ok=True)
        frontier = ds.profile(
            self.pair.sender,
            self.pair.receiver,
            self.profiled,
            maps=self.maps if which == WITH_MAPS else None,
            granularity=self.args.granularity,
            costs=costs,
            journal=folder / "journal",
        )
        frontier.save(folder / "frontier.json")
        remove_journal(folder / "journal")
        write_report(frontier, folder, f"{named.description} ({named.sender} to {named.receiver})")

    def choose(self) -> list[Row]:
        """Measure what choosing by few contexts costs."""
        _, ours = frontiers_of(self.folder)
        return [{"pair": self.name, **row} for row in measure_choice(ours, CHOSEN_AT, TIMED_TOKENS)]

    def expect(self) -> list[Row]:
        """Measure what chosen plans lose beyond what is expected of them, without maps and with them."""
        return [
            {"pair": self.name, "maps": which, **row}
            for which, frontier in zip(PROFILES, frontiers_of(self.folder), strict=True)
            for row in measure_expectations(frontier)
        ]

    @torch.no_grad()
    def judge(self) -> list[Row]:
        """Measure every way's next-token distributions against full prefill's."""
        receiver, ways = self.pair.receiver, self.ways
        plans = {way.plan: way for way in ways}
        kl: dict[str, list[float]] = {plan: [] for plan in plans}
        agreement: dict[str, list[float]] = {plan: [] for plan in plans}
        accuracy: dict[str, list[float]] = {plan: [] for plan in ("full prefill", *plans)}
        for example in track(self.judged, f"{self.name}: judging"):
            context, answer = self.pair.capture(example.context), example.answer[0]
            own = answer_logits(receiver, example)
            accuracy["full prefill"].append(_share(own.argmax(-1) == answer))
            for plan, way in plans.items():
                found = answer_logits(receiver, example, way.fill(receiver, self.maps, context, example.prompt))
                kl[plan].append(divergence(own, found))
                agreement[plan].append(_share(own.argmax(-1) == found.argmax(-1)))
                accuracy[plan].append(_share(found.argmax(-1) == answer))
        bands = {way.band: way.plan for way in ways if way.name == "contiguous band"}

        def row(way: Way) -> Row:
            plan = way.plan
            of_band = without_interval("of_band")
            if way.band:
                of_band = ratio_and_interval("of_band", kl[plan], kl[bands[way.band]])
            return {
                "pair": self.name,
                "way": way.name,
                "band": way.band or "",
                "plan": plan,
                "layers_run": way.layers_run,
                **mean_and_interval("kl", kl[plan]),
                **ratio_and_interval("of_reuse", kl[plan], kl[ways[0].plan]),
                **of_band,
                **mean_and_interval("agreement", agreement[plan]),
                **mean_and_interval("accuracy", accuracy[plan]),
                **ratio_and_interval("of_accuracy", accuracy[plan], accuracy["full prefill"]),
                "contexts": len(kl[plan]),
            }

        return [row(way) for way in ways]

    @torch.no_grad()
    def answer(self) -> list[Row]:
        """Score answers of full prefill and of some ways."""
        pair, task = self.pair, self.pair.named.task
        ways = [None, *(way for way in self.ways if way.name in ANSWERED)]
        scores: list[list[float]] = [[] for _ in ways]
        examples = self.judged[: self.args.answered]
        texts = task.examples("test", len(examples))
        for text, example in zip(track(texts, f"{self.name}: answers"), examples, strict=True):
            context = pair.capture(example.context)
            for way, found in zip(ways, scores, strict=True):
                cache = None if way is None else way.fill(pair.receiver, self.maps, context, example.prompt)
                found.append(task.score(pair.answer(example, cache), text.answer))
        return [
            {
                "pair": self.name,
                "way": "full prefill" if way is None else way.name,
                "plan": "" if way is None else way.plan,
                "metric": task.metric,
                **mean_and_interval("score", found),
                **ratio_and_interval("of_full_prefill", found, scores[0]),
                "contexts": len(found),
            }
            for way, found in zip(ways, scores, strict=True)
        ]

    @torch.no_grad()
    def time(self) -> list[Row]:
        """Time full prefill and every way in turn."""
        receiver, costs = self.pair.receiver, frontiers_of(self.folder)[1]
        prompt = self.pair.text(TIMED_TOKENS + SUFFIX_TOKENS)
        context = self.pair.capture(prompt[:, :TIMED_TOKENS])

        def start(way: Way) -> None:
            next_logits(receiver, prompt, way.fill(receiver, self.maps, context, prompt))

        ways = {way.plan: way for way in self.ways if way.name not in AT_THE_BANDS_TIME}
        full = "full prefill"
        starts: dict[str, Callable[[], Any]] = {full: partial(first_token, receiver, context, prompt, None)}
        starts |= {plan: partial(start, way) for plan, way in ways.items()}
        seconds: dict[str, list[float]] = {plan: [] for plan in starts}
        for each in starts.values():
            each()  # warm-up
        for _ in track(range(self.args.rounds), f"{self.name}: timing"):
            for plan, each in starts.items():
                seconds[plan].append(timed(each)[1])
        ratios = {plan: [a / b for a, b in zip(seconds[full], seconds[plan], strict=True)] for plan in ways}
        return [
            {
                "pair": self.name,
                "plan": plan,
                "tokens": TIMED_TOKENS,
                "milliseconds": f"{statistics.median(seconds[plan]) * 1e3:.0f}",
                "predicted": f"{costs.seconds(way.point, TIMED_TOKENS) * 1e3:.0f}" if way.point else "",
                "ttft_speedup": f"{statistics.median(ratios[plan]):.2f}",
            }
            for plan, way in ways.items()
        ]

    @torch.no_grad()
    def profiler(self) -> list[Row]:
        """Measure the cost of profiling one context, in full prefills timed before and after; without maps and with them."""
        decoder = Decoder(self.pair.receiver)
        text = self.pair.text(TIMED_TOKENS + SUFFIX_TOKENS + EVAL_TOKENS)
        example = ds.Example(*text.split((TIMED_TOKENS, SUFFIX_TOKENS, EVAL_TOKENS), dim=1))
        context = ds.capture(self.pair.receiver, example.context)
        full = partial(first_token, self.pair.receiver, context, example.prompt, None)
        full()  # warm-up
        rows: list[Row] = []
        for maps in (None, self.maps):
            bands = Candidates(decoder.num_layers, maps, 1).bands
            before = [timed(full)[1] for _ in range(3)]
            _, seconds = timed(partial(measure_context, self.pair.sender, decoder, maps, [example], bands))
            one = statistics.median(before + [timed(full)[1] for _ in range(3)])
            rows.append(
                {
                    "pair": self.name,
                    "maps": "" if maps is None else f"{len(maps.corrections)} corrected starts",
                    "tokens": TIMED_TOKENS,
                    "plans": len(bands),
                    "seconds": f"{seconds:.0f}",
                    "full_prefill_seconds": f"{one:.2f}",
                    "full_prefills": f"{seconds / one:.1f}",
                }
            )
        return rows


def frontiers_of(folder: Path) -> tuple[Frontier, Frontier]:
    """Read the frontiers of plans without maps, and with them, of the pair whose folder it is."""
    plain, ours = (Frontier.load(folder / which / "frontier.json") for which in PROFILES)
    return plain, ours


def _share(held: torch.Tensor) -> float:
    return held.double().mean().item()


TABLES: dict[str, tuple[str, Callable[[Comparison], list[Row]]]] = {
    "choose": ("choice", Comparison.choose),
    "expect": ("expected", Comparison.expect),
    "judge": ("judged", Comparison.judge),
    "answer": ("answers", Comparison.answer),
    "time": ("times", Comparison.time),
}
"""Steps that write a table for every pair, with the table's name and the method that returns its rows."""
STEPS = ("costs", "profiler", *PROFILES, *TABLES, "page")


def options() -> argparse.ArgumentParser:
    """Return the command's options."""
    found = parser("paper.paper", __doc__)
    found.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, metavar="STEP", help=", ".join(STEPS))
    found.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="PAIR", help=", ".join(PAIRS))
    found.add_argument("--calibrated", type=int, default=TRAINED.contexts, help="contexts that maps are trained on")
    found.add_argument("--trained", type=int, default=TRAINED.steps, help="steps that they are trained for, in a layer")
    found.add_argument("--profiled", type=int, default=24, help="contexts that plans are chosen by, a third held out")
    found.add_argument("--judged", type=int, default=36, help="contexts that they are judged on")
    found.add_argument("--answered", type=int, default=36, help="of those, contexts whose answers are scored")
    found.add_argument("--granularity", type=int, default=3, help="layers between the starts of bands")
    found.add_argument("--rounds", type=int, default=3, help="of timing")
    found.add_argument("--folder", type=Path, required=True, help="where all is written")
    found.add_argument("--page", type=Path, help="a page of text with marks between which tables are put")
    return found


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command; the rows are those of all tables, with the table's name as `table` in front."""
    args = options().parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)

    where, written = f"float32, {setting()}", []

    def write(folder: Path, table: str, rows: list[Row]) -> None:
        show(rows, f"{table}: {rows[0]['pair']}, SmolLM2-135M-Instruct and variants of it, {where}")
        write_csv(folder / f"{table}.csv", rows, setting=where)
        written.extend({"table": table, **row} for row in rows)

    if "costs" in args.only:
        costs = ds.measure_costs(PAIRS[args.pairs[0]].load().receiver)
        (args.folder / "costs.json").write_text(json.dumps(asdict(costs), indent=1) + "\n", encoding="utf-8")
    if "profiler" in args.only:
        write(args.folder, "profiler", Comparison(args.pairs[0], args).profiler())
    for which in PROFILES:
        if which in args.only:
            for name in args.pairs:
                Comparison(name, args).profile(which)
    for step, (table, measure) in TABLES.items():
        if step in args.only:
            for name in args.pairs:
                write(args.folder / name, table, measure(Comparison(name, args)))
    if "page" in args.only and args.page is not None:
        results_page.write(args.folder, args.page)
    return written


if __name__ == "__main__":
    main()
