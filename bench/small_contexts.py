"""Small random contexts, which no model made, for stores of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

import droidspeak_ops as ds
from droidspeak_ops.context.kv import KV

LAYERS, HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 3, 2, 4, 16, 50


def make_sender(
    windows: Sequence[int | None] = (None,) * LAYERS, *, rope_type: str = "default", weights: str = "0" * 64
) -> ds.Fingerprint:
    """Return the fingerprint of a sender of three layers."""
    sizes = {
        "model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 4,
        "num_key_value_heads": HEADS, "vocab_size": VOCABULARY, "head_dim": HEAD_DIM, "sliding_windows": list(windows),
    }  # fmt: skip
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "applied": "0" * 64}
    return ds.Fingerprint(sizes, rope, "float32", weights, f"{VOCABULARY}:{'0' * 64}")


SENDER = make_sender()


def make_tokens(length: int, seed: int = 0) -> torch.Tensor:
    """Return random tokens ``[1, length]``, the same at every call."""
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def make_context(
    tokens: torch.Tensor, sender: ds.Fingerprint = SENDER, layers: tuple[int, ...] = (1,)
) -> ds.SharedContext:
    """Return a context of two layers with one rotation, and one with another."""
    length = tokens.shape[1]
    generator = torch.Generator().manual_seed(int(tokens.sum()))
    rows = torch.randn(length, LAYERS, 2, HEADS, HEAD_DIM, generator=generator)
    states = torch.randn(length, LAYERS, HIDDEN, generator=generator)
    held = [length if window is None else min(length, window - 1) for window in sender.architecture["sliding_windows"]]
    keys_values = [
        KV(*(half.transpose(0, 1)[None, :, length - count :].contiguous() for half in rows[:, layer].unbind(1)))
        for layer, count in enumerate(held)
    ]
    one, other = (torch.arange(length)[:, None] * torch.tensor([1.0, base]) for base in (0.5, 0.25))
    rotations = [(each.cos(), each.sin()) for each in (one, other)]
    hidden = {layer: states[None, :, layer].contiguous() for layer in layers}
    return ds.SharedContext(tokens, keys_values, hidden, [rotations[0], rotations[1], rotations[0]], sender)


def head(context: ds.SharedContext, length: int) -> ds.SharedContext:
    """Return the first tokens of a context without windows."""
    return dataclasses.replace(
        context,
        tokens=context.tokens[:, :length],
        keys_values=[kv.at(slice(length)) for kv in context.keys_values],
        hidden_states={
            layer: states[:, :length] if isinstance(states, torch.Tensor) else states.at(slice(length))
            for layer, states in context.hidden_states.items()
        },
        rotations=[each and (each[0][:length], each[1][:length]) for each in context.rotations],
    )
