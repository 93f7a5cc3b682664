"""Bytes that K/V of one Llama layer move, counted: the kernels in Triton's interpreter against transformers' own modules.

    python bench/traffic.py --tokens 1024

From the layer's hidden states to K and V in a cache, in bfloat16. Reads by matrix products are apart: a GEMM reads its inputs
once for each tile, and how much of that reaches memory is a matter of caches. No GPU is needed, and none is used.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from math import ceil
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is imported

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding, apply_rotary_pos_emb

from droidspeak_ops.kernels.arguments import Projection
from droidspeak_ops.kernels.project_splice import project_splice
from droidspeak_ops.kernels.project_splice_config import Size, project_splice_config
from droidspeak_ops.kernels.row_norm import normed
from droidspeak_ops.proof import traffic
from droidspeak_ops.proof.shapes import SHAPES, Shape

MODELS = ("SmolLM2-135M", "Llama-3-70B-TP8", "Llama-3-8B")


class Row(NamedTuple):
    """Bytes of one way to compute K/V: by its products, and beyond them."""

    name: str
    products: int
    beyond: int


@torch.no_grad()
def compare(shape: Shape, tokens: int, target: str = "sm_80") -> Iterator[Row]:
    """transformers, then the kernels with either norm; their K and V are compared on the way."""
    config = LlamaConfig(
        hidden_size=shape.hidden_size, num_attention_heads=shape.num_q_heads, num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim, intermediate_size=16,
    )  # fmt: skip
    dtype = torch.bfloat16
    layer = LlamaDecoderLayer(config, 0).to(dtype)
    attention, norm = layer.self_attn, layer.input_layernorm
    x = torch.randn(1, tokens, shape.hidden_size).to(dtype)
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(tokens)[None])
    cache = DynamicCache()

    def transformers() -> None:
        normed = norm(x)
        k, v = (
            project(normed).view(1, tokens, shape.num_kv_heads, shape.head_dim).transpose(1, 2)
            for project in (attention.k_proj, attention.v_proj)
        )
        _, k = apply_rotary_pos_emb(k[:, :0], k, cos, sin)
        cache.update(k, v, 0)

    theirs = traffic.of_torch(transformers)
    yield Row("transformers", theirs.loaded_by_products, theirs.total - theirs.loaded_by_products)

    half = shape.head_dim // 2
    heads = {"num_q_heads": 0, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "rotary_dim": 2 * half}
    size = Size(dtype, num_layers=1, num_tokens=tokens, **heads, has_head_norm=False, aligned=True)
    launch = project_splice_config(target, size)
    tiles = 2 * ceil(shape.num_kv_heads * half / launch.block_n) * ceil(tokens / launch.block_m)
    products = tiles * (launch.block_m + 2 * launch.block_n) * shape.hidden_size * dtype.itemsize
    for name in ("hf", "folded"):
        caches = [torch.full((1, shape.num_kv_heads, tokens, shape.head_dim), float("nan"), dtype=dtype) for _ in "kv"]
        folded = name == "folded"
        weights = [project.weight * norm.weight if folded else project.weight
                   for project in (attention.k_proj, attention.v_proj)]  # fmt: skip

        def fused(name: str = name, folded: bool = folded, caches: list = caches, weights: list = weights) -> None:
            layers = [Projection(
                x[0], *weights, *caches, torch.arange(tokens), norm=name, norm_weight=None if folded else norm.weight,
                norm_eps=norm.variance_epsilon, cos=cos[0, :, :half], sin=sin[0, :, :half],
            )]  # fmt: skip
            project_splice(normed(layers), launch)

        ours = traffic.of_kernels(fused)
        for written in caches:
            if not written.isfinite().all():
                raise RuntimeError("the kernels left rows unwritten: their traffic means nothing")
        yield Row(f"ours, {name}", products, ours.total - products)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS[:2])
    options = parser.parse_args()
    table = Table(title=f"MB for K/V of one layer, {options.tokens:,} tokens, bfloat16, tiles of sm_80")
    for column in ("model", "way"):
        table.add_column(column)
    for column in ("products' reads", "all else", "of transformers"):
        table.add_column(column, justify="right")
    for model in options.models:
        rows = list(compare(SHAPES[model], options.tokens))
        for row in rows:
            part = f"1/{rows[0].beyond / row.beyond:.1f}" if row is not rows[0] else "1"
            table.add_row(model, row.name, f"{row.products / 1e6:.1f}", f"{row.beyond / 1e6:.1f}", part)
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
