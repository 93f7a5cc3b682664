"""A transformers cache as partial prefill fills it: the receiver's own layers over a context, and the cache behind them."""

from __future__ import annotations

from typing import Any

import torch

from ..context.context import Rotation
from ..context.kv import KV
from ..prefill.fill import Destination
from ..prefill.weights import LayerWeights, Norm, Prepared
from .cache import MixedCache, empty_layer, rows_held, shared_layer, uninitialized_layer
from .decoder import Decoder
from .passes import Pass


class CacheLayers:
    """:class:`droidspeak_ops.prefill.fill.Layers` of a transformers model.

    Args:
        decoder: the receiver.
        tokens: int64 ``[B, T]``, the context.
    """

    def __init__(self, decoder: Decoder, tokens: torch.Tensor) -> None:
        self._decoder, self._tokens = decoder, tokens
        self._over = Pass(decoder, tokens.shape)
        self._layers: list[Any] = [None] * decoder.num_layers
        self._slots: dict[int, torch.Tensor] = {}
        self.norm_order = decoder.family.norm_order
        self.cache = MixedCache(self._layers, tokens, None, decoder)

    @property
    def rope_varies(self) -> bool:
        return self._decoder.rope_varies

    def embed(self) -> torch.Tensor:
        return self._decoder.embed(self._tokens)

    def run(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        self._layers[layer] = empty_layer(self._decoder.windows[layer])
        return self._over.run(layer, hidden_states, self.cache)

    def rotation(self, layer: int) -> Rotation | None:
        return self._over.rotation(layer)

    def prepared(self, layer: int, norm: Norm) -> Prepared:
        return self._decoder.prepared(layer, norm)

    def plainly_normed(self, layer: int) -> LayerWeights:
        return self._decoder.plainly_normed(layer)

    def is_its_weights(self, layer: int) -> bool:
        return self._decoder.is_its_weights[layer]

    def share(self, layer: int, kv: KV) -> bool:
        window, tokens = self._decoder.windows[layer], self._tokens.shape[1]
        self._layers[layer] = shared_layer(kv.keys, kv.values, window, tokens)
        return True

    def destination(self, layer: int) -> Destination:
        (batch, tokens), decoder, window = self._tokens.shape, self._decoder, self._decoder.windows[layer]
        rows = rows_held(tokens, window)
        shape = (batch, decoder.num_kv_heads, rows, decoder.head_dim)
        made = uninitialized_layer(shape, window, tokens, decoder.dtype, decoder.device)
        self._layers[layer] = made
        if rows not in self._slots:
            self._slots[rows] = torch.arange(batch * rows, device=decoder.device)
        return Destination(made.keys, made.values, self._slots[rows])
