"""Stores at URLs: fsspec's memory, and objects behind HTTP."""

import re
import threading
from collections.abc import Iterator

import fsspec
import pytest
import torch
from support.contexts import assert_same, read
from support.object_store import Objects, object_store

import droidspeak_ops as ds
from bench.small_contexts import SENDER, head, make_context, make_tokens
from droidspeak_ops.context.keys import BLOCK

fsspec.register_implementation("objects", Objects)


@pytest.fixture
def context() -> ds.SharedContext:
    return make_context(make_tokens(BLOCK + 6))


@pytest.fixture
def server() -> Iterator:
    with object_store() as served:
        yield served


@pytest.fixture(params=["memory", "objects"])
def url(request, server) -> Iterator[str]:
    if request.param == "memory":
        yield "memory://contexts/of us"
        fsspec.filesystem("memory").store.clear()
    else:
        yield f"objects://127.0.0.1:{server.server_port}/contexts"


def test_contexts_come_back_from_afar(url: str, context: ds.SharedContext) -> None:
    store = ds.ContextStore(url)
    prompt = torch.cat([context.tokens, make_tokens(1)], 1)
    assert store.load(context.tokens, SENDER) is None and store.find(prompt, SENDER) is None and store.stored() == []
    store.save(context)
    store.save(context.quantized(torch.int8))
    store.save(context)
    reader = ds.ContextStore(url)
    assert_same(reader.load(context.tokens, SENDER), context)
    assert_same(reader.find(prompt, SENDER), context)
    assert_same(reader.find(context.tokens, SENDER), head(context, BLOCK))
    assert [each.nbytes for each in reader.stored()] == [reader.open(reader.stored()[0].name)._file.nbytes]
    assert len(store.prune(0)) == 1
    assert store.stored() == [] and reader.find(prompt, SENDER) is None


def test_what_is_removed_while_it_is_read_is_named(url: str, context: ds.SharedContext) -> None:
    store = ds.ContextStore(url)
    store.save(context)
    name = store.stored()[0].name
    entry = store.open(name)
    store.prune(0)
    with pytest.raises(ds.ReuseError, match=re.escape(f"{url}/{name}: kv.0.keys: expected to read it, got: ")):
        entry.fetch("kv.0.keys")
    assert store.open(name) is None


def test_the_budget_of_a_remote_store(url: str) -> None:
    contexts = [make_context(make_tokens(9, seed)) for seed in range(4)]
    ds.ContextStore(url).save(contexts[0])
    budget = 3 * ds.ContextStore(url).stored()[0].nbytes
    store = ds.ContextStore(url, budget=budget)
    for context in contexts:
        store.save(context)
    assert 0 < sum(each.nbytes for each in store.stored()) <= budget
    assert_same(store.load(contexts[3].tokens, SENDER), contexts[3]) if url.startswith("memory") else None


@pytest.mark.parametrize("fault", [(206, 1), (206, 5), (500, 0), (503, 0), (403, 0)])
@pytest.mark.parametrize("reads", [0, 1, 2, 9])
def test_connections_that_fail_are_named(server, context: ds.SharedContext, fault: tuple[int, int], reads: int) -> None:
    """At the header's length, the header, a rotation, and a tensor."""
    store = ds.ContextStore(f"objects://127.0.0.1:{server.server_port}")
    store.save(context)
    server.faults = [*[(206, 0)] * reads, fault]
    with pytest.raises(ds.ReuseError, match=re.escape(f"{store.url}/") + ".* expected to read it, got: "):
        read(store.load(context.tokens, SENDER))
    assert_same(store.load(context.tokens, SENDER), context)


def test_damage_on_the_way_is_named(server, context: ds.SharedContext) -> None:
    store = ds.ContextStore(f"objects://127.0.0.1:{server.server_port}")
    store.save(context)
    ((name, content),) = server.objects.items()
    for at in (3, 50, len(content) - 1):
        server.objects[name] = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        with pytest.raises(ds.ReuseError, match=re.escape(name)):
            read(store.load(context.tokens, SENDER))


def test_listings_without_sizes_and_times_will_do(
    server, context: ds.SharedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of web servers."""
    store = ds.ContextStore(f"objects://127.0.0.1:{server.server_port}")
    store.save(context)
    found = Objects.find
    monkeypatch.setattr(Objects, "find", lambda *asked, **_: {name: {"size": None} for name in found(*asked)})
    assert [(each.nbytes, each.used) for each in store.stored()] == [(0, 0.0)]
    assert_same(store.find(torch.cat([context.tokens] * 2, 1), SENDER), context)


def test_threads_read_one_remote_context(server, context: ds.SharedContext) -> None:
    store = ds.ContextStore(f"objects://127.0.0.1:{server.server_port}")
    store.save(context)
    entry, found = store.open(store.stored()[0].name), []

    def read() -> None:
        found.append([torch.equal(entry.fetch(f"kv.{layer}.keys"), context.kv(layer).keys) for layer in range(3)])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[True] * 3] * 4


def test_urls_that_nothing_knows_are_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        ds.ContextStore("nowhere://contexts")
