"""K/V and hidden states in 8 bits: codes and scales, made and read by the splice operator."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from einops import rearrange

from .. import ops
from ..ops.checks import CODES


class KV(NamedTuple):
    """K (rotated) and V of one layer, each ``[B, K, N, D]``; rows in 8 bits have float32 scales ``[B, K, N]``."""

    keys: torch.Tensor
    values: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def at(self, which: slice) -> KV:
        """Some of the rows, as views."""
        return KV(*(None if part is None else part[:, :, which] for part in self))  # type: ignore[arg-type]


def encode(kv: KV, dtype: torch.dtype) -> KV:
    """The same rows as 8-bit codes, the largest value of each row being the largest code.

    Raises:
        ValueError: `dtype` is no 8-bit format, or the rows are in 8 bits already.
    """
    if dtype not in CODES or kv.keys.dtype in CODES:
        raise ValueError(f"dtype: expected one of {CODES} for floating rows, got {dtype} for rows of {kv.keys.dtype}")
    codes = [torch.empty(rows.shape, dtype=dtype, device=rows.device) for rows in kv[:2]]
    scales = [torch.empty(rows.shape[:3], dtype=torch.float32, device=rows.device) for rows in kv[:2]]
    splice(kv, *codes, k_cache_scale=scales[0], v_cache_scale=scales[1])
    return KV(*codes, *scales)


def splice(
    kv: KV, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor | None = None, **options: Any
) -> None:
    """Splice all rows of K and V into slots, or without any into the same rows of caches ``[B, K, N, D]``."""
    if slot_mapping is None:
        batch, _, tokens, _ = k_cache.shape
        slot_mapping = torch.arange(batch * tokens, device=k_cache.device)
    ops.kv_splice(kv.keys, kv.values, k_cache, v_cache, slot_mapping, k_scale=kv.k_scale, v_scale=kv.v_scale, **options)


def encode_rows(states: torch.Tensor, dtype: torch.dtype) -> KV:
    """Hidden states ``[B, T, C]`` in 8 bits, in groups of 32 columns: a few columns are a thousand times the others."""
    return encode(_grouped(states), dtype)


def decode_rows(codes: KV, dtype: torch.dtype) -> torch.Tensor:
    """Decode what :func:`encode_rows` encoded, ``[B, T, C]``."""
    batch, groups, tokens, columns = codes.keys.shape
    states = torch.empty((batch, tokens, 2 * groups * columns), dtype=dtype, device=codes.keys.device)
    splice(codes, *_grouped(states)[:2])
    return states


def grouped_shape(batch: int, tokens: int, columns: int) -> tuple[int, int, int, int]:
    """The shape of either half of hidden states ``[B, T, C]`` in groups of 32 columns, fewer where C / 2 is no multiple."""
    of_group = math.gcd(columns // 2, 32)
    return batch, columns // 2 // of_group, tokens, of_group


def check_rows(where: str, kv: KV, shape: tuple[int, ...], dtype: torch.dtype | None, device: torch.device) -> None:
    """Raise unless K and V have this shape and device, in `dtype` without scales or in 8 bits with them.

    Raises:
        ValueError: they do not; the message begins with `where` and names the part.
    """
    in_8_bits = kv.keys.dtype in CODES
    kind, scale = (kv.keys.dtype, (torch.float32, shape[:3])) if in_8_bits else (dtype, None)
    for name, part, expected in zip(KV._fields, kv, ((kind, shape), (kind, shape), scale, scale), strict=True):
        found = None if part is None else (part.dtype, tuple(part.shape))
        if found != expected:
            raise ValueError(f"{where}: expected {name} to be {_named(expected)}, got {_named(found)}")
        if part is not None and part.device != device:
            raise ValueError(f"{where}: expected {name} on {device}, as the tokens, got {part.device}")


def _named(found: tuple[torch.dtype | None, tuple[int, ...]] | None) -> str:
    return "none" if found is None else f"{found[0] or 'in 8 bits'} {found[1]}"


def _grouped(states: torch.Tensor) -> KV:
    """``[B, T, C]`` as two halves in the shape of K and V: :func:`grouped_shape`."""
    columns = grouped_shape(*states.shape)[-1]
    return KV(*(rearrange(half, "b t (g c) -> b g t c", c=columns) for half in states.chunk(2, dim=-1)))
