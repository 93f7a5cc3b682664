"""Passes of a model's layers over some tokens, and over several suffixes of one context that are packed into a row."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .. import ops
from ..context.context import Rotation
from ..context.kv import KV
from ..prefill.weights import projection
from .adapters import UnsupportedModelError
from .attention import SeenRows, attending_to_rows, has_kernel
from .cache import CACHE, MixedSlidingLayer, empty_layer, rows_held
from .decoder import Decoder

KeysValues = tuple[torch.Tensor, torch.Tensor]

Visible = Callable[[int | None], torch.Tensor]
"""For a layer's window, True where a token sees a row of K/V, the cache's and then its own: bool ``[N, rows]``."""


class Pass:
    """One pass of a model's layers over some tokens. What layers share is computed when first asked for.

    Nothing here waits for a GPU, as long as the model's RoPE is not one that looks at the positions.

    Args:
        decoder: the model.
        shape: ``(B, N)`` of the tokens.
        positions: int64 ``[N]``, of every sequence's tokens; 0 to N - 1 where None.
        visible: the rows that tokens see; where None, with an empty cache, those up to their own.
    """

    def __init__(
        self,
        decoder: Decoder,
        shape: Sequence[int],
        *,
        positions: torch.Tensor | None = None,
        visible: Visible | None = None,
    ) -> None:
        self._decoder, self._positions, self._visible = decoder, positions, visible
        self._rotary_embedding = _with_own_buffers(decoder.rotary) if decoder.rope_varies else decoder.rotary
        # The functions that are given this read dtype, device and the first two sizes of it, and no values.
        self._like = torch.empty((*shape, 0), dtype=decoder.dtype, device=decoder.device)
        self._rotaries: dict[str | None, Rotation] = {}
        self._halves: dict[str | None, Rotation] = {}
        self._masks: dict[int | None, Any] = {}

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """Positions ``[1, N]``, as transformers takes them."""
        if self._positions is None:
            return torch.arange(self._like.shape[1], device=self._like.device).unsqueeze(0)
        return self._positions.unsqueeze(0)

    def rotation(self, layer: int) -> Rotation | None:
        """cos and sin that a layer rotates K by, ``[N, R / 2]``; None where it has no RoPE."""
        if not self._decoder.rotates[layer]:
            return None
        kind = self._decoder.rotary_types[layer]
        if kind not in self._halves:
            cos, sin = self._rotary(kind)
            columns = cos.shape[-1] // (1 if self._decoder.family.half_rotary else 2)
            self._halves[kind] = cos[0, :, :columns].contiguous(), sin[0, :, :columns].contiguous()
        return self._halves[kind]

    def run(self, layer: int, hidden_states: torch.Tensor, cache: Any, rows: SeenRows | None = None) -> torch.Tensor:
        """Run one layer of the model as it is, attention and MLP, appending its K/V to `cache`.

        With `rows` its attention is by those, where the model's may be replaced: for numbers of the same meaning in less time.
        """
        decoder, module = self._decoder, self._decoder.layers[layer]
        by_kernel, given = has_kernel(decoder.device), {}
        if not decoder.is_its_weights[layer]:
            hidden_states = hidden_states.clone()  # which a hook may write to
        elif rows is not None and (by_kernel or decoder.config._attn_implementation == "sdpa"):
            module, given = attending_to_rows(module, decoder.config_of_rows), {"rows": rows}
        # Without position_ids, which attention reads for nothing but to look for packed sequences, on the host.
        return module(
            hidden_states,
            attention_mask=None if given and by_kernel else self.mask(decoder.windows[layer]),
            position_embeddings=self._rotary(decoder.rotary_types[layer]),
            use_cache=True,
            **{CACHE: cache},
            **given,
        )

    def project(self, layer: int, hidden_states: torch.Tensor, rows: int | None = None) -> KV:
        """K and V of a layer from what enters it, of the last `rows` tokens, or of as many as it keeps."""
        decoder, (batch, tokens, _) = self._decoder, hidden_states.shape
        if rows is None:
            rows = rows_held(tokens, decoder.windows[layer])
        if not decoder.is_its_weights[layer]:
            alone = Cache(layers=[empty_layer(window) for window in decoder.windows[: layer + 1]])
            self.run(layer, hidden_states, alone)
            held: Any = alone.layers[layer]
            return KV(held.keys, held.values)
        shape = (batch, decoder.num_kv_heads, rows, decoder.head_dim)
        kv = KV(*(torch.empty(shape, dtype=decoder.dtype, device=decoder.device) for _ in "kv"))
        slots = torch.arange(batch * rows, device=decoder.device)
        rotation = self.rotation(layer)
        positions = None if batch == 1 or rotation is None else slots % rows
        ops.kv_project(
            projection(
                decoder.prepared(layer, "hf"), decoder.family.norm_order, hidden_states, rotation, kv.keys, kv.values, slots,
                positions=positions,
            )
        )  # fmt: skip
        return kv

    def mask(self, window: int | None) -> Any:
        """Attention mask of layers with a window, or with none, as transformers takes it."""
        if window not in self._masks:
            make = self._causal_mask if self._visible is None else self._added_mask
            self._masks[window] = make(window)
        return self._masks[window]

    def _rotary(self, kind: str | None) -> Rotation:
        if kind not in self._rotaries:
            named = [] if kind is None else [kind]
            self._rotaries[kind] = self._rotary_embedding(self._like, self.position_ids, *named)
        return self._rotaries[kind]

    def _causal_mask(self, window: int | None) -> Any:
        config = self._decoder.config
        # Then SDPA is told `is_causal`, as in the model's own prefill. While a CUDA graph is captured, transformers would
        # make a mask, with which SDPA takes another kernel.
        if config._attn_implementation == "sdpa" and (window is None or self._like.shape[1] < window):
            return None
        create = create_causal_mask if window is None else create_sliding_window_causal_mask
        return create(config=config, inputs_embeds=self._like, attention_mask=None, **{CACHE: None})

    def _added_mask(self, window: int | None) -> torch.Tensor:
        """Mask that is added to attention logits, ``[1, 1, N, rows]``."""
        assert self._visible is not None
        sees, dtype = self._visible(window), self._decoder.dtype
        return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[None, None]


def _with_own_buffers(rotary: Any) -> Any:
    """Return a copy of a rotary embedding that shares its tensors.

    One whose angles depend on the length replaces its frequencies in every call, between which and their use another thread
    may call it with another length.
    """
    own = copy.copy(rotary)
    own._buffers = dict(rotary._buffers)
    return own


class PackedSuffixes:
    """Several suffixes of one context in one row ``[1, N]``, each blind to the others: a batch would copy the context's K/V.

    Args:
        decoder: the model, whose attention takes masks.
        tokens: of the context.
        lengths: of the suffixes.
    """

    def __init__(self, decoder: Decoder, tokens: int, lengths: Sequence[int]) -> None:
        self._decoder, self._tokens, device = decoder, tokens, decoder.device
        self.offsets = torch.cat([torch.arange(length, device=device) for length in lengths])
        """Place of each token in its suffix, ``[N]``."""
        self.owners = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
        """Suffix of each token, ``[N]``."""
        self.over = Pass(decoder, (1, len(self.owners)), positions=tokens + self.offsets, visible=self._visible)

    @property
    def masks(self) -> Any:
        """The mask that the whole model takes, or where its layers differ one for each of their types."""
        windows = set(self._decoder.windows)
        if len(windows) == 1:
            return self.over.mask(*windows)
        sliding = next(window for window in windows if window is not None)
        return {"full_attention": self.over.mask(None), "sliding_attention": self.over.mask(sliding)}

    def cache(self, keys_values: Mapping[int, KeysValues]) -> Cache:
        """K and V ``[1, K, N, D]`` of the context, of those layers that are to be run. They are not written to."""
        layers: list[Any] = []
        for index, window in enumerate(self._decoder.windows):
            if index not in keys_values:
                layers.append(empty_layer(window))
            elif window is None:  # of transformers, whose concatenation passes a gradient on
                layer = DynamicLayer()
                layer.lazy_initialization(*keys_values[index])
                layer.keys, layer.values = keys_values[index]
                layers.append(layer)
            else:
                layers.append(MixedSlidingLayer.over(*keys_values[index], window, self._tokens))
        return Cache(layers=layers)

    def _visible(self, window: int | None) -> torch.Tensor:
        held, offsets = rows_held(self._tokens, window), self.offsets
        apart = offsets[:, None] - torch.cat([torch.arange(-held, 0, device=offsets.device), offsets])
        sees = apart >= 0
        sees[:, held:] &= self.owners[:, None] == self.owners
        if window is not None:
            sees &= apart < window
        return sees


def check_takes_masks(model: Any) -> None:
    """Raise unless the model's attention takes a mask.

    Raises:
        UnsupportedModelError: it is neither SDPA nor eager.
    """
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"receiver: expected 'sdpa' or 'eager', which take masks, got attention {attention!r}"
        )
