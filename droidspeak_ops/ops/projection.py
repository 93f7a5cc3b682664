"""The common part of the projections of :mod:`droidspeak_ops.ops`: their checks, and the call of the operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.arguments import SHARED, Projection, to_operator
from .checks import (
    FLOATS,
    NORMS,
    check,
    check_alike,
    check_caches,
    check_choice,
    check_eps,
    check_norm_weight,
    check_rotation,
    check_rows,
    fail,
)
from .namespace import ops


def project(layers: Sequence[Projection]) -> None:
    """Check the arguments of `layers`, which are alike, and call the operator.

    Raises:
        ValueError: a shape, dtype, device or slot does not fit, or layers differ; the message names the argument.
    """
    _check(layers[0])
    if len(layers) > 1:
        check_alike(layers, shared=SHARED)
    ops.kv_project(*to_operator([_in_rows(layer) for layer in layers]))


def rows(hidden_states: torch.Tensor) -> torch.Tensor:
    """``[..., C]`` as ``[T, C]``."""
    return hidden_states if hidden_states.dim() == 2 else hidden_states.reshape(-1, hidden_states.shape[-1])


def _in_rows(layer: Projection) -> Projection:
    if layer.hidden_states.dim() == 2:
        return layer
    rstd = None if layer.rstd is None else layer.rstd.reshape(-1)
    return layer._replace(hidden_states=rows(layer.hidden_states), rstd=rstd)


def _check(layer: Projection) -> None:
    like = layer.hidden_states
    check_rows("hidden_states", like)
    check_caches(layer.k_cache, layer.v_cache, like, (*FLOATS, torch.float8_e4m3fn))
    hidden_size, num_tokens, dtype = like.shape[-1], like.shape[:-1].numel(), like.dtype
    _, num_kv_heads, _, head_dim = layer.k_cache.shape
    kv_size = num_kv_heads * head_dim
    check("k_weight", layer.k_weight, (kv_size, hidden_size), like, dtype)
    check("v_weight", layer.v_weight, (kv_size, hidden_size), like, dtype)
    has_q = layer.q is not None
    if has_q != (layer.q_weight is not None):
        raise ValueError("q, q_weight: expected both or neither, got one of them")
    biases = [layer.k_bias, layer.v_bias, *([layer.q_bias] if has_q else [])]
    if len({bias is None for bias in biases}) > 1:
        raise ValueError("k_bias, v_bias, and q_bias with Q: expected all or none, got some of them")
    check("k_bias", layer.k_bias, (kv_size,), like, dtype)
    check("v_bias", layer.v_bias, (kv_size,), like, dtype)
    over_all = False
    if layer.k_norm_weight is not None:
        check_norm_weight("k_norm_weight", layer.k_norm_weight, layer.norm_order)
        over_all = any(
            weight is not None and weight.shape[0] != head_dim for weight in (layer.q_norm_weight, layer.k_norm_weight)
        )
        check("k_norm_weight", layer.k_norm_weight, (kv_size if over_all else head_dim,), like, dtype)
        if over_all and layer.k_cache.dtype != dtype:
            fail("k_cache", layer.k_cache, f"{dtype}, the dtype of hidden_states, for a norm over all heads")
    if layer.q is not None:
        num_q_heads = layer.q.shape[1] if layer.q.dim() == 3 else 0
        q_size = num_q_heads * head_dim
        check("q", layer.q, (num_tokens, num_q_heads, head_dim), like, dtype)
        check("q_weight", layer.q_weight, (q_size, hidden_size), like, dtype)
        check("q_bias", layer.q_bias, (q_size,), like, dtype)
        if (layer.q_norm_weight is None) != (layer.k_norm_weight is None):
            raise ValueError("q_norm_weight, k_norm_weight: expected both or neither, got one of them")
        check("q_norm_weight", layer.q_norm_weight, (q_size if over_all else head_dim,), like, dtype)
    check("slot_mapping", layer.slot_mapping, (num_tokens,), like, torch.int64)
    check_rotation(layer.cos, layer.sin, layer.positions, num_tokens, head_dim, like, dtype)
    check_choice("norm", layer.norm, NORMS)
    check_eps("norm_eps", layer.norm_eps)
    check_eps("head_norm_eps", layer.head_norm_eps)
    if layer.norm == "hf":
        check_norm_weight("norm_weight", layer.norm_weight, layer.norm_order)
        check("norm_weight", layer.norm_weight, (hidden_size,), like, dtype)
    elif layer.norm_weight is not None:
        raise ValueError(
            f"norm_weight: expected None with norm={layer.norm!r}, got a tensor; only 'hf' multiplies by it"
        )
    if layer.rstd is not None:
        if layer.norm != "folded":
            raise ValueError(f"rstd: expected None with norm={layer.norm!r}, got a tensor; only 'folded' scales by it")
        check("rstd", layer.rstd, tuple(like.shape[:-1]), like, torch.float32)
