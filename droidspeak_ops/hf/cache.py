"""The transformers cache that partial prefill fills: preallocated layers that grow in place, and layers that are shared."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache
from transformers.masking_utils import create_causal_mask

from ..context.context import check_continues
from ..context.fingerprint import ReuseError
from ..context.growing import GrowingKV

if TYPE_CHECKING:
    from .decoder import Decoder

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The name of a layer's argument for its cache: another one from transformers 5.24 on."""


class MixedLayer(DynamicLayer):
    """K/V of one layer, a view of the filled part of a buffer that has room to grow.

    Where transformers' dynamic layer copies all tokens at every step, new tokens are written in place. A shared layer
    starts as somebody else's tensors, which are copied when the first token is appended and never written to.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self._growing = GrowingKV()

    @classmethod
    def shared(cls, keys: torch.Tensor, values: torch.Tensor) -> MixedLayer:
        """A layer over K and V ``[B, K, T, D]`` that belong to others."""
        layer = cls()
        layer._start_with(keys, values)
        return layer

    @classmethod
    def uninitialized(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> MixedLayer:
        """A layer of T tokens ``[B, K, T, D]`` whose `keys` and `values` are to be written by the caller."""
        layer = cls()
        layer._start_with(*layer._growing.allocate(shape, dtype, device))
        return layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._start_with(key_states[:, :, :0], value_states[:, :, :0])

    def _start_with(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append K and V ``[B, K, N, D]``; return all tokens, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, count = self.keys.shape[2], key_states.shape[2]
        self.keys, self.values = self._growing.grow(self.keys, self.values, start + count)
        self.keys.narrow(2, start, count).copy_(key_states)  # an index expression takes the host three times as long
        self.values.narrow(2, start, count).copy_(value_states)
        return self.keys, self.values

    def extend(self, count: int) -> None:
        """Make room for `count` tokens behind those that are there; the caller may write to all of them from now on."""
        self.keys, self.values = self._growing.grow(self.keys, self.values, self.keys.shape[2] + count)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the layer for `repeats` suffixes; one sequence's tokens stay shared until something is appended."""
        if self.is_initialized and self.keys.shape[0] == 1:
            self.keys, self.values = self.keys.expand(repeats, -1, -1, -1), self.values.expand(repeats, -1, -1, -1)
            self._growing.share()
        else:
            super().batch_repeat_interleave(repeats)

    def reset(self) -> None:
        # Not the inherited one, which in older versions zeroes the tensors in place: they may be shared.
        self.__init__()  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> MixedLayer:
        other = type(self)()
        state = dict(self.__dict__)
        if self._growing.is_shared:  # shared tensors are never written to, so the copy may share them too
            memo.update((id(tensor), tensor) for tensor in (self.keys, self.values))
        other.__dict__.update(copy.deepcopy(state, memo))
        return other


