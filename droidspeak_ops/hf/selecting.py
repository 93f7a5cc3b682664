"""Tokens of a context that the receiver recomputes: a first pass of its suffix finds them, a second runs both together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .. import ops
from ..context.fingerprint import ReuseError
from ..context.kv import KV
from ..prefill.maps import SINKS
from ..prefill.schedule import Schedule
from ..prefill.select import around_peaks, budget, highest
from .cache import MixedCache, MixedLayer, MixedSlidingLayer, rows_held
from .decoder import Decoder
from .passes import Pass, check_takes_masks


@torch.no_grad()
def recompute_selected(decoder: Decoder, cache: MixedCache, schedule: Schedule, prompt_ids: torch.Tensor) -> MixedCache:
    """Recompute a context's selected tokens, and run the suffix behind them, in one pass through all layers.

    A row of the pass is a token with its own position. Its K and V are stored in the cache, in place of what is there, before
    the layer's attention runs, in which each row sees the keys at positions up to its own: of selected tokens the receiver's
    own, of others what the cache holds. A layer with a sliding window holds no more than its window; of older tokens a row sees
    those that are selected.

    Args:
        decoder: the receiver, with SDPA or eager attention.
        cache: the context as the schedule fills its layers. It is used up.
        schedule: says which tokens are selected.
        prompt_ids: ``[B, T + N]``, the context and a suffix; each sequence selects by itself.

    Returns:
        A cache of all tokens of the prompt but the last, which a pass over it has to run, and which is known already:
        :attr:`MixedCache.next_logits` is what it gives.

    Raises:
        UnsupportedModelError: the model's attention takes no mask.
        ReuseError: the prompt goes beyond where a LongRoPE changes.
    """
    check_takes_masks(decoder.model)
    tokens, total = cache.tokens.shape[1], prompt_ids.shape[1]
    if cache.rope_changes_at is not None and cache.rope_changes_at < total:
        raise ReuseError(
            f"prompt_ids: expected up to {cache.rope_changes_at} tokens, beyond which the model's RoPE is another than the "
            f"context's, got {total}"
        )
    for layer in cache.layers:
        if isinstance(layer, MixedLayer):
            layer.extend(total - tokens)
    windows: list[list[KV]] = [[] for _ in cache.layers]
    logits = []
    for row, ids in enumerate(prompt_ids):
        sequence = _Sequence(decoder, cache, row, ids.unsqueeze(0), tokens)
        logits.append(sequence.run(sequence.choose(schedule)))
        for held, layer, window in zip(windows, sequence.layers, decoder.windows, strict=True):
            if window is not None:
                held.append(layer.last(total - 1, rows_held(total - 1, window)))
    for layer, held in zip(cache.layers, windows, strict=True):
        if isinstance(layer, MixedLayer):
            layer.crop(-1)
        else:
            keys, values = (torch.cat(parts) for parts in list(zip(*held, strict=True))[:2])
            layer.keys, layer.values, layer.cumulative_length = keys, values, total - 1
    cache.tokens = prompt_ids[:, :-1]
    cache.next_logits = torch.cat(logits)
    return cache


class _Rows(DynamicLayer):
    """K and V of one sequence at some positions. A pass writes those of its own tokens before it looks.

    Args:
        keys, values: ``[1, K, S, D]``, written to.
        positions: int64 ``[S]``, ascending.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.positions = keys, values, positions
        self._written = positions

    def write_at(self, positions: torch.Tensor) -> None:
        """Have the next pass write the rows of tokens at these positions."""
        self._written = torch.searchsorted(self.positions, positions)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self._written, key_states)
        self.values.index_copy_(2, self._written, value_states)
        return self.keys, self.values

    def last(self, end: int, count: int) -> KV:
        """Copy the rows at the last `count` positions before `end`, which are all there."""
        start = int(torch.searchsorted(self.positions, end)) - count
        return KV(self.keys[:, :, start : start + count].clone(), self.values[:, :, start : start + count].clone())


