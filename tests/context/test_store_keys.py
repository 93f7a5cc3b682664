"""Keys that a store finds contexts by: heads of their tokens, their sender and their tenant."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from support.contexts import assert_same, files
from support.models import tiny_llama, tokens

import droidspeak_ops as ds
from bench.small_contexts import SENDER, head, make_context, make_sender, make_tokens
from droidspeak_ops.context.keys import BLOCK

WINDOWS = (None, 9, None)


# --- heads -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_the_longest_head_is_found(store: ds.ContextStore, quantized: bool) -> None:
    ids = make_tokens(3 * BLOCK + 9)
    whole = make_context(ids, layers=(1, 2))
    whole = whole.quantized(torch.int8) if quantized else whole

    def prompt(shared: int, more: int = 5) -> torch.Tensor:
        """So many tokens of the context, and then others."""
        return torch.cat([ids[:, :shared], (ids[:, shared : shared + 1] + 1) % 50, make_tokens(more)], 1)

    assert store.find(prompt(ids.shape[1] - 1), SENDER) is None
    store.save(whole)
    for shared, served in [(0, 0), (BLOCK - 1, 0), (BLOCK, BLOCK), (2 * BLOCK + 40, 2 * BLOCK), (3 * BLOCK, 3 * BLOCK)]:
        found = store.find(prompt(shared), SENDER)
        assert (found is None) == (served == 0)
        if found is not None:
            assert_same(found, head(whole, served))
    assert_same(store.find(torch.cat([ids, make_tokens(1)], 1), SENDER), whole)
    assert_same(store.find(ids, SENDER), head(whole, 3 * BLOCK))  # a token at least is left to the suffix
    assert_same(store.find(ids[:, : 3 * BLOCK], SENDER), head(whole, 2 * BLOCK))

    store.save(head(whole, 20))  # shorter than a block
    store.save(head(whole, 2 * BLOCK + 30))
    assert_same(store.find(prompt(40), SENDER), head(whole, 20))
    assert_same(store.find(prompt(2 * BLOCK + 40), SENDER), head(whole, 2 * BLOCK + 30))
    assert store.find(ids[:, :20], SENDER) is None
    store.prune(0)
    assert store.find(prompt(40), SENDER) is None


def test_of_files_that_serve_alike_the_smallest_is_read(store: ds.ContextStore) -> None:
    ids = make_tokens(5 * BLOCK)
    for length in (5 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK):
        store.save(head(make_context(ids), length))
    for each in files(store):
        os.utime(each, (0, 0))
    assert (
        store.find(torch.cat([ids[:, : 2 * BLOCK], 49 - ids[:, 2 * BLOCK : 3 * BLOCK]], 1), SENDER).tokens.shape[1]
        == 2 * BLOCK
    )
    used = [store.open(each.name).num_tokens for each in store.stored() if each.used]
    assert used == [2 * BLOCK + 1]


@pytest.mark.parametrize(
    "sender", [make_sender(WINDOWS), make_sender(rope_type="dynamic"), make_sender(rope_type="longrope")]
)
def test_windows_and_rope_by_length_have_whole_contexts_serve_alone(
    store: ds.ContextStore, sender: ds.Fingerprint
) -> None:
    ids = make_tokens(2 * BLOCK)
    context = make_context(ids, sender)
    store.save(context)
    assert store.find(torch.cat([ids[:, : BLOCK + 9], make_tokens(9)], 1), sender) is None
    assert store.find(ids, sender) is None
    assert_same(store.find(torch.cat([ids, make_tokens(1)], 1), sender), context)


def test_windows_that_hold_all_of_a_context_hold_its_heads(store: ds.ContextStore) -> None:
    sender = make_sender((None, 2 * BLOCK + 1, None))
    context = make_context(make_tokens(2 * BLOCK), sender)
    store.save(context)
    assert_same(store.find(context.tokens, sender), head(context, BLOCK))


def test_a_head_is_what_the_sender_makes_of_it_alone(store: ds.ContextStore) -> None:
    model, ids = tiny_llama(layers=3), tokens(150)
    context = ds.capture(model, ids, layers=[1, 2])
    store.save(context)
    found = store.find(torch.cat([ids[:, :140], ids[:, :3]], 1), context.sender)
    alone = ds.capture(model, ids[:, : 2 * BLOCK], layers=[1, 2])
    for layer in range(3):
        for ours, theirs in zip(found.kv(layer)[:2], alone.kv(layer)[:2], strict=True):
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found.hidden(2), alone.hidden(2))


# --- for whom ----------------------------------------------------------------------------------------------------------------


def _other_rope(sender: ds.Fingerprint, **changes: object) -> ds.Fingerprint:
    return dataclasses.replace(sender, rope={**sender.rope, **changes})


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(SENDER, weights="1" * 64),  # eps and all other numbers of a model are part of this digest
        dataclasses.replace(SENDER, tokenizer=f"50:{'1' * 64}"),
        dataclasses.replace(SENDER, tokenizer=None),
        dataclasses.replace(SENDER, dtype="bfloat16"),
        dataclasses.replace(SENDER, architecture={**SENDER.architecture, "vocab_size": 51}),
        _other_rope(SENDER, rope_theta=1e5),
        _other_rope(SENDER, applied="1" * 64),
    ],
)
def test_another_sender_finds_nothing(store: ds.ContextStore, other: ds.Fingerprint) -> None:
    context = make_context(make_tokens(70))
    store.save(context)
    prompt = torch.cat([context.tokens, make_tokens(1)], 1)
    assert store.load(context.tokens, SENDER) is not None and store.find(prompt, SENDER) is not None
    assert store.load(context.tokens, other) is None
    assert store.find(prompt, other) is None


def test_a_model_with_another_eps_weight_or_rope_finds_nothing(store: ds.ContextStore) -> None:
    model, ids = tiny_llama(layers=2), tokens(70)
    store.save(ds.capture(model, ids))

    def is_found() -> bool:
        return store.load(ids, ds.capture(model, ids[:, :1]).sender) is not None

    assert is_found()
    norm, rotary = model.model.layers[1].input_layernorm, model.model.rotary_emb
    norm.variance_epsilon *= 2
    assert not is_found()
    norm.variance_epsilon /= 2
    assert is_found()
    rotary.inv_freq *= 2
    assert not is_found()
    rotary.inv_freq /= 2
    assert is_found()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert not is_found()


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 5])
def test_other_tokens_find_nothing(store: ds.ContextStore, length: int) -> None:
    context = make_context(make_tokens(3 * BLOCK + 6))
    store.save(context)
    assert store.load(context.tokens[:, :length], SENDER) is None
    other = context.tokens.clone()
    other[0, length] = (other[0, length] + 1) % 50
    assert store.load(other, SENDER) is None


@pytest.mark.parametrize("tenant", [{}, {"namespace": "b"}, {"namespace": "a", "salt": "s"}, {"salt": "a"}])
def test_another_tenant_finds_nothing(tmp_path: Path, tenant: dict[str, str]) -> None:
    context = make_context(make_tokens(70))
    ours, theirs = ds.ContextStore(tmp_path, namespace="a"), ds.ContextStore(tmp_path, **tenant)
    ours.save(context)
    assert_same(ours.load(context.tokens, SENDER), context)
    assert theirs.load(context.tokens, SENDER) is None
    assert theirs.find(torch.cat([context.tokens] * 2, 1), SENDER) is None
    theirs.save(context)
    assert len(ours.stored()) == 2  # no name is of both
    content = b"".join(path.read_bytes() for path in files(ours))
    assert b'\\"namespace\\": \\"a\\"' in content and b"salt" not in content
