"""Time to first token of partial prefill against full prefill, on SmolLM2-135M-Instruct and the glossary variant.

    python bench/ttft.py --tokens 1024 2048 --csv ttft.csv

Full prefill is the strongest a transformers user has: the model's own attention (SDPA), ``logits_to_keep=1``, warm. It is
timed again right before every plan in every round, and a plan's speed-up is the median of the ratios of such neighbours.
`of_bound` compares a plan with what it should cost: its share of the layers, the suffix over transformers' own cache of the
context (prefix caching), and its projections.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from functools import partial
from pathlib import Path

import torch
import transformers
from reporting import Row, show, write_csv
from rich.progress import track
from transformers import DynamicCache

import droidspeak_ops as ds
from droidspeak_ops.demo.run import load_glossary_variant
from droidspeak_ops.hf.pretrained import SMOLLM2, load_pretrained
from droidspeak_ops.prefill.schedule import resolve
from droidspeak_ops.profiling.timing import SUFFIX_TOKENS, first_token, timed


def plans(depth: int) -> list[ds.Plan]:
    middle = depth // 2
    bands = [(middle, middle + length) for length in (1, 5, 10, 15)]
    return [
        ds.Plan(),
        ds.Plan(project="rest"),
        *(ds.Plan([band]) for band in bands),
        ds.Plan([bands[2]], project="rest"),
    ]


@torch.no_grad()
def measure(sender, receiver, tokens: int, rounds: int, norm: str) -> list[Row]:
    depth = receiver.config.num_hidden_layers
    ids = torch.randint(receiver.config.vocab_size, (1, tokens + SUFFIX_TOKENS), device=receiver.device)
    context = ds.capture(sender, ids[:, :tokens], layers=range(depth))

    full = partial(first_token, receiver, context, ids, None)

    def suffix() -> None:
        cache = DynamicCache([context.kv(layer)[:2] for layer in range(depth)])
        receiver(ids[:, tokens:], past_key_values=cache, use_cache=True, logits_to_keep=1)

    def projections() -> None:
        ds.partial_prefill(receiver, context, ds.Plan(project="rest"), norm=norm)

    candidates = {plan: partial(first_token, receiver, context, ids, plan, norm=norm) for plan in plans(depth)}
    for function in (full, suffix, projections, *candidates.values()):
        function()  # warm-up
    times: dict[object, list[float]] = {name: [] for name in ("full", "suffix", "projections", *candidates)}
    ratios: dict[ds.Plan, list[float]] = {plan: [] for plan in candidates}
    for _ in track(range(rounds), description=f"{tokens} context tokens"):
        times["projections"].append(timed(projections)[1])
        times["full"].append(timed(full)[1])
        times["suffix"].append(timed(suffix)[1])
        for plan, function in candidates.items():
            times["full"].append(timed(full)[1])
            times[plan].append(timed(function)[1])
            ratios[plan].append(times["full"][-1] / times[plan][-1])

    median = {name: statistics.median(values) for name, values in times.items()}
    rows: list[Row] = []
    for plan in candidates:
        work = resolve(plan, depth).work
        of_layers = work.run * median["full"] + work.projected * median["projections"]
        bound = of_layers / depth + median["suffix"]
        rows.append(
            {
                "tokens": tokens,
                "plan": str(plan),
                "layers_run": work.run,
                "full_ms": round(median["full"] * 1e3, 1),
                "plan_ms": round(median[plan] * 1e3, 1),
                "speedup": round(statistics.median(ratios[plan]), 2),
                "of_bound": round(median[plan] / bound, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], help="context lengths")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--norm", choices=["hf", "folded"], default="hf")
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sender, receiver = (model.to(device) for model, _ in (load_pretrained(SMOLLM2), load_glossary_variant()))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    setting = (
        f"SmolLM2-135M, float32, {SUFFIX_TOKENS} suffix tokens, norm={args.norm}, {where}, {platform.machine()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, median of {args.rounds} rounds"
    )
    rows = [row for tokens in args.tokens for row in measure(sender, receiver, tokens, args.rounds, args.norm)]
    show(rows, setting)
    if args.csv:
        write_csv(rows, setting, args.csv)


if __name__ == "__main__":
    main()
