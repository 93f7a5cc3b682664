"""Token-selective recompute, in the manner of CacheBlend (arXiv 2405.16444): what else the same time could buy.

The first layer runs over all tokens. Those whose K and V then differ most from the sender's at the second layer run through all
layers, attending to the sender's K and V with their own in place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

import droidspeak_ops as ds
from droidspeak_ops.hf.decoder import Decoder
from droidspeak_ops.hf.passes import Pass


class _Replaced(DynamicLayer):
    """K and V of a context, of which new ones take the place at some tokens."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, chosen: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self._chosen = keys.clone(), values.clone(), chosen

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.keys[:, :, self._chosen], self.values[:, :, self._chosen] = key_states, value_states
        return self.keys, self.values


@torch.no_grad()
def token_selective_prefill(receiver: Any, context: ds.SharedContext, layers_run: int) -> Cache:
    """Return a cache of the context, at the cost of so many layers that run over all tokens.

    Args:
        receiver: a model of full attention in every layer.
        context: of one sequence.
        layers_run: two or more, of which one is the first.
    """
    decoder = Decoder(receiver)
    depth, tokens = decoder.num_layers, context.tokens.shape[1]
    first = Cache(layers=[DynamicLayer() for _ in range(depth)])
    states = Pass(decoder, context.tokens.shape).run(0, decoder.embed(context.tokens), first)
    entering = replace(context, hidden_states={1: states})
    theirs, own = context.kv(1), ds.partial_prefill(receiver, entering, ds.Plan([(1, 2)])).layers[1]
    apart = (own.values - theirs.values).square().sum((0, 1, 3)) + (own.keys - theirs.keys).square().sum((0, 1, 3))
    count = max(1, round(tokens * (layers_run - 1) / (depth - 1)))
    chosen = apart.topk(min(count, tokens)).indices.sort().values

    def before(window: int | None) -> torch.Tensor:
        return torch.arange(tokens, device=chosen.device) <= chosen[:, None]

    cache = Cache(layers=[_Replaced(*context.kv(layer)[:2], chosen) for layer in range(depth)])
    cache.layers[0] = first.layers[0]
    over, states = Pass(decoder, (1, len(chosen)), positions=chosen, visible=before), states[:, chosen]
    for layer in range(1, depth):
        states = over.run(layer, states, cache)
    return DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
