"""Projection of layers' hidden states to K and V, or Q, K and V, whose epilogue does all else and stores in place.

    y = x Wᵀ · rstd + bias          k = rope(head_norm(y_k)), v = y_v          cache[slot] = k, v

One launch covers all heads of K and V (and Q), of one layer or of several. This file has the kernel that runs everywhere, whose
tiles are loaded through pointers; `project_splice_tma` has that for Hopper, `projected_tile` what follows the product in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .codes import as_stored, storage
from .epilogue import pair_columns
from .head_norm import head_norm
from .project_splice_config import ProjectSpliceConfig, pairs_per_head
from .project_splice_tma import _project_splice_tma_kernel, described
from .projected_tile import Layers, Strides, columns_at, finish, of_layer, tile_at
from .sizes import cdiv, multiprocessors


# Sizes that change from call to call are not specialised on: the kernel would be compiled again for 1, for multiples of 16 and
# for all others.
@triton.jit(do_not_specialize=["num_tokens", "num_slots", "block_size"])
def _project_splice_kernel(
    layers,
    strides,
    positions_ptr,  # [T] int64, or None: token t is at row t of cos and sin
    slot_mapping_ptr,  # [T] int64
    num_tokens,
    num_slots,
    block_size,
    hidden_size,
    head_norm_eps,
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
    GROUP_M: tl.constexpr,
    Q_TILES: tl.constexpr,
    KV_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    EVEN_N: tl.constexpr = (
        2 * PAIRS_PER_HEAD == HEAD_DIM
        and NUM_Q_HEADS * PAIRS_PER_HEAD == Q_TILES * BLOCK_N
        and NUM_KV_HEADS * PAIRS_PER_HEAD == KV_TILES * BLOCK_N
    )
    layer, pid_m, pid_n = tile_at(tl.program_id(0), num_tokens, NUM_LAYERS, Q_TILES + 2 * KV_TILES, GROUP_M, BLOCK_M)
    is_q, is_v, num_heads, pid_n = columns_at(pid_n, NUM_Q_HEADS, NUM_KV_HEADS, Q_TILES, KV_TILES)
    x_ptr = of_layer(layers.x, layer, NUM_LAYERS)
    if is_v:
        w_ptr = of_layer(layers.v_weight, layer, NUM_LAYERS)
        stride_wn = strides.v_weight_n
    else:
        w_ptr = of_layer(layers.k_weight, layer, NUM_LAYERS)
        stride_wn = strides.k_weight_n
    if Q_TILES > 0:
        if is_q:
            w_ptr = of_layer(layers.q_weight, layer, NUM_LAYERS)
            stride_wn = strides.q_weight_n

    # Rows i and i + rotary_dim/2 of the weight become neighbouring columns of the tile: one product of full width, and a pair
    # never leaves its thread. Pairs out of range read some valid row and are masked elsewhere: a `where` on the columns
    # would hide from the compiler that they are contiguous, and cost wide stores.
    o_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_col1, o_col2 = pair_columns(o_n % PAIRS_PER_HEAD, HEAD_DIM, ROTARY_DIM)
    o_row1 = o_n // PAIRS_PER_HEAD * HEAD_DIM + o_col1
    o_row2 = o_n // PAIRS_PER_HEAD * HEAD_DIM + o_col2
    if not EVEN_N:
        o_row1 = tl.minimum(o_row1, num_heads * HEAD_DIM - 1)
        o_row2 = tl.minimum(o_row2, num_heads * HEAD_DIM - 1)
    o_row = tl.reshape(tl.join(o_row1, o_row2), (2 * BLOCK_N,))
    o_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < num_tokens
    o_m = tl.minimum(o_m, num_tokens - 1).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)

    x_ptrs = x_ptr + o_m[:, None] * strides.x_m + o_k[None, :]  # [BLOCK_M, BLOCK_K]
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
    finish(
        acc1, acc2, layer, is_q, is_v, num_heads, o_m, m_m, o_n, layers, strides, positions_ptr, slot_mapping_ptr,
        num_slots, block_size, head_norm_eps, NUM_LAYERS, NUM_Q_HEADS > 0, HEAD_DIM, ROTARY_DIM, HAS_RSTD, HAS_BIAS,
        HAS_HEAD_NORM, HAS_POSITIONS, NORM_ORDER, STORAGE, EVEN_N, PAIRS_PER_HEAD, BLOCK_M, BLOCK_N,
    )  # fmt: skip


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
    """Launch the kernel that `config` asks for: a tensor for each layer, or none for what the layers do not have.

    Shapes as in :class:`Layers`, checked by the caller: all layers alike, strides included; last dimensions contiguous.
    Norm weights as wide as all heads are for `head_norm`, which then also rotates.
    """
    num_tokens, hidden_size = x[0].shape
    blocks, num_kv_heads, block_size, head_dim = k_cache[0].shape
    num_q_heads = q[0].shape[1] if q else 0
    if num_tokens == 0:
        return
    norm_over_all = any(weights[0].shape[0] != head_dim for weights in (q_norm_weight, k_norm_weight) if weights)
    rotary_dim = 2 * cos[0].shape[-1] if cos and not norm_over_all else 0
    has_head_norm = bool(k_norm_weight) and not norm_over_all
    pairs = pairs_per_head(head_dim, has_head_norm)
    q_tiles, kv_tiles = (cdiv(heads * pairs, config.block_n) for heads in (num_q_heads, num_kv_heads))
    tiles = len(x) * cdiv(num_tokens, config.block_m) * (q_tiles + 2 * kv_tiles)
    nothing = (None,)
    layers = Layers(
        tuple(x), tuple(rstd) or nothing, tuple(q_weight) or nothing, tuple(k_weight), tuple(v_weight),
        tuple(q_bias) or nothing, tuple(k_bias) or nothing, tuple(v_bias) or nothing, tuple(q_norm_weight) or nothing,
        tuple(k_norm_weight) or nothing, tuple(cos) or nothing, tuple(sin) or nothing, tuple(q) or nothing,
        tuple([as_stored(cache) for cache in k_cache]), tuple([as_stored(cache) for cache in v_cache]),
    )  # fmt: skip
    strides = Strides(
        x[0].stride(0), q_weight[0].stride(0) if q else 0, k_weight[0].stride(0), v_weight[0].stride(0),
        cos[0].stride(0) if cos else 0, sin[0].stride(0) if cos else 0, *(q[0].stride()[:2] if q else (0, 0)),
        *k_cache[0].stride()[:3], *v_cache[0].stride()[:3],
    )  # fmt: skip
    sizes = (num_tokens, blocks * block_size, block_size, hidden_size, head_norm_eps)
    options: dict[str, Any] = {
        "NUM_LAYERS": len(x), "NUM_Q_HEADS": num_q_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim,
        "ROTARY_DIM": rotary_dim, "HAS_RSTD": bool(rstd), "HAS_BIAS": bool(k_bias), "HAS_HEAD_NORM": has_head_norm,
        "HAS_POSITIONS": positions is not None, "NORM_ORDER": norm_order, "STORAGE": storage(k_cache[0].dtype),
        "Q_TILES": q_tiles, "KV_TILES": kv_tiles, "GROUP_M": config.group_m,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": False,
    }  # fmt: skip
    if config.tma:
        programs = min(tiles, multiprocessors(x[0].device)) if config.persistent else tiles
        _project_splice_tma_kernel[(programs,)](
            *described(x, config.block_m, config.block_k), *described(k_weight, 2 * config.block_n, config.block_k),
            *described(v_weight, 2 * config.block_n, config.block_k),
            *described(q_weight, 2 * config.block_n, config.block_k, count=1),
            layers, strides, positions, slot_mapping, *sizes, PERSISTENT=config.persistent, **options,
        )  # fmt: skip
    else:
        _project_splice_kernel[(tiles,)](
            layers, strides, positions, slot_mapping, *sizes, EVEN_C=hidden_size % config.block_k == 0, PAIRS_PER_HEAD=pairs,
            **options,
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
