"""The file of a context: safetensors, with plain values and a digest of all beside the tensors."""

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

from ..files import replacing

_NAME = "droidspeak_context"


def write(path: str | os.PathLike[str], described: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write plain values and tensors, which may share memory and lie on any device."""
    text = json.dumps(described)
    owned = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as scratch:
        scratch.write_bytes(save(owned, {_NAME: text, "sha256": _digest(text, owned)}))


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read them again, into memory: the file may be cut or replaced behind it.

    Raises:
        ValueError: the file holds something else, or is damaged.
    """
    content = Path(path).read_bytes()
    try:
        metadata = _metadata(content)
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected a file that SharedContext.save wrote, got none of safetensors ({error})"
        ) from None
    if _NAME not in metadata or "sha256" not in metadata:
        raise ValueError(
            f"{path}: expected a file that SharedContext.save wrote, got a safetensors file of something else"
        )
    if metadata["sha256"] != _digest(metadata[_NAME], tensors):
        raise ValueError(
            f"{path}: damaged: expected the digest {metadata['sha256']}, got another; save the context again"
        )
    return json.loads(metadata[_NAME]), tensors


def _metadata(content: bytes) -> dict[str, str]:
    """The header's plain values, which safetensors reads from files alone."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length].decode())
    found = header.get("__metadata__") if isinstance(header, dict) else None
    return found if isinstance(found, dict) else {}


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the plain values, and the name, dtype, shape and bytes of each tensor."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
