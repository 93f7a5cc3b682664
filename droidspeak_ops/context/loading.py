"""Contexts that are still being read, by threads, while receivers work with what has arrived."""

from __future__ import annotations

import re
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from ..trace import Trace, span
from .context import Rotation, SharedContext, mover
from .fingerprint import Fingerprint
from .kv import KV
from .parts import Arriving, Parts

Fetch = Callable[[str], torch.Tensor]
"""Returns the tensor of a name, on the CPU."""

_STATES = ("states",)


class LoadingContext(SharedContext):
    """A context whose K/V and hidden states are being read: a layer's are waited for when they are first used.

    What was asked for ahead (:meth:`prefetch`) is read in that order, all else when it is used. A tensor that cannot be read
    raises its error wherever it is waited for, and ends what was asked for ahead; asked for again, it is read again. Reading
    ends when nothing holds the context any more.
    """

    @classmethod
    def over(
        cls,
        tokens: torch.Tensor,
        rotations: Sequence[Rotation | None],
        sender: Fingerprint,
        names: Iterable[str],
        fetch: Fetch,
        *,
        threads: int = 1,
    ) -> LoadingContext:
        """Return a context of tensors that are fetched by name, of which nothing is read yet.

        Args:
            tokens, rotations, sender: as :class:`SharedContext` has them, all there; tensors are moved to the tokens' device as
                they arrive.
            names: of the tensors that there are: ``kv.LAYER.PART`` with the parts of :class:`KV`; ``hidden.LAYER.states``, or
                in 8 bits ``hidden.LAYER.PART``; and ``sinks.PART`` if K and V of the attention sinks are there apart, of all
                layers ``[B, L * K, S, D]``, for what reads no more of a layer.
            fetch: returns the tensor of a name on the CPU. It is called in threads of the context, once for each name unless it
                fails.
            threads: that fetch; each has no more than one tensor in flight. A disk needs one, a remote store several.

        Raises:
            ValueError: the names are not those of a context of this sender, `tokens` or `rotations` do not fit, or the sender's
                sizes are not known.
        """
        if threads < 1:
            raise ValueError(f"threads: expected 1 or more, got {threads}")
        layers, heads, head_dim, _ = sender.sizes("num_hidden_layers", "num_key_value_heads", "head_dim", "hidden_size")
        parts = Parts(tokens, sender, layers, heads, head_dim)
        of_kv, of_hidden, of_sinks = _by_part(names)
        if sorted(of_kv) != list(range(layers)):
            raise ValueError(f"names: expected K and V of layers 0 to {layers - 1}, got those of {sorted(of_kv)}")
        reader = _Reader(fetch, threads, tokens.device)
        sinks = _Sinks(reader, dict.fromkeys(range(layers), of_sinks) if of_sinks else {}, parts)
        return cls(
            tokens, _KVs(reader, of_kv, parts, sinks), _HiddenStates(reader, of_hidden, parts), rotations, sender
        )

    def prefetch(self, reads: Iterable[tuple[str, int]], trace: Trace | None = None) -> None:
        names: dict[_Reader, list[str]] = defaultdict(list)
        for part, layer in self._arriving(reads):
            names[part.reader].extend(part.names(layer))
        for reader, of_reader in names.items():
            reader.ask(of_reader, trace)

    def has_arrived(self, reads: Iterable[tuple[str, int]]) -> bool:
        return all(part.reader.has(part.names(layer)) for part, layer in self._arriving(reads))

    def wait(self, reads: Iterable[tuple[str, int]]) -> None:
        for part, layer in self._arriving(reads):
            part[layer]

    def to(self, device: torch.device | str) -> SharedContext:
        """Return the context on another device, to which tensors are moved as they arrive.

        On a GPU that is by pinned memory and a stream of its own, beside what the device computes. What has arrived here is not
        read again.
        """
        keys_values, states = self.keys_values, self.hidden_states
        if not isinstance(keys_values, _KVs) or not isinstance(states, _HiddenStates):
            return super().to(device)  # parts were replaced
        move, reader = mover(device), keys_values.reader
        return LoadingContext.over(
            self.tokens.to(device),
            [None if each is None else (move(each[0]), move(each[1])) for each in self.rotations],  # type: ignore[misc]
            self.sender,
            [*keys_values.all_names, *states.all_names],
            reader.fetch,
            threads=reader.threads,
        )

    def sinks(self, layer: int, count: int) -> KV:
        source = self._source("sinks")
        if not isinstance(source, _Sinks):
            return super().sinks(layer, count)
        kv = source[layer]
        return kv.at(slice(kv.keys.shape[2] - count, None))

    def _source(self, what: str) -> Any:
        """The parts that are read, in memory or not: hidden states, sinks, or K and V, also for sinks that are not apart."""
        if what == "hidden":
            return self.hidden_states
        sinks = self.keys_values.sinks if isinstance(self.keys_values, _KVs) else None
        return sinks if what == "sinks" and sinks else self.keys_values

    def _arriving(self, reads: Iterable[tuple[str, int]]) -> Iterator[tuple[Any, int]]:
        """Yield the parts that are not in memory, and the layers that are read of them."""
        for what, layer in reads:
            if what == "hidden":
                self.check_hidden([layer])
            part = self._source(what)
            if isinstance(part, _Layers):
                yield part, layer


