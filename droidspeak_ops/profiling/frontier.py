"""Quality and cost of many plans for one pair of models, and the choice of a plan."""

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
"""Source of the layers outside a plan's bands; ``"fitted"`` is as the maps choose."""

_NEGLIGIBLE = 1e-4  # nats; logarithms are of (kl + this), so that divergences that are mere rounding are alike


@dataclass(frozen=True)
class Point:
    """A plan and its measured quality, context by context.

    Args:
        plan: for :func:`droidspeak_ops.partial_prefill`, together with the maps of the profile if it had any.
        rest: how the layers outside the bands were filled.
        corrected: whether maps corrected the hidden states that the bands start from.
        work: the work of the plan.
        kl: mean KL divergence of the receiver's next-token distributions from those after its own full prefill, in nats; None
            for contexts on which the plan was not measured.
        agreement: share of next tokens whose top-1 prediction is that of full prefill.
        scores: scores of the receiver's answers; only Pareto-optimal points have them.
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
    """Divergence from full prefill when a few layers reuse the sender's K/V and all others have the receiver's own (paper,
    section 3.2).

    Args:
        start, end: the layers that are reused, `start` to ``end - 1``.
        kl: as in :class:`Point`, on the contexts where this was measured.
    """

    start: int
    end: int
    kl: tuple[float, ...]


@dataclass(frozen=True)
class Frontier:
    """The result of :func:`droidspeak_ops.profile` for a pair of models.

    Args:
        sender, receiver: fingerprints of the pair, with the digests of their weights.
        maps: digest of the maps that all plans were measured with, or None.
        points: all plans that were measured.
        sensitivity: the sensitivity of each group of `granularity` layers; it determines the sets of scattered layers among the
            points.
        costs: the receiver's cost model.
        contexts: the length of each context in tokens.
        held_out: the number of held-out contexts, the last ones, by which no plan is chosen.
        granularity: bands start and end at multiples of so many layers.
        seed: seed of the order of contexts.
        scores: scores of the answers after full prefill, context by context, if answers were scored.
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
        """Mean KL divergence from full prefill in nats, on the contexts that plans are chosen by or on the held-out ones."""
        return self._estimate(point.kl, held_out)

    def typical_kl(self, point: Point) -> float:
        """Geometric mean of the divergences on the contexts that plans are chosen by. Plans are compared by it.

        Contexts differ in difficulty by factors, and a plan reduces the divergence on each by a factor: an arithmetic mean
        would be dominated by the few hardest. For contexts on which a plan was not measured, the difficulty is estimated from
        the other plans.
        """
        return self._typical_kl[point]

    def quality_loss(self, point: Point, *, held_out: bool = False) -> Estimate:
        """Relative loss of answer score if scored, else top-1 disagreement with full prefill.

        Raises:
            ValueError: answers were scored, but not with this plan.
        """
        if self.scores is None:
            agreement = self._estimate(point.agreement, held_out)
            return Estimate(1 - agreement.value, 1 - agreement.high, 1 - agreement.low)
        if point.scores is None:
            raise ValueError(f"point: expected one of the points with scores, got {point}")
        both = [self._select(scores, held_out) for scores in (point.scores, self.scores)]
        return bootstrap.of_means(
            torch.tensor(both, dtype=torch.float64).T, lambda means: 1 - means[..., 0] / means[..., 1]
        )

    def expected_loss(self, point: Point) -> float:
        """Quality loss predicted from the typical divergence. Plans are chosen by it.

        A few contexts suffice to tell plans apart by their divergence, but not by the number of tokens or answers that happen
        to change. Twice as large a change of the logits changes twice as many top-1 predictions and makes four times the
        divergence, so the loss is modelled as proportional to its square root. The factor is fitted to all plans.
        """
        kl = self._typical_kl[point]
        return self._loss_by_root_kl * math.sqrt(kl) if math.isfinite(kl) else math.inf

    def point(self, plan: Plan) -> Point:
        """Return the point of a plan.

        Raises:
            ValueError: the plan was not measured.
        """
        for point in self.points:
            if point.plan == plan:
                return point
        raise ValueError(f"plan: expected the plan of one of the frontier's points, got {plan}")

    def seconds(self, point: Point, tokens: int | None = None, bandwidth: float | None = None) -> float:
        """Predicted time to first token; for the mean context length if `tokens` is None."""
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
        """Return the Pareto-optimal points by typical divergence and time, the fastest first."""
        kl = self._typical_kl
        found: list[Point] = []
        for point in sorted(self.points, key=lambda each: (self.seconds(each, tokens, bandwidth), kl[each])):
            if kl[point] < (kl[found[-1]] if found else math.inf):
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
        """Choose a plan by quality and time (paper, appendix B).

        Of the plans whose expected loss is at most `max_quality_loss`, it is the best that meets `max_ttft`. Without a time
        limit, or if no plan meets it under the load, it is the fastest one, which keeps the queue short.

        Args:
            max_quality_loss: largest expected loss (:meth:`expected_loss`), from 0 to 1.
            max_ttft: largest time to first token in seconds, waiting in the queue included.
            tokens: context length; the mean of the profile if None.
            bandwidth: bytes per second at which contexts are loaded; None if they are in memory.
            queue: requests ahead of this one, each assumed to take as long.

        Raises:
            ValueError: an argument is out of range.
        """
        for name, value in {"max_ttft": max_ttft, "tokens": tokens, "bandwidth": bandwidth}.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not 0 <= max_quality_loss <= 1:
            raise ValueError(f"max_quality_loss: expected a number from 0 to 1, got {max_quality_loss}")
        if queue < 0:
            raise ValueError(f"queue: expected 0 or more, got {queue}")
        kl = self._typical_kl

        def ttft(point: Point) -> float:
            return (queue + 1) * self.seconds(point, tokens, bandwidth)

        # Never empty: recomputing every layer loses nothing.
        good = [point for point in self.points if self.expected_loss(point) <= max_quality_loss]
        in_time = [] if max_ttft is None else [point for point in good if ttft(point) <= max_ttft]
        if in_time:
            return min(in_time, key=lambda point: (kl[point], ttft(point))).plan
        return min(good, key=lambda point: (ttft(point), kl[point])).plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, atomically."""
        with replacing(path) as scratch:
            scratch.write_text(json.dumps({"droidspeak_frontier": 1, **asdict(self)}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Frontier:
        """Read a file that :meth:`save` wrote.

        Raises:
            ValueError: the file is no frontier.
        """
        loaded = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(loaded, dict) or loaded.pop("droidspeak_frontier", None) != 1:
            raise ValueError(f"{path}: expected a frontier that Frontier.save wrote, got other JSON")
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
        return bootstrap.mean(self._select(values, held_out))

    @property
    def _num_choosing(self) -> int:
        """Number of contexts by which plans are chosen, the first ones."""
        return len(self.contexts) - self.held_out

    def _select(self, values: Sequence[float | None], held_out: bool) -> list[float]:
        """Select the values measured on held-out contexts, or on the others."""
        selected = values[self._num_choosing :] if held_out else values[: self._num_choosing]
        return [value for value in selected if value is not None]

    @cached_property
    def _typical_kl(self) -> dict[Point, float]:
        logarithms = {point: [_logarithm(kl) for kl in self._select(point.kl, False)] for point in self.points}
        everywhere = [
            each
            for each in logarithms.values()
            if len(each) == self._num_choosing and any(each) and all(map(math.isfinite, each))
        ]
        difficulty = [_mean(of_context) for of_context in zip(*everywhere, strict=True)]

        def typical(point: Point) -> float:
            if math.inf in logarithms[point]:
                return math.inf
            measured = [each for each, kl in zip(difficulty, point.kl, strict=False) if kl is not None]
            adjustment = _mean(difficulty) - _mean(measured) if measured != difficulty else 0.0
            return _NEGLIGIBLE * max(0.0, math.expm1(_mean(logarithms[point]) + adjustment))

        return {point: typical(point) for point in self.points}

    @cached_property
    def _loss_by_root_kl(self) -> float:
        """Sum of the losses of all plans over the sum of the square roots of their divergences, at least 0."""
        full = 1.0 if self.scores is None else _mean(self._select(self.scores, False))
        if full <= 0:
            return 0.0
        losses = roots = 0.0
        for point in self.points:
            measured = point.agreement if self.scores is None else point.scores
            if measured is not None and None not in measured and math.isfinite(self._typical_kl[point]):
                losses += 1 - _mean(self._select(measured, False)) / full
                roots += math.sqrt(self._typical_kl[point])
        return max(0.0, losses / roots) if roots else 0.0


def _logarithm(kl: float) -> float:
    """Logarithm of a divergence; infinite if the divergence is NaN, so that such a plan is the worst."""
    return math.log1p(max(0.0, kl) / _NEGLIGIBLE) if math.isfinite(kl) else math.inf


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _tuples(described: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in described.items()}


def _read_point(described: dict[str, Any]) -> Point:
    changed = {"plan": Plan(**described["plan"]), "work": Work(**described["work"])}
    return Point(**_tuples(described) | changed)
