"""What it costs to choose a plan by a few contexts: the loss beyond that of the best plan for others, found by trying all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from quality import mean_and_interval
from reporting import Row

from droidspeak_ops.frontier import Frontier, Point


def measure_choice(frontier: Frontier, speeds: Sequence[float], tokens: int) -> list[Row]:
    """For each speed the plan that is chosen by two thirds of the contexts, beside the one of least divergence on the third.

    Each third is held out in turn, so that no context judges twice. The sets of scattered layers are left out, because they
    are not tried on the contexts that say which layers they are of.

    Args:
        speeds: times faster than full prefill, that a plan has to be; those that none is are left out.
        tokens: of the context, for its time.
    """
    rows: list[Row] = []
    for speed in speeds:
        beyond: list[float] = []
        kl_of_chosen, kl_of_best = 0.0, 0.0
        for fold in _folds(frontier):
            limit = fold.full_prefill_seconds(tokens) / speed
            chosen = best_within(fold, limit, tokens)
            in_time = [each for each in fold.points if each.choosable and fold.seconds(each, tokens) <= limit]
            if not in_time:
                break
            best = min(in_time, key=lambda each, fold=fold: sum(_held_out(fold, each.kl)))
            pairs = zip(_held_out(fold, best.agreement), _held_out(fold, chosen.agreement), strict=True)
            beyond += [100 * (of_best - of_chosen) for of_best, of_chosen in pairs]
            kl_of_chosen += sum(_held_out(fold, chosen.kl))
            kl_of_best += sum(_held_out(fold, best.kl))
        else:
            of_best = kl_of_chosen / kl_of_best
            points = mean_and_interval("points", beyond)
            rows.append({"faster": f"{speed:g}", **points, "of_best_kl": f"{of_best:.3f}", "contexts": len(beyond)})
    return rows


def best_within(frontier: Frontier, seconds: float, tokens: int) -> Point:
    """The plan of least divergence that is as fast as that, whatever it loses."""
    return frontier.point(frontier.choose(max_quality_loss=1.0, max_ttft=seconds, tokens=tokens))


def _folds(frontier: Frontier) -> Iterator[Frontier]:
    """With each third of the contexts last, where it is held out."""
    points = [point for point in frontier.points if None not in point.kl]
    for start in range(0, 3 * frontier.held_out, frontier.held_out):

        def turned(point: Point, start: int = start) -> Point:
            kl, agreement = (values[start:] + values[:start] for values in (point.kl, point.agreement))
            return replace(point, kl=kl, agreement=agreement)

        contexts = frontier.contexts[start:] + frontier.contexts[:start]
        yield replace(frontier, points=tuple(map(turned, points)), contexts=contexts)


def _held_out(frontier: Frontier, values: Sequence[float | None]) -> list[float]:
    return [value for value in values[-frontier.held_out :] if value is not None]
