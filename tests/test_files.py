"""Files that are whole or not there, and journals of runs that are killed."""

import fcntl
import json
import random
import shutil
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from droidspeak_ops.files import Journal, remove_journal, replacing


def test_nothing_half_written_is_left(tmp_path) -> None:
    target = tmp_path / "file"
    target.write_text("old", encoding="utf-8")

    def write_half() -> None:
        with replacing(target) as scratch:
            scratch.write_text("half", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert [(file.name, file.read_text(encoding="utf-8")) for file in tmp_path.iterdir()] == [("file", "old")]


def test_threads_that_write_to_one_path_leave_one_whole_file(tmp_path) -> None:
    target = tmp_path / "file"

    def write(number: int) -> None:
        with replacing(target) as scratch:
            scratch.write_text(str(number) * 10_000, encoding="utf-8")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(9)))
    (file,) = tmp_path.iterdir()
    text = file.read_text(encoding="utf-8")
    assert text == text[0] * 10_000


def test_a_file_keeps_its_mode_and_a_link_stays_one(tmp_path) -> None:
    target, link = tmp_path / "file", tmp_path / "link"
    target.write_text("old", encoding="utf-8")
    target.chmod(0o640)
    link.symlink_to(target)
    with replacing(link) as scratch:
        scratch.write_text("new", encoding="utf-8")
    assert link.is_symlink() and target.read_text(encoding="utf-8") == "new"
    assert target.stat().st_mode & 0o777 == 0o640


