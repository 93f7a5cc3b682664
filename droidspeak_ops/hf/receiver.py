"""The receiver's side: fill its KV cache of a context from what a sender left, computing only what a plan asks for."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from .. import ops
from ..context import SharedContext, last
from ..fingerprint import ReuseError
from ..kv import splice
from ..maps import LayerMap, Maps, sinks_among
from ..plan import Plan
from .cache import MixedCache, MixedLayer, MixedSlidingLayer, empty_layer, rows_held, shared_layer, uninitialized_layer
from .decoder import Decoder
from .families import LayerWeights
from .project import Projection, project


@torch.no_grad()
def partial_prefill(
    receiver: PreTrainedModel,
    context: SharedContext,
    plan: Plan,
    *,
    prompt_ids: torch.Tensor | None = None,
    maps: Maps | None = None,
    tokenizer: Any = None,
    norm: Literal["hf", "folded"] = "hf",
) -> MixedCache:
    """Fill the receiver's KV cache of a context: bands are recomputed, projected layers projected, the rest reused.

    The receiver's suffix then runs through all its layers over this cache (paper, section 4), in one ordinary forward
    pass: ``receiver.generate(prompt_ids, past_key_values=cache)`` with the context's tokens at the head of `prompt_ids`.

    Args:
        receiver: a model of the sender's architecture; not changed.
        context: what :func:`capture` made.
        plan: which layers to recompute and project.
        prompt_ids: ``[B, N]``, the prompt that is to follow; checked to continue the context.
        maps: what :func:`fit` made of this pair. A layer that the plan projects is then filled as its choice says: projected
            with fitted weights, with the receiver's own, or reused; and bands start from corrected hidden states. For a
            context unlike those that the maps were fitted to, all those layers are reused, with a warning.
        tokenizer: the receiver's tokenizer, compared with the sender's if that was given to :func:`capture`.
        norm: ``"hf"`` for transformers' rounding order, in which recomputing all layers is bitwise the receiver's own
            prefill on the CPU in float32; ``"folded"`` for one rounding fewer (see :func:`droidspeak_ops.ops.kv_project`).

    Returns:
        A transformers cache of T tokens. Reused layers share the context's tensors until something is appended.

    Raises:
        ReuseError: sender and receiver do not fit, hidden states are missing, the maps are those of another pair, or the
            prompt does not continue the context.
        UnsupportedModelError: the receiver's family is not supported.
        ValueError: the plan names layers that the receiver does not have, or `norm` is none of the two.
    """
    decoder = Decoder(receiver)
    roles = plan.roles(decoder.num_layers)
    if norm not in ("hf", "folded"):
        raise ValueError(f"norm: got {norm!r}; 'hf' or 'folded' is needed")
    ours = decoder.fingerprint(tokenizer, weights=maps is not None)
    context.sender.check_reuse_by(ours)
    device = decoder.model.device
    if context.tokens.device != device:
        raise ReuseError(f"context: on {context.tokens.device}; {device}, the receiver's device, is needed")
    if maps is not None:
        maps.check_pair(context.sender, ours)
        mapped = maps.roles(plan, context.hidden_layers)
        if mapped == roles and not any(start in maps.corrections for start, _ in plan.bands):
            maps = None  # for nothing that the plan asks for
        elif (distance := maps.domain.distance(context)) <= maps.domain.limit:
            roles = mapped
        else:
            warnings.warn(
                f"maps: not used for a context unlike those they were fitted to (distance {distance:.2f}; up to "
                f"{maps.domain.limit:.2f} is alike): the layers that they are for are reused",
                stacklevel=3,  # of the caller of what torch.no_grad wraps
            )
            maps = None  # layer 0 is projected from the receiver's own embeddings, which is exact
            roles = tuple("reuse" if role == "project" and layer else role for layer, role in enumerate(roles))
    context.check_hidden(plan.hidden_layers_of(roles))
    if prompt_ids is not None:
        context.check_prompt(prompt_ids)

    filling = _Filling(decoder, context, rotates_on=context.sender.rope != ours.rope)
    norm_order = decoder.family.norm_order
    for start, end in plan.bands:
        hidden_states = filling.hidden(start)
        if maps is not None and start in maps.corrections:
            hidden_states = maps.corrections[start].corrected(hidden_states)
        for layer in range(start, end - 1):
            hidden_states = filling.over.run(layer, hidden_states, filling.cache)
        # Nothing reads the output of a band's last layer.
        project([filling.projection(end - 1, hidden_states, decoder.weights(end - 1))], norm_order, norm)
    projections = []
    for layer, role in enumerate(roles):
        if role == "reuse":
            filling.reuse(layer)
        elif role == "project":
            projections.append(filling.projection(layer, filling.hidden(layer), decoder.weights(layer)))
        elif role != "recompute":
            assert maps is not None
            projections.append(filling.fitted(layer, maps.layers[layer, role], of_kv=role == "fitted_kv"))
    project(projections, norm_order, norm)
    for layer, role in enumerate(roles):
        if role in ("fitted", "fitted_kv"):
            filling.reuse_sinks(layer)
    return filling.cache


class _Filling:
    """A receiver's cache of one context, and how each of its layers is filled."""

    def __init__(self, decoder: Decoder, context: SharedContext, *, rotates_on: bool) -> None:
        self._decoder, self._context, self._rotates_on = decoder, context, rotates_on
        self.over = decoder.over(context.tokens)
        self._batch, self._tokens = context.tokens.shape
        self._layers = [empty_layer(window) for window in decoder.windows]
        self.cache = MixedCache(self._layers, context.tokens, None, decoder.model)

    def hidden(self, layer: int) -> torch.Tensor:
        """What enters a layer: the sender's hidden states, or the receiver's own embeddings."""
        return self._decoder.embed(self._context.tokens) if layer == 0 else self._context.hidden(layer)

    def reuse(self, layer: int) -> None:
        """Share the sender's K and V; in 8 bits, or rotated by another RoPE, they are decoded and rotated on."""
        kv, further = self._context.kv(layer), self._rotation_on(layer)
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
        kv, further = self._context.kv(layer).at(slice(count)), self._rotation_on(layer)
        keys, values = target.keys[:, :, :count], target.values[:, :, :count]
        if kv.k_scale is None and not further:
            keys.copy_(kv.keys)  # a few rows of each layer, for which an operator's call would cost more than the work
            values.copy_(kv.values)
        else:
            of_sinks = {
                name: half.view(self._batch, rows, -1)[:, :count].flatten(0, 1) for name, half in further.items()
            }
            splice(kv, keys, values, **of_sinks)

    def projection(self, layer: int, hidden_states: torch.Tensor, weights: LayerWeights) -> Projection:
        """To compute K and V of a layer, of the tokens that count, from the hidden states that enter it."""
        target, rotation = self._uninitialized(layer), self.over.rotation(layer)
        rows = target.keys.shape[2]
        return Projection(
            hidden_states.narrow(1, hidden_states.shape[1] - rows, rows),
            weights,
            None if rotation is None else (last(rotation[0], rows), last(rotation[1], rows)),
            target.keys,
            target.values,
        )

    def fitted(self, layer: int, fitted: LayerMap, *, of_kv: bool) -> Projection:
        """To compute K and V of a layer with fitted weights, from its hidden states or from the sender's K and V."""
        if of_kv:
            weights = LayerWeights(norm_weight=None, norm_eps=0.0, k_norm_weight=None, k_norm_eps=0.0, **vars(fitted))
            return self.projection(layer, self._context.unrotated(layer), weights)
        weights = replace(self._decoder.plainly_normed(layer), **vars(fitted), k_low_rank=(), v_low_rank=())
        return self.projection(layer, self.hidden(layer), weights)

    def _uninitialized(self, layer: int) -> MixedLayer | MixedSlidingLayer:
        window, decoder = self._decoder.windows[layer], self._decoder
        shape = (self._batch, decoder.num_kv_heads, rows_held(self._tokens, window), decoder.head_dim)
        made = uninitialized_layer(shape, window, self._tokens, decoder.model.dtype, decoder.model.device)
        self._layers[layer] = made
        return made

    def _rotation_on(self, layer: int) -> dict[str, torch.Tensor]:
        """By what the sender's K of a layer is to be rotated on, for each of its rows."""
        applied, rotation = self._context.rotations[layer], self.over.rotation(layer)
        if not self._rotates_on or applied is None or rotation is None:
            return {}
        rows = self._context.kv(layer).keys.shape[2]
        cos, sin = (last(half, rows) for half in ops.rotation_between(*applied, *rotation))
        return {"cos": cos.repeat(self._batch, 1), "sin": sin.repeat(self._batch, 1)}
