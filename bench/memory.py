"""Memory of several receivers of one context, the middle third of the layers recomputed, against as many full caches.

    python bench/memory.py --tokens 4096 --receivers 8 --csv memory.csv

A process of its own for each, on the CPU: by how much it grew since after a first round of the same work, with the allocator's
free memory given back to the system, beside the bytes of all distinct storages. The receivers are one model used several times:
only caches are counted. Appending a token to a shared layer copies it, as the last line shows.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import transformers
from reporting import Row, show, write_csv
from rich.progress import track
from transformers import DynamicCache

import droidspeak_ops as ds
from droidspeak_ops.demo.run import load_glossary_variant
from droidspeak_ops.hf.pretrained import SMOLLM2, load_pretrained


class Reading(NamedTuple):
    """Memory of a process: by how much it grew, and the bytes of the storages that are there to be counted."""

    what: str
    resident: int
    storages: int


def middle_third(depth: int) -> ds.Plan:
    return ds.Plan([(depth // 3, 2 * depth // 3)])


def resident_bytes() -> int:
    """The process's resident memory, without what its allocator holds for later."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
        if trim is not None:
            trim(0)
    return psutil.Process().memory_info().rss


def storage_bytes(*owners: Any) -> int:
    """Bytes of the distinct storages of K, V and hidden states in caches and contexts."""
    tensors: list[torch.Tensor] = []
    for owner in owners:
        if isinstance(owner, ds.SharedContext):
            tensors += [rows for kv in owner.keys_values for rows in kv[:2]]
            tensors += [owner.hidden(layer) for layer in owner.hidden_layers]
        else:
            tensors += [rows for layer in owner.layers for rows in (layer.keys, layer.values)]
    return sum({each.data_ptr(): each.nbytes() for each in (rows.untyped_storage() for rows in tensors)}.values())


@torch.no_grad()
def full_caches(sender: Any, receiver: Any, ids: torch.Tensor, receivers: int) -> list[Reading]:
    """transformers' own caches; `sender` has no part in them."""

    def prefill() -> DynamicCache:
        cache = DynamicCache(config=receiver.config)
        receiver(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    prefill()
    before = resident_bytes()
    caches = [prefill() for _ in track(range(receivers), description="full caches")]
    return [Reading("full caches", resident_bytes() - before, storage_bytes(*caches))]


@torch.no_grad()
def shared_context(sender: Any, receiver: Any, ids: torch.Tensor, receivers: int) -> list[Reading]:
    """Partial prefills of one context: with it, without it, and with a token appended by each receiver."""
    depth = receiver.config.num_hidden_layers
    plan = middle_third(depth)

    def capture() -> ds.SharedContext:
        return ds.capture(sender, ids, layers=plan.hidden_layers(depth))

    def append_one(cache: Any) -> None:
        receiver(ids[:, :1], past_key_values=cache, use_cache=True)

    append_one(ds.partial_prefill(receiver, capture(), plan))
    before = resident_bytes()
    context = capture()
    caches = [
        ds.partial_prefill(receiver, context, plan) for _ in track(range(receivers), description="one shared context")
    ]
    readings = [Reading(f"{plan}, context kept", resident_bytes() - before, storage_bytes(context, *caches))]
    del context
    readings.append(Reading(f"{plan}, context released", resident_bytes() - before, storage_bytes(*caches)))
    for cache in caches:
        append_one(cache)
    readings.append(Reading(f"{plan}, one token appended", resident_bytes() - before, storage_bytes(*caches)))
    return readings


Measurement = Callable[[Any, Any, torch.Tensor, int], list[Reading]]


def load_and_read(measurement: Measurement, tokens: int, receivers: int) -> list[Reading]:
    torch.manual_seed(0)
    sender, receiver = load_pretrained(SMOLLM2)[0], load_glossary_variant()[0]
    return measurement(sender, receiver, torch.randint(receiver.config.vocab_size, (1, tokens)), receivers)


def in_fresh_process(measurement: Measurement, tokens: int, receivers: int) -> list[Reading]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(load_and_read, measurement, tokens, receivers).result()


def memory_rows(readings: Iterable[Reading]) -> list[Row]:
    """In MB, and as ratios to the first of the readings."""
    full, *others = readings
    return [
        {
            "what": reading.what,
            "resident_MB": f"{reading.resident / 1e6:.1f}",
            "of_full": f"{reading.resident / full.resident:.3f}" if full.resident else "",
            "storages_MB": f"{reading.storages / 1e6:.1f}",
            "storages_of_full": f"{reading.storages / full.storages:.3f}",
        }
        for reading in (full, *others)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="context tokens")
    parser.add_argument("--receivers", type=int, default=8)
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    args = parser.parse_args(arguments)

    readings = [
        reading
        for measurement in (full_caches, shared_context)
        for reading in in_fresh_process(measurement, args.tokens, args.receivers)
    ]
    title = (
        f"{args.receivers} receivers of one context: SmolLM2-135M-Instruct -> glossary variant, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n{args.tokens} random tokens, float32, {torch.get_num_threads()} CPU threads"
    )
    rows = memory_rows(readings)
    show(rows, title, "resident: growth of the process; storages: bytes of K, V and hidden states, each storage once")
    if args.csv:
        write_csv(rows, title, args.csv)


if __name__ == "__main__":
    main()
