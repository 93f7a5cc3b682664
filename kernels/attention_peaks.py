"""The largest attention probability that any row and head gives each key, without probabilities in memory.

Three kernels: the log of the sum of exp over each split of the keys; probabilities, computed again, and their maximum over all
rows and the heads of a kv head; the maximum over kv heads. The second has a program for each block of keys *and* kv head: 8,192
keys with 8 kv heads are 1,024 programs of 64 keys, so that others multiply while one waits for its keys. With all heads in one
they would be 128, fewer than an H100 has multiprocessors. That costs a float for each key and kv head in memory, against D
values of K. The maximum is not taken by atomics, which floats have not on every target.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_config import attention_config, keys_per_lse
from .attention_tile import (
    LOG2_E,
    SIZES,
    add_to_lse,
    base_2,
    key_rows,
    logits_of,
    packed_rows,
    query_ptrs,
    seen_logits,
    seen_range,
    split_range,
)
from .sizes import cdiv, next_power_of_2


@triton.jit(do_not_specialize=SIZES)
def _attention_lse_kernel(
    q_ptr,  # [B, N, H, D]
    k_cache_ptr,  # [blocks, K, block_size, D]
    key_slots_ptr,  # [B, S] int64
    positions_ptr,  # [B, N] int64
    lse_ptr,  # [B, K, N * GROUP, splits] float32
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
    """Log2 of the sum of exp over one split of the keys, for a block of packed rows."""
    start_m = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    batch = (tl.program_id(2) // NUM_KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(2) % NUM_KV_HEADS
    positions_ptr += batch * stride_positions
    key_slots_ptr += batch * stride_slots
    k_cache_ptr += kv_head.to(tl.int64) * stride_k_h
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
    for start in range(begin, end, BLOCK_N):
        o_j = start + tl.arange(0, BLOCK_N)
        block, row, seen_from = key_rows(key_slots_ptr, o_j, num_keys, num_slots, block_size)
        k_ptrs = k_cache_ptr + (block * stride_k_b + row * stride_k_s)[:, None] + o_d[None, :]
        b_k = tl.load(k_ptrs, mask=(seen_from < end)[:, None] & m_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        b_s = seen_logits(b_q, b_k, seen_from, first, last, scale, softcap, HAS_WINDOW, HAS_SOFTCAP)
        largest, total, _, _ = add_to_lse(largest, total, b_s)
    lse_ptrs = lse_ptr + (tl.program_id(2).to(tl.int64) * num_packed + o_m) * num_splits + split
    tl.store(lse_ptrs, largest + tl.log2(total))


@triton.jit(do_not_specialize=SIZES)
def _attention_peaks_kernel(
    q_ptr,  # [B, N, H, D]
    k_cache_ptr,  # [blocks, K, block_size, D]
    key_slots_ptr,  # [B, S] int64
    positions_ptr,  # [B, N] int64
    sinks_ptr,  # [H], or None
    lse_ptr,  # [B, K, N * GROUP, splits] float32
    largest_ptr,  # [B, K, S] float32
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
    stride_slots,
    stride_positions,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LOG2_E: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """The largest probability that a block of keys gets from all rows and the heads of one kv head; inf where one is NaN."""
    start = tl.program_id(0) * BLOCK_N
    batch = (tl.program_id(1) // NUM_KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(1) % NUM_KV_HEADS
    q_ptr += batch * stride_q_b
    positions_ptr += batch * stride_positions
    lse_ptr += tl.program_id(1).to(tl.int64) * num_packed * num_splits
    o_j = start + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    block, row, seen_from = key_rows(key_slots_ptr + batch * stride_slots, o_j, num_keys, num_slots, block_size)
    k_ptrs = k_cache_ptr + kv_head.to(tl.int64) * stride_k_h + (block * stride_k_b + row * stride_k_s)[:, None]
    b_k = tl.load(
        k_ptrs + o_d[None, :], mask=(seen_from < num_keys)[:, None] & m_d[None, :], other=0.0
    )  # [BLOCK_N, BLOCK_D]
    b_peak = tl.zeros((BLOCK_N,), tl.float32)
    for start_m in range(0, num_packed, BLOCK_M):
        o_m, o_n, o_g, first, last = packed_rows(
            positions_ptr, start_m, num_packed, num_keys, window, GROUP, HAS_WINDOW, BLOCK_M
        )
        begin, end = seen_range(first, last, num_keys)
        if (start < end) & (start + BLOCK_N > begin):
            q_ptrs = query_ptrs(q_ptr, o_n, o_g, kv_head * GROUP, stride_q_n, stride_q_h, o_d)
            b_q = tl.load(q_ptrs, mask=m_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
            largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            for split in range(0, num_splits, BLOCK_SPLITS):
                o_s = split + tl.arange(0, BLOCK_SPLITS)
                b_lse = tl.load(
                    lse_ptr + (o_m * num_splits)[:, None] + o_s[None, :],
                    mask=(o_s < num_splits)[None, :],
                    other=float("-inf"),
                )  # [BLOCK_M, BLOCK_SPLITS]
                largest, total, _, _ = add_to_lse(largest, total, b_lse)
            if HAS_SINKS:
                b_sink = tl.load(sinks_ptr + kv_head * GROUP + o_g).to(tl.float32) * LOG2_E
                largest, total, _, _ = add_to_lse(largest, total, b_sink[:, None])
            lse = largest + tl.log2(total)
            b_s = logits_of(tl.dot(b_k, tl.trans(b_q), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
            seen = seen_from[:, None] <= last[None, :]  # [BLOCK_N, BLOCK_M]
            if HAS_WINDOW:
                seen &= seen_from[:, None] >= first[None, :]
            b_p = tl.where(seen, tl.exp2(b_s - lse[None, :]), 0.0)
            # A maximum would drop NaN; no probability is inf.
            b_p = tl.where(b_p == b_p, b_p, float("inf"))
            b_peak = tl.maximum(b_peak, tl.max(b_p, axis=1))
    tl.store(largest_ptr + tl.program_id(1).to(tl.int64) * num_keys + o_j, b_peak, mask=o_j < num_keys)


@triton.jit(do_not_specialize=["num_keys", "stride_peaks"])
def _raise_peaks_kernel(
    largest_ptr,  # [B, K, S] float32
    peaks_ptr,  # [B, S] float32
    num_keys,
    stride_peaks,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    o_j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_h = tl.arange(0, BLOCK_H)
    m_j = o_j < num_keys
    ptrs = largest_ptr + (batch * NUM_KV_HEADS + o_h)[:, None] * num_keys + o_j[None, :]
    b_largest = tl.load(ptrs, mask=(o_h < NUM_KV_HEADS)[:, None] & m_j[None, :], other=0.0)  # [BLOCK_H, BLOCK_N]
    b_largest = tl.max(b_largest, axis=0)
    b_largest = tl.where(b_largest == float("inf"), float("nan"), b_largest)
    peaks_ptr += batch * stride_peaks
    b_peak = tl.load(peaks_ptr + o_j, mask=m_j, other=0.0)
    tl.store(peaks_ptr + o_j, tl.maximum(b_peak, b_largest, propagate_nan=tl.PropagateNan.ALL), mask=m_j)


def attention_peaks(
    target: str,
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
    """Launch the three kernels. Shapes as in their signatures, checked by the caller; last dimensions contiguous."""
    batch, num_rows, num_q_heads, head_dim = q.shape
    blocks, num_kv_heads, block_size, _ = k_cache.shape
    num_keys = key_slots.shape[1]
    if batch * num_rows * num_keys == 0:
        return
    config, split = attention_config(target, q.dtype, head_dim, reads_values=False), keys_per_lse(num_q_heads)
    group = num_q_heads // num_kv_heads
    num_packed, num_splits, problems = num_rows * group, cdiv(num_keys, split), batch * num_kv_heads
    lse = torch.empty((problems, num_packed, num_splits), dtype=torch.float32, device=q.device)
    largest = torch.empty((batch, num_kv_heads, num_keys), dtype=torch.float32, device=q.device)
    sizes = num_packed, num_keys, num_splits, blocks * block_size, block_size, window or 0, *base_2(scale, softcap)
    strides = *q.stride()[:3], *k_cache.stride()[:3], key_slots.stride(0), positions.stride(0)
    constants = {
        "NUM_KV_HEADS": num_kv_heads, "GROUP": group, "HEAD_DIM": head_dim,
        "HAS_WINDOW": window is not None, "HAS_SOFTCAP": softcap is not None,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": max(next_power_of_2(head_dim), 16),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    _attention_lse_kernel[(cdiv(num_packed, config.block_m), num_splits, problems)](
        q, k_cache, key_slots, positions, lse, *sizes, *strides, SPLIT=split, **constants,
    )  # fmt: skip
    _attention_peaks_kernel[(cdiv(num_keys, config.block_n), problems)](
        q, k_cache, key_slots, positions, sinks, lse, largest, *sizes, *strides,
        LOG2_E=LOG2_E, HAS_SINKS=sinks is not None, BLOCK_SPLITS=BLOCK_SPLITS, **constants,
    )  # fmt: skip
    block_h = next_power_of_2(num_kv_heads)
    block_n = max(1024 // block_h, 32)
    _raise_peaks_kernel[(cdiv(num_keys, block_n), batch)](
        largest, peaks, num_keys, peaks.stride(0),
        NUM_KV_HEADS=num_kv_heads, BLOCK_H=block_h, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip


BLOCK_SPLITS = 16  # sums that are combined at once: of 16,384 keys with 32 query heads all
