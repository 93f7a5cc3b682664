"""Plans: the layers and tokens that the receiver recomputes, the layers that it projects, and so what is reused."""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .. import schema
from ..context.fingerprint import ReuseError

SELECTORS = ("attention", "recent", "deviation")


@dataclass(frozen=True)
class ChosenFor:
    """The pair and maps that a plan was measured on when it was chosen: it serves these and nothing else.

    Args:
        sender, receiver: digests of the weights of the two models.
        maps: digest of the maps that it is used with, or None.
    """

    sender: str
    receiver: str
    maps: str | None

    def check(self, sender: str | None, receiver: str | None, maps: str | None) -> None:
        """Raise unless this is the pair that the plan was chosen for, and these are the maps.

        Raises:
            ReuseError: it was chosen for other models, or to be used with other maps or none.
        """
        for name, chosen, given in (("sender", self.sender, sender), ("receiver", self.receiver, receiver)):
            if given != chosen:
                raise ReuseError(f"plan: expected the pair that it was chosen for, got a {name} with other weights")
        if maps != self.maps:
            expected, got = (
                ("maps" if self.maps else "no maps"),
                ("other maps" if maps and self.maps else "maps" if maps else "none"),
            )
            raise ReuseError(f"plan: expected {expected}, as it was chosen with, got {got}")


@dataclass(frozen=True, eq=False)
class Plan:
    """The work of a receiver at each layer over a context that a sender has read.

    A plan is independent of any model; :func:`droidspeak_ops.prefill.schedule.resolve` says what it means for one.

    Args:
        bands: Contiguous layers ``[start, end)`` that the receiver runs itself, starting from the sender's hidden states
            at ``start`` (paper, section 4.2), or from its own embeddings where ``start`` is 0. The last layer of a band
            costs no more than a projected one: nothing reads its output.
        project: Layers whose K/V the receiver projects from the sender's hidden states at that layer, without
            attention or MLP; ``"rest"`` for all layers outside the bands.
        select: Tokens of the context that the receiver recomputes through all its layers, over what the rest of the plan makes
            of the others: a share of them, from 0.0 to 1.0, or a number of them where it is an integer.
        selector: How they are found: ``"attention"``, those that the suffix's attention peaks at with their neighbours;
            ``"recent"``, the last ones; ``"deviation"``, those whose K and V differ most from the sender's after one layer
            (CacheBlend, arXiv 2405.16444); or a function that is given the context's token ids ``[T]`` and the suffix's ``[N]``
            and returns a score for each of the former, floats ``[T]``, whose peaks are selected with their neighbours, or the
            positions to select, int64, as many as `select` allows or fewer.
        chosen_for: what a profile chose it for, which is checked where it is used; None for any pair.

    Raises:
        ValueError: a band is empty or negative, bands overlap, a projected layer lies in a band, a share is not from 0 to 1, or
            there is no such selector.
    """

    bands: Sequence[tuple[int, int]] = ()
    project: Sequence[int] | Literal["rest"] = ()
    select: int | float = 0
    selector: Any = "attention"
    chosen_for: ChosenFor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        bands = tuple(sorted(_band(band) for band in _items("bands", self.bands)))
        for (_, end), (start, _) in itertools.pairwise(bands):
            if start < end:
                raise ValueError(f"bands: expected bands that do not overlap, got {list(bands)}")
        project: tuple[int, ...] | Literal["rest"] = "rest"
        if self.project != "rest":
            if isinstance(self.project, str):
                raise ValueError(f"project: expected layer indices or 'rest', got {self.project!r}")
            project = tuple(sorted({_layer("project", layer) for layer in _items("project", self.project)}))
            for layer in project:
                if any(start <= layer < end for start, end in bands):
                    raise ValueError(
                        f"project: expected layers outside the bands, got {layer}, which is recomputed already"
                    )
        most = math.inf if isinstance(self.select, int) else 1.0
        if isinstance(self.select, bool) or not isinstance(self.select, (int, float)) or not 0 <= self.select <= most:
            raise ValueError(
                f"select: expected a share from 0.0 to 1.0, or an integer number of tokens, got {self.select!r}"
            )
        if not callable(self.selector) and self.selector not in SELECTORS:
            raise ValueError(
                f"selector: expected one of {', '.join(map(repr, SELECTORS))} or a function, got {self.selector!r}"
            )
        object.__setattr__(self, "bands", bands)
        object.__setattr__(self, "project", project)

    @property
    def _work(self) -> tuple[Any, ...]:
        """The fields that equal plans have in common, with the type of `select`: 1 is one token and 1.0 all of them."""
        return self.bands, self.project, self.select, self.select == 1 and type(self.select), self.selector

    def __eq__(self, other: object) -> bool:
        """Return whether both ask for the same work, whatever they were chosen for."""
        return self._work == other._work if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._work)

    def hidden_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers at which the sender's hidden states are needed: where bands start and at projected layers.

        Layer 0 is never among them: what enters it are embeddings, and the receiver has its own.

        Raises:
            ValueError: the plan names a layer that a model with `num_layers` layers does not have.
        """
        from .schedule import resolve  # which is made of plans

        return resolve(self, num_layers).hidden_layers

    def described(self) -> dict[str, Any]:
        """The plan as plain values, those that say something.

        Raises:
            ValueError: its selector is a function.
        """
        described: dict[str, Any] = {"bands": self.bands, "project": self.project}
        if self.select:
            if callable(self.selector):
                raise ValueError(f"selector: expected one of {', '.join(map(repr, SELECTORS))}, got a function")
            described |= {"select": self.select, "selector": self.selector}
        if self.chosen_for is not None:
            described["chosen_for"] = asdict(self.chosen_for)
        return described

    def to_json(self) -> str:
        """The plan as a JSON object; :meth:`from_json` reads it back.

        Raises:
            ValueError: its selector is a function.
        """
        return json.dumps(self.described())

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: the text is not JSON, or not a plan.
        """
        return schema.decode(text, cls, "plan")

    def __str__(self) -> str:
        parts = [f"band [{start}, {end})" for start, end in self.bands]
        if self.project:
            rest = "rest projected" if self.bands else "all projected"
            parts.append(rest if self.project == "rest" else f"{list(self.project)} projected")
        if self.select:
            much = f"{self.select} tokens" if isinstance(self.select, int) else f"{self.select:.3g} of tokens"
            how = getattr(self.selector, "__name__", self.selector)
            parts.append(f"{much} selected by {how}")
            if len(parts) == 1:
                parts.insert(0, "rest reused")
        return ", ".join(parts) or "all reused"


def _items(name: str, value: Any) -> Iterable[Any]:
    if not isinstance(value, Iterable):
        raise ValueError(f"{name}: expected a list, got {value!r}")
    return value


def _band(value: Any) -> tuple[int, int]:
    try:
        start, end = value
    except (TypeError, ValueError):
        raise ValueError(f"bands: expected a pair (start, end), got {value!r}") from None
    band = (_layer("bands", start), _layer("bands", end))
    if band[0] >= band[1]:
        raise ValueError(f"bands: expected (start, end) with 0 <= start < end, got {band}")
    return band


def _layer(name: str, value: Any) -> int:
    try:
        layer = operator.index(value)
    except TypeError:
        layer = -1
    if layer < 0 or isinstance(value, bool):
        raise ValueError(f"{name}: expected a layer index of 0 or more, got {value!r}")
    return layer
