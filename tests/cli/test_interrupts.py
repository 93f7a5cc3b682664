"""Ctrl-C of commands."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli import PAIR

import droidspeak_ops as ds
from droidspeak_ops.cli import main
from droidspeak_ops.profiling import run as profiling

ROOT = Path(__file__).parents[2]
COSTS = ds.CostModel((0, 1e-4, 0), (0, 1e-5, 0), (0.05, 0, 0), 4000, 1000, "made up", (100, 2000))


def test_ctrl_c_of_a_fit_leaves_nothing(here, monkeypatch, tmp_path, capsys) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("droidspeak_ops.cli.fit.fit", interrupt)
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(f"fit {PAIR} --out {tmp_path / 'maps'}"))
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "droidspeak fit: interrupted; no result was written"
    assert not any(tmp_path.iterdir())


def test_ctrl_c_is_known_whatever_a_library_makes_of_it(here, monkeypatch, tmp_path, capsys) -> None:
    def swallow(*args: object, **options: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("could not import") from error

    monkeypatch.setattr("droidspeak_ops.cli.fit.fit", swallow)
    before = signal.getsignal(signal.SIGINT)  # another than Python's own in a process that was started to ignore it
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(f"fit {PAIR} --out {tmp_path / 'maps'}"))
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "droidspeak fit: interrupted; no result was written"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_during_imports_ends_the_program_at_once(here) -> None:
    interrupted = """if True:
        import signal, sys
        from droidspeak_ops import cli
        def import_module(*names):
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                print("went on", file=sys.stderr)
        cli.import_module = import_module
        cli.main(sys.argv[1:])
    """
    command = [sys.executable, "-c", interrupted, "compile"]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "droidspeak compile: interrupted; no result was written\n")


def test_ctrl_c_of_a_profile_keeps_the_journal_that_it_resumes_from(here, monkeypatch, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    command = ["profile", *PAIR.split(), "--granularity", "2", "--out", str(out)]
    # As main, but for a context that takes as long as it takes to be interrupted.
    slow = """if True:
        import sys, time
        from droidspeak_ops.cli import main
        from droidspeak_ops.profiling import run
        measure, done = run.measure_context, []
        def measure_context(*args):
            if len(done) == 2:
                print("waiting", flush=True)
                time.sleep(60)
            done.append(1)
            return measure(*args)
        run.measure_context = measure_context
        main(sys.argv[1:])
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", slow, *command], env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes
    ) as run:
        assert run.stdout.readline() == "waiting\n"
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == (
        f"droidspeak profile: interrupted; the journal {out / 'journal.jsonl'} keeps what was measured, "
        "and the same command resumes from it"
    )
    measured = []
    measure = profiling.measure_context
    monkeypatch.setattr(profiling, "measure_context", lambda *args: measured.append(1) or measure(*args))
    monkeypatch.setattr(profiling, "measure_costs", lambda *args, **options: COSTS)
    main(command)
    assert len(measured) == 2  # of four
    assert (out / "frontier.json").exists() and not (out / "journal.jsonl").exists()
