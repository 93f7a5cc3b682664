"""vLLM's pages as partial prefill fills them: the receiver's own layers over a context, and the slots behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from ..context.context import Rotation
from ..context.kv import KV
from ..ops.checks import NormOrder
from ..prefill.fill import Destination
from ..prefill.weights import LayerWeights, Norm, Prepared, prepare
from .loader import LoadedModel


class PagedLayers:
    """:class:`droidspeak_ops.prefill.fill.Layers` of a model of vLLM's, on one rank: K and V are those of the rank's heads.

    Projected layers go into dense buffers first, and from there into the pages (:meth:`flush`): how a page is laid out is the
    attention backend's own. On a CPU it packs K by instruction set, and only its own writing does that.

    Args:
        model: the receiver.
        tokens: int64 ``[1, T]``, the context.
        slots: int64 ``[T]``, the slot of each token; -1 where there is none to be filled.
        chunk: number of tokens that run through a layer together.
    """

    norm_order: NormOrder = "llama"
    rope_varies = False

    def __init__(self, model: LoadedModel, tokens: torch.Tensor, slots: torch.Tensor, chunk: int) -> None:
        self._model, self._tokens, self._chunk = model, tokens, chunk
        self._rows = (slots >= 0).nonzero().flatten()
        self._slots = slots[self._rows]
        self._in_order = torch.arange(tokens.shape[1], device=tokens.device)
        self._dense: dict[int, Destination] = {}

    def embed(self) -> torch.Tensor:
        return self._model.embed(self._tokens[0])[None]

    def run(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run a layer in chunks of tokens, and return what leaves it; its K and V go into the pages."""
        module = self._model.layers[layer]
        dense = self._empty(layer)
        left = torch.empty_like(hidden_states)
        with _attending(module.self_attn.attn, dense):
            for positions in self._in_order.split(self._chunk):
                # Norms of vLLM's add the residual in place, to what may be the context's own tensor.
                entering = hidden_states[0, positions]
                added, residual = module(positions, entering, None)
                left[0, positions] = added + residual
        self._write(layer, dense.k_cache, dense.v_cache)
        return left

    def is_its_weights(self, layer: int) -> bool:
        return True

    def rotation(self, layer: int) -> Rotation | None:
        return self._model.rotation(layer, self._tokens.shape[1])

    def prepared(self, layer: int, norm: Norm) -> Prepared:
        return prepare(self._model.weights[layer], self.norm_order, norm)

    def plainly_normed(self, layer: int) -> LayerWeights:
        return self._model.plainly_normed(layer)

    def share(self, layer: int, kv: KV) -> bool:
        self._write(layer, kv.keys, kv.values)
        return True

    def destination(self, layer: int) -> Destination:
        self._dense[layer] = self._empty(layer)
        return self._dense[layer]

    def flush(self) -> None:
        """Write into the pages what was projected."""
        while self._dense:
            layer, dense = self._dense.popitem()
            self._write(layer, dense.k_cache, dense.v_cache)

    def _empty(self, layer: int) -> Destination:
        attention, tokens = self._model.layers[layer].self_attn.attn, self._tokens.shape[1]
        shape = 1, attention.num_kv_heads, tokens, attention.head_size
        like = self._model.weights[layer].k_weight
        return Destination(like.new_empty(shape), like.new_empty(shape), self._in_order)

    def _write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write K and V ``[1, K, T, D]`` of the tokens that have slots."""
        attention = self._model.layers[layer].self_attn.attn
        rows = [part[0].transpose(0, 1)[self._rows] for part in (keys, values)]
        attention.impl.do_kv_cache_update(attention, *rows, attention.kv_cache, self._slots)


@contextmanager
def _attending(attention: Any, dense: Destination) -> Iterator[None]:
    """Have an attention module of vLLM's store K and V densely, and see those alone, as its calls follow one another."""
    k_cache, v_cache, _ = dense
    done = 0

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        nonlocal done
        q, k, v = (
            rows.view(rows.shape[0], -1, attention.head_size).transpose(0, 1)[None] for rows in (query, key, value)
        )
        start, done = done, done + key.shape[0]
        k_cache[:, :, start:done], v_cache[:, :, start:done] = k, v
        mask = None
        if start:
            places = torch.arange(done, device=key.device)
            mask = places[None] <= places[start:, None]
        k, v = k_cache[:, :, :done], v_cache[:, :, :done]
        scale = attention.impl.scale
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(query.shape)

    attention.forward = forward
    try:
        yield
    finally:
        del attention.forward
