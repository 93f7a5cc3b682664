"""Profiles that were interrupted or killed go on from their journal to the same result, and what a journal has to hold."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import tiny_pair
from support.profiles import COSTS, LAYERS, alike, examples, interrupted_after, one_share

import droidspeak_ops as ds
from droidspeak_ops.profiling import candidates


def test_an_interrupted_run_goes_on(pair, some, frontier, maps, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "journal"
    measured = interrupted_after(4, "measure_context", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        ds.profile(*pair, some, maps=maps, costs=COSTS, journal=journal, show_progress=False)
    assert len(measured) == 4
    measured.clear()
    again = ds.profile(*pair, some, maps=maps, costs=COSTS, journal=journal, show_progress=False)
    assert len(measured) == 2
    assert again == frontier
    with pytest.raises(ValueError, match="expected a journal of this run, got that of another"):
        ds.profile(*pair, some, costs=COSTS, journal=journal, show_progress=False)


def _swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], *lines[3:]]


def _with(index: int, **changes: Any) -> Callable[[list[bytes]], list[bytes]]:
    """Change fields of a record, under a checksum that fits it."""

    def change(lines: list[bytes]) -> list[bytes]:
        text = json.dumps({**json.loads(lines[index].partition(b" ")[2]), **changes}).encode()
        return [*lines[:index], b"%08x %b" % (zlib.crc32(text), text), *lines[index + 1 :]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swapped, "line 2: expected the record of the context [0-9a-f]+, got that of"),
        (lambda lines: [*lines[:2], *lines[3:]], "line 3: expected the record of the context"),
        (lambda lines: [*lines[:2], lines[4]], "line 3: expected the field context, got none"),
        (lambda lines: [*lines, lines[-1]], "line 9: expected the end of the journal"),
        (_with(3, kl=[0.5], agreement=[0.5]), "line 4: expected [0-9]+ measurements, got 1"),
        (_with(3, kl=[0.5]), "line 4: agreement: expected 1, as many as kl has, got [0-9]+"),
        (_with(3, kl=["much"] * 3), r"line 4: expected float, got str at kl\[0\]"),
        (_with(3, kl=[-0.5] * 3), "line 4: kl: expected finite divergences of 0 or more"),
        (_with(3, agreement=[1.5] * 3), "line 4: agreement: expected shares from 0 to 1"),
        (_with(4, run=None), "line 5: expected array, got null at run"),
        (_with(5, scores=[0.5]), "line 6: expected [0-9]+ measurements, got 1"),
        (_with(5, scores=[True] * 3), r"line 6: expected float, got bool at scores\[0\]"),
    ],
)
def test_a_record_that_is_not_of_its_context_is_named(
    pair, some, whole_journal: bytes, change: Any, message: str, tmp_path
) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"\n".join(change(whole_journal.splitlines())) + b"\n")
    with pytest.raises(ValueError, match=rf"{path}, {message}"):
        ds.profile(*pair, some[:3], granularity=LAYERS, costs=COSTS, score=alike, journal=path, show_progress=False)


@pytest.fixture(scope="module")
def whole_journal(pair, some, tmp_path_factory) -> bytes:
    """The journal of a run over three contexts: its first line, the contexts, the costs, and the contexts' scores."""
    path = tmp_path_factory.mktemp("whole") / "journal"
    options = {"granularity": LAYERS, "costs": COSTS, "score": alike, "show_progress": False}
    with one_share():
        frontier = ds.profile(*pair, some[:3], **options, journal=path)
        assert len(path.read_bytes().splitlines()) == 1 + 3 + 1 + 3
        assert ds.profile(*pair, some[:3], **options, journal=path) == frontier
    return path.read_bytes()


def profile_many(journal: Path | None) -> ds.Frontier:
    """Profile bands alone, in this process and in another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "SELECTED", ())
        return ds.profile(*tiny_pair(LAYERS), examples(16), costs=COSTS, journal=journal, show_progress=False)


SCRIPT = """
import os
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
import torch
from test_resuming import profile_many
torch.set_num_threads(1)
profile_many(Path(sys.argv[2]))
"""


def test_a_run_that_is_killed_goes_on(tmp_path) -> None:
    """To the same bytes; test_files.py kills the journal itself at every moment."""
    journal, folders = tmp_path / "journal", os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2])
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, folders, str(journal)])
    while not journal.exists() or len(journal.read_bytes().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed before its end"
    profile_many(journal).save(tmp_path / "killed.json")
    profile_many(None).save(tmp_path / "whole.json")
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
