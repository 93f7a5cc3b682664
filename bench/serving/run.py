"""Servers of vLLM under the load of agents: plain ones with their own prefix cache, beside ones that share contexts.

    python -m bench.variants.train code
    python -m bench.serving --folder docs/serving --python FOLDER/bin/python    # FOLDER as tools/test_vllm.sh made it

A sender, the base of a pair, captures test contexts of 1,000 to 2,000 tokens first, which it would read for its own work
anyway; that is not timed. Then two servers of the receiver answer the same requests: `off` is plain vLLM, `on` is told the
plan. They stand side by side, but are asked one after the other, for each seed and rate in turn: so each has the whole machine,
and what changes about that meets both. Each load finds empty prefix caches, and has contexts of its own. Requests arrive by a
Poisson process, for a seed at the same times but for the pace, and those of several contexts are interleaved. With one question
to a context, receivers are agents of other models that a context is passed on to; with several, one of them goes on asking, and
plain vLLM has the context cached, too.

- `requests.csv`: every request. Its seconds are from when it was due, so that waiting counts.
- `rates.csv`: by rate, the median and the 95th percentile of the times to first token, and answers per second.
- `summary.csv`: the times at the lowest rate. The knee, which is the rate up to which the median time to first token is no more
  than twice that of `off` at the lowest rate, by interpolation between rates; `at_least` if it is so at all of them. A load
  ends, so that a server is past what it can serve for a while before its median is: `most` is what it answered per second, at
  the rate where that was most. And the task's score of answers at all rates, with bootstrap intervals over questions.
- `serving.png`, and with ``--page`` a table in a page of text.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track

import droidspeak_ops as ds
from bench.common import Row, checkout, mean_and_interval, parser, ratio_and_interval, setting, show, write_csv
from bench.pairs import PAIRS, NamedPair, fitted_maps
from bench.serving import plots
from bench.serving.load import Request, arrivals, draw_contexts, interleaved, play
from bench.serving.servers import Server, plain, sharing
from droidspeak_ops.example import TextExample
from droidspeak_ops.files import replacing


class Shared(NamedTuple):
    """How a pair shares contexts: its plan, and whether maps of K and V that were fitted to the pair are there, too."""

    plan: ds.Plan
    is_fitted: bool


SHARED = {"lora": Shared(ds.Plan(project="rest", select=48), True), "full": Shared(ds.Plan(project="rest"), True)}
"""By pair what is best in docs/selected.md and docs/maps.md, with contexts of K and V alone."""
LIMIT = 2.0
"""Times plain vLLM's median time to first token at the lowest rate, at which knees are compared."""
CAPTURED_AT_A_TIME = 8
OPTIONS = ("--dtype", "float32", "--max-model-len", "4096", "--enable-prefix-caching", "--block-size", "32")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB of each server, for 45,000 tokens
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # all cores compute; vLLM by itself keeps one of them free, here every other one
}


class Load(NamedTuple):
    """A load that both servers are put under.

    Args:
        seed: of the contexts, and of the order and times of arrivals.
        questions: of each context.
        rate: requests per second.
    """

    seed: int
    questions: int
    rate: float


