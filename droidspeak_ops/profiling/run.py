"""Quality of plans for a pair of models: every band, and sets of the most sensitive layers, judged by the next tokens."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..example import Example, by_context, check_examples, examples_digest
from ..files import Journal
from ..hf.cache import MixedCache
from ..hf.decoder import Decoder
from ..hf.passes import KeysValues, check_takes_masks
from ..hf.receiver import partial_prefill
from ..hf.sender import capture
from ..prefill.maps import Maps
from ..prefill.plan import Plan
from ..prefill.schedule import resolve
from ..progress import bars
from .cost import CostModel
from .frontier import Frontier, Point, Rest, Sensitivity
from .replay import judged, replay
from .timing import measure_costs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

JUDGED = 8
"""Tokens of an answer that are judged, at most."""
SET_SIZES = (2, 3, 4, 6, 8, 12, 16, 24)
"""Sizes of the sets of most sensitive units; a unit is as many layers as the granularity says."""

_LONGER = 2  # times the wanted answer, that an answer may be

Measured = tuple[list[float], list[float]]
"""Divergence and agreement of all that was tried on a context."""


def profile(
    sender: PreTrainedModel,
    receiver: PreTrainedModel,
    examples: Sequence[Example],
    *,
    maps: Maps | None = None,
    granularity: int = 1,
    costs: CostModel | None = None,
    score: Callable[[torch.Tensor, torch.Tensor], float] | None = None,
    journal: str | os.PathLike[str] | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> Frontier:
    """Find what plans are worth for a pair of models (paper, section 4.1, where every band is an evaluation of its own).

    Of every context the receiver runs its layers once from each start, which gives the K/V of every band that starts there;
    then only suffixes run, and what two plans share runs once. For 30 layers that is 24 to 25 full prefills of a context
    of 2,048 tokens, where evaluating 465 bands one by one takes as many prefills and more.

    A third of the contexts first shows which layers are the most sensitive: those whose reuse alone, all others recomputed,
    does the most harm. Sets of them, scattered as they may be, are tried on the other contexts beside the bands. Another third
    is held out: no plan is chosen by it.

    Args:
        sender, receiver: a pair that fits together; neither is changed.
        examples: of at least three contexts, such as those that plans are for. Of each answer the first tokens are judged.
        maps: of this pair. All plans are then tried together with them, as they are to be used: layers outside the bands are
            reused or filled by the maps, and bands start from the states that these correct. Without maps the layers outside
            are reused or projected.
        granularity: layers between the starts, and the ends, of the bands to try.
        costs: of the receiver, if they have been measured; they are measured now otherwise.
        score: of token ids that the receiver has answered and of those wanted, ``[N]`` each, such as
            ``metrics.of_tokens(metrics.f1, tokenizer)``. The best plans for their time are then judged by the answers that the
            receiver gives, and chosen by what they lose of the score.
        journal: a file that remembers finished contexts, so that a run which was killed goes on.
        seed: of the order of contexts.
        show_progress: whether to draw bars on stderr.

    Raises:
        ReuseError, UnsupportedModelError: as :func:`partial_prefill`; or the receiver's attention is neither SDPA nor eager.
        ValueError: there are fewer than three contexts, an example has no suffix or answer, `granularity` is not between 1 and
            the number of layers, or the journal is of another run.
    """
    check_examples(examples)
    groups = by_context(examples)
    if len(groups) < 3:
        raise ValueError(f"examples: got {len(groups)} contexts; 3 or more are needed")
    check_takes_masks(receiver)
    decoder = Decoder(receiver)
    fingerprints = Decoder(sender).fingerprint(weights=True), decoder.fingerprint(weights=True)
    fingerprints[0].check_reuse_by(fingerprints[1])
    if maps is not None:
        maps.check_pair(*fingerprints)
    if not 1 <= granularity <= decoder.num_layers:
        raise ValueError(f"granularity: got {granularity}; from 1 to {decoder.num_layers}, all layers, is needed")
    random.Random(seed).shuffle(groups)
    digest = None if maps is None else maps.digest()
    run = {
        "profile of": [each.weights for each in fingerprints],
        "maps": digest,
        "granularity": granularity,
        "scored": score is not None,
        "examples": examples_digest([example for group in groups for example in group]),
    }
    finished = Journal(journal, run)
    tried = Tried(decoder, maps, granularity)
    third = len(groups) // 3
    with bars(show_progress) as progress:
        task = progress.add_task("Profiling", total=len(groups), completed=min(len(finished.done), len(groups)))
        for number in range(len(finished.done), len(groups)):
            some = tried.bands_and_units if number < third else tried.bands_and_sets(finished.done[:third])
            finished.add(measure_context(sender, decoder, maps, groups[number], some))
            progress.advance(task)
    if len(finished.done) == len(groups):
        finished.add(asdict(measure_costs(receiver, show_progress=show_progress) if costs is None else costs))
    measured, (known_costs, *scored) = finished.done[: len(groups)], finished.done[len(groups) :]
    frontier = Frontier(
        *fingerprints,
        maps=digest,
        points=tuple(tried.points(measured, third)),
        sensitivity=tuple(tried.sensitivity(measured[:third])),
        costs=CostModel(**known_costs),
        contexts=tuple(group[0].context.shape[1] for group in groups),
        held_out=third,
        granularity=granularity,
        seed=seed,
    )
    if score is None:
        return frontier
    best = frontier.pareto()
    with bars(show_progress) as progress:
        task = progress.add_task("Scoring answers", total=len(groups), completed=len(scored))
        for group in groups[len(scored) :]:
            finished.add(_score(sender, decoder, maps, group, best, score))
            progress.advance(task)
    full, *of_best = zip(*finished.done[len(groups) + 1 :], strict=True)
    scores = dict(zip(best, of_best, strict=True))
    points = tuple(replace(point, scores=scores.get(point)) for point in frontier.points)
    return replace(frontier, points=points, scores=full)


class Candidate(NamedTuple):
    """A plan, by its bands and what fills the layers outside them."""

    bands: tuple[tuple[int, int], ...]
    rest: Rest

    @property
    def plan(self) -> Plan:
        return Plan(self.bands, project=() if self.rest == "reuse" else "rest")

    def sources(self, depth: int) -> list[Plan]:
        """For each layer the plan that fills it: that of the rest, or the band to the last layer from where its own starts."""
        sources = [self._replace(bands=()).plan] * depth
        for start, end in self.bands:
            sources[start:end] = [Plan([(start, depth)])] * (end - start)
        return sources


def own_prefill(depth: int) -> Candidate:
    return Candidate(((0, depth),), "reuse")


class Unit(NamedTuple):
    """Layers that are one to the profile. Reused alone, the others as in the receiver's own prefill, they show what reuse of
    them harms (paper, section 3.2); that is no plan, as all layers have to run for it."""

    start: int
    end: int

    def sources(self, depth: int) -> list[Plan]:
        sources = [own_prefill(depth).plan] * depth
        sources[self.start : self.end] = [Plan()] * (self.end - self.start)
        return sources


class Tried:
    """The plans that are tried: all bands; on some contexts the units, on the others sets of the most sensitive there."""

    def __init__(self, decoder: Decoder, maps: Maps | None, granularity: int) -> None:
        self._depth, self._maps = decoder.num_layers, maps
        self._units = [
            Unit(start, min(start + granularity, self._depth)) for start in range(0, self._depth, granularity)
        ]
        self._rests: tuple[Rest, ...] = ("reuse", "project" if maps is None else "fitted")
        starts, ends = zip(*self._units, strict=True)
        bands = [(start, end) for start in starts for end in ends if start < end]
        whole = (0, self._depth)
        self.bands = [Candidate((), rest) for rest in self._rests]
        for rest in self._rests:
            # One layer that is recomputed is projected, as the rest is or worse; where all are recomputed there is no rest.
            shortest = 1 if rest == "reuse" else 2
            tried = [band for band in bands if band != whole and band[1] - band[0] >= shortest]
            self.bands += [Candidate((band,), rest) for band in tried]
        self.bands.append(own_prefill(self._depth))

    @property
    def bands_and_units(self) -> list[Candidate | Unit]:
        return [*self.bands, *self._units]

    def sensitivity(self, pilot: Sequence[Measured]) -> list[Sensitivity]:
        """Sensitivity of each unit, on the contexts on which it was reused alone."""
        columns = zip(*(divergences[len(self.bands) :] for divergences, _ in pilot), strict=True)
        return [Sensitivity(*unit, kl) for unit, kl in zip(self._units, columns, strict=True)]

    def bands_and_sets(self, pilot: Sequence[Measured]) -> list[Candidate]:
        """With sets of the units whose reuse alone does the most harm on some contexts."""
        by_harm = sorted(self.sensitivity(pilot), key=lambda unit: -sum(unit.kl))
        units = [(unit.start, unit.end) for unit in by_harm]
        sets = {_joined(units[:size]): None for size in SET_SIZES if size < len(units)}
        scattered = [bands for bands in sets if len(bands) > 1]
        return self.bands + [Candidate(bands, rest) for rest in self._rests for bands in scattered]

    def points(self, measured: Sequence[Measured], pilot: int) -> Iterable[Point]:
        for place, candidate in enumerate(self.bands_and_sets(measured[:pilot])):
            kl, agreement = (
                tuple(
                    None if number < pilot and place >= len(self.bands) else values[place]
                    for number, values in enumerate(column)
                )
                for column in zip(*measured, strict=True)
            )
            schedule = resolve(candidate.plan, self._depth, self._maps)
            corrected = any(band.corrected for band in schedule.bands)
            yield Point(candidate.plan, candidate.rest, corrected, schedule.work, kl, agreement)


def _joined(units: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Units as bands: those that touch are one."""
    bands: list[tuple[int, int]] = []
    for start, end in sorted(units):
        if bands and bands[-1][1] == start:
            bands[-1] = (bands[-1][0], end)
        else:
            bands.append((start, end))
    return tuple(bands)


