"""Stores of contexts: processes that read, write and evict together, a full disk, and how fast a context is loaded.

    python -m bench.store --csv store.csv

- `together`: processes that save, load, find and remove contexts of one store, whose budget holds half of them, for a minute.
  All that is read is compared bit by bit; an error, or a process that does not end, is wrong.
- `full disk`: the kills of ``python -m bench.kills``, on a disk of 2 MiB, which one context fits on twice and another never:
  what lies there before a kill or after is the old context or the new one. Needs leave to mount a tmpfs.
- `load`: a context of SmolLM2, read from a store with all digests checked, against `dd` of its file in blocks of 1 MiB; with
  the file dropped from memory, and with it held there (`cached`). There `dd` copies to one place again and again, and a context
  needs memory, as `dd` does in one block (`dd_one_block_ms`).

The exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import droidspeak_ops as ds
from bench import kills
from bench.common import Row, checkout, parser, setting, show, write_csv
from bench.small_contexts import SENDER, head, make_context, make_tokens
from droidspeak_ops.context.keys import BLOCK
from droidspeak_ops.context.kv import KV

LENGTHS = (40, BLOCK, 2 * BLOCK, 2 * BLOCK + 30, 3 * BLOCK + 1)
SEEDS = 4
BUDGET = 350_000  # bytes; all contexts have twice as many
PATIENCE = 30.0
"""Seconds beyond which a process does not end."""
DISK = 2 << 20  # bytes; a context of the kills has 0.7 MiB, the larger one 2.1

_processes = multiprocessing.get_context("forkserver")


# --- processes together ------------------------------------------------------------------------------------------------------


def _contexts(seed: int) -> list[ds.SharedContext]:
    """Return heads of one context, the longest last."""
    whole = make_context(make_tokens(LENGTHS[-1], seed))
    return [head(whole, length) for length in LENGTHS]


def _step(store: ds.ContextStore, rng: random.Random) -> str:
    """Do one thing with a store, and return what came of it.

    Raises:
        AssertionError: it gave wrong bytes.
    """
    contexts = _contexts(rng.randrange(SEEDS))
    context, action = rng.choice(contexts), rng.choice(["save", "load", "find", "prune"])
    if action == "save":
        store.save(context)
        return "written"
    if action == "prune":
        store.prune(rng.randrange(2 * BUDGET))
        return "pruned"
    if action == "load":
        found = store.load(context.tokens, SENDER)
        assert found is None or found.tokens.shape == context.tokens.shape, "another length was loaded"
    else:
        found = store.find(torch.cat([context.tokens, make_tokens(3, SEEDS)], 1), SENDER)
    if found is None:
        return "missed"
    expected = head(contexts[-1], found.tokens.shape[1])
    assert kills.of_context(found) == kills.of_context(expected), "wrong bytes were read"
    return "read"


def _work(url: Path, seconds: float, seed: str, outcomes: Any) -> None:
    torch.set_num_threads(1)
    rng, store, counts, first = random.Random(seed), ds.ContextStore(url, budget=BUDGET), Counter[str](), ""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            counts[_step(store, rng)] += 1
        except Exception as error:
            counts["wrong"] += 1
            first = first or f"{type(error).__name__}: {error}"
    outcomes.put((counts, first))


def together(folder: Path, processes: int, seconds: float, seed: int) -> Row:
    """Have processes read, write and evict in one store; return the row of what came of it."""
    outcomes = _processes.Queue()
    workers = [
        _processes.Process(target=_work, args=(folder, seconds, f"{seed} {number}", outcomes))
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    found, end = [], time.monotonic() + seconds + PATIENCE
    for _ in workers:
        try:
            found.append(outcomes.get(timeout=max(end - time.monotonic(), 0.0)))
        except Exception:  # empty: it does not end
            found.append((Counter(wrong=1), f"a process that is there after {PATIENCE:.0f} seconds"))
    for worker in workers:
        worker.kill()
        worker.join()
    counts = sum((each for each, _ in found), Counter[str]())
    return {
        "what": f"together: {processes} processes", "seconds": seconds,
        **{name: counts[name] for name in ("read", "missed", "written", "pruned", "wrong")},
        "first": next((first for _, first in found if first), "")[:200],
    }  # fmt: skip


# --- a full disk -------------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(nbytes: int) -> Iterator[Path]:
    """Mount a tmpfs of so many bytes, in which temporary folders are made meanwhile.

    Raises:
        subprocess.CalledProcessError: there is no leave to.
    """
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", folder], check=True, capture_output=True
        )
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before
            subprocess.run(["umount", folder], check=True)


def full_disk(number: int, rng: random.Random) -> Row:
    """Kill writers on a disk that is too small for some of what they write; return the row of what came of it."""
    with tempfile.TemporaryDirectory() as inputs:
        target = kills.targets(Path(inputs))[kills.STORE]._replace(kills=number)
        with small_disk(DISK):
            (row,) = kills.measure("full disk", target, rng)
    return row


# --- loading -----------------------------------------------------------------------------------------------------------------


def smollm2_context(tokens: int, layers: Sequence[int] = (10, 20)) -> ds.SharedContext:
    """Return a random context of the shape of SmolLM2's, with hidden states at two layers."""
    sizes = {
        "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "head_dim": 64,
    }  # fmt: skip
    sender = ds.Fingerprint(sizes, {"rope_type": "default"}, "bfloat16", "0" * 64)
    rows = [KV(*torch.randn(2, 1, 3, tokens, 64).bfloat16()) for _ in range(30)]
    angles = torch.randn(tokens, 32)
    hidden = {layer: torch.randn(1, tokens, 576).bfloat16() for layer in layers}
    return ds.SharedContext(
        torch.randint(49152, (1, tokens)), rows, hidden, [(angles.cos(), angles.sin())] * 30, sender
    )


