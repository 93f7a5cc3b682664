"""A store of senders' contexts: written once, and read by many receivers, in other processes and at other times."""

from __future__ import annotations

import os
import threading
import time
import warnings
from functools import lru_cache

import torch

from .context import SharedContext
from .entry import Entry, encode
from .fingerprint import Fingerprint, ReuseError
from .keys import BLOCK, Chain, identity
from .loading import LoadingContext
from .storage import SUFFIX, Stored, storage_at

_SHORT = "0" * 32  # in the place of the first block's hash, of a context that is shorter

_Ends = tuple[int, tuple[str, ...]]
_MOST_KNOWN = 1 << 14  # files; what is known of one with 4,000 tokens takes 7 KiB


class ContextStore:
    """Contexts at a path or a URL, found by their tokens, their sender and the tenant.

    Files of a local path are readable by their owner alone; they are published by a rename once they are on disk, and are
    never written to again: any number of processes may read, write and evict. Digests tell damage, and a damaged file is an
    error or a miss, never a wrong context; but whoever can write to a store can forge what is in it.

    A context is one row: a head of a prompt is a row's, and rows of a batch have other heads.

    Args:
        url: a folder, which is made at the first save, or a URL of fsspec such as ``"s3://bucket/contexts"``, for which its
            module has to be installed. Of object stores a file is there as a whole or not at all; where a reader can see half a
            file (such as SFTP), its digests tell.
        namespace: of the tenant; it is written into files.
        salt: of the tenant, which is not: without it nobody can tell from names whether a context is there.
        budget: bytes that all files may have together; what was not used for longest is removed by who saves (of remote files:
            what was written first). A context that is being read from a local path keeps its bytes until it is let go. None for
            no limit.

    Raises:
        ValueError, ImportError: fsspec does not know such URLs, or lacks a module for them.
    """

    def __init__(
        self, url: str | os.PathLike[str], *, namespace: str = "", salt: str = "", budget: int | None = None
    ) -> None:
        if budget is not None and budget <= 0:
            raise ValueError(f"budget: expected bytes, or None for no limit, got {budget}")
        self.url, self._namespace, self._salt, self._budget = os.fspath(url), namespace, salt, budget
        self._storage = storage_at(url)
        self._lock = threading.Lock()
        self._read_bytes, self._read_seconds = 0, 0.0
        self._ends_of = lru_cache(_MOST_KNOWN)(
            self._read_ends
        )  # the name says what the tokens are, whoever replaces a file

    def save(self, context: SharedContext) -> None:
        """Write a context, in place of one of the same tokens and sender: in 8 bits or not, and whatever hidden states it has.

        Args:
            context: as a sender made it. K and V that a receiver mixed are none, and there is no way to save them.

        Raises:
            TypeError: it is no such context.
            ValueError: it has several rows, its sender has no digest of weights, or it is larger than the budget.
            OSError: it cannot be written, as on a full disk; nothing of it is left.
        """
        if not isinstance(context, SharedContext):
            raise TypeError(f"context: expected a SharedContext, got {type(context).__name__}")
        chain = self._chain(context.tokens, context.sender)
        parts = encode(context, chain, self._namespace)
        nbytes = sum(map(len, parts))
        if self._budget is not None:
            if nbytes > self._budget:
                raise ValueError(f"context: expected at most {self._budget} bytes, the budget, got {nbytes}")
            self.prune(self._budget - nbytes)
        self._storage.write(_name(chain, chain.num_tokens), parts)
        if self._budget is not None:  # others may have written meanwhile
            self.prune(self._budget)

    def load(self, tokens: torch.Tensor, sender: Fingerprint) -> LoadingContext | None:
        """Return the context of these tokens, on the CPU, or None where there is none.

        Its K, V and hidden states are read when they are used, or ahead of that by a prefill. A tensor that is damaged or
        cannot be read raises :class:`ReuseError` there.

        Args:
            tokens: int64 ``[1, T]``, all of the context.
            sender: with a digest of the weights. Another fine-tune, tokenizer, RoPE or eps is another sender.

        Raises:
            ReuseError: `sender` has no digest of weights, or the file's header or rotations are damaged or cannot be read; the
                message names it.
            ValueError: `tokens` are no such tensor.
        """
        chain = self._chain(tokens, sender)
        entry = self._open(_name(chain, chain.num_tokens), sender)
        return None if entry is None else self._context(entry, tokens, sender)

    def find(self, prompt_ids: torch.Tensor, sender: Fingerprint) -> LoadingContext | None:
        """Return the context that is the longest stored head of a prompt, on the CPU, or None where there is none.

        A context of which only a head is one of the prompt serves with that, in whole blocks of 64 tokens: K, V and hidden
        states of a token depend on nothing behind it. Not so where a layer has a sliding window that is shorter than the
        context, or the RoPE depends on the length: there only whole contexts serve.

        A file whose header or rotations are damaged or cannot be read is passed over, with a warning; the rest is read as
        :meth:`load` says.

        Args:
            prompt_ids: int64 ``[1, N]``; at least one token of it is left as a suffix.
            sender: as in :meth:`load`.

        Raises:
            ReuseError: `sender` has no digest of weights.
            ValueError: `prompt_ids` are no such tensor.
            OSError: the store cannot be listed.
        """
        chain = self._chain(prompt_ids, sender)
        for length, name in self._heads_of(chain):
            try:
                entry = self._open(name, sender)
                if entry is not None:
                    return self._context(entry, prompt_ids[:, :length], sender)
            except ReuseError as error:
                warnings.warn(f"{error}; it is passed over", stacklevel=2)
        return None

    def stored(self) -> list[Stored]:
        """List the files of all tenants, those that were used last first."""
        return sorted(self._storage.stored(), key=lambda each: each.used, reverse=True)

    def open(self, name: str) -> Entry | None:
        """Open a file of :meth:`stored` and read its header; None where it is gone.

        Raises:
            ReuseError: it is damaged or cannot be read; the message names it.
        """
        path = f"{self.url}/{name}"
        try:
            return Entry(path, self._storage.open(name))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ReuseError(f"{path}: expected to read it, got: {error}") from error
        except ValueError as error:
            raise ReuseError(str(error)) from error

    def prune(self, budget: int) -> list[Stored]:
        """Remove what was not used for longest, of all tenants, until all files have at most `budget` bytes together.

        What writers that were killed have left is removed, too.

        Returns:
            What was removed.
        """
        self._storage.sweep()
        left = self.stored()
        total, removed = sum(each.nbytes for each in left), []
        while left and total > budget:
            removed.append(left.pop())
            total -= removed[-1].nbytes
            self._storage.remove(removed[-1].name)
        return removed

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second at which tensors were read so far, one after the other, digests included; None before the first.

        For :meth:`Frontier.choose`.
        """
        with self._lock:
            return self._read_bytes / self._read_seconds if self._read_seconds else None

    def _context(self, entry: Entry, tokens: torch.Tensor, sender: Fingerprint) -> LoadingContext:
        """Return the context of the first tokens of an entry.

        Raises:
            ReuseError: the rotations are damaged or cannot be read, or it has fewer tokens.
        """
        length = tokens.shape[1]
        entry.check_head(length)
        rotations = entry.rotations(length)
        entry.use()

        def fetch(name: str) -> torch.Tensor:
            begun = time.perf_counter()
            tensor = entry.fetch(name)
            with self._lock:
                self._read_bytes += tensor.nbytes
                self._read_seconds += time.perf_counter() - begun
            return entry.head_of(name, tensor, length)

        return LoadingContext.over(tokens.cpu(), rotations, sender, entry.names, fetch)

    def _chain(self, tokens: torch.Tensor, sender: Fingerprint) -> Chain:
        return Chain(self._namespace, self._salt, sender, tokens)

    def _open(self, name: str, sender: Fingerprint) -> Entry | None:
        """Open a file as :meth:`open` does, and check that it is the one of its name, made by this sender."""
        entry = self.open(name)
        if entry is None or (name.endswith(f".{entry.manifest.key}{SUFFIX}") and entry.identity == identity(sender)):
            return entry
        raise ReuseError(f"{self.url}/{name}: expected the context that its name says, got another")

    def _heads_of(self, chain: Chain) -> list[tuple[int, str]]:
        """The lengths of a prompt's stored heads, the longest first, and the files that hold them."""
        listed = [each.name for each in self._storage.stored(chain.seed)]
        ends: dict[str, _Ends] = {
            _name(chain, length): (length, ()) for length in range(1, min(BLOCK, chain.num_tokens))
        }
        ends = {name: ends[name] for name in listed if name in ends}
        alike = f"{_name(chain, chain.num_tokens).partition('.')[0]}."
        for name in (each for each in listed if chain.blocks and each.startswith(alike)):
            try:
                ends[name] = self._ends_of(name)
            except FileNotFoundError:  # removed meanwhile
                pass
            except ReuseError as error:
                warnings.warn(f"{error}; it is passed over", stacklevel=3)
        lengths = {name: _head(chain, name, *ends[name]) for name in ends}
        best = sorted((name for name in ends if lengths[name]), key=lambda name: (-lengths[name], ends[name][0]))
        return [(lengths[name], name) for name in best]

    def _read_ends(self, name: str) -> _Ends:
        """Read how many tokens a file has, and the blocks at which heads of it end.

        Raises:
            ReuseError: it is damaged or cannot be read.
            FileNotFoundError: it is gone.
        """
        entry = self.open(name)
        if entry is None:
            raise FileNotFoundError(name)
        return entry.num_tokens, entry.manifest.blocks if entry.has_heads else ()


def _name(chain: Chain, length: int) -> str:
    """The file of the first `length` tokens, in a folder of tenant and sender; names of files that begin alike begin alike."""
    first = chain.blocks[0][: len(_SHORT)] if length >= BLOCK else _SHORT
    return f"{chain.seed}/{first}.{chain.key(length)}{SUFFIX}"


def _head(chain: Chain, name: str, num_tokens: int, blocks: tuple[str, ...]) -> int:
    """Count a prompt's tokens that a file serves which holds `num_tokens` tokens, and heads that end with `blocks`."""
    if num_tokens < chain.num_tokens and name == _name(chain, num_tokens):
        return num_tokens
    return min(chain.shared(blocks), (chain.num_tokens - 1) // BLOCK * BLOCK)
