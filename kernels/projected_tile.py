"""A tile of projected rows: which one a program takes, and what follows the product, up to the store in the cache.

    k = rope(head_norm(y_k · rstd + bias)), v = y_v · rstd + bias          cache[slot] = k, v

Columns are in pairs, those that RoPE rotates together (columns i and i + rotary_dim/2 of a head). The two of a pair come in two
tensors, so RoPE is elementwise and needs no shuffle, and a norm over a head is one sum over both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .codes import encode
from .epilogue import pair_columns, rotate, round_to, weigh


class Layers(NamedTuple):
    """Tensors that a launch reads and writes: fields of :class:`Projection` in its order, a tensor of each layer or None."""

    hidden_states: Any  # [T, C]
    k_weight: Any  # [K * D, C]
    v_weight: Any  # [K * D, C]
    k_cache: Any  # [B, K, S, D]
    v_cache: Any  # [B, K, S, D]
    rstd: Any  # [T] float32
    q_weight: Any  # [H * D, C]
    q: Any  # [T, H, D]
    q_bias: Any  # [H * D]
    k_bias: Any  # [K * D]
    v_bias: Any  # [K * D]
    q_norm_weight: Any  # [D]
    k_norm_weight: Any  # [D]
    cos: Any  # [positions, ROTARY_DIM / 2]
    sin: Any  # [positions, ROTARY_DIM / 2]


class Strides(NamedTuple):
    """Strides in elements, the same for all layers; last dimensions are contiguous."""

    hidden_states_m: int
    q_weight_n: int
    k_weight_n: int
    v_weight_n: int
    cos: int
    sin: int
    q_t: int
    q_h: int
    k_cache_b: int
    k_cache_h: int
    k_cache_s: int
    v_cache_b: int
    v_cache_h: int
    v_cache_s: int


@triton.jit
def of_layer(tensors, layer, NUM_LAYERS: tl.constexpr):
    """One layer's tensor. Chosen once, before the loop: one that changes inside does not compile on every target."""
    chosen = tensors[0]
    for i in tl.static_range(1, NUM_LAYERS):
        if layer == i:
            chosen = tensors[i]
    return chosen


