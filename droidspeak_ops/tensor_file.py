"""Files of tensors and plain values: safetensors, with a digest of it all that is checked when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save

from . import schema
from .files import replacing

D = TypeVar("D")
T = TypeVar("T")


def write(
    path: str | os.PathLike[str], kind: str, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write plain values and tensors, which may share memory and lie on any device, atomically.

    Args:
        path: the file.
        kind: of its content, such as ``"maps"``; only :func:`read` of this kind reads it.
        values: what JSON can hold, without NaN and infinity.
        tensors: by name.
    """
    content = sealed(kind, _json(values), tensors)
    with replacing(path) as scratch:
        scratch.write_bytes(content)


def sealed(kind: str, text: str, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the content of a file, with a digest that fits: `text` has the plain values in JSON."""
    owned = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    return save(owned, {_key(kind): text, "sha256": _digest(text, owned)})


def read(path: str | os.PathLike[str], kind: str, described: type[D], make: Callable[[D, Tensors], T]) -> T:
    """Read what :func:`write` wrote into memory: the file may be cut or replaced behind it.

    Args:
        path: the file.
        kind: as it was written.
        described: the type of its plain values.
        make: makes what the file holds of these and of its tensors, of which it has to take each.

    Raises:
        ValueError: the file holds something else, or is damaged, or `make` refuses its content.
    """
    content = Path(path).read_bytes()
    try:
        tensors, metadata = load(content), _metadata(content)
        text = metadata.get(_key(kind))
        found = _digest(text or "", tensors)
    except Exception as error:  # the parsers raise what they happen to run into, whoever wrote the file
        raise ValueError(f"{path}: expected a file of droidspeak {kind}, got none of safetensors ({error!r})") from None
    del content
    if text is None or "sha256" not in metadata:
        raise ValueError(f"{path}: expected a file of droidspeak {kind}, got a safetensors file of something else")
    if found != metadata["sha256"]:
        raise ValueError(f"{path}: expected the digest {metadata['sha256']}, got another: the file is damaged")
    values, unread = schema.decode(text, described, str(path)), Tensors(tensors)
    try:
        made = make(values, unread)
        unread.check_taken()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return made


class Tensors:
    """The tensors of a file by name, each to be taken once."""

    def __init__(self, by_name: Mapping[str, torch.Tensor]) -> None:
        self._left = dict(by_name)

    @property
    def names(self) -> list[str]:
        """The names of those that are not taken yet."""
        return list(self._left)

    def take(self, name: str) -> torch.Tensor:
        """Return a tensor.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self._left:
            raise ValueError(f"tensors: expected one named {name!r}, got none")
        return self._left.pop(name)

    def take_if(self, name: str) -> torch.Tensor | None:
        """Return a tensor, or None where there is none of that name."""
        return self._left.pop(name, None)

    def check_taken(self) -> None:
        """Raise a ValueError unless every tensor is taken."""
        if self._left:
            raise ValueError(f"tensors: expected no others, got {sorted(self._left)}")


def digest(values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the content of a file, wherever its tensors lie."""
    return _digest(_json(values), {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, allow_nan=False)


def _key(kind: str) -> str:
    return f"droidspeak_{kind}"


def _metadata(content: bytes) -> dict[str, str]:
    """The header's plain values, which safetensors reads from files alone."""
    length = int.from_bytes(content[:8], "little")
    header = schema.decode(content[8 : 8 + length], dict[str, Any], "header")
    return schema.convert(header.get("__metadata__", {}), dict[str, str], "header")


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the plain values, and the name, dtype, shape and bytes of each tensor."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
