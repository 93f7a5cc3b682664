"""Files of tensors and plain values: safetensors, with a digest of it all that is checked when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .files import replacing


def write(
    path: str | os.PathLike[str], kind: str, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write plain values and tensors, which may share memory and lie on any device, atomically.

    Args:
        path: the file.
        kind: of its content, such as ``"maps"``; only :func:`read` of this kind reads it.
        values: what JSON can hold.
        tensors: by name.
    """
    text = json.dumps(values)
    owned = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as scratch:
        scratch.write_bytes(save(owned, {_key(kind): text, "sha256": _digest(text, owned)}))


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read what :func:`write` wrote into memory: the file may be cut or replaced behind it.

    Raises:
        ValueError: the file holds something else, or is damaged.
    """
    content = Path(path).read_bytes()
    try:
        metadata = _metadata(content)
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: expected a file of droidspeak {kind}, got none of safetensors ({error})") from None
    if not isinstance(metadata.get(_key(kind)), str) or "sha256" not in metadata:
        raise ValueError(f"{path}: expected a file of droidspeak {kind}, got a safetensors file of something else")
    if metadata["sha256"] != _digest(metadata[_key(kind)], tensors):
        raise ValueError(f"{path}: expected the digest {metadata['sha256']}, got another: the file is damaged")
    return json.loads(metadata[_key(kind)]), tensors


def digest(values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the content of a file, wherever its tensors lie."""
    return _digest(json.dumps(values), {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _key(kind: str) -> str:
    return f"droidspeak_{kind}"


def _metadata(content: bytes) -> dict[str, str]:
    """The header's plain values, which safetensors reads from files alone."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length].decode())
    found = header.get("__metadata__") if isinstance(header, dict) else None
    return found if isinstance(found, dict) else {}


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the plain values, and the name, dtype, shape and bytes of each tensor."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
