"""Small values of each kind that is kept in files, and what is written of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import droidspeak_ops as ds
from droidspeak_ops.context.context import SharedContext
from droidspeak_ops.context.kv import KV
from droidspeak_ops.files import Journal
from droidspeak_ops.kernels.project_splice_config import ProjectSpliceConfig
from droidspeak_ops.ops import tuning
from droidspeak_ops.prefill.maps import Correction, Domain, LayerMap
from droidspeak_ops.prefill.schedule import resolve
from droidspeak_ops.profiling.cost import CostModel, Polynomial
from droidspeak_ops.profiling.frontier import WORST_KL, Frontier, Point, Sensitivity
from droidspeak_ops.profiling.run import MeasuredContext, ScoredContext

LAYERS, HIDDEN, HEADS, HEAD_DIM = 3, 16, 2, 4
MODEL = ds.Fingerprint(
    {
        "model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 4,
        "num_key_value_heads": HEADS, "vocab_size": 50, "head_dim": HEAD_DIM, "sliding_windows": [None, 4, None],
    },
    {"rope_type": "default", "rope_theta": 1e4, "applied": "0" * 64}, "float32", "0" * 64, f"50:{'0' * 64}",
)  # fmt: skip
OTHER = replace(MODEL, weights="1" * 64)
COSTS = CostModel(
    Polynomial(0.0, 1e-4, 0.0), Polynomial(0.0, 1e-5, 0.0), Polynomial(0.05, 0.0, 0.0), 64, 64, "a machine", (100, 2000)
)


def make_context() -> SharedContext:
    """Return a context of five tokens, one layer with a sliding window and one without RoPE."""
    rows = [KV(*torch.randn(2, 1, HEADS, held, HEAD_DIM)) for held in (5, 3, 5)]
    angles = torch.randn(5, HEAD_DIM // 2)
    return SharedContext(
        torch.arange(5)[None], rows, {1: torch.randn(1, 5, HIDDEN)}, [(angles.cos(), angles.sin())] * 2 + [None], MODEL
    )


def make_maps() -> ds.Maps:
    """Return maps from hidden states and from K/V, and a correction."""
    width = HEADS * HEAD_DIM

    def layer_map(columns: int) -> LayerMap:
        return LayerMap(*torch.randn(2, width, columns), *torch.randn(2, width))

    sources: Any = {"fitted": HIDDEN, "fitted_kv": 2 * width}
    return ds.Maps(
        MODEL, OTHER, ("project", "fitted", "reuse"), ("project", "reuse", "fitted_kv"),
        {(1, "fitted"): layer_map(HIDDEN), (2, "fitted_kv"): layer_map(2 * width)},
        {(layer, source): layer_map(columns) for layer in (1, 2) for source, columns in sources.items()},
        {1: Correction(torch.randn(HIDDEN, HIDDEN), torch.randn(HIDDEN))}, {1: (0.5, 1.0), 2: (0.0, 0.25)},
        Domain(0, torch.randn(2 * width), torch.eye(2 * width), 2.5),
    )  # fmt: skip


def make_frontier(*, scored: bool) -> Frontier:
    """Return a frontier with maps and scores, or without either."""

    def point(plan: ds.Plan, kl: float) -> Point:
        rest: Any = "reuse" if not plan.project else "fitted" if scored else "project"
        scores = (0.5, 0.5, 0.25) if scored else None
        return Point(plan, rest, False, resolve(plan, LAYERS).work, (None, kl, kl), (None, 0.5, 0.75), scores)

    own = replace(point(ds.Plan([(0, LAYERS)]), 0.0), kl=(0.0,) * 3, agreement=(1.0,) * 3)
    points = (point(ds.Plan(), 0.5), point(ds.Plan([(1, 2)], "rest"), WORST_KL), own)
    alone = tuple(Sensitivity(layer, layer + 1, (0.25,)) for layer in range(LAYERS))
    scores = (1.0, 0.5, 0.5) if scored else None
    return Frontier(MODEL, OTHER, "2" * 64 if scored else None, points, alone, COSTS, (9, 8, 7), 1, 1, 0, scores)


RUN = {"profile of": ["0" * 64], "maps": None}
CONTEXTS = ["3" * 64, "4" * 64]
ENTRY = dict(zip(tuning.KEY, ("torch.bfloat16", 64, 2, 32, False, 8192), strict=True))


def written(write: Callable[[Path], object]) -> bytes:
    """Return the content of a file that is written."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


def write_journal(path: Path) -> None:
    """Write the journal of a profile of two contexts."""
    with Journal(path, RUN) as records:
        for context in CONTEXTS:
            records.add(asdict(MeasuredContext(context, [0.5, WORST_KL], [0.75, 0.0])))
        records.add(asdict(COSTS))
        for context in CONTEXTS:
            records.add(asdict(ScoredContext(context, [1.0, 0.5, 0.5])))


def write_tuned(path: Path, table: dict[tuple[Any, ...], ProjectSpliceConfig]) -> None:
    """Write configurations of project_splice."""
    entries = [{**dict(zip(tuning.KEY, key, strict=True)), "config": vars(config)} for key, config in table.items()]
    tuning.save(path, "a GPU", entries)
