"""K/V projection of one layer whose epilogue does everything else and stores in place into a KV cache.

    y = x Wᵀ · rstd + bias          k = rope(head_norm(y_k)), v = y_v          cache[slot] = k, v

One launch covers K and V of all heads. A tile keeps two accumulators, one for each half of the rotated pairs (columns i
and i + rotary_dim/2 of a head), so RoPE is elementwise and needs no shuffle, and a norm over a head is one sum over both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def _round(x, DTYPE: tl.constexpr):
    """Round float32 to the model's dtype and back: what storing an intermediate result does."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _project_splice_kernel(
    x_ptr,  # [T, C]
    rstd_ptr,  # [T] float32
    k_weight_ptr,  # [K * D, C]
    v_weight_ptr,  # [K * D, C]
    k_bias_ptr,  # [K * D]
    v_bias_ptr,  # [K * D]
    k_norm_weight_ptr,  # [D]
    cos_ptr,  # [T, ROTARY_DIM / 2]
    sin_ptr,  # [T, ROTARY_DIM / 2]
    slot_mapping_ptr,  # [T] int64
    k_cache_ptr,  # [B, K, S, D]
    v_cache_ptr,  # [B, K, S, D]
    num_tokens,
    hidden_size,
    num_slots,
    block_size,
    k_norm_eps,
    stride_xm,
    stride_kn,
    stride_vn,
    stride_cos,
    stride_sin,
    stride_kcache_b,
    stride_kcache_h,
    stride_kcache_s,
    stride_vcache_b,
    stride_vcache_h,
    stride_vcache_s,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HAS_RSTD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    EVEN_C: tl.constexpr,
    PAIRS_PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that read the same rows of x are neighbours, so x comes from L2 after the first; the weights stay there.
    TILES: tl.constexpr = (NUM_KV_HEADS * PAIRS_PER_HEAD + BLOCK_N - 1) // BLOCK_N
    pid_m = tl.program_id(0) // (2 * TILES)
    pid_n = tl.program_id(0) % (2 * TILES)
    # K or V is chosen here, once: a pointer that changes inside the dot loop does not compile on every target.
    is_k = pid_n < TILES
    if is_k:
        w_ptr = k_weight_ptr
        stride_wn = stride_kn
    else:
        w_ptr = v_weight_ptr
        stride_wn = stride_vn

    # Column n of the tile is pair i of a head. Rotated pairs are (i, i + ROTARY_DIM/2); what RoPE passes through is
    # paired in halves behind them. Pairs out of range read some valid row of the weight and are masked elsewhere: a
    # `where` on the columns themselves would hide from the compiler that they are contiguous, and cost wide stores.
    HALF_ROTARY: tl.constexpr = ROTARY_DIM // 2
    PARTIAL_ROTARY: tl.constexpr = ROTARY_DIM > 0 and ROTARY_DIM < HEAD_DIM
    o_n = (pid_n % TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_head = o_n // PAIRS_PER_HEAD
    o_pair = o_n % PAIRS_PER_HEAD
    m_n = (o_head < NUM_KV_HEADS) & (o_pair < HEAD_DIM // 2)
    o_col1 = o_pair
    o_col2 = o_pair + HEAD_DIM // 2
    if PARTIAL_ROTARY:
        o_col1 = tl.where(o_pair < HALF_ROTARY, o_pair, o_pair + HALF_ROTARY)
        o_col2 = tl.where(o_pair < HALF_ROTARY, o_pair + HALF_ROTARY, o_pair + HEAD_DIM // 2)
    o_row1 = tl.minimum(o_head * HEAD_DIM + o_col1, NUM_KV_HEADS * HEAD_DIM - 1)
    o_row2 = tl.minimum(o_head * HEAD_DIM + o_col2, NUM_KV_HEADS * HEAD_DIM - 1)

    o_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < num_tokens
    o_m = tl.minimum(o_m, num_tokens - 1).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)

    x_ptrs = x_ptr + o_m[:, None] * stride_xm + o_k[None, :]  # [BLOCK_M, BLOCK_K]
    w1_ptrs = w_ptr + o_row1[None, :].to(tl.int64) * stride_wn + o_k[:, None]  # [BLOCK_K, BLOCK_N]
    w2_ptrs = w_ptr + o_row2[None, :].to(tl.int64) * stride_wn + o_k[:, None]
    acc1 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, hidden_size, BLOCK_K):
        if EVEN_C:
            b_x = tl.load(x_ptrs)
            b_w1 = tl.load(w1_ptrs)
            b_w2 = tl.load(w2_ptrs)
        else:
            m_k = o_k < hidden_size - k
            b_x = tl.load(x_ptrs, mask=m_k[None, :], other=0.0)
            b_w1 = tl.load(w1_ptrs, mask=m_k[:, None], other=0.0)
            b_w2 = tl.load(w2_ptrs, mask=m_k[:, None], other=0.0)
        acc1 = tl.dot(b_x, b_w1, acc1, input_precision="ieee")
        acc2 = tl.dot(b_x, b_w2, acc2, input_precision="ieee")
        x_ptrs += BLOCK_K
        w1_ptrs += BLOCK_K
        w2_ptrs += BLOCK_K

    # The epilogue rounds where transformers does: after the linear layer, the norm, each product of RoPE and its sum.
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    if HAS_RSTD:
        b_rstd = tl.load(rstd_ptr + o_m)
        acc1 *= b_rstd[:, None]
        acc2 *= b_rstd[:, None]
    if HAS_BIAS:
        b_ptr = k_bias_ptr if is_k else v_bias_ptr
        acc1 += tl.load(b_ptr + o_row1).to(tl.float32)[None, :]
        acc2 += tl.load(b_ptr + o_row2).to(tl.float32)[None, :]
    y1 = _round(acc1, DTYPE)
    y2 = _round(acc2, DTYPE)

    if HAS_K_NORM:
        if is_k:
            square = tl.where(m_n[None, :], y1 * y1 + y2 * y2, 0.0)
            square = tl.reshape(square, (BLOCK_M, BLOCK_N // PAIRS_PER_HEAD, PAIRS_PER_HEAD))
            b_inv = tl.rsqrt(tl.sum(square, axis=2) / HEAD_DIM + k_norm_eps)
            b_inv = tl.broadcast_to(b_inv[:, :, None], (BLOCK_M, BLOCK_N // PAIRS_PER_HEAD, PAIRS_PER_HEAD))
            b_inv = tl.reshape(b_inv, (BLOCK_M, BLOCK_N))
            g1 = tl.load(k_norm_weight_ptr + o_col1, mask=m_n, other=0.0).to(tl.float32)[None, :]
            g2 = tl.load(k_norm_weight_ptr + o_col2, mask=m_n, other=0.0).to(tl.float32)[None, :]
            y1 = _round(_round(y1 * b_inv, DTYPE) * g1, DTYPE)
            y2 = _round(_round(y2 * b_inv, DTYPE) * g2, DTYPE)

    if ROTARY_DIM > 0:
        if is_k:
            cos_ptrs = cos_ptr + o_m[:, None] * stride_cos + o_pair[None, :]
            sin_ptrs = sin_ptr + o_m[:, None] * stride_sin + o_pair[None, :]
            m_rotated = (m_n & (o_pair < HALF_ROTARY))[None, :]
            b_cos = tl.load(cos_ptrs, mask=m_rotated, other=1.0).to(tl.float32)
            b_sin = tl.load(sin_ptrs, mask=m_rotated, other=0.0).to(tl.float32)
            z1 = _round(y1 * b_cos, DTYPE) - _round(y2 * b_sin, DTYPE)
            z2 = _round(y2 * b_cos, DTYPE) + _round(y1 * b_sin, DTYPE)
            y1 = _round(z1, DTYPE)
            y2 = _round(z2, DTYPE)

    # A slot is a row of the cache, counted through its blocks; tokens with a slot outside the cache are not stored.
    slot = tl.load(slot_mapping_ptr + o_m)
    m_m &= (slot >= 0) & (slot < num_slots)
    block = slot // block_size
    row = slot % block_size
    o_head = o_head.to(tl.int64)
    if is_k:
        o_cache = block * stride_kcache_b + row * stride_kcache_s
        cache_ptrs = k_cache_ptr + o_cache[:, None] + (o_head * stride_kcache_h)[None, :]
    else:
        o_cache = block * stride_vcache_b + row * stride_vcache_s
        cache_ptrs = v_cache_ptr + o_cache[:, None] + (o_head * stride_vcache_h)[None, :]
    m_store = m_m[:, None] & m_n[None, :]
    tl.store(cache_ptrs + o_col1[None, :], y1.to(k_cache_ptr.dtype.element_ty), mask=m_store)
    tl.store(cache_ptrs + o_col2[None, :], y2.to(k_cache_ptr.dtype.element_ty), mask=m_store)


@dataclass(frozen=True)
class ProjectSpliceConfig:
    """Launch configuration: a tile is `block_m` tokens by `block_n` pairs of columns, `block_k` of the hidden size deep."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def project_splice_config(
    target: str, dtype: torch.dtype, num_kv_heads: int, head_dim: int, has_k_norm: bool
) -> ProjectSpliceConfig:
    """Choose the launch configuration: a pure function, so that results never depend on a start-up benchmark.

    The reasons are what ahead-of-time compilation shows: no configuration spills registers on its target.

    Args:
        target: ``"sm_80"``, ``"sm_90"``, ``"gfx942"``, ...
        dtype: dtype of the hidden states and weights.
        num_kv_heads: heads of K.
        head_dim: columns per head.
        has_k_norm: whether a tile must hold whole heads, for their norm.
    """
    pairs = pairs_per_head(head_dim, has_k_norm)
    if dtype == torch.float32:
        # Exact float32 products use no matrix instructions on NVIDIA, so registers are the limit.
        block_m, block_n, block_k, num_stages = 64, 32, 32, 2
        num_warps = 4 if target.startswith(("sm_9", "sm_10", "gfx")) else 8
    elif target.startswith("gfx"):
        # 64 KiB of shared memory, and a larger tile of 8 warps is miscompiled (triton#11696). The masks of a partly
        # filled tile take more scalar registers than are left.
        block_n = 64 if num_kv_heads * pairs % 64 == 0 else 32
        block_m, block_k, num_warps, num_stages = 128, 32, 4, 2
    elif target.startswith("sm_9"):
        # Two warp groups halve the accumulator registers: 120 a thread instead of 202.
        block_m, block_n, block_k, num_warps, num_stages = 128, 64, 64, 8, 3
    elif target.startswith("sm_10"):
        # Accumulators live in tensor memory, so 4 warps do, but not for the norm over heads.
        block_m, block_n, block_k, num_warps, num_stages = 128, 64, 64, 8 if has_k_norm else 4, 3
    else:
        # With 4 warps 240 to 255 registers a thread, and spills where RoPE is partial.
        block_m, block_n, block_k, num_warps, num_stages = 128, 64, 32, 8, 3
    if has_k_norm and pairs > block_n:
        block_m, block_n = block_m * block_n // pairs, pairs
    return ProjectSpliceConfig(block_m, block_n, block_k, num_warps, num_stages)


def pairs_per_head(head_dim: int, has_k_norm: bool) -> int:
    """Columns of a tile that one head takes: half its width, padded to a power of two where a tile must hold whole heads."""
    return triton.next_power_of_2(head_dim // 2) if has_k_norm else head_dim // 2


def project_splice_constants(
    config: ProjectSpliceConfig,
    *,
    hidden_size: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    has_rstd: bool,
    has_bias: bool,
    has_k_norm: bool,
) -> dict[str, int | bool]:
    """The kernel's compile-time constants; shared by the launch and by ahead-of-time compilation."""
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": rotary_dim,
        "HAS_RSTD": has_rstd,
        "HAS_BIAS": has_bias,
        "HAS_K_NORM": has_k_norm,
        "EVEN_C": hidden_size % config.block_k == 0,
        "PAIRS_PER_HEAD": pairs_per_head(head_dim, has_k_norm),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }


def project_splice(
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
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    config: ProjectSpliceConfig,
) -> None:
    """Launch `_project_splice_kernel`. Shapes as in its signature, checked by the caller; last dimensions contiguous."""
    num_tokens, hidden_size = x.shape
    blocks, num_kv_heads, block_size, head_dim = k_cache.shape
    if num_tokens == 0:
        return
    constants = project_splice_constants(
        config,
        hidden_size=hidden_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=0 if cos is None else 2 * cos.shape[-1],
        has_rstd=rstd is not None,
        has_bias=k_bias is not None,
        has_k_norm=k_norm_weight is not None,
    )
    tiles = triton.cdiv(num_kv_heads * pairs_per_head(head_dim, k_norm_weight is not None), config.block_n)
    grid = (triton.cdiv(num_tokens, config.block_m) * 2 * tiles,)
    _project_splice_kernel[grid](
        x, rstd, k_weight, v_weight, k_bias, v_bias, k_norm_weight, cos, sin, slot_mapping, k_cache, v_cache,
        num_tokens, hidden_size, blocks * block_size, block_size, k_norm_eps,
        x.stride(0), k_weight.stride(0), v_weight.stride(0),
        0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0),
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        **constants, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
