"""Ridge regression from sums over rows that are seen once: the normal equations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_ROWS = 1024  # whose products are summed before float64 takes over


@dataclass(frozen=True, eq=False)
class Regression:
    """``y = x Wᵀ + b``, float64: `weight` ``[Q, P]`` and `bias` ``[Q]``."""

    weight: torch.Tensor
    bias: torch.Tensor


class NormalEquations:
    """Sums over rows of inputs x ``[P]`` and outputs y ``[Q]``, from which every ridge regression of y on x follows.

    Sums are kept in float64, so the order of the rows does not matter up to its rounding. The bias is not penalised.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self._gram = torch.zeros((inputs + 1, inputs + 1), dtype=torch.float64, device=device)
        self._cross = torch.zeros((inputs + 1, outputs), dtype=torch.float64, device=device)
        self._squares = torch.zeros((outputs,), dtype=torch.float64, device=device)

    @classmethod
    def total(cls, several: Sequence[NormalEquations]) -> NormalEquations:
        """The equations of all rows of several."""
        inputs, outputs = several[0]._cross.shape
        total = cls(inputs - 1, outputs, several[0]._cross.device)
        for each in several:
            total._gram += each._gram
            total._cross += each._cross
            total._squares += each._squares
        return total

    def add(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add rows `x` ``[N, P]`` and `y` ``[N, Q]``, each counted as often as its weight ``[N]`` says.

        Products of a thousand rows are summed in their own dtype, float32 at least, which on a CPU is twice as fast.
        """
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        wide, y = F.pad(x.to(dtype), (0, 1), value=1.0), y.to(dtype)
        weighted = wide if weights is None else wide * weights.to(dtype)[:, None]
        for some, counted, outputs in zip(wide.split(_ROWS), weighted.split(_ROWS), y.split(_ROWS), strict=True):
            self._gram += counted.T @ some
            self._cross += counted.T @ outputs
            self._squares += counted[:, -1] @ outputs.square()

    def solve(self, strength: torch.Tensor | float) -> Regression:
        """The minimum of ``sum (y - x Wᵀ - b)² + strength * m * sum W²``.

        m is the mean variance of an input times the rows, so that a strength means the same whatever the scale of the inputs.

        Args:
            strength: positive; of all outputs, or one for each, ``[Q]``.
        """
        rows = self._gram[-1, -1].clamp(min=1.0)
        mean_x, mean_y = self._gram[-1, :-1] / rows, self._cross[-1] / rows
        gram = self._gram[:-1, :-1] - rows * torch.outer(mean_x, mean_x)
        cross = self._cross[:-1] - rows * torch.outer(mean_x, mean_y)
        scale = gram.diagonal().mean()
        strengths = torch.as_tensor(strength, dtype=torch.float64, device=gram.device).expand(len(mean_y))
        weight = cross.new_zeros((len(mean_y), len(mean_x)))
        if scale > 0:
            for value in strengths.unique():
                which = strengths == value
                damped = gram.clone()
                damped.diagonal().add_(value * scale)
                weight[which] = torch.cholesky_solve(cross[:, which], torch.linalg.cholesky(damped)).T
        return Regression(weight, mean_y - weight @ mean_x)

    def whitening(self, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean input ``[P]``, and the matrix ``[P, P]`` that gives what is left of an input about unit variance in every
        direction; `damping` times the mean variance of an input is added to that of each, float64."""
        rows = self._gram[-1, -1].clamp(min=1.0)
        mean = self._gram[-1, :-1] / rows
        covariance = self._gram[:-1, :-1] / rows - torch.outer(mean, mean)
        scale = covariance.diagonal().mean()
        covariance.diagonal().add_(damping * scale if scale > 0 else 1.0)
        identity = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        return mean, torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), identity, upper=False)

    def losses(self, regression: Regression) -> torch.Tensor:
        """The mean squared error over rows, of each output ``[Q]``."""
        wide = torch.cat([regression.weight, regression.bias[:, None]], dim=1).T
        error = self._squares - 2 * (wide * self._cross).sum(0) + (wide * (self._gram @ wide)).sum(0)
        return error / self._gram[-1, -1].clamp(min=1.0)