def measure_context(
    sender: PreTrainedModel,
    decoder: Decoder,
    maps: Maps | None,
    examples: Sequence[Example],
    tried: Sequence[Candidate | Unit],
) -> Measured:
    """Divergence of the receiver from its own prefill with all that is tried on one context: the mean of its examples."""
    depth, receiver = decoder.num_layers, decoder.model
    context = capture(sender, examples[0].context, layers=range(depth))

    @cache
    def filled(plan: Plan) -> MixedCache:
        return partial_prefill(receiver, context, plan, maps=maps)

    def keys_values(source: Any, layer: int) -> KeysValues:
        held = filled(source).layers[layer]
        return held.keys, held.values

    mixtures = [each.sources(depth) for each in tried]
    own = tried.index(own_prefill(depth))
    totals = torch.zeros(2, len(tried), dtype=torch.float64)
    for example in examples:
        ids = torch.cat((example.suffix, example.answer[:, :JUDGED][:, :-1]), dim=1)
        states = replay(decoder, context.tokens.shape[1], ids, mixtures, keys_values)[:, example.suffix.shape[1] - 1 :]
        totals += torch.tensor(judged(decoder, states, decoder.logits(states[own])), dtype=torch.float64)
    divergences, agreements = (totals / len(examples)).tolist()
    return divergences, agreements


@torch.no_grad()
def _score(
    sender: PreTrainedModel,
    decoder: Decoder,
    maps: Maps | None,
    examples: Sequence[Example],
    points: Sequence[Point],
    score: Callable[[torch.Tensor, torch.Tensor], float],
) -> list[float]:
    """The score of the receiver's answers on one context, after full prefill and with every point: the mean of its examples."""
    receiver = decoder.model
    context = capture(sender, examples[0].context, layers=range(decoder.num_layers))
    totals = [0.0] * (1 + len(points))
    for example in examples:
        for place, point in enumerate([None, *points]):
            cache = None
            if point is not None:
                cache = partial_prefill(receiver, context, point.plan, maps=maps)
            longest = _LONGER * example.answer.shape[1]
            out = receiver.generate(example.prompt, past_key_values=cache, max_new_tokens=longest, do_sample=False)
            totals[place] += score(out[0, example.prompt.shape[1] :], example.answer[0])
    return [total / len(examples) for total in totals]