def loads(folder: Path, tokens: int, repeats: int) -> list[Row]:
    """Return the times of loading a context, and of dd over its file, in turns: medians in milliseconds, and a ratio."""
    context, store = smollm2_context(tokens), ds.ContextStore(folder)
    store.save(context)
    (stored,) = store.stored()
    path = folder / stored.name
    rows: list[Row] = []
    for cached in (True, False):
        runs = {
            "dd": lambda: _dd(path, 1 << 20),
            "one block": lambda: _dd(path, stored.nbytes),
            "load": lambda: _load(store, context),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats + 1):
            for name, run in runs.items():
                if not cached:
                    _drop(path)
                times[name].append(run())
        dd, one_block, load = (1e3 * statistics.median(each[1:]) for each in times.values())  # the first one warms up
        rows.append(
            {
                "what": "load, cached" if cached else "load, from disk", "tokens": tokens,
                "MiB": round(stored.nbytes / 2**20, 1),
                "dd_ms": round(dd, 1), "dd_one_block_ms": round(one_block, 1),
                "load_ms": round(load, 1), "ratio": round(load / dd, 2),
            }
        )  # fmt: skip
    return rows


def _dd(path: Path, block: int) -> float:
    """Return the seconds that dd says it took to read a file in blocks of so many bytes."""
    command = ["dd", f"if={path}", "of=/dev/null", f"bs={block}", "iflag=fullblock"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stderr
    took = re.search(r"copied, ([\d.e-]+) s", said)
    assert took is not None, said
    return float(took[1])


def _load(store: ds.ContextStore, context: ds.SharedContext) -> float:
    """Return the seconds that it takes to have all of a context, asked for ahead as a prefill does."""
    began = time.perf_counter()
    found = store.load(context.tokens, context.sender)
    assert found is not None
    reads = [("hidden", layer) for layer in found.hidden_layers] + [("kv", layer) for layer in range(found.num_layers)]
    found.prefetch(reads)
    found.wait(reads)
    return time.perf_counter() - began


def _drop(path: Path) -> None:
    """Have the next read of a file come from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command."""
    options = parser("store", __doc__)
    options.add_argument(
        "--only", nargs="+", choices=["together", "disk", "load"], default=["together", "disk", "load"]
    )
    options.add_argument("--processes", type=int, default=8)
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--kills", type=int, default=200, help="on a full disk")
    options.add_argument("--tokens", type=int, default=4096, help="of the context that is loaded")
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--csv", type=Path, help="also write the tables to this file")
    args = options.parse_args(argv)

    tables: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "together" in args.only:
            tables["together"] = [together(Path(folder) / "together", args.processes, args.seconds, args.seed)]
        if "disk" in args.only:
            tables["disk"] = [full_disk(args.kills, random.Random(args.seed))]
        if "load" in args.only:
            tables["load"] = loads(Path(folder) / "load", args.tokens, args.repeats)
    rows = [row for table in tables.values() for row in table]
    for name, table in tables.items():
        show(table, f"{name}, seed {args.seed}, {setting()}")
    if args.csv:
        write_csv(args.csv, rows, seed=args.seed, setting=setting(), **checkout())
    return rows


if __name__ == "__main__":
    sys.exit(any(row.get("wrong") for row in main()))
