"""A store of contexts: what comes back, what is refused, and what is removed."""

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
from support.contexts import assert_equal, assert_same, files, read
from support.models import fine_tuned, tiny_llama, tokens

import droidspeak_ops as ds
from bench.small_contexts import LAYERS, SENDER, make_context, make_sender, make_tokens
from droidspeak_ops.context import entry
from droidspeak_ops.context.entry import Entry
from droidspeak_ops.context.keys import BLOCK
from droidspeak_ops.context.kv import KV
from droidspeak_ops.context.parts import SINKS, sinks_among

ROOT = Path(__file__).parent.parent.parent
WINDOWS = (None, 9, None)


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


@pytest.mark.parametrize(
    "plan",
    [
        ds.Plan([(1, 2)], project="rest"),
        ds.Plan(project=[1], select=4),
        ds.Plan([(2, 4)], project=[1], select=4),
    ],
    ids=str,
)
def test_a_receiver_fills_from_a_store_as_from_memory(store: ds.ContextStore, plan: ds.Plan) -> None:
    sender = tiny_llama(layers=6)
    receiver, prompt = fine_tuned(sender, 0.1), tokens(90)
    context = ds.capture(sender, prompt[:, :80], layers=plan.hidden_layers(6))
    store.save(context)
    stored = store.load(context.tokens, context.sender), store.find(prompt, context.sender)
    assert None not in stored
    expected, *others = (ds.partial_prefill(receiver, each, plan, prompt_ids=prompt) for each in (context, *stored))
    for cache in others:
        assert (cache.next_logits is None) == (not plan.select)
        if plan.select:
            assert torch.equal(cache.next_logits, expected.next_logits)
        for ours, theirs in zip(cache.layers, expected.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("length", [1, 3, 4, 9, 10, 11, 70])
def test_sinks_come_back_without_their_layers(
    store: ds.ContextStore, length: int, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = make_sender(WINDOWS)
    context = make_context(make_tokens(length), sender)
    context = context if dtype is None else context.quantized(dtype)
    store.save(context)
    read, fetch = [], Entry.fetch
    monkeypatch.setattr(Entry, "fetch", lambda self, name: read.append(name) or fetch(self, name))
    found = store.load(context.tokens, sender)
    for layer in range(LAYERS):
        count = sinks_among(context.kv(layer).keys.shape[2], length)
        assert_equal(found.sinks(layer, count), context.sinks(layer, count))
        assert_equal(found.to("cpu").sinks(layer, count), context.sinks(layer, count))
    assert not [name for name in read if name.startswith("kv.")]
    assert_same(found, context)


def test_sinks_of_a_head_are_those_of_the_whole(store: ds.ContextStore) -> None:
    context = make_context(make_tokens(BLOCK + 6))
    store.save(context)
    found = store.find(context.tokens, SENDER)
    assert found.tokens.shape[1] == BLOCK
    assert_equal(found.sinks(1, SINKS), context.sinks(1, SINKS))


@pytest.mark.parametrize("rows", [0, 1, SINKS + 1])
def test_sinks_are_those_of_their_layers_where_others_are_stored(
    store: ds.ContextStore, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(make_tokens(9))
    others = KV(*torch.zeros(2, 1, LAYERS * 2, rows, 4))
    apart = {} if not rows else {f"sinks.{name}": part for name, part in others._asdict().items() if part is not None}
    monkeypatch.setattr(entry, "sinks_of", lambda context: apart)
    store.save(context)
    found = store.load(context.tokens, SENDER)
    assert_equal(found.sinks(1, SINKS), context.sinks(1, SINKS))
    assert_same(found, context)


def test_layers_may_be_in_several_dtypes(store: ds.ContextStore) -> None:
    context = make_context(make_tokens(9))
    context = dataclasses.replace(context, keys_values=[context.quantized(torch.int8).kv(0), *context.keys_values[1:]])
    store.save(context)
    found = store.load(context.tokens, SENDER)
    for layer in range(LAYERS):
        assert_equal(found.sinks(layer, SINKS), context.sinks(layer, SINKS))
    assert_same(found, context)


def test_a_file_has_hidden_states_first_and_each_rotation_once(store: ds.ContextStore) -> None:
    store.save(make_context(make_tokens(3), layers=(2, 0)))
    (path,) = files(store)
    entry = store.open(store.stored()[0].name)
    assert entry.names == [
        "sinks.keys", "sinks.values", "hidden.0.states", "hidden.2.states",
        *(f"kv.{layer}.{half}" for layer in range(3) for half in ("keys", "values")),
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
