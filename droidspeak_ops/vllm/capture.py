"""The sender's part of a worker: contexts of requests are kept as the model makes them, and stored once they are whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from ..context.context import Rotation, SharedContext
from ..context.kv import KV
from .loader import loaded_model
from .messages import Chunk
from .settings import Settings

logger = init_logger(__name__)


class _Parts:
    """Parts of a context that are there so far: by layer chunks of K and V ``[N, K, D]``, and of hidden states ``[N, C]``."""

    def __init__(self, layers: int, tapped: Sequence[int]) -> None:
        self.tokens = 0
        self.kv: list[list[KV]] = [[] for _ in range(layers)]
        self.hidden: dict[int, list[torch.Tensor]] = {layer: [] for layer in tapped}


class Capture:
    """The sender's part of a worker.

    K and V are kept where each layer hands them to its pages, whose layout is the attention backend's own (on a CPU K is packed
    by instruction set); hidden states are what vLLM's own taps return.

    Args:
        config: of the engine.
        settings: of the connector.

    Raises:
        ValueError: the model was loaded by another loader, or the attention backend writes its pages in another way.
    """

    def __init__(self, config: VllmConfig, settings: Settings) -> None:
        self._model, self._store = loaded_model(config), settings.open_store()
        if self._model.tapped != (expected := tuple(sorted(set(settings.hidden_layers)))):
            raise ValueError(
                f"hidden_layers: expected those that the model was loaded with, {self._model.tapped}, got {expected}"
            )
        self._parts: dict[str, _Parts] = {}
        self._chunks: Sequence[Chunk] = ()
        self._rows: list[tuple[Chunk, slice]] = []
        for layer, module in enumerate(self._model.layers):
            self._watch(layer, module.self_attn.attn)

    def begin(self, chunks: Sequence[Chunk]) -> None:
        """Keep these tokens of the step that follows."""
        self._chunks, self._rows = chunks, []

    def end(self) -> None:
        """Keep the hidden states of the step that ran, and store the contexts that are whole now."""
        for chunk, rows in self._rows:
            parts = self._parts[chunk.request_id]
            for layer, states in zip(self._model.tapped, self._model.taps, strict=True):
                parts.hidden[layer].append(states[rows].clone())
            parts.tokens = chunk.stop
            if parts.tokens == len(chunk.context):
                self._save(chunk, self._parts.pop(chunk.request_id))
        kept = [chunk for chunk, _ in self._rows]
        for chunk in self._chunks:
            if chunk not in kept:
                logger.warning(
                    "%s: its context is not stored: K and V were not seen as they were written", chunk.request_id
                )
                self._parts.pop(chunk.request_id, None)
        self._chunks, self._rows, self._model.taps = (), [], []

    def forget(self, finished: set[str]) -> None:
        """Forget requests that ended before their contexts were whole."""
        for request_id in finished:
            self._parts.pop(request_id, None)

    def _watch(self, layer: int, attention: Any) -> None:
        write = attention.impl.do_kv_cache_update

        def watched(module: Any, key: torch.Tensor, value: torch.Tensor, pages: Any, slots: torch.Tensor) -> None:
            write(module, key, value, pages, slots)
            if self._chunks:
                self._keep(layer, key, value, slots)

        attention.impl.do_kv_cache_update = watched

    def _keep(self, layer: int, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        if layer == 0:
            rows = ((chunk, _rows_of(chunk, slots)) for chunk in self._chunks)
            self._rows = [(chunk, of_chunk) for chunk, of_chunk in rows if of_chunk and self._continues(chunk)]
        for chunk, of_chunk in self._rows:
            self._parts[chunk.request_id].kv[layer].append(KV(key[of_chunk].clone(), value[of_chunk].clone()))

    def _continues(self, chunk: Chunk) -> bool:
        """Return whether a chunk follows what is there of its context; a request that was preempted begins anew."""
        if chunk.start == 0:
            self._parts[chunk.request_id] = _Parts(len(self._model.layers), self._model.tapped)
        parts = self._parts.get(chunk.request_id)
        return parts is not None and parts.tokens == chunk.start

    def _rotation(self, layer: int, tokens: int) -> Rotation:
        cos, sin = self._model.rotation(layer, tokens)
        return cos.cpu(), sin.cpu()

    def _save(self, chunk: Chunk, parts: _Parts) -> None:
        layers = range(len(parts.kv))
        try:
            context = SharedContext(
                tokens=torch.tensor([chunk.context]),
                keys_values=[KV(*map(_whole, list(zip(*chunks, strict=True))[:2])) for chunks in parts.kv],
                hidden_states={layer: torch.cat(states)[None].cpu() for layer, states in parts.hidden.items()},
                rotations=[self._rotation(layer, len(chunk.context)) for layer in layers],
                sender=chunk.sender,
            )
            self._store.save(context)
        except (ValueError, OSError) as error:
            logger.warning("%s: its context is not stored: %s", chunk.request_id, error)


def _whole(chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    """K or V of a layer ``[1, K, T, D]`` from chunks ``[N, K, D]``."""
    return torch.cat(list(chunks)).transpose(0, 1)[None].contiguous().cpu()


def _rows_of(chunk: Chunk, slots: torch.Tensor) -> slice | None:
    """The rows of a chunk's tokens, which lie side by side in whatever place of a step; None where pages of others are written.

    Args:
        slots: int64 ``[N]``, where the rows are written.
    """
    found = (slots == chunk.slot).nonzero()
    if not len(found):
        return None
    return slice(int(found[0]), int(found[0]) + chunk.stop - chunk.start)
