"""Attention of rows at any positions over a cache: the sum of V weighted by the softmax over the keys that each row sees.

Two kernels: an online softmax over each split of the keys, and the splits combined in their order. Keys behind all rows of a
block, and before all their windows, are not looked at: the loop's bounds are read from the positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_config import attention_config, keys_per_split
from .attention_tile import (
    LOG2_E,
    SIZES,
    add_to_lse,
    base_2,
    key_rows,
    packed_rows,
    query_ptrs,
    seen_logits,
    seen_range,
    split_range,
)
from .sizes import cdiv, next_power_of_2


@triton.jit(do_not_specialize=SIZES)
def _attend_rows_kernel(
    q_ptr,  # [B, N, H, D]
    k_cache_ptr,  # [blocks, K, block_size, D]
    v_cache_ptr,  # [blocks, K, block_size, D]
    key_slots_ptr,  # [B, S] int64
    positions_ptr,  # [B, N] int64
    lse_ptr,  # [B, K, N * GROUP, splits] float32
    part_ptr,  # [B, K, N * GROUP, splits, D] float32
    num_packed,
    num_keys,
    num_splits,
    num_slots,
    block_size,
    window,
    scale,
    softcap,
    stride_q_b,
    stride_q_n,
    stride_q_h,
    stride_k_b,
    stride_k_h,
    stride_k_s,
    stride_v_b,
    stride_v_h,
    stride_v_s,
    stride_slots,
    stride_positions,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention of a block of packed rows over one split of the keys, and the log2 of the sum of exp over it."""
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    start_m = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    batch = (tl.program_id(2) // NUM_KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(2) % NUM_KV_HEADS
    positions_ptr += batch * stride_positions
    key_slots_ptr += batch * stride_slots
    k_cache_ptr += kv_head.to(tl.int64) * stride_k_h
    v_cache_ptr += kv_head.to(tl.int64) * stride_v_h
    o_m, o_n, o_g, first, last = packed_rows(
        positions_ptr, start_m, num_packed, num_keys, window, GROUP, HAS_WINDOW, BLOCK_M
    )
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    q_ptrs = query_ptrs(q_ptr + batch * stride_q_b, o_n, o_g, kv_head * GROUP, stride_q_n, stride_q_h, o_d)
    b_q = tl.load(q_ptrs, mask=m_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    begin, end = split_range(first, last, num_keys, split, SPLIT, BLOCK_N)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        o_j = start + tl.arange(0, BLOCK_N)
        block, row, seen_from = key_rows(key_slots_ptr, o_j, num_keys, num_slots, block_size)
        # V behind all rows may be still to be written: a probability of 0 would not make up for a NaN.
        mask = (seen_from < end)[:, None] & m_d[None, :]
        k_ptrs = k_cache_ptr + (block * stride_k_b + row * stride_k_s)[:, None] + o_d[None, :]
        v_ptrs = v_cache_ptr + (block * stride_v_b + row * stride_v_s)[:, None] + o_d[None, :]
        b_k = tl.load(k_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        b_v = tl.load(v_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        b_s = seen_logits(b_q, b_k, seen_from, first, last, scale, softcap, HAS_WINDOW, HAS_SOFTCAP)
        largest, total, factor, b_p = add_to_lse(largest, total, b_s)
        acc = tl.dot(b_p.to(DTYPE), b_v, acc * factor[:, None], input_precision="ieee")
    place = (tl.program_id(2).to(tl.int64) * num_packed + o_m) * num_splits + split
    tl.store(lse_ptr + place, largest + tl.log2(total))
    # What is not stored is not read either: its sum is 0.
    part_ptrs = part_ptr + (place * HEAD_DIM)[:, None] + o_d[None, :]
    tl.store(part_ptrs, acc / total[:, None], mask=(total != 0.0)[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["num_packed", "num_keys", "num_splits", "window", "stride_positions"])
def _combine_splits_kernel(
    positions_ptr,  # [B, N] int64
    sinks_ptr,  # [H], or None
    lse_ptr,  # [B, K, N * GROUP, splits] float32
    part_ptr,  # [B, K, N * GROUP, splits, D] float32
    out_ptr,  # [B, N, H, D]
    num_packed,
    num_keys,
    num_splits,
    window,
    stride_positions,
    stride_out_b,
    stride_out_n,
    stride_out_h,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    LOG2_E: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The splits of a few packed rows, weighted by their sums of exp."""
    start_m = tl.program_id(0) * BLOCK_M
    batch = (tl.program_id(1) // NUM_KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(1) % NUM_KV_HEADS
    o_m, o_n, o_g, first, last = packed_rows(
        positions_ptr + batch * stride_positions, start_m, num_packed, num_keys, window, GROUP, HAS_WINDOW, BLOCK_M
    )
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    place = (tl.program_id(1).to(tl.int64) * num_packed + o_m) * num_splits
    begin, end = seen_range(first, last, num_keys)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for split in range(begin // SPLIT, tl.cdiv(end, SPLIT)):
        b_lse = tl.load(lse_ptr + place + split)
        m_part = (b_lse != float("-inf"))[:, None] & m_d[None, :]
        part_ptrs = part_ptr + ((place + split) * HEAD_DIM)[:, None] + o_d[None, :]
        b_part = tl.load(part_ptrs, mask=m_part, other=0.0)  # [BLOCK_M, BLOCK_D]
        largest, total, factor, b_weight = add_to_lse(largest, total, b_lse[:, None])
        acc = acc * factor[:, None] + b_weight * b_part
    if HAS_SINKS:
        b_sink = tl.load(sinks_ptr + kv_head * GROUP + o_g).to(tl.float32) * LOG2_E
        largest, total, factor, _ = add_to_lse(largest, total, b_sink[:, None])
        acc *= factor[:, None]
    total = tl.where(total == 0.0, 1.0, total)  # of rows that see nothing
    out_ptrs = query_ptrs(out_ptr + batch * stride_out_b, o_n, o_g, kv_head * GROUP, stride_out_n, stride_out_h, o_d)
    b_out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, b_out, mask=m_d[None, :])


def attend_rows(
    target: str,
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
    """Launch both kernels. Shapes as in their signatures, checked by the caller; last dimensions contiguous."""
    batch, num_rows, num_q_heads, head_dim = q.shape
    blocks, num_kv_heads, block_size, _ = k_cache.shape
    num_keys = key_slots.shape[1]
    if batch * num_rows == 0:
        return
    config, split = attention_config(target, q.dtype, head_dim, reads_values=True), keys_per_split(num_q_heads)
    group = num_q_heads // num_kv_heads
    num_packed, num_splits, problems = num_rows * group, cdiv(num_keys, split), batch * num_kv_heads
    lse = torch.empty((problems, num_packed, num_splits), dtype=torch.float32, device=q.device)
    part = torch.empty((problems, num_packed, num_splits, head_dim), dtype=torch.float32, device=q.device)
    block_d = max(next_power_of_2(head_dim), 16)
    constants = {
        "NUM_KV_HEADS": num_kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "SPLIT": split,
        "HAS_WINDOW": window is not None, "BLOCK_D": block_d,
    }  # fmt: skip
    if num_splits:
        _attend_rows_kernel[(cdiv(num_packed, config.block_m), num_splits, problems)](
            q, k_cache, v_cache, key_slots, positions, lse, part,
            num_packed, num_keys, num_splits, blocks * block_size, block_size, window or 0, *base_2(scale, softcap),
            *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], key_slots.stride(0), positions.stride(0),
            HAS_SOFTCAP=softcap is not None, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            num_warps=config.num_warps, num_stages=config.num_stages, **constants,
        )  # fmt: skip
    block_m = max(1024 // block_d, 1)  # 8 values a thread
    _combine_splits_kernel[(cdiv(num_packed, block_m), problems)](
        positions, sinks, lse, part, out, num_packed, num_keys, num_splits, window or 0, positions.stride(0),
        *out.stride()[:3], LOG2_E=LOG2_E, HAS_SINKS=sinks is not None, BLOCK_M=block_m, num_warps=4, **constants,
    )  # fmt: skip
