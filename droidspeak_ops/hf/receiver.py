"""The receiver's side: fill its KV cache of a context from what a sender left, computing only what a plan asks for."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from .. import ops
from ..context import SharedContext
from ..fingerprint import ReuseError
from ..kv import splice
from ..plan import Plan
from .cache import MixedCache, MixedLayer, MixedSlidingLayer, empty_layer, rows_held, shared_layer, uninitialized_layer
from .decoder import Decoder
from .project import Projection, project


@torch.no_grad()
def partial_prefill(
    receiver: PreTrainedModel,
    context: SharedContext,
    plan: Plan,
    *,
    prompt_ids: torch.Tensor | None = None,
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
        tokenizer: the receiver's tokenizer, compared with the sender's if that was given to :func:`capture`.
        norm: ``"hf"`` for transformers' rounding order, in which recomputing all layers is bitwise the receiver's own
            prefill on the CPU in float32; ``"folded"`` for one rounding fewer (see :func:`droidspeak_ops.ops.kv_project`).

    Returns:
        A transformers cache of T tokens. Reused layers share the context's tensors until something is appended.

    Raises:
        ReuseError: sender and receiver do not fit, hidden states are missing, or the prompt does not continue the context.
        UnsupportedModelError: the receiver's family is not supported.
        ValueError: the plan names layers that the receiver does not have, or `norm` is none of the two.
    """
    decoder = Decoder(receiver)
    roles = plan.roles(decoder.num_layers)
    if norm not in ("hf", "folded"):
        raise ValueError(f"norm: got {norm!r}; 'hf' or 'folded' is needed")
    ours = decoder.fingerprint(tokenizer, weights=False)
    context.sender.check_reuse_by(ours)
    context.check_hidden(plan.hidden_layers(decoder.num_layers))
    device = decoder.model.device
    if context.tokens.device != device:
        raise ReuseError(f"context: on {context.tokens.device}; {device}, the receiver's device, is needed")
    if prompt_ids is not None:
        context.check_prompt(prompt_ids)

    batch, tokens = context.tokens.shape
    this_pass = decoder.over(context.tokens)
    rope_differs = context.sender.rope != ours.rope
    layers = [empty_layer(window) for window in decoder.windows]
    cache = MixedCache(layers, context.tokens, None, decoder.model)

    def uninitialized(layer: int) -> MixedLayer | MixedSlidingLayer:
        window = decoder.windows[layer]
        shape = (batch, decoder.num_kv_heads, rows_held(tokens, window), decoder.head_dim)
        return uninitialized_layer(shape, window, tokens, decoder.model.dtype, device)

    def reuse(layer: int) -> None:
        kv, applied, rotation = context.kv(layer), context.rotations[layer], this_pass.rotation(layer)
        further = {}
        if rope_differs and applied is not None and rotation is not None:
            cos, sin = (_last(half, kv.keys.shape[2]) for half in ops.rotation_between(*applied, *rotation))
            further = {"cos": cos.repeat(batch, 1), "sin": sin.repeat(batch, 1)}
        if kv.k_scale is None and not further:
            layers[layer] = shared_layer(kv.keys, kv.values, decoder.windows[layer], tokens)
        else:
            target = layers[layer] = uninitialized(layer)
            splice(kv, target.keys, target.values, **further)

    def projection(layer: int, hidden_states: torch.Tensor) -> Projection:
        """To compute K and V of a layer, of the tokens that count, from the hidden states that enter it."""
        target = layers[layer] = uninitialized(layer)
        rows, rotation = target.keys.shape[2], this_pass.rotation(layer)
        return Projection(
            hidden_states[:, tokens - rows :],
            decoder.weights(layer),
            None if rotation is None else (_last(rotation[0], rows), _last(rotation[1], rows)),
            target.keys,
            target.values,
        )

    def hidden(layer: int) -> torch.Tensor:
        return decoder.embed(context.tokens) if layer == 0 else context.hidden(layer)

    norm_order = decoder.family.norm_order
    for start, end in plan.bands:
        hidden_states = hidden(start)
        for layer in range(start, end - 1):
            hidden_states = this_pass.run(layer, hidden_states, cache)
        # Nothing reads the output of a band's last layer.
        project([projection(end - 1, hidden_states)], norm_order, norm)
    projected = [layer for layer, role in enumerate(roles) if role == "project"]
    project([projection(layer, hidden(layer)) for layer in projected], norm_order, norm)
    for layer, role in enumerate(roles):
        if role == "reuse":
            reuse(layer)
    return cache


def _last(rows: torch.Tensor, count: int) -> torch.Tensor:
    return rows[rows.shape[0] - count :]
