"""Fitted maps layer by layer: the errors that they leave, and what is left of them at a lower rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

import droidspeak_ops as ds
from bench.common import Row
from droidspeak_ops.context.parts import SINKS
from droidspeak_ops.fitting.pair import Pair, huber_weights
from droidspeak_ops.fitting.ridge import NormalEquations
from droidspeak_ops.hf.decoder import Decoder
from droidspeak_ops.prefill.maps import Affine, LayerMap, without_sinks

STRENGTH = 0.03
"""Strength of the ridge, the one that most layers choose."""


@torch.no_grad()
def of_rank(sender: Any, receiver: Any, maps: ds.Maps, rank: int) -> ds.Maps:
    """Return maps from hidden states whose difference from the sender's own projection is cut to a rank."""
    pair = Pair(Decoder(sender), Decoder(receiver), [])
    layers = dict(maps.layers)
    for (layer, source), each in maps.layers.items():
        if source == "fitted":
            base = pair.projection(pair.sender, layer).weight
            difference = torch.cat([each.k_weight, each.v_weight]).double() - base
            left, sizes, right = torch.linalg.svd(difference, full_matrices=False)
            weight = (base + (left[:, :rank] * sizes[:rank]) @ right[:rank]).to(each.k_weight.dtype)
            k_weight, v_weight = (half.contiguous() for half in weight.chunk(2))
            layers[layer, source] = LayerMap(k_weight, v_weight, each.k_bias, each.v_bias)
    return replace(maps, layers=layers)


@torch.no_grad()
def errors_by_layer(
    sender: Any,
    receiver: Any,
    maps: ds.Maps,
    calibration: Sequence[torch.Tensor],
    test: Sequence[torch.Tensor],
    delimiters: torch.Tensor,
) -> list[Row]:
    """Return the errors of K and V of test contexts against the receiver's, layer by layer: squared error over variance.

    Args:
        maps: of the pair, whose shares of each layer are shown.
        calibration, test: contexts ``[1, T]``: those that a regression is fitted to, and those that it is judged on.
        delimiters: token ids that delimit lines and turns.
    """
    pair = Pair(Decoder(sender), Decoder(receiver), [])
    read = {
        split: [tuple(ds.capture(model, ids, layers=pair.layers) for model in (sender, receiver)) for ids in contexts]
        for split, contexts in (("calibration", calibration), ("test", test))
    }
    of_delimiters = torch.cat([torch.isin(ids[0, SINKS:], delimiters) for ids in test])

    def inputs(split: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs ``[N, C]`` of a layer's map, without attention sinks: the sender's, and the receiver's."""
        sender_rows, receiver_rows = (
            torch.cat(
                [
                    without_sinks(pair.normalized(layer, context.hidden(layer)), context.tokens.shape[1]).double()
                    for context in contexts
                ]
            )
            for contexts in zip(*read[split], strict=True)
        )
        return sender_rows, receiver_rows

    rows: list[Row] = []
    for layer in pair.layers:
        sender_projection, projection = (pair.projection(each, layer) for each in (pair.sender, pair.receiver))
        given, wanted = inputs("calibration", layer)
        residual = F.linear(wanted - given, projection.weight)
        robust, plain = (_fit(given, residual, weights) for weights in (huber_weights(residual), None))
        given, wanted = inputs("test", layer)
        target = projection(wanted)
        variance = (target - target.mean(0)).square().sum(1).mean()
        predicted = {
            "reused": sender_projection(given),
            "projected": projection(given),
            "fitted": projection(given) + robust(given),
            "fitted, all rows alike": projection(given) + plain(given),
        }
        errors = {name: (each - target).square().sum(1) / variance for name, each in predicted.items()}
        drift = (wanted - given).norm(dim=1)
        share_of_k, share_of_v = maps.shares.get(layer, (0.0, 0.0))
        rows.append(
            {
                "layer": layer,
                **{name: f"{each.mean().item():.4f}" for name, each in errors.items()},
                "fitted, delimiters": f"{errors['fitted'][of_delimiters].mean().item():.4f}",
                "fitted, other tokens": f"{errors['fitted'][~of_delimiters].mean().item():.4f}",
                "largest drift over median": f"{(drift.max() / drift.median()).item():.1f}",
                "share of K": f"{share_of_k:.2f}",
                "share of V": f"{share_of_v:.2f}",
            }
        )
    return rows


def _fit(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None) -> Affine:
    equations = NormalEquations(x.shape[1], y.shape[1])
    equations.add(x, y, weights)
    return equations.solve(STRENGTH)
