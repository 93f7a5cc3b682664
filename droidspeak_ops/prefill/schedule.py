"""The work of a receiver at each layer over a context, decided once from a plan, the pair's maps and what the context holds.

The fill, the cost model, the profiler and whoever loads contexts read a :class:`Schedule`; none of them decides again.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .plan import Plan
from .select import layers_looked_at

if TYPE_CHECKING:
    from ..context.context import SharedContext
    from ..context.fingerprint import Fingerprint
    from .maps import Maps

Source = Literal["reuse", "recompute", "project", "fitted", "fitted_kv"]
"""The source of a layer's K and V: the sender; the receiver's own layers; a projection of the sender's hidden states with the
receiver's weights, or with weights of :class:`Maps`; a projection of the sender's K and V with such weights."""


class Band(NamedTuple):
    """Layers `start` to ``end - 1`` that run, and whether maps correct the hidden states that `start` is given."""

    start: int
    end: int
    corrected: bool


class Read(NamedTuple):
    """A part of the context that is read: a layer's hidden states, its K and V, or these of the attention sinks alone."""

    what: Literal["hidden", "kv", "sinks"]
    layer: int


@dataclass(frozen=True)
class Work:
    """The work of a schedule, in layers.

    Args:
        run: that run in full, attention and MLP included (paper, section 4: the recomputed layers).
        projected: whose K/V are projected, the last of each band among them.
        hidden: of which the sender's hidden states are loaded.
        kv: of which the sender's K/V are loaded.
        layers: that selected tokens run through, all of them; 0 where none are selected.
        select: those tokens, as :class:`Plan` has them: a share or a number.
        probed: that the suffix runs through once more to select them.
    """

    run: int
    projected: int
    hidden: int
    kv: int
    layers: int = 0
    select: int | float = 0
    probed: int = 0


@dataclass(frozen=True)
class Schedule:
    """The work over a context, layer by layer.

    Args:
        sources: of every layer.
        bands: in ascending order.
        uses_maps: whether maps have a part in it, be it that they have a layer reused.
        select, selector: the tokens that are recomputed once all layers are filled, as :class:`Plan` has them.
    """

    sources: tuple[Source, ...]
    bands: tuple[Band, ...]
    uses_maps: bool
    select: int | float
    selector: Any

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """The parts of the context that are read, in the order of use: starts of bands first, then layer by layer.

        Hidden states that enter layer 0 are never among it: they are embeddings, and the receiver has its own.
        """
        starts = [Read("hidden", band.start) for band in self.bands if band.start > 0]
        return (*starts, *itertools.chain.from_iterable(self.reads_of))

    @cached_property
    def reads_of(self) -> tuple[tuple[Read, ...], ...]:
        """The parts of the context that each layer is filled from; none for layers in bands."""
        return tuple(itertools.starmap(_reads_of, enumerate(self.sources)))

    @cached_property
    def hidden_layers(self) -> tuple[int, ...]:
        """The layers at which the sender's hidden states are read."""
        return tuple(sorted({layer for what, layer in self.reads if what == "hidden"}))

    @property
    def work(self) -> Work:
        """The cost in layers. A band of n layers runs n - 1: nothing reads the output of its last.

        To see what deviates one layer runs and one is projected. What a function of the user's costs is not known.
        """
        compared = int(bool(self.select) and self.selector == "deviation")
        projected = sum(source in ("project", "fitted", "fitted_kv") for source in self.sources)
        return Work(
            run=sum(band.end - band.start - 1 for band in self.bands) + compared,
            projected=len(self.bands) + projected + compared,
            hidden=len(self.hidden_layers),
            kv=sum(what == "kv" for what, _ in self.reads),
            layers=len(self.sources) if self.select else 0,
            select=self.select,
            probed=self.looked_at.stop if self.select and self.selector == "attention" else 0,
        )

    @property
    def looked_at(self) -> range:
        """The layers at whose attention peaks tokens are selected."""
        return layers_looked_at(len(self.sources))


def _reads_of(layer: int, source: Source) -> tuple[Read, ...]:
    hidden = (Read("hidden", layer),) if layer > 0 else ()
    if source == "recompute":
        return ()
    if source == "project":
        return hidden
    return (*hidden, Read("sinks", layer)) if source == "fitted" else (Read("kv", layer),)


