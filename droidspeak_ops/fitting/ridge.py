"""Ridge regression by normal equations, accumulated in one pass over the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..prefill.maps import Affine

_CHUNK_ROWS = 1024  # whose products are summed in their own dtype, before they are added in float64


class NormalEquations:
    """Sums over rows of inputs x ``[P]`` and outputs y ``[Q]`` that suffice for any ridge regression of y on x.

    The sums are float64, so the order of the rows matters only to its rounding. The bias is not penalised.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self._gram = torch.zeros((inputs + 1, inputs + 1), dtype=torch.float64, device=device)
        self._cross = torch.zeros((inputs + 1, outputs), dtype=torch.float64, device=device)
        self._squares = torch.zeros((outputs,), dtype=torch.float64, device=device)

    @classmethod
    def total(cls, several: Sequence[NormalEquations]) -> NormalEquations:
        """Return the equations of the rows of several."""
        inputs, outputs = several[0]._cross.shape
        total = cls(inputs - 1, outputs, several[0]._cross.device)
        for each in several:
            total._gram += each._gram
            total._cross += each._cross
            total._squares += each._squares
        return total

    def add(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add rows `x` ``[N, P]`` and `y` ``[N, Q]`` with `weights` ``[N]``.

        Products of a thousand rows are summed in their own dtype, float32 or wider, which on a CPU is twice as fast as float64.
        """
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        wide, y = F.pad(x.to(dtype), (0, 1), value=1.0), y.to(dtype)
        weighted = wide if weights is None else wide * weights.to(dtype)[:, None]
        chunks = (each.split(_CHUNK_ROWS) for each in (wide, weighted, y))
        for inputs, weighted_inputs, outputs in zip(*chunks, strict=True):
            self._gram += weighted_inputs.T @ inputs
            self._cross += weighted_inputs.T @ outputs
            self._squares += weighted_inputs[:, -1] @ outputs.square()

    def solve(self, strength: torch.Tensor | float) -> Affine:
        """Minimise ``sum (y - x Wᵀ - b)² + strength * m * sum W²``; return W and b in float64.

        m is the number of rows times the mean variance of an input, which makes the strength independent of the inputs' scale.

        Args:
            strength: positive; one for all outputs, or one for each, ``[Q]``.
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
        return Affine(weight, mean_y - weight @ mean_x)

    def whitening(self, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean input ``[P]`` and a matrix ``[P, P]`` that whitens inputs less their mean, in float64.

        `damping` times the mean variance of an input is added to the variance of each.
        """
        rows = self._gram[-1, -1].clamp(min=1.0)
        mean = self._gram[-1, :-1] / rows
        covariance = self._gram[:-1, :-1] / rows - torch.outer(mean, mean)
        scale = covariance.diagonal().mean()
        covariance.diagonal().add_(damping * scale if scale > 0 else 1.0)
        identity = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        return mean, torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), identity, upper=False)

    def losses(self, fit: Affine) -> torch.Tensor:
        """Return the mean squared error over rows of each output, ``[Q]``."""
        wide = torch.cat([fit.weight, fit.bias[:, None]], dim=1).T
        error = self._squares - 2 * (wide * self._cross).sum(0) + (wide * (self._gram @ wide)).sum(0)
        return error / self._gram[-1, -1].clamp(min=1.0)
