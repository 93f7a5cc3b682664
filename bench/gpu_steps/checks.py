"""Tests of the kernels on the GPU, the step `tests` of ``python -m bench.gpu``, and hardware counters of one launch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import droidspeak_ops as ds
from bench.gpu_steps.step import Step
from droidspeak_ops.proof.shapes import SHAPES, Shape, projections

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "tests/kernels/test_gpu.py",
    "tests/kernels/test_kernels.py",
    "tests/kernels/test_splice.py",
    "tests/kernels/test_attention_kernels.py",
    "tests/ops/test_ops.py",
    "tests/ops/test_attention.py",
    "tests/context/test_loading.py",
)
DRY_TESTS = ("tests/kernels/test_interpreter.py",)
SANITIZER_SECONDS = 60
SHOWN_FAILURES = 40
NCU_LINES = 150


def tests(step: Step) -> None:
    """Run the tests that a GPU decides, and at the same time odd-sized launches under compute-sanitizer."""
    sanitizer = threading.Thread(target=sanitized, args=(step,), daemon=True)
    sanitizer.start()
    os.chdir(ROOT)
    parallel = ["-n", str(min(os.cpu_count() or 1, 12))] if importlib.util.find_spec("xdist") and not step.dry else []
    options = ["-q", "-p", "no:cacheprovider", "-k", "not flex_attention", "--no-header", "--tb=short"]
    options += ["--continue-on-collection-errors"]  # an import that is not there costs its own file
    pytest.main([*options, *parallel, *(DRY_TESTS if step.dry else TESTS)], plugins=[Recorder(step)])
    sanitizer.join()


class Recorder:
    """Plugin of pytest that counts tests as they end, so that a run that is stopped has said how far it got."""

    def __init__(self, step: Step) -> None:
        self.step, self.counts, self.began = step, Counter[str](), time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        if report.failed and self.counts["failed"] <= SHOWN_FAILURES:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(report.longrepr)[-600:] if crash is None else crash.message
            self.step.add("failure", test=report.nodeid, error="\n".join(text.splitlines()[:4])[:600])
        if sum(self.counts.values()) % 25 == 0:
            self.write("running")

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.write(f"ended with {int(exitstatus)}")

    def write(self, state: str) -> None:
        """Write the counts so far."""
        counts = {name: self.counts[name] for name in ("passed", "failed", "skipped")}
        self.step.add("counts", **counts, state=state, seconds=time.monotonic() - self.began)


def sanitized(step: Step) -> None:
    """Look for accesses out of bounds in a launch by each way of loading, with memory as the driver gives it."""
    if step.dry or not (tool := shutil.which("compute-sanitizer")):
        step.add("sanitizer", not_run="needs a GPU" if step.dry else "compute-sanitizer is not on the PATH")
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "20", *_python("odd_launches")]
    code, output = _output(command, SANITIZER_SECONDS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    verdict = next((line for line in reversed(output) if "ERROR SUMMARY" in line), "no summary")
    step.add("sanitizer", exit_code=code, verdict=verdict.strip("= "), text=output[:30] + output[30:][-10:])


def counters(step: Step, seconds: float) -> None:
    """Read the counters of ncu for one launch at 8,192 tokens."""
    if step.dry or not (tool := shutil.which("ncu")):
        step.add("ncu", not_run="needs a GPU" if step.dry else "ncu is not on the PATH")
        return
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "LaunchStats", "Occupancy")
    command = [
        tool, "--clock-control", "none", "--target-processes", "all", "-k", "regex:_project", "--launch-skip", "1", "-c", "1",
        *(part for section in sections for part in ("--section", section)), *_python("long_launches"),
    ]  # fmt: skip
    code, output = _output(command, seconds)
    step.add("ncu", exit_code=code, text=output[-NCU_LINES:])


def _python(function: str) -> list[str]:
    return [sys.executable, "-c", f"from bench.gpu_steps import checks; checks.{function}()"]


def _output(command: list[str], seconds: float, **environment: str) -> tuple[int | None, list[str]]:
    """Return the exit code, None where time ran out, and the lines of both streams."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env={**os.environ, **environment},
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            return None, output.splitlines()
    return process.returncode, output.splitlines()


def odd_launches() -> None:
    """Launch by pointers, and by TMA where there is that; no size is a multiple of a tile."""
    shape = replace(SHAPES["Qwen2.5-7B"], hidden_size=200, num_kv_heads=3)
    _launch(replace(shape, head_dim=80, rotary_dim=64), 37)
    _launch(shape, 37)


def long_launches() -> None:
    """Launch at 8,192 tokens, twice: the first compiles."""
    for _ in range(2):
        _launch(SHAPES["Llama-3-8B"], 8192)


def _launch(shape: Shape, tokens: int) -> None:
    (layer,) = projections(shape, tokens, device="cuda", folded=True)
    ds.ops.kv_project(layer)
    torch.cuda.synchronize()
