"""Damaged files for every reader of files: each has to give the right value or an error that names the file.

    python -m bench.fuzz --inputs 20000 --seed 0

Bytes are flipped, cut, inserted, repeated and swapped, and texts encoded otherwise. In JSON, fields and items are removed,
renamed, doubled and swapped, and values replaced by others: huge, negative or no numbers, other types, deep nesting. Files with
a digest or checksums are damaged before these are made, too, as whoever wrote the file could have done.

`same` counts inputs that were read as what was written, `valid` those that are another value of the kind, which was then used
and written again: allowed only where no digest tells. `named` counts ValueErrors that name the file, and OSErrors. Anything
else is a failure, among it running out of the memory that the process is given; `peak_MiB` is by how much memory grew. An input
depends on the seed, the reader and its number alone, so ``--readers NAME --number N`` repeats it.
"""

from __future__ import annotations

import random
import resource
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.progress import track

import droidspeak_ops as ds
from bench.common import Row, parser, show
from bench.fuzzing.readers import Reader, make_readers

MEMORY = 4 << 30
"""Bytes that the process may allocate beyond what it has when it starts."""

INPUT = "input.file"


def outcome(reader: Reader, seed: int, number: int, path: Path) -> str:
    """Damage a file, read it, and return what came of it: ``"same"``, ``"valid"`` or ``"named"``.

    Raises:
        Exception: whatever the reader should not have raised, or an AssertionError that says what it should not have returned.
    """
    rng = random.Random(f"{seed} {reader.name} {number}")
    which = rng.randrange(len(reader.wholes))
    whole, expected = reader.wholes[which], reader.expected[which]
    is_sealed = bool(reader.sealed) and rng.random() < 0.5
    path.write_bytes(rng.choice(reader.sealed if is_sealed else reader.damages)(whole, rng))
    try:
        found = reader.read(path)
    except OSError:
        return "named"
    except ValueError as error:
        if type(error) in (ValueError, ds.ReuseError) and (reader.named or str(path)) in str(error):
            return "named"
        raise
    if reader.identity(found) == expected or (reader.prefix and expected.startswith(found)):
        return "same"
    assert is_sealed or not reader.has_digest, "a damaged file was read as another value"
    path.write_bytes(found)
    again = reader.identity(reader.read(path))
    assert again == reader.identity(found), "what was read comes back as another value"
    return "valid"


def fuzz(reader: Reader, inputs: Sequence[int], seed: int) -> tuple[Row, list[str]]:
    """Return a row of the outcomes of a reader's inputs, and the failures."""
    counts, failures, before = Counter[str](), [], _peak()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for number in track(inputs, description=reader.name, console=Console(stderr=True)):
            try:
                counts[outcome(reader, seed, number, Path(folder) / INPUT)] += 1
            except Exception:
                last = traceback.format_exc(limit=-3)
                failures.append(f"{reader.name}: seed {seed}, input {number}: {last}")
    return {
        "reader": reader.name, "inputs": len(inputs), **{name: counts[name] for name in ("same", "valid", "named")},
        "failures": len(failures), "peak_MiB": (_peak() - before) >> 10,
    }, failures  # fmt: skip


def _peak() -> int:
    """The most memory that the process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Have allocations fail beyond :data:`MEMORY`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command; exit with 1 if an input had another outcome than those allowed."""
    readers = {reader.name: reader for reader in make_readers()}
    options = parser("fuzz", __doc__)
    options.add_argument("--inputs", type=int, default=20_000, help="for each reader")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--readers", nargs="+", choices=list(readers), default=list(readers))
    options.add_argument("--number", type=int, help="this input alone")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    inputs = range(args.inputs) if args.number is None else [args.number]
    with bounded_memory():
        results = [fuzz(readers[name], inputs, args.seed) for name in args.readers]
    rows = [row for row, _ in results]
    show(rows, f"damaged files, seed {args.seed}")
    failures = [failure for _, of_reader in results for failure in of_reader]
    for failure in failures[:20]:
        print(failure)
    if failures:
        raise SystemExit(1)
    return rows


if __name__ == "__main__":
    main()
