"""The common part of the projections of :mod:`droidspeak_ops.ops`, for one layer or several, with Q or without."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .checks import (
    FLOATS,
    NORMS,
    Norm,
    NormOrder,
    check,
    check_alike,
    check_caches,
    check_choice,
    check_norm_weight,
    check_rotation,
    check_rows,
    fail,
)
from .namespace import ops


def project(
    hidden_states: Sequence[torch.Tensor],
    q_weights: Sequence[torch.Tensor],
    k_weights: Sequence[torch.Tensor],
    v_weights: Sequence[torch.Tensor],
    qs: Sequence[torch.Tensor],
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    slot_mapping: torch.Tensor,
    *,
    norm: Norm,
    norm_weights: Sequence[torch.Tensor],
    norm_order: NormOrder,
    norm_eps: float,
    rstds: Sequence[torch.Tensor],
    q_biases: Sequence[torch.Tensor],
    k_biases: Sequence[torch.Tensor],
    v_biases: Sequence[torch.Tensor],
    q_norm_weights: Sequence[torch.Tensor],
    k_norm_weights: Sequence[torch.Tensor],
    head_norm_eps: float,
    coses: Sequence[torch.Tensor],
    sines: Sequence[torch.Tensor],
    positions: torch.Tensor | None,
) -> None:
    """Check the arguments, apply the input norm, and call the operator: what the public functions have in common.

    Arguments as of :func:`droidspeak_ops.ops.kv_project`, a tensor for each layer or none.
    """
    like = hidden_states[0]
    check_rows("hidden_states", like)
    check_caches(k_caches[0], v_caches[0], like, (*FLOATS, torch.float8_e4m3fn))
    hidden_size, num_tokens = like.shape[-1], like.shape[:-1].numel()
    _, num_kv_heads, _, head_dim = k_caches[0].shape
    kv_size, dtype = num_kv_heads * head_dim, like.dtype
    check("k_weight", k_weights[0], (kv_size, hidden_size), like, dtype)
    check("v_weight", v_weights[0], (kv_size, hidden_size), like, dtype)
    if len(k_biases) != len(v_biases) or (qs and len(k_biases) != len(q_biases)):
        raise ValueError("k_bias, v_bias and the bias of Q, if there is one: all or none are needed")
    if k_biases:
        check("k_bias", k_biases[0], (kv_size,), like, dtype)
        check("v_bias", v_biases[0], (kv_size,), like, dtype)
    if k_norm_weights:
        check_norm_weight("k_norm_weight", k_norm_weights[0], norm_order)
        over_all = any(weights[0].shape[0] != head_dim for weights in (q_norm_weights, k_norm_weights) if weights)
        check("k_norm_weight", k_norm_weights[0], (kv_size if over_all else head_dim,), like, dtype)
        if over_all and k_caches[0].dtype != dtype:
            fail("k_cache", k_caches[0], f"{dtype}, the dtype of hidden_states, for a norm over all heads,")
    if qs:
        num_q_heads = qs[0].shape[1] if qs[0].dim() == 3 else 0
        q_size = num_q_heads * head_dim
        check("q", qs[0], (num_tokens, num_q_heads, head_dim), like, dtype)
        check("q_weight", q_weights[0], (q_size, hidden_size), like, dtype)
        if q_biases:
            check("q_bias", q_biases[0], (q_size,), like, dtype)
        if len(q_norm_weights) != len(k_norm_weights):
            raise ValueError("q_norm_weight and k_norm_weight: both or neither are needed")
        if q_norm_weights:
            check("q_norm_weight", q_norm_weights[0], (q_size if over_all else head_dim,), like, dtype)
    check("slot_mapping", slot_mapping, (num_tokens,), like, torch.int64)
    cos, sin = coses[0] if coses else None, sines[0] if sines else None
    check_rotation(cos, sin, positions, num_tokens, head_dim, like, dtype)
    if len(hidden_states) > 1:
        check_alike(
            hidden_states=hidden_states, k_weights=k_weights, v_weights=v_weights, k_caches=k_caches, v_caches=v_caches,
            norm_weights=norm_weights, k_biases=k_biases, v_biases=v_biases, k_norm_weights=k_norm_weights, coses=coses,
            sines=sines,
        )  # fmt: skip

    check_choice("norm", norm, NORMS)
    if norm == "hf":
        check_norm_weight("norm_weight", norm_weights[0] if norm_weights else None, norm_order)
    elif norm_weights:
        raise ValueError(f"norm_weight: given with norm={norm!r}; only 'hf' multiplies by it")
    if rstds and norm != "folded":
        raise ValueError(f"rstd: given with norm={norm!r}; only 'folded' scales by it")
    x = [rows(states) for states in hidden_states]
    if norm == "hf":
        if norm_weights:
            check("norm_weight", norm_weights[0], (hidden_size,), like, dtype)
        normed = [torch.empty((num_tokens, hidden_size), dtype=dtype, device=like.device) for _ in x]
        ops.row_norm(x, norm_weights, norm_order, norm_eps, normed)
        x = normed
    elif rstds:
        rstds = [rstd.reshape(-1) for rstd in rstds]
        for rstd in rstds:
            check("rstd", rstd, (num_tokens,), like, torch.float32)
    elif norm == "folded":
        rstds = [torch.empty(num_tokens, dtype=torch.float32, device=like.device) for _ in x]
        ops.rms_rstd(x, norm_eps, rstds)
    ops.kv_project(
        x, rstds, q_weights, k_weights, v_weights, q_biases, k_biases, v_biases, q_norm_weights, k_norm_weights,
        norm_order, head_norm_eps, coses, sines, positions, slot_mapping, qs, k_caches, v_caches,
    )  # fmt: skip


def rows(hidden_states: torch.Tensor) -> torch.Tensor:
    """``[..., C]`` as ``[T, C]``."""
    return hidden_states if hidden_states.dim() == 2 else hidden_states.reshape(-1, hidden_states.shape[-1])
