"""A loaded model as a stack of decoder layers: reading their weights, running them, and what they share over some tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..context import Rotation
from ..fingerprint import Fingerprint, vocabulary_digest, weights_digest
from .adapters import UnsupportedModelError, decoder_model, effective_weights
from .families import LayerWeights, check_class, family_of, read_layer


class Decoder:
    """A loaded model, or one inside a PEFT model with its active adapters. Nothing in it is changed.

    Raises:
        UnsupportedModelError: the model is of no known family, or a module is not what its family says.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = decoder_model(model)
        outer: Any = getattr(self.model, "config", None)
        self.family = family_of(outer, self.model)
        self.config: Any = outer.get_text_config(decoder=True)
        self.base: Any = self.model.base_model.get_submodule(self.family.decoder)
        check_class(self.family.classes + self.family.model, "the decoder", self.base)
        self.rotary: Any = self.base.get_submodule("rotary_emb")
        check_class(f"{self.family.classes}RotaryEmbedding", "rotary_emb", self.rotary)
        config = self.config
        self.layers = list(self.base.get_submodule("layers"))[: config.num_hidden_layers]
        self.windows = [_window(index, layer) for index, layer in enumerate(DynamicCache(config=config).layers)]
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self._weights = [
            read_layer(self.family, layer, index, config, self.head_dim) for index, layer in enumerate(self.layers)
        ]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def weights(self, layer: int) -> LayerWeights:
        """What the K/V projection of one layer needs, read from the layer's own modules."""
        return self._weights[layer]

    def plainly_normed(self, layer: int) -> LayerWeights:
        """The same with a norm that only divides by the root mean square: for weights that have the norm's folded in."""
        weights = self._weights[layer]
        if weights.norm_weight is None:
            return weights
        gain = torch.zeros_like if self.family.norm_order == "gemma" else torch.ones_like
        return replace(weights, norm_weight=gain(weights.norm_weight))

    def rotates(self, layer: int) -> bool:
        """Whether a layer has RoPE."""
        return self.family.rotates is None or bool(getattr(self.layers[layer].self_attn, self.family.rotates))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """What enters layer 0."""
        embeddings = self.base.embed_tokens(tokens)
        scale = self.family.embed_scale
        return embeddings if scale is None else embeddings * getattr(self.base, scale)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Those of the next token, float32, from what leaves the last layer."""
        logits = self.model.get_output_embeddings()(self.base.norm(hidden_states)).float()
        scaling, cap = (getattr(self.config, name, None) for name in ("logits_scaling", "final_logit_softcapping"))
        if scaling is not None:
            logits = logits / scaling
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def over(self, tokens: torch.Tensor) -> Pass:
        """The layers over `tokens` ``[B, T]`` at positions 0 to T - 1."""
        return Pass(self, tokens)

    def fingerprint(self, tokenizer: Any = None, *, weights: bool) -> Fingerprint:
        """The identity of the model, and of `tokenizer` if one is given; with `weights` all of them are read the first time."""
        config = self.config
        names = (
            "model_type",
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
        )
        return Fingerprint(
            architecture={
                **{name: getattr(config, name) for name in names},
                "head_dim": self.head_dim,
                "sliding_windows": self.windows,
                "layers_with_rope": [layer for layer in range(self.num_layers) if self.rotates(layer)],
            },
            rope=dict(config.rope_parameters),
            dtype=str(self.model.dtype).removeprefix("torch."),
            weights=weights_digest(self.model, effective_weights(self.model)) if weights else None,
            tokenizer=None if tokenizer is None else vocabulary_digest(tokenizer),
        )


class Pass:
    """One pass over some tokens: what the layers share, each computed when first asked for."""

    def __init__(self, decoder: Decoder, tokens: torch.Tensor) -> None:
        self._decoder = decoder
        # The functions that are given this read dtype, device and the first two sizes of it, and no values.
        self._like = torch.empty((*tokens.shape, 0), dtype=decoder.model.dtype, device=tokens.device)
        self._position_ids = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        self._rotary, self._mask = cache(self._compute_rotary), cache(self._compute_mask)
        self._halves = cache(self._compute_halves)

    def rotation(self, layer: int) -> Rotation | None:
        """cos and sin that a layer rotates K by, ``[T, R / 2]``; None where it has no RoPE."""
        return self._halves(self._kind(layer)) if self._decoder.rotates(layer) else None

    def run(self, layer: int, hidden_states: torch.Tensor, cache: Any) -> torch.Tensor:
        """Run one layer of the model as it is, attention and MLP, appending its K/V to `cache`."""
        return self._decoder.layers[layer](
            hidden_states,
            attention_mask=self._mask(self._decoder.windows[layer] is not None),
            position_ids=self._position_ids,
            position_embeddings=self._rotary(self._kind(layer)),
            past_key_values=cache,
            use_cache=True,
        )

    def _kind(self, layer: int) -> str | None:
        return self._decoder.config.layer_types[layer] if self._decoder.family.rotary_by_type else None

    def _compute_rotary(self, kind: str | None) -> Rotation:
        return self._decoder.rotary(self._like, self._position_ids, *([] if kind is None else [kind]))

    def _compute_halves(self, kind: str | None) -> Rotation:
        cos, sin = self._rotary(kind)
        columns = cos.shape[-1] // (1 if self._decoder.family.half_rotary else 2)
        return cos[0, :, :columns].contiguous(), sin[0, :, :columns].contiguous()

    def _compute_mask(self, sliding: bool) -> Any:
        create = create_sliding_window_causal_mask if sliding else create_causal_mask
        return create(
            config=self._decoder.config,
            inputs_embeds=self._like,
            attention_mask=None,
            past_key_values=None,
            position_ids=self._position_ids,
        )


def _window(index: int, layer: Any) -> int | None:
    """How many tokens a layer sees, its own included; None if all before its own. transformers' caches know."""
    if type(layer) is DynamicLayer:
        return None
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.sliding_window
    raise UnsupportedModelError(
        f"layer {index}: got the cache {type(layer).__name__}; attention over all tokens or a sliding window is needed"
    )
