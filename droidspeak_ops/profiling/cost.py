"""The cost of a plan: seconds to the first token, from times measured on a machine and bytes to load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..prefill.schedule import Work
from ..prefill.select import budget

_MOST_TOKENS = 2**63


class Polynomial(NamedTuple):
    """Seconds for T tokens: ``a + b T + c T²``."""

    a: float
    b: float
    c: float

    @classmethod
    def fit(cls, tokens: Sequence[int], seconds: Sequence[float]) -> Polynomial:
        """Fit the polynomial to measured times: through three of them, by least squares to more."""
        c, b, a = np.polyfit(tokens, seconds, deg=2).tolist()
        return cls(a, b, c)

    def evaluate(self, tokens: int) -> float:
        """Return the seconds for so many tokens, at least 0."""
        return max(0.0, self.a + self.b * tokens + self.c * tokens * tokens)


@dataclass(frozen=True)
class CostModel:
    """Times of one receiver on one machine, and bytes of one sender's context.

    Args:
        run, project: seconds of a layer that runs, and of one that is projected.
        rest: seconds of everything else: the overhead of every layer, and the suffix's pass to its first token.
        hidden_bytes, kv_bytes: bytes of one token at one layer.
        machine: description of the machine.
        tokens: shortest and longest context measured; beyond them the polynomials extrapolate.

    Raises:
        ValueError: a polynomial is not finite at any length, `rest` takes no time at a measured one, or a size is not positive.
    """

    run: Polynomial
    project: Polynomial
    rest: Polynomial
    hidden_bytes: int
    kv_bytes: int
    machine: str
    tokens: tuple[int, int]

    def __post_init__(self) -> None:
        for name in ("run", "project", "rest"):  # JSON has lists
            polynomial = Polynomial(*getattr(self, name))
            if not math.isfinite(sum(abs(each) * _MOST_TOKENS**power for power, each in enumerate(polynomial))):
                raise ValueError(f"{name}: expected finite seconds for any number of tokens, got {polynomial}")
            object.__setattr__(self, name, polynomial)
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if not 0 < self.tokens[0] < self.tokens[1] <= _MOST_TOKENS:
            raise ValueError(f"tokens: expected the shortest and the longest context, got {self.tokens}")
        if not all(self.rest.evaluate(length) for length in self.tokens):
            raise ValueError(f"rest: expected seconds above 0 for {self.tokens} tokens, got {self.rest}")
        for name in ("hidden_bytes", "kv_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")

    def seconds(self, work: Work, tokens: int, bandwidth: float | None = None) -> float:
        """Predict the seconds from the context's arrival, or the start of loading it, to the first token's logits.

        Layers are filled while the context is loaded, from when the hidden states that are read first have arrived. The suffix,
        and what runs with it, comes after both. A selected token costs its share of a pass over all tokens, and the layers that
        the suffix runs through once more theirs of the suffix's pass.

        Args:
            work: the work of a plan.
            tokens: length of the context.
            bandwidth: bytes per second at which the context is loaded; None if it is in memory.
        """
        run, project, rest = (each.evaluate(tokens) for each in (self.run, self.project, self.rest))
        filled = work.run * run + work.projected * project
        if bandwidth is not None:
            first = tokens * self.hidden_bytes if work.hidden else 0
            filled = max(self.nbytes(work, tokens) / bandwidth, first / bandwidth + filled)
        selected = work.layers * budget(work.select, tokens) / tokens
        probed = work.probed / work.layers if work.probed else 0.0
        return filled + selected * run + (1 + probed) * rest

    def nbytes(self, work: Work, tokens: int) -> int:
        """Return the bytes of a context that have to be loaded."""
        return tokens * (work.hidden * self.hidden_bytes + work.kv * self.kv_bytes)
