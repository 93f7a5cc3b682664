"""K and V of layers as projections of the hidden states that enter them, with the weights that were read from a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from .. import ops
from ..context.context import Rotation, last
from ..ops.checks import NormOrder
from .weights import Prepared


@dataclass(frozen=True)
class Projection:
    """One layer to project: what enters it, what it is projected with, and where K and V go.

    Args:
        hidden_states: ``[B, N, C]``.
        prepared: the weights.
        rotation: cos and sin ``[N, R / 2]`` of the N tokens, or None.
        keys, values: ``[B, K, N, D]``, written in place.
        rstd: float32 ``[B, N]``, 1/rms of the hidden states, where it is known and `prepared` are folded.
    """

    hidden_states: torch.Tensor
    prepared: Prepared
    rotation: Rotation | None
    keys: torch.Tensor
    values: torch.Tensor
    rstd: torch.Tensor | None = None


def of_last_rows(
    hidden_states: torch.Tensor,
    prepared: Prepared,
    rotation: Rotation | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    rstd: torch.Tensor | None = None,
) -> Projection:
    """Return a projection of as many of the last tokens as `keys` have rows: all, or those that a sliding window shows."""
    rows = keys.shape[2]
    if (skipped := hidden_states.shape[1] - rows) > 0:
        hidden_states = hidden_states[:, skipped:]
        rstd = None if rstd is None else rstd[:, skipped:]
    if rotation is not None and rotation[0].shape[0] > rows:
        rotation = last(rotation[0], rows), last(rotation[1], rows)
    return Projection(hidden_states, prepared, rotation, keys, values, rstd)


def project(layers: Sequence[Projection], norm_order: NormOrder) -> None:
    """Project all `layers`, those that are alike together."""
    alike = defaultdict(list)
    for layer in layers:
        alike[_kind(layer)].append(layer)
    for group in alike.values():
        _project_alike(group, norm_order)


def _kind(layer: Projection) -> tuple[Any, ...]:
    """Properties that layers projected together have in common: sizes, and which steps there are."""
    steps = (layer.rotation is None, layer.rstd is None)
    return (layer.hidden_states.shape, layer.keys.shape, layer.keys.stride(), *steps, layer.prepared.kind)


def _project_alike(layers: list[Projection], norm_order: NormOrder) -> None:
    prepared = [layer.prepared for layer in layers]
    weights = [each.weights for each in prepared]
    first = weights[0]
    norm: Literal["hf", "folded", "none"] = "none" if first.norm_weight is None else prepared[0].norm
    if prepared[0].down is not None:
        layers = [_lengthened(layer, norm_order) for layer in layers]
        norm = "folded" if norm == "folded" else "none"
    batch, _, tokens, _ = layers[0].keys.shape
    device = layers[0].keys.device
    rotations = [layer.rotation for layer in layers if layer.rotation is not None]
    ops.kv_project_layers(
        [layer.hidden_states for layer in layers], [each.k_weight for each in prepared],
        [each.v_weight for each in prepared], [layer.keys for layer in layers], [layer.values for layer in layers],
        torch.arange(batch * tokens, device=device), norm=norm, norm_order=norm_order, norm_eps=first.norm_eps,
        norm_weights=[each.norm_weight for each in weights if norm == "hf" and each.norm_weight is not None],
        rstds=[layer.rstd for layer in layers if layer.rstd is not None],
        k_biases=[each.k_bias for each in weights if each.k_bias is not None],
        v_biases=[each.v_bias for each in weights if each.v_bias is not None],
        k_norm_weights=[each.k_norm_weight for each in weights if each.k_norm_weight is not None],
        head_norm_eps=first.k_norm_eps, coses=[cos for cos, _ in rotations], sines=[sin for _, sin in rotations],
        positions=torch.arange(tokens, device=device).repeat(batch) if batch > 1 and rotations else None,
    )  # fmt: skip


def _lengthened(layer: Projection, norm_order: NormOrder) -> Projection:
    """Lengthen the rows by what the adapters make of them, normalised unless the norm is folded."""
    prepared, states, rstd = layer.prepared, layer.hidden_states, layer.rstd
    weights = prepared.weights
    if prepared.folded and rstd is None:
        rstd = ops.rms_rstd(states, weights.norm_eps)
    elif not prepared.folded and weights.norm_weight is not None:
        states = ops.row_norm(states, weights.norm_weight, weights.norm_eps, norm_order=norm_order)
    assert prepared.down is not None
    return replace(layer, hidden_states=torch.cat([states, states @ prepared.down.T], dim=-1), rstd=rstd)
