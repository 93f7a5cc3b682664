"""Engines, each of which serves many tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.engine import Engine
from support.serving import Pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """The pair of a family, made once."""
    made: dict[str, Pair] = {}

    def of(family: str) -> Pair:
        if family not in made:
            made[family] = Pair(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Start an engine, which is ended with the module."""
    engines: list[Engine] = []

    def starting(model: str, transfer: dict[str, Any] | None, **options: Any) -> Engine:
        engines.append(Engine(model, tmp_path_factory.mktemp("engine"), transfer, **options))
        return engines[-1]

    yield starting
    for engine in engines:
        engine.close()
