"""Projection of layers' hidden states to K and V, or Q, K and V, whose epilogue does all else and stores in place.

    y = x Wᵀ · rstd + bias          k = rope(head_norm(y_k)), v = y_v          cache[slot] = k, v

One launch covers all heads of K and V (and Q), of one layer or of several. This file has the kernel that runs everywhere, whose
tiles are loaded through pointers; `project_splice_tma` has that for Hopper, `projected_tile` what follows the product in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
import triton
import triton.language as tl

from .arguments import Projection
from .codes import as_stored, storage
from .epilogue import pair_columns
from .head_norm import head_norm
from .project_splice_config import ProjectSpliceConfig, Size, norms_all_heads, pairs_per_head, size_of
from .project_splice_tma import _project_splice_tma_kernel, described
from .projected_tile import Layers, Strides, columns_at, finish, of_layer, tile_at
from .row_norm import normed
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
    x_ptr = of_layer(layers.hidden_states, layer, NUM_LAYERS)
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

    x_ptrs = x_ptr + o_m[:, None] * strides.hidden_states_m + o_k[None, :]  # [BLOCK_M, BLOCK_K]
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


def kv_project(layers: Sequence[Projection], choose: Callable[[Size], ProjectSpliceConfig]) -> None:
    """Launch what `layers` ask for: their input norm, then the projection in the configuration that is chosen for its size."""
    layers = normed(layers)
    project_splice(layers, choose(size_of(layers)))


def project_splice(layers: Sequence[Projection], config: ProjectSpliceConfig) -> None:
    """Launch the kernel that `config` asks for, once for all `layers`.

    Checked by the caller: all layers are alike, strides included; their rows ``[T, C]`` are normalised, or have an `rstd` and
    weights with the norm's folded in. Norm weights as wide as all heads are for `head_norm`, which then also rotates.
    """
    first = layers[0]
    num_tokens, hidden_size = first.hidden_states.shape
    blocks, num_kv_heads, block_size, head_dim = first.k_cache.shape
    num_q_heads = 0 if first.q is None else first.q.shape[1]
    if num_tokens == 0:
        return
    over_all = norms_all_heads(first)
    rotary_dim = 0 if first.cos is None or over_all else 2 * first.cos.shape[-1]
    has_head_norm = first.k_norm_weight is not None and not over_all
    pairs = pairs_per_head(head_dim, has_head_norm)
    q_tiles, kv_tiles = (cdiv(heads * pairs, config.block_n) for heads in (num_q_heads, num_kv_heads))
    tiles = len(layers) * cdiv(num_tokens, config.block_m) * (q_tiles + 2 * kv_tiles)
    tensors = Layers._make(compress(zip(*layers, strict=True), _IS_READ))
    if first.k_cache.dtype.itemsize == 1:
        k_caches, v_caches = (tuple(map(as_stored, caches)) for caches in (tensors.k_cache, tensors.v_cache))
        tensors = tensors._replace(k_cache=k_caches, v_cache=v_caches)
    strides = Strides(
        first.hidden_states.stride(0), _stride(first.q_weight), first.k_weight.stride(0), first.v_weight.stride(0),
        _stride(first.cos), _stride(first.sin), _stride(first.q), _stride(first.q, 1), *first.k_cache.stride()[:3],
        *first.v_cache.stride()[:3],
    )  # fmt: skip
    sizes = (num_tokens, blocks * block_size, block_size, hidden_size, first.head_norm_eps)
    options: dict[str, Any] = {
        "NUM_LAYERS": len(layers), "NUM_Q_HEADS": num_q_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim,
        "ROTARY_DIM": rotary_dim, "HAS_RSTD": first.rstd is not None, "HAS_BIAS": first.k_bias is not None,
        "HAS_HEAD_NORM": has_head_norm, "HAS_POSITIONS": first.positions is not None, "NORM_ORDER": first.norm_order,
        "STORAGE": storage(first.k_cache.dtype), "Q_TILES": q_tiles, "KV_TILES": kv_tiles, "GROUP_M": config.group_m,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": False,
    }  # fmt: skip
    if config.tma:
        programs = min(tiles, multiprocessors(first.hidden_states.device)) if config.persistent else tiles
        rows, columns = (config.block_m, config.block_k), (2 * config.block_n, config.block_k)
        _project_splice_tma_kernel[(programs,)](
            *described(tensors.hidden_states, *rows), *described(tensors.k_weight, *columns),
            *described(tensors.v_weight, *columns), *described(tensors.q_weight, *columns, count=1),
            tensors, strides, first.positions, first.slot_mapping, *sizes, PERSISTENT=config.persistent, **options,
        )  # fmt: skip
    else:
        _project_splice_kernel[(tiles,)](
            tensors, strides, first.positions, first.slot_mapping, *sizes, EVEN_C=hidden_size % config.block_k == 0,
            PAIRS_PER_HEAD=pairs, **options,
        )  # fmt: skip
    if over_all:
        for layer in layers:
            eps, angles = layer.head_norm_eps, (layer.cos, layer.sin, layer.positions)
            head_norm(
                layer.k_cache, layer.k_norm_weight, layer.norm_order, eps, *angles, layer.slot_mapping, num_tokens
            )
            if layer.q is not None:
                rows = layer.q.transpose(0, 1).unsqueeze(0)
                head_norm(rows, layer.q_norm_weight, layer.norm_order, eps, *angles, None, num_tokens)


_IS_READ = [name in Layers._fields for name in Projection._fields]


def _stride(tensor: torch.Tensor | None, dimension: int = 0) -> int:
    return 0 if tensor is None else tensor.stride(dimension)
