"""The plans that a profile measures: every band, and sets of the most sensitive layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..prefill.maps import Maps
from ..prefill.plan import Plan
from ..prefill.schedule import resolve
from .frontier import Point, Rest, Sensitivity

SET_SIZES = (2, 3, 4, 6, 8, 12, 16, 24)
"""Sizes of the sets of most sensitive units."""

Measured = tuple[list[float], list[float]]
"""KL divergence and top-1 agreement on one context, of everything that was measured there."""


class Candidate(NamedTuple):
    """A plan, given by its bands and how the layers outside them are filled."""

    bands: tuple[tuple[int, int], ...]
    rest: Rest

    @property
    def plan(self) -> Plan:
        return Plan(self.bands, project=() if self.rest == "reuse" else "rest")

    def sources(self, num_layers: int) -> list[Plan]:
        """Return for each layer a plan with the same K/V there, from as few plans as possible.

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


class Candidates:
    """The candidates of a profile: bands on all contexts, units on the pilot contexts, sets of units on the others.

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
    def bands_and_units(self) -> list[Candidate | Unit]:
        """Candidates that are measured on the pilot contexts."""
        return [*self.bands, *self._units]

    def bands_and_sets(self, pilot: Sequence[Measured]) -> list[Candidate]:
        """Return the candidates for the other contexts: bands, and sets of the units most sensitive on the pilot contexts."""
        most_sensitive = sorted(self.sensitivity(pilot), key=lambda unit: -sum(unit.kl))
        units = [(unit.start, unit.end) for unit in most_sensitive]
        sets = dict.fromkeys(_merge(units[:size]) for size in SET_SIZES if size < len(units))
        scattered = [bands for bands in sets if len(bands) > 1]
        return self.bands + [Candidate(bands, rest) for rest in self._rests for bands in scattered]

    def sensitivity(self, pilot: Sequence[Measured]) -> list[Sensitivity]:
        """Return the sensitivity of each unit, measured on the pilot contexts."""
        of_units = zip(*(kl[len(self.bands) :] for kl, _ in pilot), strict=True)
        return [Sensitivity(*unit, kl) for unit, kl in zip(self._units, of_units, strict=True)]

    def points(self, measured: Sequence[Measured], num_pilots: int) -> Iterator[Point]:
        """Yield each candidate with its measurements on all contexts, of which the first `num_pilots` are pilots."""
        for index, candidate in enumerate(self.bands_and_sets(measured[:num_pilots])):
            kl, agreement = (
                tuple(
                    None if context < num_pilots and index >= len(self.bands) else values[index]
                    for context, values in enumerate(per_context)
                )
                for per_context in zip(*measured, strict=True)
            )
            schedule = resolve(candidate.plan, self._num_layers, self._maps)
            corrected = any(band.corrected for band in schedule.bands)
            yield Point(candidate.plan, candidate.rest, corrected, schedule.work, kl, agreement)


def _merge(units: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Merge adjacent units into bands."""
    bands: list[tuple[int, int]] = []
    for start, end in sorted(units):
        if bands and bands[-1][1] == start:
            bands[-1] = (bands[-1][0], end)
        else:
            bands.append((start, end))
    return tuple(bands)
