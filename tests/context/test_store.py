"""A store of contexts: what comes back, for whom, and what is refused."""

import dataclasses
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.contexts import assert_same, read
from support.models import fine_tuned, tiny_llama, tokens

import droidspeak_ops as ds
from bench.small_contexts import LAYERS, SENDER, head, make_context, make_sender, make_tokens
from droidspeak_ops.context.keys import BLOCK

ROOT = Path(__file__).parent.parent.parent
WINDOWS = (None, 9, None)


@pytest.fixture
def store(tmp_path: Path) -> ds.ContextStore:
    return ds.ContextStore(tmp_path / "store")


def files(store: ds.ContextStore) -> list[Path]:
    return [Path(store.url) / each.name for each in store.stored()]


# --- what comes back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("windows", [(None,) * LAYERS, WINDOWS])
def test_a_context_comes_back(store: ds.ContextStore, windows: tuple, dtype: torch.dtype | None) -> None:
    sender = make_sender(windows)
    context = make_context(make_tokens(70), sender, layers=(1, 2))
    context = context if dtype is None else context.quantized(dtype)
    store.save(context)
    for reader in (store, ds.ContextStore(store.url)):
        found = reader.load(context.tokens, sender)
        assert_same(found, context)
        assert found.rotations[0] is found.rotations[2]
        assert_same(reader.find(torch.cat([context.tokens, make_tokens(1)], 1), sender), context)


def test_views_and_half_precision_come_back(store: ds.ContextStore) -> None:
    sender = ds.Fingerprint({**SENDER.architecture}, SENDER.rope, "bfloat16", "1" * 64)
    context = make_context(make_tokens(5))
    context = dataclasses.replace(
        context,
        keys_values=[
            kv._replace(keys=kv.keys.bfloat16().mT.contiguous().mT, values=kv.values.bfloat16())
            for kv in context.keys_values
        ],
        hidden_states={1: context.hidden(1).bfloat16()},
        rotations=[None, *context.rotations[1:]],
        sender=sender,
    )
    store.save(context)
    assert_same(store.load(context.tokens, sender), context)


def test_a_receiver_fills_from_a_store_as_from_memory(store: ds.ContextStore) -> None:
    model, ids, plan = tiny_llama(layers=4), tokens(80), ds.Plan([(1, 2)], project="rest")
    context = ds.capture(model, ids, layers=plan.hidden_layers(4))
    store.save(context)
    found = store.find(torch.cat([ids, ids[:, :3]], 1), context.sender)
    ours, theirs = (ds.partial_prefill(model, each, plan) for each in (found, context))
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


def test_a_file_has_hidden_states_first_and_each_rotation_once(store: ds.ContextStore) -> None:
    store.save(make_context(make_tokens(3), layers=(2, 0)))
    (path,) = files(store)
    entry = store.open(store.stored()[0].name)
    assert entry.names == [
        "hidden.0.states", "hidden.2.states", *(f"kv.{layer}.{half}" for layer in range(3) for half in ("keys", "values"))
    ]  # fmt: skip
    tensors = load_file(path)  # any reader of safetensors can
    assert sorted(tensors.keys() - set(entry.names)) == [
        "rotation.0.cos", "rotation.0.sin", "rotation.1.cos", "rotation.1.sin", "tokens"
    ]  # fmt: skip
    for name in entry.names:
        assert torch.equal(entry.fetch(name), tensors[name])


def test_the_last_context_of_its_tokens_counts(store: ds.ContextStore) -> None:
    context = make_context(make_tokens(9))
    store.save(context)
    store.save(context.quantized(torch.int8))
    assert len(store.stored()) == 1
    assert_same(store.load(context.tokens, SENDER), context.quantized(torch.int8))


