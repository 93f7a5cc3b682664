"""Two ranks of a receiver: each fills those of its own heads, and what one cannot read neither fills."""

from collections.abc import Callable
from typing import Any

import pytest
from support.engine import Engine
from support.serving import PLANS, Pair, asking, prompt

import droidspeak_ops as ds

pytest.importorskip("vllm.config")

FITTED = ds.Plan(bands=[(2, 4)], project="rest")
SELECTED = ds.Plan(project="rest", select=30)


@pytest.fixture(scope="module")
def ranks(llama: Pair, maps: ds.Maps, start: Callable[..., Engine]) -> Engine:
    senders = {"base": {"model": llama.sender_folder, "maps": str(llama.folder / "maps.safetensors")}}
    transfer = llama.settings("kv_consumer", senders=senders)
    return start(llama.receiver_folder, transfer, tensor_parallel_size=2, distributed_executor_backend="mp")


def test_greedy_tokens_are_those_of_transformers(ranks: Engine, llama: Pair, maps: ds.Maps) -> None:
    ids, suffix = llama.stored(128), llama.tokens(9)
    plans = [ds.Plan(), PLANS["middle"], PLANS["whole"], FITTED, SELECTED]
    for plan in plans:
        (found,) = ranks.generate([(prompt(ids, suffix), asking(plan))], count=6)
        assert found.tokens == llama.expected(ids, suffix, plan, maps, count=6)
        assert found.said["loaded"]


def test_a_context_that_one_rank_cannot_read_is_not_reused(ranks: Engine, llama: Pair, maps: ds.Maps) -> None:
    ids, suffix = llama.stored(128), llama.tokens(9)
    ranks.call(on_ranks, fail_once_on, 1)
    contexts, wish = (ids, ids[:, :64]), asking(PLANS["middle"])
    broken, again = (ranks.generate([(prompt(each, suffix), wish)], count=6)[0] for each in contexts)
    assert broken.said == {"refused": "the context could not be read"}
    assert broken.tokens == llama.expected(ids, suffix, None, count=6)
    assert again.tokens == llama.expected(ids[:, :64], suffix, PLANS["middle"], maps, count=6) and again.said["loaded"]


def on_ranks(engine: Any, function: Callable[..., Any], *arguments: Any) -> None:
    engine.collective_rpc(function, args=arguments)


def fail_once_on(worker: Any, rank: int) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    filling = get_kv_transfer_group()._filling
    read = filling._read

    def failing(load: Any) -> Any:
        filling._read = read
        return None

    if worker.rank == rank:
        filling._read = failing
