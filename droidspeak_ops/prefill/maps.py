"""Fitted maps: what projects a sender's K/V of a layer to the receiver's better than the receiver's own weights do."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save

from .. import ops
from ..context.context import SharedContext
from ..context.fingerprint import Fingerprint, ReuseError
from ..files import replacing
from .plan import Plan
from .schedule import Source, resolve

RMS_EPS = 1e-6
SINKS = 4
"""Tokens at the head of a context that maps leave alone: attention sinks, whose rows are like no others."""

_JUDGED_ROWS = 256


def sinks_among(rows: int, tokens: int) -> int:
    """Count attention sinks among the last `rows` of a context's `tokens`, which a sliding window may have left."""
    return min(max(SINKS - (tokens - rows), 0), rows)


@dataclass(frozen=True, eq=False)
class LayerMap:
    """The weights of one projection: K before RoPE and V from what the sender has at that layer.

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
class Correction:
    """The correction of the sender's hidden states where a band starts, in units of each row's root mean square.

    Args:
        weight, bias: ``[C, C]`` and ``[C]``, of the rows over their root mean square.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def corrected(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The receiver's hidden states ``[B, T, C]`` as predicted from the sender's; those of sinks are left alone."""
        per_row = ops.rms_rstd(hidden_states, RMS_EPS)[..., None]
        added = F.linear((hidden_states * per_row).to(hidden_states.dtype), self.weight, self.bias) / per_row
        added[:, :SINKS] = 0
        return (hidden_states + added).to(hidden_states.dtype)


@dataclass(frozen=True, eq=False)
class Domain:
    """The kind of contexts that maps were fitted to, told from others by the sender's K and V at one layer.

    A regression says nothing of inputs unlike those that it has seen. Its variance at an input is the input's squared
    Mahalanobis distance, up to a factor.

    Args:
        layer: which.
        mean, whitening: ``[2 * K * D]`` and ``[2 * K * D, 2 * K * D]``, of K before RoPE and V side by side.
        limit: the distance up to which a context is alike.
    """

    layer: int
    mean: torch.Tensor
    whitening: torch.Tensor
    limit: float

    def distance(self, context: SharedContext) -> float:
        """The mean squared Mahalanobis distance of a context's rows, for each column; of the furthest sequence.

        About 1 for contexts that were calibrated on. Sinks are left out, and of long contexts every so-manieth row is taken.
        """
        held = context.kv(self.layer).keys.shape[2]
        first = min(sinks_among(held, context.tokens.shape[1]), held - 1)
        rows = context.unrotated(self.layer, slice(first, None, -(-(held - first) // _JUDGED_ROWS))).to(self.mean.dtype)
        return float(F.linear(rows - self.mean, self.whitening).square().mean((1, 2)).max())


@dataclass(frozen=True, eq=False)
class Maps:
    """The maps of one pair of models, and what is best for each layer that a plan projects.

    Args:
        sender, receiver: the pair, with the digests of their weights.
        choices: for each layer: reuse the sender's K/V after all, project with the receiver's own weights, or with those
            fitted to the normalised hidden states (``"fitted"``) or to the sender's K/V (``"fitted_kv"``).
        choices_without_hidden: the same for contexts that hold no hidden states.
        layers: by layer and role the maps that are chosen anywhere.
        corrections: by layer, of the hidden states that a band starts from.
        shares: by layer, for K and for V: how far the maps in `layers` go from what the sender has to what is fitted. For
            reading, not used.
        domain: the contexts that they are for.
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
        """Where the sender's hidden states are needed for `plan` with these maps: often fewer than for the plan alone."""
        return resolve(plan, len(self.choices), self).hidden_layers

    def check_pair(self, sender: Fingerprint, receiver: Fingerprint) -> None:
        """Raise unless these are the maps of this pair.

        Raises:
            ReuseError: they were fitted to another sender or receiver, or in another dtype.
        """
        for name, ours, theirs in (("sender", self.sender, sender), ("receiver", self.receiver, receiver)):
            if ours.architecture != theirs.architecture:
                raise ReuseError(f"maps: fitted to a {name} of another architecture; the maps of this pair are needed")
            if ours.dtype != theirs.dtype:
                raise ReuseError(f"maps: fitted to a {name} in {ours.dtype}; {theirs.dtype}, its dtype now, is needed")
            if ours.weights != theirs.weights:
                raise ReuseError(f"maps: fitted to a {name} with other weights; the maps of this pair are needed")

    def digest(self) -> str:
        """SHA-256 over what the maps do."""
        return hashlib.sha256(self._serialized()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; nothing half-written is left in its place."""
        with replacing(path) as scratch:
            scratch.write_bytes(self._serialized())

    def _serialized(self) -> bytes:
        tensors = {
            f"{layer}.{role}.{name}": tensor.contiguous()
            for (layer, role), each in self.layers.items()
            for name, tensor in vars(each).items()
        }
        for layer, correction in self.corrections.items():
            tensors |= {f"{layer}.correction.{name}": tensor.contiguous() for name, tensor in vars(correction).items()}
        tensors |= {
            f"{self.domain.layer}.domain.{name}": getattr(self.domain, name).contiguous()
            for name in ("mean", "whitening")
        }
        described = {
            "sender": asdict(self.sender),
            "receiver": asdict(self.receiver),
            "choices": self.choices,
            "choices_without_hidden": self.choices_without_hidden,
            "shares": self.shares,
            "domain": {"layer": self.domain.layer, "limit": self.domain.limit},
        }
        return save(tensors, {"droidspeak_maps": json.dumps(described)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Maps:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file holds no maps.
        """
        with safe_open(path, framework="pt", device=str(device)) as file:
            described = (file.metadata() or {}).get("droidspeak_maps")
            if described is None:
                raise ValueError(
                    f"{path}: got a safetensors file of something else; one that Maps.save wrote is needed"
                )
            loaded = json.loads(described)
            stored = {tuple(name.split(".")[:2]) for name in file.keys()}  # noqa: SIM118

            def read(kind: Any, layer: str, role: str) -> Any:
                return kind(*(file.get_tensor(f"{layer}.{role}.{name}") for name in kind.__dataclass_fields__))

            layers = {
                (int(layer), role): read(LayerMap, layer, role) for layer, role in stored if role.startswith("fitted")
            }
            shares = {int(layer): each for layer, each in loaded["shares"].items()}
            corrections = {int(layer): read(Correction, layer, role) for layer, role in stored if role == "correction"}
            at, limit = loaded["domain"]["layer"], loaded["domain"]["limit"]
            mean, whitening = (file.get_tensor(f"{at}.domain.{name}") for name in ("mean", "whitening"))
            domain = Domain(at, mean, whitening, limit)
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
