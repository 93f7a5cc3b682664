"""A sender inside vLLM: contexts that it captures are those of transformers, and either's receivers read them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.compare import assert_close
from support.engine import Engine
from support.serving import LAYERS, PLANS, Pair, asking, prompt

import droidspeak_ops as ds

pytest.importorskip("vllm.config")

CAPTURE = {"capture": True}
HIDDEN = tuple(range(1, LAYERS))
COMPILED = "qwen3"  # which takes a minute


@pytest.fixture(scope="module")
def sender(llama: Pair, start: Callable[..., Engine]) -> Engine:
    """An engine of so few tokens a step that contexts are captured in chunks."""
    transfer = llama.settings("kv_producer", hidden_layers=HIDDEN)
    return start(llama.sender_folder, transfer, max_num_batched_tokens=64, max_num_seqs=8)


def found(pair: Pair, ids: torch.Tensor, model: str = "sender") -> ds.SharedContext:
    """The stored context of these tokens, for which transformers' fingerprint of the model is asked."""
    context = pair.store.load(ids, pair.captured(ids[:, :1], model).sender)
    assert context is not None
    return context


def assert_as_captured(context: ds.SharedContext, expected: ds.SharedContext) -> None:
    """By transformers, up to the rounding of as many layers."""
    assert context.sender == expected.sender
    assert torch.equal(context.tokens, expected.tokens)
    assert context.hidden_layers == expected.hidden_layers
    for layer in range(LAYERS):
        for ours, theirs in zip(context.kv(layer)[:2], expected.kv(layer)[:2], strict=True):
            assert_close(ours, theirs, torch.float32, operations=4 * LAYERS)
        for ours, theirs in zip(context.rotations[layer], expected.rotations[layer], strict=True):
            assert_close(ours, theirs, torch.float32)
    for layer in expected.hidden_layers:
        assert_close(context.hidden(layer), expected.hidden(layer), torch.float32, operations=4 * LAYERS)


def test_contexts_of_one_batch_are_those_of_transformers(sender: Engine, llama: Pair) -> None:
    """In chunks, beside requests that are not captured."""
    first, second, third, plain = (llama.tokens(count) for count in (150, 70, 9, 100))
    batch = [
        (each[0].tolist(), wish)
        for each, wish in zip((first, plain, second, third), (CAPTURE, ..., CAPTURE, CAPTURE), strict=True)
    ]
    outputs = sender.generate(batch, count=3)
    assert [each.said for each in outputs] == [
        {"capture_tokens": 150},
        {},
        {"capture_tokens": 70},
        {"capture_tokens": 9},
    ]
    for ids in (first, second, third):
        assert_as_captured(found(llama, ids), llama.captured(ids))
    assert llama.store.load(plain, found(llama, first).sender) is None


def test_what_is_cached_already_is_captured_as_a_whole(sender: Engine, llama: Pair) -> None:
    ids = llama.tokens(128)
    sender.generate([(ids[0].tolist(), ...)])
    sender.generate([(ids[0].tolist(), CAPTURE)])
    assert_as_captured(found(llama, ids), llama.captured(ids))


def test_as_many_tokens_are_captured_as_a_request_wants(sender: Engine, llama: Pair) -> None:
    ids = llama.tokens(128)
    sender.generate([(ids[0].tolist(), {"capture": True, "prefix_tokens": 100})])
    assert_as_captured(found(llama, ids[:, :100]), llama.captured(ids[:, :100]))


@pytest.mark.parametrize("name", ["reuse", "middle", "two"])
def test_both_kinds_of_receivers_read_it(name: str, sender: Engine, receiver: Engine, llama: Pair) -> None:
    ids, suffix, plan = llama.tokens(128), llama.tokens(9), PLANS[name]
    sender.generate([(ids[0].tolist(), CAPTURE)], count=1)
    expected = llama.expected(ids, suffix, plan)
    assert llama.generated(found(llama, ids), suffix, plan) == expected
    (output,) = receiver.generate([(prompt(ids, suffix), asking(plan))])
    assert output.tokens == expected and output.said["loaded"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_families(family: str, pair: Callable[[str], Pair], start: Callable[..., Engine]) -> None:
    """One server that captures its own contexts and reuses those of another: with norms of K, and with biases.

    It has fewer pages than its requests need, so that some are preempted and filled, or captured, again.
    """
    of_family = pair(family)
    senders = {"base": {"model": of_family.sender_folder}, "own": {"model": of_family.receiver_folder}}
    transfer = of_family.settings("kv_both", senders=senders, hidden_layers=HIDDEN)
    both = start(of_family.receiver_folder, transfer, enforce_eager=family != COMPILED, num_gpu_blocks_override=20)
    both.call(count_preemptions)

    mine, ids, suffix = of_family.tokens(128), of_family.stored(128), of_family.tokens(9)
    wishes = [(prompt(ids, suffix), asking(plan)) for plan in PLANS.values()]
    *mixed, captured = both.generate([*wishes, (mine[0].tolist(), CAPTURE)], count=60)
    expected = [of_family.expected(ids, suffix, plan, count=60) for plan in PLANS.values()]
    assert [each.tokens for each in mixed] == expected
    assert all(each.said["loaded"] for each in mixed) and captured.said == {"capture_tokens": 128}
    assert_as_captured(found(of_family, mine, "receiver"), of_family.captured(mine, "receiver"))
    assert both.call(preemptions) > 0

    (own,) = both.generate([(prompt(mine, suffix), asking(PLANS["reuse"], sender="own"))])
    assert own.tokens == of_family.expected(mine, suffix, None) and own.said["loaded"]
    both.close()


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
