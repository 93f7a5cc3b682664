"""Launch configurations on a GPU: tuned offline for the device if there is a file of them, else the kernel's own choice.

Nothing is ever timed in a user's process. ``python -m bench.tune`` writes a file on a GPU; ``DROIDSPEAK_TUNED`` names it.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..machine import environment

if TYPE_CHECKING:
    from ..kernels.project_splice_config import ProjectSpliceConfig, Size


@functools.lru_cache(maxsize=4096)  # not without bound: contexts have any number of tokens
def config(device: int, hidden_size: int, size: Size) -> ProjectSpliceConfig:
    """The launch configuration of ``project_splice``."""
    from ..kernels.project_splice_config import project_splice_config

    if os.environ.get("DROIDSPEAK_TUNED") and size.num_layers == 1 and size.num_q_heads == 0:
        key = (str(size.dtype), hidden_size, size.num_kv_heads, size.head_dim, size.has_head_norm)
        for num_tokens, found in _tuned(device, key):
            if num_tokens <= size.num_tokens:
                return found
    return project_splice_config(target(device), size)


# What an entry of a file is found by; `num_tokens` is where it holds from, up to the next one.
KEY = ("dtype", "hidden_size", "num_kv_heads", "head_dim", "has_head_norm", "num_tokens")


@functools.cache
def target(device: int) -> str:
    """The architecture of a GPU as the kernels name it: ``"sm_90"``, ``"gfx942"``, ..."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def versions(device: str) -> dict[str, str]:
    """Return the setting that a timing holds for: the device's name and the versions that compile the kernels."""
    here = environment()
    return {"device": device, **{name: str(here[name]) for name in ("torch", "triton")}}


def save(path: Path, device: str, entries: list[dict[str, Any]]) -> None:
    """Write tuned configurations, as :func:`load` reads them, for the device of that name."""
    path.write_text(json.dumps({**versions(device), "project_splice": entries}, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Entry:
    """A tuned configuration, the shape that it is for, and the times that it was chosen by."""

    dtype: Literal["torch.float32", "torch.float16", "torch.bfloat16"]
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    has_head_norm: bool
    num_tokens: int
    config: dict[str, int | bool]
    milliseconds: float | None = None
    default_milliseconds: float | None = None


@dataclass(frozen=True)
class _File:
    device: str
    torch: str
    triton: str
    project_splice: tuple[_Entry, ...]


def load(path: Path, device: str) -> dict[tuple[Any, ...], ProjectSpliceConfig]:
    """Read a file of tuned configurations; empty, with a warning, if it is for another device or Triton.

    Raises:
        ValueError: the file is not what :func:`save` writes.
    """
    from .. import schema
    from ..kernels.project_splice_config import ProjectSpliceConfig

    content = schema.decode(path.read_bytes(), _File, str(path))
    table: dict[tuple[Any, ...], ProjectSpliceConfig] = {}
    for number, entry in enumerate(content.project_splice):
        where, key = f"{path}: project_splice[{number}]", tuple(getattr(entry, name) for name in KEY)
        config = schema.convert(entry.config, ProjectSpliceConfig, where)
        sizes = {name: value for name, value in vars(config).items() if not isinstance(value, bool)}
        if min(*key[1:4], key[5] + 1, *sizes.values()) < 1:
            raise ValueError(f"{where}: expected sizes of 1 or more, got {key} and {sizes}")
        if key in table:
            raise ValueError(f"{where}: expected one configuration for {key}, got two")
        table[key] = config
    made_on = {"device": content.device, "triton": content.triton}
    here = {name: value for name, value in versions(device).items() if name in made_on}
    if made_on != here:
        warnings.warn(f"{path} was tuned for {made_on}, this is {here}: it is not used", stacklevel=2)
        return {}
    return table


@functools.cache
def _tuned(device: int, key: tuple[Any, ...]) -> list[tuple[int, ProjectSpliceConfig]]:
    """Entries of the file for a shape: numbers of tokens, the largest first, and the configuration from there on."""
    table = _tuned_file(device)
    return sorted(
        ((tokens, table[*same, tokens]) for *same, tokens in table if tuple(same) == key),
        reverse=True,
        key=lambda found: found[0],
    )


@functools.cache
def _tuned_file(device: int) -> dict[tuple[Any, ...], ProjectSpliceConfig]:
    return load(Path(os.environ["DROIDSPEAK_TUNED"]), torch.cuda.get_device_name(device))
