"""Model families: one row of a table each, and how a decoder layer is read by it, checked against the loaded model.

What a row does not say is the same everywhere: ``embed_tokens``, ``rotary_emb`` and ``layers`` of the decoder, ``self_attn`` of
a layer and ``k_proj`` and ``v_proj`` of that. Which layers have a sliding window is the model's configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..ops.checks import NormOrder
from ..prefill.weights import LayerWeights
from .adapters import (
    UnsupportedModelError,
    changes_input,
    changes_output,
    check_weights,
    merge_hint,
    read_linear,
)


@dataclass(frozen=True)
class Family:
    """The classes that a family is made of, and what of its layers is not as in Llama.

    Args:
        classes: what the names of its classes in transformers begin with.
        model: the rest of the name of the class that holds the decoder layers.
        norm_order: where its norms round; see :func:`droidspeak_ops.ops.row_norm`.
        norm_eps: the attribute of a norm that holds eps.
        has_input_norm: whether a layer normalises before its projections.
        k_norm: whether K is normalised before RoPE: each head by itself, or all together.
        fused: whether Q, K and V are rows of one ``qkv_proj``.
        rotary_by_type: whether RoPE differs between layers with and without a window.
        half_rotary: whether cos and sin are as wide as a pair's half, rather than twice that.
        rotates: an attribute of the attention that says whether the layer has RoPE.
        embed_scale: an attribute of the decoder that the embeddings are multiplied by outside of their module.
        decoder: where the decoder is in the base model, if that has other parts.
    """

    classes: str
    model: str = "Model"
    norm_order: NormOrder = "llama"
    norm_eps: str = "variance_epsilon"
    has_input_norm: bool = True
    k_norm: Literal["each", "all"] | None = None
    fused: bool = False
    rotary_by_type: bool = False
    half_rotary: bool = False
    rotates: str | None = None
    embed_scale: str | None = None
    decoder: str = ""


# By `config.model_type`.
FAMILIES = {
    "gemma2": Family("Gemma2", norm_order="gemma", norm_eps="eps"),
    "gemma3": Family("Gemma3", "TextModel", norm_order="gemma", norm_eps="eps", k_norm="each", rotary_by_type=True,
                     decoder="language_model"),
    "gemma3_text": Family("Gemma3", "TextModel", norm_order="gemma", norm_eps="eps", k_norm="each", rotary_by_type=True),
    "gpt_oss": Family("GptOss", norm_order="olmo", half_rotary=True),
    "granite": Family("Granite", embed_scale="embedding_multiplier"),
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "mixtral": Family("Mixtral"),
    "olmo2": Family("Olmo2", norm_order="olmo", has_input_norm=False, k_norm="all"),
    "phi3": Family("Phi3", fused=True),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", k_norm="each"),
    "qwen3_moe": Family("Qwen3Moe", k_norm="each"),
    "smollm3": Family("SmolLM3", rotates="use_rope"),
}  # fmt: skip


class Sizes(NamedTuple):
    """The columns of what a layer's projections read and write."""

    hidden: int
    q: int
    kv: int
    head: int


def family_of(config: Any, model: Any) -> Family:
    """The row of the table for a model with this configuration.

    Raises:
        UnsupportedModelError: there is none; the message names the family.
    """
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(f"model: expected one of {sorted(FAMILIES)}, got the family {model_type!r}")
    return FAMILIES[model_type]


def check_class(needed: str, where: str, module: nn.Module) -> None:
    """The module's class is the one of transformers that the family has there."""
    kind = type(module)
    if kind.__name__ != needed or not kind.__module__.startswith("transformers."):
        raise UnsupportedModelError(
            f"{where}: expected transformers' {needed}, got {kind.__name__}{merge_hint(module)}"
        )


