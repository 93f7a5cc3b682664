"""The meaning of each operator, in plain torch and in the rounding order of transformers.

These functions are the CPU implementation of the operators and what every kernel is tested against. Shapes: B batch,
T tokens, H query heads, K kv heads, S rows of a cache block, D head_dim, C hidden size; in attention N rows of queries and
S positions of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..kernels.arguments import Projection

# The largest code of each 8-bit format.
LARGEST_CODE = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def rms_rstd_ref(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1/rms of each row of `x` [..., C], in float32 [...]."""
    return torch.rsqrt(x.float().pow(2).mean(-1) + eps)


def row_norm_ref(x: torch.Tensor, weight: torch.Tensor | None, norm_order: str, eps: float) -> torch.Tensor:
    """RMS norm of each row of `x` [..., C] with `weight` [C]; `norm_order` says where the result is rounded."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return wide.to(x.dtype)
    if norm_order == "llama":
        return weight * wide.to(x.dtype)
    weight = weight.float()
    return (wide * (1.0 + weight if norm_order == "gemma" else weight)).to(x.dtype)


def rope_ref(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + R/2) of `x` [T, K, D] by `cos`, `sin` [T, R/2]; columns from R on pass through.

    Products and sums are in the wider dtype of the two (OLMo 2 keeps cos and sin in float32), the result in that of `x`.
    """
    half = cos.shape[-1]
    x1, x2, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1).to(x.dtype)


