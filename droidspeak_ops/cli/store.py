"""``droidspeak store``."""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..context.entry import Entry
from ..context.fingerprint import ReuseError
from ..context.storage import Stored
from ..context.store import ContextStore


def run(options: argparse.Namespace) -> None:
    """List, show, check or remove contexts."""
    store = ContextStore(options.store)
    actions = {"ls": _list, "show": _show, "verify": _verify, "prune": _prune}
    actions[options.action](store, options)


def _list(store: ContextStore, _: argparse.Namespace) -> None:
    stored = store.stored()
    table = Table(caption=f"{len(stored)} contexts, {_mib(stored)} MiB")
    for column in ("key", "namespace", "model", "weights", "dtype"):
        table.add_column(column, no_wrap=column == "key")
    for column in ("tokens", "hidden states at", "MiB", "used"):
        table.add_column(column, justify="right")
    for each in stored:
        try:
            entry = store.open(each.name)
        except ReuseError:
            about = ("damaged", "", "", "", "", "")
        else:
            if entry is None:  # removed meanwhile
                continue
            about = _columns(entry)
        table.add_row(_key(each)[:12], *about, _mib([each]), _ago(each.used))
    Console().print(table)


def _columns(entry: Entry) -> tuple[str, str, str, str, str, str]:
    sender, layers = entry.manifest.context.sender, entry.manifest.context.hidden_layers
    return (
        entry.manifest.namespace,
        str(sender.architecture.get("model_type", "")),
        (sender.weights or "")[:12],
        str(entry.dtype).removeprefix("torch."),
        f"{entry.num_tokens:,}",
        ", ".join(map(str, sorted(layers))) if len(layers) <= 4 else f"{len(layers)} layers",
    )


def _show(store: ContextStore, options: argparse.Namespace) -> None:
    found = [each for each in store.stored() if _key(each).startswith(options.key)]
    entry = store.open(found[0].name) if len(found) == 1 else None
    if entry is None:
        raise ValueError(f"key: expected the beginning of one context's key, got {options.key}, of {len(found)}")
    context = entry.manifest.context
    rows = {
        "key": entry.manifest.key,
        "file": found[0].name,
        "MiB": _mib(found),
        "used": _ago(found[0].used),
        "namespace": entry.manifest.namespace,
        "tokens": f"{entry.num_tokens:,}",
        "serves": "whole, and by heads of whole blocks" if entry.has_heads else "whole",
        "K and V": f"{context.layers} layers, {str(entry.dtype).removeprefix('torch.')}",
        "hidden states at": ", ".join(map(str, sorted(context.hidden_layers))) or "no layer",
        "kinds of rotations": str(len({*context.rotations} - {None})),
        "weights": context.sender.weights or "",
        "tokenizer": context.sender.tokenizer or "not known",
        "dtype of the sender": context.sender.dtype,
        **{f"architecture: {name}": str(value) for name, value in context.sender.architecture.items()},
        **{f"rope: {name}": str(value) for name, value in context.sender.rope.items()},
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _verify(store: ContextStore, _: argparse.Namespace) -> None:
    stored, damaged = store.stored(), []
    for each in track(stored, "Reading", console=Console(stderr=True)):
        try:
            if (entry := store.open(each.name)) is not None:
                entry.check_all()
        except ReuseError as error:
            damaged.append(str(error))
    if damaged:
        raise ValueError(f"{len(damaged)} of {len(stored)} contexts cannot be read: {'; '.join(damaged)}")
    Console().print(f"{len(stored)} contexts, {_mib(stored)} MiB: all as they were written")


def _prune(store: ContextStore, options: argparse.Namespace) -> None:
    removed = store.prune(options.budget)
    left = store.stored()
    Console().print(f"removed {len(removed)} contexts, {_mib(removed)} MiB; {len(left)} are left, {_mib(left)} MiB")


def _key(stored: Stored) -> str:
    return stored.name.rpartition("/")[2].split(".")[1]


def _mib(stored: list[Stored]) -> str:
    return f"{sum(each.nbytes for each in stored) / 2**20:,.1f}"


def _ago(used: float) -> str:
    """Return the time since then, in the largest unit that it has one of."""
    seconds = max(time.time() - used, 0.0)
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
    size, unit = next((each for each in units if seconds >= each[0]), units[-1])
    return f"{seconds // size:.0f} {unit} ago" if used else "not known"
