"""A receiver's cache of one context: how each of its layers is reused, recomputed or projected."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .. import ops
from ..context.context import SharedContext, last
from ..context.kv import splice
from ..hf.cache import (
    MixedCache,
    MixedLayer,
    MixedSlidingLayer,
    empty_layer,
    rows_held,
    shared_layer,
    uninitialized_layer,
)
from ..hf.decoder import Decoder
from ..hf.passes import Pass
from .maps import LayerMap, sinks_among
from .project import Projection, of_last_rows
from .weights import LayerWeights, Norm, Prepared


class Filling:
    """A receiver's cache of one context, and how each of its layers is filled. Every layer is to be filled once.

    Args:
        decoder: the receiver.
        context: what is reused, and projected from.
        norm: of projections.
        rerotates: whether the angles that the receiver applies may differ from those that the sender applied.
    """

    def __init__(self, decoder: Decoder, context: SharedContext, norm: Norm, *, rerotates: bool) -> None:
        self._decoder, self._context, self._norm, self._rerotates = decoder, context, norm, rerotates
        self._over = Pass(decoder, context.tokens.shape)
        self._batch, self._tokens = context.tokens.shape
        self._layers: list[Any] = [None] * decoder.num_layers
        self.cache = MixedCache(self._layers, context.tokens, None, decoder.model)

    def hidden(self, layer: int) -> torch.Tensor:
        """Return what enters a layer: the sender's hidden states, or the receiver's own embeddings."""
        return self._decoder.embed(self._context.tokens) if layer == 0 else self._context.hidden(layer)

    def run(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run a layer of the receiver over all tokens, which appends K and V to the cache, and return what leaves it."""
        self._layers[layer] = empty_layer(self._decoder.windows[layer])
        return self._over.run(layer, hidden_states, self.cache)

    def reuse(self, layer: int) -> None:
        """Share the sender's K and V; in 8 bits, or rotated by another RoPE, they are decoded and rotated further."""
        kv, further = self._context.kv(layer), self._rerotation(layer)
        if kv.k_scale is None and not further:
            self._layers[layer] = shared_layer(kv.keys, kv.values, self._decoder.windows[layer], self._tokens)
        else:
            target = self._uninitialized(layer)
            splice(kv, target.keys, target.values, **further)

    def reuse_sinks(self, layer: int) -> None:
        """Reuse the sender's K and V of the first tokens of a layer that is filled already."""
        target = self._layers[layer]
        rows = target.keys.shape[2]
        count = sinks_among(rows, self._tokens)
        if not count:
            return
        kv, further = self._context.kv(layer).at(slice(count)), self._rerotation(layer)
        keys, values = target.keys[:, :, :count], target.values[:, :, :count]
        if kv.k_scale is None and not further:
            keys.copy_(kv.keys)  # a few rows of each layer, for which an operator's call would cost more than the work
            values.copy_(kv.values)
        else:
            of_sinks = {
                name: half.view(self._batch, rows, -1)[:, :count].flatten(0, 1) for name, half in further.items()
            }
            splice(kv, keys, values, **of_sinks)

    def band_end(self, layer: int, hidden_states: torch.Tensor) -> Projection:
        """To compute K and V of the last layer of a band from what enters it: nothing reads its output."""
        return self._projection(layer, hidden_states, self._decoder.prepared(layer, self._norm))

    def projected(self, layer: int) -> Projection:
        """To compute K and V of a layer with the receiver's own weights."""
        return self._from_hidden(layer, self._decoder.prepared(layer, self._norm))

    def fitted(self, layer: int, fitted: LayerMap) -> Projection:
        """To compute K and V of a layer with weights fitted to its hidden states, which have the norm's folded in."""
        weights = replace(self._decoder.plainly_normed(layer), **vars(fitted), k_low_rank=(), v_low_rank=())
        return self._from_hidden(layer, Prepared(weights, self._norm, weights.k_weight, weights.v_weight))

    def fitted_kv(self, layer: int, fitted: LayerMap) -> Projection:
        """To compute K and V of a layer with weights fitted to the sender's K and V."""
        weights = LayerWeights(norm_weight=None, norm_eps=0.0, k_norm_weight=None, k_norm_eps=0.0, **vars(fitted))
        prepared = Prepared(weights, self._norm, weights.k_weight, weights.v_weight)
        return self._projection(layer, self._context.unrotated(layer), prepared)

    def _from_hidden(self, layer: int, prepared: Prepared) -> Projection:
        hidden_states, rstd = self.hidden(layer), None
        if prepared.folded:
            # The context keeps what depends on it alone for all its receivers; embeddings are the receiver's own.
            eps = prepared.weights.norm_eps
            rstd = self._context.rstd(layer, eps) if layer else ops.rms_rstd(hidden_states, eps)
        return self._projection(layer, hidden_states, prepared, rstd)

    def _projection(
        self, layer: int, hidden_states: torch.Tensor, prepared: Prepared, rstd: torch.Tensor | None = None
    ) -> Projection:
        """To compute K and V of a layer, of the tokens that count, from what enters it at all of them or at these."""
        target = self._uninitialized(layer)
        return of_last_rows(hidden_states, prepared, self._over.rotation(layer), target.keys, target.values, rstd)

    def _uninitialized(self, layer: int) -> MixedLayer | MixedSlidingLayer:
        window, decoder = self._decoder.windows[layer], self._decoder
        shape = (self._batch, decoder.num_kv_heads, rows_held(self._tokens, window), decoder.head_dim)
        made = uninitialized_layer(shape, window, self._tokens, decoder.dtype, decoder.device)
        self._layers[layer] = made
        return made

    def _rerotation(self, layer: int) -> dict[str, torch.Tensor]:
        """cos and sin that rotate each row of the sender's K of a layer to the receiver's RoPE; none if they are equal."""
        applied = self._context.rotations[layer] if self._rerotates else None
        rotation = None if applied is None else self._over.rotation(layer)
        if applied is None or rotation is None:
            return {}
        if self._decoder.rope_varies and all(map(torch.equal, applied, rotation)):
            return {}
        rows = self._context.kv(layer).keys.shape[2]
        cos, sin = (last(half, rows) for half in ops.rotation_between(*applied, *rotation))
        return {"cos": cos.repeat(self._batch, 1), "sin": sin.repeat(self._batch, 1)}
