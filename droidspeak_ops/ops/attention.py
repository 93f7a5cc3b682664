"""Attention of some rows over a KV cache, wherever rows and keys are: what they look at most, and what they make of it."""

from __future__ import annotations

import torch

from .checks import FLOATS, check, check_caches, check_positive, fail
from .namespace import ops


def attention_peaks(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    key_slots: torch.Tensor,
    positions: torch.Tensor,
    peaks: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Raise each key's peak to the largest attention probability that any row and head gives it, in place.

    Row n sees the key at position j if the cache holds it, ``j <= positions[b, n]`` and, with a window,
    ``positions[b, n] - j < window``. Probabilities are softmax over what a row sees, in float32. On a GPU they are never in
    memory: beyond `peaks`, a call allocates a float32 for each key and kv head, and for each row, head and 32 H keys.

    Args:
        q: ``[B, N, H, D]``, float32, float16 or bfloat16, after norm and RoPE, with any strides but the last.
        k_cache: ``[blocks, K, block_size, D]`` of the same dtype. H is a multiple of K: consecutive query heads share a head.
        key_slots: int64 ``[B, S]``: the slot of the key at each position, -1 where the cache does not hold it. Slots outside
            of the cache raise on the CPU, and count as -1 on a GPU.
        positions: int64 ``[B, N]``: the position of each row, which may be S or beyond; -1 for padding, which sees nothing.
        peaks: float32 ``[B, S]``. NaN in a query or a key that it sees, and in the peak itself, is kept.
        scale: of the logits ``scale * q · k``; finite and above 0.
        window: number of positions that a row sees, its own included.
        softcap: replaces each logit by ``softcap * tanh(logit / softcap)`` (Gemma 2); finite and above 0.
        sinks: ``[H]``, float32 or of q's dtype: a further logit for each head, which takes probability and has no key
            (GPT-OSS).

    Raises:
        ValueError: a shape, dtype, device, number or slot does not fit; the message names the argument.
    """
    _check(q, k_cache, None, key_slots, positions, scale, window, softcap, sinks)
    check("peaks", peaks, tuple(key_slots.shape), q, torch.float32)
    ops.attention_peaks(q, k_cache, key_slots, positions, peaks, scale, window, softcap, sinks)


def attend_rows(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    key_slots: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Compute attention of rows at any positions over a cache: the sum of V weighted by each row's probabilities.

    Args:
        q, k_cache, key_slots, positions, scale, window, softcap, sinks: as in :func:`attention_peaks`.
        v_cache: of the shape and dtype of `k_cache`.
        out: ``[B, N, H, D]`` of q's dtype, written in place; 0 for rows that see nothing.

    Raises:
        ValueError: a shape, dtype, device, number or slot does not fit; the message names the argument.
    """
    _check(q, k_cache, v_cache, key_slots, positions, scale, window, softcap, sinks)
    check("out", out, tuple(q.shape), q, q.dtype)
    ops.attend_rows(q, k_cache, v_cache, key_slots, positions, out, scale, window, softcap, sinks)


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    key_slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    if q.dim() != 4 or q.dtype not in FLOATS:
        fail("q", q, "float32, float16 or bfloat16 [B, N, H, D]")
    check_caches(k_cache, v_cache, q, (q.dtype,))
    blocks, num_kv_heads, block_size, head_dim = k_cache.shape
    if blocks * block_size > _MOST_SLOTS:
        fail("k_cache", k_cache, f"at most {_MOST_SLOTS} slots")
    batch, num_rows, num_heads, _ = q.shape
    check("q", q, (batch, num_rows, num_heads, head_dim), q, q.dtype)
    if not num_heads or num_heads % num_kv_heads:
        fail("q", q, f"a multiple of {num_kv_heads} query heads, as k_cache has kv heads")
    check("key_slots", key_slots, (batch, key_slots.shape[1] if key_slots.dim() == 2 else "S"), q, torch.int64)
    check("positions", positions, (batch, num_rows), q, torch.int64)
    check_positive("scale", scale)
    if window is not None and (not isinstance(window, (int, torch.SymInt)) or window < 1):
        raise ValueError(f"window: expected None or an integer of at least 1, got {window!r}")
    if softcap is not None:
        check_positive("softcap", softcap)
    if sinks is not None:
        check("sinks", sinks, (num_heads,), q, torch.float32 if sinks.dtype == torch.float32 else q.dtype)


_MOST_SLOTS = 2**31 - 1  # which the kernels count in 32 bits: a division by the block size takes a GPU a fraction so
