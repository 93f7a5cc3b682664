"""The weights that a layer's K/V depend on, and the same as the projection operator takes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from .. import ops
from ..context.context import Rotation, last
from ..ops.checks import NormOrder

Norm = Literal["hf", "folded"]


@dataclass(frozen=True)
class LowRank:
    """One adapter: ``down`` ``[r, C]`` and, with its scaling, ``up`` ``[N, r]``."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer that its K/V depend on, as :func:`droidspeak_ops.ops.kv_project` names them."""

    norm_weight: torch.Tensor | None
    norm_eps: float
    k_weight: torch.Tensor
    v_weight: torch.Tensor
    k_bias: torch.Tensor | None
    v_bias: torch.Tensor | None
    k_norm_weight: torch.Tensor | None
    k_norm_eps: float
    k_low_rank: tuple[LowRank, ...] = ()
    v_low_rank: tuple[LowRank, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """The weights of a layer as the operator takes them: what can be done to them before any token is known has been done.

    Args:
        weights: of the layer.
        norm: how the input is normalised, if `weights` have a norm.
        k_weight, v_weight: ``[K * D, C + r]``, with the norm's weight folded in for ``"folded"``.
        down: ``[r, C]`` of all adapters together, or None: rows are lengthened by their products with it.
    """

    weights: LayerWeights
    norm: Norm
    k_weight: torch.Tensor
    v_weight: torch.Tensor
    down: torch.Tensor | None = None

    @property
    def folded(self) -> bool:
        """True if the operator needs 1/rms of the rows."""
        return self.norm == "folded" and self.weights.norm_weight is not None

    @cached_property
    def kind(self) -> tuple[Any, ...]:
        """Properties of the weights that layers projected together have in common."""
        of_norms = (self.weights.norm_eps, self.weights.k_norm_eps)
        steps = (self.weights.norm_weight, self.weights.k_bias, self.weights.k_norm_weight, self.down)
        return (self.norm, *of_norms, self.k_weight.shape, self.k_weight.stride(), *(step is None for step in steps))


def prepare(weights: LayerWeights, norm_order: NormOrder, norm: Norm) -> Prepared:
    """The weights of a layer for ``norm``: the norm's weight folded if asked for, adapters beside the projections.

    For ``"hf"`` without adapters nothing is copied.
    """
    k_weight, v_weight, gain = weights.k_weight, weights.v_weight, weights.norm_weight
    folds = norm == "folded" and gain is not None
    if folds:
        k_weight, v_weight = (ops.fold_norm_weight(w, gain, norm_order=norm_order) for w in (k_weight, v_weight))  # type: ignore[arg-type]
    adapters = (*weights.k_low_rank, *weights.v_low_rank)
    if not adapters:
        return Prepared(weights, norm, k_weight, v_weight)
    dtype = k_weight.dtype
    down = torch.cat([each.down for each in adapters]).to(dtype)
    if folds:
        down = ops.fold_norm_weight(down, gain, norm_order=norm_order)  # type: ignore[arg-type]
    columns = [each.up.to(dtype) for each in adapters]
    of_k = len(weights.k_low_rank)
    k_weight = torch.cat([k_weight, *columns[:of_k], *map(torch.zeros_like, columns[of_k:])], dim=1)
    v_weight = torch.cat([v_weight, *map(torch.zeros_like, columns[:of_k]), *columns[of_k:]], dim=1)
    return Prepared(weights, norm, k_weight, v_weight, down)


def projection(
    prepared: Prepared,
    norm_order: NormOrder,
    hidden_states: torch.Tensor,
    rotation: Rotation | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    rstd: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> ops.Projection:
    """The operator's record of a layer, for as many of the last tokens as there are slots.

    Args:
        hidden_states: ``[B, T, C]``, what enters the layer.
        rotation: cos and sin ``[T, R / 2]``, or None.
        k_cache, v_cache, slot_mapping: where the last N tokens of each sequence go, ``[B * N]`` slots.
        rstd: float32 ``[B, T]``, where it is known and `prepared` are folded.
        positions: rows of `rotation`'s last N for each token, ``[B * N]``; those in order where None.
    """
    weights = prepared.weights
    rows = slot_mapping.shape[0] // hidden_states.shape[0]
    if (skipped := hidden_states.shape[1] - rows) > 0:
        hidden_states = hidden_states[:, skipped:]
        rstd = None if rstd is None else rstd[:, skipped:]
    norm: Literal["hf", "folded", "none"] = "none" if weights.norm_weight is None else prepared.norm
    if prepared.down is not None:  # rows are lengthened by what the adapters make of them, normed unless that is folded
        if norm == "folded":
            rstd = ops.rms_rstd(hidden_states, weights.norm_eps) if rstd is None else rstd
        elif weights.norm_weight is not None:
            hidden_states = ops.row_norm(hidden_states, weights.norm_weight, weights.norm_eps, norm_order=norm_order)
            norm = "none"
        hidden_states = torch.cat([hidden_states, hidden_states @ prepared.down.T], dim=-1)
    cos, sin = (None, None) if rotation is None else (last(half, rows) for half in rotation)
    return ops.Projection(
        hidden_states, prepared.k_weight, prepared.v_weight, k_cache, v_cache, slot_mapping, norm=norm,
        norm_weight=weights.norm_weight if norm == "hf" else None, norm_order=norm_order, norm_eps=weights.norm_eps,
        rstd=rstd, k_bias=weights.k_bias, v_bias=weights.v_bias, k_norm_weight=weights.k_norm_weight,
        head_norm_eps=weights.k_norm_eps, cos=cos, sin=sin, positions=positions,
    )  # fmt: skip
