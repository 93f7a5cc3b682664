"""Memory of several receivers of one context, the middle third of the layers recomputed, against as many full caches.

    python -m bench.memory --tokens 4096 --receivers 8 --csv memory.csv

A process of its own for each, on the CPU: by how much it grew since after a first round of the same work, with the allocator's
free memory given back to the system, beside the bytes of all distinct storages. The receivers are one model used several times:
only caches are counted. Appending a token to a shared layer copies it, as the last line shows.
"""

from __future__ import annotations

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
from rich.progress import track
from transformers import DynamicCache

import droidspeak_ops as ds
from bench.common import Row, parser, setting, show, write_csv
from bench.pairs import PAIRS


class Reading(NamedTuple):
    """Memory of a process.

    Args:
        resident: by how many bytes it grew.
        storages: bytes of the storages that are there to be counted.
    """

    what: str
    resident: int
    storages: int


def middle_third(depth: int) -> ds.Plan:
    """Return the plan that is measured."""
    return ds.Plan([(depth // 3, 2 * depth // 3)])


def resident_bytes() -> int:
    """Return the process's resident memory, without what its allocator holds for later."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
        if trim is not None:
            trim(0)
    return psutil.Process().memory_info().rss


def storage_bytes(*owners: Any) -> int:
    """Return the bytes of the distinct storages of K, V and hidden states in caches and contexts."""
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
    """Measure as many full prefills, into transformers' own caches; `sender` has no part in them."""

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
    """Measure partial prefills of one context: with it, without it, and with a token appended by each receiver."""
    depth = receiver.config.num_hidden_layers
    plan = middle_third(depth)

    def capture() -> ds.SharedContext:
        return ds.capture(sender, ids, layers=plan.hidden_layers(depth))

    def append_one(cache: Any) -> None:
        receiver(ids[:, :1], past_key_values=cache, use_cache=True)

    append_one(ds.partial_prefill(receiver, capture(), plan))
    before = resident_bytes()
    context = capture()
    steps = track(range(receivers), description="one shared context")
    caches = [ds.partial_prefill(receiver, context, plan) for _ in steps]
    readings = [Reading(f"{plan}, context kept", resident_bytes() - before, storage_bytes(context, *caches))]
    del context
    readings.append(Reading(f"{plan}, context released", resident_bytes() - before, storage_bytes(*caches)))
    for cache in caches:
        append_one(cache)
    readings.append(Reading(f"{plan}, one token appended", resident_bytes() - before, storage_bytes(*caches)))
    return readings


Measurement = Callable[[Any, Any, torch.Tensor, int], list[Reading]]


def load_and_measure(measurement: Measurement, tokens: int, receivers: int) -> list[Reading]:
    """Measure the pair of real models, on random tokens."""
    torch.manual_seed(0)
    pair = PAIRS["lora"].load()
    ids = torch.randint(pair.receiver.config.vocab_size, (1, tokens))
    return measurement(pair.sender, pair.receiver, ids, receivers)


def in_fresh_process(measurement: Measurement, tokens: int, receivers: int) -> list[Reading]:
    """Measure in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(load_and_measure, measurement, tokens, receivers).result()


def memory_rows(readings: Iterable[Reading]) -> list[Row]:
    """Return the readings in MB, and as ratios to the first of them."""
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


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command."""
    options = parser("memory", __doc__)
    options.add_argument("--tokens", type=int, default=4096, help="context tokens")
    options.add_argument("--receivers", type=int, default=8)
    options.add_argument("--csv", type=Path, help="also write the table to this file")
    args = options.parse_args(argv)

    readings = [
        reading
        for measurement in (full_caches, shared_context)
        for reading in in_fresh_process(measurement, args.tokens, args.receivers)
    ]
    title = (
        f"{args.receivers} receivers of one context: SmolLM2-135M-Instruct -> glossary variant, "
        f"{args.tokens} random tokens, float32, {setting()}"
    )
    rows = memory_rows(readings)
    show(rows, title, "resident: growth of the process; storages: bytes of K, V and hidden states, each storage once")
    if args.csv:
        write_csv(args.csv, rows, setting=title)
    return rows


if __name__ == "__main__":
    main()
