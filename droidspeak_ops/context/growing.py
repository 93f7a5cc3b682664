"""K and V that grow in place: buffers with room, and views of their filled part."""

from __future__ import annotations

import torch

HEADROOM = 256
"""Tokens that K and V can grow by before they are moved to larger buffers."""


class GrowingKV:
    """The buffers behind a layer's K and V ``[B, K, T, D]``, of which the owner keeps views.

    Without buffers the owner's tensors may be somebody else's: they are copied when they first grow, and never written to.
    """

    def __init__(self) -> None:
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def is_shared(self) -> bool:
        """True while no buffers are held, and so the owner's tensors are not written to."""
        return self._buffers is None

    def allocate(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of a shape ``[B, K, T, D]`` with room to grow, to be written by the caller."""
        batch, heads, tokens, head_dim = shape
        with_room = batch, heads, tokens + HEADROOM, head_dim
        self._buffers = keys, values = _allocated(with_room, dtype, device), _allocated(with_room, dtype, device)
        return keys[:, :, :tokens], values[:, :, :tokens]

    def grow(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of `tokens` tokens that begin with `keys` and `values`, which are moved if there is no room for more."""
        if not (self._buffers and all(map(_has_room, self._buffers, (keys, values), (tokens, tokens)))):
            self._buffers = (_with_room(keys, tokens), _with_room(values, tokens))
        k_buffer, v_buffer = self._buffers
        return k_buffer.narrow(2, 0, tokens), v_buffer.narrow(2, 0, tokens)

    def share(self) -> None:
        """Let go of the buffers: the owner's tensors are not to be written to any more."""
        self._buffers = None


def _has_room(buffer: torch.Tensor, view: torch.Tensor, tokens: int) -> bool:
    # Operations such as the reordering of beams replace the view by a tensor of its own; the buffer is stale then.
    same_memory = view.data_ptr() == buffer.data_ptr() and view.stride() == buffer.stride()
    return same_memory and tokens <= buffer.shape[2] and view.shape[:2] == buffer.shape[:2]


def _with_room(filled: torch.Tensor, tokens: int) -> torch.Tensor:
    batch, heads, length, head_dim = filled.shape
    buffer = _allocated((batch, heads, tokens + HEADROOM, head_dim), filled.dtype, filled.device)
    buffer.narrow(2, 0, length).copy_(filled)
    return buffer


def _allocated(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that can be written to both in inference mode and outside of it."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)