def kv_project_ref(layer: Projection) -> None:
    """Project the rows of one layer ``[T, C]`` to K and V, and Q where there is Q; norm and rotate them; store them.

    Token t goes to ``slot_mapping[t]`` of the caches, and its Q to row t. For ``"folded"`` the float32 product of the raw rows
    is scaled by 1/rms before its only rounding.
    """
    x, rstd, head_dim = layer.hidden_states, layer.rstd, layer.k_cache.shape[-1]
    if layer.norm == "hf":
        x = row_norm_ref(x, layer.norm_weight, layer.norm_order, layer.norm_eps)
    elif layer.norm == "folded" and rstd is None:
        rstd = rms_rstd_ref(x, layer.norm_eps)

    def heads(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _linear(x, weight, bias, rstd).unflatten(-1, (-1, head_dim))

    def finish(rows: torch.Tensor, norm_weight: torch.Tensor | None) -> torch.Tensor:
        cos, sin = layer.cos, layer.sin
        if cos is not None and sin is not None and layer.positions is not None:
            cos, sin = cos[layer.positions], sin[layer.positions]
        return finish_heads_ref(rows, norm_weight, layer.norm_order, layer.head_norm_eps, cos, sin)

    if layer.q_weight is not None and layer.q is not None:
        layer.q.copy_(finish(heads(layer.q_weight, layer.q_bias), layer.q_norm_weight))
    k = finish(heads(layer.k_weight, layer.k_bias), layer.k_norm_weight)
    store_rows_ref(k, layer.k_cache, layer.slot_mapping)
    store_rows_ref(heads(layer.v_weight, layer.v_bias), layer.v_cache, layer.slot_mapping)


def finish_heads_ref(
    rows: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_order: str,
    norm_eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> torch.Tensor:
    """K or Q ``[T, K, D]`` after its norm, over each head or over all together as `norm_weight` is wide, and RoPE."""
    if norm_weight is not None:
        whole = rows if norm_weight.shape[0] == rows.shape[-1] else rows.flatten(-2)
        rows = row_norm_ref(whole, norm_weight, norm_order, norm_eps).view(rows.shape)
    return rows if cos is None or sin is None else rope_ref(rows, cos, sin)


def kv_splice_ref(
    k: torch.Tensor,
    v: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    static_scale: bool,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_cache_scale: torch.Tensor | None,
    v_cache_scale: torch.Tensor | None,
) -> None:
    """Copy rows of `k`, `v` [B, K, T, D] to `slot_mapping` [B * T] of the caches, rotating K in float32 by `cos`, `sin`.

    8-bit rows have scales [B, K, T] in the source and [blocks, K, S] in the caches, which are computed from each row's
    largest value and stored, or read if static.
    """
    for rows, scale, cache, cache_scale, angles in (
        (k, k_scale, k_cache, k_cache_scale, (cos, sin)),
        (v, v_scale, v_cache, v_cache_scale, (None, None)),
    ):
        rows = rows.transpose(1, 2).flatten(0, 1)
        no_scale = torch.ones(rows.shape[:2], dtype=torch.float32, device=rows.device)
        scale = no_scale if scale is None else scale.transpose(1, 2).flatten(0, 1)
        if rows.dtype == cache.dtype and cache_scale is not None and angles[0] is None and not static_scale:
            store_rows_ref(rows, cache, slot_mapping)
            store_rows_ref(scale[..., None], cache_scale[..., None], slot_mapping)
            continue
        rows = rows.float() * scale[..., None]
        if angles[0] is not None and angles[1] is not None:
            rows = rope_ref(rows, angles[0].float(), angles[1].float())
        if cache_scale is not None:
            rows = _encoded(rows, cache.dtype, cache_scale, slot_mapping, static_scale)
        store_rows_ref(rows, cache, slot_mapping)


class _Attended(NamedTuple):
    """Attention probabilities of one sequence: its rows over the n keys that the cache holds for it, for some kv heads.

    Args:
        keys: positions [n].
        block, row: where the keys are in the cache, [n].
        probabilities: float32 [kv_heads, heads of each, N, n], 0 where a row does not see a key.
    """

    sequence: int
    kv_heads: slice
    heads: slice
    keys: torch.Tensor
    block: torch.Tensor
    row: torch.Tensor
    probabilities: torch.Tensor


def _attend_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    key_slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> Iterator[_Attended]:
    """Softmax over the keys that each row sees, for one sequence and as many kv heads at a time as make few probabilities."""
    if not positions.numel():
        return
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = q.shape[2] // num_kv_heads
    every = torch.arange(key_slots.shape[1], device=q.device)
    for sequence, (slots, places) in enumerate(zip(key_slots, positions, strict=True)):
        # Keys behind all rows are not looked at: their slots may be still to be written.
        keys = every[(slots >= 0) & (every <= places.max())]
        block, row = slots[keys] // block_size, slots[keys] % block_size
        distance = places[:, None] - keys
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        queries = q[sequence].unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3).float()
        k = k_cache[block, :, row].permute(1, 2, 0).float()
        at_a_time = max(1, _PROBABILITIES // max(1, group * hidden.numel()))
        for first in range(0, num_kv_heads, at_a_time):
            kv_heads = slice(first, min(first + at_a_time, num_kv_heads))
            heads = slice(kv_heads.start * group, kv_heads.stop * group)
            logits = scale * (queries[kv_heads].flatten(1, 2) @ k[kv_heads]).unflatten(1, (group, -1))
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits.masked_fill_(hidden, -torch.inf)
            if sinks is not None:
                of_heads = sinks[heads].float().view(-1, group, 1, 1).expand(-1, -1, len(places), 1)
                logits = torch.cat((logits, of_heads), dim=-1)
            # A row that sees nothing, and one that sees NaN, are NaN all over.
            probabilities = logits.softmax(-1)[..., : len(keys)].masked_fill(hidden, 0.0)
            yield _Attended(sequence, kv_heads, heads, keys, block, row, probabilities)


_PROBABILITIES = 1 << 20  # at a time, of a CPU's caches


def attention_peaks_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    key_slots: torch.Tensor,
    positions: torch.Tensor,
    peaks: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """Raise `peaks` [B, S] to the largest probability that a row and head of `q` [B, N, H, D] gives to each key."""
    for part in _attend_ref(q, k_cache, key_slots, positions, scale, window, softcap, sinks):
        own = peaks[part.sequence]
        own[part.keys] = torch.maximum(own[part.keys], part.probabilities.flatten(0, 2).amax(0))


def attend_rows_ref(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    key_slots: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """Write to `out` [B, N, H, D] the sum of V over the keys that each row of `q` sees, weighted by their probabilities."""
    for part in _attend_ref(q, k_cache, key_slots, positions, scale, window, softcap, sinks):
        v = v_cache[part.block, part.kv_heads, part.row].transpose(0, 1).unsqueeze(1).float()
        out[part.sequence, :, part.heads] = (part.probabilities @ v).flatten(0, 1).transpose(0, 1).to(out.dtype)


def store_rows_ref(rows: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Store `rows` [T, K, D] at the given slots of `cache` [blocks, K, S, D]: slot = block * S + row; -1 is skipped."""
    keep = slot_mapping >= 0
    if not bool(keep.all()):
        rows, slot_mapping = rows[keep], slot_mapping[keep]
    if cache.dtype == torch.float8_e4m3fn:
        rows = rows.float().clamp(-LARGEST_CODE[cache.dtype], LARGEST_CODE[cache.dtype])
    rows, block_size = rows.to(cache.dtype), cache.shape[2]
    if cache.dtype.itemsize == 1:  # torch cannot index float8
        rows, cache = rows.view(torch.uint8), cache.view(torch.uint8)
    block, row = slot_mapping // block_size, slot_mapping % block_size
    if len(rows) and bool(block[0] == block[-1]) and bool((slot_mapping.diff() == 1).all()):
        cache[block[0], :, row[0] : row[-1] + 1] = rows.transpose(0, 1)  # several times as fast as by indices
    else:
        cache[block, :, row] = rows


def _encoded(
    rows: torch.Tensor, dtype: torch.dtype, cache_scale: torch.Tensor, slot_mapping: torch.Tensor, static_scale: bool
) -> torch.Tensor:
    """Rows [T, K, D] as 8-bit codes, rounded to nearest even and saturated."""
    largest_code = LARGEST_CODE[dtype]
    if static_scale:
        slots, block_size = slot_mapping.clamp(min=0), cache_scale.shape[2]
        scale = cache_scale[slots // block_size, :, slots % block_size]
    else:
        largest = rows.abs().amax(-1)
        scale = torch.where(largest > 0, largest * (1.0 / largest_code), 1.0)
        store_rows_ref(scale[..., None], cache_scale[..., None], slot_mapping)
    codes = (rows * (1.0 / scale)[..., None]).clamp(-largest_code, largest_code)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rstd: torch.Tensor | None
) -> torch.Tensor:
    if rstd is None:
        return F.linear(x, weight, bias)
    y = F.linear(x.float(), weight.float()) * rstd[:, None]
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)
