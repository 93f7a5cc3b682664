"""Copy rows of K and V into another KV tensor: change of layout, cast, 8-bit storage in and out, and rotation of K.

8-bit rows are fp8 (e4m3) or int8 with a float32 scale for each token and head: value = code · scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .codes import FLOAT, FP8, as_stored, decode, encode, storage
from .epilogue import pair_columns
from .sizes import cdiv, next_power_of_2

NUM_WARPS = 4


@triton.jit
def _splice_heads(
    row_ptrs,
    stride_h,
    scale_ptrs,
    stride_scale_h,
    b_cos,
    b_sin,
    cache_ptrs,
    stride_cache_h,
    cache_scale_ptrs,
    stride_cscale_h,
    m_t,
    num_heads,
    heads_per_program,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Move the rows of a block of tokens, head by head; angles, slots and addresses are shared by a program's heads."""
    first = tl.program_id(2).to(tl.int64) * heads_per_program
    row_ptrs += first * stride_h
    cache_ptrs += first * stride_cache_h
    if HAS_SCALE:
        scale_ptrs += first * stride_scale_h
    if TARGET != FLOAT:
        cache_scale_ptrs += first * stride_cscale_h
    CODE: tl.constexpr = cache_ptrs.dtype.element_ty
    o_pair = tl.arange(0, BLOCK_P)
    o_col1, o_col2 = pair_columns(o_pair, HEAD_DIM, ROTARY_DIM)
    mask = m_t[:, None] & (o_pair < HEAD_DIM // 2)[None, :]  # [BLOCK_T, BLOCK_P]
    # In one 8-bit format and with nothing computed in between, codes move as they are.
    COPY: tl.constexpr = SOURCE == TARGET and TARGET != FLOAT and not STATIC and ROTARY_DIM == 0
    for _ in range(tl.minimum(num_heads - first, heads_per_program)):
        b1 = tl.load(row_ptrs[:, None] + o_col1[None, :], mask=mask)
        b2 = tl.load(row_ptrs[:, None] + o_col2[None, :], mask=mask)
        b_scale = tl.full((BLOCK_T,), 1.0, tl.float32)
        if HAS_SCALE:
            b_scale = tl.load(scale_ptrs, mask=m_t, other=1.0)
            scale_ptrs += stride_scale_h
        if not COPY:
            b1 = decode(b1, SOURCE) * b_scale[:, None]
            b2 = decode(b2, SOURCE) * b_scale[:, None]
            if ROTARY_DIM > 0:
                b1, b2 = b1 * b_cos - b2 * b_sin, b2 * b_cos + b1 * b_sin
            if TARGET != FLOAT:
                if STATIC:
                    b_scale = tl.load(cache_scale_ptrs, mask=m_t, other=1.0)
                else:  # the largest value of a row becomes the largest code
                    LARGEST: tl.constexpr = 448.0 if TARGET == FP8 else 127.0
                    largest = tl.max(tl.where(mask, tl.maximum(tl.abs(b1), tl.abs(b2)), 0.0), axis=1)
                    b_scale = tl.where(largest > 0, largest * (1.0 / LARGEST), 1.0)
                b_inverse = tl.div_rn(1.0, b_scale)
                b1 *= b_inverse[:, None]
                b2 *= b_inverse[:, None]
            b1 = encode(b1, TARGET, CODE)
            b2 = encode(b2, TARGET, CODE)
        tl.store(cache_ptrs[:, None] + o_col1[None, :], b1, mask=mask)
        tl.store(cache_ptrs[:, None] + o_col2[None, :], b2, mask=mask)
        if TARGET != FLOAT:
            if not STATIC:
                tl.store(cache_scale_ptrs, b_scale, mask=m_t)
            cache_scale_ptrs += stride_cscale_h
        row_ptrs += stride_h
        cache_ptrs += stride_cache_h


# Sizes that change from call to call are not specialised on.
@triton.jit(do_not_specialize=["num_tokens", "rows_per_batch", "num_slots", "block_size", "heads_per_program"])
def _kv_splice_kernel(
    k_ptr,  # [B, K, T, D]
    v_ptr,  # [B, K, T, D]
    k_scale_ptr,  # [B, K, T] float32, or None
    v_scale_ptr,  # [B, K, T] float32, or None
    cos_ptr,  # [B * T, ROTARY_DIM / 2]
    sin_ptr,  # [B * T, ROTARY_DIM / 2]
    slot_mapping_ptr,  # [B * T] int64
    k_cache_ptr,  # [blocks, K, block_size, D]
    v_cache_ptr,  # [blocks, K, block_size, D]
    k_cache_scale_ptr,  # [blocks, K, block_size] float32, or None
    v_cache_scale_ptr,  # [blocks, K, block_size] float32, or None
    num_tokens,
    rows_per_batch,
    num_slots,
    block_size,
    num_heads,
    heads_per_program,
    stride_k_b,
    stride_k_h,
    stride_k_t,
    stride_v_b,
    stride_v_h,
    stride_v_t,
    stride_kscale_b,
    stride_kscale_h,
    stride_kscale_t,
    stride_vscale_b,
    stride_vscale_h,
    stride_vscale_t,
    stride_cos,
    stride_sin,
    stride_kcache_b,
    stride_kcache_h,
    stride_kcache_s,
    stride_vcache_b,
    stride_vcache_h,
    stride_vcache_s,
    stride_kcscale_b,
    stride_kcscale_h,
    stride_kcscale_s,
    stride_vcscale_b,
    stride_vcscale_h,
    stride_vcscale_s,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < num_tokens
    slot = tl.load(slot_mapping_ptr + o_t, mask=m_t, other=-1)
    m_t &= (slot >= 0) & (slot < num_slots)
    block = slot // block_size
    row = slot % block_size
    o_t = o_t.to(tl.int64)
    batch = o_t // rows_per_batch
    position = o_t % rows_per_batch
    if tl.program_id(1) == 0:
        b_cos = 1.0
        b_sin = 0.0
        if ROTARY_DIM > 0:
            o_angle = tl.arange(0, BLOCK_P)[None, :]
            m_angle = m_t[:, None] & (o_angle < ROTARY_DIM // 2)  # [BLOCK_T, BLOCK_P]
            b_cos = tl.load(cos_ptr + (o_t * stride_cos)[:, None] + o_angle, mask=m_angle, other=1.0).to(tl.float32)
            b_sin = tl.load(sin_ptr + (o_t * stride_sin)[:, None] + o_angle, mask=m_angle, other=0.0).to(tl.float32)
        _splice_heads(
            k_ptr + batch * stride_k_b + position * stride_k_t, stride_k_h,
            k_scale_ptr + batch * stride_kscale_b + position * stride_kscale_t if HAS_SCALE else None, stride_kscale_h,
            b_cos, b_sin,
            k_cache_ptr + block * stride_kcache_b + row * stride_kcache_s, stride_kcache_h,
            k_cache_scale_ptr + block * stride_kcscale_b + row * stride_kcscale_s if TARGET != FLOAT else None,
            stride_kcscale_h, m_t, num_heads, heads_per_program,
            HEAD_DIM, ROTARY_DIM, SOURCE, TARGET, HAS_SCALE, STATIC, BLOCK_T, BLOCK_P,
        )  # fmt: skip
    else:
        _splice_heads(
            v_ptr + batch * stride_v_b + position * stride_v_t, stride_v_h,
            v_scale_ptr + batch * stride_vscale_b + position * stride_vscale_t if HAS_SCALE else None, stride_vscale_h,
            1.0, 0.0,
            v_cache_ptr + block * stride_vcache_b + row * stride_vcache_s, stride_vcache_h,
            v_cache_scale_ptr + block * stride_vcscale_b + row * stride_vcscale_s if TARGET != FLOAT else None,
            stride_vcscale_h, m_t, num_heads, heads_per_program,
            HEAD_DIM, 0, SOURCE, TARGET, HAS_SCALE, STATIC, BLOCK_T, BLOCK_P,
        )  # fmt: skip


def kv_splice(
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
    """Launch `_kv_splice_kernel`. Shapes as in its signature, checked by the caller; last dimensions contiguous."""
    batch, num_kv_heads, rows, head_dim = k.shape
    blocks, _, block_size, _ = k_cache.shape
    if batch * rows == 0:
        return
    block_p = next_power_of_2(head_dim // 2)
    block_t = max(1024 // block_p, 1)  # 8 values of each half a thread
    scales = (k_scale, v_scale), (k_cache_scale, v_cache_scale)
    source_strides, target_strides = (
        tuple(stride for scale in pair for stride in ((0, 0, 0) if scale is None else scale.stride()))
        for pair in scales
    )
    token_blocks = cdiv(batch * rows, block_t)
    per_program = heads_per_program(token_blocks, num_kv_heads)
    _kv_splice_kernel[(token_blocks, 2, cdiv(num_kv_heads, per_program))](
        as_stored(k), as_stored(v), k_scale, v_scale, cos, sin, slot_mapping,
        as_stored(k_cache), as_stored(v_cache), k_cache_scale, v_cache_scale,
        batch * rows, rows, blocks * block_size, block_size, num_kv_heads, per_program,
        *k.stride()[:3], *v.stride()[:3], *source_strides,
        0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0),
        *k_cache.stride()[:3], *v_cache.stride()[:3], *target_strides,
        HEAD_DIM=head_dim, ROTARY_DIM=0 if cos is None else 2 * cos.shape[-1],
        SOURCE=storage(k.dtype), TARGET=storage(k_cache.dtype), HAS_SCALE=k_scale is not None, STATIC=static_scale,
        BLOCK_T=block_t, BLOCK_P=block_p, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def heads_per_program(token_blocks: int, num_heads: int) -> int:
    """Heads that share one read of slots and angles: a power of two, fewer where programs would be too few to fill a GPU.

    A row's result does not depend on it. On an H200 4,096 programs were enough for rows of 128 columns.
    """
    heads = next_power_of_2(num_heads)
    while heads > 1 and 2 * token_blocks * cdiv(num_heads, heads) < 4096:
        heads //= 2
    return heads
