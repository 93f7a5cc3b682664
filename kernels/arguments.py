"""The arguments of a projection to K and V, or Q, K and V: one record from the public function down to the kernel.

This needs no Triton, so that the record can be made, and the reference run, where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Projection(NamedTuple):
    """One layer's projection to K and V, or Q, K and V, stored in place in a KV cache.

    A cache is ``[blocks, K, block_size, D]`` with any strides whose last is 1; slot ``s`` is row ``s % block_size`` of block
    ``s // block_size``.

    Args:
        hidden_states: ``[..., C]``: the residual stream that enters the layer; T tokens in all.
        k_weight, v_weight: ``[K * D, C]``, of the dtype of `hidden_states`. They may be rows of a fused weight.
        k_cache, v_cache: ``[blocks, K, block_size, D]``, written in place; floating, or float8_e4m3fn (saturated, scale 1).
        slot_mapping: int64 ``[T]``, each slot at most once; slot -1 stores nothing. On the CPU a slot outside the cache raises;
            on a GPU, where reading it would stall the host, such a token is not stored.
        norm: ``"hf"`` normalises rows first, in transformers' rounding order, with `norm_weight` and `norm_eps`.
            ``"folded"`` expects weights that went through :func:`droidspeak_ops.ops.fold_norm_weight`, and scales the float32
            product by `rstd`: one rounding fewer and no pass over the rows. ``"none"`` takes rows that are normalised already.
        norm_weight: ``[C]``; for ``"hf"`` alone.
        norm_order: where the input norm and the norms of heads round; see :func:`droidspeak_ops.ops.row_norm`.
        norm_eps: eps of the input norm, where it is computed here; finite and not negative.
        rstd: float32, shape of `hidden_states` without its last dimension; for ``"folded"``, computed when not given.
        q_weight: ``[H * D, C]``, with `q`.
        q: ``[T, H, D]``, written in place at row t for token t; any strides but the last.
        q_bias, k_bias, v_bias: ``[H * D]`` and ``[K * D]``, all or none; of Q where there is Q.
        q_norm_weight, k_norm_weight: RMS norm of Q and K before RoPE: ``[D]`` over each head, or as wide as all heads
            together (which needs caches of the dtype of `hidden_states`).
        head_norm_eps: eps of those norms; finite and not negative.
        cos, sin: ``[T, R / 2]`` with R the rotated columns of a head: pairs (i, i + R/2) are rotated, the rest pass. Of the
            dtype of `hidden_states`, in which RoPE then rounds, or float32, where only its result is rounded (OLMo 2).
        positions: int64 ``[T]``: the row of `cos` and `sin` of each token, which then have any number of rows; not checked
            on a GPU. For packed sequences see :func:`droidspeak_ops.ops.packed_slots`.
    """

    hidden_states: torch.Tensor
    k_weight: torch.Tensor
    v_weight: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slot_mapping: torch.Tensor
    norm: str = "hf"
    norm_weight: torch.Tensor | None = None
    norm_order: str = "llama"
    norm_eps: float = 1e-6
    rstd: torch.Tensor | None = None
    q_weight: torch.Tensor | None = None
    q: torch.Tensor | None = None
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    q_norm_weight: torch.Tensor | None = None
    k_norm_weight: torch.Tensor | None = None
    head_norm_eps: float = 1e-6
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    positions: torch.Tensor | None = None


SHARED = ("slot_mapping", "norm", "norm_order", "norm_eps", "head_norm_eps", "positions")
"""Fields that layers projected together have in common; of the others each layer has its own."""

_IS_SHARED = tuple(name in SHARED for name in Projection._fields)


def to_operator(layers: Sequence[Projection]) -> tuple[Any, ...]:
    """Arguments of the operator, in the record's order: a list of every layer's tensor, empty where they have none."""
    return tuple([
        column[0] if shared else ([] if column[0] is None else list(column))
        for shared, column in zip(_IS_SHARED, zip(*layers, strict=True), strict=True)
    ])  # fmt: skip


def from_operator(*arguments: Any) -> list[Projection]:
    """Return the records that :func:`to_operator` was given."""
    count = len(arguments[0])
    columns = [
        [value] * count if shared else value or [None] * count
        for shared, value in zip(_IS_SHARED, arguments, strict=True)
    ]
    return list(map(Projection._make, zip(*columns, strict=True)))
