"""Bytes that K/V of one Llama layer move, counted: the kernels in Triton's interpreter against transformers' own modules.

    python -m bench.traffic --tokens 1024

From the layer's hidden states to K and V in a cache, in bfloat16. Reads by matrix products are apart: a GEMM reads its inputs
once for each tile, and how much of that reaches memory is a matter of caches. No GPU is needed, and none is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from math import ceil

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is imported

import torch
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding, apply_rotary_pos_emb

from bench.common import Row, parser, show
from droidspeak_ops.kernels.arguments import Projection
from droidspeak_ops.kernels.project_splice import project_splice
from droidspeak_ops.kernels.project_splice_config import Size, project_splice_config
from droidspeak_ops.kernels.row_norm import normed
from droidspeak_ops.proof import traffic
from droidspeak_ops.proof.shapes import SHAPES, Shape

MODELS = ("SmolLM2-135M", "Llama-3-70B-TP8", "Llama-3-8B")
TARGET = "sm_80"
"""The architecture whose tiles are used."""


@torch.no_grad()
def measure(shape: Shape, tokens: int) -> Iterator[tuple[str, int, int]]:
    """Yield each way and the bytes that it moves, by its products and beyond them: transformers, then the kernels."""
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
    yield "transformers", theirs.loaded_by_products, theirs.total - theirs.loaded_by_products

    half = shape.head_dim // 2
    heads = {"num_q_heads": 0, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "rotary_dim": 2 * half}
    size = Size(dtype, num_layers=1, num_tokens=tokens, **heads, has_head_norm=False, aligned=True)
    launch = project_splice_config(TARGET, size)
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
                raise RuntimeError("k_cache, v_cache: expected finite rows, got some that the kernels left unwritten")
        yield f"ours, {name}", products, ours.total - products


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command; bytes are in MB."""
    options = parser("traffic", __doc__)
    options.add_argument("--tokens", type=int, default=1024)
    options.add_argument("--models", nargs="+", choices=MODELS, default=MODELS[:2])
    args = options.parse_args(argv)
    rows: list[Row] = []
    for model in args.models:
        ways = list(measure(SHAPES[model], args.tokens))
        (_, _, theirs), *_ = ways
        for way, products, beyond in ways:
            megabytes = {"products' reads": f"{products / 1e6:.1f}", "all else": f"{beyond / 1e6:.1f}"}
            share = "1" if way == "transformers" else f"1/{theirs / beyond:.1f}"
            rows.append({"model": model, "way": way, **megabytes, "of transformers": share})
    show(rows, f"MB for K/V of one layer, {args.tokens:,} tokens, bfloat16, tiles of {TARGET}")
    return rows


if __name__ == "__main__":
    main()
