"""The receiver's side: fill its KV cache of a context from what a sender left, computing only what a plan asks for."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from .. import ops
from ..context import SharedContext
from ..fingerprint import ReuseError
from ..plan import Plan
from .cache import MixedCache, MixedLayer
from .families import Decoder


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
    context.sender.check_reuse_by(decoder.fingerprint(tokenizer, weights=False))
    context.check_hidden(plan.hidden_layers(decoder.num_layers))
    if context.tokens.device != receiver.device:
        raise ReuseError(f"context: on {context.tokens.device}; {receiver.device}, the receiver's device, is needed")
    if prompt_ids is not None:
        context.check_prompt(prompt_ids)

    batch, tokens = context.tokens.shape
    shape = (batch, decoder.num_kv_heads, tokens, decoder.head_dim)
    cache = MixedCache(
        [
            MixedLayer.shared(*context.kv(layer)) if role == "reuse" else MixedLayer()
            for layer, role in enumerate(roles)
        ],
        context,
        receiver,
    )
    if all(role == "reuse" for role in roles):
        return cache

    def hidden(layer: int) -> torch.Tensor:
        return decoder.embed(context.tokens) if layer == 0 else context.hidden(layer)

    positions = decoder.positions(context.tokens)
    slots = torch.arange(batch * tokens, device=receiver.device)
    cos, sin = (_per_token(half, batch) for half in positions["position_embeddings"])

    def project(hidden_states: dict[int, torch.Tensor]) -> None:
        """Compute the K and V of layers from the hidden states that enter them."""
        weights = [decoder.weights(layer) for layer in hidden_states]
        k_weights, v_weights = [each.k_weight for each in weights], [each.v_weight for each in weights]
        if norm == "folded":
            k_weights = [ops.fold_norm_weight(each.k_weight, each.norm_weight) for each in weights]
            v_weights = [ops.fold_norm_weight(each.v_weight, each.norm_weight) for each in weights]
        targets = [MixedLayer.uninitialized(shape, receiver.dtype, receiver.device) for _ in weights]
        ops.kv_project_layers(
            list(hidden_states.values()), k_weights, v_weights,
            [target.keys for target in targets], [target.values for target in targets], slots,
            norm=norm, norm_weights=[each.norm_weight for each in weights] if norm == "hf" else [],
            norm_eps=weights[0].norm_eps, k_biases=[each.k_bias for each in weights if each.k_bias is not None],
            v_biases=[each.v_bias for each in weights if each.v_bias is not None],
            k_norm_weights=[each.k_norm_weight for each in weights if each.k_norm_weight is not None],
            head_norm_eps=weights[0].k_norm_eps,
            coses=[cos] * len(weights), sines=[sin] * len(weights),
        )  # fmt: skip
        for layer, target in zip(hidden_states, targets, strict=True):
            cache.layers[layer] = target

    for start, end in plan.bands:
        hidden_states = hidden(start)
        for layer in range(start, end - 1):
            hidden_states = decoder.run(layer, hidden_states, positions, cache)
        project({end - 1: hidden_states})  # nothing reads the output of a band's last layer
    if projected := [layer for layer, role in enumerate(roles) if role == "project"]:
        project({layer: hidden(layer) for layer in projected})
    return cache


def _per_token(rotary: torch.Tensor, batch: int) -> torch.Tensor:
    """cos or sin from ``rotary_emb``, ``[1, T, R]`` with both halves equal, as ``[B * T, R / 2]``."""
    half = rotary[..., : rotary.shape[-1] // 2]
    return half.expand(batch, -1, -1).reshape(-1, half.shape[-1])
