"""Several contexts in one cache, several suffixes on one context, several receivers of one context."""

import copy

import pytest
import torch
from support.compare import assert_bitwise_equal
from support.models import fine_tuned, tiny, tiny_llama, tokens
from support.prefills import prefill

import droidspeak_ops as ds

LAYERS = 6
greedy = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture
def pair() -> tuple:
    sender = tiny_llama(layers=LAYERS)
    return sender, fine_tuned(sender, 0.3)


def test_suffixes_of_different_lengths(pair) -> None:
    sender, receiver = pair
    plan = ds.Plan([(1, 3)], project=[4])
    sequences, suffixes = [tokens(count)[0] for count in (9, 17)], [tokens(count)[0] for count in (6, 2)]
    contexts = [ds.capture(sender, ids[None], layers=range(LAYERS)) for ids in sequences]
    cache = ds.partial_prefill_batch(receiver, contexts, plan)
    prompt = cache.prompt(suffixes)
    cache.check_prompt(prompt["input_ids"])
    together = receiver.generate(**prompt, past_key_values=cache, **greedy)
    for row, (ids, suffix) in enumerate(zip(sequences, suffixes, strict=True)):
        alone = prefill(sender, receiver, ids[None], plan)
        expected = receiver.generate(torch.cat([ids, suffix])[None], past_key_values=alone, **greedy)
        assert torch.equal(together[row, -10:], expected[0, -10:])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_several_suffixes_on_one_context(family: str) -> None:
    sender = tiny(family, LAYERS)
    receiver = fine_tuned(sender, 0.3)
    ids, suffixes = tokens(21), [tokens(4)[0] for _ in range(3)]
    cache = prefill(sender, receiver, ids, ds.Plan([(1, 3)]))
    several = copy.deepcopy(cache)
    several.batch_repeat_interleave(3)
    assert several.layers[5].keys.shape[0] == 3
    together = receiver.generate(**several.prompt(suffixes), past_key_values=several, **greedy)
    for row, suffix in enumerate(suffixes):
        alone = copy.deepcopy(cache)
        expected = receiver.generate(**alone.prompt([suffix]), past_key_values=alone, **greedy)
        assert torch.equal(together[row], expected[0])


def test_repeating_one_sequence_copies_nothing(pair) -> None:
    cache = prefill(*pair, tokens(12), ds.Plan([(1, 3)]))
    before = [layer.keys.data_ptr() for layer in cache.layers]
    cache.batch_repeat_interleave(4)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert cache.tokens.shape == (4, 12)


def test_one_context_for_several_receivers(pair) -> None:
    sender, _ = pair
    context = ds.capture(sender, tokens(12), layers=range(LAYERS))
    kept = copy.deepcopy(context)
    plans = [ds.Plan(), ds.Plan([(2, 5)]), ds.Plan(project="rest")]
    receivers = [fine_tuned(sender, 0.3) for _ in plans]
    caches = [ds.partial_prefill(each, context, plan) for each, plan in zip(receivers, plans, strict=True)]
    suffix = tokens(3)[0]
    for receiver, cache, plan in zip(receivers, caches, plans, strict=True):
        fresh = ds.partial_prefill(receiver, kept, plan)
        expected = receiver.generate(**fresh.prompt([suffix]), past_key_values=fresh, **greedy)
        assert torch.equal(receiver.generate(**cache.prompt([suffix]), past_key_values=cache, **greedy), expected)


def test_memory_grows_by_what_is_recomputed() -> None:
    """Eight receivers of 4,096 tokens, a third of the layers recomputed: less than half of eight caches."""
    model = tiny_llama(heads=2, kv_heads=2, head_dim=16, layers=LAYERS, max_position_embeddings=8192)
    context = ds.capture(model, tokens(4096), layers=[2])
    full = sum(kv.keys.nbytes + kv.values.nbytes for kv in context.keys_values)
    caches = [ds.partial_prefill(model, context, ds.Plan([(2, 4)])) for _ in range(8)]
    del context
    held = {}
    for cache in caches:
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values):
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert sum(held.values()) <= 0.45 * 8 * full
    assert not any(hasattr(cache, "context") for cache in caches), "what nobody reuses is freed with the context"


