"""The typical divergence of plans, and the quality loss that it leads to expect."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_NEGLIGIBLE = 1e-4  # nats; logarithms are of (kl + this), so that divergences that are mere rounding are alike
_LARGEST_EXPONENT = math.log(np.finfo(np.float64).max)


def typical_kl(plans: Sequence[Sequence[float | None]]) -> list[float]:
    """Return the geometric mean over contexts of each plan's divergences, in nats; infinite where one is the largest float.

    For contexts on which a plan was not measured, the difficulty is estimated from the plans that were measured on all.

    Args:
        plans: for each plan its divergence on each context, None where it was not measured.
    """
    logarithms = [[math.log1p(each / _NEGLIGIBLE) for each in kl if each is not None] for kl in plans]
    everywhere = [
        each
        for each, kl in zip(logarithms, plans, strict=True)
        if len(each) == len(kl) and any(each) and all(map(math.isfinite, each))
    ]
    difficulty = [mean(of_context) for of_context in zip(*everywhere, strict=True)]

    def typical(of_plan: list[float], kl: Sequence[float | None]) -> float:
        if math.inf in of_plan:
            return math.inf
        measured = [each for each, value in zip(difficulty, kl, strict=False) if value is not None]
        adjustment = mean(difficulty) - mean(measured) if measured != difficulty else 0.0
        exponent = mean(of_plan) + adjustment
        return _NEGLIGIBLE * max(0.0, math.expm1(exponent)) if exponent < _LARGEST_EXPONENT else math.inf

    return [typical(each, kl) for each, kl in zip(logarithms, plans, strict=True)]


class _Pool(NamedTuple):
    """Plans that are one to the curve: how many, and the sums of their roots and losses."""

    plans: int
    roots: float
    losses: float

    @property
    def mean_loss(self) -> float:
        return self.losses / self.plans


@dataclass(frozen=True)
class LossCurve:
    """Quality loss as a function of the typical divergence: from 0 at 0 it rises in straight lines over the root.

    Args:
        roots: square roots of typical divergences, increasing; none if nothing is known.
        losses: the loss at each, 0 or more and not decreasing.
    """

    roots: tuple[float, ...]
    losses: tuple[float, ...]

    @classmethod
    def fit(cls, kl: Sequence[float], losses: Sequence[float]) -> LossCurve:
        """Fit a curve to plans by centered isotonic regression (Oron and Flournoy, 2017).

        Neighbours are pooled until a larger divergence means a larger loss; the curve joins the means of the pools. Plans of
        the least divergence that lost nothing are pooled with the next ones: a few contexts do not show that nothing is lost.

        Args:
            kl: typical divergence of each plan; plans without any, or an infinite one, say nothing of the curve.
            losses: mean loss of each plan.
        """
        plans = [
            (math.sqrt(each), loss)
            for each, loss in zip(kl, losses, strict=True)
            if 0 < each < math.inf and math.isfinite(loss)
        ]
        pools: list[_Pool] = []
        for root, loss in sorted(plans, key=lambda plan: (plan[0], -plan[1])):
            pool = _Pool(1, root, loss)
            while pools and not 0 < pools[-1].mean_loss < pool.mean_loss:
                pool = _Pool(*map(operator.add, pools.pop(), pool))
            pools.append(pool)
        return cls(tuple(each.roots / each.plans for each in pools), tuple(max(0.0, each.mean_loss) for each in pools))

    def evaluate(self, kl: float) -> float:
        """Return the loss at a typical divergence: infinite where that is, and 1, all, where nothing is known."""
        if kl in (0, math.inf):
            return kl
        if not self.roots:
            return 1.0
        root = math.sqrt(kl)
        if root > self.roots[-1]:
            return self.losses[-1] * (root / self.roots[-1])
        return float(np.interp(root, (0.0, *self.roots), (0.0, *self.losses)))


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)
