"""Everything that a GPU has to say about this project, in one run of a few minutes.

    python -m bench.gpu --out FOLDER

Each step is a process of its own with a time limit: one that hangs, or whose kernels leave the GPU's context unusable, costs
its own remaining rows and no more. Rows are in ``FOLDER/gpu.json`` about a second after they exist, and at last in ``gpu.csv``
and ``gpu.png``; ``gpu.log`` has what the steps printed, ``trace.json.gz`` a profiler's trace, and ``tuned.json`` the launch
configurations that won. ``--dry`` runs all of it on the CPU at tiny sizes, which shows that it works and says nothing about
kernels.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common import Row, checkout, environment, parser, write_csv
from bench.gpu_steps import report
from bench.gpu_steps.step import read_rows, summary
from droidspeak_ops.files import replacing

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 8  # with less left a step would end before its imports do


class Limit(NamedTuple):
    """The module of a step, and the seconds that it may take."""

    module: str
    seconds: float


STEPS = {
    "ceilings": Limit("ceilings", 40),
    "tests": Limit("checks", 130),
    "micro": Limit("micro", 90),
    "ttft": Limit("models", 140),
    "graph": Limit("models", 40),
    "trace": Limit("models", 60),
    "tune": Limit("tune", 60),
}
"""The steps, in order of value."""


class Run:
    """The steps one after another, and what is known of them so far."""

    def __init__(self, folder: Path, seconds: float, dry: bool, commit: str | None) -> None:
        self.folder, self.dry = folder, dry
        self.deadline = time.monotonic() + seconds
        self.result: dict[str, Any] = {**setting(dry, commit), "steps": {}}

    def step(self, name: str, scratch: Path) -> None:
        """Run one step until it ends, or its time does."""
        module, limit = STEPS[name]
        seconds = min(limit, self.deadline - time.monotonic())
        state = self.result["steps"][name] = {"status": "running", "seconds": 0.0, "rows": []}
        if seconds < LEAST_SECONDS:
            state["status"] = "skipped: no time was left"
            self.write()
            return
        rows, began = scratch / f"{name}.jsonl", time.monotonic()

        def update() -> None:
            state.update(rows=read_rows(rows), seconds=round(time.monotonic() - began, 1))
            self.write()

        options = ["--rows", str(rows), "--out", str(self.folder), "--seconds", str(seconds)]
        with self._process(module, name, *options) as process:
            while process.poll() is None and time.monotonic() - began < seconds:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
                update()
            code = process.poll()
        ended = "done" if code == 0 else f"failed: exit code {code}"
        state["status"] = "killed: out of time" if code is None else ended
        update()

    @contextlib.contextmanager
    def _process(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """Start the process of a step, and end it with all that it has started."""
        command = [sys.executable, "-m", "bench.gpu_steps.child", *arguments, *(["--dry"] if self.dry else [])]
        with (self.folder / "gpu.log").open("a", encoding="utf-8") as log:
            log.write(f"\n===== {arguments[1]} =====\n")
            log.flush()
            # A group of its own, to end all that it has started; but no session of its own, which might outlive this one's.
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=_variables(self.dry), process_group=0
            )
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what it started may be there when it is not
                process.wait()

    def write(self) -> None:
        """Write what is known; whole or not at all, as a step may be reading it."""
        with replacing(self.folder / "gpu.json") as scratch:
            scratch.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")


def _variables(dry: bool) -> dict[str, str]:
    """Return the environment variables of a step, by which it finds the package and its benches, installed or not."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    made = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    return {**made, "OMP_NUM_THREADS": "1"} if dry else made  # tiny tensors are not worth threads


def setting(dry: bool, commit: str | None) -> Row:
    """Return the setting that the figures hold for."""
    return {
        **environment("cpu" if dry else "cuda"),
        **({"device": "CPU, tiny sizes"} if dry else {}),
        **({"commit": commit, "changed_since_commit": None} if commit else checkout()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _stop(*_: Any) -> None:
    sys.exit("stopped")


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command; the rows are those of all steps, with `step` in front."""
    options = parser("gpu", __doc__)
    options.add_argument("--out", type=Path, required=True, help="folder for the results")
    options.add_argument("--steps", default=",".join(STEPS), help="some of %(default)s")
    options.add_argument("--minutes", type=float, default=7, help="for all steps together")
    options.add_argument("--commit", help="of the sources, where this is no checkout")
    options.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    args = options.parse_args(argv)
    names = args.steps.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        options.error(f"--steps: expected some of {','.join(STEPS)}, got {','.join(unknown)}")
    if not args.dry and not torch.cuda.is_available():
        print("Nothing was timed: a GPU is needed, or --dry to try the bench itself.")
        return []

    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.log").write_text("", encoding="utf-8")
    previous = signal.signal(signal.SIGTERM, _stop)  # so that a step ends with this
    try:
        run = Run(folder, 60 * args.minutes, args.dry, args.commit)
        with tempfile.TemporaryDirectory() as scratch:
            for name in names:
                run.step(name, Path(scratch))
                write_csv(folder / "gpu.csv", report.all_rows(run.result), **report.setting(run.result))
                state = run.result["steps"][name]
                print(f"{name}: {state['status']}, {state['seconds']} s, {len(state['rows'])} rows", flush=True)
    finally:
        signal.signal(signal.SIGTERM, previous)
    try:
        report.plot(run.result, folder / "gpu.png")
    except Exception as error:  # the figures are on disk, and the table is still to come
        print(f"no plot: {summary(error)}")
    print("\n".join(report.table(run.result)), flush=True)
    return report.all_rows(run.result)


if __name__ == "__main__":
    main()
