"""Checks of the parts of a context, by its tokens and by who made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..ops.checks import FLOATS
from .fingerprint import Fingerprint
from .kv import KV, check_rows, grouped_shape

SINKS = 4
"""Number of attention sinks: the first tokens of a context, whose activations are unlike all others and are not mapped."""


def sinks_among(rows: int, tokens: int) -> int:
    """Count the attention sinks among the last `rows` of a context's `tokens`: fewer, or none, behind a sliding window."""
    return min(max(SINKS - (tokens - rows), 0), rows)


class Arriving:
    """K and V, or hidden states, of layers that are still being read: each is checked when it has arrived."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Shapes, dtypes and device that K/V, hidden states and rotations of a context must have.

    Args:
        tokens: int64 ``[B, T]``; all parts lie on their device.
        sender: who made the context.
        num_layers, num_kv_heads, head_dim: sizes of its K and V.
    """

    tokens: torch.Tensor
    sender: Fingerprint
    num_layers: int
    num_kv_heads: int
    head_dim: int

    def check_kv(self, layer: int, kv: KV) -> None:
        """Raise a ValueError, which names layer and part, unless K and V of a layer are such."""
        batch, tokens = self.tokens.shape
        if kv.keys.dim() != 4:
            raise ValueError(f"layer {layer}: expected keys [B, K, N, D], got {tuple(kv.keys.shape)}")
        rows, windows = kv.keys.shape[2], self.sender.architecture.get("sliding_windows")
        if not 0 < rows <= tokens:
            raise ValueError(f"layer {layer}: expected keys of 1 to {tokens} tokens, got {rows}")
        if isinstance(windows, Sequence) and len(windows) == self.num_layers:
            # One place of a window is the next token's own.
            held = min(tokens, windows[layer] - 1) if isinstance(windows[layer], int) else tokens
            if rows != held:
                raise ValueError(f"layer {layer}: expected keys of {held} tokens by its sliding window, got {rows}")
        shape = batch, self.num_kv_heads, rows, self.head_dim
        check_rows(f"layer {layer}", kv, shape, self.sender.torch_dtype, self.tokens.device)

    def check_sinks(self, kv: KV) -> None:
        """Raise a ValueError, which names the part, unless K and V of the sinks of all layers, heads side by side, are such."""
        batch, tokens = self.tokens.shape
        shape = batch, self.num_layers * self.num_kv_heads, min(SINKS, tokens), self.head_dim
        check_rows("sinks", kv, shape, self.sender.torch_dtype, self.tokens.device)

    def check_hidden(self, layer: int, states: torch.Tensor | KV) -> None:
        """Raise a ValueError, which names layer and part, unless hidden states, which may be in 8 bits, are such."""
        where, columns = f"hidden states of layer {layer}", self.sender.size("hidden_size")
        if isinstance(states, torch.Tensor):
            shape = (*self.tokens.shape, states.shape[-1] if states.dim() and columns is None else columns)
            if states.shape != shape or states.dtype != self.sender.torch_dtype:
                found = f"{states.dtype} {tuple(states.shape)}"
                raise ValueError(f"{where}: expected {self.sender.torch_dtype} {shape}, got {found}")
            if states.device != self.tokens.device:
                raise ValueError(f"{where}: expected {self.tokens.device}, as the tokens, got {states.device}")
            return
        batch, tokens = self.tokens.shape
        if columns is None:
            columns = 2 * states.keys.shape[1] * states.keys.shape[-1] if states.keys.dim() == 4 else 0
        check_rows(where, states, grouped_shape(batch, tokens, columns), None, self.tokens.device)

    def check_rotation(self, rotation: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Raise a ValueError unless cos and sin are a row for each token, of no more columns than a head has pairs."""
        tokens, pairs = self.tokens.shape[1], self.head_dim // 2
        for name, half in zip(("cos", "sin"), rotation, strict=True):
            fits = half.dim() == 2 and half.shape[0] == tokens and 0 < half.shape[1] <= pairs and half.dtype in FLOATS
            if not fits or (half.shape, half.dtype) != (rotation[0].shape, rotation[0].dtype):
                found = f"{half.dtype} {tuple(half.shape)}"
                raise ValueError(f"rotations: expected {name} to be floating ({tokens}, 1 to {pairs}), got {found}")
            if half.device != self.tokens.device:
                raise ValueError(f"rotations: expected {name} on {self.tokens.device}, got {half.device}")
