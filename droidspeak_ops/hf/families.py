"""Reading the decoder layers of transformers models: one row of a table per family, checked against the loaded model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from ..fingerprint import Fingerprint, vocabulary_digest, weights_digest


class UnsupportedModelError(ValueError):
    """The model's family is not known, or the loaded model is not what its family should be."""


@dataclass(frozen=True)
class Family:
    """The classes that a family is made of, and the paths in the base model or in a decoder layer that are read."""

    model: str
    layer: str
    attention: str
    norm: str
    rope: str
    embed: str = "embed_tokens"
    layers: str = "layers"
    rotary: str = "rotary_emb"
    input_norm: str = "input_layernorm"
    self_attn: str = "self_attn"
    k_proj: str = "self_attn.k_proj"
    v_proj: str = "self_attn.v_proj"
    k_norm: str | None = None


def _family(prefix: str, **paths: str) -> Family:
    """A family whose classes are named the usual way."""
    return Family(
        model=f"{prefix}Model",
        layer=f"{prefix}DecoderLayer",
        attention=f"{prefix}Attention",
        norm=f"{prefix}RMSNorm",
        rope=f"{prefix}RotaryEmbedding",
        **paths,
    )


# By `config.model_type`.
FAMILIES = {
    "llama": _family("Llama"),
    "mistral": _family("Mistral"),
    "qwen2": _family("Qwen2"),
    "qwen3": _family("Qwen3", k_norm="self_attn.k_norm"),
}


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer that its K/V depend on, as :func:`droidspeak_ops.ops.kv_project` names them."""

    norm_weight: torch.Tensor
    norm_eps: float
    k_weight: torch.Tensor
    v_weight: torch.Tensor
    k_bias: torch.Tensor | None
    v_bias: torch.Tensor | None
    k_norm_weight: torch.Tensor | None
    k_norm_eps: float


class Decoder:
    """A loaded model, read as a stack of decoder layers. Nothing in the model is changed.

    Raises:
        UnsupportedModelError: the model is of no known family, or a module is not what its family says.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = getattr(model, "config", None)
        model_type = getattr(config, "model_type", type(model).__name__)
        if model_type not in FAMILIES:
            raise UnsupportedModelError(f"model: got the family {model_type!r}; one of {sorted(FAMILIES)} is needed")
        family = FAMILIES[model_type]
        self.model = model
        self.config = config
        self.base: Any = model.base_model
        _check_class(family.model, "the base model", self.base)
        self.embed: nn.Module = self.base.get_submodule(family.embed)
        self.rotary: nn.Module = self.base.get_submodule(family.rotary)
        _check_class(family.rope, family.rotary, self.rotary)
        _check_attention(config)
        self.layers = list(self.base.get_submodule(family.layers))[: config.num_hidden_layers]
        head_dim = getattr(config, "head_dim", None)
        self.head_dim: int = head_dim or config.hidden_size // config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self._weights = [self._read(family, index) for index in range(len(self.layers))]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def weights(self, layer: int) -> LayerWeights:
        """What the K/V projection of one layer needs, read from the layer's own modules."""
        return self._weights[layer]

    def positions(self, tokens: torch.Tensor) -> dict[str, Any]:
        """What all layers share for `tokens` ``[B, T]`` at positions 0 to T - 1: RoPE's cos and sin, the causal mask."""
        position_ids = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        # Both functions below read dtype, device and the first two sizes of it, and no values.
        embeddings = torch.empty((*tokens.shape, 0), dtype=self.model.dtype, device=tokens.device)
        return {
            "position_ids": position_ids,
            "position_embeddings": self.rotary(embeddings, position_ids=position_ids),
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=embeddings,
                attention_mask=None,
                past_key_values=None,
                position_ids=position_ids,
            ),
        }

    def run(self, layer: int, hidden_states: torch.Tensor, positions: dict[str, Any], cache: Any) -> torch.Tensor:
        """Run one layer of the model as it is, attention and MLP, appending its K/V to `cache`."""
        return self.layers[layer](hidden_states, past_key_values=cache, use_cache=True, **positions)

    def fingerprint(self, tokenizer: Any = None, *, weights: bool) -> Fingerprint:
        """The identity of the model, and of `tokenizer` if one is given; with `weights` all of them are read the first time."""
        config = self.config
        names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
        return Fingerprint(
            architecture={
                **{name: getattr(config, name) for name in names},
                "head_dim": self.head_dim,
                "vocab_size": config.vocab_size,
            },
            rope=dict(config.rope_parameters),
            dtype=str(self.model.dtype).removeprefix("torch."),
            weights=weights_digest(self.model) if weights else None,
            tokenizer=None if tokenizer is None else vocabulary_digest(tokenizer),
        )

    def _read(self, family: Family, index: int) -> LayerWeights:
        layer, where = self.layers[index], f"layer {index}"
        _check_class(family.layer, where, layer)
        norm = layer.get_submodule(family.input_norm)
        _check_class(family.norm, f"{where} {family.input_norm}", norm)
        _check_class(family.attention, f"{where} {family.self_attn}", layer.get_submodule(family.self_attn))
        shape = (self.num_kv_heads * self.head_dim, self.config.hidden_size)
        k_proj, v_proj = (_linear(layer, path, where, shape) for path in (family.k_proj, family.v_proj))
        k_norm: Any = None
        if family.k_norm is not None:
            k_norm = layer.get_submodule(family.k_norm)
            _check_class(family.norm, f"{where} {family.k_norm}", k_norm)
        return LayerWeights(
            norm_weight=norm.weight,
            norm_eps=norm.variance_epsilon,
            k_weight=k_proj.weight,
            v_weight=v_proj.weight,
            k_bias=k_proj.bias,
            v_bias=v_proj.bias,
            k_norm_weight=None if k_norm is None else k_norm.weight,
            k_norm_eps=norm.variance_epsilon if k_norm is None else k_norm.variance_epsilon,
        )


def _linear(layer: nn.Module, path: str, where: str, shape: tuple[int, int]) -> nn.Linear:
    module = layer.get_submodule(path)
    # Exactly nn.Linear: an adapter or a quantised layer computes something else from the same weight.
    if type(module) is not nn.Linear or tuple(module.weight.shape) != shape:
        got = f"{type(module).__name__} with weight {tuple(getattr(module, 'weight', torch.empty(0)).shape)}"
        hint = "; merge the adapter into the model first" if hasattr(module, "base_layer") else ""
        raise UnsupportedModelError(f"{where} {path}: got {got}; a torch.nn.Linear with {shape} is needed{hint}")
    return module


def _check_attention(config: Any) -> None:
    """Every layer sees all tokens before its own."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    for layer, kind in enumerate(kinds):
        if kind != "full_attention":
            raise UnsupportedModelError(f"layer {layer}: got {kind}; full_attention in all layers is needed")


def _check_class(needed: str, where: str, module: nn.Module) -> None:
    if type(module).__name__ != needed:
        raise UnsupportedModelError(f"{where}: got {type(module).__name__}; {needed} is needed")
