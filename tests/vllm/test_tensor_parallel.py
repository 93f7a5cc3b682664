"""Two ranks of a receiver with few pages: each fills those of its own heads, and what one cannot read neither fills."""

from collections.abc import Callable
from typing import Any

import pytest
from support.engine import Engine
from support.serving import PLANS, Pair, asking, prompt

import droidspeak_ops as ds

pytest.importorskip("vllm.config")

FITTED = ds.Plan(bands=[(2, 4)], project="rest")


@pytest.fixture(scope="module")
def ranks(llama: Pair, maps: ds.Maps, start: Callable[..., Engine]) -> Engine:
    senders = {"base": {"model": llama.sender_folder, "maps": str(llama.folder / "maps.safetensors")}}
    transfer = llama.settings("kv_consumer", senders=senders)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "num_gpu_blocks_override": 20}
    return start(llama.receiver_folder, transfer, **options)


def test_greedy_tokens_are_those_of_transformers(ranks: Engine, llama: Pair, maps: ds.Maps) -> None:
    ids, suffix = llama.stored(128), llama.tokens(9)
    plans = [ds.Plan(), PLANS["middle"], PLANS["whole"], FITTED]
    for plan in plans:
        (found,) = ranks.generate([(prompt(ids, suffix), asking(plan))])
        assert found.tokens == llama.expected(ids, suffix, plan, maps)
        assert found.said["loaded"]


def test_a_context_that_one_rank_cannot_read_is_not_reused(ranks: Engine, llama: Pair) -> None:
    ids, suffix = llama.stored(128), llama.tokens(9)
    ranks.call(on_ranks, fail_once_on, 1)
    broken, again = (
        ranks.generate([(prompt(each, suffix), asking(PLANS["middle"]))])[0] for each in (ids, ids[:, :64])
    )
    assert broken.said == {"refused": "the context could not be read"}
    assert broken.tokens == llama.expected(ids, suffix, None)
    assert again.tokens == llama.expected(ids[:, :64], suffix, PLANS["middle"]) and again.said["loaded"]


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


def test_preempted_requests_are_filled_again(ranks: Engine, llama: Pair) -> None:
    """More requests than there are pages for, each over a context of its own."""
    suffix, plans = llama.tokens(9), [ds.Plan(), PLANS["middle"], PLANS["first"], PLANS["whole"]]
    contexts = [llama.stored(128) for _ in plans]
    ranks.call(count_preemptions)
    wishes = [(prompt(ids, suffix), asking(plan)) for ids, plan in zip(contexts, plans, strict=True)]
    found = ranks.generate(wishes, count=60)
    expected = [llama.expected(ids, suffix, plan, count=60) for ids, plan in zip(contexts, plans, strict=True)]
    assert [each.tokens for each in found] == expected
    assert ranks.call(preemptions) > 0


def count_preemptions(engine: Any) -> None:
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request
    scheduler.preemptions = 0

    def counting(*args: Any, **kwargs: Any) -> None:
        scheduler.preemptions += 1
        preempt(*args, **kwargs)

    scheduler._preempt_request = counting


def preemptions(engine: Any) -> int:
    return engine.llm_engine.engine_core.engine_core.scheduler.preemptions
