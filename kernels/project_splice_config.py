"""Launch configurations of `project_splice`: a pure function of sizes and target, so nothing is timed in a user's process.

The reasons are what ahead-of-time compilation shows (no configuration spills registers on its target) and, on Hopper, what was
measured on an H200 (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .arguments import Projection
from .sizes import cdiv, next_power_of_2


@dataclass(frozen=True)
class ProjectSpliceConfig:
    """A tile is `block_m` tokens by `block_n` pairs of columns, `block_k` of the hidden size deep.

    With `tma` tiles come through TMA descriptors, which Hopper has. A `persistent` grid has one program for each
    multiprocessor, and loads of its next tile overlap the epilogue of the last. `group_m` blocks of tokens go through all
    columns before the next ones do.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    persistent: bool = False
    group_m: int = 1


# Descriptors are arguments of their own: for as many layers at the most.
MAX_LAYERS = 8


class Size(NamedTuple):
    """The sizes that a launch configuration depends on.

    Args:
        has_head_norm: over each head, which a tile then holds whole.
        aligned: whether TMA can describe x and the weights: their starts and rows at multiples of 16 bytes.
    """

    dtype: torch.dtype
    num_layers: int
    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    has_head_norm: bool
    aligned: bool


def size_of(layers: Sequence[Projection]) -> Size:
    """Read the sizes of a projection off its arguments."""
    first = layers[0]
    like = first.hidden_states
    _, num_kv_heads, _, head_dim = first.k_cache.shape
    aligned, bytes_each = True, like.element_size()
    for layer in layers:
        for matrix in (layer.hidden_states, layer.k_weight, layer.v_weight, layer.q_weight):
            if matrix is not None and (matrix.data_ptr() | matrix.stride(0) * bytes_each) % 16:
                aligned = False
    return Size(
        dtype=like.dtype,
        num_layers=len(layers),
        num_tokens=like.shape[0],
        num_q_heads=0 if first.q is None else first.q.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=0 if first.cos is None else 2 * first.cos.shape[-1],
        has_head_norm=first.k_norm_weight is not None and first.k_norm_weight.shape[0] == head_dim,
        aligned=aligned,
    )


def norms_all_heads(layer: Projection) -> bool:
    """Return whether K or Q is normed over all heads together, of which a tile holds only some."""
    weights = [weight for weight in (layer.q_norm_weight, layer.k_norm_weight) if weight is not None]
    return any(weight.shape[0] != layer.k_cache.shape[3] for weight in weights)


def project_splice_config(target: str, size: Size) -> ProjectSpliceConfig:
    """Choose the launch configuration.

    The tile may depend on the number of tokens, because the result does not: a row's sum is taken in the same order, 16
    columns of the hidden size at a time, in every tile. A GPU test holds the configurations of a shape to it, bit by bit.

    Args:
        target: ``"sm_80"``, ``"sm_90"``, ``"gfx942"``, ...
        size: of the projection.
    """
    if target.startswith("sm_9") and can_use_tma(size):
        return _hopper_config(size)
    pairs = pairs_per_head(size.head_dim, size.has_head_norm)
    if size.dtype == torch.float32:
        # Exact float32 products use no matrix instructions on NVIDIA, so registers are the limit.
        block_m, block_n, block_k, num_stages = 64, 32, 32, 2
        few = ("sm_9", "sm_10", "gfx")
        if size.has_head_norm:
            few = ("sm_9", "gfx") if pairs <= 64 else ("gfx",)
        num_warps = 4 if target.startswith(few) else 8
    elif target.startswith("gfx"):
        # 64 KiB of shared memory, and a larger tile of 8 warps is miscompiled (triton#11696). The masks of a partly
        # filled tile take more scalar registers than are left, and so does a norm over heads of 128 rows.
        block_n = 64 if size.num_kv_heads * pairs % 64 == 0 else 32
        block_m, block_k, num_warps, num_stages = 64 if size.has_head_norm else 128, 32, 4, 2
    elif target.startswith("sm_9"):
        # Two warp groups halve the accumulator registers: about 120 a thread, so that two programs fit.
        block_m, block_n, block_k, num_warps, num_stages = 128, 64, 64, 8, 3
    elif target.startswith("sm_10"):
        # Accumulators live in tensor memory; their epilogue wants 8 warps: 4 spill where RoPE is partial.
        block_m, block_n, block_k, num_warps, num_stages = 128, 64, 64, 8, 3
    else:
        # With 4 warps there are not enough registers.
        block_m, block_n, block_k, num_warps, num_stages = 128, 64, 32, 8, 3
    if size.has_head_norm and pairs > block_n:
        block_m, block_n = block_m * block_n // pairs, pairs
    return ProjectSpliceConfig(block_m, block_n, block_k, num_warps, num_stages)


def can_use_tma(size: Size) -> bool:
    """Return whether descriptors can load the matrices, and tiles hold whole heads in the order of the weight's rows."""
    whole_heads = size.head_dim in (64, 128, 256) and size.rotary_dim in (0, size.head_dim)
    arguments = size.num_layers <= (1 if size.num_q_heads else MAX_LAYERS)
    return size.aligned and size.dtype != torch.float32 and whole_heads and arguments


HOPPER_MULTIPROCESSORS = 132


def _hopper_config(size: Size) -> ProjectSpliceConfig:
    # Times on an H200. A tile of 128 by 256, or of 256 by 128 where K is narrower, loads 3/4 of what two of 128 by 128 do:
    # 186 µs instead of 206 for 8,192 tokens of Llama-3-8B. Deeper tiles and fewer warps are slower.
    wide = size.num_kv_heads * size.head_dim % 256 == 0 or size.head_dim == 256
    block_m, block_n = (128, 128) if wide else (256, 64)
    columns = cdiv(size.num_q_heads * size.head_dim, 2 * block_n) + 2 * cdiv(
        size.num_kv_heads * size.head_dim, 2 * block_n
    )
    tiles = size.num_layers * cdiv(size.num_tokens, block_m) * columns
    if 2 * tiles <= HOPPER_MULTIPROCESSORS:
        # Tiles half as large still are one wave: 27 µs instead of 44 for 1,024 tokens. With so many stages a multiprocessor
        # holds one program; with fewer two share it while others are idle: 35 µs.
        if size.head_dim == 256:
            return ProjectSpliceConfig(64, 128, 64, num_warps=4, num_stages=4, tma=True)
        return ProjectSpliceConfig(128, 64, 64, num_warps=8, num_stages=5, tma=True)
    # K and V of a layer are few columns for all of x; with Q they are more than L2 holds: 560 µs instead of 580.
    group_m = 16 if size.num_q_heads else 1
    # With several layers or Q more is chosen in the persistent loop than there are registers for, and nothing is gained.
    persistent = wide and size.num_layers == 1 and size.num_q_heads == 0
    num_stages = 3 if wide else 4
    return ProjectSpliceConfig(
        block_m, block_n, 64, num_warps=8, num_stages=num_stages, tma=True, persistent=persistent, group_m=group_m
    )


def pairs_per_head(head_dim: int, has_head_norm: bool) -> int:
    """Columns of a tile that one head takes: half its width, padded to a power of two where a tile must hold whole heads."""
    return next_power_of_2(head_dim // 2) if has_head_norm else head_dim // 2
