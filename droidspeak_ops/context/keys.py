"""Keys of stored contexts: chains of hashes over blocks of tokens, which begin with the tenant and the sender."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import torch

from .fingerprint import Fingerprint, ReuseError

BLOCK = 64
"""Tokens of a block: stored contexts serve heads of prompts at its multiples."""
_FORMAT = "droidspeak context 1"


def identity(sender: Fingerprint) -> str:
    """Return the fingerprint in JSON, the same for equal fingerprints.

    Raises:
        ReuseError: it has no digest of weights, and so does not say what is computed.
    """
    if sender.weights is None:
        raise ReuseError("sender: expected a fingerprint with a digest of the weights, got one without")
    return json.dumps(asdict(sender), sort_keys=True, allow_nan=False)


class Chain:
    """The hashes of a prompt's heads, SHA-256 in hexadecimal.

    Args:
        namespace, salt: of the tenant: nobody finds another's contexts, or can tell whether they are there.
        sender: whose contexts.
        tokens: int64 ``[1, T]``.

    Raises:
        ReuseError: `sender` has no digest of weights.
        ValueError: `tokens` are no such tensor.
    """

    def __init__(self, namespace: str, salt: str, sender: Fingerprint, tokens: torch.Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.dtype != torch.int64 or not tokens.numel():
            raise ValueError(f"tokens: expected int64 [1, T], got {tokens.dtype} {tuple(tokens.shape)}")
        self._bytes = tokens.cpu().numpy().astype("<i8").tobytes()
        self.seed = _hash(json.dumps([_FORMAT, namespace, salt, identity(sender)]).encode())
        blocks = [self.seed]
        for start in range(0, len(self._bytes) - 8 * BLOCK + 1, 8 * BLOCK):
            blocks.append(_hash(blocks[-1].encode() + self._bytes[start : start + 8 * BLOCK]))
        self.blocks = tuple(blocks[1:])
        """The hash of each head of whole blocks."""

    @property
    def num_tokens(self) -> int:
        return len(self._bytes) // 8

    def shared(self, blocks: tuple[str, ...]) -> int:
        """Return of how many tokens the longest head is that ends with a block and is also that of another chain's `blocks`."""
        pairs = zip(self.blocks, blocks, strict=False)
        return BLOCK * next(
            (place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(self.blocks), len(blocks))
        )

    def key(self, length: int) -> str:
        """Return the key of the context that is the first `length` tokens: no other context has it."""
        whole = length // BLOCK
        last = self.blocks[whole - 1] if whole else self.seed
        return _hash(b"whole" + last.encode() + self._bytes[8 * BLOCK * whole : 8 * length])


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
