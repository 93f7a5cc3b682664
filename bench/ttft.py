"""Time to first token of partial prefill against full prefill, on SmolLM2-135M-Instruct and the glossary variant.

    python -m bench.ttft --tokens 1024 2048 --csv ttft.csv

Full prefill is the strongest a transformers user has: the model's own attention (SDPA), ``logits_to_keep=1``, warm. It is
timed again right before every plan in every round, and a plan's speed-up is the median of the ratios of such neighbours.
`of_bound` compares a plan with what it should cost: its share of the layers and of the tokens, its projections, and the suffix
over transformers' own cache of the context (prefix caching), with what it runs of that once more to select.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.progress import track
from transformers import DynamicCache

import droidspeak_ops as ds
from bench.common import Row, default_device, parser, setting, show, write_csv
from bench.pairs import PAIRS, LoadedPair
from droidspeak_ops.prefill.schedule import resolve
from droidspeak_ops.prefill.select import budget
from droidspeak_ops.profiling.timing import SUFFIX_TOKENS, first_token, timed


def plans(depth: int) -> list[ds.Plan]:
    """Return the plans that are compared: reuse, projection, bands of 1 to 15 layers, one with projection, selected tokens."""
    middle = depth // 2
    bands = [(middle, middle + length) for length in (1, 5, 10, 15)]
    return [
        ds.Plan(),
        ds.Plan(project="rest"),
        *(ds.Plan([band]) for band in bands),
        ds.Plan([bands[2]], project="rest"),
        ds.Plan(select=48),
        ds.Plan(select=0.05),
    ]


@torch.no_grad()
def measure(pair: LoadedPair, tokens: int, rounds: int, norm: Literal["hf", "folded"]) -> list[Row]:
    """Time plans over a context of random tokens."""
    receiver, depth = pair.receiver, pair.num_layers
    ids = torch.randint(receiver.config.vocab_size, (1, tokens + SUFFIX_TOKENS), device=receiver.device)
    context = pair.capture(ids[:, :tokens])
    full = partial(first_token, receiver, context, ids, None)

    def suffix() -> None:
        cache = DynamicCache([context.kv(layer)[:2] for layer in range(depth)])
        receiver(ids[:, tokens:], past_key_values=cache, use_cache=True, logits_to_keep=1)

    def projections() -> None:
        ds.partial_prefill(receiver, context, ds.Plan(project="rest"), norm=norm)

    starts = {plan: partial(first_token, receiver, context, ids, plan, norm=norm) for plan in plans(depth)}
    for function in (full, suffix, projections, *starts.values()):
        function()  # warm-up
    times: dict[object, list[float]] = {name: [] for name in ("full", "suffix", "projections", *starts)}
    ratios: dict[ds.Plan, list[float]] = {plan: [] for plan in starts}
    for _ in track(range(rounds), description=f"{tokens} context tokens"):
        times["projections"].append(timed(projections)[1])
        times["full"].append(timed(full)[1])
        times["suffix"].append(timed(suffix)[1])
        for plan, function in starts.items():
            times["full"].append(timed(full)[1])
            times[plan].append(timed(function)[1])
            ratios[plan].append(times["full"][-1] / times[plan][-1])

    median = {name: statistics.median(values) for name, values in times.items()}
    rows: list[Row] = []
    for plan in starts:
        work = resolve(plan, depth).work
        selected = budget(work.select, tokens)
        of_layers = work.run * median["full"] + work.projected * median["projections"]
        of_tokens = selected / tokens * median["full"]
        bound = of_layers / depth + of_tokens + (1 + work.probed / depth) * median["suffix"]
        rows.append(
            {
                "tokens": tokens,
                "plan": str(plan),
                "layers_run": work.run,
                "selected": selected,
                "full_ms": round(median["full"] * 1e3, 1),
                "plan_ms": round(median[plan] * 1e3, 1),
                "speedup": round(statistics.median(ratios[plan]), 2),
                "of_bound": round(median[plan] / bound, 3),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command."""
    options = parser("ttft", __doc__)
    options.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], help="context lengths")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--norm", choices=["hf", "folded"], default="hf")
    options.add_argument("--csv", type=Path, help="also write the rows to this file")
    args = options.parse_args(argv)

    torch.manual_seed(0)
    pair = PAIRS["lora"].load(default_device())
    title = (
        f"SmolLM2-135M, float32, {SUFFIX_TOKENS} suffix tokens, norm={args.norm}, {setting(pair.receiver.device)}, "
        f"median of {args.rounds} rounds"
    )
    rows = [row for tokens in args.tokens for row in measure(pair, tokens, args.rounds, args.norm)]
    show(rows, title)
    if args.csv:
        write_csv(args.csv, rows, setting=title)
    return rows


if __name__ == "__main__":
    main()
