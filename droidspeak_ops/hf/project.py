"""K and V of layers as projections of the hidden states that enter them, with the weights that were read from a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .. import ops
from ..checks import NormOrder
from ..context import Rotation
from .families import LayerWeights


@dataclass(frozen=True)
class Projection:
    """One layer to project: what enters it, what it is projected with, and where K and V go.

    Args:
        hidden_states: ``[B, N, C]``.
        weights: of the layer.
        rotation: cos and sin ``[N, R / 2]`` of the N tokens, or None.
        keys, values: ``[B, K, N, D]``, written in place.
    """

    hidden_states: torch.Tensor
    weights: LayerWeights
    rotation: Rotation | None
    keys: torch.Tensor
    values: torch.Tensor


def project(layers: Sequence[Projection], norm_order: NormOrder, norm: Literal["hf", "folded"]) -> None:
    """Project all `layers`, those that are alike together."""
    alike = defaultdict(list)
    for layer in layers:
        alike[_kind(layer)].append(layer)
    for group in alike.values():
        _project_alike(group, norm_order, norm)


def _kind(layer: Projection) -> tuple[Any, ...]:
    """What layers have in common that are projected together: sizes, and which steps there are."""
    weights = layer.weights
    steps = (layer.rotation, weights.norm_weight, weights.k_bias, weights.k_norm_weight)
    rank = sum(len(each.down) for each in (*weights.k_low_rank, *weights.v_low_rank))
    sizes = (layer.hidden_states.shape, layer.keys.shape, layer.keys.stride(), weights.k_weight.stride(), rank)
    return (*sizes, *(step is None for step in steps))


def _project_alike(layers: list[Projection], norm_order: NormOrder, norm: Literal["hf", "folded"]) -> None:
    weights = [layer.weights for layer in layers]
    first = weights[0]
    inputs = [_inputs(layer.hidden_states, layer.weights, norm_order, norm) for layer in layers]
    batch, _, tokens, _ = layers[0].keys.shape
    device = layers[0].keys.device
    rotations = [layer.rotation for layer in layers if layer.rotation is not None]
    ops.kv_project_layers(
        [each.hidden_states for each in inputs], [each.k_weight for each in inputs], [each.v_weight for each in inputs],
        [layer.keys for layer in layers], [layer.values for layer in layers], torch.arange(batch * tokens, device=device),
        norm=inputs[0].norm, norm_order=norm_order, norm_eps=first.norm_eps,
        norm_weights=[each.norm_weight for each in inputs if each.norm_weight is not None],
        rstds=[each.rstd for each in inputs if each.rstd is not None],
        k_biases=[each.k_bias for each in weights if each.k_bias is not None],
        v_biases=[each.v_bias for each in weights if each.v_bias is not None],
        k_norm_weights=[each.k_norm_weight for each in weights if each.k_norm_weight is not None],
        head_norm_eps=first.k_norm_eps, coses=[cos for cos, _ in rotations], sines=[sin for _, sin in rotations],
        positions=torch.arange(tokens, device=device).repeat(batch) if batch > 1 and rotations else None,
    )  # fmt: skip


@dataclass(frozen=True)
class _Inputs:
    hidden_states: torch.Tensor
    k_weight: torch.Tensor
    v_weight: torch.Tensor
    norm: Literal["hf", "folded", "none"]
    norm_weight: torch.Tensor | None = None
    rstd: torch.Tensor | None = None


def _inputs(
    states: torch.Tensor, weights: LayerWeights, norm_order: NormOrder, norm: Literal["hf", "folded"]
) -> _Inputs:
    """What the operator is given for one layer: adapters beside the projections, the norm's weight folded if asked for."""
    k_weight, v_weight, gain = weights.k_weight, weights.v_weight, weights.norm_weight
    adapters = (*weights.k_low_rank, *weights.v_low_rank)
    if gain is None:
        norm_given: dict[str, Any] = {"norm": "none"}
    elif norm == "folded":
        k_weight, v_weight = (ops.fold_norm_weight(w, gain, norm_order=norm_order) for w in (k_weight, v_weight))
        norm_given = {"norm": "folded"}
    elif adapters:
        states = ops.row_norm(states, gain, weights.norm_eps, norm_order=norm_order)
        norm_given = {"norm": "none"}
    else:
        norm_given = {"norm": "hf", "norm_weight": gain}
    if not adapters:
        return _Inputs(states, k_weight, v_weight, **norm_given)

    down = torch.cat([each.down for each in adapters]).to(states.dtype)
    if gain is not None and norm == "folded":
        down = ops.fold_norm_weight(down, gain, norm_order=norm_order)
        norm_given["rstd"] = ops.rms_rstd(states, weights.norm_eps)
    columns = [each.up.to(states.dtype) for each in adapters]
    of_k = len(weights.k_low_rank)
    k_weight = torch.cat([k_weight, *columns[:of_k], *map(torch.zeros_like, columns[of_k:])], dim=1)
    v_weight = torch.cat([v_weight, *map(torch.zeros_like, columns[:of_k]), *columns[of_k:]], dim=1)
    return _Inputs(torch.cat([states, states @ down.T], dim=-1), k_weight, v_weight, **norm_given)
