"""Losses of plans that few contexts choose: on others, beyond the best plan's and beyond what is expected."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from bench.common import Row, mean_and_interval
from droidspeak_ops.profiling.frontier import Frontier, Point

SPLITS = 100
LIMITS = (0.01, 0.02, 0.05, 0.1, 0.15)
"""Quality losses up to which plans are chosen."""


def measure_choice(frontier: Frontier, speeds: Sequence[float], tokens: int) -> list[Row]:
    """Compare for each speed the plan chosen by two thirds of the contexts with the one of least divergence on the third.

    Contexts are dealt into thirds at random, a hundred times, and each third is held out in turn: no context judges what it
    chose, and what is found is not of one lucky deal. A context's loss is its mean over the deals. The sets of scattered
    layers are left out, because they are not tried on the contexts that say which layers they are of.

    Args:
        speeds: times faster than full prefill, that a plan has to be; those that none is are left out.
        tokens: of the context, for its time.
    """
    frontier = replace(frontier, points=tuple(point for point in frontier.points if None not in point.kl))
    deals = [(order[-frontier.held_out :], _dealt(frontier, order)) for order in _orders(frontier)]
    rows: list[Row] = []
    for speed in speeds:
        limit = frontier.full_prefill_seconds(tokens) / speed
        in_time = [point for point in frontier.points if frontier.seconds(point, tokens) <= limit]
        if not in_time:
            continue
        beyond: list[list[float]] = [[] for _ in frontier.contexts]
        kl_of_chosen, kl_of_best = 0.0, 0.0
        for held, dealt in deals:
            chosen = frontier.point(best_within(dealt, limit, tokens).plan)
            best = min(in_time, key=lambda point, held=held: _kl(point, held))
            for context in held:
                beyond[context].append(100 * (best.agreement[context] - chosen.agreement[context]))
            kl_of_chosen += _kl(chosen, held)
            kl_of_best += _kl(best, held)
        means = [sum(each) / len(each) for each in beyond if each]
        points = mean_and_interval("points", means)
        of_best = kl_of_chosen / kl_of_best
        rows.append({"faster": f"{speed:g}", **points, "of_best_kl": f"{of_best:.3f}", "contexts": len(means)})
    return rows


def measure_expectations(frontier: Frontier) -> list[Row]:
    """Compare for each limit of the quality loss what the chosen plan loses on held-out contexts with what is expected of it.

    `points` of next tokens are lost beyond the expected ones, in the mean over the deals of :func:`measure_choice`.
    """
    frontier = replace(frontier, points=tuple(point for point in frontier.points if None not in point.kl))
    beyond: dict[float, list[float]] = {limit: [] for limit in LIMITS}
    speedups: dict[float, list[float]] = {limit: [] for limit in LIMITS}
    for order in _orders(frontier):
        dealt = _dealt(frontier, order)
        for limit in LIMITS:
            chosen = dealt.point(dealt.choose(max_quality_loss=limit))
            lost = 1 - statistics.fmean(chosen.agreement[-frontier.held_out :])
            beyond[limit].append(100 * (lost - dealt.expected_loss(chosen)))
            speedups[limit].append(dealt.speedup(chosen))
    return [
        {
            "limit": f"{limit:g}",
            "points": f"{statistics.fmean(beyond[limit]):.2f}",
            "faster": f"{statistics.fmean(speedups[limit]):.2f}",
            "deals": len(beyond[limit]),
        }
        for limit in LIMITS
    ]


def best_within(frontier: Frontier, seconds: float, tokens: int) -> Point:
    """Return the plan of least divergence that is as fast as that, whatever it loses."""
    return frontier.point(frontier.choose(max_quality_loss=1.0, max_ttft=seconds, tokens=tokens))


def _orders(frontier: Frontier) -> Iterator[list[int]]:
    """Yield orders of the contexts, of which the last ones are held out."""
    for split in range(SPLITS):
        order = list(range(len(frontier.contexts)))
        random.Random(split).shuffle(order)
        for start in range(0, 3 * frontier.held_out, frontier.held_out):
            yield order[start:] + order[:start]


def _dealt(frontier: Frontier, order: Sequence[int]) -> Frontier:
    """Return the frontier with contexts in another order."""

    def turned(point: Point) -> Point:
        kl, agreement = (tuple(values[place] for place in order) for values in (point.kl, point.agreement))
        return replace(point, kl=kl, agreement=agreement)

    contexts = tuple(frontier.contexts[place] for place in order)
    return replace(frontier, points=tuple(map(turned, frontier.points)), contexts=contexts)


def _kl(point: Point, contexts: Sequence[int]) -> float:
    """Return the divergence summed over some contexts."""
    return sum(point.kl[context] for context in contexts)
