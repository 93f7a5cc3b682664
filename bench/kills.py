"""Processes that are killed at any moment: whether files are whole, and runs that go on end like one that was left alone.

    python -m bench.kills --csv kills.csv

`SIGKILL` comes at a moment that is drawn from a whole run, or where a file is being written. What lies under the name of the
result is then what was there before, or the whole result; and a run that goes on, after one kill or several, ends with the
result of one that was left alone. Of two runs with one journal the second is refused until the first is gone.

`while_writing` counts kills at which a file was being written, `left` the scratch files that they left behind, and `ends` the
runs that went on to the end. The exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import Progress

import droidspeak_ops as ds
from bench.common import Row, checkout, parser, setting, show, write_csv
from bench.threads import COSTS, KINDS, LAYERS, of_context, tiny_examples, tiny_pair
from droidspeak_ops.fitting.run import fit
from droidspeak_ops.hf.smollm2 import fetch_smollm2, is_whole
from droidspeak_ops.profiling.run import profile

RESULT, JOURNAL, DOWNLOAD, STORE = "result", "journal", "download and conversion", "ContextStore.save"
WRITING = 0.4
"""Share of kills that wait until a file is being written."""
_LOOK = 2e-4  # seconds between looks for a file

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__spec__.name])  # so that a process is there in an instant
warnings.filterwarnings(
    "ignore", f"'{__spec__.name}' found in sys.modules", RuntimeWarning
)  # in each, if this is run by -m

Run = Callable[[], Any]


class Target(NamedTuple):
    """A writer that is killed.

    Args:
        prepare: called in the process, with a folder of the run's; returns the run.
        read: returns a digest of the result, or raises.
        kills: how many times.
        old: the file or folder that lies under the result's name before the first run; None if nothing does.
        together: kills before a run is let through to its end.
        second_runs: how many runs are stopped while a second is started with the same journal.
        repeats: whether the run is done again and again until it is killed.
        result: the name of the result in the folder.
        scratch: pattern of files in the folder that are being written.
    """

    prepare: Callable[[Path], Run]
    read: Callable[[Path], str]
    kills: int
    old: Path | None
    together: int = 1
    second_runs: int = 0
    repeats: bool = False
    result: str = RESULT
    scratch: str = ".*.*.*"

    def begin(self, folder: Path) -> None:
        """Put into an empty folder what lies there before the first run."""
        if self.old is not None:
            (shutil.copytree if self.old.is_dir() else shutil.copy)(self.old, folder / self.result)

    def content(self, folder: Path) -> str | None:
        """Return a digest of the result, or the error that reading it ends with; None where there is nothing."""
        path = folder / self.result
        try:
            return self.read(path) if path.exists() else None
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def written(self, folder: Path) -> set[Path]:
        """Return the files that are being written, or were when a run was killed."""
        try:
            return set(folder.glob(self.scratch))
        except FileNotFoundError:  # a folder is gone that was there
            return set()


def fitting(folder: Path) -> Run:
    """Return a run that fits maps and saves them."""
    pair, examples = tiny_pair(KINDS["plain"]), tiny_examples(3)
    return lambda: fit(*pair, examples, steps=2, show_progress=False).save(folder / RESULT)


def profiling(folder: Path) -> Run:
    """Return a run that profiles with a journal and saves the frontier."""
    pair, examples = tiny_pair(KINDS["plain"]), tiny_examples(6)
    options = {"costs": COSTS, "journal": folder / JOURNAL, "show_progress": False}
    return lambda: profile(*pair, examples, **options).save(folder / RESULT)


def saving(kind: Any, inputs: Path, folder: Path) -> Run:
    """Return a run that saves one thing and another in turns, both of a kind."""
    one, other = (kind.load(inputs / name) for name in ("one", "other"))

    def run() -> None:
        for each in (one, other, one):
            each.save(folder / RESULT)

    return run


def storing(inputs: Path, folder: Path) -> Run:
    """Return a run that saves one context and another of the same tokens in turns, and where there is room a larger one.

    Of what is larger nothing is expected: it is there so that a small disk is full.
    """
    one, other, larger = (ds.SharedContext.load(inputs / name) for name in ("one", "other", "larger"))
    store = ds.ContextStore(folder / RESULT)

    def run() -> None:
        for each in (one, larger, other, one):
            with suppress(OSError) if each is larger else nullcontext():
                store.save(each)

    return run


def fetching(folder: Path) -> Run:
    """Return a run that downloads and converts SmolLM2."""
    return partial(fetch_smollm2, folder)


def targets(inputs: Path) -> dict[str, Target]:
    """Return what is killed, with what the runs need in the folder `inputs`."""
    sender, receiver = tiny_pair(KINDS["plain"])
    examples = tiny_examples(4)
    made = {
        ds.Maps: [fit(sender, receiver, examples[:count], steps=2, show_progress=False) for count in (4, 3)],
        ds.SharedContext: [
            ds.capture(sender, torch.randint(101, (1, tokens)), layers=range(LAYERS)) for tokens in (400, 300)
        ],
        ds.Frontier: [
            profile(sender, receiver, examples[:count], costs=COSTS, show_progress=False) for count in (4, 3)
        ],
    }
    for kind, values in made.items():
        (inputs / kind.__name__).mkdir()
        for name, value in zip(("one", "other"), values, strict=True):
            value.save(inputs / kind.__name__ / name)
    in_store = inputs / ds.ContextStore.__name__
    in_store.mkdir()
    one, larger = (ds.capture(sender, torch.randint(101, (1, tokens)), layers=range(LAYERS)) for tokens in (400, 1200))
    for name, value in {"one": one, "other": one.quantized(torch.int8), "larger": larger}.items():
        value.save(in_store / name)
    ds.ContextStore(in_store / "store").save(one.quantized(torch.int8))
    old = {kind: inputs / kind.__name__ / "other" for kind in made}
    read = {ds.Maps: read_maps, ds.SharedContext: read_context, ds.Frontier: read_frontier}
    return {
        "fit": Target(fitting, read_maps, 40, old[ds.Maps]),
        "profile": Target(profiling, read_frontier, 60, old[ds.Frontier], together=3, second_runs=10),
        **{
            f"{kind.__name__}.save": Target(partial(saving, kind, path.parent), read[kind], 30, path, repeats=True)
            for kind, path in old.items()
        },
        STORE: Target(
            partial(storing, in_store),
            partial(read_stored, one),
            200,
            in_store / "store",
            repeats=True,
            scratch=f"{RESULT}/*/.*.*.*",
        ),
        DOWNLOAD: Target(
            fetching, read_folder, 10, None, together=10, result="SmolLM2-135M-Instruct", scratch="*/model/*"
        ),
    }


def read_maps(path: Path) -> str:
    """Return the digest of saved maps."""
    return ds.Maps.load(path).digest()


def read_context(path: Path) -> str:
    """Return a digest of a saved context."""
    return of_context(ds.SharedContext.load(path))


def read_stored(context: ds.SharedContext, path: Path) -> str:
    """Return a digest of what a store has in the place of a context.

    Raises:
        ValueError: it has nothing there, or something that is damaged.
    """
    store = ds.ContextStore(path)
    for each in store.stored():
        if (entry := store.open(each.name)) is not None:
            entry.check_all()
    found = store.load(context.tokens, context.sender)
    if found is None:
        raise ValueError(f"{path}: expected a context, got none")
    return of_context(found)


def read_frontier(path: Path) -> str:
    """Return a saved frontier in words."""
    return repr(ds.Frontier.load(path))


def read_folder(path: Path) -> str:
    """Return a digest of the files in a folder, but for its marker, which has times in it.

    Raises:
        ValueError: they are not those of the marker.
    """
    if not is_whole(path):
        raise ValueError(f"{path}: expected a whole folder, got another")
    digest = hashlib.sha256()
    for file in sorted(each for each in path.iterdir() if not each.name.startswith(".")):
        digest.update(f"{file.relative_to(path)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _in_process(prepare: Callable[[Path], Run], folder: Path, repeats: bool, parent: Connection) -> None:
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # progress bars, and what is said where a pipe to a process breaks
        os.dup2(nowhere, stream)
    run = prepare(folder)
    parent.send(None)
    try:
        run()
        while repeats:
            run()
    except Exception as error:
        parent.send(f"{type(error).__name__}: {error}")
        return
    parent.send(None)


@contextmanager
def running(target: Target, folder: Path, *, repeats: bool = False) -> Iterator[tuple[ForkServerProcess, Connection]]:
    """Start a process that has prepared the run; it is killed in the end, if it is there yet."""
    here, there = _processes.Pipe()
    process = _processes.Process(target=_in_process, args=(target.prepare, folder, repeats, there))
    process.start()
    there.close()
    try:
        here.recv()
        yield process, here
    finally:
        process.kill()
        process.join()
        here.close()


def to_the_end(target: Target, folder: Path) -> tuple[str | None, float]:
    """Run to the end; return the error that it ended with, and the seconds that it took."""
    with running(target, folder) as (_, ended):
        began = time.perf_counter()
        return ended.recv(), time.perf_counter() - began


def kill(target: Target, folder: Path, moment: float | None) -> bool:
    """Start a run and kill it after `moment` seconds, or where a file is being written; return False if it ended before."""
    before = target.written(folder)
    with running(target, folder, repeats=target.repeats) as (process, ended):
        if moment is not None:
            ended.poll(moment)
        else:
            while not ended.poll(_LOOK) and target.written(folder) <= before:
                pass
        process.kill()
        process.join()
        return process.exitcode == -signal.SIGKILL


class Found(NamedTuple):
    """Kills, at how many of them a file was being written, scratch files that are left, and what was wrong."""

    kills: int
    while_writing: int
    left: int
    wrong: list[str]


def kill_and_go_on(target: Target, seconds: float, whole: str | None, rng: random.Random) -> Found:
    """Kill runs in one folder, and let one through to the end.

    Args:
        target: of which `together` runs are killed, or fewer if one ended before.
        seconds: how long a run takes.
        whole: the content of the result of a run that was left alone.
        rng: draws the moments.
    """
    kills = while_writing = 0
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        target.begin(folder)
        right = {target.content(folder), whole}
        for _ in range(target.together):
            before = target.written(folder)
            if not kill(target, folder, None if rng.random() < WRITING else rng.uniform(0, seconds)):
                break
            kills += 1
            while_writing += not target.written(folder) <= before
            if (found := target.content(folder)) not in right:
                wrong.append(f"expected the old or the new result, got {found}")
        wrong += _wrong_end(target, folder, whole)
        return Found(kills, while_writing, len(target.written(folder)), wrong)


def second_run(target: Target, seconds: float, whole: str | None, rng: random.Random) -> Found:
    """Stop a run that holds the journal, start a second, which is to be refused, and after the kill of the first a third."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        target.begin(folder)
        with running(target, folder) as (process, ended):
            while not (folder / JOURNAL).exists() and not ended.poll(_LOOK):
                pass
            ended.poll(rng.uniform(0, seconds / 3))
            os.kill(process.pid, signal.SIGSTOP)
            error, _ = to_the_end(target, folder)
        refused = error is not None and "expected one run at a time" in error
        wrong = [] if refused else [error or "a second run with the journal of the first"]
        wrong += _wrong_end(target, folder, whole)
        return Found(1, 0, len(target.written(folder)), wrong)


