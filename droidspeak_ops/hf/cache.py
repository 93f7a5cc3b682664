"""The transformers cache that partial prefill fills: preallocated layers that grow in place, and layers that are shared.

This is the only module that depends on transformers' cache classes.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from ..context import SharedContext

HEADROOM = 256
"""Tokens that a layer can grow by before it is moved to a larger buffer."""


class MixedLayer(DynamicLayer):
    """K/V of one layer, a view of the filled part of a buffer that has room to grow.

    Where transformers' dynamic layer copies all tokens at every step, new tokens are written in place. A shared layer
    starts as somebody else's tensors, which are copied when the first token is appended and never written to.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def shared(cls, keys: torch.Tensor, values: torch.Tensor) -> MixedLayer:
        """A layer over K and V ``[B, K, T, D]`` that belong to others."""
        layer = cls()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        return layer

    @classmethod
    def uninitialized(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> MixedLayer:
        """A layer of T tokens ``[B, K, T, D]`` whose `keys` and `values` are to be written by the caller."""
        batch, heads, tokens, head_dim = shape
        empty = torch.empty((batch, heads, 0, head_dim), dtype=dtype, device=device)
        layer = cls()
        layer.lazy_initialization(empty, empty)
        layer._grow(tokens)
        return layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append K and V ``[B, K, N, D]``; return all tokens, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[2]
        self._grow(start + key_states.shape[2])
        self.keys[:, :, start:].copy_(key_states)
        self.values[:, :, start:].copy_(value_states)
        return self.keys, self.values

    def _grow(self, tokens: int) -> None:
        """Make `keys` and `values` views of `tokens` tokens, keeping what they hold; move to a new buffer if need be."""
        if not (self._buffers and all(map(_has_room, self._buffers, (self.keys, self.values), (tokens, tokens)))):
            self._buffers = (_with_room(self.keys, tokens), _with_room(self.values, tokens))
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self._buffers)

    def reset(self) -> None:
        # Not the inherited one, which in older versions zeroes the tensors in place: they may be shared.
        self.__init__()  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> MixedLayer:
        other = type(self)()
        state = dict(self.__dict__)
        if self._buffers is None:  # shared tensors are never written to, so the copy may share them too
            memo.update((id(tensor), tensor) for tensor in (self.keys, self.values))
        other.__dict__.update(copy.deepcopy(state, memo))
        return other


def _has_room(buffer: torch.Tensor, view: torch.Tensor, tokens: int) -> bool:
    # Inherited operations such as beam reordering replace the view by a tensor of its own; the buffer is stale then.
    return (
        view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        and view.storage_offset() == buffer.storage_offset()
        and view.stride() == buffer.stride()
        and view.shape[:2] == buffer.shape[:2]
        and tokens <= buffer.shape[2]
    )


def _with_room(filled: torch.Tensor, tokens: int) -> torch.Tensor:
    batch, heads, length, head_dim = filled.shape
    buffer = torch.empty((batch, heads, tokens + HEADROOM, head_dim), dtype=filled.dtype, device=filled.device)
    buffer[:, :, :length].copy_(filled)
    return buffer


class MixedCache(Cache):
    """A receiver's KV cache of a context, part its own and part the sender's; for ``past_key_values``.

    It approximates what the receiver would have computed. ``generate`` cannot see which tokens a cache stands for, so
    :meth:`check_prompt` says whether a prompt continues them.
    """

    layers: list[MixedLayer]

    def __init__(self, layers: list[MixedLayer], context: SharedContext, receiver: PreTrainedModel) -> None:
        super().__init__(layers=layers)
        self.context = context
        self._receiver = weakref.ref(receiver)

    def check_prompt(self, prompt_ids: torch.Tensor) -> None:
        """Raise :class:`ReuseError` unless `prompt_ids` ``[B, N]`` are the context's tokens followed by a suffix."""
        self.context.check_prompt(prompt_ids)

    def activate_past_recording(self) -> None:
        """Called where assisted generation starts; makes its first step skip the tokens that are in the cache.

        transformers (5.16 to 5.23) runs the whole prompt in that step, whatever cache it is given, so that every token of
        the context would stand in the cache twice.
        """
        super().activate_past_recording()
        receiver = self._receiver()
        if receiver is None or not self.get_seq_length():
            return

        def skip_held_tokens(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            handle.remove()
            input_ids, held = kwargs.get("input_ids"), self.get_seq_length()
            tokens = self.context.tokens
            if kwargs.get("past_key_values") is not self or input_ids is None or input_ids.shape[1] <= held:
                return None
            if not torch.equal(input_ids[:, : tokens.shape[1]], tokens):
                return None
            for name in ("input_ids", "position_ids"):
                if kwargs.get(name) is not None:
                    kwargs[name] = kwargs[name][:, held:]
            return args, kwargs

        handle = receiver.register_forward_pre_hook(skip_held_tokens, with_kwargs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> MixedCache:
        other = copy.copy(self)
        other.layers = copy.deepcopy(self.layers, memo)
        return other
