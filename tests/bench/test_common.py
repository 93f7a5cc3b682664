"""Rows, tables, intervals and answers of the benches, and the description of the machine."""

import json
import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from support.models import fine_tuned, tiny_llama, tokens

import droidspeak_ops as ds
from bench import common
from droidspeak_ops import machine
from droidspeak_ops.metrics import answer_logits


def test_the_machine_is_described_in_texts_and_counts() -> None:
    here = machine.environment("cpu")
    assert here["device"] == f"{torch.get_num_threads()} CPU threads"
    assert (here["torch"], here["triton"]) == (torch.__version__, triton.__version__)
    assert (here["python"], here["architecture"]) == (platform.python_version(), platform.machine())
    assert here == {"device": here["device"], **machine.environment()}
    assert json.loads(json.dumps(here)) == here and here["cpu"]


@pytest.mark.parametrize("has_smi", [True, False])
def test_a_gpu_is_described_without_one(has_smi: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> Any:
        if not has_smi:
            raise FileNotFoundError(command[0])
        return SimpleNamespace(stdout="580.1\n580.1\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    here = machine.environment("cuda")
    assert (here["device"], here["cuda"], here.get("driver")) == ("H100", "13.0", "580.1" if has_smi else None)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert "cuda" not in machine.environment("cuda") and machine.environment("cuda")["rocm"] == "7.1"


def test_rows_of_different_columns_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    common.write_csv(path, [{"a": 1, "b": None}, {"a": 2, "c": "x, y"}], setting="here")
    assert common.read_csv(path) == [
        {"a": "1", "b": "", "c": "", "setting": "here"},
        {"a": "2", "b": "", "c": "x, y", "setting": "here"},
    ]


def test_a_table_shows_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    kl = {"kl": "2", "kl_low": "1", "kl_high": "3"}
    rows = [{"way": "all", "ms": None, **kl}, {"ms": 1.5, "way": "none", **common.without_interval("kl")}]
    common.show(rows, "a title", "a note")
    out = capsys.readouterr().out
    assert all(text in out for text in ("a title", "a note", "all", "none", "1.5", "2 (1 to 3)"))
    assert "None" not in out and "kl_low" not in out


def test_error_bars_reach_to_the_interval() -> None:
    rows = [common.mean_and_interval("kl", [1.0, 2.0, 4.0]), {"kl": "2", "kl_low": "1.5", "kl_high": "3"}]
    values, (below, above) = common.error_bars(rows, "kl")
    assert values[1:] == [2.0] and below[1:] == [0.5] and above[1:] == [1.0]
    assert common.interval(rows[1], "kl") == "2 (1.5 to 3)"
    assert list(common.without_interval("kl")) == list(rows[0])


def test_answers_over_a_cache_are_those_of_full_prefill() -> None:
    receiver = tiny_llama()
    example = ds.Example(tokens(20), tokens(4), tokens(3))
    own, others = (ds.capture(model, example.context) for model in (receiver, fine_tuned(receiver)))
    reference = answer_logits(receiver, example)
    assert reference.shape == (3, receiver.config.vocab_size) and not reference.requires_grad
    divergences = [
        common.divergence(reference, answer_logits(receiver, example, ds.partial_prefill(receiver, each, ds.Plan())))
        for each in (own, others)
    ]
    assert abs(divergences[0]) < 1e-9 < 1e-3 < divergences[1]
