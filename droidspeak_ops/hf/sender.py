"""The sender's side: one ordinary forward pass, of which K/V and the hidden states at some layers are kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..context import SharedContext
from ..kv import KV
from .decoder import Decoder


@torch.no_grad()
def capture(
    sender: PreTrainedModel, input_ids: torch.Tensor, *, layers: Sequence[int] = (), tokenizer: Any = None
) -> SharedContext:
    """Let the sender read a context, and keep what receivers need of it.

    Args:
        sender: a causal language model of a supported family.
        input_ids: int64 ``[B, T]`` on the sender's device, without padding.
        layers: where to keep hidden states, usually ``plan.hidden_layers(num_layers)``.
        tokenizer: the sender's tokenizer; its vocabulary becomes part of the context's identity.

    Returns:
        A context that owns its tensors. The sender's logits are not computed.

    Raises:
        UnsupportedModelError: the sender's family is not supported.
        ValueError: `input_ids` or `layers` do not fit.
    """
    decoder = Decoder(sender)
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or input_ids.numel() == 0:
        raise ValueError(f"input_ids: got {input_ids.dtype} {tuple(input_ids.shape)}; int64 [B, T] is needed")
    outside = [layer for layer in layers if not 0 <= layer < decoder.num_layers]
    if outside:
        raise ValueError(f"layers: got {outside}; layers of the sender are 0 to {decoder.num_layers - 1}")

    hidden_states: dict[int, torch.Tensor] = {}
    this_pass = decoder.over(input_ids)
    cache = DynamicCache(config=decoder.config)
    with ExitStack() as hooks:
        for layer in layers:
            hook = _keep(hidden_states, layer)
            hooks.callback(decoder.layers[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
        decoder.base(input_ids=input_ids, past_key_values=cache, use_cache=True)
    return SharedContext(
        tokens=input_ids.clone(),
        keys_values=[KV(_owned(layer.keys), _owned(layer.values)) for layer in cache.layers],
        hidden_states=hidden_states,
        rotations=[this_pass.rotation(layer) for layer in range(decoder.num_layers)],
        sender=decoder.fingerprint(tokenizer, weights=True),
    )


def _owned(rows: torch.Tensor) -> torch.Tensor:
    """The rows in memory of their own: what a sliding window keeps is a view of all."""
    return rows if rows.untyped_storage().nbytes() == rows.nbytes else rows.clone()


def _keep(hidden_states: dict[int, torch.Tensor], layer: int) -> Any:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states[layer] = args[0] if args else kwargs["hidden_states"]

    return hook
