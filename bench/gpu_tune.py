"""The search of launch configurations as a step of ``bench/gpu.py``, with what time is left."""

from __future__ import annotations

import os
from typing import Any

import torch
import tune as tuner
from gpu_rows import Step

MODELS = ("Llama-3-8B", "Qwen3-8B")
CANDIDATES = 25
PROCESSES = 12


def tune(step: Step) -> None:
    """Some configurations for each model, of which those that win are written to ``tuned.json``."""
    if step.dry:
        step.add("choice", not_run="needs a GPU")
        return
    torch.manual_seed(0)
    found = []

    def report(row: dict[str, Any]) -> None:
        names = ("model", "dtype", "tokens", "milliseconds")
        config = " ".join(f"{name}={value}" for name, value in row.items() if name not in names)
        step.add("candidate", config=config, **{name: row[name] for name in names})

    search = tuner.tune(
        MODELS, [torch.bfloat16], 8192,
        wanted=str(CANDIDATES), processes=min(os.cpu_count() or 1, PROCESSES), seconds=max(step.seconds - 10, 10),
        report=report,
    )  # fmt: skip
    for model, (key, choice) in zip(MODELS, search, strict=True):
        found.append((key, choice))
        tuner.write(step.folder / "tuned.json", torch.cuda.get_device_name(), found)
        config = " ".join(f"{name}={value}" for name, value in vars(choice.config).items())
        times = {"ms": choice.milliseconds, "default_ms": choice.default_milliseconds}
        step.add("choice", model=model, dtype=key["dtype"], config=config, **times)
