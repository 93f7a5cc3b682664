"""Suffixes of a context, several side by side in one row: one forward pass where a batch would copy the context's K/V."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .adapters import UnsupportedModelError
from .cache import MixedSlidingLayer, empty_layer, rows_held
from .decoder import Decoder, Pass

KeysValues = tuple[torch.Tensor, torch.Tensor]


def check_takes_masks(model: Any) -> None:
    """Raise unless the model's attention takes a mask.

    Raises:
        UnsupportedModelError: it is neither SDPA nor eager.
    """
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"receiver: got attention {attention!r}; 'sdpa' or 'eager', which take masks, is needed"
        )


class SideBySide(Pass):
    """The layers over several sequences in one row ``[1, N]``, each right behind a context and blind to the others.

    Args:
        decoder: the model, whose attention takes masks.
        tokens: of the context.
        lengths: of the sequences.
        device: theirs.
    """

    def __init__(self, decoder: Decoder, tokens: int, lengths: Sequence[int], device: torch.device) -> None:
        self.offsets = torch.cat([torch.arange(length, device=device) for length in lengths])
        self.owners = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
        super().__init__(decoder, self.offsets[None])
        self._tokens = tokens
        self.position_ids = self._position_ids = (tokens + self.offsets)[None]

    @property
    def masks(self) -> Any:
        """Return the mask that the whole model takes, or where its layers differ one for each of their types."""
        sliding = {window is not None for window in self._decoder.windows}
        if len(sliding) == 1:
            return self._mask(*sliding)
        return {"full_attention": self._mask(False), "sliding_attention": self._mask(True)}

    def cache(self, keys_values: Mapping[int, KeysValues]) -> Cache:
        """K and V ``[1, K, N, D]`` of the context, of those layers that are to be run. They are not written to."""
        layers: list[Any] = []
        for index, window in enumerate(self._decoder.windows):
            if index not in keys_values:
                layers.append(empty_layer(window))
            elif window is None:
                layer = DynamicLayer()
                layer.lazy_initialization(*keys_values[index])
                layer.keys, layer.values = keys_values[index]
                layers.append(layer)
            else:
                layers.append(MixedSlidingLayer.over(*keys_values[index], window, self._tokens))
        return Cache(layers=layers)

    def _compute_mask(self, sliding: bool) -> torch.Tensor:
        """Return the mask added to attention logits ``[1, 1, N, held + N]``: each sees the context and itself up to there."""
        window = next(each for each in self._decoder.windows if (each is not None) == sliding)
        held, offsets = rows_held(self._tokens, window), self.offsets
        apart = offsets[:, None] - torch.cat([torch.arange(-held, 0, device=offsets.device), offsets])
        sees = apart >= 0
        sees[:, held:] &= self.owners[:, None] == self.owners
        if window is not None:
            sees &= apart < window
        dtype = self._decoder.model.dtype
        return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[None, None]
