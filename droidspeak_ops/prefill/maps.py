"""Fitted maps: affine maps from what a sender has at a layer to the receiver's K/V there, fitted to a pair of models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F

from .. import ops, tensor_file
from ..context.context import SharedContext
from ..context.fingerprint import Fingerprint, ReuseError
from .plan import Plan
from .schedule import Source, resolve

RMS_EPS = 1e-6
SINKS = 4
"""Number of attention sinks: the first tokens of a context, whose activations are unlike all others and are not mapped."""

_DISTANCE_ROWS = 256


def sinks_among(rows: int, tokens: int) -> int:
    """Count the attention sinks among the last `rows` of a context's `tokens`: fewer, or none, behind a sliding window."""
    return min(max(SINKS - (tokens - rows), 0), rows)


def without_sinks(rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return a view of `rows` ``[..., N, C]``, the last N of a context's `tokens`, that leaves out attention sinks."""
    return rows[..., sinks_among(rows.shape[-2], tokens) :, :]


def zero_sinks(rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """Zero the attention sinks in `rows` ``[..., N, C]``, the last N of a context's `tokens`, in place."""
    rows[..., : sinks_among(rows.shape[-2], tokens), :] = 0
    return rows


@dataclass(frozen=True, eq=False)
class Affine:
    """The affine map ``y = x Wᵀ + b``: `weight` ``[Q, P]`` and `bias` ``[Q]``."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the map to rows ``[..., P]``, in their dtype."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Correction(Affine):
    """An affine map from the sender's hidden states where a band starts to their difference from the receiver's.

    Its input and output ``[C]`` are relative to the root mean square of the sender's row.
    """

    def corrected(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Predict the receiver's hidden states ``[B, T, C]`` from the sender's. Attention sinks are left as they are."""
        rstd = ops.rms_rstd(hidden_states, RMS_EPS)[..., None]
        added = self((hidden_states * rstd).to(hidden_states.dtype)) / rstd
        return (hidden_states + zero_sinks(added, hidden_states.shape[1])).to(hidden_states.dtype)


@dataclass(frozen=True, eq=False)
class LayerMap:
    """The weights of one projection: K before RoPE, and V, from what the sender has at that layer.

    Args:
        k_weight, v_weight: ``[K * D, C]`` for the hidden states over their root mean square, or ``[K * D, 2 * K * D]`` for the
            sender's own K (before RoPE, after its norm if it has one) and V.
        k_bias, v_bias: ``[K * D]``.
    """

    k_weight: torch.Tensor
    v_weight: torch.Tensor
    k_bias: torch.Tensor
    v_bias: torch.Tensor


@dataclass(frozen=True, eq=False)
class Domain:
    """The distribution of the contexts that maps were fitted to, by the sender's K and V at one layer.

    A regression says nothing about inputs unlike those it was fitted to: the variance of its prediction grows with the squared
    Mahalanobis distance of the input.

    Args:
        layer: the layer whose K and V are compared.
        mean, whitening: ``[2 * K * D]`` and ``[2 * K * D, 2 * K * D]``, of K before RoPE and V concatenated.
        limit: the largest distance at which maps are used.
    """

    layer: int
    mean: torch.Tensor
    whitening: torch.Tensor
    limit: float

    def distance(self, context: SharedContext) -> float:
        """Mean squared Mahalanobis distance of a context's rows per column; the largest over the sequences of a batch.

        It is about 1 for the contexts that maps were fitted to. Attention sinks are left out, and long contexts are subsampled
        to about 256 rows.
        """
        held = context.kv(self.layer).keys.shape[2]
        first = min(sinks_among(held, context.tokens.shape[1]), held - 1)
        stride = -(-(held - first) // _DISTANCE_ROWS)
        rows = context.unrotated(self.layer, slice(first, None, stride)).to(self.mean.dtype)
        return float(F.linear(rows - self.mean, self.whitening).square().mean((1, 2)).max())


@dataclass(frozen=True, eq=False)
class Maps:
    """The maps of one pair of models, and how to fill each layer that a plan projects.

    Args:
        sender, receiver: fingerprints of the pair, with the digests of their weights.
        choices: for each layer, one of: reuse the sender's K/V after all; project with the receiver's own weights; project
            with weights fitted to the normalised hidden states (``"fitted"``) or to the sender's K/V (``"fitted_kv"``).
        choices_without_hidden: the same for contexts that hold no hidden states.
        layers: the maps, by layer and source.
        corrections: the corrections of the hidden states that bands start from, by the band's first layer.
        shares: by layer, one mixing weight for K and one for V: 0 is the sender's own, 1 the fitted. They are part of the maps
            in `layers` already, and kept for reference.
        domain: the contexts that the maps are for.
    """

    sender: Fingerprint
    receiver: Fingerprint
    choices: tuple[Source, ...]
    choices_without_hidden: tuple[Source, ...]
    layers: Mapping[tuple[int, Source], LayerMap]
    corrections: Mapping[int, Correction]
    shares: Mapping[int, Sequence[float]]
    domain: Domain

    def hidden_layers(self, plan: Plan) -> tuple[int, ...]:
        """Return the layers whose hidden states `plan` needs with these maps: often fewer than without."""
        return resolve(plan, len(self.choices), self).hidden_layers

    def check_pair(self, sender: Fingerprint, receiver: Fingerprint) -> None:
        """Raise unless the maps were fitted to this pair.

        Raises:
            ReuseError: they were fitted to another sender or receiver, or in another dtype.
        """
        for name, fitted, given in (("sender", self.sender, sender), ("receiver", self.receiver, receiver)):
            if fitted.architecture != given.architecture:
                differs = "of another architecture"
            elif fitted.dtype != given.dtype:
                differs = f"in {fitted.dtype}, not {given.dtype}"
            elif fitted.weights != given.weights:
                differs = "with other weights"
            else:
                continue
            raise ReuseError(f"maps: expected maps of this pair, got maps fitted to a {name} {differs}")

    def digest(self) -> str:
        """SHA-256 of the maps' content."""
        return tensor_file.digest(*self._described())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with a digest, atomically."""
        tensor_file.write(path, "maps", *self._described())

    def _described(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Describe the maps for :meth:`load`: plain values, and tensors by name."""
        tensors = {
            f"{layer}.{source}.{name}": tensor
            for (layer, source), layer_map in self.layers.items()
            for name, tensor in vars(layer_map).items()
        }
        for layer, correction in self.corrections.items():
            tensors |= {f"{layer}.correction.{name}": tensor for name, tensor in vars(correction).items()}
        tensors |= {f"{self.domain.layer}.domain.{name}": getattr(self.domain, name) for name in ("mean", "whitening")}
        values = {
            "sender": asdict(self.sender),
            "receiver": asdict(self.receiver),
            "choices": self.choices,
            "choices_without_hidden": self.choices_without_hidden,
            "shares": {str(layer): list(share) for layer, share in sorted(self.shares.items())},
            "domain": {"layer": self.domain.layer, "limit": self.domain.limit},
        }
        return values, tensors

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Maps:
        """Read a file that :meth:`save` wrote.

        Raises:
            ValueError: the file holds no maps, or is damaged.
        """
        loaded, tensors = tensor_file.read(path, "maps")
        stored = {tuple(name.split(".")[:2]) for name in tensors}

        def read(kind: Any, layer: str, role: str) -> Any:
            return kind(*(tensors[f"{layer}.{role}.{field.name}"].to(device) for field in fields(kind)))

        layers: dict[Any, LayerMap] = {
            (int(layer), role): read(LayerMap, layer, role) for layer, role in stored if role.startswith("fitted")
        }
        corrections = {int(layer): read(Correction, layer, role) for layer, role in stored if role == "correction"}
        shares = {int(layer): each for layer, each in loaded["shares"].items()}
        domain_layer, limit = loaded["domain"]["layer"], loaded["domain"]["limit"]
        mean, whitening = (tensors[f"{domain_layer}.domain.{name}"].to(device) for name in ("mean", "whitening"))
        domain = Domain(domain_layer, mean, whitening, limit)
        return cls(
            Fingerprint(**loaded["sender"]),
            Fingerprint(**loaded["receiver"]),
            tuple(loaded["choices"]),
            tuple(loaded["choices_without_hidden"]),
            layers,
            corrections,
            shares,
            domain,
        )
