"""Quality and cost of many plans for one pair of models, and the choice of a plan."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from .. import schema
from ..context.fingerprint import Fingerprint
from ..files import replacing
from ..prefill.plan import ChosenFor, Plan
from ..prefill.schedule import Work, resolve
from . import bootstrap
from .bootstrap import Estimate
from .cost import CostModel
from .loss import LossCurve, mean, typical_kl

Rest = Literal["reuse", "project", "fitted"]
"""Source of the layers outside a plan's bands; ``"fitted"`` is as the maps choose."""

WORST_KL = sys.float_info.max
"""The divergence of a plan whose logits are no numbers, or diverge infinitely: the largest that JSON can hold."""


@dataclass(frozen=True)
class Point:
    """A plan and its measured quality, context by context.

    Args:
        plan: for :func:`droidspeak_ops.partial_prefill`, together with the maps of the profile if it had any.
        rest: how the layers outside the bands were filled.
        corrected: whether maps corrected the hidden states that the bands start from.
        work: the work of the plan.
        kl: mean KL divergence of the receiver's next-token distributions from those after its own full prefill, in nats; None
            for contexts on which the plan was not measured, :data:`WORST_KL` where it is no finite number.
        agreement: share of next tokens whose top-1 prediction is that of full prefill; None as in `kl`.
        scores: scores of the receiver's answers; only Pareto-optimal points have them.

    Raises:
        ValueError: a measurement is not finite or out of its range, or `kl` and `agreement` are of different contexts.
    """

    plan: Plan
    rest: Rest
    corrected: bool
    work: Work
    kl: tuple[float | None, ...]
    agreement: tuple[float | None, ...]
    scores: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_kl(self.kl)
        check_agreement(self.agreement)
        if [each is None for each in self.kl] != [each is None for each in self.agreement]:
            raise ValueError("agreement: expected the contexts that kl has, got others")
        _check_scores(self.scores)
        rest = () if self.rest == "reuse" else "rest"
        if self.plan.project != rest:
            raise ValueError(
                f"plan: expected a plan with project={rest!r} where rest is {self.rest!r}, got {self.plan}"
            )

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

    Raises:
        ValueError: there are no such layers, or a divergence is none.
    """

    start: int
    end: int
    kl: tuple[float, ...]

    def __post_init__(self) -> None:
        check_kl(self.kl)
        if not (0 <= self.start < self.end and self.kl):
            raise ValueError(f"sensitivity: expected 0 <= start < end and divergences, got {self}")


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

    Raises:
        ValueError: what the parts say of layers, contexts, maps or work does not fit together, a plan is there twice, or that
            which recomputes all layers is missing.
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

    def __post_init__(self) -> None:
        for model in (self.sender, self.receiver):
            model.sizes("num_hidden_layers")
            _ = model.torch_dtype
        self.sender.check_reuse_by(self.receiver)
        if not (1 <= self.held_out < len(self.contexts) and min(self.contexts) > 0):
            raise ValueError(
                f"contexts: expected lengths of 1 or more, of which {self.held_out} are held out and at least one is not, "
                f"got {self.contexts}"
            )
        if not 1 <= self.granularity <= self.num_layers:
            raise ValueError(f"granularity: expected 1 to {self.num_layers}, got {self.granularity}")
        _check_scores(self.scores)
        if self.scores is not None and len(self.scores) != len(self.contexts):
            raise ValueError(f"scores: expected one for each of {len(self.contexts)} contexts, got {len(self.scores)}")
        for number, each in enumerate(self.sensitivity):
            if each.end > self.num_layers or len(each.kl) != len(self.sensitivity[0].kl):
                raise ValueError(
                    f"sensitivity[{number}]: expected layers up to {self.num_layers} on one number of contexts, got {each}"
                )
        plans = {point.plan for point in self.points}
        if len(plans) != len(self.points) or self._full_prefill not in plans:
            raise ValueError("points: expected every plan once, and that which recomputes all layers among them")
        for number, point in enumerate(self.points):
            try:
                self._check_point(point)
            except ValueError as error:
                raise ValueError(f"points[{number}]: {error}") from None

    def _check_point(self, point: Point) -> None:
        """Raise unless a point is one of this frontier."""
        if (point.rest == "project" and self.maps) or ((point.rest == "fitted" or point.corrected) and not self.maps):
            raise ValueError(
                f"rest: expected what profiles {'with' if self.maps else 'without'} maps have, got {point}"
            )
        for name in ("kl", "scores"):
            found = getattr(point, name)
            if found is not None and len(found) != len(self.contexts):
                raise ValueError(f"{name}: expected one for each of {len(self.contexts)} contexts, got {len(found)}")
        if point.scores is not None and self.scores is None:
            raise ValueError("scores: expected none where full prefill has none, got some")
        if not all(self._select(point.kl, held_out) for held_out in (False, True)):
            raise ValueError("kl: expected contexts among those that are held out and among the others, got none")
        work = resolve(point.plan, self.num_layers).work
        if point.rest == "fitted":  # as the maps choose
            chosen = {name: getattr(point.work, name) for name in ("projected", "hidden", "kv")}
            compared = point.plan.select and point.plan.selector == "deviation"  # for which one layer more is projected
            if all(0 <= layers <= self.num_layers + bool(compared) for layers in chosen.values()):
                work = replace(work, **chosen)
        if point.work != work:
            raise ValueError(f"work: expected that of the plan, {work}, got {point.work}")

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
        to change. So what is expected of a plan is the loss of all plans of about its divergence, pooled until it rises with
        the divergence. It is 0 where nothing diverges, infinite where the divergence is, and 1 if no plan's loss is known, as
        where the receiver's own answers score nothing.
        """
        return self._loss_curve.evaluate(self._typical_kl[point])

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
        seconds = self.seconds(point, tokens, bandwidth)
        return self.full_prefill_seconds(tokens) / seconds if seconds else math.inf

    @property
    def num_layers(self) -> int:
        layers = self.receiver.size("num_hidden_layers")
        assert layers is not None
        return layers

    @property
    def _full_prefill(self) -> Plan:
        return Plan([(0, self.num_layers)])

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
            bandwidth: bytes per second at which contexts are loaded while their layers are filled; None if they are in memory.
            queue: requests ahead of this one, each assumed to take as long.

        Returns:
            A plan for this pair, and for the maps of the profile: its use with others is refused.

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

        # Recomputing every layer loses nothing, whatever was measured.
        full = self._full_prefill
        good = [point for point in self.points if point.plan == full or self.expected_loss(point) <= max_quality_loss]
        in_time = [] if max_ttft is None else [point for point in good if ttft(point) <= max_ttft]
        if in_time:
            chosen = min(in_time, key=lambda point: (kl[point], ttft(point)))
        else:
            chosen = min(good, key=lambda point: (ttft(point), kl[point]))
        return replace(chosen.plan, chosen_for=self._chosen_for)

    @property
    def _chosen_for(self) -> ChosenFor | None:
        sender, receiver = self.sender.weights, self.receiver.weights
        return None if sender is None or receiver is None else ChosenFor(sender, receiver, self.maps)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, atomically."""
        described = {"droidspeak_frontier": 1, **asdict(self)}
        for point, of_point in zip(self.points, described["points"], strict=True):
            of_point["plan"] = point.plan.described()
        text = json.dumps(described, allow_nan=False)
        with replacing(path) as scratch:
            scratch.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Frontier:
        """Read a file that :meth:`save` wrote.

        Raises:
            ValueError: the file is no frontier.
        """
        described = schema.decode(Path(path).read_bytes(), dict[str, Any], str(path))
        if described.pop("droidspeak_frontier", None) != 1:
            raise ValueError(f"{path}: expected a frontier that Frontier.save wrote, got other JSON")
        return schema.convert(described, cls, str(path))

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
        kl = typical_kl([point.kl[: self._num_choosing] for point in self.points])
        return dict(zip(self.points, kl, strict=True))

    @cached_property
    def _loss_curve(self) -> LossCurve:
        full = 1.0 if self.scores is None else mean(self._select(self.scores, False))
        kl: list[float] = []
        losses: list[float] = []
        for point in self.points if full > 0 else ():  # relative to nothing there is no loss
            measured = point.agreement if self.scores is None else point.scores
            if measured is not None and None not in measured:
                kl.append(self._typical_kl[point])
                losses.append(1 - mean(self._select(measured, False)) / full)
        return LossCurve.fit(kl, losses)


def check_kl(values: Sequence[float | None]) -> None:
    """Raise a ValueError unless these are divergences, or None where none was measured."""
    if not all(each is None or 0 <= each <= WORST_KL for each in values):
        raise ValueError(f"kl: expected finite divergences of 0 or more, got {values}")


def check_agreement(values: Sequence[float | None]) -> None:
    """Raise a ValueError unless these are shares, or None where none was measured."""
    if not all(each is None or 0 <= each <= 1 for each in values):
        raise ValueError(f"agreement: expected shares from 0 to 1, got {values}")


def _check_scores(scores: Sequence[float] | None) -> None:
    if scores is not None and not all(map(math.isfinite, scores)):
        raise ValueError(f"scores: expected finite numbers, got {scores}")
