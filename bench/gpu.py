"""Everything that a GPU has to say about this project, in one run of a few minutes.

    python bench/gpu.py --out FOLDER

Each step is a process of its own with a time limit: one that hangs, or whose kernels leave the GPU's context unusable, costs
its own remaining rows and no more. Rows are in ``FOLDER/gpu.json`` about a second after they exist, and at last in ``gpu.csv``
and ``gpu.png``; ``gpu.log`` has what the steps printed, ``trace.json.gz`` a profiler's trace, and ``tuned.json`` the launch
configurations that won. ``--dry`` runs all of it on the CPU at tiny sizes, which shows that it works and says nothing about
kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_report
import torch
from gpu_rows import Step, read_rows, summary

ROOT = Path(__file__).resolve().parents[1]

# In order of value: the module that has it, and the seconds that it may take.
STEPS = {
    "ceilings": ("gpu_kernels", 40),
    "tests": ("gpu_checks", 100),
    "micro": ("gpu_kernels", 90),
    "ttft": ("gpu_models", 120),
    "graph": ("gpu_models", 40),
    "trace": ("gpu_models", 60),
    "tune": ("gpu_tune", 60),
}
LEAST_SECONDS = 8  # with less left a step would end before its imports do


# --- one step -------------------------------------------------------------------------------------------------------------


def run_step(name: str, step: Step) -> None:
    """Run one step, in the child process."""
    try:
        function: Callable[[Step], None] = getattr(importlib.import_module(STEPS[name][0]), name)
        with torch.no_grad():
            function(step)
    except Exception as error:
        traceback.print_exc()
        step.add("error", error=summary(error))
        sys.exit(1)


# --- all steps ------------------------------------------------------------------------------------------------------------


class Run:
    """The steps one after another, and what is known of them so far."""

    def __init__(self, folder: Path, seconds: float, dry: bool, commit: str | None) -> None:
        self.folder, self.dry = folder, dry
        self.deadline = time.monotonic() + seconds
        self.result: dict[str, Any] = {**setting(dry, commit), "steps": {}}

    def step(self, name: str, scratch: Path) -> None:
        """Run one step until it ends, or its time does."""
        seconds = min(STEPS[name][1], self.deadline - time.monotonic())
        state = self.result["steps"][name] = {"status": "running", "seconds": 0.0, "rows": []}
        if seconds < LEAST_SECONDS:
            state["status"] = "skipped: no time was left"
            return self.write()
        partial, began = scratch / f"{name}.jsonl", time.monotonic()
        command = [
            sys.executable, str(Path(__file__).resolve()), "--out", str(self.folder), "--step", name, "--partial", str(partial),
            "--seconds", str(seconds), *(["--dry"] if self.dry else []),
        ]  # fmt: skip
        with (self.folder / "gpu.log").open("a", encoding="utf-8") as log:
            log.write(f"\n===== {name} =====\n")
            log.flush()
            # A group of its own, to end all that it has started; but no session of its own, which might outlive this one's.
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment(self.dry), process_group=0
            )
            try:
                while process.poll() is None and time.monotonic() - began < seconds:
                    try:
                        process.wait(timeout=1)
                    except subprocess.TimeoutExpired:
                        state.update(rows=read_rows(partial), seconds=round(time.monotonic() - began, 1))
                        self.write()
            finally:
                code = process.poll()
                _kill_group(process)
        state.update(rows=read_rows(partial), seconds=round(time.monotonic() - began, 1))
        state["status"] = (
            "killed: out of time" if code is None else "done" if code == 0 else f"failed: exit code {code}"
        )
        self.write()
        return None

    def write(self) -> None:
        """Whole or not there, as a step may be reading it."""
        path = self.folder / "gpu.json"
        text = json.dumps(self.result, indent=1) + "\n"
        path.with_suffix(".part").write_text(text, encoding="utf-8")
        os.replace(path.with_suffix(".part"), path)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it started may be there when it is not
    process.wait()


def environment(dry: bool) -> dict[str, str]:
    """Return an environment in which the package and its benches are found, installed or not, from wherever this is called."""
    paths = [str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    made = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    return {**made, "OMP_NUM_THREADS": "1"} if dry else made  # tiny tensors are not worth threads


def setting(dry: bool, commit: str | None) -> dict[str, Any]:
    """Describe the setting that the figures hold for."""
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    head = None if commit else _first_line("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _first_line("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {
        "device": "CPU, tiny sizes" if dry else torch.cuda.get_device_name(),
        "driver": driver,
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
        "python": ".".join(map(str, sys.version_info[:3])),
        "commit": commit or head,
        "changed_since_commit": None if head is None else changed is not None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    """Return the first line that a program prints; None where it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _stop(*_: Any) -> None:
    sys.exit("stopped")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--steps", default=",".join(STEPS), help="some of %(default)s")
    parser.add_argument("--minutes", type=float, default=7, help="for all steps together")
    parser.add_argument("--commit", help="of the sources, where this is no checkout")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument(
        "--step", choices=list(STEPS), help=argparse.SUPPRESS
    )  # these three are for the child processes
    parser.add_argument("--partial", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.step:
        return run_step(args.step, Step(args.partial, args.out, args.seconds, args.dry))
    names = args.steps.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"--steps: got {unknown}; some of {list(STEPS)} are needed")
    if not args.dry and not torch.cuda.is_available():
        print("Nothing was timed: a GPU is needed, or --dry to try the bench itself.")
        return None

    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.log").write_text("", encoding="utf-8")
    previous = signal.signal(signal.SIGTERM, _stop)  # so that a step ends with this
    try:
        run = Run(folder, 60 * args.minutes, args.dry, args.commit)
        with tempfile.TemporaryDirectory() as scratch:
            for name in names:
                run.step(name, Path(scratch))
                gpu_report.write_csv(run.result, folder / "gpu.csv")
                state = run.result["steps"][name]
                print(f"{name}: {state['status']}, {state['seconds']} s, {len(state['rows'])} rows", flush=True)
    finally:
        signal.signal(signal.SIGTERM, previous)
    try:
        gpu_report.plot(run.result, folder / "gpu.png")
    except Exception as error:  # the figures are on disk, and the table is still to come
        print(f"no plot: {summary(error)}")
    print("\n".join(gpu_report.table(run.result)), flush=True)
    return None


if __name__ == "__main__":
    main()
