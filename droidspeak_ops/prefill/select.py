"""Selection of the tokens of a context that the receiver recomputes: peaks of its suffix's attention, with neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NEIGHBOURS = 12
"""Tokens on either side of a peak that are selected with it."""
MIN_TOKENS = 48
"""Fewest tokens that a share selects, of contexts that have them: one peak with its neighbours is too little."""

LOOKED_AT = 2 / 5, 3 / 5
"""From where to where in the depth of a model the suffix's attention is looked at. There it found the answer to every one of 64
calibration questions; up to a half of the depth to 97 %, up to a third to 95 % (``python -m bench.located``)."""


def layers_looked_at(num_layers: int) -> range:
    """Return the layers whose attention says what a suffix looks at; it runs through all up to the last of them."""
    start, stop = (round(part * num_layers) for part in LOOKED_AT)
    stop = max(1, stop)
    return range(min(start, stop - 1), stop)


def budget(select: float | int, tokens: int) -> int:
    """Return how many of a context's tokens `select` asks for: a share of them, or a number where it is an integer."""
    if isinstance(select, int):
        return min(select, tokens)
    return min(max(round(select * tokens), MIN_TOKENS if select else 0), tokens)


def choose(
    select: float | int,
    selector: Any,
    ids: torch.Tensor,
    tokens: int,
    *,
    peaks: Callable[[], torch.Tensor],
    deviations: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Select the tokens of a context that are recomputed.

    Args:
        select, selector: as :class:`droidspeak_ops.prefill.plan.Plan` has them.
        ids: ``[T + N]``, the context and a suffix.
        tokens: T.
        peaks: returns for each token of the context the largest probability of it in the suffix's attention, ``[T]``.
        deviations: returns for each how much its K and V differ after one layer, ``[T]``.

    Returns:
        Ascending positions, int64 ``[count]``.

    Raises:
        ValueError: the selector is a function and returns neither scores nor positions, or more of them than it may.
    """
    count = budget(select, tokens)
    everything = torch.arange(tokens, device=ids.device)
    if count in (0, tokens) or selector == "recent":
        return everything[tokens - count :]
    if selector == "deviation":
        return highest(deviations(), count)
    if selector == "attention":
        return around_peaks(peaks(), count)
    found = selector(ids[:tokens], ids[tokens:])
    if found.is_floating_point() and found.shape == (tokens,):
        return around_peaks(found, count)
    places = found.unique()  # which sorts them
    if found.dtype != torch.int64 or not torch.isin(places, everything).all() or not 0 < len(places) <= count:
        raise ValueError(
            f"selector: expected a score for each of {tokens} tokens, or positions of 1 to {count} of them, got "
            f"{found.dtype} {tuple(found.shape)}"
        )
    return places


def around_peaks(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Select tokens by falling score, each with its neighbours, nearest first, until there are `count`.

    Args:
        scores: ``[T]``, on any device; a GPU is waited for.
        count: at most T.

    Returns:
        Ascending positions, int64 ``[count]``, on the device of `scores`.
    """
    tokens = scores.shape[0]
    ranks = torch.empty(tokens, dtype=torch.int64)
    ranks[scores.cpu().argsort(descending=True, stable=True)] = torch.arange(tokens)
    # Of each token the earliest (peak, distance) that selects it; peaks are taken in turn, neighbours by distance.
    width = 2 * NEIGHBOURS + 1
    earliest = torch.full((tokens,), torch.iinfo(torch.int64).max)
    furthest = min(NEIGHBOURS, tokens - 1)
    for offset in range(-furthest, furthest + 1):
        order = ranks * width + 2 * abs(offset) - int(offset < 0)
        if offset < 0:
            reached, of = earliest[:offset], order[-offset:]
        else:
            reached, of = earliest[offset:], order[: tokens - offset]
        torch.minimum(reached, of, out=reached)
    return earliest.argsort(stable=True)[:count].sort().values.to(scores.device)


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Select the tokens of the highest scores ``[T]``, by themselves; ascending positions ``[count]``."""
    return scores.topk(count).indices.sort().values
