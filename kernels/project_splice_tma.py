"""The kernel of `project_splice` for Hopper, which loads tiles by TMA, through descriptors that the host makes.

Rows of the weights are loaded as they lie, whole heads of them, and the epilogue takes the pairs apart: a thread holds both
columns i and i + head_dim/2 of a row. So this is for heads of a power of two columns that are rotated whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .project_splice_config import MAX_LAYERS
from .projected_tile import columns_at, finish, of_layer, tile_at


@triton.jit
def _project_tile(
    index,
    x_descs,
    q_descs,
    k_descs,
    v_descs,
    layers,
    strides,
    positions_ptr,
    slot_mapping_ptr,
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
    GROUP_M: tl.constexpr,
    Q_TILES: tl.constexpr,
    KV_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    PAIRS: tl.constexpr = HEAD_DIM // 2
    EVEN_N: tl.constexpr = NUM_Q_HEADS * PAIRS == Q_TILES * BLOCK_N and NUM_KV_HEADS * PAIRS == KV_TILES * BLOCK_N
    layer, pid_m, pid_n = tile_at(index, num_tokens, NUM_LAYERS, Q_TILES + 2 * KV_TILES, GROUP_M, BLOCK_M)
    is_q, is_v, num_heads, pid_n = columns_at(pid_n, NUM_Q_HEADS, NUM_KV_HEADS, Q_TILES, KV_TILES)
    x_desc = of_layer(x_descs, layer, NUM_LAYERS)
    if is_v:
        w_desc = of_layer(v_descs, layer, NUM_LAYERS)
    else:
        w_desc = of_layer(k_descs, layer, NUM_LAYERS)
    if Q_TILES > 0:
        if is_q:
            w_desc = of_layer(q_descs, layer, NUM_LAYERS)
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
    for k in range(0, hidden_size, BLOCK_K):  # past the ends of a matrix its descriptor reads zeros
        b_x = x_desc.load([pid_m * BLOCK_M, k])  # [BLOCK_M, BLOCK_K]
        b_w = w_desc.load([pid_n * 2 * BLOCK_N, k])  # [2 * BLOCK_N, BLOCK_K]
        acc = tl.dot(b_x, b_w.T, acc)
    heads = tl.reshape(acc, (BLOCK_M, BLOCK_N // PAIRS, 2, PAIRS))
    acc1, acc2 = tl.split(tl.permute(heads, (0, 1, 3, 2)))  # [BLOCK_M, BLOCK_N // PAIRS, PAIRS] each
    o_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < num_tokens
    finish(
        tl.reshape(acc1, (BLOCK_M, BLOCK_N)), tl.reshape(acc2, (BLOCK_M, BLOCK_N)), layer, is_q, is_v, num_heads,
        tl.minimum(o_m, num_tokens - 1).to(tl.int64), m_m, pid_n * BLOCK_N + tl.arange(0, BLOCK_N),
        layers, strides, positions_ptr, slot_mapping_ptr, num_slots, block_size, head_norm_eps,
        NUM_LAYERS, NUM_Q_HEADS > 0, HEAD_DIM, ROTARY_DIM, HAS_RSTD, HAS_BIAS, HAS_HEAD_NORM, HAS_POSITIONS, NORM_ORDER,
        STORAGE, EVEN_N, PAIRS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "block_size"])
def _project_splice_tma_kernel(
    # Descriptors: Triton takes them as arguments of their own alone, not in tuples. None for layers that there are not.
    x0, x1, x2, x3, x4, x5, x6, x7,
    k0, k1, k2, k3, k4, k5, k6, k7,
    v0, v1, v2, v3, v4, v5, v6, v7,
    q0,
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
    GROUP_M: tl.constexpr,
    Q_TILES: tl.constexpr,
    KV_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    x_descs = (x0, x1, x2, x3, x4, x5, x6, x7)
    k_descs = (k0, k1, k2, k3, k4, k5, k6, k7)
    v_descs = (v0, v1, v2, v3, v4, v5, v6, v7)
    if PERSISTENT:
        tiles = NUM_LAYERS * (Q_TILES + 2 * KV_TILES) * tl.cdiv(num_tokens, BLOCK_M)
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _project_tile(
                index, x_descs, (q0,), k_descs, v_descs, layers, strides, positions_ptr, slot_mapping_ptr, num_tokens,
                num_slots, block_size, hidden_size, head_norm_eps, NUM_LAYERS, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM,
                ROTARY_DIM, HAS_RSTD, HAS_BIAS, HAS_HEAD_NORM, HAS_POSITIONS, NORM_ORDER, STORAGE, GROUP_M, Q_TILES,
                KV_TILES, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _project_tile(
            tl.program_id(0), x_descs, (q0,), k_descs, v_descs, layers, strides, positions_ptr, slot_mapping_ptr,
            num_tokens, num_slots, block_size, hidden_size, head_norm_eps, NUM_LAYERS, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM,
            ROTARY_DIM, HAS_RSTD, HAS_BIAS, HAS_HEAD_NORM, HAS_POSITIONS, NORM_ORDER, STORAGE, GROUP_M, Q_TILES,
            KV_TILES, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@dataclass
class _Matrix(TensorDescriptor):
    """A descriptor of what is known to be aligned: Triton's checks take the host longer than all else about it."""

    def __post_init__(self) -> None:
        pass


def described(
    matrices: Sequence[torch.Tensor | None], rows: int, columns: int, count: int = MAX_LAYERS
) -> list[TensorDescriptor | None]:
    """Descriptors of matrices by blocks of `rows` by `columns`, for `count` layers; None for layers that there are not."""
    found = [
        _Matrix(matrix, matrix.shape, matrix.stride(), [rows, columns]) for matrix in matrices if matrix is not None
    ]
    return [*found, *[None] * (count - len(found))]
