"""Quality against cost of many plans for one pair of models, and the plan that fits a need."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from ..context.fingerprint import Fingerprint
from ..files import replacing
from ..prefill.plan import Plan
from ..prefill.schedule import Work
from . import bootstrap
from .bootstrap import Estimate
from .cost import CostModel

Rest = Literal["reuse", "project", "fitted"]
"""The role of the layers outside a plan's bands; the last is what the maps say."""

_NEGLIGIBLE = 1e-4  # nats: what is less is as good as none, so that no mean of logarithms is of rounding


@dataclass(frozen=True)
class Point:
    """A plan, and how far the receiver is from its own full prefill with it, context by context.

    Args:
        plan: for :func:`droidspeak_ops.partial_prefill`, together with the maps of the profile if it had any.
        rest: what filled the layers outside its bands.
        corrected: whether maps corrected the states that its bands start from.
        work: what it asks of a model.
        kl: mean divergence of the receiver's next-token distributions from those after its own prefill, in nats; None for a
            context on which it was not tried.
        agreement: how often its likeliest token is the same.
        scores: of its answers, where they were scored: of the points that are worth it.
    """

    plan: Plan
    rest: Rest
    corrected: bool
    work: Work
    kl: tuple[float | None, ...]
    agreement: tuple[float | None, ...]
    scores: tuple[float, ...] | None = None

    def __str__(self) -> str:
        if self.rest == "fitted":
            return str(self.plan).replace("projected", "fitted")
        return f"{self.plan} from corrected states" if self.corrected else str(self.plan)


@dataclass(frozen=True)
class Sensitivity:
    """Divergence of the receiver from its own full prefill when only some layers' K and V are the sender's, and those of all
    others its own (paper, section 3.2).

    Args:
        start, end: layers `start` to ``end - 1``.
        kl: as of a :class:`Point`, of the contexts on which this was tried.
    """

    start: int
    end: int
    kl: tuple[float, ...]


