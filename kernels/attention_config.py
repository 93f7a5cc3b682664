"""Launch configurations of the attention kernels: pure functions of the model's shape and the target.

Neither the tile nor the split depends on the number of rows or keys, so that the bits of a row's result do not either. The
reasons are what ahead-of-time compilation shows (no configuration spills registers on its target), arithmetic, and for Hopper
the times that an H200 took (docs/gpu/h200-attention-tiles.csv).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .sizes import next_power_of_2


@dataclass(frozen=True)
class AttentionConfig:
    """A tile is `block_m` packed rows by `block_n` keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def attention_config(target: str, dtype: torch.dtype, head_dim: int, *, reads_values: bool) -> AttentionConfig:
    """Choose the tile of `attention_peaks`, or that of `attend_rows`, which reads values too.

    32 rows of a suffix with 4 heads to a kv head are two tiles of 64, which is what a warp group of Hopper multiplies.

    Args:
        target: ``"sm_80"``, ``"sm_90"``, ``"gfx942"``, ...
        dtype: of queries and cache.
        head_dim: columns of a head.
        reads_values: whether the tile's output is a sum of values, which takes registers as well.
    """
    is_float, is_amd, is_wide = dtype == torch.float32, target.startswith("gfx"), head_dim > 128
    if is_amd:
        # What rows see of each key is a pair of scalar registers on AMD, which run out before any other with more keys.
        return AttentionConfig(32 if is_float else 64, 16, num_warps=4, num_stages=1)
    if is_float:
        # Exact float32 products use no matrix instructions on NVIDIA, so registers are the limit.
        return AttentionConfig(32, 16, num_warps=8, num_stages=1)
    # A slot is loaded before its key: of three stages one waits for slots, and one for keys and values.
    num_warps, num_stages = (8, 2) if is_wide else (4, 3)
    if target.startswith(("sm_9", "sm_10")):
        if is_wide:
            return AttentionConfig(64, 64, num_warps, num_stages)
        # With values, 128 keys or 128 rows spill; two stages are then faster than three.
        return AttentionConfig(64, 64, 4, 2) if reads_values else AttentionConfig(64, 128, 4, 3)
    # Operands and accumulators are in registers: with 64 keys, or 64 rows of wide heads, they spill.
    return AttentionConfig(32 if is_wide else 64, 32, num_warps, num_stages)


def keys_per_split(num_q_heads: int) -> int:
    """Keys that one program of `attend_rows` goes through: 64 for each query head, in powers of two.

    With it N rows over S keys are about N · S / 4096 programs whatever the heads: 80 rows over 8,192 keys are 160, which fill
    the 132 multiprocessors of an H100; a program for all keys would leave two of three idle. And what programs leave to be
    combined, D floats for each row, head and split, is at most an eighth of what they read of K and V: one part in H.
    """
    return 64 * max(next_power_of_2(num_q_heads), 8)


def keys_per_lse(num_q_heads: int) -> int:
    """Keys that one program of `attention_peaks` sums over: half of :func:`keys_per_split`.

    The rows of a suffix are fewer, and what is left to be combined is one float: 32 rows over 8,192 keys are 128 programs.
    """
    return keys_per_split(num_q_heads) // 2
