"""Loading and partial prefill at once: against one after the other and K/V first, and time to first token over bandwidth.

    python -m bench.pipelining --tokens 1024 --out pipelining

The context is in memory, and its tensors arrive at a rate that is set, by sleeping: loading takes no core. Loads of 0.5, 1 and
2 times the compute of a plan, which is its partial prefill from memory and timed right before and after each, are compared with
the larger of the two: `of_max` is the median of these ratios. Then the time to the first token, suffix included, is taken at
several bandwidths, beside what the cost model predicts. The folder gets both tables as CSV files, a plot of them, and a trace
of one prefill.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.progress import track

import droidspeak_ops as ds
from bench.common import Row, default_device, parser, setting, show, write_csv
from bench.pairs import PAIRS, LoadedPair
from droidspeak_ops.context.loading import LoadingContext, throttled
from droidspeak_ops.prefill.schedule import resolve
from droidspeak_ops.profiling.timing import SUFFIX_TOKENS, first_token, measure_costs, timed
from droidspeak_ops.trace import Trace

LOADS = (0.5, 1.0, 2.0)
"""Seconds of loading, by those of computing."""
BANDWIDTHS = (5e6, 10e6, 20e6, 40e6, 80e6, 160e6, 320e6)
"""Bytes per second."""
WAYS = {"sequential": "load, then prefill", "kv_first": "pipelined, K/V first", "pipelined": "pipelined"}


def plans(depth: int) -> list[ds.Plan]:
    """Return the plans that are compared: a band of a third of the layers with the rest reused, and all projected."""
    third = depth // 3
    return [ds.Plan([(third, 2 * third)]), ds.Plan(project="rest")]


class Loaded:
    """A context of random tokens with hidden states at every layer, as a store would have it.

    Args:
        pair: who made it, and who reads it.
        tokens: their number.
    """

    def __init__(self, pair: LoadedPair, tokens: int) -> None:
        self.receiver, self.depth = pair.receiver, pair.num_layers
        device = self.receiver.device
        self.ids = torch.randint(self.receiver.config.vocab_size, (1, tokens + SUFFIX_TOKENS), device=device)
        self.context = pair.capture(self.ids[:, :tokens])
        self._stored = self.context.to("cpu")
        _, tensors = self._stored._described()
        self._tensors = {name: part for name, part in tensors.items() if name.startswith(("kv.", "hidden."))}

    def loading(self, rate: float) -> ds.SharedContext:
        """Return the context, to be loaded at a rate in bytes per second."""
        stored, fetch = self._stored, throttled(self._tensors.__getitem__, rate)
        loading = LoadingContext.over(stored.tokens, stored.rotations, stored.sender, self._tensors, fetch)
        return loading.to(self.context.tokens.device)

    def nbytes(self, plan: ds.Plan) -> int:
        """Return the bytes that a plan reads."""
        reads = {f"{what}.{layer}" for what, layer in resolve(plan, self.depth).reads}
        return sum(part.nbytes for name, part in self._tensors.items() if name.rpartition(".")[0] in reads)

    def prefill(self, plan: ds.Plan, context: ds.SharedContext, way: str = "pipelined") -> None:
        """Fill a cache from a context in one of the :data:`WAYS`."""
        reads = resolve(plan, self.depth).reads
        if way == "kv_first":
            context.prefetch(sorted(reads, key=lambda read: read.what != "kv"))
        elif way == "sequential":
            context.prefetch(reads)
            context.wait(reads)
        ds.partial_prefill(self.receiver, context, plan)


def compare(loaded: Loaded, rounds: int) -> list[Row]:
    """Time every way of prefill while a context is loaded, for loads of several lengths."""
    rows: list[Row] = []
    for plan in plans(loaded.depth):
        in_memory = partial(loaded.prefill, plan, loaded.context)
        in_memory()  # warm-up
        for load in LOADS:
            compute: list[float] = []
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            ratios: dict[str, list[float]] = {way: [] for way in WAYS}
            compute.append(timed(in_memory)[1])
            for _ in track(range(rounds), description=f"{plan}, a load of {load} times the compute"):
                for way in WAYS:
                    seconds = load * compute[-1]
                    context = loaded.loading(loaded.nbytes(plan) / seconds)
                    times[way].append(timed(partial(loaded.prefill, plan, context, way))[1])
                    compute.append(timed(in_memory)[1])
                    ratios[way].append(times[way][-1] / max(seconds, statistics.mean(compute[-2:])))
            rows.append(
                {
                    "plan": str(plan),
                    "load": load,
                    "mbytes": round(loaded.nbytes(plan) / 1e6, 1),
                    "compute_ms": round(statistics.median(compute) * 1e3, 1),
                    **{f"{way}_ms": round(statistics.median(times[way]) * 1e3, 1) for way in WAYS},
                    **{f"{way}_of_max": round(statistics.median(ratios[way]), 3) for way in WAYS},
                }
            )
    return rows


def over_bandwidth(loaded: Loaded, bandwidths: Sequence[float], rounds: int) -> list[Row]:
    """Time the first token of full prefill, which loads nothing, and of plans at several bandwidths."""
    tokens = loaded.context.tokens.shape[1]
    costs = measure_costs(loaded.receiver, tokens=(tokens // 4, tokens // 2, tokens), rounds=rounds)
    rows: list[Row] = []
    for plan in (None, ds.Plan(), *plans(loaded.depth)):
        work = resolve(plan or ds.Plan([(0, loaded.depth)]), loaded.depth).work
        for bandwidth in bandwidths if plan else (None,):
            times = []
            for _ in track(range(rounds), description=f"{plan or 'full prefill'} at {bandwidth or 'any'} bytes/s"):
                context = loaded.context if bandwidth is None else loaded.loading(bandwidth)
                times.append(timed(partial(first_token, loaded.receiver, context, loaded.ids, plan))[1])
            rows.append(
                {
                    "plan": "full prefill" if plan is None else str(plan),
                    "mbytes_per_s": None if bandwidth is None else bandwidth / 1e6,
                    "first_token_ms": round(statistics.median(times) * 1e3, 1),
                    "predicted_ms": round(costs.seconds(work, tokens, bandwidth) * 1e3, 1),
                }
            )
    return rows


def trace_of(loaded: Loaded) -> Trace:
    """Trace a prefill of the first plan, whose load takes as long as its compute."""
    plan, trace = plans(loaded.depth)[0], Trace()
    _, seconds = timed(partial(loaded.prefill, plan, loaded.context))
    context = loaded.loading(loaded.nbytes(plan) / seconds)
    ds.partial_prefill(loaded.receiver, context, plan, trace=trace)
    return trace


def plot(compared: Sequence[Row], first_tokens: Sequence[Row], title: str, path: Path) -> None:
    """Draw both tables as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    bars, lines = figure.subplots(1, 2)
    for number, (way, label) in enumerate(WAYS.items()):
        places = [place + 0.27 * (number - 1) for place in range(len(compared))]
        bars.bar(places, [row[f"{way}_of_max"] for row in compared], 0.25, label=label, color=f"C{number}")
    bars.axhline(1.15, color="black", linewidth=0.8, linestyle=":", label="1.15")
    labels = [f"{row['plan']}\n{row['load']:g}" for row in compared]
    bars.set_xticks(range(len(compared)), labels, fontsize=7)
    bars.set_xlabel("load / compute")
    bars.set_ylabel("time / max(load, compute)")
    bars.set_title("partial prefill while the context is loaded", fontsize=10)
    bars.legend(fontsize=8)
    (full,) = (row for row in first_tokens if row["mbytes_per_s"] is None)
    lines.axhline(full["first_token_ms"], color="black", label=full["plan"])
    for number, plan in enumerate(dict.fromkeys(row["plan"] for row in first_tokens if row is not full)):
        of_plan = [row for row in first_tokens if row["plan"] == plan]
        at = [row["mbytes_per_s"] for row in of_plan]
        lines.plot(at, [row["first_token_ms"] for row in of_plan], marker="o", color=f"C{number}", label=plan)
        predicted = [row["predicted_ms"] for row in of_plan]
        lines.plot(at, predicted, linestyle="--", linewidth=0.8, color=f"C{number}", label=f"{plan}, predicted")
    lines.set_xscale("log")
    lines.set_yscale("log")
    lines.set_xlabel("bandwidth [MB/s]")
    lines.set_ylabel("time to first token [ms]")
    lines.set_title("time to first token over bandwidth", fontsize=10)
    lines.grid(alpha=0.3, which="both")
    lines.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def run(
    pair: LoadedPair, folder: Path, title: str, *, tokens: int, rounds: int, bandwidths: Sequence[float]
) -> list[Row]:
    """Measure all with a pair, write the folder, and return the first table."""
    folder.mkdir(parents=True, exist_ok=True)
    loaded = Loaded(pair, tokens)
    compared = compare(loaded, rounds)
    show(compared, title)
    write_csv(folder / "pipelining.csv", compared, setting=title)
    first_tokens = over_bandwidth(loaded, bandwidths, rounds)
    show(first_tokens, title)
    write_csv(folder / "bandwidth.csv", first_tokens, setting=title)
    plot(compared, first_tokens, title, folder / "pipelining.png")
    trace = trace_of(loaded)
    trace.write_json(folder / "trace.json")
    trace.plot(folder / "trace.png", f"{plans(loaded.depth)[0]}, a load as long as its compute")
    return compared


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command."""
    options = parser("pipelining", __doc__)
    options.add_argument("--tokens", type=int, default=1024, help="context length")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--bandwidths", type=float, nargs="+", default=BANDWIDTHS, help="in bytes per second")
    options.add_argument("--out", type=Path, required=True, help="folder for the results")
    args = options.parse_args(argv)
    torch.manual_seed(0)
    pair = PAIRS["lora"].load(default_device())
    title = (
        f"SmolLM2-135M, float32, {args.tokens} context tokens, {SUFFIX_TOKENS} suffix tokens, "
        f"{setting(pair.receiver.device)}, median of {args.rounds} rounds"
    )
    return run(pair, args.out, title, tokens=args.tokens, rounds=args.rounds, bandwidths=args.bandwidths)


if __name__ == "__main__":
    main()
