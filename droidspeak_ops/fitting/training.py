"""Training of maps on what the receiver's suffixes read from them, one layer at a time.

A regression weighs every token's K and V alike. What counts of them is what attention makes of them: the same matrices are
trained on the attention's output for the receiver's own suffixes. A layer is a problem of its own, with neither a pass of the
receiver nor logits in it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..files import Journal, remove_journal, replacing
from ..prefill.maps import LayerMap
from .pair import Key
from .parallel import in_parallel
from .reading import LayerReading, Readings

STEPS = 100
"""Steps of the optimizer in each layer."""
TOKENS_PER_STEP = 900
"""A step takes contexts until they have so many, a long one or two short ones: more steps serve better than larger ones."""
LEARNING_RATE = 6e-3
"""Relative to the root mean square of a map's weights: the largest of those that were tried, of which each was better."""
IN_MEMORY = 64
"""Contexts of which the readings of a layer that is trained are in memory."""
HELD_OUT = 5
"""One of so many contexts is not trained on, and says whether training has helped."""

_FOLDERS = ("contexts", "readings", "references", "trained")
_BETAS, _WARM_UP = (0.9, 0.99), 10
_MAX_LOSS_RATIO = 0.98  # of the loss on contexts held out after training to that before, for a layer to be changed


def train(
    readings: Readings,
    start: Mapping[Key, LayerMap],
    steps: int,
    seed: int,
    work: Workplace,
    track: Callable[[Sequence[Key]], Iterable[Key]],
) -> dict[Key, LayerMap]:
    """Return maps trained from those that are given; a layer that this does not help on contexts held out is left as it was.

    Args:
        readings: of all contexts.
        start: maps, by layer and source.
        steps: of the optimizer, in each layer.
        seed: decides which contexts a step takes.
        work: keeps layers that are done.
        track: wraps the layers, to show progress.
    """

    def of(key: Key) -> LayerMap:
        layer, source = key
        read = lru_cache(IN_MEMORY)(partial(readings.layer, layer=layer, source=source))
        generator = torch.Generator().manual_seed(_seed(seed, layer, source))
        return train_layer(read, len(readings), start[key], steps, generator)

    kept = {key: work.trained(*key) for key in start}
    new = in_parallel(of, [key for key, each in kept.items() if each is None], readings.device)
    trained = {}
    for key in track(list(start)):
        found = kept[key]
        if found is None:
            found = next(new)
            work.keep(*key, found)
        trained[key] = found
    return trained


def train_layer(
    read: Callable[[int], LayerReading], count: int, start: LayerMap, steps: int, generator: torch.Generator
) -> LayerMap:
    """Train the map of one layer by Adam, with a warm-up and then a cosine to 0.

    Args:
        read: returns the reading of one of `count` contexts.
    """
    held_out = [number for number in range(count) if is_held_out(number, count)]
    seen = [number for number in range(count) if not is_held_out(number, count)]
    weight, bias = both(start)
    before = mean_loss(map(read, held_out), weight, bias)
    parts = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    rate = LEARNING_RATE * float(weight.square().mean().sqrt())
    optimizer = torch.optim.Adam(parts, lr=rate, betas=_BETAS)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - _WARM_UP))
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / _WARM_UP, total_iters=_WARM_UP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [_WARM_UP])
    for _ in range(steps):
        order = torch.randperm(len(seen), generator=generator).tolist()
        with torch.enable_grad():
            loss = torch.stack([each.loss(*parts) for each in _first(read(seen[place]) for place in order)]).mean()
        # Of the map alone: the receiver's output projection has weights that would take a gradient too.
        for part, gradient in zip(parts, torch.autograd.grad(loss, parts), strict=True):
            part.grad = gradient
        optimizer.step()
        schedule.step()
    weight, bias = (part.detach() for part in parts)
    if not mean_loss(map(read, held_out), weight, bias) < _MAX_LOSS_RATIO * before:
        return start
    dtype = start.k_weight.dtype
    return LayerMap(*(part.to(dtype).contiguous() for part in (*weight.chunk(2), *bias.chunk(2))))


def _first(readings: Iterable[LayerReading]) -> Iterator[LayerReading]:
    """Yield the readings of a step."""
    tokens = 0
    for each in readings:
        yield each
        tokens += len(each.rows)
        if tokens >= TOKENS_PER_STEP:
            return


class Workplace:
    """A folder for what a fit has read and trained, from which it goes on after being killed; use it in a ``with`` statement.

    Args:
        folder: made if it is not there; None for a temporary one. All in it is the run's own, and removed in the end.
        run: identifies the run.

    Raises:
        ValueError: another run holds the folder, or it is that of another, or holds something else.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, run: dict[str, Any]) -> None:
        self._temporary = tempfile.TemporaryDirectory() if folder is None else None
        self.folder = Path(folder or self._temporary.name)  # type: ignore[union-attr]
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = self.folder / "fit.jsonl"
        if not journal.exists() and any(self.folder.iterdir()):
            raise ValueError(f"folder: expected an empty one, or that of a fit which was killed, got {self.folder}")
        self._journal = Journal(journal, run)
        # Next tokens are computed anew, in the same packs: half of a pack, kept by a run that was killed, would change bits.
        shutil.rmtree(self.folder / "references", ignore_errors=True)
        for name in _FOLDERS:
            (self.folder / name).mkdir(exist_ok=True)

    def trained(self, layer: int, source: str) -> LayerMap | None:
        """Return a layer's map that was kept, if there is one."""
        if [layer, source] not in self._journal.done:
            return None
        return LayerMap(**load_file(self._path(layer, source)))

    def keep(self, layer: int, source: str, layer_map: LayerMap) -> None:
        """Keep a layer's map."""
        with replacing(self._path(layer, source)) as scratch:
            save_file(vars(layer_map), scratch)
        self._journal.add([layer, source])

    def clear(self) -> None:
        """Remove all that the run has kept."""
        for name in _FOLDERS:
            shutil.rmtree(self.folder / name)
        self._journal.close()
        remove_journal(self.folder / "fit.jsonl")

    def _path(self, layer: int, source: str) -> Path:
        return self.folder / "trained" / f"{layer}.{source}.safetensors"

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, *error: object) -> None:
        self._journal.close()
        if self._temporary is not None:
            self._temporary.cleanup()


def is_held_out(number: int, count: int) -> bool:
    """Return whether a context of so many is one that is not trained on: the last of five, or of fewer."""
    return number % HELD_OUT == min(count, HELD_OUT) - 1


def both(layer_map: LayerMap) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight and the bias of K and V together, in float32."""
    weight = torch.cat((layer_map.k_weight, layer_map.v_weight)).float()
    return weight, torch.cat((layer_map.k_bias, layer_map.v_bias)).float()


@torch.no_grad()
def mean_loss(readings: Iterable[LayerReading], weight: torch.Tensor, bias: torch.Tensor) -> float:
    """Return the mean loss of contexts."""
    return torch.stack([each.loss(weight, bias) for each in readings]).mean().item()


def _seed(seed: int, layer: int, source: str) -> int:
    """A seed for each layer, so that one is trained alike whether others were trained before or not."""
    return int.from_bytes(hashlib.sha256(f"{seed}, {layer}, {source}".encode()).digest()[:7], "big")
