"""The search of launch configurations with what time is left: the step `tune` of ``python -m bench.gpu``."""

from __future__ import annotations

import torch

from bench import tune as search
from bench.common import Row, environment
from bench.gpu_steps.step import Step

MODELS = ("Llama-3-8B", "Qwen3-8B")
CANDIDATES = 25


def tune(step: Step) -> None:
    """Try some configurations for each model, and write those that win to ``tuned.json``."""
    if step.dry:
        step.add("choice", not_run="needs a GPU")
        return
    torch.manual_seed(0)
    device, found = str(environment(step.device)["device"]), []

    def report(row: Row) -> None:
        names = ("model", "dtype", "tokens", "milliseconds")
        config = " ".join(f"{name}={value}" for name, value in row.items() if name not in names)
        step.add("candidate", config=config, **{name: row[name] for name in names})

    choices = search.tune(
        MODELS, [torch.bfloat16], 8192,
        wanted=str(CANDIDATES), processes=search.PROCESSES, seconds=max(step.seconds - 10, 10), report=report,
    )  # fmt: skip
    for model, (key, choice) in zip(MODELS, choices, strict=True):
        found.append((key, choice))
        search.write(step.folder / "tuned.json", device, found)
        times = {"ms": choice.milliseconds, "default_ms": choice.default_milliseconds}
        step.add("choice", model=model, dtype=key["dtype"], config=search.in_words(choice.config), **times)
