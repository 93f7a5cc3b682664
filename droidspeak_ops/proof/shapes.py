"""Shapes of models that people run, and tensors of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..kernels.arguments import Projection


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that the kernels depend on; of a tensor-parallel one, those of a rank."""

    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    has_bias: bool = False
    head_norm: Literal["each", "all"] | None = None
    norm_order: Literal["llama", "gemma", "olmo"] = "llama"
    rotary_dtype: torch.dtype | None = None


SHAPES = {
    "Llama-3-8B": Shape(4096, 32, 8, 128, 128),
    "Llama-3-70B-TP8": Shape(8192, 8, 1, 128, 128),
    "Qwen2.5-7B": Shape(3584, 28, 4, 128, 128, has_bias=True),
    "Qwen3-8B": Shape(4096, 32, 8, 128, 128, head_norm="each"),
    "Gemma-3-12B": Shape(3840, 16, 8, 256, 256, head_norm="each", norm_order="gemma"),
    "OLMo-2-7B": Shape(4096, 32, 32, 128, 128, head_norm="all", norm_order="olmo", rotary_dtype=torch.float32),
    "GPT-OSS-20B": Shape(2880, 64, 8, 64, 64, has_bias=True, norm_order="olmo"),
    "Phi-3-mini": Shape(3072, 32, 32, 96, 96),
    "Phi-2": Shape(2560, 32, 32, 80, 32, has_bias=True),
    "Nemotron-4-340B-TP8": Shape(18432, 12, 1, 192, 96),
    "SmolLM2-135M": Shape(576, 9, 3, 64, 64),
}


def projections(
    shape: Shape,
    tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "meta",
    layers: int = 1,
    with_q: bool = False,
    folded: bool = False,
) -> list[Projection]:
    """Layers to project into a dense cache of one sequence: random, or without contents on "meta"."""

    def random(*size: int, scale: float = 1.0, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, dtype=kind, device=device) * scale

    hidden, width = shape.hidden_size, shape.head_dim
    q_rows, kv_rows = shape.num_q_heads * width, shape.num_kv_heads * width
    q_norm, k_norm = (q_rows, kv_rows) if shape.head_norm == "all" else (width, width)
    normed, slots = shape.head_norm is not None, torch.arange(tokens, device=device)

    def layer() -> Projection:
        angles = random(tokens, shape.rotary_dim // 2, kind=torch.float32)
        return Projection(
            hidden_states=random(tokens, hidden),
            k_weight=random(kv_rows, hidden, scale=hidden**-0.5),
            v_weight=random(kv_rows, hidden, scale=hidden**-0.5),
            k_cache=random(1, shape.num_kv_heads, tokens, width),
            v_cache=random(1, shape.num_kv_heads, tokens, width),
            slot_mapping=slots,
            norm="folded" if folded else "none",
            norm_order=shape.norm_order,
            rstd=random(tokens, kind=torch.float32) if folded else None,
            q_weight=random(q_rows, hidden, scale=hidden**-0.5) if with_q else None,
            q=random(tokens, shape.num_q_heads, width) if with_q else None,
            q_bias=random(q_rows) if shape.has_bias and with_q else None,
            k_bias=random(kv_rows) if shape.has_bias else None,
            v_bias=random(kv_rows) if shape.has_bias else None,
            q_norm_weight=random(q_norm) if normed and with_q else None,
            k_norm_weight=random(k_norm) if normed else None,
            cos=angles.cos().to(shape.rotary_dtype or dtype),
            sin=angles.sin().to(shape.rotary_dtype or dtype),
        )

    return [layer() for _ in range(layers)]
