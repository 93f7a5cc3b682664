"""Contexts that are being read as a test says: in which order tensors arrive, and which of them fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

import droidspeak_ops as ds
from droidspeak_ops.context.entry import sinks_of
from droidspeak_ops.context.loading import LoadingContext

PATIENCE = 30
"""Seconds after which what waits is taken to wait for ever."""


class Source:
    """The tensors of a context by name, and a fetch of them that tells what was asked for.

    Args:
        context: in memory.
        before: is called with a name before its tensor is given.
        sinks: whether they are apart.
    """

    def __init__(
        self, context: ds.SharedContext, before: Callable[[str], None] = lambda name: None, *, sinks: bool = False
    ) -> None:
        self.context, self.before, self.sinks = context, before, sinks
        self.tensors = {
            name: tensor for name, tensor in context._described()[1].items() if name.startswith(("kv.", "hidden."))
        }
        if sinks:
            self.tensors |= sinks_of(context)
        self.asked: list[str] = []

    def fetch(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        self.before(name)
        return self.tensors[name]

    def loading(self, threads: int = 1) -> LoadingContext:
        return LoadingContext.over(
            self.context.tokens, self.context.rotations, self.context.sender, self.tensors, self.fetch, threads=threads
        )

    def names(self, reads: Sequence[tuple[str, int]]) -> list[str]:
        """Return the names of the tensors that are read, in this order."""
        prefixes = [
            "sinks." if what == "sinks" and self.sinks else f"{'hidden' if what == 'hidden' else 'kv'}.{layer}."
            for what, layer in reads
        ]
        return list(dict.fromkeys(name for prefix in prefixes for name in self.tensors if name.startswith(prefix)))


def in_turn(order: Sequence[str]) -> Callable[[str], None]:
    """Return what has tensors arrive in this order, if each is fetched by a thread of its own."""
    turns = {name: threading.Event() for name in order}
    following = dict(zip(order, [*order[1:], None], strict=True))
    turns[order[0]].set()

    def wait(name: str) -> None:
        await_event(turns[name])
        if after := following[name]:
            turns[after].set()

    return wait


def await_event(event: threading.Event) -> None:
    if not event.wait(PATIENCE):
        raise TimeoutError("expected the event within seconds, got none")


def await_readers() -> None:
    """Return when no thread reads; fail if one goes on for ever."""
    for thread in threading.enumerate():
        if thread.name.startswith("reader "):
            thread.join(PATIENCE)
            assert not thread.is_alive()