def _wrong_end(target: Target, folder: Path, whole: str | None) -> list[str]:
    """Run to the end, and return what is wrong with it."""
    error, _ = to_the_end(target, folder)
    if error is not None:
        return [error]
    found = target.content(folder)
    return [] if found == whole else [f"expected the result of a run left alone, got {found}"]


def left_alone(target: Target) -> tuple[float, str | None]:
    """Return the seconds that a run takes, and the content of its result."""
    with tempfile.TemporaryDirectory() as scratch:
        target.begin(Path(scratch))
        error, seconds = to_the_end(target, Path(scratch))
        if error is not None:
            raise RuntimeError(error)
        return seconds, target.content(Path(scratch))


def measure(name: str, target: Target, rng: random.Random) -> list[Row]:
    """Return the row of a target's kills, and for a run with a journal that of second runs."""
    seconds, whole = left_alone(target)
    found: list[Found] = []
    with Progress() as progress:
        task = progress.add_task(name, total=target.kills)
        while (left := target.kills - sum(each.kills for each in found)) > 0:
            some = target._replace(together=min(target.together, left))
            found.append(kill_and_go_on(some, seconds, whole, rng))
            progress.advance(task, found[-1].kills)
    rows = [_row(name, seconds, found)]
    if target.second_runs:
        second = [second_run(target, seconds, whole, rng) for _ in range(target.second_runs)]
        rows.append(_row(f"{name}, a second run", seconds, second))
    return rows


def _row(name: str, seconds: float, found: Sequence[Found]) -> Row:
    wrong = [each for one in found for each in one.wrong]
    return {
        "what": name,
        "seconds": f"{seconds:.2g}",
        "kills": sum(each.kills for each in found),
        "while_writing": sum(each.while_writing for each in found),
        "left": sum(each.left for each in found),
        "ends": len(found),
        "wrong": len(wrong),
        "first": next(iter(wrong), "")[:200],
    }


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command."""
    options = parser("kills", __doc__)
    options.add_argument("--seed", type=int, default=0, help="of the moments")
    options.add_argument("--only", nargs="+", metavar="WHAT", help="of the table's first column, such as 'fit'")
    options.add_argument("--csv", type=Path, help="also write the table to this file")
    args = options.parse_args(argv)

    rng, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as inputs:
        for name, target in targets(Path(inputs)).items():
            if args.only is None or name in args.only:
                rows += measure(name, target, rng)
    show(rows, f"processes that are killed, seed {args.seed}, {setting()}")
    if args.csv:
        write_csv(args.csv, rows, seed=args.seed, setting=setting(), **checkout())
    return rows


if __name__ == "__main__":
    sys.exit(any(row["wrong"] for row in main()))
