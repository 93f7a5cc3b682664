"""A store that is slow, or does not answer at all, is not waited for."""

import threading

import pytest

from droidspeak_ops.vllm.waiting import within


def test_steps_run_in_order() -> None:
    places: list[int] = []
    assert within(60, [lambda: places.append(1) or 1, lambda: places.append(2) or 2]) == places == [1, 2]


def test_what_a_step_raises_is_raised() -> None:
    with pytest.raises(KeyError, match="gone"):
        within(60, [lambda: {}["gone"]])


def test_what_takes_too_long_is_left_and_nothing_is_begun_behind_it() -> None:
    release, ended, begun = threading.Event(), threading.Event(), []
    steps = [lambda: release.wait(60) and ended.set(), lambda: begun.append(1)]
    with pytest.raises(TimeoutError, match="store: expected to read it within 0.05 s, got no answer"):
        within(0.05, steps)
    assert not ended.is_set()
    (thread,) = [each for each in threading.enumerate() if each.name == "within"]
    assert thread.daemon
    release.set()
    thread.join(60)
    assert ended.is_set() and not begun
