"""The bench of a whole GPU without one: its steps at tiny sizes, what it does when one fails, and what it shows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.common import read_csv, write_csv
from bench.gpu_steps import ceilings, checks, child, micro, report
from bench.gpu_steps.step import Step, read_rows


def run(folder: Path, *options: str) -> dict[str, Any]:
    returned = gpu.main(["--dry", "--out", str(folder), "--commit", "abc", *options])
    result = json.loads((folder / "gpu.json").read_text())
    assert returned == report.all_rows(result)
    return result


def test_all_steps_at_tiny_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path)
    assert {name: state["status"] for name, state in result["steps"].items()} == dict.fromkeys(gpu.STEPS, "done")
    rows = {name: state["rows"] for name, state in result["steps"].items()}
    assert not [row for of_step in rows.values() for row in of_step if "error" in row]
    assert (result["commit"], result["torch"]) == ("abc", torch.__version__)

    counts = next(row for row in rows["tests"] if row["what"] == "counts")
    assert counts["passed"] > 0 and counts["failed"] == 0
    checks = [row["check"] for row in rows["micro"] if row["what"] == "provider"]
    assert len(checks) == 2 * 10 + 2 and all(check.startswith(("max ", "product", "skipped: ")) for check in checks)
    attended = [row for row in rows["micro"] if row["what"] == "attention"]
    assert [row["kernel"] for row in attended] == ["attention_peaks", "attend_rows"]
    assert all(row["check"].startswith("max ") and row["speedup"] > 0 for row in attended)
    plans = [row for row in rows["ttft"] if row["what"] == "plan"]
    assert len(plans) == 2 * 7 and all(row["speedup"] > 0 and row["of_parts"] > 0 for row in plans)
    choosing = [row["tokens"] for row in rows["ttft"] if row["what"] == "choosing"]
    assert choosing == [128, 64]
    decoded = [row for row in rows["graph"] if row["what"] == "decode"]
    assert len(decoded) == 3 and all(row["same_tokens"] for row in decoded)
    assert {"not_run": "needs a GPU", "what": "ncu"} in rows["trace"]

    assert len(read_csv(tmp_path / "gpu.csv")) == sum(map(len, rows.values()))
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "trace.json.gz").stat().st_size > 0
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.csv", "gpu.png", "gpu.log", "trace.json.gz"}
    shown = capsys.readouterr().out
    assert all(
        heading in shown for heading in ("ATTENTION", "FIRST TOKEN", "\n  selected 5 %", "\n  recent 5 %", "CHOOSING")
    )
    assert not [line for line in shown.splitlines() if len(line) > 160] and "\n  attend_rows" in shown


def test_a_step_out_of_time_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    monkeypatch.setitem(gpu.STEPS, "micro", gpu.Limit("micro", 0.5))
    steps = run(tmp_path, "--steps", "micro,ceilings")["steps"]
    assert steps["micro"]["status"] == "killed: out of time"
    assert steps["ceilings"]["status"] == "done" and steps["ceilings"]["rows"]


def test_without_time_nothing_starts(tmp_path: Path) -> None:
    steps = run(tmp_path, "--minutes", "0")["steps"]
    assert {state["status"] for state in steps.values()} == {"skipped: no time was left"}


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "--steps", "ceiling")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_without_a_gpu_nothing_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == []
    assert "a GPU is needed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_its_tests_are_there() -> None:
    assert all((gpu.ROOT / path).is_file() for path in (*checks.TESTS, *checks.DRY_TESTS))


@pytest.mark.parametrize("bytes_moved", [2_400_000, 8_500_000, 28_000_000, 10**9])
def test_inputs_that_take_turns_exceed_the_cache(bytes_moved: int) -> None:
    sets = micro.input_sets(bytes_moved)
    assert sets >= 2 and micro.ROTATED_BYTES <= sets * bytes_moved < micro.ROTATED_BYTES + 2 * bytes_moved


def dry_step(folder: Path) -> Step:
    return Step(folder / "rows.jsonl", folder, 60, dry=True)


def test_a_step_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(step: Step) -> None:
        step.add("matmul", tflops=1.0)
        with step.guarded("copy"):
            raise RuntimeError("no memory")
        raise ValueError("no driver")

    monkeypatch.setattr(ceilings, "ceilings", failing)
    step = dry_step(tmp_path)
    with pytest.raises(SystemExit):
        child.run_step("ceilings", "ceilings", step)
    assert read_rows(step.rows_path) == [
        {"what": "matmul", "tflops": 1.0},
        {"what": "copy", "error": "RuntimeError: no memory"},
        {"what": "error", "error": "ValueError: no driver"},
    ]


def test_the_last_count_is_kept_and_a_cut_row_is_left_out(tmp_path: Path) -> None:
    step = dry_step(tmp_path)
    step.add("counts", passed=25)
    step.add("plan", plan="all reused", tokens=8)
    step.add("counts", passed=31)
    with step.rows_path.open("a") as file:
        file.write('{"what": "plan", "pl')
    assert read_rows(step.rows_path) == [
        {"what": "plan", "plan": "all reused", "tokens": 8},
        {"what": "counts", "passed": 31},
    ]


def wide_result() -> dict[str, Any]:
    """More of everything than a run gives."""
    provider = {"what": "provider", "cold_ms": 0.3, "replay_ms": 0.25, "percent_of_cublas": 80.0, "percent_of_floor": 70.0,
                "floor_ms": 0.2, "check": "max 1e-3"}  # fmt: skip
    cases = [("Llama-3-8B", 1024), ("Llama-3-8B", 8192), ("Llama-3-8B", 32768), ("Qwen3-8B", 8192)]
    names = ["cublas", *(f"provider {index}" for index in range(14))]
    plan = {"what": "plan", "full_ms": 1900.0, "plan_ms": 60.0, "speedup": 31.7, "of_parts": 1.04, "fill_host_ms": 5.5}
    steps = {
        "ceilings": [{"what": "launch", "triton_host_us": 5.0, "in_graph_us": 1.5}],
        "tests": [{"what": "failure", "test": f"tests/test_{index}.py", "error": "it is\nwrong"} for index in range(40)],
        "micro": [
            *({**provider, "provider": name, "model": model, "tokens": count} for name in names for model, count in cases),
            {"what": "provider", "provider": "liger", "model": "Qwen3-8B", "tokens": 8192, "check": "failed: out of memory"},
            {"what": "streaming", "kernel": "row_norm", "tokens": 8192, "tb_per_s": 2.9, "percent_of_copy": 95.0,
             "percent_of_same_copy": 97.0},
            {"what": "attention", "kernel": "attend_rows", "tokens": 8192, "cold_ms": 0.125, "replay_ms": 0.095,
             "speedup": 2.6, "percent_of_floor": 44.0, "host_us": 21.0, "check": "max 2.0e-03, RMS 1.0e-03"},
            {"what": "attention", "kernel": "attention_peaks", "tokens": 8192, "check": "refused: max 2.0e-01, RMS 1.0e-02"},
        ],
        "ttft": [
            *({**plan, "plan": f"plan {index}", "tokens": 8192} for index in range(7)),
            *({"what": "choosing", "tokens": tokens, "ms": 7.25, "percent_of_plan": 12.0} for tokens in (32768, 8192)),
        ],
        "graph": [{"what": "graph", "plan": "all", "bitwise": True, "eager_ms": 3.0, "replay_ms": 2.0},
                  {"what": "graph", "plan": "band", "error": "RuntimeError:\n capture"}],
        "tune": [{"what": "choice", "model": "Qwen3-8B", "ms": 0.2, "default_ms": 0.3, "config": "block_m=64"}],
        "trace": [{"what": "kernel", "kernel": "k" * 200, "calls": 2, "ms": 1.0}, {"what": "ncu", "text": ["a", "b"]}],
    }  # fmt: skip
    where = dict.fromkeys(("device", "driver", "torch", "triton", "transformers", "commit", "date"), "1")
    states = {name: {"status": "done", "seconds": 1.0, "rows": rows} for name, rows in steps.items()}
    return {**where, "changed_since_commit": True, "steps": states}


def test_what_is_shown_is_short(tmp_path: Path) -> None:
    result = wide_result()
    lines = report.table(result)
    assert len(lines) <= 60 and sum(map(len, lines)) < 10_000
    text = "\n".join(lines)
    for part in ("with changes", "and 35 more", "300/250 80 70", "2.90 95 97", "125/95 2.6x 44 21",
                 "refused: max 2.0e-01", "1900/60.0 31.7x 1.04 5.5",
                 "7.2 ms (12 %) of 32768, 7.2 ms (12 %) of 8192", "bitwise True",
                 "failed: out of memory", "ERROR  graph graph band: RuntimeError: capture"):  # fmt: skip
        assert part in text
    report.plot(result, tmp_path / "gpu.png")
    report.plot({**result, "steps": {}}, tmp_path / "empty.png")
    write_csv(tmp_path / "gpu.csv", report.all_rows(result), **report.setting(result))
    assert len(read_csv(tmp_path / "gpu.csv")) == sum(len(state["rows"]) for state in result["steps"].values())
