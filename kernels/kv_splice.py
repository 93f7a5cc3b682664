"""Copy rows of one KV tensor into another: change of layout, cast, and rotation of K by a given angle per token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_T = 32
NUM_WARPS = 4


@triton.jit
def _kv_splice_kernel(
    k_ptr,  # [B, K, T, D]
    v_ptr,  # [B, K, T, D]
    cos_ptr,  # [B * T, ROTARY_DIM / 2]
    sin_ptr,  # [B * T, ROTARY_DIM / 2]
    slot_mapping_ptr,  # [B * T] int64
    k_cache_ptr,  # [blocks, K, block_size, D]
    v_cache_ptr,  # [blocks, K, block_size, D]
    num_tokens,
    rows_per_batch,
    num_slots,
    block_size,
    stride_k_b,
    stride_k_h,
    stride_k_t,
    stride_v_b,
    stride_v_h,
    stride_v_t,
    stride_cos,
    stride_sin,
    stride_kcache_b,
    stride_kcache_h,
    stride_kcache_s,
    stride_vcache_b,
    stride_vcache_h,
    stride_vcache_s,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1).to(tl.int64)
    m_t = o_t < num_tokens
    slot = tl.load(slot_mapping_ptr + o_t, mask=m_t, other=-1)
    m_t &= (slot >= 0) & (slot < num_slots)
    block = slot // block_size
    row = slot % block_size
    batch = (o_t // rows_per_batch).to(tl.int64)
    position = o_t % rows_per_batch

    o_d = tl.arange(0, BLOCK_D)
    mask = m_t[:, None] & (o_d < HEAD_DIM)[None, :]  # [BLOCK_T, BLOCK_D]
    o_v = batch * stride_v_b + head * stride_v_h + position * stride_v_t
    o_vcache = block * stride_vcache_b + head * stride_vcache_h + row * stride_vcache_s
    b_v = tl.load(v_ptr + o_v[:, None] + o_d[None, :], mask=mask)
    tl.store(v_cache_ptr + o_vcache[:, None] + o_d[None, :], b_v.to(v_cache_ptr.dtype.element_ty), mask=mask)

    o_k = batch * stride_k_b + head * stride_k_h + position * stride_k_t
    o_kcache = block * stride_kcache_b + head * stride_kcache_h + row * stride_kcache_s
    k_ptrs = k_ptr + o_k[:, None] + o_d[None, :]
    b_k = tl.load(k_ptrs, mask=mask, other=0.0)
    if ROTARY_DIM > 0:
        # The partner of column i is i + ROTARY_DIM/2, with a minus on the first half; its re-read comes from cache.
        HALF: tl.constexpr = ROTARY_DIM // 2
        first = o_d < HALF
        m_rotated = m_t[:, None] & (o_d < ROTARY_DIM)[None, :]
        o_partner = tl.where(first, o_d + HALF, o_d - HALF)
        o_angle = o_d % HALF
        b_p = tl.load(k_ptr + o_k[:, None] + o_partner[None, :], mask=m_rotated, other=0.0).to(tl.float32)
        b_cos = tl.load(cos_ptr + o_t[:, None] * stride_cos + o_angle[None, :], mask=m_rotated, other=1.0)
        b_sin = tl.load(sin_ptr + o_t[:, None] * stride_sin + o_angle[None, :], mask=m_rotated, other=0.0)
        b_sin = tl.where(first[None, :], -b_sin.to(tl.float32), b_sin.to(tl.float32))
        b_k = b_k.to(tl.float32) * b_cos.to(tl.float32) + b_p * b_sin
    tl.store(k_cache_ptr + o_kcache[:, None] + o_d[None, :], b_k.to(k_cache_ptr.dtype.element_ty), mask=mask)


def kv_splice(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Launch `_kv_splice_kernel`. Shapes as in its signature, checked by the caller; last dimensions contiguous."""
    batch, num_kv_heads, rows, head_dim = k.shape
    blocks, _, block_size, _ = k_cache.shape
    if batch * rows == 0:
        return
    _kv_splice_kernel[(triton.cdiv(batch * rows, BLOCK_T), num_kv_heads)](
        k, v, cos, sin, slot_mapping, k_cache, v_cache,
        batch * rows, rows, blocks * block_size, block_size,
        *k.stride()[:3], *v.stride()[:3],
        0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0),
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        HEAD_DIM=head_dim, ROTARY_DIM=0 if cos is None else 2 * cos.shape[-1],
        BLOCK_T=BLOCK_T, BLOCK_D=triton.next_power_of_2(head_dim), num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