def throttled(fetch: Fetch, rate: float) -> Fetch:
    """Return a fetch of the same tensors at no more than `rate` bytes per second in all, as over a link.

    Raises:
        ValueError: the rate is not positive.
    """
    if not rate > 0:
        raise ValueError(f"rate: expected a positive number of bytes per second, got {rate}")
    lock = threading.Lock()
    free = late = 0.0

    def fetch_slowly(name: str) -> torch.Tensor:
        nonlocal free, late
        begun = time.monotonic()
        tensor = fetch(name)
        with lock:  # one link, on which tensors follow one another; while a reader oversleeps it goes on
            free = arrived = max(free, begun - late) + tensor.nbytes / rate
        ready = max(arrived, time.monotonic())
        time.sleep(max(0.0, ready - time.monotonic()))
        late = time.monotonic() - ready
        return tensor

    return fetch_slowly


def _by_part(names: Iterable[str]) -> tuple[dict[int, list[str]], dict[int, list[str]], list[str]]:
    """Return the names of the tensors of each layer's K/V, of its hidden states, and of the sinks."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if not re.fullmatch(r"((kv|hidden)\.(0|[1-9][0-9]{0,3})|sinks)\.[a-z_]+", name):
            raise ValueError(f"names: expected names such as 'kv.3.keys', got {name!r}")
        found[name.rpartition(".")[0]].append(name)
    layers: dict[str, dict[int, list[str]]] = {"kv": {}, "hidden": {}}
    for of, its in found.items():
        kind, _, layer = of.partition(".")
        allowed = _STATES if kind == "hidden" else KV._fields[:2], KV._fields
        if sorted(map(_part, its)) not in map(sorted, allowed):
            raise ValueError(f"names: expected one of {allowed} of {of}, got {sorted(map(_part, its))}")
        if layer:
            layers[kind][int(layer)] = its
    return layers["kv"], layers["hidden"], found["sinks"]


def _part(name: str) -> str:
    return name.rpartition(".")[2]


class _Reader:
    """Fetches tensors by name in threads, in the order in which they are asked for.

    Between tensors threads hold no reference to it: without an owner it is gone, and they end.
    """

    def __init__(self, fetch: Fetch, threads: int, device: torch.device) -> None:
        self.threads = threads
        self._fetch, self._device = fetch, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._queue: deque[tuple[str, Trace | None]] = deque()
        self._futures: dict[str, Future[torch.Tensor]] = {}
        self._running = 0

    def ask(
        self, names: Sequence[str], trace: Trace | None = None, *, first: bool = False
    ) -> list[Future[torch.Tensor]]:
        """Return the tensors to come; those that were not asked for before are read last, or `first`."""
        with self._lock:
            new = [name for name in dict.fromkeys(names) if name not in self._futures]
            for name in reversed(new) if first else new:
                self._futures[name] = Future()
                (self._queue.appendleft if first else self._queue.append)((name, trace))
            for _ in range(min(self.threads - self._running, len(self._queue))):
                name = f"reader {self._running}"
                threading.Thread(target=_read_all, args=(weakref.ref(self),), name=name, daemon=True).start()
                self._running += 1
            return [self._futures[name] for name in names]

    def has(self, names: Iterable[str]) -> bool:
        """Return whether these tensors are there."""
        return all((future := self._futures.get(name)) is not None and future.done() for name in names)

    def fetch(self, name: str) -> torch.Tensor:
        """Fetch a tensor that is not there yet, in the caller's thread."""
        return self.ask([name])[0].result() if self.has([name]) else self._fetch(name)

    def take(self) -> tuple[str, Trace | None] | None:
        """Take the next name for the calling thread, which ends if there is none."""
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            self._running -= 1
            return None

    def read(self, name: str, trace: Trace | None) -> None:
        """Read a tensor that :meth:`take` gave."""
        try:
            with span(trace, "read", name) as reading:
                tensor = self._on_device(self._fetch(name))
                if reading is not None:
                    reading.nbytes = tensor.nbytes
        except BaseException as error:
            error.add_note(f"while {name} of a context was read")
            self._fail(name, error)
        else:
            self._futures[name].set_result(tensor)

    def _fail(self, name: str, error: BaseException) -> None:
        """Pass an error to whoever waits for this tensor or for those behind it, and forget that they were asked for."""
        with self._lock:
            futures = [self._futures.pop(each) for each in (name, *(queued for queued, _ in self._queue))]
            self._queue.clear()
        for future in futures:
            future.set_exception(error)

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._stream is None:
            return tensor.to(self._device)
        # This thread waits for the copy, so that no stream of a receiver's has to.
        with torch.cuda.stream(self._stream):
            pinned = tensor if tensor.is_cuda else tensor.pin_memory()
            moved = pinned.to(self._device, non_blocking=True)
            self._stream.synchronize()
        return moved


