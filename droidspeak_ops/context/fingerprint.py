"""The identity of a model, as far as reusing its KV cache depends on it, and when another model may reuse it."""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.checks import FLOATS


class ReuseError(ValueError):
    """Raised where what a sender made cannot be used as asked, before any compute; a full prefill is always correct."""


_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
_MOST_LAYERS = 4096  # lists are made of so many, whoever wrote the number; models have hundreds at the most


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a model: the meaning of its K/V and, with `weights`, the fine-tune that made them.

    Args:
        architecture: model type and the sizes that K/V and hidden states depend on.
        rope: parameters of the rotary embedding.
        dtype: dtype of the weights, as ``"float32"``; empty where it is not known.
        weights: SHA-256 over all weights; None where only what K/V mean is asked.
        tokenizer: what :func:`vocabulary_digest` says of it, or None where no tokenizer was given.

    Raises:
        ValueError: a size in `architecture` is no positive integer, settings are nested, or a digest is no digest.
    """

    architecture: Mapping[str, Any]
    rope: Mapping[str, Any]
    dtype: str
    weights: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name in ("architecture", "rope"):
            _check_flat(name, getattr(self, name))
        for name in _SIZES:
            size, most = self.architecture.get(name, 1), _MOST_LAYERS if name == "num_hidden_layers" else 2**63
            if not (isinstance(size, int) and not isinstance(size, bool) and 0 < size <= most):
                raise ValueError(f"architecture: expected {name} to be an integer from 1 to {most}, got {size!r}")
        for name, form in (("weights", "[0-9a-f]{64}"), ("tokenizer", "[0-9]{1,18}:[0-9a-f]{64}")):
            digest = getattr(self, name)
            if digest is not None and not re.fullmatch(form, digest):
                raise ValueError(f"{name}: expected a digest {form}, got {digest!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights, and of what the model computes.

        Raises:
            ValueError: `dtype` is none that models are read in, or not known.
        """
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        return _DTYPES[self.dtype]

    def size(self, name: str) -> int | None:
        """A size in `architecture`, such as ``"head_dim"``; None where it is not known."""
        return self.architecture.get(name)

    def sizes(self, *names: str) -> list[int]:
        """Return sizes in `architecture`.

        Raises:
            ValueError: one is not there.
        """
        if missing := [name for name in names if name not in self.architecture]:
            raise ValueError(f"architecture: expected {', '.join(names)}, got none of {missing}")
        return [self.architecture[name] for name in names]

    def check_reuse_by(self, receiver: Fingerprint) -> None:
        """Raise unless the K/V of this sender mean the same to `receiver`, whatever the weights of the two.

        RoPE parameters may differ: K can be rotated further. So may the sizes of the vocabularies, if both know the tokens.

        Raises:
            ReuseError: architecture, dtype or tokenizer differ; the message names what.
        """
        differing = [
            key
            for key in sorted(self.architecture.keys() | receiver.architecture.keys())
            if key != "vocab_size" and self.architecture.get(key) != receiver.architecture.get(key)
        ]
        if differing:
            theirs = receiver.architecture
            detail = "; ".join(f"{key} is {self.architecture.get(key)!r} and {theirs.get(key)!r}" for key in differing)
            raise ReuseError(f"architecture: expected one for sender and receiver, got two ({detail})")
        if self.dtype != receiver.dtype:
            raise ReuseError(f"dtype: expected {receiver.dtype}, the receiver's, got a context in {self.dtype}")
        if self.tokenizer and receiver.tokenizer and self.tokenizer != receiver.tokenizer:
            raise ReuseError("tokenizer: expected one vocabulary for sender and receiver, got two")


def _check_flat(name: str, value: Any, levels: int = 3) -> None:
    """Raise a ValueError if lists and mappings lie deeper in one another than in a model's configuration."""
    items = list(value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ())
    if items and not levels:
        raise ValueError(f"{name}: expected settings of a model, got values that are nested too deeply")
    for item in items:
        _check_flat(name, item, levels - 1)


def vocabulary_digest(tokenizer: Any, like: str | None = None) -> str:
    """Identity of a transformers tokenizer's vocabulary: the number of its ids, and SHA-256 of the token of each.

    A tenth of a second for 50,000 tokens, so it is kept for as long as no token is added.

    Args:
        tokenizer: has `get_vocab`.
        like: the digest of another one: tokens that were added behind its last are left out.
    """

    def compute(end: str) -> bytes:
        tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
        tokens = [each for each in tokens if not end or each[0] < int(end)]
        digest = hashlib.sha256()
        for index, token in tokens:
            digest.update(f"{index}\0{token}\0".encode())
        return f"{tokens[-1][0] + 1 if tokens else 0}:{digest.hexdigest()}".encode()

    end = "" if like is None else like.partition(":")[0]
    return _remembered(tokenizer, {end: len(tokenizer)}, compute)[end].decode()


def weights_digest(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the name, dtype, shape and bytes of all `weights` of a model.

    About a second per gigabyte, so what each weight contributes is kept while it is neither replaced nor written to. Of
    writes through ``.data`` those are seen that change a row of a weight as a whole.
    """
    names = sorted(weights)

    def one(name: str) -> bytes:
        tensor = weights[name]
        data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
        header = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
        return hashlib.sha256(header + hashlib.sha256(data).digest()).digest()

    samples = _samples([weights[name] for name in names])
    states = {
        name: (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, sample)
        for name, tensor, sample in zip(names, (weights[name] for name in names), samples, strict=True)
    }
    return hashlib.sha256(b"".join(_remembered(model, states, one).values())).hexdigest()


def _samples(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """One element of each row of each tensor: writing through ``.data``, as merging an adapter does, leaves no other trace."""
    picked = [_one_of_each_row(tensor.detach()) for tensor in tensors]
    found: list[bytes] = [b""] * len(picked)
    for dtype in {part.dtype for part in picked}:
        alike = [index for index, part in enumerate(picked) if part.dtype == dtype]
        together = torch.cat([picked[index] for index in alike]).cpu().view(torch.uint8).numpy().tobytes()
        end = 0
        for index in alike:
            start, end = end, end + picked[index].nbytes
            found[index] = together[start:end]
    return found


def _one_of_each_row(tensor: torch.Tensor) -> torch.Tensor:
    """An element of each row, of another column than of the row before it, and so all of a vector; a view where possible."""
    step = max(tensor.shape[-1] - 1, 1) if tensor.dim() > 1 else 1
    if not tensor.is_contiguous():
        return tensor.flatten()[::step]
    return tensor.as_strided((-(-tensor.numel() // step),), (step,))


_known: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, bytes]]] = weakref.WeakKeyDictionary()


def forget_digests(owner: Any) -> None:
    """Have all that a digest of `owner` is made of be computed anew when it is next asked for."""
    _known.pop(owner, None)


def _remembered(owner: Any, states: Mapping[str, Any], compute: Callable[[str], bytes]) -> dict[str, bytes]:
    """The digest of each part of `owner`, computed where it is not known for this state of the part."""
    known = _known.setdefault(owner, {})
    stale = [name for name, state in states.items() if name not in known or known[name][0] != state]
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        for name, digest in zip(stale, pool.map(compute, stale), strict=True):
            known[name] = (states[name], digest)
    return {name: known[name][1] for name in states}
