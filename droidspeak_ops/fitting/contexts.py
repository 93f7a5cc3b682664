"""The contexts of a fit, kept on disk: in memory there is what is being looked at."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ..context.context import SharedContext
from ..context.fingerprint import Fingerprint
from ..context.store import ContextStore


class StoredContexts(Sequence[SharedContext]):
    """Contexts as one model has read them; each is opened when it is asked for, and read as it is used.

    Args:
        folder: where they are kept.
        device: where they are read to.
    """

    def __init__(self, folder: str | os.PathLike[str], device: torch.device) -> None:
        self._store, self._device = ContextStore(os.fspath(folder)), device
        self._identities: list[tuple[torch.Tensor, Fingerprint]] = []

    def append(self, context: SharedContext) -> None:
        """Write a context."""
        self._store.save(context)
        self._identities.append((context.tokens.cpu(), context.sender))

    def __getitem__(self, number: int) -> SharedContext:  # type: ignore[override]  # no slices
        context = self._store.load(*self._identities[number])
        assert context is not None
        return context.to(self._device)

    def __len__(self) -> int:
        return len(self._identities)
