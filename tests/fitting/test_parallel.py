"""Pieces that are computed several at a time: in which order they come back, with how many threads, and what fails."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from droidspeak_ops.fitting.parallel import AT_A_TIME, in_parallel

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 6])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param, "as many as before"
    torch.set_num_threads(before)


def test_results_come_in_order_and_share_the_threads(threads: int) -> None:
    at_once = min(threads, AT_A_TIME)
    all_there = threading.Barrier(at_once)

    def compute(number: int) -> tuple[int, int, bool]:
        all_there.wait(timeout=60)  # for as many pieces as are computed at a time
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.enable_grad():
        found = list(in_parallel(compute, range(3 * at_once), CPU))
    assert found == [(number, threads // at_once, False) for number in range(3 * at_once)]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == threads, "threads to come have as many as before"


def test_a_gpu_computes_one_after_the_other() -> None:
    assert set(in_parallel(lambda _: threading.current_thread(), range(3), torch.device("cuda"))) == {
        threading.current_thread()
    }


def test_few_pieces_have_more_threads_each(threads: int) -> None:
    assert list(in_parallel(lambda _: torch.get_num_threads(), range(1), CPU)) == [threads]
    assert list(in_parallel(lambda _: torch.get_num_threads(), range(2), CPU)) == [max(threads // 2, 1)] * 2
    assert list(in_parallel(lambda _: torch.get_num_threads(), [], CPU)) == []


def test_what_was_done_before_a_failure_comes_first(threads: int) -> None:
    def compute(number: int) -> int:
        if number == 2:
            raise ValueError("expected another number, got 2")
        return number

    found = in_parallel(compute, range(5), CPU)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="got 2"):
        next(found)
