"""The cost of a plan: seconds to the first token, from times measured on the machine and from bytes to be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..prefill.schedule import Work

Polynomial = tuple[float, float, float]
"""Seconds for T tokens: ``a + b T + c T²``."""


@dataclass(frozen=True)
class CostModel:
    """Times of one receiver on one machine, and bytes of one sender's context.

    Args:
        run, project: seconds of a layer that runs, and of one that is projected.
        rest: seconds of all else: what is done for every layer, and the suffix's pass to its first token.
        hidden_bytes, kv_bytes: of one token at one layer.
        machine: what was measured on.
        tokens: between which contexts were measured; beyond them the polynomials go on.
    """

    run: Polynomial
    project: Polynomial
    rest: Polynomial
    hidden_bytes: int
    kv_bytes: int
    machine: str
    tokens: tuple[int, int]

    def __post_init__(self) -> None:
        for name in ("run", "project", "rest", "tokens"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def seconds(self, work: Work, tokens: int, bandwidth: float | None = None) -> float:
        """From the context's arrival to the first token's logits, or with a bandwidth from the first byte that is loaded.

        Loading comes before compute: nothing overlaps.

        Args:
            tokens: of the context.
            bandwidth: bytes a second that contexts are loaded with; None where they are in memory.
        """
        computed = work.run * at(self.run, tokens) + work.projected * at(self.project, tokens) + at(self.rest, tokens)
        return computed if bandwidth is None else computed + self.nbytes(work, tokens) / bandwidth

    def nbytes(self, work: Work, tokens: int) -> int:
        """To be loaded of a context."""
        return tokens * (work.hidden * self.hidden_bytes + work.kv * self.kv_bytes)


def at(polynomial: Polynomial, tokens: int) -> float:
    """Its value; no less than 0."""
    a, b, c = polynomial
    return max(0.0, a + b * tokens + c * tokens * tokens)


def through(tokens: Sequence[int], seconds: Sequence[float]) -> Polynomial:
    """The polynomial through three measured times."""
    (x, y, z), (f, g, h) = tokens, seconds
    slope, next_slope = (g - f) / (y - x), (h - g) / (z - y)
    c = (next_slope - slope) / (z - x)
    b = slope - c * (x + y)
    return f - b * x - c * x * x, b, c
