"""The worker's half: contexts are read, and fill the pages of requests before these run."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger

from ..context.context import SharedContext
from ..context.kv import KV
from ..prefill.fill import fill
from ..prefill.maps import LayerMap, Maps
from ..prefill.schedule import Schedule, resolve_over
from .counters import Counts
from .loader import LoadedModel, loaded_model
from .messages import Load
from .pages import PagedLayers
from .settings import Settings
from .waiting import within

logger = init_logger(__name__)


class Filling:
    """The receiver's part of a worker.

    Args:
        config: of the engine.
        settings: of the connector.
        block_size: tokens of a page.

    Raises:
        ValueError, OSError: the model was loaded by another loader, or maps cannot be read.
    """

    def __init__(self, config: VllmConfig, settings: Settings, block_size: int) -> None:
        self._model: LoadedModel = loaded_model(config)
        self._block_size, self._chunk = block_size, config.scheduler_config.max_num_batched_tokens
        self._device = torch.device(config.device_config.device)
        self._store, self._read_seconds = settings.open_store(), settings.read_seconds
        self._maps = {name: Maps.load(each.maps) for name, each in settings.senders.items() if each.maps}
        self._heads = _heads_of_rank(config)
        self._invalid: set[int] = set()
        self.counts = Counts()
        """Counts of this rank; those of one stand for all."""

    @torch.inference_mode()
    def fill(self, load: Load) -> None:
        """Read a context, and fill the pages of its request if all ranks could read it."""
        begun = time.perf_counter()
        found = self._read(load)
        read = time.perf_counter()
        self.counts.add("read_seconds", read - begun)
        if _on_all_ranks(found is not None) and found is not None:
            self._fill(load, *found)
            self.counts.add("contexts", 1)
            self.counts.add("context_tokens", load.stop - load.start)
        else:
            self._invalid.update(load.blocks[load.start // self._block_size :])
            self.counts.add("failed_contexts", 1)
        self.counts.add("fill_seconds", time.perf_counter() - read)

    def take_invalid(self) -> set[int]:
        """Return the pages that were not filled since this was last asked for."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def _read(self, load: Load) -> tuple[SharedContext, Schedule] | None:
        """Read what a load needs of its context; None where that fails, so that the request runs as it is."""
        tokens = torch.tensor([load.prompt[: load.length + 1]])
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                (found,) = within(self._read_seconds, [partial(self._store.find, tokens, load.sender)])
                if found is None or found.tokens.shape[1] != load.length:
                    raise ValueError(f"context: expected {load.length} tokens, got none any more")
                self._model.check_sizes(found.sender)
                context = found.to(self._device)
                schedule = resolve_over(load.plan, context, self._maps.get(load.sender_name))
                context.prefetch(schedule.reads)
                within(self._read_seconds, [partial(context.wait, [each]) for each in schedule.reads])
            for warning in caught:
                logger.warning("%s: %s", load.request_id, warning.message)
        except (ValueError, OSError) as error:  # ReuseErrors among them
            logger.warning("%s runs as it is: %s", load.request_id, error)
            return None
        return context, schedule

    def _fill(self, load: Load, context: SharedContext, schedule: Schedule) -> None:
        maps = self._maps.get(load.sender_name)
        places = torch.arange(load.start, load.stop)
        slots = torch.full((load.length,), -1)
        slots[places] = (
            torch.tensor(load.blocks)[places // self._block_size] * self._block_size + places % self._block_size
        )
        prompt = torch.tensor(load.prompt[: None if load.plan.select else load.length], device=self._device)
        layers = PagedLayers(self._model, prompt, slots.to(self._device), self._chunk)
        fill(
            schedule,
            layers,
            context if self._heads is None else _OfRank(context, self._heads),  # type: ignore[arg-type]
            maps=None if maps is None else self._of_rank(maps.used_by(load.plan)),
            norm="hf",
            rerotates=load.rerotates,
        )
        if load.plan.select:
            self.counts.add("selected_tokens", layers.recompute_selected(schedule))
        layers.flush()

    def _of_rank(self, maps: Maps) -> Maps:
        """The same maps, to the rank's heads alone."""
        if self._heads is None:
            return maps
        head_dim = maps.receiver.sizes("head_dim")[0]
        rows = slice(self._heads.start * head_dim, self._heads.stop * head_dim)
        layers = {
            key: LayerMap(*(part[rows] for part in (each.k_weight, each.v_weight, each.k_bias, each.v_bias)))
            for key, each in maps.layers.items()
        }
        return replace(maps, layers=layers)


class _OfRank:
    """A context with K and V of some heads; all else is the context's."""

    def __init__(self, context: SharedContext, heads: slice) -> None:
        self._context, self._heads = context, heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def kv(self, layer: int) -> KV:
        return self._of_rank(self._context.kv(layer))

    def sinks(self, layer: int, count: int) -> KV:
        return self._of_rank(self._context.sinks(layer, count))

    def _of_rank(self, kv: KV) -> KV:
        return KV(*(None if part is None else part[:, self._heads] for part in kv))  # type: ignore[arg-type]


def _heads_of_rank(config: VllmConfig) -> slice | None:
    """The KV heads of this rank; None for all of them."""
    group = get_tp_group()
    if group.world_size == 1:
        return None
    total = config.model_config.get_total_num_kv_heads()
    count = max(1, total // group.world_size)
    first = group.rank_in_group * total // group.world_size  # fewer heads than ranks are there several times
    return slice(first, first + count)


def _on_all_ranks(ours: bool) -> bool:
    """Return whether something is true on all ranks: what one of them lacks none of them may run, or others wait for it."""
    group = get_tp_group()
    if group.world_size == 1:
        return ours
    agreed = torch.tensor(ours, dtype=torch.int32)
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN, group.cpu_group)
    return bool(agreed)
