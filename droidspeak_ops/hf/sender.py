"""The sender's side: one pass over a context through the model's own layers, of which K/V and hidden states are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..context.context import SharedContext
from ..context.kv import KV
from .adapters import check_not_invoked
from .decoder import Decoder
from .passes import Pass


@torch.no_grad()
def capture(
    sender: PreTrainedModel, input_ids: torch.Tensor, *, layers: Sequence[int] = (), tokenizer: Any = None
) -> SharedContext:
    """Let the sender read a context, and keep what receivers need of it.

    The layers run one after another, without a hook on them: other threads may use the model meanwhile. Of the last layer only
    K and V are computed.

    Args:
        sender: a causal language model of a supported family.
        input_ids: int64 ``[B, T]`` on the sender's device, without padding.
        layers: where to keep hidden states, usually ``plan.hidden_layers(num_layers)``.
        tokenizer: the sender's tokenizer; its vocabulary becomes part of the context's identity.

    Returns:
        A context that owns its tensors. The sender's logits are not computed.

    Raises:
        UnsupportedModelError: the sender's family is not supported.
        ReuseError: an activated LoRA of the sender is invoked in the context.
        ValueError: `input_ids` or `layers` do not fit.
    """
    decoder = Decoder(sender)
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or input_ids.numel() == 0:
        raise ValueError(f"input_ids: expected int64 [B, T], got {input_ids.dtype} {tuple(input_ids.shape)}")
    placeholder = image_token(decoder.model.config)
    if placeholder is not None and bool((input_ids == placeholder).any()):
        raise ValueError(f"input_ids: expected text alone, got placeholders of an image (token {placeholder})")
    outside = [layer for layer in layers if not 0 <= layer < decoder.num_layers]
    if outside:
        raise ValueError(f"layers: expected layers of the sender, 0 to {decoder.num_layers - 1}, got {outside}")

    check_not_invoked(decoder.model, input_ids, tokens=input_ids.shape[1])
    over = Pass(decoder, input_ids.shape)
    cache = DynamicCache(config=decoder.config)
    states, kept, wanted = decoder.embed(input_ids), {}, set(layers)
    final = decoder.num_layers - 1
    for layer in range(decoder.num_layers):
        if layer in wanted:
            kept[layer] = states
        if layer < final:
            states = over.run(layer, states, cache)
    return SharedContext(
        tokens=input_ids.clone(),
        keys_values=[
            *(KV(_owned(layer.keys), _owned(layer.values)) for layer in cache.layers[:final]),
            over.project(final, states),  # nothing reads what its attention and MLP would give
        ],
        hidden_states=kept,
        rotations=[over.rotation(layer) for layer in range(decoder.num_layers)],
        sender=decoder.fingerprint(tokenizer, weights=True),
    )


def image_token(config: Any) -> int | None:
    """The token that stands for a part of an image in the prompts of a model that sees them."""
    names = ("image_token_id", "image_token_index")
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _owned(rows: torch.Tensor) -> torch.Tensor:
    """The rows in memory of their own: what a sliding window keeps is a view of all."""
    return rows if rows.untyped_storage().nbytes() == rows.nbytes else rows.clone()
