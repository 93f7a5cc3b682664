"""Ways from the hidden states of a layer to its K and V in the cache, and the K and V that they must give.

A provider makes what needs no hidden states (folded weights, 1/rms), and returns what is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import droidspeak_ops as ds
from droidspeak_ops.ops import Projection
from droidspeak_ops.proof.shapes import Shape, projections
from droidspeak_ops.proof.traffic import minimum

EPS = 1e-6
NORMS = {"llama": LlamaRMSNorm, "gemma": Gemma3RMSNorm, "olmo": Olmo2RMSNorm}  # Qwen3RMSNorm is LlamaRMSNorm


@dataclass(frozen=True)
class Problem:
    """Layers of one shape, and the caches that a provider fills."""

    shape: Shape
    tokens: int
    dtype: torch.dtype
    device: str
    layers: int = 1

    @cached_property
    def records(self) -> list[Projection]:
        """The layers, with raw hidden states and the weight of the input norm."""
        made = projections(self.shape, self.tokens, dtype=self.dtype, device=self.device, layers=self.layers)
        return [
            layer._replace(
                norm="hf", norm_weight=torch.randn_like(layer.hidden_states[0]), norm_eps=EPS, head_norm_eps=EPS
            )
            for layer in made
        ]

    @property
    def outputs(self) -> list[torch.Tensor]:
        return [*(layer.k_cache for layer in self.records), *(layer.v_cache for layer in self.records)]

    @property
    def flops(self) -> int:
        return sum(2 * self.tokens * (layer.k_weight.numel() + layer.v_weight.numel()) for layer in self.records)

    @property
    def bytes_moved(self) -> int:
        """Bytes of each input once and of each output once."""
        tensors = {id(leaf): leaf for leaf in tree_leaves(self.records) if isinstance(leaf, torch.Tensor)}
        return minimum(tensors.values(), [])


def eager(problem: Problem) -> Callable[[], None]:
    """Return the model's own modules, and a copy into the cache."""
    shape, layer = problem.shape, problem.records[0]
    norm = _norm(shape.hidden_size, shape, layer.norm_weight)
    k_proj, v_proj = (_linear(getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_bias")) for name in "kv")
    k_norm = None if shape.head_norm is None else _norm(shape.head_dim, shape, layer.k_norm_weight)
    cos, sin = (torch.cat((getattr(layer, name),) * 2, dim=-1) for name in ("cos", "sin"))

    def run() -> None:
        rows = norm(layer.hidden_states[None])
        k, v = k_proj(rows), v_proj(rows)
        if shape.head_norm == "all":
            k = k_norm(k)
        k, v = (each.unflatten(-1, (-1, shape.head_dim)) for each in (k, v))
        if shape.head_norm == "each":
            k = k_norm(k)
        k, passed = k.transpose(1, 2).split([shape.rotary_dim, shape.head_dim - shape.rotary_dim], dim=-1)
        k = k * cos + rotate_half(k) * sin
        layer.k_cache.copy_(torch.cat((k, passed), dim=-1) if passed.numel() else k)
        layer.v_cache.copy_(v.transpose(1, 2))

    return run


def compiled(problem: Problem) -> Callable[[], None]:
    """Return :func:`eager` compiled. Between shapes and sizes, `torch.compiler.reset` keeps it from compiling too often."""
    return torch.compile(eager(problem), fullgraph=True, dynamic=False)


def unfused(problem: Problem) -> Callable[[], None]:
    """Return this project's row norm, two linear layers, norm of heads, and its splice, which rotates and stores."""
    layer = problem.records[0]

    def run() -> None:
        rows = _normed(problem, layer.hidden_states, layer.norm_weight)
        _store(problem, F.linear(rows, layer.k_weight, layer.k_bias), F.linear(rows, layer.v_weight, layer.v_bias))

    return run


def concatenated(problem: Problem) -> Callable[[], None]:
    """Return the same with one product, of K's and V's weights together."""
    layer = problem.records[0]
    weight, bias = _both(layer)

    def run() -> None:
        rows = _normed(problem, layer.hidden_states, layer.norm_weight)
        _store(problem, *F.linear(rows, weight, bias).chunk(2, dim=-1))

    return run


def concatenated_folded(problem: Problem) -> Callable[[], None]:
    """Return the same without a pass over the hidden states: weights that are folded, and 1/rms on the product, in place."""
    layer = _folded(problem.records[0])
    weight, bias = _both(layer)

    def run() -> None:
        both = F.linear(layer.hidden_states, weight).mul_(layer.rstd[:, None])
        if bias is not None:
            both.add_(bias)
        _store(problem, *both.chunk(2, dim=-1))

    return run


def _normed(problem: Problem, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ds.ops.row_norm(rows, weight, EPS, norm_order=problem.shape.norm_order)


def _both(layer: Projection) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return K's and V's weights in one, and their biases."""
    bias = None if layer.k_bias is None else torch.cat((layer.k_bias, layer.v_bias))
    return torch.cat((layer.k_weight, layer.v_weight)), bias


def _store(problem: Problem, k: torch.Tensor, v: torch.Tensor) -> None:
    """Store K and V ``[T, K * D]`` in the cache, K after its norm and RoPE."""
    shape, layer = problem.shape, problem.records[0]
    if shape.head_norm == "all":
        k = _normed(problem, k, layer.k_norm_weight)
    k, v = (each.unflatten(-1, (-1, shape.head_dim)) for each in (k, v))
    if shape.head_norm == "each":
        k = _normed(problem, k, layer.k_norm_weight)
    k, v = (each[None].transpose(1, 2) for each in (k, v))
    ds.ops.kv_splice(k, v, layer.k_cache, layer.v_cache, layer.slot_mapping, cos=layer.cos, sin=layer.sin)


def cublas(problem: Problem) -> Callable[[], None]:
    """Return the product alone, with both weights together."""
    layer = problem.records[0]
    weight = torch.cat((layer.k_weight, layer.v_weight))
    out = layer.hidden_states.new_empty(problem.tokens, weight.shape[0])
    return partial(torch.mm, layer.hidden_states, weight.T, out=out)


def cublas_two(problem: Problem) -> Callable[[], None]:
    """Return the products alone, one for each weight."""
    layer = problem.records[0]
    weights = [getattr(layer, f"{name}_weight") for name in "kv"]
    outs = [layer.hidden_states.new_empty(problem.tokens, weight.shape[0]) for weight in weights]

    def run() -> None:
        for weight, out in zip(weights, outs, strict=True):
            torch.mm(layer.hidden_states, weight.T, out=out)

    return run


def liger(problem: Problem) -> Callable[[], None]:
    """Return Liger's RMS norm and RoPE around linear layers, and a copy into the cache."""
    from liger_kernel.transformers.rms_norm import LigerRMSNorm
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    shape, layer = problem.shape, problem.records[0]
    offset, casting = {"llama": (0.0, "llama"), "gemma": (1.0, "gemma"), "olmo": (0.0, "gemma")}[shape.norm_order]

    def norm_with(weight: torch.Tensor) -> nn.Module:
        norm = LigerRMSNorm(weight.shape[0], EPS, offset, casting, in_place=False)
        return _with(norm, weight=weight)

    norm = norm_with(layer.norm_weight)
    k_norm = None if shape.head_norm is None else norm_with(layer.k_norm_weight)
    q = layer.hidden_states.new_zeros(1, problem.tokens, 1, shape.head_dim).transpose(1, 2)
    cos, sin = (torch.cat((getattr(layer, name),) * 2, dim=-1)[None] for name in ("cos", "sin"))

    def run() -> None:
        rows = norm(layer.hidden_states[None])
        k, v = (F.linear(rows, getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_bias")) for name in "kv")
        if shape.head_norm == "all":
            k = k_norm(k)
        k, v = (each.unflatten(-1, (-1, shape.head_dim)) for each in (k, v))
        if shape.head_norm == "each":
            k = k_norm(k)
        k = liger_rotary_pos_emb(q, k.transpose(1, 2), cos, sin)[1]
        layer.k_cache.copy_(k)
        layer.v_cache.copy_(v.transpose(1, 2))

    return run


def ours(problem: Problem) -> Callable[[], None]:
    """Return `kv_project` with the norm in transformers' rounding order."""
    return partial(ds.ops.kv_project, problem.records[0])


def ours_folded(problem: Problem, index: int = 0) -> Callable[[], None]:
    """Return `kv_project` with the norm folded into the weights."""
    return partial(ds.ops.kv_project, _folded(problem.records[index]))


def ours_single(problem: Problem) -> Callable[[], None]:
    """Return `kv_project` with folded norms, a call for each layer."""
    calls = [ours_folded(problem, index) for index in range(problem.layers)]

    def run() -> None:
        for call in calls:
            call()

    return run


def ours_grouped(problem: Problem) -> Callable[[], None]:
    """Return `kv_project_layers` with folded norms, one call for all layers."""
    return partial(ds.ops.kv_project_layers, [_folded(layer) for layer in problem.records])


def expected(problem: Problem) -> list[torch.Tensor]:
    """Return K of all layers, then V, computed in float64 throughout."""
    keys, values, shape = [], [], problem.shape

    def normed(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = rows * (rows.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return rows * (1 + weight if shape.norm_order == "gemma" else weight)

    for record in problem.records:
        layer = record._replace(**{
            name: value.double() for name, value in record._asdict().items() if isinstance(value, torch.Tensor)
        })  # fmt: skip
        rows = normed(layer.hidden_states, layer.norm_weight)
        k, v = (F.linear(rows, getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_bias")) for name in "kv")
        if shape.head_norm is not None:
            k = normed(k.unflatten(-1, (-1, layer.k_norm_weight.shape[0])), layer.k_norm_weight).flatten(-2)
        k, v = (each.unflatten(-1, (-1, shape.head_dim)).transpose(0, 1)[None] for each in (k, v))
        half = shape.rotary_dim // 2
        k1, k2, passed = k.split([half, half, shape.head_dim - 2 * half], dim=-1)
        cos, sin = layer.cos, layer.sin
        keys.append(torch.cat((k1 * cos - k2 * sin, k2 * cos + k1 * sin, passed), dim=-1))
        values.append(v)
    return keys + values


def _with(module: nn.Module, **weights: torch.Tensor | None) -> nn.Module:
    for name, weight in weights.items():
        setattr(module, name, None if weight is None else nn.Parameter(weight, requires_grad=False))
    return module


def _norm(width: int, shape: Shape, weight: torch.Tensor) -> nn.Module:
    return _with(NORMS[shape.norm_order](width, eps=EPS), weight=weight)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    return _with(nn.Linear(*reversed(weight.shape), device="meta"), weight=weight, bias=bias)


def _folded(layer: Projection) -> Projection:
    fold = partial(ds.ops.fold_norm_weight, norm_weight=layer.norm_weight, norm_order=layer.norm_order)
    rstd = ds.ops.rms_rstd(layer.hidden_states, EPS)
    return layer._replace(
        k_weight=fold(layer.k_weight), v_weight=fold(layer.v_weight), norm="folded", norm_weight=None, rstd=rstd
    )


Provider = Callable[[Problem], Callable[[], None]]
PROVIDERS: dict[str, Provider] = {
    "transformers": eager,
    "compile": compiled,
    "unfused": unfused,
    "concatenated": concatenated,
    "concatenated folded": concatenated_folded,
    "liger": liger,
    "ours": ours,
    "ours folded": ours_folded,
}
GROUPED: dict[str, Provider] = {"ours x8 single": ours_single, "ours x8 grouped": ours_grouped}

# No providers: products without norm, RoPE and store, for the rate that the library's own reaches.
PRODUCTS: dict[str, Provider] = {"cublas": cublas, "cublas two": cublas_two}
