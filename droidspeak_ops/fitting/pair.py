"""The regressions of a pair of models, layer by layer: their inputs and targets, and the maps made of their results."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange

from .. import ops
from ..context.context import SharedContext, last
from ..hf.adapters import LowRank, UnsupportedModelError
from ..hf.decoder import Decoder
from ..prefill.maps import RMS_EPS, Affine, Correction, Domain, LayerMap, without_sinks, zero_sinks
from ..prefill.schedule import Source
from .ridge import NormalEquations
from .shares import Interpolation, Interpolations

FITTED: tuple[Source, ...] = ("fitted", "fitted_kv")
Key = tuple[int, Source]
"""A layer and what its map starts from: hidden states (``"fitted"``) or the sender's K/V (``"fitted_kv"``)."""

_DAMPING = 0.01  # of covariances before they are inverted, relative to their mean variance
_DOMAIN_MARGIN = 1.25  # the limit of a domain, relative to the furthest context that was left out of it
_HUBER_THRESHOLD = 3.0  # in medians of the norms of the residuals


class Pair:
    """A sender and a receiver that fit together. Layer 0 needs no map: its inputs are the receiver's own embeddings.

    Args:
        starts: layers at which bands start, where the receiver's hidden states are regressed too; not in models without an
            input norm.

    Raises:
        ReuseError: the models do not fit together.
        UnsupportedModelError: hooks or the like have a part in K and V.
    """

    def __init__(self, sender: Decoder, receiver: Decoder, starts: Collection[int]) -> None:
        self.sender, self.receiver = sender, receiver
        self.fingerprints = sender.fingerprint(weights=True), receiver.fingerprint(weights=True)
        self.fingerprints[0].check_reuse_by(self.fingerprints[1])
        for name, decoder in (("sender", sender), ("receiver", receiver)):
            if not all(decoder.is_its_weights):
                raise UnsupportedModelError(
                    f"{name}: expected layers whose weights are all that makes K and V, got hooks, a forward of its own or "
                    f"parametrisations in layer {decoder.is_its_weights.index(False)}"
                )
        self.layers = range(1, receiver.num_layers)
        self.starts = {layer for layer in starts if layer > 0 and receiver.weights(layer).norm_weight is not None}
        self.projection = cache(self._compute_projection)
        self.domain_layer = receiver.num_layers // 2
        self._width = 2 * receiver.num_kv_heads * receiver.head_dim

    def equations(self) -> dict[Key, NormalEquations]:
        """Return empty normal equations. Outputs are K and V, then, where a band starts, the receiver's hidden states."""
        hidden, device = self.receiver.config.hidden_size, self.receiver.model.device
        outputs = {layer: self._width + (hidden if layer in self.starts else 0) for layer in self.layers}
        return {
            **{(layer, "fitted"): NormalEquations(hidden, outputs[layer], device) for layer in self.layers},
            **{(layer, "fitted_kv"): NormalEquations(self._width, self._width, device) for layer in self.layers},
        }

    def blocks(self, key: Key) -> list[slice]:
        """Return the outputs that share one ridge strength: K, V and, where a band starts, hidden states."""
        layer, source = key
        half, corrected = self._width // 2, source == "fitted" and layer in self.starts
        return [slice(0, half), slice(half, self._width), *([slice(self._width, None)] if corrected else [])]

    def add(
        self,
        equations: Mapping[Key, NormalEquations],
        sender_context: SharedContext,
        receiver_context: SharedContext,
    ) -> None:
        """Add a context that both models have read, without attention sinks, and with Huber weights against outliers."""
        tokens, contexts = sender_context.tokens.shape[1], (sender_context, receiver_context)
        for layer in self.layers:
            sender_states, receiver_states = (each.hidden(layer) for each in contexts)
            sender_rows, receiver_rows = (
                without_sinks(self.normalized(layer, states), tokens) for states in (sender_states, receiver_states)
            )
            projection = self.projection(self.receiver, layer)
            residual = F.linear(receiver_rows - sender_rows, projection.weight.to(sender_rows.dtype))
            weights = huber_weights(residual)
            if layer in self.starts:
                drift = (receiver_states - sender_states) * ops.rms_rstd(sender_states, RMS_EPS)[..., None]
                residual = torch.cat([residual, without_sinks(drift[0], tokens)], dim=1)
            equations[layer, "fitted"].add(sender_rows, residual, weights)
            sender_rows, receiver_rows = (without_sinks(each.unrotated(layer)[0], tokens) for each in contexts)
            residual = receiver_rows - sender_rows
            equations[layer, "fitted_kv"].add(sender_rows, residual, huber_weights(residual))

    @torch.no_grad()
    def interpolations(
        self, source: Source, sender_context: SharedContext, fits: Mapping[int, Affine]
    ) -> Interpolations:
        """Return K and V of a context between the sender's and the fitted, by layer."""
        return {layer: self._interpolation((layer, source), sender_context, fits[layer]) for layer in self.layers}

    def _interpolation(self, key: Key, sender_context: SharedContext, fit: Affine) -> Interpolation:
        layer, source = key
        if source == "fitted":
            held = sender_context.kv(layer).keys.shape[2]
            rows = last(self.normalized(layer, sender_context.hidden(layer)), held)
            k_norm_weight = self.receiver.weights(layer).k_norm_weight
        else:
            rows, k_norm_weight = sender_context.unrotated(layer)[0], None
        base, difference = (term(rows) for term in self._terms(key, fit))
        zero_sinks(difference, sender_context.tokens.shape[1])
        by_head = "n (kv heads d) -> kv n heads d"
        base, difference = (
            rearrange(each, by_head, kv=2, heads=self.receiver.num_kv_heads) for each in (base, difference)
        )
        return Interpolation(base, difference, k_norm_weight)

    def layer_map(self, key: Key, fit: Affine, shares: torch.Tensor) -> LayerMap:
        """Return the map with `shares` ``[2]`` of the fitted K and V, in the receiver's dtype."""
        base, difference = self._terms(key, fit)
        by_row = shares.double().repeat_interleave(self._width // 2)
        weight, bias = base.weight + by_row[:, None] * difference.weight, base.bias + by_row * difference.bias
        dtype = self.receiver.model.dtype
        return LayerMap(*(part.to(dtype).contiguous() for part in (*weight.chunk(2), *bias.chunk(2))))

    def correction(self, fit: Affine, share: float) -> Correction:
        """Return a share of the fitted correction of the hidden states that enter a layer."""
        weight, bias = (share * part[self._width :] for part in (fit.weight, fit.bias))
        return Correction(weight.to(self.receiver.model.dtype), bias.to(self.receiver.model.dtype))

    def domain(
        self, equations: NormalEquations, folds: Sequence[tuple[NormalEquations, Sequence[SharedContext]]]
    ) -> Domain:
        """Return the domain of the contexts that were added to `equations`.

        Args:
            equations: those from K/V at :attr:`domain_layer`.
            folds: the contexts of each fold, with the equations of all other folds.
        """

        def around(equations: NormalEquations, limit: float) -> Domain:
            dtype = torch.promote_types(self.receiver.model.dtype, torch.float32)
            mean, whitening = (each.to(dtype) for each in equations.whitening(_DAMPING))
            return Domain(self.domain_layer, mean, whitening, limit)

        furthest = max(around(others, 0.0).distance(each) for others, contexts in folds for each in contexts)
        return around(equations, _DOMAIN_MARGIN * furthest)

    def _terms(self, key: Key, fit: Affine) -> tuple[Affine, Affine]:
        """The affine map that gives the sender's K/V, and the difference that leads to the fitted K/V."""
        layer, source = key
        residual = Affine(fit.weight[: self._width], fit.bias[: self._width])
        if source == "fitted_kv":
            return Affine(torch.eye(self._width).to(residual.weight), torch.zeros_like(residual.bias)), residual
        sender, receiver = (self.projection(decoder, layer) for decoder in (self.sender, self.receiver))
        weight, bias = receiver.weight - sender.weight + residual.weight, receiver.bias - sender.bias + residual.bias
        return sender, Affine(weight, bias)

    def _compute_projection(self, decoder: Decoder, layer: int) -> Affine:
        """A model's own K/V projection of normalised hidden states, in float64, with the norm's weight folded in."""
        weights = decoder.weights(layer)
        weight = torch.cat([_dense(weights.k_weight, weights.k_low_rank), _dense(weights.v_weight, weights.v_low_rank)])
        if weights.norm_weight is not None:
            gain = weights.norm_weight.double()
            weight = ops.fold_norm_weight(weight, gain, norm_order=decoder.family.norm_order)
        if weights.k_bias is None or weights.v_bias is None:
            return Affine(weight, weight.new_zeros(len(weight)))
        return Affine(weight, torch.cat([weights.k_bias, weights.v_bias]).double())

    def normalized(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the input ``[T, C]`` of a layer's map: hidden states over their root mean square, if the layer has a norm."""
        weights = self.receiver.plainly_normed(layer)
        if weights.norm_weight is None:
            return hidden_states[0]
        order = self.receiver.family.norm_order
        return ops.row_norm(hidden_states, weights.norm_weight, weights.norm_eps, norm_order=order)[0]


def _dense(weight: torch.Tensor, adapters: Sequence[LowRank]) -> torch.Tensor:
    """The weight with its low-rank adapters merged, in float64."""
    total = weight.double()
    for each in adapters:
        total = total + each.up.double() @ each.down.double()
    return total


def huber_weights(residual: torch.Tensor) -> torch.Tensor:
    """Return Huber weights of rows: 1, or less for those whose residual is an outlier, such as massive activations."""
    norms = residual.norm(dim=-1).double()
    return (_HUBER_THRESHOLD * norms.median() / norms.clamp(min=1e-30)).clamp(max=1.0)
