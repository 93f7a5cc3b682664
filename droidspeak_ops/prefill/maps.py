"""Fitted maps: affine maps from what a sender has at a layer to the receiver's K/V there, fitted to a pair of models."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from .. import ops, tensor_file
from ..context.context import SharedContext
from ..context.fingerprint import Fingerprint, ReuseError
from ..context.parts import sinks_among
from .plan import Plan
from .schedule import Source, resolve

T = TypeVar("T")

RMS_EPS = 1e-6

_DISTANCE_ROWS = 256


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

        It is about 1 for the contexts that maps were fitted to, and infinite where it is no number. Attention sinks are left
        out, and long contexts are subsampled to about 256 rows.
        """
        held = context.kv(self.layer).keys.shape[2]
        first = min(sinks_among(held, context.tokens.shape[1]), held - 1)
        stride = -(-(held - first) // _DISTANCE_ROWS)
        rows = context.unrotated(self.layer, slice(first, None, stride)).to(self.mean.dtype)
        distances = F.linear(rows - self.mean, self.whitening).square().mean((1, 2))
        return float(distances.nan_to_num(nan=math.inf, posinf=math.inf).max())


@dataclass(frozen=True, eq=False)
class Maps:
    """The maps of one pair of models, and how to fill each layer that a plan projects.

    Args:
        sender, receiver: fingerprints of the pair, with the digests of their weights.
        choices: for each layer, one of: reuse the sender's K/V after all; project with the receiver's own weights; project
            with weights fitted to the normalised hidden states (``"fitted"``) or to the sender's K/V (``"fitted_kv"``).
        choices_without_hidden: the same for contexts that hold no hidden states.
        layers: the maps, by layer and source.
        repaired: the maps for plans that select tokens, of both sources and all layers but 0: they go all the way to the fitted
            K and V, as what is wrong with those is mended where it matters.
        corrections: the corrections of the hidden states that bands start from, by the band's first layer.
        shares: by layer, one mixing weight for K and one for V: 0 is the sender's own, 1 the fitted. They are part of the maps
            in `layers` already, and kept for reference; in `repaired` all are 1.
        domain: the contexts that the maps are for.
    """

    sender: Fingerprint
    receiver: Fingerprint
    choices: tuple[Source, ...]
    choices_without_hidden: tuple[Source, ...]
    layers: Mapping[tuple[int, Source], LayerMap]
    repaired: Mapping[tuple[int, Source], LayerMap]
    corrections: Mapping[int, Correction]
    shares: Mapping[int, Sequence[float]]
    domain: Domain

    def used_by(self, plan: Plan) -> Maps:
        """Return the maps as a plan uses them: with those in `repaired` in place of the others where it selects tokens."""
        return self._for_repair if plan.select else self

    @cached_property
    def _for_repair(self) -> Maps:
        def every(source: Source) -> tuple[Source, ...]:
            return ("project", *[source] * (len(self.choices) - 1))

        return replace(
            self, choices=every("fitted"), choices_without_hidden=every("fitted_kv"), layers=self.repaired, repaired={}
        )

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
        """SHA-256 of the maps' content, as it is when this is first asked for."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return tensor_file.digest(*self._described())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with a digest, atomically.

        Raises:
            ValueError: the maps are none that :meth:`load` takes, such as those of a model that gave NaN.
        """
        self.check()
        tensor_file.write(path, "maps", *self._described())

    def check(self) -> None:
        """Raise unless the parts fit together and the architecture of the pair, and all values are finite.

        Raises:
            ValueError: they do not; the message names the part.
        """
        self.sender.check_reuse_by(self.receiver)
        sizes = self.receiver.sizes("num_hidden_layers", "hidden_size", "num_key_value_heads", "head_dim")
        num_layers, hidden_size, width = sizes[0], sizes[1], sizes[2] * sizes[3]
        if self.sender.weights is None or self.receiver.weights is None:
            raise ValueError("sender, receiver: expected fingerprints with digests of their weights, got one without")
        if len(self.choices) != num_layers or len(self.choices_without_hidden) != num_layers:
            found = len(self.choices), len(self.choices_without_hidden)
            raise ValueError(f"choices: expected one for each of {num_layers} layers, got {found}")
        self._check_choices("choices", self.choices, ("reuse", "project", "fitted", "fitted_kv"))
        self._check_choices("choices_without_hidden", self.choices_without_hidden, ("reuse", "fitted_kv"))
        for name, layers in (("shares", self.shares), ("corrections", self.corrections)):
            if outside := [layer for layer in layers if not 0 < layer < num_layers]:
                raise ValueError(f"{name}: expected layers 1 to {num_layers - 1}, got {outside}")
        for layer, share in self.shares.items():
            if len(share) != 2 or not all(map(math.isfinite, share)):
                raise ValueError(f"shares: expected two finite numbers for layer {layer}, got {share}")
        dtype, columns = self.receiver.torch_dtype, {"fitted": hidden_size, "fitted_kv": 2 * width}
        for name, layer_maps in (("layers", self.layers), ("repaired", self.repaired)):
            for (layer, source), layer_map in layer_maps.items():
                if source not in columns or not 0 < layer < num_layers:
                    wanted = f"one of {tuple(columns)} of layers 1 to {num_layers - 1}"
                    raise ValueError(f"{name}: expected {wanted}, got {source} of layer {layer}")
                weight, bias = ((width, columns[source]), dtype), ((width,), dtype)
                of_map = {"k_weight": weight, "v_weight": weight, "k_bias": bias, "v_bias": bias}
                _check_tensors(f"{name}[{layer}, {source}]", layer_map, of_map)
        lacking = set(itertools.product(range(1, num_layers), columns)).difference(self.repaired)
        if lacking:
            raise ValueError(f"repaired: expected maps of both kinds for every layer, got none for {min(lacking)}")
        for layer, correction in self.corrections.items():
            of_correction = {"weight": ((hidden_size, hidden_size), dtype), "bias": ((hidden_size,), dtype)}
            _check_tensors(f"corrections[{layer}]", correction, of_correction)
        if not 0 <= self.domain.layer < num_layers or not 0 < self.domain.limit < math.inf:
            got = f"layer {self.domain.layer} and {self.domain.limit}"
            raise ValueError(f"domain: expected a layer of {num_layers} and a positive limit, got {got}")
        precise = torch.promote_types(dtype, torch.float32)
        of_domain = {"mean": ((2 * width,), precise), "whitening": ((2 * width, 2 * width), precise)}
        _check_tensors("domain", self.domain, of_domain)

    def _check_choices(self, name: str, choices: Sequence[Source], allowed: Collection[Source]) -> None:
        """Raise a ValueError unless the maps have what each layer's choice needs."""
        for layer, source in enumerate(choices):
            known = allowed if layer > 0 else ("reuse", "project")
            if source not in known:
                raise ValueError(f"{name}: expected one of {tuple(known)} for layer {layer}, got {source!r}")
            if source.startswith("fitted") and (layer, source) not in self.layers:
                raise ValueError(f"{name}: expected the map of layer {layer}, which is {source!r}, got none")

    def _described(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Describe the maps for :meth:`load`: plain values, and tensors by name."""
        tensors = {
            f"{layer}.{role}.{name}": tensor
            for of_role, layer_maps in (("{}", self.layers), ("repaired.{}", self.repaired))
            for (layer, source), layer_map in layer_maps.items()
            for role in [of_role.format(source)]
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
            ValueError: the file holds no maps, is damaged, or is none that :meth:`save` writes.
        """

        def make(described: _Described, tensors: tensor_file.Tensors) -> Maps:
            layers: dict[tuple[int, Source], LayerMap] = {}
            repaired: dict[tuple[int, Source], LayerMap] = {}
            corrections: dict[int, Correction] = {}

            def read(kind: type[T], prefix: str) -> T:
                return kind(*(tensors.take(f"{prefix}.{field.name}").to(device) for field in fields(kind)))  # type: ignore[arg-type]

            domain_layer = described.domain.layer
            mean, whitening = (
                tensors.take(f"{domain_layer}.domain.{name}").to(device) for name in ("mean", "whitening")
            )
            for layer, role in dict.fromkeys(map(_layer_and_role, tensors.names)):
                if role == "correction":
                    corrections[layer] = read(Correction, f"{layer}.{role}")
                else:
                    source: Any = role.removeprefix("repaired.")
                    (layers if source == role else repaired)[layer, source] = read(LayerMap, f"{layer}.{role}")
            domain = Domain(domain_layer, mean, whitening, described.domain.limit)
            choices = described.choices, described.choices_without_hidden
            maps = cls(
                described.sender, described.receiver, *choices, layers, repaired, corrections, described.shares, domain
            )
            maps.check()
            return maps

        return tensor_file.read(path, "maps", _Described, make)


@dataclass(frozen=True)
class _DescribedDomain:
    layer: int
    limit: float


@dataclass(frozen=True)
class _Described:
    """The plain values in a file of maps."""

    sender: Fingerprint
    receiver: Fingerprint
    choices: tuple[Source, ...]
    choices_without_hidden: tuple[Source, ...]
    shares: dict[int, tuple[float, float]]
    domain: _DescribedDomain


def _layer_and_role(name: str) -> tuple[int, str]:
    """Read what a tensor of a file is of off its name."""
    found = re.fullmatch(r"(0|[1-9][0-9]{0,8})\.(correction|(?:repaired\.)?(?:fitted|fitted_kv))\.[a-z_]+", name)
    if found is None:
        raise ValueError(f"tensors: expected names such as '3.fitted.k_weight', got {name!r}")
    return int(found[1]), found[2]


def _check_tensors(where: str, part: Any, expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Raise a ValueError unless the tensors of a part have their shapes and dtypes, and finite values."""
    for name, (shape, dtype) in expected.items():
        tensor: torch.Tensor = getattr(part, name)
        if tensor.shape != shape or tensor.dtype != dtype:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{where}: expected {name} to be {dtype} {shape}, got {got}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{where}: expected finite values of {name}, got NaN or infinity")
