"""The ways to fill a receiver's cache that are compared: the paper's, and what the same time buys otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import droidspeak_ops as ds
from bench.paper.choice import best_within
from bench.paper.token_selective import token_selective_prefill
from droidspeak_ops.profiling.frontier import Frontier, Point

CONTIGUOUS = (6, 9, 12, 18)
"""Layers of the bands that ways are compared at."""
SPEEDS = (5.0, 2.6)
"""Times faster than full prefill, at which the best plan is judged."""
LOSS_LEVELS = (0.05, 0.01)
"""Quality losses for which a plan is chosen."""


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

    def fill(self, receiver: Any, maps: ds.Maps, context: ds.SharedContext, prompt_ids: torch.Tensor) -> Any:
        """Return the receiver's cache of a context, or where the plan selects tokens of the prompt but its last token."""
        if self.point is None:
            return token_selective_prefill(receiver, context, self.layers_run)
        used = maps if self.with_maps else None
        return ds.partial_prefill(receiver, context, self.point.plan, prompt_ids=prompt_ids, maps=used)

    @property
    def layers_run(self) -> int:
        """Layers that run over all tokens, or as many as the selected tokens cost."""
        return self.band - 1 if self.point is None else self.point.work.run

    @property
    def plan(self) -> str:
        """The plan in words, which identifies the way."""
        return f"tokens, of {self.layers_run} layers" if self.point is None else str(self.point)


def best_at(speed: float) -> str:
    """Return the name of the way that is the best plan at a speed."""
    return f"best at {speed:g} times"


def ways_of(plain: Frontier, ours: Frontier, tokens: int) -> Iterator[Way]:
    """Yield the paper's ways, and for each band what the same time buys; each the best of its kind on the profile's contexts.

    Args:
        plain: frontier of plans without maps.
        ours: frontier of plans with them.
        tokens: length of the context that times are of.
    """

    def best(points: Sequence[Point]) -> Point:
        return min(points, key=plain.typical_kl)

    def layers(point: Point) -> int:
        return sum(end - start for start, end in point.plan.bands)

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
        in_time = best_within(ours, plain.seconds(band, tokens), tokens)
        yield Way("ours in the same time", in_time, count, with_maps=True)
    for speed in SPEEDS:
        seconds = ours.full_prefill_seconds(tokens) / speed
        yield Way(best_at(speed), best_within(ours, seconds, tokens), with_maps=True)
    for level in LOSS_LEVELS:
        chosen = ours.point(ours.choose(max_quality_loss=level))
        yield Way(f"chosen for a loss up to {level:.0%}", chosen, with_maps=True)
