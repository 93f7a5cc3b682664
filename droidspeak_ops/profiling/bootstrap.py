"""Bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

SAMPLES = 10_000

_SUMMED = 2.0**64  # a power of two, so that nothing is rounded: of so many of the largest floats the sum is finite


class Estimate(NamedTuple):
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def error_bars(self) -> tuple[float, float]:
        """Distances from the value to the ends of the interval, as matplotlib takes error bars."""
        return self.value - self.low, self.high - self.value


def mean(values: Sequence[float]) -> Estimate:
    """Bootstrap estimate of the mean of per-context values."""
    data = torch.tensor(values, dtype=torch.float64)[:, None]
    return of_means(data / _SUMMED, lambda means: means[..., 0] * _SUMMED)


def of_means(data: torch.Tensor, statistic: Callable[[torch.Tensor], torch.Tensor], seed: int = 0) -> Estimate:
    """Bootstrap estimate of a function of column means.

    Args:
        data: ``[N, K]``, one row per context.
        statistic: maps column means ``[..., K]`` to values ``[...]``.
        seed: seed of the resampling.
    """
    data = data.double()
    drawn = torch.randint(len(data), (SAMPLES, len(data)), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = statistic(data[drawn].mean(1)).quantile(ends).tolist()
    return Estimate(statistic(data.mean(0)).item(), low, high)