def resolve(
    plan: Plan,
    num_layers: int,
    maps: Maps | None = None,
    held: Collection[int] | None = None,
    *,
    in_domain: bool = True,
) -> Schedule:
    """Decide what is done at each layer of a model.

    Args:
        plan: what is asked for.
        num_layers: of the model.
        maps: of the pair: a layer that the plan projects is filled as their choice for it says.
        held: the layers at which a context holds hidden states, where that is known: without those that the maps' choices
            need, their choices for contexts without hidden states count.
        in_domain: whether the context is like those that the maps were fitted to. Elsewhere what they would fill is reused, but
            for layer 0, which is projected from the receiver's own embeddings and so exact.

    Raises:
        ValueError: the plan names a layer that such a model does not have.
    """
    alone = _without_maps(plan, num_layers)
    if maps is None:
        return alone
    used = maps.used_by(plan)

    def chosen(choices: Sequence[Source], corrections: Collection[int] = ()) -> Schedule:
        sources = tuple(
            choice if source == "project" else source for source, choice in zip(alone.sources, choices, strict=True)
        )
        bands = tuple(band._replace(corrected=band.start in corrections) for band in alone.bands)
        uses_maps = sources != alone.sources or bands != alone.bands
        return replace(alone, sources=sources, bands=bands, uses_maps=uses_maps)

    if not in_domain:
        reused: list[Source] = ["reuse"] * num_layers
        return chosen(["project", *reused[1:]])
    schedule = chosen(used.choices, used.corrections)
    if held is not None and not set(schedule.hidden_layers) <= set(held):
        return chosen(used.choices_without_hidden, used.corrections)
    return schedule


@lru_cache(maxsize=256)
def _without_maps(plan: Plan, num_layers: int) -> Schedule:
    projected = () if plan.project == "rest" else tuple(plan.project)
    last = max((*(end - 1 for _, end in plan.bands), *projected), default=0)
    if last >= num_layers:
        raise ValueError(
            f"plan: expected layers 0 to {num_layers - 1} of a model of {num_layers}, got layer {last} in {plan}"
        )
    sources: list[Source] = ["project" if plan.project == "rest" else "reuse"] * num_layers
    for layer in projected:
        sources[layer] = "project"
    for start, end in plan.bands:
        sources[start:end] = ["recompute"] * (end - start)
    bands = tuple(Band(*band, corrected=False) for band in plan.bands)
    return Schedule(tuple(sources), bands, uses_maps=False, select=plan.select, selector=plan.selector)


def check_pair(plan: Plan, maps: Maps | None, sender: Fingerprint, receiver: Fingerprint) -> None:
    """Raise unless the receiver can reuse what the sender makes, by this plan and with these maps.

    Args:
        plan, maps: as :func:`resolve` has them.
        sender, receiver: of the pair; with digests of the weights if there are maps, or a profile chose the plan.

    Raises:
        ReuseError: the models do not fit, or the plan or the maps are those of another pair.
    """
    sender.check_reuse_by(receiver)
    if plan.chosen_for is not None:
        plan.chosen_for.check(sender.weights, receiver.weights, None if maps is None else maps.digest())
    if maps is not None:
        maps.check_pair(sender, receiver)


def resolve_over(plan: Plan, context: SharedContext, maps: Maps | None = None, *, stacklevel: int = 1) -> Schedule:
    """Decide what is done at each layer over a context, by what it holds and whether it is like those the maps were fitted to.

    That reads K and V of a layer, where maps are used. Maps are not used for a context unlike those, with a warning.

    Args:
        plan, maps: as :func:`resolve` has them.
        context: to be reused.
        stacklevel: of the warning; 1 for the caller's line.

    Raises:
        ReuseError: the context lacks hidden states.
        ValueError: the plan names a layer that such a model does not have.
    """
    schedule = resolve(plan, context.num_layers, maps, context.hidden_layers)
    if maps is not None and schedule.uses_maps and (distance := maps.domain.distance(context)) > maps.domain.limit:
        warnings.warn(
            f"maps: not used for a context unlike those they were fitted to (distance {distance:.2f}; up to "
            f"{maps.domain.limit:.2f} is alike): the layers that they are for are reused",
            stacklevel=1 + stacklevel,
        )
        schedule = resolve(plan, context.num_layers, maps, in_domain=False)
    context.check_hidden(schedule.hidden_layers)
    return schedule