def test_equal_lengths_need_no_mask(pair) -> None:
    sender, receiver = pair
    ids = tokens(9, batch=3)
    contexts = [ds.capture(sender, rows, layers=range(LAYERS)) for rows in (ids[:1], ids[1:])]
    plan = ds.Plan([(1, 4)])
    cache = ds.partial_prefill_batch(receiver, contexts, plan)
    assert cache.mask is None
    assert torch.equal(cache.tokens, ids)
    for row in range(3):
        alone = prefill(sender, receiver, ids[row : row + 1], plan)
        for ours, theirs in zip(cache.layers, alone.layers, strict=True):
            # A batch of two is one matrix product, which may add up in another order than one of one.
            torch.testing.assert_close(ours.keys[row], theirs.keys[0])


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "exactly one"),
        ({"attention_mask": torch.ones(2, 5), "cu_seqlens": torch.tensor([0, 5])}, "exactly one"),
        ({"attention_mask": torch.ones(2, 4)}, r"got \(2, 4\) and \(2, 5\)"),
        (
            {"attention_mask": torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]])},
            "got none or padding between them in row 0",
        ),
        (
            {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])},
            "got none or padding between them in row 1",
        ),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens: expected .*got \[0, 5\] for input_ids \(2, 5\)"),
    ],
)
def test_bad_batches(pair, arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ds.capture_batch(pair[0], tokens(5, batch=2), **arguments)


@pytest.mark.parametrize("bounds", [[0], [1, 5], [0, 3, 3], [0, 4, 2], [0, 9]])
def test_bad_bounds(pair, bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens: expected .*got"):
        ds.capture_batch(pair[0], tokens(5)[0], cu_seqlens=torch.tensor(bounds))


def test_a_plan_for_each_context(pair) -> None:
    context = ds.capture(pair[0], tokens(4))
    with pytest.raises(ValueError, match="got 1 for 2"):
        ds.partial_prefill_batch(pair[1], [context, context], [ds.Plan()])
    with pytest.raises(ValueError, match="got 0 for 0"):
        ds.partial_prefill_batch(pair[1], [], ds.Plan())


def test_bad_suffixes(pair) -> None:
    cache = prefill(*pair, tokens(6, batch=2), ds.Plan())
    for suffixes in ([tokens(2)[0]], [tokens(2)[0], tokens(0)[0]]):
        with pytest.raises(ValueError, match="expected 2 of at least one token"):
            cache.prompt(suffixes)
    sender = tiny("mistral", LAYERS)
    cache = prefill(sender, sender, tokens(6, batch=2), ds.Plan())
    with pytest.raises(ValueError, match=r"expected one length, .*, got \[2, 3\]"):
        cache.prompt([tokens(2)[0], tokens(3)[0]])


def test_a_prompt_starts_at_the_context(pair) -> None:
    cache = prefill(*pair, tokens(6), ds.Plan())
    pair[1].generate(**cache.prompt([tokens(2)[0]]), past_key_values=cache, max_new_tokens=3)
    with pytest.raises(ValueError, match="expected a cache of its context's 6 tokens, got one that holds 10"):
        cache.prompt([tokens(2)[0]])


def test_padding_is_no_part_of_a_prompt(pair) -> None:
    sender, receiver = pair
    contexts = [ds.capture(sender, tokens(count)) for count in (4, 6)]
    cache = ds.partial_prefill_batch(receiver, contexts, ds.Plan())
    prompt = cache.prompt([tokens(2)[0], tokens(2)[0]])["input_ids"]
    prompt[0, :2] = 77
    cache.check_prompt(prompt)
    prompt[0, 2] = 0
    with pytest.raises(ds.ReuseError, match="expected the tokens of the context at their head, got another at token 2"):
        cache.check_prompt(prompt)


@pytest.mark.parametrize("capacity", [0, 5, 12])
def test_a_capacity_that_is_too_small(pair, capacity: int) -> None:
    with pytest.raises(ValueError, match=f"max_cache_len: expected more than 12, .* got {capacity}"):
        prefill(*pair, tokens(12), ds.Plan()).to_static(capacity)


def test_a_static_cache_leaves_the_context_alone(pair) -> None:
    sender, receiver = pair
    context = ds.capture(sender, tokens(8))
    before = copy.deepcopy(context)
    static = ds.partial_prefill(receiver, context, ds.Plan()).to_static(20)
    with torch.no_grad():
        receiver(tokens(3), past_key_values=static)
    for layer in range(LAYERS):
        assert_bitwise_equal(context.kv(layer).keys, before.kv(layer).keys)
