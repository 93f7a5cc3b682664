"""Projection of layers' hidden states to K and V, or Q, K and V, whose epilogue does all else and stores in place.

    y = x Wᵀ · rstd + bias          k = rope(head_norm(y_k)), v = y_v          cache[slot] = k, v

One launch covers all heads of K and V (and Q), of one layer or of several. Columns of a tile are ordered in pairs, those that
RoPE rotates together side by side (columns i and i + rotary_dim/2 of a head), so a pair lies in one thread: RoPE is
elementwise and needs no shuffle, and a norm over a head is one sum over both halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .codes import as_stored, encode, storage
from .epilogue import pair_columns, rotate, round_to, weigh
from .head_norm import head_norm
from .sizes import cdiv, next_power_of_2


@triton.jit
def _of_layer(pointers, layer, NUM_LAYERS: tl.constexpr):
    """The pointer of one layer. Chosen once, before the loop: one that changes inside does not compile on every target."""
    chosen = pointers[0]
    for i in tl.static_range(1, NUM_LAYERS):
        if layer == i:
            chosen = pointers[i]
    return chosen


@triton.jit
def _store_pairs(ptr, o_row, o_head, stride_h, o_col1, o_col2, y1, y2, m_row, m_col, STORAGE: tl.constexpr):
    """Store both columns of each pair of a tile."""
    ptrs = ptr + o_row[:, None] + (o_head.to(tl.int64) * stride_h)[None, :]  # [BLOCK_M, BLOCK_N]
    mask = m_row[:, None] & m_col[None, :]
    tl.store(ptrs + o_col1[None, :], encode(y1, STORAGE, ptr.dtype.element_ty), mask=mask)
    tl.store(ptrs + o_col2[None, :], encode(y2, STORAGE, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _project_splice_kernel(
    xs,  # for each layer [T, C]
    rstds,  # for each layer [T] float32
    q_weights,  # for each layer [H * D, C]
    k_weights,  # for each layer [K * D, C]
    v_weights,  # for each layer [K * D, C]
    q_biases,  # for each layer [H * D]
    k_biases,  # for each layer [K * D]
    v_biases,  # for each layer [K * D]
    q_norm_weights,  # for each layer [D]
    k_norm_weights,  # for each layer [D]
    coses,  # for each layer [positions, ROTARY_DIM / 2]
    sines,  # for each layer [positions, ROTARY_DIM / 2]
    positions_ptr,  # [T] int64, or None: token t is at row t of cos and sin
    slot_mapping_ptr,  # [T] int64
    qs,  # for each layer [T, H, D]
    k_caches,  # for each layer [B, K, S, D]
    v_caches,  # for each layer [B, K, S, D]
    num_tokens,
    hidden_size,
    num_slots,
    block_size,
    head_norm_eps,
    stride_xm,
    stride_qn,
    stride_kn,
    stride_vn,
    stride_cos,
    stride_sin,
    stride_q_t,
    stride_q_h,
    stride_kcache_b,
    stride_kcache_h,
    stride_kcache_s,
    stride_vcache_b,
    stride_vcache_h,
    stride_vcache_s,
    NUM_LAYERS: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HAS_RSTD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HEAD_NORM: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    NORM_ORDER: tl.constexpr,
    STORAGE: tl.constexpr,
    EVEN_C: tl.constexpr,
    PAIRS_PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that read the same rows of x are neighbours, so x comes from L2 after the first; the weights stay there.
    Q_TILES: tl.constexpr = (NUM_Q_HEADS * PAIRS_PER_HEAD + BLOCK_N - 1) // BLOCK_N
    KV_TILES: tl.constexpr = (NUM_KV_HEADS * PAIRS_PER_HEAD + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = Q_TILES + 2 * KV_TILES
    EVEN_N: tl.constexpr = (
        2 * PAIRS_PER_HEAD == HEAD_DIM
        and NUM_Q_HEADS * PAIRS_PER_HEAD == Q_TILES * BLOCK_N
        and NUM_KV_HEADS * PAIRS_PER_HEAD == KV_TILES * BLOCK_N
    )
    pid_n = tl.program_id(0) % TILES
    pid_m = tl.program_id(0) // TILES
    layer = 0
    if NUM_LAYERS > 1:
        m_tiles = tl.cdiv(num_tokens, BLOCK_M)
        layer = pid_m // m_tiles
        pid_m = pid_m % m_tiles

    x_ptr = _of_layer(xs, layer, NUM_LAYERS)
    is_v = pid_n >= Q_TILES + KV_TILES
    is_q = pid_n < Q_TILES  # never, at compile time, without Q
    num_heads = NUM_KV_HEADS
    if is_v:
        w_ptr = _of_layer(v_weights, layer, NUM_LAYERS)
        stride_wn = stride_vn
    else:
        w_ptr = _of_layer(k_weights, layer, NUM_LAYERS)
        stride_wn = stride_kn
    if Q_TILES > 0:
        if is_q:
            w_ptr = _of_layer(q_weights, layer, NUM_LAYERS)
            stride_wn = stride_qn
        num_heads = tl.where(is_q, NUM_Q_HEADS, NUM_KV_HEADS)
        pid_n = tl.where(is_q, pid_n, pid_n - Q_TILES)
    pid_n = tl.where(is_v, pid_n - KV_TILES, pid_n)

    # Column pair n of the tile is pair i of a head. Pairs out of range read some valid row of the weight and are masked
    # elsewhere: a `where` on the columns would hide from the compiler that they are contiguous, and cost wide stores.
    o_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_head = o_n // PAIRS_PER_HEAD
    o_pair = o_n % PAIRS_PER_HEAD
    o_col1, o_col2 = pair_columns(o_pair, HEAD_DIM, ROTARY_DIM)
    o_row1 = o_head * HEAD_DIM + o_col1
    o_row2 = o_head * HEAD_DIM + o_col2
    if EVEN_N:
        m_n = tl.arange(0, BLOCK_N) >= 0  # known to the compiler, which then drops it from every mask
    else:
        m_n = (o_head < num_heads) & (o_pair < HEAD_DIM // 2)
        o_row1 = tl.minimum(o_row1, num_heads * HEAD_DIM - 1)
        o_row2 = tl.minimum(o_row2, num_heads * HEAD_DIM - 1)

    # Both columns of a pair are neighbours in the tile: one product of full width, and a pair never leaves its thread.
    o_row = tl.reshape(tl.join(o_row1, o_row2), (2 * BLOCK_N,))
    o_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < num_tokens
    o_m = tl.minimum(o_m, num_tokens - 1).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)

    x_ptrs = x_ptr + o_m[:, None] * stride_xm + o_k[None, :]  # [BLOCK_M, BLOCK_K]
    w_ptrs = w_ptr + o_row[None, :].to(tl.int64) * stride_wn + o_k[:, None]  # [BLOCK_K, 2 * BLOCK_N]
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
    for k in range(0, hidden_size, BLOCK_K):
        if EVEN_C:
            b_x = tl.load(x_ptrs)
            b_w = tl.load(w_ptrs)
        else:
            m_k = o_k < hidden_size - k
            b_x = tl.load(x_ptrs, mask=m_k[None, :], other=0.0)
            b_w = tl.load(w_ptrs, mask=m_k[:, None], other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    acc1, acc2 = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))  # [BLOCK_M, BLOCK_N] each

    # The epilogue rounds where transformers does: after the linear layer, the norm, each product of RoPE and its sum.
    DTYPE: tl.constexpr = xs[0].dtype.element_ty
    if HAS_RSTD:
        b_rstd = tl.load(_of_layer(rstds, layer, NUM_LAYERS) + o_m)
        acc1 *= b_rstd[:, None]
        acc2 *= b_rstd[:, None]
    if HAS_BIAS:
        if is_v:
            b_ptr = _of_layer(v_biases, layer, NUM_LAYERS)
        else:
            b_ptr = _of_layer(k_biases, layer, NUM_LAYERS)
            if Q_TILES > 0:
                if is_q:
                    b_ptr = _of_layer(q_biases, layer, NUM_LAYERS)
        acc1 += tl.load(b_ptr + o_row1).to(tl.float32)[None, :]
        acc2 += tl.load(b_ptr + o_row2).to(tl.float32)[None, :]
    y1 = round_to(acc1, DTYPE)
    y2 = round_to(acc2, DTYPE)

    if HAS_HEAD_NORM:
        if not is_v:
            g_ptr = _of_layer(k_norm_weights, layer, NUM_LAYERS)
            if Q_TILES > 0:
                if is_q:
                    g_ptr = _of_layer(q_norm_weights, layer, NUM_LAYERS)
            square = tl.where(m_n[None, :], y1 * y1 + y2 * y2, 0.0)
            square = tl.reshape(square, (BLOCK_M, BLOCK_N // PAIRS_PER_HEAD, PAIRS_PER_HEAD))
            b_inv = tl.rsqrt(tl.sum(square, axis=2) / HEAD_DIM + head_norm_eps)
            b_inv = tl.broadcast_to(b_inv[:, :, None], (BLOCK_M, BLOCK_N // PAIRS_PER_HEAD, PAIRS_PER_HEAD))
            b_inv = tl.reshape(b_inv, (BLOCK_M, BLOCK_N))
            g1 = tl.load(g_ptr + o_col1, mask=m_n, other=0.0).to(tl.float32)[None, :]
            g2 = tl.load(g_ptr + o_col2, mask=m_n, other=0.0).to(tl.float32)[None, :]
            y1 = weigh(y1 * b_inv, g1, NORM_ORDER, DTYPE)
            y2 = weigh(y2 * b_inv, g2, NORM_ORDER, DTYPE)

    if ROTARY_DIM > 0:
        if not is_v:
            position = tl.load(positions_ptr + o_m) if HAS_POSITIONS else o_m
            cos_ptrs = _of_layer(coses, layer, NUM_LAYERS) + position[:, None] * stride_cos + o_pair[None, :]
            sin_ptrs = _of_layer(sines, layer, NUM_LAYERS) + position[:, None] * stride_sin + o_pair[None, :]
            m_rotated = (m_n & (o_pair < ROTARY_DIM // 2))[None, :]
            b_cos = tl.load(cos_ptrs, mask=m_rotated, other=1.0).to(tl.float32)
            b_sin = tl.load(sin_ptrs, mask=m_rotated, other=0.0).to(tl.float32)
            y1, y2 = rotate(y1, y2, b_cos, b_sin, coses[0].dtype.element_ty, DTYPE)

    # A slot is a row of the cache, counted through its blocks; tokens with a slot outside the cache are not stored. The
    # branches yield scalars: of a tensor of offsets the compiler forgets that its columns are contiguous.
    slot = tl.load(slot_mapping_ptr + o_m)
    m_slot = m_m & (slot >= 0) & (slot < num_slots)
    if is_v:
        out_ptr = _of_layer(v_caches, layer, NUM_LAYERS)
        stride_b = stride_vcache_b
        stride_h = stride_vcache_h
        stride_s = stride_vcache_s
    else:
        out_ptr = _of_layer(k_caches, layer, NUM_LAYERS)
        stride_b = stride_kcache_b
        stride_h = stride_kcache_h
        stride_s = stride_kcache_s
    o_cache = (slot // block_size) * stride_b + (slot % block_size) * stride_s
    if Q_TILES > 0:
        if is_q:
            q_ptr = _of_layer(qs, layer, NUM_LAYERS)
            _store_pairs(q_ptr, o_m * stride_q_t, o_head, stride_q_h, o_col1, o_col2, y1, y2, m_m, m_n, "float")
        else:
            _store_pairs(out_ptr, o_cache, o_head, stride_h, o_col1, o_col2, y1, y2, m_slot, m_n, STORAGE)
    else:
        _store_pairs(out_ptr, o_cache, o_head, stride_h, o_col1, o_col2, y1, y2, m_slot, m_n, STORAGE)


@dataclass(frozen=True)
class ProjectSpliceConfig:
    """Launch configuration: a tile is `block_m` tokens by `block_n` pairs of columns, `block_k` of the hidden size deep."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def project_splice_config(
    target: str, dtype: torch.dtype, num_kv_heads: int, head_dim: int, has_head_norm: bool
) -> ProjectSpliceConfig:
    """Choose the launch configuration: a pure function, so that results never depend on a start-up benchmark.

    It does not depend on the number of tokens, so that results do not depend on the batch. The reasons are what
    ahead-of-time compilation shows: no configuration spills registers on its target.

    Args:
        target: ``"sm_80"``, ``"sm_90"``, ``"gfx942"``, ...
        dtype: dtype of the hidden states and weights.
        num_kv_heads: heads of K.
        head_dim: columns per head.
        has_head_norm: whether a tile must hold whole heads, for their norm.
    """
    pairs = pairs_per_head(head_dim, has_head_norm)
    if dtype == torch.float32:
        # Exact float32 products use no matrix instructions on NVIDIA, so registers are the limit.
        block_m, block_n, block_k, num_stages = 64, 32, 32, 2
        few = ("gfx",) if has_head_norm else ("sm_9", "sm_10", "gfx")
        num_warps = 4 if target.startswith(few) else 8
    elif target.startswith("gfx"):
        # 64 KiB of shared memory, and a larger tile of 8 warps is miscompiled (triton#11696). The masks of a partly
        # filled tile take more scalar registers than are left, and so does a norm over heads of 128 rows.
        block_n = 64 if num_kv_heads * pairs % 64 == 0 else 32
        block_m, block_k, num_warps, num_stages = 64 if has_head_norm else 128, 32, 4, 2
    elif target.startswith("sm_9"):
        # Two warp groups halve the accumulator registers: about 120 a thread, so that two programs fit.
        block_m, block_n, block_k, num_warps, num_stages = 128, 64, 64, 8, 3
    elif target.startswith("sm_10"):
        # Accumulators live in tensor memory; their epilogue wants 8 warps: 4 spill where RoPE is partial.
        block_m, block_n, block_k, num_warps, num_stages = 128, 64, 64, 8, 3
    else:
        # With 4 warps there are not enough registers.
        block_m, block_n, block_k, num_warps, num_stages = 128, 64, 32, 8, 3
    if has_head_norm and pairs > block_n:
        block_m, block_n = block_m * block_n // pairs, pairs
    return ProjectSpliceConfig(block_m, block_n, block_k, num_warps, num_stages)