HALF = """
import sys, time
from droidspeak_ops.files import replacing
with replacing(sys.argv[1]) as scratch:
    scratch.write_text("half")
    print(scratch.name, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path) -> None:
    """And nothing else: not what lives, is of another path or of another machine, nor what only looks alike."""
    target = tmp_path / "file"
    killed, alive, other = (
        subprocess.Popen([sys.executable, "-c", HALF, str(path)], stdout=subprocess.PIPE, text=True)
        for path in (target, target, tmp_path / "other")
    )
    names = [process.stdout.readline().strip() for process in (killed, alive, other)]
    for process in (killed, other):
        process.kill()
        process.wait()
    machine = names[0].split(".")[-2]
    foreign = [names[0].replace(machine, f"{int(machine, 16) ^ 1:08x}"), f".file.{machine}.notes", "x" + names[0]]
    for name in foreign:
        (tmp_path / name).write_text("theirs", encoding="utf-8")
    try:
        with replacing(target) as scratch, replacing(target) as another:  # each of which has looked for what is left
            scratch.write_text("new", encoding="utf-8")
            another.write_text("newer", encoding="utf-8")
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"file", *names[1:], *foreign}
        assert target.read_text(encoding="utf-8") == "new"
    finally:
        alive.kill()
        alive.wait()
    with replacing(target) as scratch:
        scratch.write_text("newest", encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"file", names[2], *foreign}


def test_a_writer_whose_file_was_taken_for_abandoned_makes_another(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between making a file and locking it: whoever holds the lock then is about to remove it."""
    flock, taken = fcntl.flock, []

    def removed_before(descriptor: int, operation: int) -> None:
        if not taken:
            taken.append(next(path for path in tmp_path.iterdir() if path.name.startswith(".file.")))
            taken[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with replacing(tmp_path / "file") as scratch:
        assert scratch != taken[0] and scratch.exists()
        scratch.write_text("whole", encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_removed_meanwhile_is_replaced(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    target.write_text("old", encoding="utf-8")
    copymode = shutil.copymode

    def removed(source: Path, scratch: Path) -> None:
        Path(source).unlink()
        copymode(source, scratch)

    monkeypatch.setattr(shutil, "copymode", removed)
    with replacing(target) as scratch:
        scratch.write_text("new", encoding="utf-8")
    assert target.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_journal_goes_on_after_a_torn_line(tmp_path) -> None:
    path = tmp_path / "journal"
    with Journal(path, {"run": 1}) as first:
        first.add([1.5, None])
        first.add([2.5, 3.5])
    path.write_bytes(path.read_bytes()[:-3])
    with Journal(path, {"run": 1}) as second:
        assert second.done == [[1.5, None]]
        second.add([4.0])
    with Journal(path, {"run": 1}) as third:
        assert third.done == [[1.5, None], [4.0]]
    with pytest.raises(ValueError, match="journal: expected a journal of this run, got that of another"):
        Journal(path, {"run": 2})
    assert Journal(None, {}).done == []


def test_one_run_at_a_time_holds_a_journal(tmp_path) -> None:
    path = tmp_path / "journal"
    with Journal(path, {"run": 1}), pytest.raises(ValueError, match="journal: expected one run at a time"):
        Journal(path, {"run": 1})
    with Journal(path, {"run": 1}) as journal:
        command = [sys.executable, "-c", WRITER, str(path), "3"]
        assert b"expected one run at a time" in subprocess.run(command, capture_output=True).stderr
        assert journal.done == []
    subprocess.run([sys.executable, "-c", WRITER, str(path), "3"], check=True)
    with Journal(path, {"run": 1}) as journal:
        assert len(journal.done) == 3


def test_records_are_read_by_their_type(tmp_path) -> None:
    path = tmp_path / "journal"
    with Journal(path, {"run": 1}) as journal:
        journal.add([1, 2])
        journal.add({"a": 1})
        assert journal.read(0, tuple[float, int]) == (1.0, 2)
        with pytest.raises(ValueError, match=rf"journal: {path}, line 3: expected array, got object"):
            journal.read(1, list[int])
        with pytest.raises(ValueError, match="Out of range float values"):
            journal.add([float("nan")])
        journal.check_end(2)
        with pytest.raises(ValueError, match=rf"journal: {path}, line 3: expected the end of the journal"):
            journal.check_end(1)
    with Journal(path, {"run": 1}) as journal:
        assert journal.done == [[1, 2], {"a": 1}]


@pytest.mark.parametrize("content", [b"notes", b"[1, 2]\n", b"\n\n", b"00000000 {}\n", b"\xff\n"])
def test_another_file_is_no_journal_and_stays_as_it_is(content: bytes, tmp_path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"journal: expected .*{path}"):
        Journal(path, {"run": 1})
    assert path.read_bytes() == content


def test_a_line_whose_checksum_fits_is_still_json(tmp_path) -> None:
    path = tmp_path / "journal"
    with Journal(path, {"run": 1}):
        pass
    for text, message in ((b"{", "expected JSON"), (b"[NaN]", "got NaN"), (b"[" * 99999, "too deeply nested")):
        whole = path.read_bytes()
        path.write_bytes(whole + b"%08x %b\n" % (zlib.crc32(text), text))
        with pytest.raises(ValueError, match=rf"journal: {path}, line 2: .*{message}"):
            Journal(path, {"run": 1})
        path.write_bytes(whole)


def test_a_journal_that_another_run_holds_is_not_removed(tmp_path) -> None:
    path = tmp_path / "journal"
    with Journal(path, {"run": 1}) as journal:
        journal.add([1.5])
        remove_journal(path)
        with pytest.raises(ValueError, match="journal: expected one run at a time"):
            Journal(path, {"run": 1})
    assert path.exists()
    remove_journal(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_damaged_line_is_named(tmp_path, line: int) -> None:
    path = tmp_path / "journal"
    with Journal(path, {"run": 1}) as journal:
        journal.add([1.5])
        journal.add([2.5])
    lines = path.read_bytes().split(b"\n")
    lines[line] = lines[line].replace(b"1", b"7").replace(b"2", b"8")
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=f"journal: expected a line that its checksum fits, got .*, line {line + 1}"):
        Journal(path, {"run": 1})


# Imports neither torch nor this file, so that it starts in an instant.
WRITER = """
import sys
from droidspeak_ops.files import Journal
journal = Journal(sys.argv[1], {"run": 1})
for number in range(len(journal.done), int(sys.argv[2])):
    journal.add([number, "x" * (number % 5000)])
"""


def test_a_journal_that_is_killed_at_any_moment_goes_on(tmp_path) -> None:
    """While it starts, reads, writes: nothing that was noted is lost, doubled or torn."""
    path, moments, known = tmp_path / "journal", random.Random(0), 0
    for kill in range(15):
        before = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(10**9)])
        if kill % 3 == 2:
            time.sleep(moments.uniform(0.0, 0.1))
        else:
            grown = before + moments.randint(1, 100_000)
            while not path.exists() or path.stat().st_size < grown:
                assert process.poll() is None
                time.sleep(0.0002)
        process.kill()
        process.wait()
        whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        done = [json.loads(line.partition(b" ")[2]) for line in whole[1:]]
        assert done == [[number, "x" * (number % 5000)] for number in range(len(done))]
        assert len(done) >= known + (kill % 3 != 2), "every run that writes gets further"
        known = len(done)
    subprocess.run([sys.executable, "-c", WRITER, str(path), str(known + 3)], check=True)
    with Journal(path, {"run": 1}) as journal:
        assert journal.done == [[number, "x" * (number % 5000)] for number in range(known + 3)]
