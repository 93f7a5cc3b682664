"""A check of each request's cache, and what it falls back on: a fuller plan, or the receiver's own prefill."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..context.context import SharedContext
from ..prefill.maps import Maps
from ..prefill.plan import Plan
from ..prefill.weights import Norm
from .cache import MixedCache
from .receiver import Receiver, prefill

FULL_PREFILL = Plan(select=1.0)
"""Every token runs through every layer: the receiver's own prefill."""


class Gate:
    """Plans that are tried one after the other until the cache is near enough to the receiver's own.

    A plan that selects tokens recomputes them anyway. How far their K and V were from the receiver's says how far those of the
    others are, for a comparison of a few rows. Where that is more than `limit` the next plan is tried, and in the end the
    receiver's own prefill. Where a layer has a sliding window, selected rows miss keys that it has left behind, which counts
    as deviation. Many threads may use a gate.

    Args:
        plans: the cheapest first. Each selects tokens.
        limit: the largest deviation, :attr:`MixedCache.deviations`, with which a cache is good enough: 0 for none, about 2 for
            K and V that have nothing in common with the receiver's.

    Raises:
        ValueError: there is no plan, one selects no tokens, or the limit is not positive.
    """

    def __init__(self, plans: Sequence[Plan], limit: float) -> None:
        if not plans or not all(plan.select for plan in plans):
            raise ValueError(f"plans: expected some, each of which selects tokens, got {[str(plan) for plan in plans]}")
        if not limit > 0:
            raise ValueError(f"limit: expected more than 0, got {limit}")
        self._plans, self._limit = tuple(plans), limit
        self._counts: Counter[Plan] = Counter()
        self._lock = threading.Lock()

    @property
    def counts(self) -> Mapping[Plan, int]:
        """The number of caches that each plan has given so far, :data:`FULL_PREFILL` among them."""
        with self._lock:
            return {plan: self._counts[plan] for plan in (*self._plans, FULL_PREFILL)}

    @torch.no_grad()
    def prefill(
        self,
        receiver: PreTrainedModel | Receiver,
        context: SharedContext,
        prompt_ids: torch.Tensor,
        *,
        maps: Maps | None = None,
        tokenizer: Any = None,
        norm: Norm = "hf",
    ) -> MixedCache:
        """Return the cache of the first plan that is good enough. All sequences of a batch have to be.

        Args:
            receiver, context, prompt_ids, maps, tokenizer, norm: as in :func:`partial_prefill`.

        Raises:
            ReuseError, UnsupportedModelError, ValueError: as :func:`partial_prefill`.
        """
        for plan in self._plans:
            cache = prefill(receiver, context, plan, prompt_ids, maps, tokenizer, norm, runs_suffix=True, compares=True)
            assert cache.deviations is not None
            if bool((cache.deviations <= self._limit).all()):
                return self._counted(plan, cache)
        own = prefill(receiver, context, FULL_PREFILL, prompt_ids, None, tokenizer, norm, runs_suffix=True)
        return self._counted(FULL_PREFILL, own)

    def _counted(self, plan: Plan, cache: MixedCache) -> MixedCache:
        with self._lock:
            self._counts[plan] += 1
        return cache
