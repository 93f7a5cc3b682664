"""The operators on plain tensors: projection to K/V and splicing in place into a KV cache, and the norms they start from.

Each is a ``torch.library`` operator under ``torch.ops.droidspeak_ops`` that mutates its outputs and returns nothing:
without host synchronisation on a GPU, usable under ``torch.compile(fullgraph=True)``. On the CPU the implementation is the
reference (:mod:`droidspeak_ops.ops.reference`); on CUDA and ROCm it is a Triton kernel. Autocast changes neither.

All are forward only. What requires a gradient is read and no graph is recorded; tensors with tangents, calls within
``torch.func``'s transforms, and outputs that require a gradient are refused. So is an output that shares an element with
another tensor, or with itself.

A KV cache is ``[blocks, kv_heads, block_size, head_dim]`` with any strides whose last is 1. A dense transformers cache
``[batch, kv_heads, tokens, head_dim]`` is that already, with a sequence for a block, and so are pages in HND order; for pages
in NHD order pass ``cache.transpose(1, 2)``. Slot ``s`` is row ``s % block_size`` of block ``s // block_size``; slot -1 stores
nothing. A weight may be rows of a fused one: ``qkv_weight[q_size : q_size + kv_size]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.arguments import Projection
from . import library  # noqa: F401  registers the operators
from .checks import (
    CODES,
    FLOATS,
    NORM_ORDERS,
    NormOrder,
    check,
    check_caches,
    check_choice,
    check_eps,
    check_norm_weight,
    check_rotation,
    check_rows,
    check_scales,
    fail,
)
from .namespace import ops
from .projection import project, rows


def rms_rstd(hidden_states: torch.Tensor, eps: float) -> torch.Tensor:
    """1/rms of the hidden states of each token, which depends on no weight and so can be kept with a context.

    Args:
        hidden_states: ``[..., C]``, float32, float16 or bfloat16.
        eps: added to the mean square; finite and not negative.

    Returns:
        float32 ``[...]``.
    """
    check_rows("hidden_states", hidden_states)
    check_eps("eps", eps)
    out = torch.empty(hidden_states.shape[:-1], dtype=torch.float32, device=hidden_states.device)
    ops.rms_rstd(rows(hidden_states), eps, out.view(-1))
    return out


def row_norm(
    hidden_states: torch.Tensor, weight: torch.Tensor | None, eps: float, *, norm_order: NormOrder = "llama"
) -> torch.Tensor:
    """RMS norm of each token's hidden states, rounded where transformers rounds.

    Args:
        hidden_states: ``[..., C]``, float32, float16 or bfloat16.
        weight: ``[C]``, of the same dtype; None with the order ``"none"``.
        eps: added to the mean square; finite and not negative.
        norm_order: ``"llama"`` rounds the normalised row to the model's dtype and then multiplies by the weight;
            ``"olmo"`` (OLMo 2, GPT-OSS) multiplies in float32 and rounds once; ``"gemma"`` does that with 1 + weight;
            ``"none"`` has no weight.

    Returns:
        Normalised hidden states, of the shape and dtype of `hidden_states`, contiguous.
    """
    check_rows("hidden_states", hidden_states)
    check("weight", weight, (hidden_states.shape[-1],), hidden_states, hidden_states.dtype)
    check_norm_weight("weight", weight, norm_order)
    check_eps("eps", eps)
    out = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    ops.row_norm(rows(hidden_states), weight, norm_order, eps, out.view(-1, out.shape[-1]))
    return out


def fold_norm_weight(
    weight: torch.Tensor, norm_weight: torch.Tensor, *, norm_order: NormOrder = "llama"
) -> torch.Tensor:
    """Fold the weight of an RMS norm into a projection that follows it, for ``norm="folded"``.

    Args:
        weight: ``[N, C]``, floating.
        norm_weight: ``[C]``, floating, of a dtype whose values that of `weight` holds.
        norm_order: of the norm; see :func:`row_norm`.

    Returns:
        The product, of the shape and dtype of `weight`.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    check_choice("norm_order", norm_order, NORM_ORDERS)
    if weight.dim() != 2 or not weight.is_floating_point():
        fail("weight", weight, "floating [N, C]")
    shape, device = tuple(weight.shape[1:]), weight.device
    holds = norm_weight.is_floating_point() and torch.promote_types(weight.dtype, norm_weight.dtype) == weight.dtype
    if norm_weight.shape != shape or norm_weight.device != device or not holds:
        fail("norm_weight", norm_weight, f"{weight.dtype} or a narrower floating dtype {shape} on {device}, as weight")
    return weight * (1.0 + norm_weight if norm_order == "gemma" else norm_weight)


