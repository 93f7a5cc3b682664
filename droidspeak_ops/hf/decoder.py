"""A loaded model as a stack of decoder layers: reading their weights, running them, and what they share over some tokens."""

from __future__ import annotations

import hashlib
import warnings
import weakref
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..context.context import Rotation, is_capturing
from ..context.fingerprint import Fingerprint, vocabulary_digest, weights_digest
from ..ops.reference import rope_ref
from ..prefill.weights import LayerWeights, Norm, Prepared, prepare
from .adapters import (
    UnsupportedModelError,
    active_adapters,
    decoder_model,
    effective_weights,
    first_adapted,
    numbers_and_hooks,
)
from .attention import config_of_rows
from .families import Sizes, check_class, family_of, is_its_weights, read_layer, read_queries
from .guard import watch
from .reading import Watch

# Of a model's configuration, what its forward reads there.
_NUMBERS = (
    "logits_scaling",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "num_experts_per_tok",
    "norm_topk_prob",
)


class Decoder:
    """A loaded model, or one inside a PEFT model with its active adapters. Nothing in it is changed.

    K/V projections, sizes and kinds of layers are those that the model had when this was made; layers run as they are.

    Args:
        model: a causal language model of a supported family, or a PEFT model around one.
        keeps_copies: whether weights that had to be copied for the operator are kept for the next use. They show no writes to
            the model's own, so that somebody has to look out for these.

    Raises:
        UnsupportedModelError: the model is of no known family, or a module is not what its family says.
    """

    def __init__(self, model: PreTrainedModel, *, keeps_copies: bool = False) -> None:
        inner: Any = decoder_model(model)
        self._model, self._keeps_copies = weakref.ref(inner), keeps_copies
        outer: Any = getattr(inner, "config", None)
        self.family = family_of(outer, inner)
        self.config: Any = outer.get_text_config(decoder=True)
        self.base: Any = inner.base_model.get_submodule(self.family.decoder)
        check_class(self.family.classes + self.family.model, "the decoder", self.base)
        _check_mode(self.base)
        self.rotary: Any = self.base.get_submodule("rotary_emb")
        check_class(f"{self.family.classes}RotaryEmbedding", "rotary_emb", self.rotary)
        config = self.config
        self.layers: list[Any] = list(self.base.get_submodule("layers"))[: config.num_hidden_layers]
        self.windows = [_window(index, layer) for index, layer in enumerate(DynamicCache(config=config).layers)]
        hidden_size, num_heads = config.hidden_size, config.num_attention_heads
        self.head_dim: int = getattr(config, "head_dim", None) or hidden_size // num_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.device: torch.device = inner.device
        self.dtype: torch.dtype = inner.dtype
        sizes = Sizes(hidden_size, num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.head_dim)
        self._weights = [read_layer(self.family, layer, index, sizes) for index, layer in enumerate(self.layers)]
        rotates = self.family.rotates
        self.rotates: list[bool] = [rotates is None or bool(getattr(each.self_attn, rotates)) for each in self.layers]
        """For each layer, True if it has RoPE."""
        by_type = self.family.rotary_by_type
        self.rotary_types: list[str | None] = list(config.layer_types) if by_type else [None] * self.num_layers
        """Each layer's argument to the rotary embedding."""
        self.is_its_weights: list[bool] = [is_its_weights(layer) for layer in self.layers]
        """For each layer, False if hooks, a forward of its own or parametrisations have a part in its K and V."""
        self._adapted = first_adapted(self.base)
        self._digest: tuple[Watch, str] | None = None
        self._watches = False
        self._prepared: dict[tuple[int, Norm], Prepared] = {}

    @property
    def model(self) -> Any:
        """The transformers model. Whoever uses this keeps it alive: having been read does not."""
        model = self._model()
        if model is None:
            raise ReferenceError("model: it was read, and does not exist any more")
        return model

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def weights(self, layer: int) -> LayerWeights:
        """Weights of one layer's K/V projection, read from the layer's own modules."""
        return self._weights[layer]

    def prepared(self, layer: int, norm: Norm) -> Prepared:
        """The same as the operator takes it, kept from when it is first asked for, if it is no copy or copies are kept."""
        known = self._prepared.get((layer, norm))
        if known is None:
            weights = self._weights[layer]
            known = prepare(weights, self.family.norm_order, norm)
            if known.k_weight is weights.k_weight or (self._keeps_copies and not is_capturing(self.device)):
                self._prepared[layer, norm] = known
        return known

    def plainly_normed(self, layer: int) -> LayerWeights:
        """The same with a norm that only divides by the root mean square: for weights that have the norm's folded in."""
        weights = self._weights[layer]
        return weights if weights.norm_weight is None else replace(weights, norm_weight=self._plain_norm_weight)

    @cached_property
    def _plain_norm_weight(self) -> torch.Tensor:
        one = 0.0 if self.family.norm_order == "gemma" else 1.0
        return torch.full((self.config.hidden_size,), one, dtype=self.dtype, device=self.device)

    @cached_property
    def config_of_rows(self) -> Any:
        """The configuration of layers that attend to rows anywhere in a cache."""
        return config_of_rows(self.config)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the hidden states that enter layer 0."""
        embeddings = self.base.embed_tokens(tokens)
        scale = self.family.embed_scale
        return embeddings if scale is None else embeddings * getattr(self.base, scale)

    def queries(self, layer: int, hidden_states: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        """Q of a layer after its norm and RoPE, ``[B, N, H, D]``, from what enters the layer.

        Args:
            rotation: cos and sin ``[N, R / 2]``, or None where it has no RoPE.
        """
        module = self.layers[layer]
        rows = module.input_layernorm(hidden_states) if self.family.has_input_norm else hidden_states
        queries = read_queries(self.family, module.self_attn, rows, self.head_dim)
        return queries if rotation is None else torch.stack([rope_ref(each, *rotation) for each in queries])

    def attention(self, layer: int) -> dict[str, Any]:
        """Return the arguments of a layer's attention: `scale`, and `softcap` and `sinks` where it has them.

        SDPA knows of neither: a model that is set to it runs without them.
        """
        attention, is_eager = self.layers[layer].self_attn, self.config._attn_implementation == "eager"
        return {
            "scale": attention.scaling,
            "softcap": getattr(self.config, "attn_logit_softcapping", None) if is_eager else None,
            "sinks": getattr(attention, "sinks", None) if is_eager else None,
        }

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits of the next token, float32, from what leaves the last layer."""
        logits = self.model.get_output_embeddings()(self.base.norm(hidden_states)).float()
        scaling, cap = (getattr(self.config, name, None) for name in ("logits_scaling", "final_logit_softcapping"))
        if scaling is not None:
            logits = logits / scaling
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def fingerprint(self, tokenizer: Any = None, *, weights: bool, like: Fingerprint | None = None) -> Fingerprint:
        """The identity of the model, and of `tokenizer` if one is given; with `weights` all of them are read the first time.

        For comparison with that of another model, `like`, tokens that were added to its vocabulary are left out.
        """
        if tokenizer is None and not weights:
            return self._fingerprint
        return replace(
            self._fingerprint,
            weights=self._weights_digest() if weights else None,
            tokenizer=None
            if tokenizer is None
            else vocabulary_digest(tokenizer, None if like is None else like.tokenizer),
        )

    @cached_property
    def _fingerprint(self) -> Fingerprint:
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
                **{name: getattr(self.config, name) for name in names},
                "head_dim": self.head_dim,
                "sliding_windows": self.windows,
                "layers_with_rope": [layer for layer, rotates in enumerate(self.rotates) if rotates],
            },
            rope={**self.config.rope_parameters, "applied": self._rope_digest()},
            dtype=str(self.dtype).removeprefix("torch."),
        )

    def _weights_digest(self) -> str:
        """Digest of all weights, and of what changes numbers beside them, kept for as long as nothing of it is seen to change.

        Where copies of weights are kept (see :class:`Receiver`), writes that leave no trace are not looked for.
        """
        if self._digest is not None and self._digest[0].changed() is None:
            return self._digest[1]
        model = self.model
        watch = Watch.over(model) if self._keeps_copies else None
        parts = (
            weights_digest(model, effective_weights(model)),
            sorted(self._fingerprint.rope.items()),
            [getattr(self.config, name, None) for name in _NUMBERS],
            numbers_and_hooks(model),
            [type(getattr(getattr(layer, "mlp", None), "act_fn", None)).__qualname__ for layer in self.layers],
        )
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()
        self._digest = None if watch is None else (watch, digest)
        return digest

    def active_adapters(self) -> tuple[str, ...] | None:
        """Return the adapters that a pass now runs with; None in a model without any."""
        return None if self._adapted is None else tuple(active_adapters(self._adapted))

    def rope_changes_at(self, tokens: int) -> int | None:
        """Return the length beyond which a prompt's angles are others than those of its first `tokens`, if one is so near.

        Only LongRoPE has such a length. What ``"dynamic"`` does changes little by little, and is let be: generation does so
        too, by any cache.
        """
        return next((length for length in self._rope_changes if tokens <= length), None)

    @cached_property
    def _rope_changes(self) -> list[int]:
        parameters = self.config.rope_parameters
        kinds = parameters.values() if "rope_type" not in parameters else [parameters]
        return [
            each["original_max_position_embeddings"]
            for each in kinds
            if isinstance(each, dict) and each.get("rope_type") == "longrope"
        ]

    def watch_passes(self) -> None:
        """Have passes of the model over mixed caches looked at; see :mod:`droidspeak_ops.hf.guard`."""
        if not self._watches:
            watch(self.model.base_model)
            self._watches = True

    @cached_property
    def rope_varies(self) -> bool:
        """True if the angles of a position depend on the length of the prompt, or of earlier ones."""
        kinds = self.rotary.rope_type
        return not {"dynamic", "longrope"}.isdisjoint(kinds.values() if isinstance(kinds, dict) else [kinds])

    def rope_is_as_read(self) -> bool:
        """Return whether frequencies and scalings are what they were when they were read; waits for a GPU."""
        return "_fingerprint" not in self.__dict__ or self._fingerprint.rope["applied"] == self._rope_digest()

    def _rope_digest(self) -> str:
        """Digest of the frequencies and scalings that the model holds, whatever its configuration says."""
        frequencies = {
            name: buffer.detach().float().cpu().numpy().tobytes()
            for name, buffer in self.rotary.named_buffers(remove_duplicate=False)  # of LongRoPE two may be one
            if "original" in name or not self.rope_varies
        }
        scalings = {name: value for name, value in vars(self.rotary).items() if name.endswith("attention_scaling")}
        return hashlib.sha256(repr((sorted(frequencies.items()), sorted(scalings.items()))).encode()).hexdigest()


def _check_mode(base: torch.nn.Module) -> None:
    """Refuse a model that would keep no K and V, and say of one that makes them at random.

    Raises:
        UnsupportedModelError: gradient checkpointing is on in training mode.
    """
    if not base.training:
        return
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        raise UnsupportedModelError(
            "model: expected layers that keep K and V, got training mode with gradient checkpointing; call model.eval()"
        )
    if any(_drops(module) for module in base.modules()):
        warnings.warn("model: in training mode its dropout makes K and V random; call model.eval()", stacklevel=4)


def _drops(module: torch.nn.Module) -> bool:
    rates = (getattr(module, name, None) for name in ("attention_dropout", "p"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _window(index: int, layer: Any) -> int | None:
    """Number of tokens that a layer sees, its own included; None if all before its own: transformers' caches know."""
    if type(layer) is DynamicLayer:
        return None
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.sliding_window
    raise UnsupportedModelError(
        f"layer {index}: expected attention over all tokens or a sliding window, got the cache {type(layer).__name__}"
    )
