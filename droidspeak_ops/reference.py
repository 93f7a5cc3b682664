"""What each operator means, in plain torch and in the rounding order of transformers.

These functions are the CPU implementation of the operators and what every kernel is tested against. Shapes: B batch,
T tokens, K kv heads, S rows of a cache block, D head_dim, C hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_rstd_ref(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1/rms of each row of `x` [..., C], in float32 [...]."""
    return torch.rsqrt(x.float().pow(2).mean(-1) + eps)


def row_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of each row of `x` [..., C]: rounded to the dtype of `x` before it is multiplied by `weight` [C]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rope_ref(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + R/2) of `x` [T, K, D] by `cos`, `sin` [T, R/2]; columns from R on pass through."""
    half = cos.shape[-1]
    x1, x2, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1)


def kv_project_ref(
    x: torch.Tensor,
    rstd: torch.Tensor | None,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    k_bias: torch.Tensor | None,
    v_bias: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    k_norm_eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    """Project rows `x` [T, C] to K and V, norm and rotate K, and store row t at `slot_mapping[t]` of the caches.

    With `rstd` [T] the rows are raw hidden states and the norm's weight is folded into the projections: the float32
    product is scaled before its only rounding. Without it the rows are used as they are.
    """
    head_dim = k_cache.shape[-1]
    k = _linear(x, k_weight, k_bias, rstd).unflatten(-1, (-1, head_dim))
    v = _linear(x, v_weight, v_bias, rstd).unflatten(-1, (-1, head_dim))
    if k_norm_weight is not None:
        k = row_norm_ref(k, k_norm_weight, k_norm_eps)
    if cos is not None and sin is not None:
        k = rope_ref(k, cos, sin)
    store_rows_ref(k, k_cache, slot_mapping)
    store_rows_ref(v, v_cache, slot_mapping)


def kv_splice_ref(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    """Copy rows of `k`, `v` [B, K, T, D] to `slot_mapping` [B * T] of the caches, rotating K in float32 by `cos`, `sin`."""
    k, v = k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)
    if cos is not None and sin is not None:
        k = rope_ref(k.float(), cos.float(), sin.float())
    store_rows_ref(k, k_cache, slot_mapping)
    store_rows_ref(v, v_cache, slot_mapping)


def store_rows_ref(rows: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Store `rows` [T, K, D] at the given slots of `cache` [blocks, K, S, D]: slot = block * S + row; -1 is skipped."""
    keep = slot_mapping >= 0
    if not bool(keep.all()):
        rows, slot_mapping = rows[keep], slot_mapping[keep]
    block_size = cache.shape[2]
    cache[slot_mapping // block_size, :, slot_mapping % block_size] = rows.to(cache.dtype)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rstd: torch.Tensor | None
) -> torch.Tensor:
    if rstd is None:
        return F.linear(x, weight, bias)
    y = F.linear(x.float(), weight.float()) * rstd[:, None]
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)