class MixedSlidingLayer(DynamicSlidingWindowLayer):
    """K/V of the last tokens of one layer, as many as its sliding window still shows to the next.

    New tokens make new tensors, so that those it starts with may be somebody else's.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def over(cls, keys: torch.Tensor, values: torch.Tensor, window: int, tokens: int) -> MixedSlidingLayer:
        """A layer over K and V ``[B, K, N, D]``, the last rows of `tokens` tokens, which are never written to."""
        layer = cls(window)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layer.cumulative_length = tokens
        return layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Not the inherited one, which copies numbers to the device and waits for it.
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append K and V ``[B, K, N, D]``; return all tokens that any of the new ones sees."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        # What is kept is a view of all, which after a prefill would stay in memory.
        if self.keys.untyped_storage().nbytes() > 2 * self.keys.nbytes:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        return keys, values

    def reset(self) -> None:
        # Not the inherited one, which in older versions zeroes the tensors in place: they may be shared.
        self.__init__(self.sliding_window)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> MixedSlidingLayer:
        return copy.copy(self)  # no tensor is ever written to


def empty_layer(window: int | None) -> MixedLayer | MixedSlidingLayer:
    """A layer that nothing has been appended to, with a sliding window or none."""
    return MixedLayer() if window is None else MixedSlidingLayer(window)


def shared_layer(
    keys: torch.Tensor, values: torch.Tensor, window: int | None, tokens: int
) -> MixedLayer | MixedSlidingLayer:
    """A layer of `tokens` tokens over K and V ``[B, K, N, D]`` that belong to others: of all, or of the last that count."""
    return MixedLayer.shared(keys, values) if window is None else MixedSlidingLayer.over(keys, values, window, tokens)


def uninitialized_layer(
    shape: tuple[int, int, int, int], window: int | None, tokens: int, dtype: torch.dtype, device: torch.device
) -> MixedLayer | MixedSlidingLayer:
    """A layer of `tokens` tokens whose `keys` and `values` of a given shape ``[B, K, N, D]`` the caller writes."""
    if window is None:
        return MixedLayer.uninitialized(shape, dtype, device)
    keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    return MixedSlidingLayer.over(keys, values, window, tokens)


def rows_held(tokens: int, window: int | None) -> int:
    """Number of a context's tokens that a layer keeps: those that the next one sees."""
    return tokens if window is None else min(tokens, window - 1)