@triton.jit
def tile_at(
    index, num_tokens, NUM_LAYERS: tl.constexpr, N_TILES: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Layer, block of rows and block of columns of a tile, in the order in which programs take them.

    Programs that run together share rows of x or of the weights, which come from L2 after the first: `GROUP_M` blocks of rows
    go through all columns before the next ones do.
    """
    m_tiles = tl.cdiv(num_tokens, BLOCK_M)
    layer = 0
    if NUM_LAYERS > 1:
        layer = index // (m_tiles * N_TILES)
        index = index % (m_tiles * N_TILES)
    first = index // (GROUP_M * N_TILES) * GROUP_M
    rows = tl.minimum(m_tiles - first, GROUP_M)
    index = index % (GROUP_M * N_TILES)
    return layer, first + index % rows, index // rows


@triton.jit
def columns_at(
    pid_n, NUM_Q_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, Q_TILES: tl.constexpr, KV_TILES: tl.constexpr
):
    """Return whether a block of columns is of Q, whether of V, how many heads that has, and its place among its own."""
    is_q = pid_n < Q_TILES  # never, at compile time, without Q
    is_v = pid_n >= Q_TILES + KV_TILES
    num_heads = NUM_KV_HEADS
    if Q_TILES > 0:
        num_heads = tl.where(is_q, NUM_Q_HEADS, NUM_KV_HEADS)
        pid_n = tl.where(is_q, pid_n, pid_n - Q_TILES)
    pid_n = tl.where(is_v, pid_n - KV_TILES, pid_n)
    return is_q, is_v, num_heads, pid_n


@triton.jit
def finish(
    acc1,  # [BLOCK_M, BLOCK_N] float32: the first column of each pair
    acc2,  # [BLOCK_M, BLOCK_N] float32: the second
    layer,
    is_q,
    is_v,
    num_heads,
    o_m,  # [BLOCK_M] int64: tokens, within range
    m_m,  # [BLOCK_M]: which of them are to be stored
    o_n,  # [BLOCK_N]: pairs of columns, counted through the heads
    layers,
    strides,
    positions_ptr,  # [T] int64, or None: token t is at row t of cos and sin
    slot_mapping_ptr,  # [T] int64
    num_slots,
    block_size,
    head_norm_eps,
    NUM_LAYERS: tl.constexpr,
    HAS_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HAS_RSTD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HEAD_NORM: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    NORM_ORDER: tl.constexpr,
    STORAGE: tl.constexpr,
    EVEN_N: tl.constexpr,
    PAIRS_PER_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Apply 1/rms, bias, norm of heads and RoPE to a tile, and store it.

    Rounds where transformers does: after the linear layer, the norm, each product of RoPE and its sum.
    """
    DTYPE: tl.constexpr = layers.hidden_states[0].dtype.element_ty
    o_head = o_n // PAIRS_PER_HEAD
    o_pair = o_n % PAIRS_PER_HEAD
    o_col1, o_col2 = pair_columns(o_pair, HEAD_DIM, ROTARY_DIM)
    if EVEN_N:
        m_n = tl.arange(0, BLOCK_N) >= 0  # known to the compiler, which then drops it from every mask
    else:
        m_n = (o_head < num_heads) & (o_pair < HEAD_DIM // 2)
    if HAS_RSTD:
        b_rstd = tl.load(of_layer(layers.rstd, layer, NUM_LAYERS) + o_m)
        acc1 *= b_rstd[:, None]
        acc2 *= b_rstd[:, None]
    if HAS_BIAS:
        if is_v:
            b_ptr = of_layer(layers.v_bias, layer, NUM_LAYERS)
        else:
            b_ptr = of_layer(layers.k_bias, layer, NUM_LAYERS)
            if HAS_Q:
                if is_q:
                    b_ptr = of_layer(layers.q_bias, layer, NUM_LAYERS)
        b_ptrs = b_ptr + o_head * HEAD_DIM
        acc1 += tl.load(b_ptrs + o_col1, mask=m_n, other=0.0).to(tl.float32)[None, :]
        acc2 += tl.load(b_ptrs + o_col2, mask=m_n, other=0.0).to(tl.float32)[None, :]
    y1 = round_to(acc1, DTYPE)
    y2 = round_to(acc2, DTYPE)

    if HAS_HEAD_NORM:
        if not is_v:
            g_ptr = of_layer(layers.k_norm_weight, layer, NUM_LAYERS)
            if HAS_Q:
                if is_q:
                    g_ptr = of_layer(layers.q_norm_weight, layer, NUM_LAYERS)
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
            cos_ptrs = of_layer(layers.cos, layer, NUM_LAYERS) + position[:, None] * strides.cos + o_pair[None, :]
            sin_ptrs = of_layer(layers.sin, layer, NUM_LAYERS) + position[:, None] * strides.sin + o_pair[None, :]
            m_rotated = (m_n & (o_pair < ROTARY_DIM // 2))[None, :]
            b_cos = tl.load(cos_ptrs, mask=m_rotated, other=1.0).to(tl.float32)
            b_sin = tl.load(sin_ptrs, mask=m_rotated, other=0.0).to(tl.float32)
            y1, y2 = rotate(y1, y2, b_cos, b_sin, layers.cos[0].dtype.element_ty, DTYPE)

    # A slot is a row of the cache, counted through its blocks; tokens with a slot outside the cache are not stored. The
    # branches yield scalars: of a tensor of offsets the compiler forgets that its columns are contiguous.
    slot = tl.load(slot_mapping_ptr + o_m)
    m_slot = m_m & (slot >= 0) & (slot < num_slots)
    if is_v:
        out_ptr = of_layer(layers.v_cache, layer, NUM_LAYERS)
        stride_b = strides.v_cache_b
        stride_h = strides.v_cache_h
        stride_s = strides.v_cache_s
    else:
        out_ptr = of_layer(layers.k_cache, layer, NUM_LAYERS)
        stride_b = strides.k_cache_b
        stride_h = strides.k_cache_h
        stride_s = strides.k_cache_s
    o_cache = (slot // block_size) * stride_b + (slot % block_size) * stride_s
    if HAS_Q:
        if is_q:
            q_ptr = of_layer(layers.q, layer, NUM_LAYERS)
            _store_pairs(q_ptr, o_m * strides.q_t, o_head, strides.q_h, o_col1, o_col2, y1, y2, m_m, m_n, "float")
        else:
            _store_pairs(out_ptr, o_cache, o_head, stride_h, o_col1, o_col2, y1, y2, m_slot, m_n, STORAGE)
    else:
        _store_pairs(out_ptr, o_cache, o_head, stride_h, o_col1, o_col2, y1, y2, m_slot, m_n, STORAGE)


@triton.jit
def _store_pairs(ptr, o_row, o_head, stride_h, o_col1, o_col2, y1, y2, m_row, m_col, STORAGE: tl.constexpr):
    """Store both columns of each pair of a tile."""
    ptrs = ptr + o_row[:, None] + (o_head.to(tl.int64) * stride_h)[None, :]  # [BLOCK_M, BLOCK_N]
    mask = m_row[:, None] & m_col[None, :]
    tl.store(ptrs + o_col1[None, :], encode(y1, STORAGE, ptr.dtype.element_ty), mask=mask)
    tl.store(ptrs + o_col2[None, :], encode(y2, STORAGE, ptr.dtype.element_ty), mask=mask)
