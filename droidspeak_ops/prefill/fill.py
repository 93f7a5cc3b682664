"""The fill of a receiver's KV cache with a context by a schedule: what transformers and serving engines have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch

from .. import ops
from ..context.context import Rotation, SharedContext, last
from ..context.kv import KV, splice
from ..context.parts import sinks_among
from ..ops.checks import NormOrder
from ..ops.library import LAYERS_PER_LAUNCH
from ..trace import Trace, span
from .maps import Maps
from .schedule import Band, Read, Schedule
from .weights import LayerWeights, Norm, Prepared, projection


class Destination(NamedTuple):
    """Slots for K and V of one layer, of the last N tokens of each sequence: as many as the layer keeps.

    Args:
        k_cache, v_cache: ``[blocks, K, block_size, D]``: a dense cache, with a sequence for a block, or pages.
        slot_mapping: int64 ``[B * N]``, the slot of every row, sequence by sequence. Layers that are alike share one tensor.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slot_mapping: torch.Tensor


class Layers(Protocol):
    """A receiver's layers over the tokens ``[B, T]`` of a context, and the cache that takes their K and V."""

    norm_order: NormOrder

    @property
    def rope_varies(self) -> bool:
        """True if the angles of a position depend on the length of the prompt, or of earlier ones."""

    def embed(self) -> torch.Tensor:
        """Return what enters layer 0, ``[B, T, C]``."""

    def run(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run a layer, which stores its K and V, and return what leaves it."""

    def is_its_weights(self, layer: int) -> bool:
        """Return whether a layer's K and V are what its weights make of its input; only running it gives them otherwise."""

    def rotation(self, layer: int) -> Rotation | None:
        """cos and sin ``[T, R / 2]`` that a layer rotates K by; None where it has no RoPE."""

    def prepared(self, layer: int, norm: Norm) -> Prepared:
        """The weights of a layer's K and V."""

    def plainly_normed(self, layer: int) -> LayerWeights:
        """The same with a norm that only divides by the root mean square."""

    def share(self, layer: int, kv: KV) -> bool:
        """Take a layer's K and V as they are, without a copy, if this cache can; return whether it did."""

    def destination(self, layer: int) -> Destination:
        """Return where a layer's K and V go that are not shared."""


@torch.no_grad()
def fill(
    schedule: Schedule,
    layers: Layers,
    context: SharedContext,
    *,
    maps: Maps | None,
    norm: Norm,
    rerotates: bool,
    trace: Trace | None = None,
) -> None:
    """Fill the cache behind `layers` with a context: bands run, then layers are reused, or projected in groups, in their order.

    Of a context that is still being read, each step waits for what it uses alone, and layers whose inputs are there are not
    kept waiting for a whole group. Of contexts in 8 bits no more hidden states are decoded at a time than a group has layers.

    Args:
        schedule: what is done at each layer.
        layers: of the receiver, over the context's tokens.
        context: what is reused, and projected from; it holds what the schedule reads.
        maps: of the pair, if the schedule uses them.
        norm: of projections.
        rerotates: whether the angles that the receiver applies may differ from those that the sender applied.
        trace: takes the spans of this.
    """
    context.prefetch(schedule.reads, trace)
    filling = _Filling(layers, context, maps, norm, rerotates, trace)
    for band in schedule.bands:
        filling.run_band(band)
    for layer, source in enumerate(schedule.sources):
        if source == "recompute":
            continue
        filling.wait(schedule.reads_of[layer])
        if source == "reuse":
            filling.reuse(layer)
        elif source == "project" and not layers.is_its_weights(layer):
            filling.run(layer, filling.hidden(layer))
        else:
            filling.plan(layer, source)
    filling.project_planned()


class _Planned(NamedTuple):
    """A projection that nothing has been read for yet."""

    layer: int
    source: str
    prepared: Prepared
    rotation: Rotation | None
    destination: Destination

    @property
    def kind(self) -> tuple[Any, ...]:
        """Properties that layers projected together have in common."""
        k_cache, _, slots = self.destination
        pairs = 0 if self.rotation is None else self.rotation[0].shape[1]
        return (self.source == "fitted_kv", self.prepared.kind, pairs, k_cache.shape, k_cache.stride(), id(slots))


class _Filling:
    """The ways to fill a layer with a context. Every layer is to be filled once."""

    def __init__(
        self,
        layers: Layers,
        context: SharedContext,
        maps: Maps | None,
        norm: Norm,
        rerotates: bool,
        trace: Trace | None,
    ) -> None:
        self._layers, self._context, self._maps, self._norm, self._rerotates = layers, context, maps, norm, rerotates
        self._trace = trace
        self._batch, self._tokens = context.tokens.shape
        self._positions: dict[int, torch.Tensor] = {}
        self._alike: dict[tuple[Any, ...], list[_Planned]] = {}

    @property
    def _used_maps(self) -> Maps:
        assert self._maps is not None
        return self._maps

    def wait(self, reads: Sequence[Read]) -> None:
        """Wait for parts of the context; until then project what only waits for its group to fill."""
        if not self._context.has_arrived(reads):
            self.project_planned()
            with span(self._trace, "wait", *(word for read in reads for word in read)):
                self._context.wait(reads)

    def hidden(self, layer: int) -> torch.Tensor:
        """Return what enters a layer: the sender's hidden states, or the receiver's own embeddings."""
        return self._layers.embed() if layer == 0 else self._context.hidden(layer)

    def run(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run a layer, and return what leaves it."""
        with span(self._trace, "run", "layer", layer):
            return self._layers.run(layer, hidden_states)

    def run_band(self, band: Band) -> None:
        """Run a band from the hidden states that enter it; of its last layer, whose output nothing reads, only make K and V."""
        if band.start > 0:
            self.wait([Read("hidden", band.start)])
        hidden_states, last = self.hidden(band.start), band.end - 1
        if band.corrected:
            hidden_states = self._used_maps.corrections[band.start].corrected(hidden_states)
        for layer in range(band.start, last):
            hidden_states = self.run(layer, hidden_states)
        if self._layers.is_its_weights(last):
            with span(self._trace, "project", "layer", last):
                ops.kv_project_layers([self._projection(self._planned(last, "project"), hidden_states)])
        else:
            self.run(last, hidden_states)

    def plan(self, layer: int, source: str) -> None:
        """Have a layer projected together with those before it that are alike, once they fill a launch."""
        planned = self._planned(layer, source)
        alike = self._alike.setdefault(planned.kind, [])
        alike.append(planned)
        if len(alike) == LAYERS_PER_LAUNCH:
            self._project(self._alike.pop(planned.kind))

    def project_planned(self) -> None:
        """Project all that is planned."""
        while self._alike:
            self._project(self._alike.pop(next(iter(self._alike))))

    def _project(self, group: Sequence[_Planned]) -> None:
        with span(self._trace, "project", "layers", *(each.layer for each in group)):
            ops.kv_project_layers([self._projection_of(each) for each in group])
            self._reuse_sinks([each for each in group if each.source != "project"])

    def reuse(self, layer: int) -> None:
        """Reuse the sender's K and V; in 8 bits, or rotated by another RoPE, they are decoded and rotated further."""
        with span(self._trace, "reuse", "layer", layer):
            kv = self._context.kv(layer)
            further = self._rerotation(layer, kv.keys.shape[2])
            if kv.k_scale is None and not further and self._layers.share(layer, kv):
                return
            splice(kv, *self._layers.destination(layer), **further)

    def _reuse_sinks(self, group: Sequence[_Planned]) -> None:
        """Reuse the sender's K and V of the first tokens of layers that are filled already, and alike."""
        if not group:
            return
        k_cache, _, slots = group[0].destination
        rows = slots.shape[0] // self._batch
        count = sinks_among(rows, self._tokens)
        if not count:
            return
        slots = slots.view(self._batch, rows)[:, :count].flatten()
        where = slots // k_cache.shape[2], slice(None), slots % k_cache.shape[2]
        for layer, *_, (k_cache, v_cache, _) in group:
            kv, further = self._context.sinks(layer, count), self._rerotation(layer, rows)
            if kv.k_scale is None and not further:
                # A few rows of each layer, for which an operator's call would cost more than the work.
                k_cache[where] = kv.keys.transpose(1, 2).flatten(0, 1).to(k_cache.dtype)
                v_cache[where] = kv.values.transpose(1, 2).flatten(0, 1).to(v_cache.dtype)
            else:
                of_sinks = {
                    name: half.view(self._batch, rows, -1)[:, :count].flatten(0, 1) for name, half in further.items()
                }
                splice(kv, k_cache, v_cache, slots, **of_sinks)

    def _planned(self, layer: int, source: str) -> _Planned:
        """Find the weights that K and V of a layer are projected with, and where they go; read nothing."""
        if source == "project":
            prepared = self._layers.prepared(layer, self._norm)
        else:
            fitted = vars(self._used_maps.layers[layer, source])  # type: ignore[index]
            if source == "fitted":  # which have the norm's weight folded in
                weights = replace(self._layers.plainly_normed(layer), **fitted, k_low_rank=(), v_low_rank=())
            else:
                weights = LayerWeights(norm_weight=None, norm_eps=0.0, k_norm_weight=None, k_norm_eps=0.0, **fitted)
            prepared = Prepared(weights, self._norm, weights.k_weight, weights.v_weight)
        return _Planned(layer, source, prepared, self._layers.rotation(layer), self._layers.destination(layer))

    def _projection_of(self, planned: _Planned) -> ops.Projection:
        """The projection of a layer from the sender's hidden states, or from its K and V."""
        if planned.source == "fitted_kv":
            return self._projection(planned, self._context.unrotated(planned.layer))
        hidden_states, rstd = self.hidden(planned.layer), None
        if planned.prepared.folded:
            # The context keeps what depends on it alone for all its receivers; embeddings are the receiver's own.
            eps = planned.prepared.weights.norm_eps
            rstd = self._context.rstd(planned.layer, eps) if planned.layer else ops.rms_rstd(hidden_states, eps)
        return self._projection(planned, hidden_states, rstd)

    def _projection(
        self, planned: _Planned, hidden_states: torch.Tensor, rstd: torch.Tensor | None = None
    ) -> ops.Projection:
        _, _, prepared, rotation, destination = planned
        positions = None
        if self._batch > 1 and rotation is not None:
            rows = destination.slot_mapping.shape[0] // self._batch
            if rows not in self._positions:
                device = destination.slot_mapping.device
                self._positions[rows] = torch.arange(rows, device=device).repeat(self._batch)
            positions = self._positions[rows]
        return projection(prepared, self._layers.norm_order, hidden_states, rotation, *destination, rstd, positions)

    def _rerotation(self, layer: int, rows: int) -> dict[str, torch.Tensor]:
        """cos and sin that re-rotate the `rows` of the sender's K to the receiver's RoPE; none if the two are equal."""
        applied = self._context.rotations[layer] if self._rerotates else None
        rotation = None if applied is None else self._layers.rotation(layer)
        if applied is None or rotation is None:
            return {}
        if self._layers.rope_varies and all(map(torch.equal, applied, rotation)):
            return {}
        cos, sin = (last(half, rows) for half in ops.rotation_between(*applied, *rotation))
        return {"cos": cos.repeat(self._batch, 1), "sin": sin.repeat(self._batch, 1)}
