"""Processes that are killed: a short form of bench/kills.py."""

import random
import time
from pathlib import Path

import pytest

from bench import kills
from bench.kills import Target


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return kills.targets(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", ["Maps.save", "SharedContext.save", "Frontier.save", kills.STORE])
def test_a_save_that_is_killed_leaves_the_old_or_the_new(targets, name: str) -> None:
    (row,) = kills.measure(name, targets[name]._replace(kills=5), random.Random(0))
    assert row["kills"] == 5
    assert row["wrong"] == 0, row["first"]


def test_a_profile_that_is_killed_goes_on_and_is_not_run_twice_at_once(targets) -> None:
    rows = kills.measure("profile", targets["profile"]._replace(kills=3, second_runs=1), random.Random(0))
    assert [row["kills"] for row in rows] == [3, 1]
    assert [row["first"] for row in rows] == ["", ""]


def half_written(folder: Path) -> kills.Run:
    """Return a run that writes to its result in place."""

    def run() -> None:
        (folder / kills.RESULT).write_text("half", encoding="utf-8")
        time.sleep(0.5)
        (folder / kills.RESULT).write_text("whole", encoding="utf-8")

    return run


def test_half_a_result_and_another_result_are_found() -> None:
    target = Target(half_written, Path.read_text, 1, None)
    found = kills.kill_and_go_on(target, 0.1, "whole", random.Random(0))
    assert found.wrong == ["expected the old or the new result, got half"]
    found = kills.kill_and_go_on(target._replace(together=0), 0.1, "all", random.Random(0))
    assert found.wrong == ["expected the result of a run left alone, got whole"]