def read_layer(family: Family, layer: nn.Module, index: int, sizes: Sizes) -> LayerWeights:
    """Read one decoder layer.

    Raises:
        UnsupportedModelError: a module is not what the family says.
    """
    where = f"layer {index}"
    check_class(f"{family.classes}DecoderLayer", where, layer)
    attention: Any = layer.get_submodule("self_attn")
    where_attention = f"{where} self_attn"
    check_class(f"{family.classes}Attention", where_attention, attention)
    if not attention.is_causal:
        raise UnsupportedModelError(
            f"{where_attention}: expected causal attention, got one that sees the tokens that follow"
        )

    norm_weight, norm_eps = None, 0.0
    has_input_norm = hasattr(layer, "input_layernorm")
    if has_input_norm != family.has_input_norm:
        raise UnsupportedModelError(
            f"{where} input_layernorm: expected {'none' if has_input_norm else 'one'} in this family"
        )
    if has_input_norm:
        norm_weight, norm_eps = _read_norm(family, layer, "input_layernorm", where, sizes.hidden)

    if family.fused:
        of_k, of_v = sizes.q, sizes.q + sizes.kv
        qkv = read_linear(attention, "qkv_proj", where_attention, (of_v + sizes.kv, sizes.hidden))
        k, v = qkv.rows(of_k, of_v), qkv.rows(of_v, of_v + sizes.kv)
    else:
        shape = sizes.kv, sizes.hidden
        k, v = (read_linear(attention, name, where_attention, shape) for name in ("k_proj", "v_proj"))

    has_k_norm = any("norm" in name for name, _ in attention.named_children())
    if has_k_norm != (family.k_norm is not None):
        raise UnsupportedModelError(
            f"{where_attention}: expected {'no' if has_k_norm else 'a'} norm of K in this family"
        )
    k_norm_weight, k_norm_eps = None, 0.0
    if family.k_norm is not None:
        columns = sizes.head if family.k_norm == "each" else sizes.kv
        k_norm_weight, k_norm_eps = _read_norm(family, attention, "k_norm", where_attention, columns)
    return LayerWeights(
        norm_weight, norm_eps, k.weight, v.weight, k.bias, v.bias, k_norm_weight, k_norm_eps, k.low_rank, v.low_rank
    )


def read_queries(family: Family, attention: Any, rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Q ``[..., H, D]`` of normed rows ``[..., C]``, before RoPE, by the attention's own modules."""
    if family.fused:
        rows = attention.qkv_proj(rows)[..., : attention.config.num_attention_heads * head_dim]
    else:
        rows = attention.q_proj(rows)
    if family.k_norm == "all":
        rows = attention.q_norm(rows)
    heads = rows.unflatten(-1, (-1, head_dim))
    return attention.q_norm(heads) if family.k_norm == "each" else heads


def is_its_weights(layer: Any) -> bool:
    """Return whether a layer's K and V are what its weights make of its input: no hook, no forward of its own and no
    parametrisation stands in the way, which only running the layer would apply."""
    if changes_input(layer) or changes_input(layer.self_attn):
        return False
    return not any(
        changes_output(module)
        for part in PARTS
        if (found := _part(layer, part)) is not None
        for module in (found, getattr(found, "base_layer", None))
        if module is not None
    )


PARTS = ("input_layernorm", "self_attn.qkv_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")
"""Modules between a layer's input and its K and V, of which a family has some."""


def _part(layer: Any, name: str) -> Any:
    parent = layer.self_attn if name.startswith("self_attn.") else layer
    return parent._modules.get(name.rpartition(".")[2])


def _read_norm(family: Family, parent: nn.Module, name: str, where: str, columns: int) -> tuple[torch.Tensor, float]:
    norm: Any = parent.get_submodule(name)
    check_class(f"{family.classes}RMSNorm", f"{where} {name}", norm)
    check_weights(norm, f"{where} {name}")
    if norm.weight.shape != (columns,):
        raise UnsupportedModelError(f"{where} {name}: expected ({columns},), got a weight {tuple(norm.weight.shape)}")
    return norm.weight, getattr(norm, family.norm_eps)
