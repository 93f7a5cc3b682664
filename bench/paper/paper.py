"""The paper's comparisons on real pairs of models: quality against time for its ways to reuse a KV cache, and for ours.

    python bench/variants/train.py code docs
    python bench/paper/paper.py --folder docs/results --page docs/results.md

For each pair maps are fitted and plans profiled; then what is chosen, and what the paper compares, is judged on other test
contexts. Steps, each of which writes to the folder and is skipped with `--only` others:

- `costs`: times of the receiver on this machine. To be run alone on it.
- `profiler`: what profiling a context costs, every band of all layers. To be run alone on the machine.
- `profile`: quality against cost of every band, without maps (the paper's ways) and with them (ours), with a report of each.
- `choose`: what plans that few contexts choose lose beyond the best ones, `choice.csv`.
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
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "variants"))
import results_page
from choice import best_within, measure_choice
from maps import CALIBRATION_CONTEXTS, LONG, Loaded, maps_of
from maps import Way as Filling
from pairs import PAIRS
from quality import divergence, mean_and_interval, ratio_and_interval
from reporting import Row, show, write_csv
from token_selective import token_selective_prefill

import droidspeak_ops as ds
from droidspeak_ops.hf.decoder import Decoder
from droidspeak_ops.profiling.frontier import Frontier, Point
from droidspeak_ops.profiling.report import write_report
from droidspeak_ops.profiling.run import JUDGED, Tried, measure_context
from droidspeak_ops.profiling.timing import SUFFIX_TOKENS, first_token, timed

STEPS = ("costs", "profiler", "profile", "choose", "judge", "answer", "time", "page")
CONTIGUOUS = (6, 9, 12, 18)
"""Layers of the bands that ways are compared at."""
PROFILES = ("without_maps", "with_maps")
FLOORS = (0.05, 0.01)
SPEEDS = (5.0, 2.6)
"""Times faster than full prefill, at which the best plan is judged."""
CHOSEN_AT = (2.0, 2.6, 3.5, 5.0, 9.0)
AT_THE_BANDS_TIME = ("scattered layers", "selected tokens")  # or less, and so not timed
TIMED_TOKENS = 2048


def best_at(speed: float) -> str:
    return f"best at {speed:g} times"


ANSWERED = ("all reused", "all fitted", *map(best_at, SPEEDS))


@dataclass(frozen=True)
class Way:
    """One way to fill the receiver's cache, and the band of so many layers that it is to be compared with.

    Args:
        point: of a frontier; None for token-selective recompute.
        band: layers of that band; 0 where it stands for itself.
        with_maps: whether its frontier is of plans with maps.
    """

    name: str
    point: Point | None
    band: int = 0
    with_maps: bool = False

    def fill(self, pair: Loaded, maps: ds.Maps, context: ds.SharedContext) -> Any:
        if self.point is None:
            return token_selective_prefill(pair.receiver, context, self.band - 1)
        return ds.partial_prefill(pair.receiver, context, self.point.plan, maps=maps if self.with_maps else None)

    @property
    def plan(self) -> str:
        return f"tokens, of {self.band - 1} layers" if self.point is None else str(self.point)


def ways_of(plain: Frontier, ours: Frontier) -> Iterator[Way]:
    """The paper's, and for each band what the same time buys otherwise; each the best of its kind on the profile's contexts.

    Args:
        plain: of plans without maps.
        ours: of plans with them.
    """

    def best(points: Sequence[Point]) -> Point:
        return min(points, key=plain.typical_kl)

    def layers(point: Point) -> int:
        return sum(end - start for start, end in point.plan.bands)

    def within(seconds: float) -> Point:
        return best_within(ours, seconds, TIMED_TOKENS)

    projected = ds.Plan(project="rest")
    yield Way("all reused", plain.point(ds.Plan()))
    yield Way("all projected", plain.point(projected))
    yield Way("all fitted", ours.point(projected), with_maps=True)
    of_paper = [each for each in plain.points if each.rest == "reuse" and each.plan.bands]
    for count in CONTIGUOUS:
        same = [point for point in of_paper if layers(point) == count]
        contiguous = [point for point in same if len(point.plan.bands) == 1]
        scattered = [point for point in same if len(point.plan.bands) > 1]
        if not contiguous:
            continue
        band = best(contiguous)
        yield Way("contiguous band", band, count)
        if scattered:
            yield Way("scattered layers", best(scattered), count)
        yield Way("selected tokens", None, count)
        yield Way("ours in the same time", within(plain.seconds(band, TIMED_TOKENS)), count, with_maps=True)
    for speed in SPEEDS:
        yield Way(best_at(speed), within(ours.full_prefill_seconds(TIMED_TOKENS) / speed), with_maps=True)
    for floor in FLOORS:
        chosen = ours.point(ours.choose(max_quality_loss=floor))
        yield Way(f"chosen for a loss up to {floor:.0%}", chosen, with_maps=True)


def split(pair: Loaded, profiled: int, judged: int) -> tuple[list[ds.Example], list[ds.Example]]:
    """Test examples to profile on, none of them long for the time that takes, and others to judge on."""
    examples = pair.examples("test", 64)
    short = [example for example in examples[judged:] if example.context.shape[1] <= LONG]
    return short[:profiled], examples[:judged]


def profile_pair(name: str, args: argparse.Namespace) -> None:
    pair = Loaded.of(name)
    maps, _, _ = maps_of(name, pair, args.calibrated)
    examples, _ = split(pair, args.profiled, args.judged)
    costs = ds.CostModel(**json.loads((args.folder / "costs.json").read_text(encoding="utf-8")))
    title = f"{pair.named.what} ({pair.named.sender} to {pair.named.receiver})"
    for which, used in zip(PROFILES, (None, maps), strict=True):
        folder = args.folder / name / which
        folder.mkdir(parents=True, exist_ok=True)
        frontier = ds.profile(
            pair.sender,
            pair.receiver,
            examples,
            maps=used,
            granularity=args.granularity,
            costs=costs,
            journal=folder / "journal",
        )
        frontier.save(folder / "frontier.json")
        (folder / "journal").unlink()
        write_report(frontier, folder, title)


def frontiers_of(name: str, args: argparse.Namespace) -> tuple[Frontier, Frontier]:
    """Frontiers of plans without maps, and with them."""
    plain, ours = (Frontier.load(args.folder / name / which / "frontier.json") for which in PROFILES)
    return plain, ours


def choice_of(name: str, args: argparse.Namespace) -> list[Row]:
    _, ours = frontiers_of(name, args)
    return [{"pair": name, **row} for row in measure_choice(ours, CHOSEN_AT, TIMED_TOKENS)]


@torch.no_grad()
def judge_pair(name: str, args: argparse.Namespace) -> list[Row]:
    pair = Loaded.of(name)
    maps, _, _ = maps_of(name, pair, args.calibrated)
    _, examples = split(pair, args.profiled, args.judged)
    ways = list(ways_of(*frontiers_of(name, args)))
    plans = {way.plan: way for way in ways}
    kl: dict[str, list[float]] = {plan: [] for plan in plans}
    agreement: dict[str, list[float]] = {plan: [] for plan in plans}
    accuracy: dict[str, list[float]] = {plan: [] for plan in ("full prefill", *plans)}
    for example in track(examples, f"{name}: judging"):
        context = pair.read(example)
        own = ds.capture(pair.receiver, example.context)
        wanted = following(pair, ds.partial_prefill(pair.receiver, own, ds.Plan()), example)
        accuracy["full prefill"].append(share(wanted.argmax(-1) == example.answer[0]))
        for plan, way in plans.items():
            found = following(pair, way.fill(pair, maps, context), example)
            kl[plan].append(divergence(wanted, found))
            agreement[plan].append(share(wanted.argmax(-1) == found.argmax(-1)))
            accuracy[plan].append(share(found.argmax(-1) == example.answer[0]))
    bands = {way.band: way.plan for way in ways if way.name == "contiguous band"}

    def row(way: Way) -> Row:
        own = kl[way.plan]
        of_band = ratio_and_interval("of_band", own, kl[bands[way.band]]) if way.band else dict.fromkeys(OF_BAND, "")
        return {
            "pair": name,
            "way": way.name,
            "band": way.band or "",
            "plan": way.plan,
            "layers_run": way.band - 1 if way.point is None else way.point.work.run,
            **mean_and_interval("kl", own),
            **ratio_and_interval("of_reuse", own, kl[ways[0].plan]),
            **of_band,
            **mean_and_interval("agreement", agreement[way.plan]),
            **mean_and_interval("accuracy", accuracy[way.plan]),
            **ratio_and_interval("of_accuracy", accuracy[way.plan], accuracy["full prefill"]),
            "contexts": len(examples),
        }

    return [row(way) for way in ways]


OF_BAND = ("of_band", "of_band_low", "of_band_high")


def share(held: torch.Tensor) -> float:
    """Format how often something held."""
    return held.double().mean().item()


def following(pair: Loaded, cache: Any, example: ds.Example) -> torch.Tensor:
    """Log-probabilities ``[N, vocabulary]`` at each token of the answer, behind a cache of the context."""
    ids = torch.cat((example.suffix, example.answer[:, :-1]), dim=1)
    out = pair.receiver(ids, past_key_values=cache, use_cache=True, logits_to_keep=example.answer.shape[1])
    return out.logits[0].double().log_softmax(-1)


@torch.no_grad()
def answer_pair(name: str, args: argparse.Namespace) -> list[Row]:
    """Score answers of full prefill and of ways that a user would choose between."""
    pair = Loaded.of(name)
    maps, _, _ = maps_of(name, pair, args.calibrated)
    _, examples = split(pair, args.profiled, args.judged)
    ways = [way for way in ways_of(*frontiers_of(name, args)) if way.name in ANSWERED]
    texts = pair.named.task.examples("test", len(examples))
    fillings = [None, *(Filling(way.point.plan, maps if way.with_maps else None) for way in ways if way.point)]
    scores: list[list[float]] = [[] for _ in fillings]
    for text, example in zip(track(texts[: args.answered], f"{name}: answers"), examples, strict=False):
        context = pair.read(example)
        for place, filling in enumerate(fillings):
            scores[place].append(pair.named.task.score(pair.answer(filling, context, example), text.answer))
    return [
        {
            "pair": name,
            "way": "full prefill" if way is None else way.name,
            "plan": "" if way is None else way.plan,
            "metric": pair.named.task.metric,
            **mean_and_interval("score", found),
            **ratio_and_interval("of_full_prefill", found, scores[0]),
            "contexts": len(found),
        }
        for way, found in zip([None, *ways], scores, strict=True)
    ]


@torch.no_grad()
def time_pair(name: str, args: argparse.Namespace) -> list[Row]:
    """Full prefill and every way timed in turn."""
    pair = Loaded.of(name)
    maps, _, _ = maps_of(name, pair, args.calibrated)
    plain, ours = frontiers_of(name, args)
    prompt = pair.text(TIMED_TOKENS + SUFFIX_TOKENS)
    context = ds.capture(pair.sender, prompt[:, :TIMED_TOKENS], layers=range(ours.num_layers))
    suffix = prompt[:, TIMED_TOKENS:]

    def start(way: Way) -> None:
        pair.receiver(suffix, past_key_values=way.fill(pair, maps, context), use_cache=True, logits_to_keep=1)

    ways = {way.plan: way for way in ways_of(plain, ours) if way.name not in AT_THE_BANDS_TIME}
    starts: dict[str, Callable[[], Any]] = {"": partial(first_token, pair.receiver, context, prompt, None)}
    starts |= {plan: partial(start, way) for plan, way in ways.items()}
    seconds: dict[str, list[float]] = {plan: [] for plan in starts}
    for each in starts.values():
        each()
    for _ in track(range(args.rounds), f"{name}: timing"):
        for plan, each in starts.items():
            seconds[plan].append(timed(each)[1])
    return [
        {
            "pair": name,
            "plan": plan,
            "tokens": TIMED_TOKENS,
            "milliseconds": f"{statistics.median(seconds[plan]) * 1e3:.0f}",
            "predicted": f"{ours.seconds(way.point, TIMED_TOKENS) * 1e3:.0f}" if way.point else "",
            "ttft_speedup": f"{statistics.median(a / b for a, b in zip(seconds[''], seconds[plan], strict=True)):.2f}",
        }
        for plan, way in ways.items()
    ]


@torch.no_grad()
def profiler_cost(name: str, calibrated: int) -> list[Row]:
    """Measure the cost of profiling one context, in full prefills timed before and after; without maps and with them."""
    pair = Loaded.of(name)
    maps, _, _ = maps_of(name, pair, calibrated)
    decoder = Decoder(pair.receiver)
    text = pair.text(TIMED_TOKENS + SUFFIX_TOKENS + JUDGED)
    example = ds.Example(*text.split((TIMED_TOKENS, SUFFIX_TOKENS, JUDGED), dim=1))
    context = ds.capture(pair.receiver, example.context)
    full = partial(first_token, pair.receiver, context, example.prompt, None)
    full()
    rows: list[Row] = []
    for used in (None, maps):
        tried = Tried(decoder, used, 1)
        before = [timed(full)[1] for _ in range(3)]
        _, seconds = timed(partial(measure_context, pair.sender, decoder, used, [example], tried.bands))
        one = statistics.median(before + [timed(full)[1] for _ in range(3)])
        rows.append(
            {
                "pair": name,
                "maps": "" if used is None else f"{len(used.corrections)} corrected starts",
                "tokens": TIMED_TOKENS,
                "plans": len(tried.bands),
                "seconds": f"{seconds:.0f}",
                "full_prefill_seconds": f"{one:.2f}",
                "full_prefills": f"{seconds / one:.1f}",
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="PAIR", help=", ".join(PAIRS))
    parser.add_argument("--calibrated", type=int, default=CALIBRATION_CONTEXTS, help="contexts that maps are fitted to")
    parser.add_argument("--profiled", type=int, default=24, help="contexts that plans are chosen by, a third held out")
    parser.add_argument("--judged", type=int, default=36, help="contexts that they are judged on")
    parser.add_argument("--answered", type=int, default=36, help="of those, contexts whose answers are scored")
    parser.add_argument("--granularity", type=int, default=3, help="layers between the starts of bands")
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--folder", type=Path, required=True, help="where all is written")
    parser.add_argument("--page", type=Path, help="a page of text with marks between which tables are put")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    where = f"float32, {torch.get_num_threads()} CPU threads, {versions}"
    if "costs" in args.only:
        costs = ds.measure_costs(Loaded.of(args.pairs[0]).receiver)
        (args.folder / "costs.json").write_text(json.dumps(asdict(costs), indent=1) + "\n", encoding="utf-8")
    if "profiler" in args.only:
        rows = profiler_cost(args.pairs[0], args.calibrated)
        show(rows, f"profiler: {where}")
        write_csv(rows, where, args.folder / "profiler.csv")
    if "profile" in args.only:
        for name in args.pairs:
            profile_pair(name, args)
    measures: dict[str, tuple[str, Callable[[str], list[Row]]]] = {
        "choose": ("choice", lambda name: choice_of(name, args)),
        "judge": ("judged", lambda name: judge_pair(name, args)),
        "answer": ("answers", lambda name: answer_pair(name, args)),
        "time": ("times", lambda name: time_pair(name, args)),
    }
    for step, (title, measure) in measures.items():
        if step in args.only:
            for name in args.pairs:
                rows = measure(name)
                show(rows, f"{title}: {name}, SmolLM2-135M-Instruct and variants of it, {where}")
                write_csv(rows, where, args.folder / name / f"{title}.csv")
    if "page" in args.only and args.page is not None:
        results_page.write(args.folder, args.page)


if __name__ == "__main__":
    main()
