"""Engines, each of which serves many tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.engine import Engine
from support.serving import PLANS, Pair

import droidspeak_ops as ds


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """The pair of a family, made once."""
    made: dict[str, Pair] = {}

    def of(family: str) -> Pair:
        if family not in made:
            made[family] = Pair.of_family(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Start an engine, which is ended with the tests."""
    engines: list[Engine] = []

    def starting(model: str, transfer: dict[str, Any] | None, **options: Any) -> Engine:
        engines.append(Engine(model, tmp_path_factory.mktemp("engine"), transfer, **options))
        return engines[-1]

    yield starting
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def llama(pair: Callable[[str], Pair]) -> Pair:
    return pair("llama")


@pytest.fixture(scope="session")
def maps(llama: Pair) -> ds.Maps:
    return llama.fit()


@pytest.fixture(scope="session")
def receiver(
    llama: Pair, maps: ds.Maps, start: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    """An engine of so few tokens a step that prompts and bands run in chunks."""
    plan = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.write_text(PLANS["two"].to_json())
    senders = {
        "base": {"model": llama.sender_folder},
        "mapped": {"model": llama.sender_folder, "maps": str(llama.folder / "maps.safetensors")},
    }
    plans = {"two": str(plan), "reuse": {}}
    transfer = llama.settings("kv_consumer", senders=senders, plans=plans)
    return start(llama.receiver_folder, transfer, max_num_batched_tokens=64, max_num_seqs=8)