def kv_project(projection: Projection) -> None:
    """Compute a layer's K and V from its hidden states and store them in place: no attention, no MLP.

    Norm, both projections, bias, norm of K, RoPE and the store at given rows, without the intermediate tensors. This is a
    projected layer, and the last layer of a band (paper, section 4.1: layers recomputed from the E cache).

    Args:
        projection: what is computed from what, and where it goes; without Q.

    Raises:
        ValueError: a shape, dtype, device or slot does not fit; the message names the argument.
    """
    if projection.q is not None or projection.q_weight is not None:
        raise ValueError("q, q_weight: expected None, got a tensor; qkv_project computes Q too")
    project([projection])


def qkv_project(projection: Projection) -> None:
    """:func:`kv_project` of a layer whose attention runs (an interior layer of a band): Q too, in the same launch.

    Args:
        projection: with `q` and `q_weight`.

    Raises:
        ValueError: as :func:`kv_project`.
    """
    if projection.q is None or projection.q_weight is None:
        raise ValueError("q, q_weight: expected a tensor, got None; kv_project computes K and V alone")
    project([projection])


def kv_project_layers(projections: Sequence[Projection]) -> None:
    """:func:`kv_project` of several layers of one shape: on a GPU in one launch for up to 8 layers of a short context.

    Results are bitwise those of a call for each layer.

    Args:
        projections: one for each layer. Tensors of a field have the same shape, dtype and strides in all layers; the slots,
            positions and numbers are the same.

    Raises:
        ValueError: as :func:`kv_project`; also if layers differ.
    """
    if projections:
        project(projections)


def kv_splice(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    k_cache_scale: torch.Tensor | None = None,
    v_cache_scale: torch.Tensor | None = None,
    static_scale: bool = False,
) -> None:
    """Copy rows of K and V into a cache of another layout or dtype, in place, and optionally rotate K further.

    Rows in 8 bits (float8_e4m3fn or int8) hold finite values as code · scale, with a scale for each token and head.

    Args:
        k, v: ``[B, K, T, D]``, floating or 8-bit; they must not share memory with the caches.
        k_cache, v_cache: ``[blocks, K, block_size, D]``, floating or 8-bit, written in place.
        slot_mapping: int64 ``[B * T]``: row t of sequence b goes to ``slot_mapping[b * T + t]``.
        cos, sin: ``[B * T, R / 2]``: the angle by which each row of K is rotated on top of what it has, for a change of
            position or of RoPE base (:func:`rotation_between`); computed in float32.
        k_scale, v_scale: float32 ``[B, K, T]``, any strides: scales of 8-bit rows; ``scale.expand(B, K, T)`` serves for one
            scale of the whole tensor. int8 needs them; fp8 without them is taken with scale 1.
        k_cache_scale, v_cache_scale: float32 ``[blocks, K, block_size]``, any strides: needed with 8-bit caches, and written
            in place: each row's largest value becomes the largest code.
        static_scale: read `k_cache_scale` and `v_cache_scale` instead, and saturate what does not fit.

    Raises:
        ValueError: a shape, dtype, device or slot does not fit; the message names the argument.
    """
    check_caches(k_cache, v_cache, k, FLOATS + CODES)
    blocks, num_kv_heads, block_size, head_dim = k_cache.shape
    if k.dim() != 4 or k.dtype not in FLOATS + CODES:
        fail("k", k, "floating or 8-bit [B, K, T, D]")
    batch, _, tokens, _ = k.shape
    for name, tensor in (("k", k), ("v", v)):
        check(name, tensor, (batch, num_kv_heads, tokens, head_dim), k, k.dtype)
    check("slot_mapping", slot_mapping, (batch * tokens,), k, torch.int64)
    check_rotation(cos, sin, None, batch * tokens, head_dim, k, None)
    check_scales(
        ("k_scale", "v_scale"), (k_scale, v_scale), (batch, num_kv_heads, tokens), k.dtype, k,
        needed=k.dtype == torch.int8,
    )  # fmt: skip
    check_scales(
        ("k_cache_scale", "v_cache_scale"), (k_cache_scale, v_cache_scale), (blocks, num_kv_heads, block_size),
        k_cache.dtype, k, needed=k_cache.dtype in CODES,
    )  # fmt: skip
    ops.kv_splice(
        k, v, k_scale, v_scale, cos, sin, slot_mapping, static_scale, k_cache, v_cache, k_cache_scale, v_cache_scale
    )