class Bench:
    """The servers of a pair, and what they are asked.

    Args:
        pair: whose variants are written to folders, as vLLM reads models.
        shared: how the pair shares contexts.
        args: of the command.
        scratch: folder for models, contexts and what servers write.
    """

    def __init__(self, pair: NamedPair, shared: Shared, args: argparse.Namespace, scratch: Path) -> None:
        self._pair, self._args, self._scratch = pair, args, scratch
        self._store = ds.ContextStore(scratch / "contexts")
        loaded = pair.load()
        self._tokenizer = loaded.tokenizer
        for variant, model in ((pair.sender, loaded.sender), (pair.receiver, loaded.receiver)):
            model.save_pretrained(scratch / variant)
            self._tokenizer.save_pretrained(scratch / variant)
        plan, maps = scratch / "plan.json", scratch / "maps.safetensors"
        plan.write_text(shared.plan.to_json())
        self._shares = ["--store", self._store.url, "--sender", str(scratch / pair.sender), "--plan", str(plan)]
        self._hidden_layers = shared.plan.hidden_layers(loaded.num_layers)
        if shared.is_fitted:
            fitted_maps(loaded).maps.save(maps)
            self._shares += ["--maps", str(maps)]
            self._hidden_layers = ()
        count = -(-args.requests // min(args.questions))
        self._contexts: dict[tuple[int, float], list[list[TextExample]]] = {}
        for seed in range(args.seeds):
            drawn = draw_contexts(pair.task, count * len(args.rates), max(args.questions), seed)
            self._contexts |= {
                (seed, rate): drawn[number * count : (number + 1) * count] for number, rate in enumerate(args.rates)
            }

    def run(self) -> list[Row]:
        """Return a row for each request.

        Raises:
            RuntimeError: a server does not start, or contexts were not captured or not reused.
        """
        self._capture()
        args = self._args
        receiver = str(self._scratch / self._pair.receiver)
        commands = {
            "off": partial(plain, args.python, receiver),
            "on": partial(sharing, args.python, receiver, self._shares),
        }
        servers: dict[str, Server] = {}
        with ExitStack() as stack:
            for name, command in commands.items():  # one after the other: each compiles with all cores
                servers[name] = stack.enter_context(self._server(name, command))
                servers[name].wait()
                self._answer(servers[name], Load(0, min(args.questions), max(args.rates)), 2)  # warm-up
            self._check_reuse(servers["on"])
            loads = [
                Load(seed, questions, rate)
                for seed in range(args.seeds)
                for questions in args.questions
                for rate in args.rates
            ]
            rows = [
                {"pair": self._pair.name, "sharing": name, **row}
                for load in track(loads, f"{self._pair.name}: answering")
                for name, server in servers.items()
                for row in self._answer(server, load, args.requests)
            ]
            self._check_reuse(servers["on"])
        return rows

    def _check_reuse(self, server: Server) -> None:
        counted = server.counted()
        if counted["failed_contexts"] or counted["refused_requests"] or not counted["contexts"]:
            raise RuntimeError(f"{self._pair.name}: expected requests that reuse contexts, got {counted}")

    def _capture(self) -> None:
        contexts = {each[0].context for drawn in self._contexts.values() for each in drawn}
        requests = [Request(self._ids(context), {"capture": True}, tokens=1) for context in contexts]
        arguments = ["--store", self._store.url, "--capture"]
        if self._hidden_layers:
            arguments += ["--hidden-layers", ",".join(map(str, self._hidden_layers))]
        sender = partial(sharing, self._args.python, str(self._scratch / self._pair.sender), arguments)
        with self._server("sender", sender, "--enforce-eager") as server:
            server.wait()
            for start in range(0, len(requests), CAPTURED_AT_A_TIME):
                some = requests[start : start + CAPTURED_AT_A_TIME]
                asyncio.run(play(server.url, some, [0.0] * len(some)))
        if (stored := len(self._store.stored())) != len(contexts):
            raise RuntimeError(f"{self._pair.name}: expected {len(contexts)} captured contexts, got {stored}")

    def _server(self, name: str, command: Callable[[Sequence[str]], list[str]], *options: str) -> Server:
        return Server(command, [*OPTIONS, *options, *self._args.vllm], self._scratch / f"server-{name}", ENVIRONMENT)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _answer(self, server: Server, load: Load, count: int) -> list[Row]:
        server.forget()
        asked = interleaved(self._contexts[load.seed, load.rate], load.questions, load.seed)[:count]
        due = arrivals(load.rate, len(asked), load.seed)
        requests = [Request(self._ids(each.context) + self._ids(each.suffix)) for each in asked]
        answers = asyncio.run(play(server.url, requests, due))
        return [
            {
                "seed": load.seed,
                "questions": load.questions,
                "rate": load.rate,
                "due": f"{seconds:.3f}",
                "prompt_tokens": len(request.prompt),
                "first_token_seconds": f"{answer.first_token:.4f}",
                "seconds": f"{answer.last_token:.4f}",
                "score": self._pair.task.score(answer.text, each.answer),
            }
            for seconds, request, answer, each in zip(due, requests, answers, asked, strict=True)
        ]


# --- what was measured ------------------------------------------------------------------------------------------------------


def by_rate(requests: Sequence[Row]) -> list[Row]:
    """Return a row for each pair, number of questions, rate and way: of the requests of all seeds."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in requests:
        groups.setdefault(tuple(row[name] for name in ("pair", "questions", "rate", "sharing")), []).append(row)
    rows = []
    for (pair, questions, rate, way), group in groups.items():
        median, late = np.percentile([float(row["first_token_seconds"]) for row in group], (50, 95))
        seeds = {row["seed"] for row in group}
        served = statistics.fmean(_served([row for row in group if row["seed"] == seed]) for seed in seeds)
        rows.append(
            {
                "pair": pair,
                "questions": questions,
                "rate": rate,
                "sharing": way,
                "p50_ms": f"{median * 1e3:.0f}",
                "p95_ms": f"{late * 1e3:.0f}",
                "answers_per_second": f"{served:.3f}",
                "requests": len(group),
            }
        )
    return rows


def _served(requests: Sequence[Row]) -> float:
    """Answers per second, from the first request to the last answer."""
    due = [float(row["due"]) for row in requests]
    ends = [float(row["due"]) + float(row["seconds"]) for row in requests]
    return len(requests) / (max(ends) - min(due))


class Knee(NamedTuple):
    """The rate up to which times to first token are within a limit; `is_reached` unless they are so at all rates."""

    rate: float
    is_reached: bool


def knee(rates: Sequence[Row], limit: float) -> Knee:
    """Return the knee of one way, by interpolation of medians between rates; 0 where none is within the limit.

    Args:
        rates: a row for each.
        limit: milliseconds.
    """
    points = sorted((float(row["rate"]), float(row["p50_ms"])) for row in rates)
    above = next((number for number, (_, median) in enumerate(points) if median > limit), len(points))
    if above == len(points):
        return Knee(points[-1][0], False)
    if above == 0:
        return Knee(0.0, True)
    medians, of_rates = ([point[axis] for point in points[above - 1 : above + 1]] for axis in (1, 0))
    return Knee(float(np.interp(limit, medians, of_rates)), True)


def summary(requests: Sequence[Row], rates: Sequence[Row]) -> list[Row]:
    """Return a row for each pair and number of questions, of sharing beside plain vLLM."""
    rows = []
    for pair, questions in dict.fromkeys((row["pair"], row["questions"]) for row in rates):
        of_rates, of_requests = (
            {
                way: [row for row in each if (row["pair"], row["questions"], row["sharing"]) == (pair, questions, way)]
                for way in ("off", "on")
            }
            for each in (rates, requests)
        )
        lowest = min((row["rate"] for row in of_rates["off"]), key=float)
        off, on = (
            next(float(row["p50_ms"]) for row in of_rates[way] if row["rate"] == lowest) for way in ("off", "on")
        )
        knees = {way: knee(of_rates[way], LIMIT * off) for way in of_rates}
        most = {way: max(float(row["answers_per_second"]) for row in of_rates[way]) for way in of_rates}
        scores = {way: [float(row["score"]) for row in of_requests[way]] for way in of_requests}
        rows.append(
            {
                "pair": pair,
                "questions": questions,
                "off_p50_ms": f"{off:.0f}",
                "on_p50_ms": f"{on:.0f}",
                "faster": f"{off / on:.2f}",
                "off_knee": f"{knees['off'].rate:.3f}",
                "on_knee": f"{knees['on'].rate:.3f}",
                "knee_ratio": f"{knees['on'].rate / knees['off'].rate:.2f}" if knees["off"].is_reached else "",
                "at_least": not knees["on"].is_reached,
                "off_most": f"{most['off']:.3f}",
                "on_most": f"{most['on']:.3f}",
                "most_ratio": f"{most['on'] / most['off']:.2f}",
                **mean_and_interval("off_score", scores["off"]),
                **mean_and_interval("on_score", scores["on"]),
                **ratio_and_interval("of_off", scores["on"], scores["off"]),
                "answers": len(scores["on"]),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command; the rows are those of the summary."""
    options = parser("serving", __doc__)
    options.add_argument("--folder", type=Path, required=True, help="where all is written")
    options.add_argument(
        "--python", default=sys.executable, help="of an environment with vLLM, where this one has none"
    )
    options.add_argument("--pairs", nargs="+", choices=SHARED, default=list(SHARED), metavar="PAIR")
    options.add_argument("--plan", type=Path, help="JSON file of a plan without maps, in place of how pairs share")
    options.add_argument("--rates", nargs="+", type=float, default=[0.125, 0.25, 0.5, 1, 2, 4], help="per second")
    options.add_argument("--requests", type=int, default=24, help="for each seed and rate")
    options.add_argument("--questions", nargs="+", type=int, default=[1, 4], help="of each context")
    options.add_argument("--seeds", type=int, default=2, help="how many")
    options.add_argument("--vllm", type=shlex.split, default=[], help="more options of all servers, in one argument")
    options.add_argument("--page", type=Path, help="a page of text with marks between which a table is put")
    args = options.parse_args(argv)
    told = None if args.plan is None else Shared(ds.Plan.from_json(args.plan.read_bytes()), False)
    requests = []
    for name in args.pairs:
        with tempfile.TemporaryDirectory(prefix="serving-") as scratch:
            requests += Bench(PAIRS[name], told or SHARED[name], args, Path(scratch)).run()
    rates = by_rate(requests)
    rows = summary(requests, rates)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, each in (("requests", requests), ("rates", rates), ("summary", rows)):
        with replacing(args.folder / f"{name}.csv") as path:
            write_csv(path, each, setting=f"float32, {setting()}", **checkout())
    plots.draw(rates, args.folder / "serving.png")
    if args.page:
        plots.write(rows, args.page)
    show(rates, f"Time to first token, float32, {setting()}")
    show(rows, "Sharing of contexts beside plain vLLM")
    return rows