def test_a_context_of_hugging_face_is_read_without_transformers(store: ds.ContextStore) -> None:
    context = ds.capture(tiny_llama(layers=2), tokens(70), layers=[1])
    store.save(context)
    torch.save({"tokens": context.tokens, "keys": context.kv(1).keys}, Path(store.url) / "expected")
    script = f"""
import sys, torch
import droidspeak_ops as ds
expected = torch.load({f"{store.url}/expected"!r})
store = ds.ContextStore({store.url!r})
sender = store.open(store.stored()[0].name).manifest.context.sender
assert torch.equal(store.load(expected["tokens"], sender).kv(1).keys, expected["keys"])
assert store.find(expected["tokens"], sender).tokens.shape == (1, 64)
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


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


def test_files_are_their_owners_alone(store: ds.ContextStore) -> None:
    before = os.umask(0)
    try:
        store.save(make_context(make_tokens(5)))
    finally:
        os.umask(before)
    (path,) = files(store)
    modes = [each.stat().st_mode & 0o777 for each in (path, path.parent, path.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]


# --- what is refused ---------------------------------------------------------------------------------------------------------


def test_mixed_keys_and_values_are_never_stored(store: ds.ContextStore) -> None:
    model, ids = tiny_llama(layers=2), tokens(9)
    cache = ds.partial_prefill(model, ds.capture(model, ids), ds.Plan())
    with pytest.raises(TypeError, match="context: expected a SharedContext, got MixedCache"):
        store.save(cache)
    assert store.stored() == []


def test_a_sender_without_a_digest_of_weights_is_refused(store: ds.ContextStore) -> None:
    context = make_context(make_tokens(5), dataclasses.replace(SENDER, weights=None))
    calls: list[Callable[[], object]] = [
        lambda: store.save(context),
        lambda: store.load(context.tokens, context.sender),
        lambda: store.find(context.tokens, context.sender),
    ]
    for call in calls:
        with pytest.raises(ds.ReuseError, match="sender: expected a fingerprint with a digest of the weights"):
            call()


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(2, 5, dtype=torch.int64),
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(1, 5),
        torch.zeros(1, 0, dtype=torch.int64),
    ],
)
def test_tokens_that_are_not_one_row_are_refused(store: ds.ContextStore, ids: torch.Tensor) -> None:
    for call in (store.load, store.find):
        with pytest.raises(ValueError, match=r"tokens: expected int64 \[1, T\], got"):
            call(ids, SENDER)


def test_a_batch_is_refused(store: ds.ContextStore) -> None:
    context = ds.capture(tiny_llama(layers=2), torch.cat([tokens(5), tokens(5)]))
    with pytest.raises(ValueError, match=r"tokens: expected int64 \[1, T\], got torch.int64 \(2, 5\)"):
        store.save(context)


def test_a_context_beyond_the_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget: expected bytes, or None for no limit, got 0"):
        ds.ContextStore(tmp_path, budget=0)
    store = ds.ContextStore(tmp_path, budget=2000)
    with pytest.raises(ValueError, match="context: expected at most 2000 bytes, the budget, got"):
        store.save(make_context(make_tokens(5)))
    assert store.stored() == []


def test_a_file_under_another_name_is_refused(store: ds.ContextStore) -> None:
    one, other = (make_context(make_tokens(5, seed)) for seed in (0, 1))
    store.save(one)
    (path,) = files(store)
    store.save(other)
    (its,) = {*files(store)} - {path}
    its.write_bytes(path.read_bytes())
    with pytest.raises(ds.ReuseError, match=re.escape(f"{its}: expected the context that its name says, got another")):
        store.load(other.tokens, SENDER)


# --- budget ------------------------------------------------------------------------------------------------------------------


def test_what_was_not_used_for_longest_is_removed(tmp_path: Path) -> None:
    contexts = [make_context(make_tokens(5, seed)) for seed in range(4)]
    store = ds.ContextStore(tmp_path)
    for context in contexts[:3]:
        store.save(context)
    nbytes = store.stored()[0].nbytes
    for age, each in enumerate(store.stored()):
        os.utime(tmp_path / each.name, (0, 1000 - age))
    assert store.load(contexts[0].tokens, SENDER) is not None
    ds.ContextStore(tmp_path, budget=3 * nbytes).save(contexts[3])
    held = [store.load(context.tokens, SENDER) is not None for context in contexts]
    assert held == [True, False, True, True] and len(store.stored()) == 3
    removed = store.prune(nbytes)
    assert len(removed) == 2 and len(store.stored()) == 1


def test_room_is_made_before_a_context_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = [make_context(make_tokens(5, seed)) for seed in range(3)]
    ds.ContextStore(tmp_path).save(contexts[0])
    budget = 2 * ds.ContextStore(tmp_path).stored()[0].nbytes
    store, held = ds.ContextStore(tmp_path, budget=budget), []
    write = store._storage.write

    def written(name: str, parts: list[memoryview]) -> None:
        held.append(sum(each.nbytes for each in store.stored()) + sum(map(len, parts)))
        write(name, parts)

    monkeypatch.setattr(store._storage, "write", written)
    for context in contexts[1:]:
        store.save(context)
    assert len(held) == 2 and max(held) <= budget


def test_no_file_stays_open_of_a_context_that_is_let_go(store: ds.ContextStore) -> None:
    context = make_context(make_tokens(5))
    store.save(context)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert store.load(context.tokens, SENDER) is not None
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_of_others_are_left_alone(store: ds.ContextStore) -> None:
    store.save(make_context(make_tokens(5)))
    theirs = [Path(store.url) / "models" / "a.safetensors", files(store)[0].with_name("b.safetensors")]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"weights")
    assert len(store.stored()) == 1
    store.prune(0)
    assert store.stored() == [] and all(path.exists() for path in theirs)


def test_looking_does_not_count_as_use(store: ds.ContextStore) -> None:
    ids = make_tokens(BLOCK + 5)
    store.save(make_context(ids))
    (path,) = files(store)
    os.utime(path, (0, 0))
    store.open(store.stored()[0].name).check_all()
    assert store.find(ids[:, :BLOCK], SENDER) is None
    assert path.stat().st_mtime == 0
    assert store.find(ids, SENDER) is not None
    assert path.stat().st_mtime > 0


def test_what_is_being_read_outlives_its_removal(store: ds.ContextStore) -> None:
    context = make_context(make_tokens(5))
    store.save(context)
    entry = store.open(store.stored()[0].name)
    store.prune(0)
    assert store.stored() == [] and store.load(context.tokens, SENDER) is None
    entry.check_all()
    assert torch.equal(entry.fetch("kv.1.keys"), context.kv(1).keys)


def test_the_rate_of_reading_is_known_once_something_was_read(store: ds.ContextStore) -> None:
    context = make_context(make_tokens(70))
    store.save(context)
    found = store.load(context.tokens, SENDER)
    assert store.bandwidth is None
    read(found)
    assert 0 < store.bandwidth < 1e12


@pytest.mark.parametrize("band", [(), [(2, 4)]])
def test_a_stored_context_is_prefilled_as_one_in_memory(store: ds.ContextStore, band) -> None:
    sender = tiny_llama(layers=6)
    receiver, prompt = fine_tuned(sender, 0.1), tokens(90)
    plan = ds.Plan(band, project=[1], select=4)
    context = ds.capture(sender, prompt[:, :80], layers=plan.hidden_layers(6))
    store.save(context)
    stored = (store.load(context.tokens, context.sender), store.find(prompt, context.sender))
    expected, *others = (
        ds.partial_prefill(receiver, each, plan, prompt_ids=prompt) for each in (context, *stored) if each is not None
    )
    assert len(others) == 2
    for cache in others:
        assert torch.equal(cache.next_logits, expected.next_logits)
        for ours, theirs in zip(cache.layers, expected.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