@dataclass(frozen=True)
class Frontier:
    """The result of :func:`droidspeak_ops.profile` for a pair of models.

    Args:
        sender, receiver: the pair, with the digests of their weights.
        maps: the digest of the maps that all plans were tried with, or None.
        points: all plans that were tried.
        sensitivity: what reusing each layer alone does, or as many as the granularity says; by it the sets of scattered layers
            among the points were made.
        costs: of the receiver on the machine of the profile.
        contexts: how many tokens each had.
        held_out: how many contexts, the last ones, no plan is chosen by.
        granularity: layers between the starts, and the ends, of the bands that were tried.
        seed: of the order of contexts.
        scores: of the answers after full prefill, context by context, if answers were scored.
    """

    sender: Fingerprint
    receiver: Fingerprint
    maps: str | None
    points: tuple[Point, ...]
    sensitivity: tuple[Sensitivity, ...]
    costs: CostModel
    contexts: tuple[int, ...]
    held_out: int
    granularity: int
    seed: int
    scores: tuple[float, ...] | None = None

    def kl(self, point: Point, *, held_out: bool = False) -> Estimate:
        """Mean divergence from full prefill, in nats, on the contexts that plans are chosen by or on the held-out ones."""
        return self._estimate(point.kl, held_out)

    def typical_kl(self, point: Point) -> float:
        """The divergence on a typical one of the contexts that plans are chosen by, their geometric mean: what plans are
        compared by.

        Contexts are not equally hard, and a plan gains on each a share of what there is to lose: most of an arithmetic mean is
        of the few hardest, and of chance. Contexts on which a plan was not tried are taken to be as much harder or easier for
        it as they are for the others.
        """
        return self._kl[point]

    def quality_loss(self, point: Point, *, held_out: bool = False) -> Estimate:
        """Relative loss of the score of answers where they were scored, against full prefill; elsewhere the share of
        next tokens that are not those of full prefill.

        Raises:
            ValueError: answers were scored, but not with this plan.
        """
        if self.scores is None:
            agreement = self._estimate(point.agreement, held_out)
            return Estimate(1 - agreement.value, 1 - agreement.high, 1 - agreement.low)
        if point.scores is None:
            raise ValueError(f"point: got {point}, whose answers were not scored")
        both = [self._known(scores, held_out) for scores in (point.scores, self.scores)]
        return bootstrap.of_means(
            torch.tensor(both, dtype=torch.float64).T, lambda means: 1 - means[..., 0] / means[..., 1]
        )

    def expected_loss(self, point: Point) -> float:
        """The loss expected of a plan by its divergence, by which plans are chosen.

        Few contexts tell plans apart by their divergence, but not by how many tokens or answers happen to change. A change of
        the logits that is twice as large changes twice as many of the likeliest tokens and makes four times the divergence,
        so losses are taken to be in proportion to its root; the factor is of all plans that were tried, or scored.
        """
        kl = self._kl[point]
        return self._loss_by_root_kl * math.sqrt(kl) if math.isfinite(kl) else math.inf

    def point(self, plan: Plan) -> Point:
        """Return the measurements of a plan.

        Raises:
            ValueError: it was not tried.
        """
        for point in self.points:
            if point.plan == plan:
                return point
        raise ValueError(f"plan: got {plan}, which was not tried; one of the frontier's points is needed")

    def seconds(self, point: Point, tokens: int | None = None, bandwidth: float | None = None) -> float:
        """Predicted time to first token; of contexts of the mean length where `tokens` is None."""
        return self.costs.seconds(point.work, self.mean_tokens if tokens is None else tokens, bandwidth)

    def full_prefill_seconds(self, tokens: int | None = None) -> float:
        """Predicted time to first token of the receiver's own full prefill."""
        full = Work(run=self.num_layers, projected=0, hidden=0, kv=0)
        return self.costs.seconds(full, self.mean_tokens if tokens is None else tokens)

    def speedup(self, point: Point, tokens: int | None = None, bandwidth: float | None = None) -> float:
        """Predicted speed-up over the receiver's own full prefill."""
        return self.full_prefill_seconds(tokens) / self.seconds(point, tokens, bandwidth)

    @property
    def num_layers(self) -> int:
        return int(self.receiver.architecture["num_hidden_layers"])

    @property
    def mean_tokens(self) -> int:
        return round(sum(self.contexts) / len(self.contexts))

    def pareto(self, tokens: int | None = None, bandwidth: float | None = None) -> list[Point]:
        """The points that no other is both better and faster than, the fastest first; better is of less divergence."""
        found: list[Point] = []
        for point in sorted(self.points, key=lambda each: (self.seconds(each, tokens, bandwidth), self._kl[each])):
            if self._kl[point] < (self._kl[found[-1]] if found else math.inf):
                found.append(point)
        return found

    def choose(
        self,
        *,
        max_quality_loss: float,
        max_ttft: float | None = None,
        tokens: int | None = None,
        bandwidth: float | None = None,
        queue: int = 0,
    ) -> Plan:
        """The plan for a need (paper, appendix B).

        Of the plans that are expected to lose no more than `max_quality_loss`, the best that meets `max_ttft`. Where there is
        no such limit, and under a load at which none meets it, the cheapest: it keeps the queue short.

        Args:
            max_quality_loss: what may be lost, as :meth:`expected_loss` foresees it.
            max_ttft: seconds to the first token that are promised.
            tokens: of the context; the mean of the profile's where None.
            bandwidth: bytes a second that contexts are loaded with; None where they are in memory.
            queue: requests that wait before this one, each taken to need the same time.

        Raises:
            ValueError: a limit makes no sense.
        """
        for name, value in {"max_ttft": max_ttft, "tokens": tokens, "bandwidth": bandwidth}.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value}; a positive number is needed")
        if not 0 <= max_quality_loss <= 1 or queue < 0:
            raise ValueError(
                f"max_quality_loss, queue: got {max_quality_loss}, {queue}; a share from 0 to 1 and a count are needed"
            )

        def waited(point: Point) -> float:
            return (queue + 1) * self.seconds(point, tokens, bandwidth)

        # Recomputing every layer loses nothing, so that there always is one.
        good = [each for each in self.points if self.expected_loss(each) <= max_quality_loss]
        in_time = [] if max_ttft is None else [point for point in good if waited(point) <= max_ttft]
        if in_time:
            return min(in_time, key=lambda each: (self._kl[each], waited(each))).plan
        return min(good, key=lambda each: (waited(each), self._kl[each])).plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; nothing half-written is left in its place."""
        with replacing(path) as scratch:
            scratch.write_text(json.dumps({"droidspeak_frontier": 1, **asdict(self)}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Frontier:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        loaded = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(loaded, dict) or loaded.pop("droidspeak_frontier", None) != 1:
            raise ValueError(f"{path}: got JSON of something else; what Frontier.save wrote is needed")
        return cls(
            **loaded
            | {
                "sender": Fingerprint(**loaded["sender"]),
                "receiver": Fingerprint(**loaded["receiver"]),
                "points": tuple(_read_point(point) for point in loaded["points"]),
                "sensitivity": tuple(Sensitivity(**_tuples(each)) for each in loaded["sensitivity"]),
                "costs": CostModel(**loaded["costs"]),
                "contexts": tuple(loaded["contexts"]),
                "scores": None if loaded["scores"] is None else tuple(loaded["scores"]),
            }
        )

    def _estimate(self, values: Sequence[float | None], held_out: bool) -> Estimate:
        return bootstrap.mean(self._known(values, held_out))

    @property
    def _count(self) -> int:
        """Number of contexts, the first ones, by which plans are chosen."""
        return len(self.contexts) - self.held_out

    def _known(self, values: Sequence[float | None], held_out: bool) -> list[float]:
        some = values[self._count :] if held_out else values[: self._count]
        return [value for value in some if value is not None]

    @cached_property
    def _kl(self) -> dict[Point, float]:
        logarithms = {point: [_logarithm(kl) for kl in self._known(point.kl, False)] for point in self.points}
        everywhere = [
            each
            for each in logarithms.values()
            if len(each) == self._count and any(each) and all(map(math.isfinite, each))
        ]
        hardness = [_mean(of_all) for of_all in zip(*everywhere, strict=True)]

        def typical(point: Point) -> float:
            if math.inf in logarithms[point]:
                return math.inf
            there = [hard for hard, kl in zip(hardness, point.kl, strict=False) if kl is not None]
            harder = _mean(hardness) - _mean(there) if there != hardness else 0.0
            return _NEGLIGIBLE * max(0.0, math.expm1(_mean(logarithms[point]) + harder))

        return {point: typical(point) for point in self.points}

    @cached_property
    def _loss_by_root_kl(self) -> float:
        """The losses of all plans that have one over the roots of their divergences, and not below 0."""
        full = 1.0 if self.scores is None else _mean(self._known(self.scores, False))
        if full <= 0:
            return 0.0
        losses = roots = 0.0
        for point in self.points:
            measured = point.agreement if self.scores is None else point.scores
            if measured is not None and None not in measured and math.isfinite(self._kl[point]):
                losses += 1 - _mean(self._known(measured, False)) / full
                roots += math.sqrt(self._kl[point])
        return max(0.0, losses / roots) if roots else 0.0


def _logarithm(kl: float) -> float:
    """Logarithm of a divergence; infinite if that is no number, so that a plan whose answers are NaN is not the best."""
    return math.log1p(max(0.0, kl) / _NEGLIGIBLE) if math.isfinite(kl) else math.inf


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _tuples(described: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in described.items()}


def _read_point(described: dict[str, Any]) -> Point:
    changed = {"plan": Plan(**described["plan"]), "work": Work(**described["work"])}
    return Point(**_tuples(described) | changed)
