"""The pair of the profiler's tests, and what is measured of it once for all of them."""

import pytest
import torch
from support.models import tiny_pair, tokens
from support.profiles import COSTS, LAYERS, examples

import droidspeak_ops as ds
from droidspeak_ops.profiling import candidates


@pytest.fixture(scope="session", autouse=True)
def _one_share():
    """Of the shares of selected tokens that are tried, which each run by themselves, one shows what all would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "SELECTED", (0.1,))
        yield


@pytest.fixture(scope="session")
def pair() -> tuple:
    return tiny_pair(LAYERS)


@pytest.fixture(scope="session")
def maps(pair) -> ds.Maps:
    torch.manual_seed(1)
    cut = [ds.Example.cut(tokens(160), 32) for _ in range(12)]
    return ds.fit(*pair, cut, bands=[(2, 4)], show_progress=False)


@pytest.fixture(scope="session")
def some() -> list[ds.Example]:
    torch.manual_seed(2)
    return examples(6)


@pytest.fixture(scope="session")
def frontier(pair, some, maps) -> ds.Frontier:
    """With maps."""
    return ds.profile(*pair, some, maps=maps, costs=COSTS, show_progress=False)
