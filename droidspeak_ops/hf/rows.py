"""A pass of tokens that are anywhere in a prompt, over K and V of all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .. import ops
from ..context.kv import KV
from ..prefill.weights import projection
from .attention import SeenRows
from .decoder import Decoder
from .passes import Pass


class Rows(DynamicLayer):
    """K and V of one sequence at some positions. A pass writes those of its own tokens before it looks.

    Args:
        keys, values: ``[1, K, S, D]``, written to.
        positions: int64 ``[S]``, ascending.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.positions = keys, values, positions
        self.written = positions
        """Rows that the tokens of a pass are written to, int64 ``[N]``."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.written, key_states)
        self.values.index_copy_(2, self.written, value_states)
        return self.keys, self.values

    def last(self, end: int, count: int) -> KV:
        """Copy the rows at the last `count` positions before `end`, which are all there."""
        start = int(torch.searchsorted(self.positions, end)) - count
        return KV(self.keys[:, :, start : start + count].clone(), self.values[:, :, start : start + count].clone())


class RowPass:
    """A pass of some tokens of a prompt. A layer stores their K and V first; a token then sees all that are held up to its own.

    Args:
        decoder: the model.
        ids: ``[1, T]``, the whole prompt.
        positions: int64 ``[N]``, ascending, of the tokens.
        layers: K and V of all layers, at these positions among others.
    """

    def __init__(self, decoder: Decoder, ids: torch.Tensor, positions: torch.Tensor, layers: Sequence[Rows]) -> None:
        self._decoder, self._ids, self._positions = decoder, ids, positions
        self.layers = list(layers)
        self._cache = Cache(layers=self.layers)
        # Layers of one window hold the same positions.
        self._held = {window: rows.positions for window, rows in zip(decoder.windows, layers, strict=True)}
        written = {window: torch.searchsorted(held, positions) for window, held in self._held.items()}
        for window, rows in zip(decoder.windows, layers, strict=True):
            rows.written = written[window]
        self._slots = {window: self._slots_of(held) for window, held in self._held.items()}
        # All tokens in their order are an ordinary prefill, whose attention needs no mask.
        self._is_all = len(positions) == ids.shape[1]
        visible = None if self._is_all else self._visible
        self._over = Pass(decoder, (1, len(positions)), positions=positions, visible=visible)

    def embed(self) -> torch.Tensor:
        """Return the hidden states of the tokens that enter layer 0."""
        return self._decoder.embed(self._ids[:, self._positions])

    def run(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """Run one layer, and return what leaves it."""
        return self._over.run(layer, states, self._cache, None if self._is_all else self._seen(layer))

    def store(self, layer: int, states: torch.Tensor) -> None:
        """Store a layer's K and V of the tokens, and do no more than that needs."""
        decoder, rows = self._decoder, self.layers[layer]
        if not decoder.is_its_weights[layer]:
            self.run(layer, states)
            return
        weights, rotation = decoder.prepared(layer, "hf"), self._over.rotation(layer)
        order = decoder.family.norm_order
        ops.kv_project(projection(weights, order, states, rotation, rows.keys, rows.values, rows.written))

    def look(self, layer: int, states: torch.Tensor, peaks: torch.Tensor) -> None:
        """Raise `peaks` ``[1, T]`` to the largest attention probability that a layer's queries give each token.

        Args:
            states: what enters the layer, whose K and V of the tokens are stored.
        """
        seen, queries = self._seen(layer), self._decoder.queries(layer, states, self._over.rotation(layer))
        ops.attention_peaks(
            queries, self.layers[layer].keys, seen.key_slots, seen.positions, peaks, window=seen.window, **seen.options
        )

    def _seen(self, layer: int) -> SeenRows:
        window = self._decoder.windows[layer]
        return SeenRows(self._slots[window], self._positions[None], window, self._decoder.attention(layer))

    def _slots_of(self, held: torch.Tensor) -> torch.Tensor:
        """Rows of the keys at all positions of the prompt, ``[1, T]``, -1 where they are not held."""
        slots = torch.full_like(self._ids, -1)
        slots[0, held] = torch.arange(len(held), device=held.device)
        return slots

    def _visible(self, window: int | None) -> torch.Tensor:
        apart = self._positions[:, None] - self._held[window]
        return (apart >= 0) if window is None else (apart >= 0) & (apart < window)
