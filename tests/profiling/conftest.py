"""The pair of the profiler's tests, and what is measured of it once for all of them."""

from collections.abc import Iterator

import pytest
import torch
from support.models import tiny_pair, tokens
from support.profiles import COSTS, LAYERS, examples, one_share

import droidspeak_ops as ds


@pytest.fixture(autouse=True)
def _one_share() -> Iterator[None]:
    with one_share():
        yield


@pytest.fixture(scope="session")
def pair() -> tuple:
    return tiny_pair(LAYERS)


@pytest.fixture(scope="session")
def maps(pair) -> ds.Maps:
    torch.manual_seed(1)
    cut = [ds.Example.cut(tokens(160), 32) for _ in range(12)]
    return ds.fit(*pair, cut, bands=[(2, 4)], steps=0, show_progress=False)


@pytest.fixture(scope="session")
def some() -> list[ds.Example]:
    torch.manual_seed(2)
    return examples(6)


@pytest.fixture(scope="session")
def frontier(pair, some, maps) -> ds.Frontier:
    """With maps."""
    with one_share():
        return ds.profile(*pair, some, maps=maps, costs=COSTS, show_progress=False)
