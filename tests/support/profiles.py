"""Parts that the profiler's tests share: a pair's size, made-up costs, examples, and runs that are interrupted."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.models import tokens

import droidspeak_ops as ds
from droidspeak_ops.profiling import candidates
from droidspeak_ops.profiling import run as profiling

LAYERS = 5
COSTS = ds.CostModel((0, 1e-4, 0), (0, 1e-5, 0), (0.05, 0, 0), 4000, 1000, "made up", (100, 2000))


@contextmanager
def one_share() -> Iterator[None]:
    """Try one share of selected tokens, each of which runs by itself: it shows what all would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "SELECTED", (0.1,))
        yield


def examples(count: int, answer: int = 12) -> list[ds.Example]:
    return [ds.Example(tokens(90), tokens(6 + number), tokens(answer)) for number in range(count)]


def in_order(some: list[ds.Example], seed: int = 0) -> list[ds.Example]:
    groups = [[example] for example in some]
    random.Random(seed).shuffle(groups)
    return [group[0] for group in groups]


def alike(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """The share of wanted tokens that were given in their place."""
    return float((given[: len(wanted)] == wanted[: len(given)]).double().mean())


def interrupted_after(count: int, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Let a function of the profiler be interrupted after so many calls, until its calls, which are returned, are cleared."""
    calls, original = [], getattr(profiling, name)

    def interrupted(*args):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(profiling, name, interrupted)
    return calls
