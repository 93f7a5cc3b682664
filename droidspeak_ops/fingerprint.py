"""The identity of a model, as far as reusing its KV cache depends on it, and when another model may reuse it."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch


class ReuseError(ValueError):
    """What a sender made cannot be used as asked. Raised before any compute; a full prefill is always correct."""


@dataclass(frozen=True)
class Fingerprint:
    """Which model it is: what its K/V mean, and with `weights` which fine-tune made them.

    Args:
        architecture: model type and the sizes that K/V and hidden states depend on.
        rope: parameters of the rotary embedding.
        dtype: dtype of the weights, as ``"float32"``.
        weights: SHA-256 over all weights; None where only what K/V mean is asked.
        tokenizer: SHA-256 over the vocabulary, or None where no tokenizer was given.
    """

    architecture: Mapping[str, Any]
    rope: Mapping[str, Any]
    dtype: str
    weights: str | None = None
    tokenizer: str | None = None

    def check_reuse_by(self, receiver: Fingerprint) -> None:
        """Raise unless the K/V of this sender mean the same to `receiver`, whatever the weights of the two.

        Raises:
            ReuseError: architecture, RoPE, dtype or tokenizer differ; the message names what.
        """
        _check_equal("architecture", self.architecture, receiver.architecture)
        _check_equal("RoPE parameters", self.rope, receiver.rope)
        if self.dtype != receiver.dtype:
            raise ReuseError(f"dtype: the context is {self.dtype}, the receiver {receiver.dtype}; one dtype is needed")
        if self.tokenizer and receiver.tokenizer and self.tokenizer != receiver.tokenizer:
            raise ReuseError("tokenizer: sender and receiver have different vocabularies; the same one is needed")


def _check_equal(name: str, sender: Mapping[str, Any], receiver: Mapping[str, Any]) -> None:
    differing = [key for key in sorted(sender.keys() | receiver.keys()) if sender.get(key) != receiver.get(key)]
    if differing:
        detail = "; ".join(f"{key} is {sender.get(key)!r} and {receiver.get(key)!r}" for key in differing)
        raise ReuseError(f"{name}: sender and receiver differ ({detail}); the same {name} is needed")


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 of which token each id of a transformers tokenizer stands for.

    A tenth of a second for 50,000 tokens, so it is kept for as long as no token is added.
    """

    def compute() -> str:
        digest = hashlib.sha256()
        for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            digest.update(f"{index}\0{token}\0".encode())
        return digest.hexdigest()

    return _remembered(tokenizer, len(tokenizer), compute)


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over the name, dtype, shape and bytes of all weights of `model`.

    About a second per gigabyte, so it is kept for as long as no weight is replaced or written to.
    """
    weights = sorted(model.state_dict(keep_vars=True).items())
    state = tuple(
        (name, tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for name, tensor in weights
    )
    return _remembered(model, state, lambda: _digest(weights))


_known: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def _remembered(owner: Any, state: Any, compute: Callable[[], str]) -> str:
    """The digest of `owner`, computed where it is not known for this `state`."""
    known = _known.get(owner)
    if known is None or known[0] != state:
        known = _known[owner] = (state, compute())
    return known[1]


def _digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    def one(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
        header = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
        return hashlib.sha256(header + hashlib.sha256(data).digest()).digest()

    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        for part in pool.map(one, weights):
            digest.update(part)
    return digest.hexdigest()
