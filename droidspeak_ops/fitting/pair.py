"""A sender and a receiver, layer by layer: what is regressed on what, and what a regression adds to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import ops
from ..context.context import SharedContext
from ..hf.adapters import LowRank
from ..hf.decoder import Decoder
from ..hf.passes import Pass
from ..prefill.maps import RMS_EPS, SINKS, Correction, Domain, LayerMap, sinks_among
from ..prefill.schedule import Source
from .ridge import NormalEquations, Regression
from .shares import Ingredients, Mixture, rotated

FITTED: tuple[Source, ...] = ("fitted", "fitted_kv")
Key = tuple[int, Source]

_DAMPING = 0.01  # of covariances that are inverted, of their mean variance
_ALIKE = 1.25  # a context is alike up to so many times the distance of the furthest that was held out
_OUTLIER = 3.0  # a row further off than this many medians counts as if it were that far


class Linear(NamedTuple):
    """``y = x Wᵀ + b``: `weight` ``[2 * K * D, P]`` and `bias` ``[2 * K * D]``, K above V."""

    weight: torch.Tensor
    bias: torch.Tensor


class Pair:
    """A pair of models that fits together. Layer 0 needs no map: what enters it are the receiver's own embeddings.

    Args:
        starts: the layers at which bands start, where the receiver's hidden states are predicted too. Not without an input
            norm: there a map is given the rows as they are, and a correction their directions.

    Raises:
        ReuseError: they do not fit together.
    """

    def __init__(self, sender: Decoder, receiver: Decoder, starts: Collection[int]) -> None:
        self.sender, self.receiver = sender, receiver
        self.fingerprints = sender.fingerprint(weights=True), receiver.fingerprint(weights=True)
        self.fingerprints[0].check_reuse_by(self.fingerprints[1])
        self.layers = range(1, receiver.num_layers)
        self.starts = {layer for layer in starts if layer > 0 and receiver.weights(layer).norm_weight is not None}
        self.projection = cache(self._compute_projection)
        self.domain_layer = receiver.num_layers // 2
        self._width = 2 * receiver.num_kv_heads * receiver.head_dim

    def equations(self) -> dict[Key, NormalEquations]:
        """Empty sums by layer and role. Those of hidden states predict K and V, then the receiver's hidden states."""
        hidden, device = self.receiver.config.hidden_size, self.receiver.model.device
        outputs = {layer: self._width + (hidden if layer in self.starts else 0) for layer in self.layers}
        return {
            **{(layer, "fitted"): NormalEquations(hidden, outputs[layer], device) for layer in self.layers},
            **{(layer, "fitted_kv"): NormalEquations(self._width, self._width, device) for layer in self.layers},
        }

    def blocks(self, layer: int, role: Source) -> list[slice]:
        """The outputs that are predicted with one strength of the ridge: K, V and, where a band starts, hidden states."""
        half, corrected = self._width // 2, role == "fitted" and layer in self.starts
        return [slice(0, half), slice(half, self._width), *([slice(self._width, None)] if corrected else [])]

    def add(self, equations: Mapping[Key, NormalEquations], theirs: SharedContext, own: SharedContext) -> None:
        """Add a context that both have read, but for the sinks. Rows that are far off count less: a few tokens with massive
        activations are like no others."""
        for layer in self.layers:
            rows, own_rows = self.unit(layer, theirs.hidden(layer)), self.unit(layer, own.hidden(layer))
            projection = self.projection(self.receiver, layer)
            missing = F.linear(own_rows - rows, projection.weight.to(rows.dtype))
            weights = tamed(missing[SINKS:])
            if layer in self.starts:
                per_row = ops.rms_rstd(theirs.hidden(layer), RMS_EPS)[0, :, None]
                missing = torch.cat([missing, (own.hidden(layer) - theirs.hidden(layer))[0] * per_row], dim=1)
            equations[layer, "fitted"].add(rows[SINKS:], missing[SINKS:], weights)
            rows, own_rows = theirs.unrotated(layer)[0], own.unrotated(layer)[0]
            skipped = sinks_among(len(rows), theirs.tokens.shape[1])
            missing = (own_rows - rows)[skipped:]
            equations[layer, "fitted_kv"].add(rows[skipped:], missing, tamed(missing))

    def mixture(self, role: Source, theirs: SharedContext, fits: Mapping[int, Regression]) -> Mixture:
        """The sender's K and V of a context, layer by layer, and what shares of the maps would add."""
        over = Pass(self.receiver, theirs.tokens.shape)
        return {layer: self._ingredients((layer, role), theirs, fits[layer], over) for layer in self.layers}

    def _ingredients(self, key: Key, theirs: SharedContext, fitted: Regression, over: Pass) -> Ingredients:
        layer, role = key
        tokens, heads = theirs.tokens.shape[1], self.receiver.num_kv_heads
        if role == "fitted":
            kept = theirs.kv(layer).keys.shape[2]
            rows = self.unit(layer, theirs.hidden(layer))[tokens - kept :]
        else:
            rows = theirs.unrotated(layer)[0]
        base, toward = (
            F.linear(rows, weight.to(rows.dtype), bias.to(rows.dtype)).unflatten(-1, (2, heads, -1))  # [N, 2, K, D]
            for weight, bias in self._terms(key, fitted)
        )
        toward[: sinks_among(len(rows), tokens)] = 0
        norm_weight = self.receiver.weights(layer).k_norm_weight if role == "fitted" else None
        if norm_weight is None:
            for each in (base, toward):
                each[:, 0] = rotated(each[:, 0], over.rotation(layer))
        base, toward = (each.permute(1, 2, 0, 3).contiguous() for each in (base, toward))  # [2, K, N, D]
        return Ingredients(base, toward, norm_weight)

    def layer_map(self, key: Key, fitted: Regression, shares: torch.Tensor) -> LayerMap:
        """The map with `shares` ``[2]`` of what is fitted, for K and V, in the receiver's dtype."""
        base, toward = self._terms(key, fitted)
        rows = shares.double().repeat_interleave(self._width // 2)
        weight, bias = base.weight + rows[:, None] * toward.weight, base.bias + rows * toward.bias
        dtype = self.receiver.model.dtype
        return LayerMap(*(part.to(dtype).contiguous() for part in (*weight.chunk(2), *bias.chunk(2))))

    def domain(
        self, equations: NormalEquations, held_out: Sequence[tuple[NormalEquations, Sequence[SharedContext]]]
    ) -> Domain:
        """The kind of contexts that `equations` from K/V at :attr:`domain_layer` have summed.

        Args:
            held_out: some of those contexts, with the equations of all others.
        """

        def around(equations: NormalEquations, limit: float) -> Domain:
            dtype = torch.promote_types(self.receiver.model.dtype, torch.float32)
            mean, whitening = (each.to(dtype) for each in equations.whitening(_DAMPING))
            return Domain(self.domain_layer, mean, whitening, limit)

        furthest = max(around(others, 0.0).distance(each) for others, contexts in held_out for each in contexts)
        return around(equations, _ALIKE * furthest)

    def correction(self, fitted: Regression, share: float) -> Correction:
        """A share of what the regression says of the hidden states that enter a layer."""
        weight, bias = (share * part[self._width :] for part in (fitted.weight, fitted.bias))
        return Correction(weight.to(self.receiver.model.dtype), bias.to(self.receiver.model.dtype))

    def _terms(self, key: Key, fitted: Regression) -> tuple[Linear, Linear]:
        """The affine map that gives the sender's K/V, and the difference that leads to the fitted K/V."""
        layer, role = key
        added = Linear(fitted.weight[: self._width], fitted.bias[: self._width])
        if role == "fitted_kv":
            return Linear(torch.eye(self._width).to(added.weight), torch.zeros_like(added.bias)), added
        theirs, own = (self.projection(decoder, layer) for decoder in (self.sender, self.receiver))
        return theirs, Linear(own.weight - theirs.weight + added.weight, own.bias - theirs.bias + added.bias)

    def _compute_projection(self, decoder: Decoder, layer: int) -> Linear:
        """A model's own projection of hidden states over their root mean square, in float64: the norm's weight folded in."""
        weights = decoder.weights(layer)
        weight = torch.cat([_dense(weights.k_weight, weights.k_low_rank), _dense(weights.v_weight, weights.v_low_rank)])
        if weights.norm_weight is not None:
            gain = weights.norm_weight.double()
            weight = ops.fold_norm_weight(weight, gain, norm_order=decoder.family.norm_order)
        if weights.k_bias is None or weights.v_bias is None:
            return Linear(weight, weight.new_zeros(len(weight)))
        return Linear(weight, torch.cat([weights.k_bias, weights.v_bias]).double())

    def unit(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """Input of a layer's map, ``[T, C]``: the hidden states over their root mean square, if it has a norm."""
        weights = self.receiver.plainly_normed(layer)
        if weights.norm_weight is None:
            return states[0]
        order = self.receiver.family.norm_order
        return ops.row_norm(states, weights.norm_weight, weights.norm_eps, norm_order=order)[0]


def _dense(weight: torch.Tensor, adapters: Sequence[LowRank]) -> torch.Tensor:
    total = weight.double()
    for each in adapters:
        total = total + each.up.double() @ each.down.double()
    return total


def tamed(missing: torch.Tensor) -> torch.Tensor:
    """Huber's weights of rows: 1, or less for those that are far off."""
    size = missing.norm(dim=-1).double()
    return (_OUTLIER * size.median() / size.clamp(min=1e-30)).clamp(max=1.0)
