"""Tokens of a context that the receiver recomputes: a first pass of its suffix finds them, a second runs both together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..context.fingerprint import ReuseError
from ..context.kv import KV
from ..context.parts import SINKS
from ..prefill.schedule import Schedule
from ..prefill.select import choose
from .cache import MixedCache, MixedLayer, MixedSlidingLayer, rows_held
from .decoder import Decoder
from .passes import Pass, check_takes_masks
from .rows import RowPass, Rows


@torch.no_grad()
def recompute_selected(
    decoder: Decoder, cache: MixedCache, schedule: Schedule, prompt_ids: torch.Tensor, *, compares: bool = False
) -> MixedCache:
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
        compares: whether :attr:`MixedCache.deviations` are wanted.

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
    logits, deviations = [], []
    for row, ids in enumerate(prompt_ids):
        sequence = _Sequence(decoder, cache, row, ids.unsqueeze(0), tokens)
        chosen = sequence.choose(schedule)
        before = sequence.held_at(chosen) if compares else []
        logits.append(sequence.run(chosen))
        if compares:
            deviations.append(sequence.deviation(before, chosen))
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
    cache.deviations = torch.stack(deviations) if compares else None
    return cache


class _Sequence:
    """One sequence of a cache, and the prompt that it is the head of."""

    def __init__(self, decoder: Decoder, cache: MixedCache, row: int, ids: torch.Tensor, tokens: int) -> None:
        self._decoder, self._cache, self._row, self._ids, self._tokens = decoder, cache, row, ids, tokens
        self._positions = torch.arange(ids.shape[1], device=ids.device)
        self.layers: list[Rows] = []
        """K and V of the prompt, once it has run."""

    def choose(self, schedule: Schedule) -> torch.Tensor:
        """Return the positions of the tokens to recompute; as :func:`droidspeak_ops.prefill.select.choose`."""
        return choose(
            schedule.select, schedule.selector, self._ids[0], self._tokens,
            peaks=lambda: self._peaks(schedule.looked_at), deviations=self._deviations,
        )  # fmt: skip

    def run(self, chosen: torch.Tensor) -> torch.Tensor:
        """Run the chosen tokens and the suffix, and return the logits that follow the last, float32 ``[1, V]``."""
        decoder, last = self._decoder, self._decoder.num_layers - 1
        over = self._pass(chosen)
        self.layers = over.layers
        states = over.embed()
        for layer in range(last):
            states = over.run(layer, states)
        if len(chosen) == self._tokens:  # an ordinary prefill, to the bit
            states = over.run(last, states)
        else:  # nothing reads what leaves the last layer but of the last token
            over.store(last, states)
            states = RowPass(decoder, self._ids, self._positions[-1:], self.layers).run(last, states[:, -1:])
        return decoder.logits(states[:, -1])

    def held_at(self, chosen: torch.Tensor) -> list[KV]:
        """Copy K and V of the chosen tokens, of those that a layer holds, from the cache as it is."""
        copies = []
        for layer, window in zip(self._cache.layers, self._decoder.windows, strict=True):
            first = self._tokens - rows_held(self._tokens, window)
            which = chosen[chosen >= first] - first
            copies.append(KV(*(part[self._row, None].index_select(2, which) for part in (layer.keys, layer.values))))
        return copies

    def deviation(self, before: Sequence[KV], chosen: torch.Tensor) -> torch.Tensor:
        """Return how far K and V of the chosen tokens, once they have run, are from those before; see :class:`MixedCache`.

        It is NaN where no layer holds any of them.
        """
        parts = [chosen.new_full((), torch.nan, dtype=torch.float32)]
        for rows, held in zip(self.layers, before, strict=True):
            which = torch.searchsorted(rows.positions, chosen[len(chosen) - held.keys.shape[2] :])
            for mine, other in ((rows.keys, held.keys), (rows.values, held.values)):
                now = mine.index_select(2, which).float()
                if len(which):
                    parts.append((now - other.float()).square().sum() / now.square().sum())
        return torch.stack(parts[1:] or parts).mean()

    def _pass(self, chosen: torch.Tensor) -> RowPass:
        """Start a pass of some tokens of the context and of the suffix."""
        layers = [self._rows(layer, chosen) for layer in self._cache.layers]
        return RowPass(self._decoder, self._ids, torch.cat((chosen, self._positions[self._tokens :])), layers)

    def _rows(self, layer: MixedLayer | MixedSlidingLayer, chosen: torch.Tensor) -> Rows:
        """Writable K and V of a layer, at all positions of the prompt that it holds or that are written."""
        keys, values = layer.keys[self._row, None], layer.values[self._row, None]
        if isinstance(layer, MixedLayer):  # which has been extended
            return Rows(keys, values, self._positions)
        held = keys.shape[2]
        first = self._tokens - held
        older = chosen[chosen < first]
        start = len(older)
        _, heads, _, head_dim = keys.shape
        shape = (1, heads, start + held + len(self._positions) - self._tokens, head_dim)
        both = KV(keys.new_empty(shape), values.new_empty(shape))
        both.keys[:, :, start : start + held] = keys
        both.values[:, :, start : start + held] = values
        return Rows(*both[:2], torch.cat((older, self._positions[first:])))

    def _peaks(self, layers: range) -> torch.Tensor:
        """For each token of the context the largest probability of it in the suffix's attention, of some layers."""
        ids = self._ids
        peaks = torch.zeros(ids.shape, device=ids.device)
        probe = self._pass(ids.new_empty(0))
        states = probe.embed()
        for layer in range(layers.stop):
            entering = states
            if layer + 1 < layers.stop:
                states = probe.run(layer, entering)
            else:
                probe.store(layer, entering)  # nothing reads what would leave it
            if layer in layers:
                probe.look(layer, entering, peaks)
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
