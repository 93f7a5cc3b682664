"""The plans that a profile measures: every band, sets of the most sensitive layers, and selected tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..prefill.maps import Maps
from ..prefill.plan import Plan
from ..prefill.schedule import resolve
from .frontier import Point, Rest, Sensitivity

SET_SIZES = (2, 3, 4, 6, 8, 12, 16, 24)
"""Sizes of the sets of most sensitive units."""
SELECTED = (0.05, 0.1, 0.2)
"""Shares of the tokens that are selected."""
SELECTORS = ("recent", "attention", "deviation")
"""Ways to select them, the cheapest first."""


class Candidate(NamedTuple):
    """A plan, given by its bands, how the layers outside them are filled, and what is selected over all that."""

    bands: tuple[tuple[int, int], ...]
    rest: Rest
    select: float = 0
    selector: str = "attention"

    @property
    def plan(self) -> Plan:
        return Plan(self.bands, () if self.rest == "reuse" else "rest", self.select, self.selector)

    def sources(self, num_layers: int) -> list[Plan]:
        """Return for each layer a plan with the same K/V there, from as few plans as possible; nothing is selected.

        Outside the bands that is the plan without bands; in a band, the band with the same start that ends at the last layer.
        """
        sources = [self._replace(bands=()).plan] * num_layers
        for start, end in self.bands:
            sources[start:end] = [Plan([(start, num_layers)])] * (end - start)
        return sources


def full_prefill(num_layers: int) -> Candidate:
    """Return the candidate that recomputes all layers."""
    return Candidate(((0, num_layers),), "reuse")


class Unit(NamedTuple):
    """A group of `granularity` consecutive layers.

    Reusing it alone, with all other layers as in full prefill, shows its sensitivity (paper, section 3.2). That is no plan: all
    layers have to run for it.
    """

    start: int
    end: int

    def sources(self, num_layers: int) -> list[Plan]:
        """Return for each layer a plan with the same K/V there."""
        sources = [full_prefill(num_layers).plan] * num_layers
        sources[self.start : self.end] = [Plan()] * (self.end - self.start)
        return sources


class Quality(NamedTuple):
    """KL divergence from full prefill and top-1 agreement with it, on one context."""

    kl: float
    agreement: float


Measured = Mapping[Candidate | Unit, Quality]
"""All that was measured on one context."""


class Candidates:
    """The candidates of a profile: bands on all contexts; units and all selections on the pilot contexts; on the others sets of
    the units that were the most sensitive there, and those selections that were worth their cost.

    Args:
        num_layers: of the receiver.
        maps: of the pair, or None.
        granularity: layers of a unit; bands start and end where units do.
    """

    def __init__(self, num_layers: int, maps: Maps | None, granularity: int) -> None:
        self._num_layers, self._maps = num_layers, maps
        self._units = [Unit(start, min(start + granularity, num_layers)) for start in range(0, num_layers, granularity)]
        self._rests: tuple[Rest, ...] = ("reuse", "project" if maps is None else "fitted")
        starts, ends = zip(*self._units, strict=True)
        bands = [(start, end) for start in starts for end in ends if start < end]
        self.bands = [Candidate((), rest) for rest in self._rests]
        """Every band with every `rest`, and no band."""
        for rest in self._rests:
            # A recomputed band of one layer is a projection, so it is no candidate where the rest is projected or fitted.
            shortest = 1 if rest == "reuse" else 2
            self.bands += [
                Candidate(((start, end),), rest) for start, end in bands if shortest <= end - start < num_layers
            ]
        self.bands.append(full_prefill(num_layers))

    @property
    def on_pilots(self) -> list[Candidate | Unit]:
        """Candidates and units that are measured on the pilot contexts."""
        selections = [
            Candidate((), rest, select, selector)
            for rest in self._rests
            for select in SELECTED
            for selector in SELECTORS
        ]
        return [*self.bands, *self._units, *selections]

    def plans(self, pilot: Sequence[Measured]) -> list[Candidate]:
        """Return the candidates to choose from, which are measured on the other contexts, by what was on the pilot contexts."""
        most_sensitive = sorted(self.sensitivity(pilot), key=lambda unit: -sum(unit.kl))
        units = [(unit.start, unit.end) for unit in most_sensitive]
        sets = dict.fromkeys(_merge(units[:size]) for size in SET_SIZES if size < len(units))
        scattered = [Candidate(bands, rest) for rest in self._rests for bands in sets if len(bands) > 1]
        return [*self.bands, *scattered, *self._worthwhile(pilot)]

    def _worthwhile(self, pilot: Sequence[Measured]) -> Iterator[Candidate]:
        """Yield the selections that diverge less than every cheaper way to select as many tokens over the same."""
        for rest in self._rests:
            for select in SELECTED:
                least = float("inf")
                for selector in SELECTORS:
                    candidate = Candidate((), rest, select, selector)
                    kl = sum(measured[candidate].kl for measured in pilot)
                    if kl < least:
                        yield candidate
                    least = min(least, kl)

    def sensitivity(self, pilot: Sequence[Measured]) -> list[Sensitivity]:
        """Return the sensitivity of each unit, measured on the pilot contexts."""
        return [Sensitivity(*unit, tuple(measured[unit].kl for measured in pilot)) for unit in self._units]

    def points(self, measured: Sequence[Measured], num_pilots: int) -> Iterator[Point]:
        """Yield each candidate with its measurements on all contexts, of which the first `num_pilots` are pilots."""
        for candidate in self.plans(measured[:num_pilots]):
            found = [of_context.get(candidate) for of_context in measured]
            schedule = resolve(candidate.plan, self._num_layers, self._maps)
            yield Point(
                candidate.plan,
                candidate.rest,
                corrected=any(band.corrected for band in schedule.bands),
                work=schedule.work,
                kl=tuple(each and each.kl for each in found),
                agreement=tuple(each and each.agreement for each in found),
            )


def _merge(units: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Merge adjacent units into bands."""
    bands: list[tuple[int, int]] = []
    for start, end in sorted(units):
        if bands and bands[-1][1] == start:
            bands[-1] = (bands[-1][0], end)
        else:
            bands.append((start, end))
    return tuple(bands)
