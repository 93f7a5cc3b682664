"""Launch configurations on a GPU: tuned offline for the device if there is a file of them, else the kernel's own choice.

Nothing is ever timed in a user's process. ``python -m bench.tune`` writes a file on a GPU; ``DROIDSPEAK_TUNED`` names it.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

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
_KEY_TYPES = dict(zip(KEY, (str, int, int, int, bool, int), strict=True))
_TIMES = ("milliseconds", "default_milliseconds")


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


def load(path: Path, device: str) -> dict[tuple[Any, ...], ProjectSpliceConfig]:
    """Read a file of tuned configurations; empty, with a warning, if it is for another device or Triton.

    Raises:
        ValueError: the file is not what :func:`save` writes.
    """
    from ..kernels.project_splice_config import ProjectSpliceConfig

    # Not by the library's schemas: the operators alone, as the hub has them, need no library but torch and Triton.
    optional = {
        field.name: type(field.default) for field in fields(ProjectSpliceConfig) if field.default is not MISSING
    }
    sizes = {field.name: int for field in fields(ProjectSpliceConfig)} | optional
    table: dict[tuple[Any, ...], ProjectSpliceConfig] = {}
    try:
        text = path.read_bytes().decode()
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_number)
        _check_types(content, {"device": str, "torch": str, "triton": str, "project_splice": list})
        for entry in content["project_splice"]:
            _check_types(entry, {**_KEY_TYPES, "config": dict}, optional=dict.fromkeys(_TIMES, float))
            _check_types(entry["config"], {name: sizes[name] for name in sizes.keys() - optional}, optional=optional)
            key = tuple(entry[name] for name in KEY)
            if key in table:
                raise ValueError(f"{key} more than once")
            table[key] = ProjectSpliceConfig(**entry["config"])
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected a file of tuned configurations, got another ({error}); python -m bench.tune writes one"
        ) from None
    made_on = {name: content[name] for name in ("device", "triton")}
    here = {name: value for name, value in versions(device).items() if name in made_on}
    if made_on != here:
        warnings.warn(f"{path} was tuned for {made_on}, this is {here}: it is not used", stacklevel=2)
        return {}
    return table


def _check_types(described: Any, types: Mapping[str, type], optional: Mapping[str, type] | None = None) -> None:
    """Raise a ValueError unless an object has these fields, of these types and within bounds."""
    known = {**types, **(optional or {})}
    if not isinstance(described, dict) or not types.keys() <= described.keys() <= known.keys():
        raise ValueError(f"expected an object of {', '.join(known)}, got {str(described)[:80]}")
    for name, value in described.items():
        least = 1 if type(value) is int and name != "num_tokens" else 0
        if type(value) is not known[name] or (isinstance(value, (int, float)) and not least <= value < 2**31):
            kind = known[name].__name__
            raise ValueError(f"expected {name} to be {kind}, {least} or more if a number, got {value!r:.80}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a name more than once among {[name for name, _ in pairs]}")
    return found


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"the number {name}")


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