class _Sequence:
    """One sequence of a cache, and the prompt that it is the head of."""

    def __init__(self, decoder: Decoder, cache: MixedCache, row: int, ids: torch.Tensor, tokens: int) -> None:
        self._decoder, self._cache, self._row, self._ids, self._tokens = decoder, cache, row, ids, tokens
        self.layers: list[_Rows] = []

    def choose(self, schedule: Schedule) -> torch.Tensor:
        """Return the positions of the tokens to recompute, ascending ``[count]``.

        Raises:
            ValueError: the selector is a function and returns neither scores nor positions, or more of them than it may.
        """
        tokens, count = self._tokens, budget(schedule.select, self._tokens)
        everything = torch.arange(tokens, device=self._ids.device)
        if count in (0, tokens) or schedule.selector == "recent":
            return everything[tokens - count :]
        if schedule.selector == "deviation":
            return highest(self._deviations(), count)
        if schedule.selector == "attention":
            return around_peaks(self._peaks(schedule.looked_at), count)
        found = schedule.selector(self._ids[0, :tokens], self._ids[0, tokens:])
        if found.is_floating_point() and found.shape == (tokens,):
            return around_peaks(found, count)
        places = found.unique()  # which sorts them
        if found.dtype != torch.int64 or not torch.isin(places, everything).all() or not 0 < len(places) <= count:
            raise ValueError(
                f"selector: expected a score for each of {tokens} tokens, or positions of 1 to {count} of them, got "
                f"{found.dtype} {tuple(found.shape)}"
            )
        return places

    def run(self, chosen: torch.Tensor) -> torch.Tensor:
        """Run the chosen tokens and the suffix, and return the logits that follow the last, float32 ``[1, V]``."""
        positions = torch.cat((chosen, self._suffix_positions))
        states = self._pass(positions, chosen, self._decoder.num_layers, lambda *_: None)
        return self._decoder.logits(states[:, -1])

    @property
    def _suffix_positions(self) -> torch.Tensor:
        return torch.arange(self._tokens, self._ids.shape[1], device=self._ids.device)

    def _pass(
        self,
        positions: torch.Tensor,
        chosen: torch.Tensor,
        depth: int,
        look: Callable[[int, torch.Tensor, Pass, _Rows], None],
    ) -> torch.Tensor:
        """Run tokens of the prompt through the first layers, and return what leaves the last of them.

        Args:
            positions: ascending, of the tokens.
            chosen: those of them that are of the context.
            depth: how many layers.
            look: called behind each layer with its index, what entered it, the pass, and its K and V.
        """
        decoder = self._decoder
        self.layers = [self._rows(layer, chosen) for layer in self._cache.layers]
        for rows in self.layers:
            rows.write_at(positions)
        keys = {window: rows.positions for window, rows in zip(decoder.windows, self.layers, strict=True)}

        def visible(window: int | None) -> torch.Tensor:
            apart = positions[:, None] - keys[window]
            return (apart >= 0) if window is None else (apart >= 0) & (apart < window)

        # All tokens in their order are an ordinary prefill, whose attention needs no mask.
        is_all = len(positions) == self._ids.shape[1]
        over = Pass(decoder, (1, len(positions)), positions=positions, visible=None if is_all else visible)
        cache = Cache(layers=self.layers)
        states = decoder.embed(self._ids[:, positions])
        for layer in range(depth):
            entering = states
            states = over.run(layer, states, cache)
            look(layer, entering, over, self.layers[layer])
        return states

    def _rows(self, layer: MixedLayer | MixedSlidingLayer, chosen: torch.Tensor) -> _Rows:
        """Writable K and V of a layer, at all positions of the prompt that it holds or that are written."""
        keys, values = layer.keys[self._row, None], layer.values[self._row, None]
        total, device = self._ids.shape[1], chosen.device
        if isinstance(layer, MixedLayer):  # which has been extended
            return _Rows(keys, values, torch.arange(total, device=device))
        held = keys.shape[2]
        first = self._tokens - held
        older = chosen[chosen < first]
        start = len(older)
        _, heads, _, head_dim = keys.shape
        shape = (1, heads, start + held + total - self._tokens, head_dim)
        both = KV(keys.new_empty(shape), values.new_empty(shape))
        both.keys[:, :, start : start + held] = keys
        both.values[:, :, start : start + held] = values
        return _Rows(*both[:2], torch.cat((older, torch.arange(first, total, device=device))))

    def _peaks(self, layers: range) -> torch.Tensor:
        """For each token of the context the largest probability of it in the suffix's attention, of some layers."""
        decoder, device = self._decoder, self._ids.device
        total, suffix = self._ids.shape[1], self._suffix_positions
        peaks = torch.zeros((1, total), device=device)

        def look(layer: int, states: torch.Tensor, over: Pass, rows: _Rows) -> None:
            if layer not in layers:
                return
            slots = torch.full((1, total), -1, device=device)
            slots[0, rows.positions] = torch.arange(len(rows.positions), device=device)
            ops.attention_peaks(
                decoder.queries(layer, states, over.rotation(layer)), rows.keys, slots, suffix[None], peaks,
                window=decoder.windows[layer], **decoder.attention(layer),
            )  # fmt: skip

        self._pass(suffix, suffix[:0], layers.stop, look)
        peaks[0, :SINKS] = 0  # everything looks at them
        return peaks[0, : self._tokens]

    def _deviations(self) -> torch.Tensor:
        """For each token how much its K and V in the second layer differ from those in the cache, ``[T]``."""
        decoder, context = self._decoder, self._ids[:, : self._tokens]
        over = Pass(decoder, context.shape)
        states = over.run(0, decoder.embed(context), Cache(layers=[DynamicLayer()]))
        own, held = over.project(1, states), self._cache.layers[1]
        rows = own.keys.shape[2]
        theirs = (part[self._row, None, :, :rows] for part in (held.keys, held.values))
        apart = torch.zeros(self._tokens, device=self._ids.device)  # 0 where a window has left them behind
        for mine, other in zip(own[:2], theirs, strict=True):
            apart[self._tokens - rows :] += (mine - other).float().square().sum((0, 1, 3))
        return apart