def _read_all(reader_of: weakref.ref[_Reader]) -> None:
    """Read what is asked for until there is no more of it, or nobody to ask."""
    while (reader := reader_of()) is not None and (asked := reader.take()) is not None:
        reader.read(*asked)
        del reader


class _Layers(Arriving):
    """Parts of a context by layer, read with :class:`_Reader` and checked when they are used."""

    def __init__(self, reader: _Reader, names: Mapping[int, Sequence[str]], parts: Parts) -> None:
        self.reader, self._names, self._parts = reader, names, parts

    def names(self, layer: int) -> Sequence[str]:
        """Return the names of the tensors of a layer."""
        return self._names[layer]

    @property
    def all_names(self) -> list[str]:
        return list(dict.fromkeys(name for names in self._names.values() for name in names))

    def _read(self, layer: int) -> dict[str, torch.Tensor]:
        """Wait for the tensors of a layer, and return them by part."""
        names = self._names[layer]
        tensors = {
            _part(name): future.result() for name, future in zip(names, self.reader.ask(names, first=True), strict=True)
        }
        for tensor in tensors.values():
            if (
                tensor.is_cuda
            ):  # made on the reader's stream; memory is not to be used again before this one is done with it
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensors

    def __len__(self) -> int:
        return len(self._names)


class _KVs(_Layers, Sequence[KV]):
    def __init__(self, reader: _Reader, names: Mapping[int, Sequence[str]], parts: Parts, sinks: _Sinks) -> None:
        super().__init__(reader, names, parts)
        self.sinks = sinks

    @property
    def all_names(self) -> list[str]:
        return [*super().all_names, *self.sinks.all_names]

    def __getitem__(self, layer: int) -> KV:  # type: ignore[override]  # no slices
        layer = range(len(self))[layer]
        kv = KV(**self._read(layer))
        self._parts.check_kv(layer, kv)
        return kv

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)  # a copy is in memory


class _Sinks(_Layers):
    """K and V of the attention sinks by layer, which are read together; of no layer where they are not apart."""

    def __getitem__(self, layer: int) -> KV:
        kv = KV(**self._read(layer))
        self._parts.check_sinks(kv)
        heads = slice(layer * self._parts.num_kv_heads, (layer + 1) * self._parts.num_kv_heads)
        return KV(*(None if part is None else part[:, heads] for part in kv))  # type: ignore[arg-type]


class _HiddenStates(_Layers, Mapping[int, "torch.Tensor | KV"]):
    def __getitem__(self, layer: int) -> torch.Tensor | KV:
        read = self._read(layer)
        states = read["states"] if "states" in read else KV(**read)
        self._parts.check_hidden(layer, states)
        return states

    def __iter__(self) -> Iterator[int]:
        return iter(self._names)

    def __contains__(self, layer: object) -> bool:
        return layer in self._names

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)
