"""Faults of files, disks and writers: what was written comes back, or an error that names the file, or nothing."""

import errno
import os
import random
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.contexts import assert_same, read

import droidspeak_ops as ds
from bench.small_contexts import SENDER, make_context, make_tokens
from bench.store import together
from droidspeak_ops import files
from droidspeak_ops.context import entry
from droidspeak_ops.context.keys import BLOCK


@pytest.fixture
def context() -> ds.SharedContext:
    return make_context(make_tokens(BLOCK + 6))


@pytest.fixture
def stored(tmp_path: Path, context: ds.SharedContext) -> tuple[ds.ContextStore, Path]:
    store = ds.ContextStore(tmp_path / "store")
    store.save(context)
    return store, Path(store.url) / store.stored()[0].name


# --- damage ------------------------------------------------------------------------------------------------------------------


def test_a_damaged_byte_of_any_part_is_named(stored, context: ds.SharedContext) -> None:
    store, path = stored
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    entry = store.open(store.stored()[0].name)
    ends = {header + place.data_offsets[1] - 1: name for name, place in entry._places.items() if name != "tokens"}
    for at in [*range(9), *range(9, header, 97), *ends]:
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        named = re.escape(str(path)) + (f": {re.escape(ends[at])}: expected the digest" if at in ends else ": ")
        with pytest.raises(ds.ReuseError, match=named):
            read(store.load(context.tokens, SENDER))
        with pytest.raises(ds.ReuseError, match=re.escape(str(path))):
            store.open(store.stored()[0].name).check_all()
    path.write_bytes(whole)
    assert_same(store.load(context.tokens, SENDER), context)


def test_a_file_that_is_cut_or_has_more_is_named(stored, context: ds.SharedContext) -> None:
    store, path = stored
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in [0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ds.ReuseError, match=re.escape(f"{path}: expected ")):
            store.load(context.tokens, SENDER)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ds.ReuseError, match=re.escape(f"{path}: expected ")):
        store.load(context.tokens, SENDER)


def test_a_file_that_is_cut_while_it_is_read_is_named(stored) -> None:
    store, path = stored
    entry = store.open(store.stored()[0].name)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ds.ReuseError, match=re.escape(f"{path}: kv.2.values: expected to read it, got: expected ")):
        entry.check_all()


def test_what_is_damaged_is_passed_over_where_another_head_is_found(stored, context: ds.SharedContext) -> None:
    store, path = stored
    whole, prompt = path.read_bytes(), torch.cat([context.tokens, make_tokens(1)], 1)
    shorter = make_context(context.tokens[:, :BLOCK])
    store.save(shorter)
    for damaged in (whole[:99], bytes([*whole[:99], whole[99] ^ 1, *whole[100:]])):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=re.escape(str(path)) + ".*; it is passed over"):
            assert_same(store.find(prompt, SENDER), shorter)
    store.save(context)
    assert_same(store.find(prompt, SENDER), context)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sinks.values": None}, "tensors: expected one named 'sinks.values', got none"),
        ({"sinks.keys": None}, "tensors: expected no others, got .'sinks.values'."),
        ({"sinks.keys": torch.ones(1, 5, 4, 4)}, "sinks: expected keys to be .*, got torch.float32 .1, 5, 4, 4."),
        ({"sinks.values": torch.ones(1, 6, 3, 4)}, "sinks: expected values to be .*, got torch.float32 .1, 6, 3, 4."),
        ({"sinks.k_scale": torch.ones(1, 6, 4)}, "sinks: expected k_scale to be none, got"),
        ({"sinks.other": torch.ones(1)}, "tensors: expected no others, got .'sinks.other'."),
    ],
)
def test_sinks_of_another_form_are_named(
    tmp_path: Path, context: ds.SharedContext, monkeypatch: pytest.MonkeyPatch, change: dict, message: str
) -> None:
    sinks_of = entry.sinks_of
    changed = lambda context: {name: part for name, part in {**sinks_of(context), **change}.items() if part is not None}  # noqa: E731
    monkeypatch.setattr(entry, "sinks_of", changed)
    store = ds.ContextStore(tmp_path)
    store.save(context)
    with pytest.raises(ds.ReuseError, match=f"^{re.escape(str(tmp_path))}/.*: {message}"):
        store.load(context.tokens, SENDER)


# --- writers that fail -------------------------------------------------------------------------------------------------------


def assert_old_or_none(store: ds.ContextStore, old: ds.SharedContext | None, tokens: torch.Tensor) -> None:
    """Assert that what was there is, and nothing else, under whatever name."""
    found = ds.ContextStore(store.url).load(tokens, SENDER)
    if old is None:
        assert found is None
    else:
        assert_same(found, old)
    left = [path for path in Path(store.url).rglob("*") if path.is_file()]
    assert len(left) == (old is not None)


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("replaces", [False, True])
def test_a_write_that_ends_anywhere_leaves_what_was_there(
    tmp_path: Path, context: ds.SharedContext, replaces: bool
) -> None:
    store = ds.ContextStore(tmp_path / "store")
    old = context.quantized(torch.int8) if replaces else None
    if old is not None:
        store.save(old)
    rng = random.Random(0)
    for nbytes in [0, 1, *(rng.randrange(20_000) for _ in range(8))]:
        with files_of_at_most(nbytes), pytest.raises(OSError, match=re.escape(str(tmp_path))):
            store.save(context)
        assert_old_or_none(store, old, context.tokens)
    store.save(context)
    assert_same(store.load(context.tokens, SENDER), context)


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_calls_of_the_system_that_fail_leave_what_was_there(
    tmp_path: Path, context: ds.SharedContext, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    store = ds.ContextStore(tmp_path / "store")

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(files.os, call, fail)
        with pytest.raises(OSError, match=re.escape(str(tmp_path))) as raised:
            store.save(context)
    assert raised.value.errno == code
    assert_old_or_none(store, None, context.tokens)
    store.save(context)
    assert_same(store.load(context.tokens, SENDER), context)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_reads_that_fail_are_named(
    stored, context: ds.SharedContext, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store, path = stored
    entry = store.open(store.stored()[0].name)

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ds.ReuseError, match=re.escape(f"{path}: kv.0.keys: expected to read it, got: ")):
        entry.fetch("kv.0.keys")
    with pytest.raises(ds.ReuseError, match=re.escape(f"{path}: expected to read it, got: ")):
        store.load(context.tokens, SENDER)


def test_a_file_that_may_not_be_read_is_named(
    stored, context: ds.SharedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = stored

    def refuse(name: Path, *_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ds.ReuseError, match=re.escape(f"{path}: expected to read it, got: ") + ".*Permission denied"):
        store.load(context.tokens, SENDER)


def test_what_killed_writers_have_left_is_removed_by_whoever_writes_or_prunes(stored) -> None:
    store, path = stored
    scratch = path.with_name(f".{path.name}.{files._machine()}.{'0' * 32}")
    for remove in (lambda: store.prune(10**9), lambda: store.save(make_context(make_tokens(5)))):
        scratch.write_bytes(b"half")
        before = len(store.stored())
        remove()
        assert not scratch.exists() and path.exists() and len(store.stored()) >= before


def test_processes_that_read_write_and_evict(tmp_path: Path) -> None:
    row = together(tmp_path, processes=3, seconds=1.5, seed=0)
    assert row["wrong"] == 0, row["first"]
    assert row["read"] and row["missed"] and row["written"]
