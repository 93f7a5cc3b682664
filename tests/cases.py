"""Inputs of the operators for tests: random tensors in the shapes that the operators take, and poisoned caches."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Projection:
    """Arguments of `torch.ops.droidspeak_ops.kv_project`, in order, and which slots they write."""

    arguments: dict[str, Any]

    @property
    def caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.arguments["k_cache"], self.arguments["v_cache"]

    def with_new_caches(self) -> "Projection":
        return Projection(
            {**self.arguments, **{name: poisoned_like(self.arguments[name]) for name in ("k_cache", "v_cache")}}
        )

    def written(self) -> torch.Tensor:
        """For each row of the cache, whether a token is stored there: [blocks, block_size]."""
        blocks, _, block_size, _ = self.arguments["k_cache"].shape
        slots = self.arguments["slot_mapping"]
        mask = torch.zeros(blocks * block_size, dtype=torch.bool, device=slots.device)
        mask[slots[slots >= 0]] = True
        return mask.view(blocks, block_size)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def poisoned_like(tensor: torch.Tensor) -> torch.Tensor:
    """NaN of the same shape and strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).fill_(
        float("nan")
    )


def projection(
    *,
    tokens: int = 63,
    hidden: int = 48,
    kv_heads: int = 2,
    head_dim: int = 64,
    rotary_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    rstd: bool = False,
    bias: bool = False,
    k_norm: bool = False,
    paged: bool = False,
    scattered: bool = False,
    strided: bool = False,
    device: torch.device | str = "cpu",
) -> Projection:
    """A random problem. `scattered` shuffles the slots, leaves gaps and skips a token; `strided` puts everything in views."""

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        wide = torch.randn(*shape[:-1], shape[-1] + (16 if strided else 0), device=device) * scale
        return wide.to(dtype)[..., : shape[-1]]

    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    block_size = 16 if paged else tokens + 5
    blocks = -(-(tokens + 5) // block_size) if paged else 1
    slots = torch.arange(tokens)
    if scattered:
        slots = torch.randperm(blocks * block_size)[:tokens]
        slots[tokens // 2 : tokens // 2 + 1] = -1
    if paged:  # NHD pages, seen as [blocks, K, block_size, D]
        caches = [poisoned((blocks, block_size, kv_heads, head_dim), cache_dtype or dtype, device) for _ in range(2)]
        caches = [cache.transpose(1, 2) for cache in caches]
    elif strided:  # K and V interleaved in one tensor, with room between the heads
        both = poisoned((blocks, kv_heads + 1, block_size, 2, head_dim), cache_dtype or dtype, device)
        caches = [both[:, :kv_heads, :, 0], both[:, :kv_heads, :, 1]]
    else:
        caches = [poisoned((blocks, kv_heads, block_size, head_dim), cache_dtype or dtype, device) for _ in range(2)]
    angles = torch.rand(tokens, rotary_dim // 2, device=device) * 6.28
    rows = kv_heads * head_dim
    x = random(tokens, hidden)
    return Projection(
        {
            "x": x,
            "rstd": (x.float().pow(2).mean(-1) + 1e-6).rsqrt() if rstd else None,
            "k_weight": random(rows, hidden, scale=hidden**-0.5),
            "v_weight": random(rows, hidden, scale=hidden**-0.5),
            "k_bias": random(rows) if bias else None,
            "v_bias": random(rows) if bias else None,
            "k_norm_weight": random(head_dim) if k_norm else None,
            "k_norm_eps": 1e-6,
            "cos": angles.cos().to(dtype) if rotary_dim else None,
            "sin": angles.sin().to(dtype) if rotary_dim else None,
            "slot_mapping": slots.to(device),
            "k_cache": caches[0],
            "v_cache": caches[1],
        }
    )
