"""vLLM's pages as partial prefill fills them: the receiver's own layers over a context, and the slots behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from vllm.distributed.parallel_state import get_tp_group

from .. import ops
from ..context.context import Rotation
from ..context.kv import KV
from ..context.parts import SINKS
from ..ops.checks import NormOrder
from ..prefill.fill import Destination
from ..prefill.schedule import Schedule
from ..prefill.select import choose
from ..prefill.weights import LayerWeights, Norm, Prepared, prepare, projection
from .loader import LoadedModel


class _Rows(NamedTuple):
    """Tokens that run through a layer together: their positions ``[N]``, ascending, and the end of all that they see."""

    positions: torch.Tensor
    end: int


class PagedLayers:
    """:class:`droidspeak_ops.prefill.fill.Layers` of a model of vLLM's, on one rank: K and V are those of the rank's heads.

    What is computed goes into dense buffers first, and from there into the pages: how a page is laid out is the attention
    backend's own. On a CPU it packs K by instruction set, and only its own writing does that.

    Args:
        model: the receiver.
        prompt: int64 ``[T + N]``, the context, and the suffix if some tokens of the context are to be selected by it.
        slots: int64 ``[T]``, the slot of each token of the context; -1 where there is none to be filled.
        chunk: number of tokens that run through a layer together.
    """

    norm_order: NormOrder = "llama"
    rope_varies = False

    def __init__(self, model: LoadedModel, prompt: torch.Tensor, slots: torch.Tensor, chunk: int) -> None:
        self._model, self._prompt, self._chunk, self._tokens = model, prompt, chunk, slots.shape[0]
        self._positions = torch.arange(prompt.shape[0], device=prompt.device)
        self._in_order = self._positions[: self._tokens]
        self._everything = self._in_chunks(self._in_order)
        self._filled = (slots >= 0).nonzero().flatten()
        self._slots = slots[self._filled]
        self._selects = prompt.shape[0] > self._tokens
        self._dense: dict[int, Destination] = {}

    def embed(self) -> torch.Tensor:
        return self._model.embed(self._prompt[: self._tokens])[None]

    def run(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        dense = self.destination(layer)
        left = self._run(layer, hidden_states[0], self._everything, dense)
        if not self._selects:
            self._write(layer, *self._dense.pop(layer)[:2])
        return left[None]

    def is_its_weights(self, layer: int) -> bool:
        return True

    def rotation(self, layer: int) -> Rotation | None:
        return self._model.rotation(layer, self._tokens)

    def prepared(self, layer: int, norm: Norm) -> Prepared:
        return prepare(self._model.weights[layer], self.norm_order, norm)

    def plainly_normed(self, layer: int) -> LayerWeights:
        return self._model.plainly_normed(layer)

    def share(self, layer: int, kv: KV) -> bool:
        if self._selects:
            return False
        self._write(layer, kv.keys, kv.values)
        return True

    def destination(self, layer: int) -> Destination:
        self._dense[layer] = self._empty(layer)
        return self._dense[layer]

    def flush(self) -> None:
        """Write into the pages what is in dense buffers."""
        while self._dense:
            layer, dense = self._dense.popitem()
            self._write(layer, *dense[:2])

    def recompute_selected(self, schedule: Schedule) -> int:
        """Recompute tokens that the schedule selects through all layers, over what it makes of the others; return how many.

        They see no token of the suffix, which vLLM runs behind them.
        """
        chosen = choose(
            schedule.select, schedule.selector, self._prompt, self._tokens,
            peaks=lambda: self._peaks(schedule.looked_at), deviations=self._deviations,
        )  # fmt: skip
        rows, last = self._in_chunks(chosen), len(self._model.layers) - 1
        states = self._model.embed(self._prompt[chosen])
        for layer in range(last):
            states = self._run(layer, states, rows, self._dense[layer])
        self._project(last, states, chosen, self._dense[last])
        return len(chosen)

    def _peaks(self, layers: range) -> torch.Tensor:
        """For each token of the context the largest probability of it in the suffix's attention, of some layers."""
        suffix = self._positions[self._tokens :]
        rows = self._in_chunks(suffix)
        peaks = torch.zeros((1, len(self._positions)), device=suffix.device)
        states = self._model.embed(self._prompt[suffix])
        for layer in range(layers.stop):
            states = self._run(layer, states, rows, self._dense[layer], peaks if layer in layers else None)
        self._of_all_ranks(peaks, torch.distributed.ReduceOp.MAX)  # each has looked with heads of its own
        peaks[0, :SINKS] = 0  # everything looks at them
        return peaks[0, : self._tokens]

    def _deviations(self) -> torch.Tensor:
        """For each token how much its K and V in the second layer differ from those that are there, ``[T]``."""
        own, held = self._empty(1), self._dense[1]
        states = self._run(0, self.embed()[0], self._everything, self._empty(0))
        self._project(1, states, self._in_order, own)
        apart = torch.zeros(self._tokens, device=states.device)
        for mine, other in zip(own[:2], held[:2], strict=True):
            apart += (mine - other)[:, :, : self._tokens].float().square().sum((0, 1, 3))
        self._of_all_ranks(apart, torch.distributed.ReduceOp.SUM)
        return apart

    def _of_all_ranks(self, values: torch.Tensor, how: Any) -> None:
        """Reduce the values of all ranks, which have to select the same tokens."""
        group = get_tp_group()
        if group.world_size > 1:
            torch.distributed.all_reduce(values, how, group.device_group)

    def _run(
        self, layer: int, states: torch.Tensor, rows: list[_Rows], dense: Destination, peaks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run rows ``[N, C]`` through a layer, and return what leaves it; their K and V are stored densely.

        With `peaks` ``[1, S]`` they are raised to what the rows look at.
        """
        module, left, start = self._model.layers[layer], torch.empty_like(states), 0
        for chunk in rows:
            which = slice(start, start := start + len(chunk.positions))
            with self._attending(module.self_attn.attn, dense, chunk, peaks):
                # Norms of vLLM's add the residual in place, to what may be the context's own tensor.
                added, residual = module(chunk.positions, states[which].clone(), None)
            left[which] = added + residual
        return left

    def _project(self, layer: int, states: torch.Tensor, positions: torch.Tensor, dense: Destination) -> None:
        """Store K and V of rows ``[N, C]`` densely, and do no more than that needs."""
        cos, sin = self._model.rotation(layer, self._tokens)
        rotation = cos[positions], sin[positions]
        caches = dense.k_cache, dense.v_cache, positions
        ops.kv_project(projection(self.prepared(layer, "hf"), self.norm_order, states[None], rotation, *caches))

    def _in_chunks(self, positions: torch.Tensor) -> list[_Rows]:
        return [_Rows(part, int(part[-1]) + 1) for part in positions.split(self._chunk) if len(part)]

    @contextmanager
    def _attending(self, attention: Any, dense: Destination, rows: _Rows, peaks: torch.Tensor | None) -> Iterator[None]:
        """Have an attention module of vLLM's store K and V of rows densely, and see those up to each row's position."""
        positions, end = rows
        scale = attention.impl.scale

        def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                part.view(len(part), -1, attention.head_size).transpose(0, 1)[None] for part in (query, key, value)
            )
            dense.k_cache.index_copy_(2, positions, k)
            dense.v_cache.index_copy_(2, positions, v)
            if peaks is not None:
                slots = self._positions[None]
                ops.attention_peaks(q.transpose(1, 2), dense.k_cache, slots, positions[None], peaks, scale=scale)
            k, v = dense.k_cache[:, :, :end], dense.v_cache[:, :, :end]
            in_order = len(positions) == end
            mask = None if in_order else self._positions[:end] <= positions[:, None]
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=in_order, scale=scale, enable_gqa=True)
            return out[0].transpose(0, 1).reshape(query.shape)

        attention.forward = forward
        try:
            yield
        finally:
            del attention.forward

    def _empty(self, layer: int) -> Destination:
        attention = self._model.layers[layer].self_attn.attn
        shape = 1, attention.num_kv_heads, len(self._positions), attention.head_size
        like = self._model.weights[layer].k_weight
        return Destination(like.new_empty(shape), like.new_empty(shape), self._in_order)

    def _write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write K and V ``[1, K, T, D]`` of the tokens that have slots into their pages."""
        attention = self._model.layers[layer].self_attn.attn
        rows = [part[0].transpose(0, 1)[self._filled] for part in (keys, values)]
        attention.impl.do_kv_cache_update(attention, *rows, attention.kv_cache, self._slots)