def pairs_per_head(head_dim: int, has_head_norm: bool) -> int:
    """Columns of a tile that one head takes: half its width, padded to a power of two where a tile must hold whole heads."""
    return next_power_of_2(head_dim // 2) if has_head_norm else head_dim // 2


def project_splice(
    x: Sequence[torch.Tensor],
    rstd: Sequence[torch.Tensor],
    q_weight: Sequence[torch.Tensor],
    k_weight: Sequence[torch.Tensor],
    v_weight: Sequence[torch.Tensor],
    q_bias: Sequence[torch.Tensor],
    k_bias: Sequence[torch.Tensor],
    v_bias: Sequence[torch.Tensor],
    q_norm_weight: Sequence[torch.Tensor],
    k_norm_weight: Sequence[torch.Tensor],
    norm_order: str,
    head_norm_eps: float,
    cos: Sequence[torch.Tensor],
    sin: Sequence[torch.Tensor],
    positions: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    q: Sequence[torch.Tensor],
    k_cache: Sequence[torch.Tensor],
    v_cache: Sequence[torch.Tensor],
    config: ProjectSpliceConfig,
) -> None:
    """Launch `_project_splice_kernel`: a tensor for each layer, or none for what the layers do not have.

    Shapes as in the kernel's signature, checked by the caller: all layers alike, strides included; last dimensions contiguous.
    Norm weights as wide as all heads are for `head_norm`, which then also rotates.
    """
    num_tokens, hidden_size = x[0].shape
    blocks, num_kv_heads, block_size, head_dim = k_cache[0].shape
    num_q_heads = q[0].shape[1] if q else 0
    if num_tokens == 0:
        return
    norm_over_all = any(weights[0].shape[0] != head_dim for weights in (q_norm_weight, k_norm_weight) if weights)
    has_head_norm = bool(k_norm_weight) and not norm_over_all
    rotary_dim = 2 * cos[0].shape[-1] if cos and not norm_over_all else 0
    pairs = pairs_per_head(head_dim, has_head_norm)
    q_tiles, kv_tiles = (cdiv(heads * pairs, config.block_n) for heads in (num_q_heads, num_kv_heads))
    grid = (len(x) * cdiv(num_tokens, config.block_m) * (q_tiles + 2 * kv_tiles),)
    _project_splice_kernel[grid](
        *(tuple(tensors) or (None,) for tensors in (
            x, rstd, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, q_norm_weight, k_norm_weight, cos, sin,
        )),
        positions, slot_mapping, tuple(q) or (None,), *(tuple(map(as_stored, caches)) for caches in (k_cache, v_cache)),
        num_tokens, hidden_size, blocks * block_size, block_size, head_norm_eps,
        x[0].stride(0), *(tensors[0].stride(0) if tensors else 0 for tensors in (q_weight, k_weight, v_weight, cos, sin)),
        *(q[0].stride()[:2] if q else (0, 0)), *k_cache[0].stride()[:3], *v_cache[0].stride()[:3],
        NUM_LAYERS=len(x), NUM_Q_HEADS=num_q_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, ROTARY_DIM=rotary_dim,
        HAS_RSTD=bool(rstd), HAS_BIAS=bool(k_bias), HAS_HEAD_NORM=has_head_norm, HAS_POSITIONS=positions is not None,
        NORM_ORDER=norm_order, STORAGE=storage(k_cache[0].dtype), EVEN_C=hidden_size % config.block_k == 0,
        PAIRS_PER_HEAD=pairs, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    if norm_over_all:
        for layer, rows in enumerate(k_cache):
            angles = (cos[layer], sin[layer]) if cos else (None, None)
            head_norm(
                rows, k_norm_weight[layer], norm_order, head_norm_eps, *angles, positions, slot_mapping, num_tokens
            )
            if q:
                rows = q[layer].transpose(0, 1).unsqueeze(0)
                head_norm(rows, q_norm_weight[layer], norm_order, head_norm_eps, *angles, positions, None, num_tokens)