class MixedCache(Cache):
    """A receiver's KV cache of contexts, part its own and part the sender's; for ``past_key_values``.

    It approximates what the receiver would have computed. ``generate`` cannot see which tokens a cache stands for, so
    :meth:`check_prompt` says whether a prompt continues them, and :meth:`prompt` makes one that does.

    Args:
        layers: one for each layer of the receiver.
        tokens: int64 ``[B, T]``: what it stands for.
        mask: ``[B, T]``: 1 for tokens, 0 for the padding before contexts shorter than others; None without padding.
        decoder: of the model that it was filled for.
    """

    layers: list[MixedLayer | MixedSlidingLayer]

    def __init__(
        self,
        layers: list[MixedLayer | MixedSlidingLayer],
        tokens: torch.Tensor,
        mask: torch.Tensor | None,
        decoder: Decoder,
    ) -> None:
        super().__init__(layers=layers)
        self.tokens, self.mask = tokens, mask
        self.adapters = decoder.active_adapters()
        """The adapters that were active when it was filled; None in a model without any."""
        self.rope_changes_at = decoder.rope_changes_at(tokens.shape[1])
        """Number of tokens beyond which the model's RoPE is another than that of the cache; None if it always is the same."""
        self.next_logits: torch.Tensor | None = None
        """Where tokens were selected, the logits ``[B, V]``, float32, that follow the last token of the prompt."""
        self.deviations: torch.Tensor | None = None
        """Where that was asked for, how far K and V of each sequence's selected tokens were from the receiver's, ``[B]``: their
        squared distance over the squares of the receiver's, as a mean over layers and K and V."""
        self.stands_for: MixedCache | None = None
        """The cache that this one takes the place of, in a pass that has nothing to add to it."""
        self._receiver = weakref.ref(decoder.model)
        decoder.watch_passes()

    @property
    def receiver(self) -> Any:
        """The model that it was filled for, which is not kept alive by it; None where that is gone."""
        return self._receiver()

    @property
    def padding_id(self) -> int:
        """The token that ``generate`` takes for padding where it is given no mask; -1 if there is none."""
        found = getattr(getattr(self.receiver, "generation_config", None), "pad_token_id", None)
        return -1 if found is None else found

    def check_prompt(self, prompt_ids: torch.Tensor) -> None:
        """Raise :class:`ReuseError` unless `prompt_ids` ``[B, N]`` are the contexts' tokens followed by a suffix.

        What has been appended since is not known to the cache, and a prompt behind it cannot be checked: that is refused.
        """
        held, width = int(self.get_seq_length()), self.tokens.shape[1]
        if held != width:
            raise ReuseError(
                f"prompt_ids: the cache holds {held - width} tokens behind its context, which cannot be compared; "
                "run each suffix over a copy.deepcopy of the cache"
            )
        check_continues(self.tokens, prompt_ids, self.mask)

    def prompt(self, suffixes: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The contexts followed by their suffixes: ``receiver.generate(**cache.prompt(suffixes), past_key_values=cache)``.

        Args:
            suffixes: int64 ``[N]`` for each sequence of the cache. Shorter ones are padded on the left, behind the context.

        Returns:
            ``input_ids`` and ``attention_mask``, each ``[B, T + N]``.

        Raises:
            ValueError: there are not as many suffixes as sequences, one is empty, or they differ in length for a model with
                sliding windows, in which padding would count as tokens; or something has been appended to the cache.
        """
        lengths = [suffix.numel() for suffix in suffixes]
        (batch, width), longest = self.tokens.shape, max(lengths, default=0)
        if (held := self.get_seq_length()) != width:
            raise ValueError(f"suffixes: expected a cache of its context's {width} tokens, got one that holds {held}")
        if len(suffixes) != batch or not all(lengths):
            raise ValueError(f"suffixes: expected {batch} of at least one token, got the lengths {lengths}")
        if min(lengths) < longest and any(self.is_sliding):
            raise ValueError(f"suffixes: expected one length, since layers have sliding windows, got {lengths}")
        input_ids = self.tokens.new_zeros((batch, width + longest))
        mask = torch.zeros_like(input_ids)
        input_ids[:, :width] = self.tokens
        mask[:, :width] = 1 if self.mask is None else self.mask
        for row, (suffix, length) in enumerate(zip(suffixes, lengths, strict=True)):
            input_ids[row, input_ids.shape[1] - length :] = suffix
            mask[row, input_ids.shape[1] - length :] = 1
        return {"input_ids": input_ids, "attention_mask": mask}

    def to_static(self, max_cache_len: int) -> StaticCache:
        """transformers' cache of fixed capacity with the same contents, for a decode step that is compiled.

        Args:
            max_cache_len: the capacity in tokens, the context's included.

        Raises:
            ValueError: the context does not fit.
        """
        held, receiver = int(self.get_seq_length()), self.receiver
        if receiver is None or max_cache_len <= held:
            raise ValueError(f"max_cache_len: expected more than {held}, the tokens in the cache, got {max_cache_len}")
        static = StaticCache(config=receiver.config, max_cache_len=max_cache_len)
        for ours, theirs in zip(self.layers, static.layers, strict=True):
            theirs.lazy_initialization(ours.keys, ours.values)
            rows = ours.keys.shape[2]
            # A layer whose window is full keeps one more row, the oldest, which it drops before it looks.
            first = theirs.max_cache_len - rows if held >= theirs.max_cache_len else 0
            theirs.keys[:, :, first : first + rows] = ours.keys
            theirs.values[:, :, first : first + rows] = ours.values
            theirs.cumulative_length.fill_(held)
            if theirs.is_sliding:
                theirs.cumulative_length_int = held
        return static

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence, for several suffixes on one context."""
        super().batch_repeat_interleave(repeats)
        self.tokens = self.tokens.repeat_interleave(repeats, dim=0)
        self.mask = None if self.mask is None else self.mask.repeat_interleave(repeats, dim=0)

    def stand_in(self) -> MixedCache:
        """Return an empty cache for a pass that has nothing to add to this one. The next pass over it is one over this."""
        other = copy.copy(self)
        other.layers = [empty_layer(getattr(layer, "sliding_window", None)) for layer in self.layers]
        other.stands_for = self
        return other

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "MixedCache: it belongs to a model of this process; SharedContext.save keeps a context, and partial_prefill fills "
            "a cache of it anew"
        )

    def __copy__(self) -> MixedCache:
        other = MixedCache.__new__(MixedCache)
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> MixedCache:
        other = copy.copy(self)
        other.layers = copy.deepcopy(self.layers, memo)
        return other
