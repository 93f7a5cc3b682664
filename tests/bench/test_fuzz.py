"""The bench of damaged files: each reader passes a few, and a reader with a fault does not."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import fuzz
from bench.fuzzing.readers import make_readers, read_plan

READERS = {reader.name: reader for reader in make_readers()}


@pytest.mark.parametrize("name", READERS)
def test_a_few_damaged_files(name: str) -> None:
    row, failures = fuzz.fuzz(READERS[name], range(40), seed=7)
    assert failures == []
    assert row["same"] + row["valid"] + row["named"] == row["inputs"] == 40
    assert row["named"] > 10


def test_an_input_depends_on_its_number_alone() -> None:
    """Two times, as two processes would: in the files of tensors safetensors has names in another order each time."""
    for one, other in zip(make_readers(), make_readers(), strict=True):
        assert one.wholes == other.wholes
        for number, damage in enumerate(one.damages):
            assert damage(one.wholes[0], random.Random(number)) == damage(other.wholes[0], random.Random(number))


def _unchecked(path: Path) -> bytes:
    return json.dumps(json.loads(path.read_bytes())).encode()


def _forgiving(path: Path) -> bytes:
    try:
        return read_plan(path)
    except ValueError:
        return b"{}"


def _nameless(path: Path) -> bytes:
    try:
        return read_plan(path)
    except ValueError:
        raise ValueError("expected another file") from None


def _forgetful(path: Path) -> bytes:
    return read_plan(path) + b" " * len(path.read_bytes())


def _greedy(path: Path) -> bytes:
    if path.name == fuzz.INPUT:
        bytearray(fuzz.MEMORY << 10)
    return read_plan(path)


@pytest.mark.parametrize(
    ("read", "has_digest", "said"),
    [
        (_unchecked, False, "Error"),
        (_forgiving, True, "AssertionError: a damaged file was read as another value"),
        (_nameless, False, "ValueError: expected another file"),
        (_forgetful, False, "AssertionError: what was read comes back as another value"),
    ],
)
def test_a_reader_with_a_fault_is_caught(
    read: Callable[[Path], bytes], has_digest: bool, said: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    planted = dataclasses.replace(READERS["plans"], read=read, has_digest=has_digest)
    monkeypatch.setattr(fuzz, "make_readers", lambda: [planted])
    with pytest.raises(SystemExit) as ended:
        fuzz.main(["--inputs", "60"])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert said in printed and "plans: seed 0, input " in printed
    number = printed.partition("input ")[2].partition(":")[0]
    with pytest.raises(SystemExit):
        fuzz.main(["--number", number])


def test_a_reader_that_takes_all_memory_is_caught(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    planted = dataclasses.replace(READERS["plans"], read=_greedy)
    monkeypatch.setattr(fuzz, "make_readers", lambda: [planted])
    with pytest.raises(SystemExit):
        fuzz.main(["--inputs", "1"])
    assert "MemoryError" in capsys.readouterr().out
