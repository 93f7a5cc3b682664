"""RMS norm of K or Q over all heads together, and the rotation after it, in place on rows that are stored already.

A projection's tile holds some heads of a token, so this norm cannot be part of its epilogue: the projection stores rounded
rows, as the model would, and this kernel reads and writes each of them once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .epilogue import pair_columns, rotate, weigh
from .sizes import next_power_of_2


@triton.jit
def _head_norm_kernel(
    rows_ptr,  # [blocks, K, block_size, D]
    weight_ptr,  # [K * D]
    cos_ptr,  # [positions, ROTARY_DIM / 2]
    sin_ptr,  # [positions, ROTARY_DIM / 2]
    positions_ptr,  # [T] int64
    slot_mapping_ptr,  # [T] int64, or None: row t is token t
    num_slots,
    block_size,
    eps,
    stride_b,
    stride_h,
    stride_s,
    stride_cos,
    stride_sin,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    NORM_ORDER: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    DTYPE: tl.constexpr = rows_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token) if HAS_SLOTS else token
    num_heads = tl.where((slot >= 0) & (slot < num_slots), NUM_HEADS, 0)  # none of a token that is not stored
    o_h = tl.arange(0, BLOCK_H)
    o_p = tl.arange(0, BLOCK_P)
    mask = (o_h < num_heads)[:, None] & (o_p < HEAD_DIM // 2)[None, :]  # [BLOCK_H, BLOCK_P]
    o_col1, o_col2 = pair_columns(o_p, HEAD_DIM, ROTARY_DIM)
    row_ptrs = rows_ptr + (slot // block_size) * stride_b + (slot % block_size) * stride_s
    row_ptrs += o_h[:, None].to(tl.int64) * stride_h
    y1 = tl.load(row_ptrs + o_col1[None, :], mask=mask, other=0.0).to(tl.float32)
    y2 = tl.load(row_ptrs + o_col2[None, :], mask=mask, other=0.0).to(tl.float32)

    inv = tl.rsqrt(tl.sum(tl.sum(y1 * y1 + y2 * y2, axis=1), axis=0) / (NUM_HEADS * HEAD_DIM) + eps)
    weight_ptrs = weight_ptr + o_h[:, None] * HEAD_DIM
    g1 = tl.load(weight_ptrs + o_col1[None, :], mask=mask, other=0.0).to(tl.float32)
    g2 = tl.load(weight_ptrs + o_col2[None, :], mask=mask, other=0.0).to(tl.float32)
    y1 = weigh(y1 * inv, g1, NORM_ORDER, DTYPE)
    y2 = weigh(y2 * inv, g2, NORM_ORDER, DTYPE)
    if ROTARY_DIM > 0:
        position = tl.load(positions_ptr + token) if HAS_POSITIONS else token
        m_rotated = o_p < ROTARY_DIM // 2
        b_cos = tl.load(cos_ptr + position * stride_cos + o_p, mask=m_rotated, other=1.0).to(tl.float32)
        b_sin = tl.load(sin_ptr + position * stride_sin + o_p, mask=m_rotated, other=0.0).to(tl.float32)
        y1, y2 = rotate(y1, y2, b_cos[None, :], b_sin[None, :], cos_ptr.dtype.element_ty, DTYPE)
    tl.store(row_ptrs + o_col1[None, :], y1.to(DTYPE), mask=mask)
    tl.store(row_ptrs + o_col2[None, :], y2.to(DTYPE), mask=mask)


def head_norm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    norm_order: str,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
    num_tokens: int,
) -> None:
    """Launch `_head_norm_kernel`. Shapes as in its signature, checked by the caller; last dimensions contiguous."""
    blocks, num_heads, block_size, head_dim = rows.shape
    if num_tokens == 0:
        return
    block_h, block_p = next_power_of_2(num_heads), next_power_of_2(head_dim // 2)
    _head_norm_kernel[(num_tokens,)](
        rows, weight, cos, sin, positions, slot_mapping, blocks * block_size, block_size, eps,
        *rows.stride()[:3], 0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0),
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, ROTARY_DIM=0 if cos is None else 2 * cos.shape[-1],
        HAS_SLOTS=slot_mapping is not None, HAS_POSITIONS=positions is not None, NORM_ORDER=norm_order,
        BLOCK_H=block_h, BLOCK_P=block_p,
        num_warps=min(max(block_h * block_p // 256, 1), 16), enable_fp_fusion=False,
    )  # fmt: skip