def rotation_between(
    cos: torch.Tensor, sin: torch.Tensor, new_cos: torch.Tensor, new_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotation that takes keys from one angle to another, for :func:`kv_splice`.

    Between positions, between RoPE bases, and between scalings of attention (YaRN multiplies cos and sin by a factor).

    Args:
        cos, sin: ``[T, R / 2]``, what the keys were rotated by.
        new_cos, new_sin: ``[T, R / 2]``, what they shall be rotated by.

    Returns:
        cos and sin of the difference, float32 ``[T, R / 2]``.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    if cos.dim() != 2 or not cos.is_floating_point():
        fail("cos", cos, "floating [T, R/2]")
    for name, half in (("sin", sin), ("new_cos", new_cos), ("new_sin", new_sin)):
        if half.shape != cos.shape or half.device != cos.device or not half.is_floating_point():
            fail(name, half, f"floating {tuple(cos.shape)} on {cos.device}, as cos")
    cos, sin, new_cos, new_sin = (half.float() for half in (cos, sin, new_cos, new_sin))
    size = cos * cos + sin * sin
    return (new_cos * cos + new_sin * sin) / size, (new_sin * cos - new_cos * sin) / size


def packed_slots(
    cu_seqlens: torch.Tensor, num_tokens: int, block_size: int, block_table: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and slots of sequences packed one behind the other, without a look at any value on a GPU.

    Args:
        cu_seqlens: int32 or int64 ``[B + 1]``, B > 0, from 0 on: sequence b is tokens ``cu_seqlens[b]`` to
            ``cu_seqlens[b + 1]``. Bounds do not fall, and the last is at most `num_tokens`; checked on the CPU alone.
        num_tokens: T, the length of the packed batch; tokens behind the last sequence are padding, with slot -1.
        block_size: rows of a cache block: of a page, or the capacity of a dense cache for a sequence.
        block_table: int32 or int64 ``[B, pages]``: the pages of each sequence; without it sequence b is block b. On the CPU a
            sequence that is longer than its blocks raises, and so does a negative page that is used; on a GPU the tokens that
            have no row so get slot -1.

    Returns:
        positions and slot_mapping, int64 ``[T]``, for :func:`kv_project`.

    Raises:
        ValueError: a number, shape, dtype or device does not fit, or on the CPU a value; the message names the argument.
    """
    for name, number, least in (("num_tokens", num_tokens, 0), ("block_size", block_size, 1)):
        if not isinstance(number, (int, torch.SymInt)) or number < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {number!r}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in _INTEGERS:
        fail("cu_seqlens", cu_seqlens, "int32 or int64 [B + 1] with B > 0")
    num_sequences, pages = len(cu_seqlens) - 1, 1
    if block_table is not None:
        pages = block_table.shape[1] if block_table.dim() == 2 else 0
        fits = pages and len(block_table) == num_sequences and block_table.device == cu_seqlens.device
        if not fits or block_table.dtype not in _INTEGERS:
            needed = f"int32 or int64 ({num_sequences}, pages) with pages > 0 on {cu_seqlens.device}, as cu_seqlens"
            fail("block_table", block_table, needed)
    cu_seqlens = cu_seqlens.long()
    # A trace has no values, and a GPU is not asked.
    values = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if values:
        _check_bounds(cu_seqlens, num_tokens, pages * block_size)
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], token, right=True)
    padding = sequence == num_sequences
    sequence = sequence.masked_fill(padding, 0)
    positions = (token - cu_seqlens[sequence]).masked_fill(padding, 0)
    page, row = positions // block_size, positions % block_size
    has_row = ~padding & (page < pages)
    block = sequence if block_table is None else block_table.long()[sequence, page.clamp(max=pages - 1)]
    if values and bool((has_row & (block < 0)).any()):
        raise ValueError(f"block_table: expected pages from 0 on where tokens are, got {int(block[has_row].min())}")
    return positions, torch.where(has_row & (block >= 0), block * block_size + row, -1)


_INTEGERS = (torch.int32, torch.int64)


def _check_bounds(cu_seqlens: torch.Tensor, num_tokens: int, capacity: int) -> None:
    lengths = cu_seqlens.diff()
    first, last, shortest, longest = int(cu_seqlens[0]), int(cu_seqlens[-1]), int(lengths.min()), int(lengths.max())
    if first != 0 or shortest < 0 or last > num_tokens:
        raise ValueError(
            f"cu_seqlens: expected bounds from 0 to at most {num_tokens} that do not fall, "
            f"got them from {first} to {last} with a smallest step of {shortest}"
        )
    if longest > capacity:
        raise ValueError(
            f"cu_seqlens: expected at most {capacity} tokens a sequence, the rows of its blocks, got {longest}"
        )
