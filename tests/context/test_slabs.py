"""Memory that stored tensors are read into: whose it is, how long it is held, and what it is made of."""

import ctypes
import mmap
import os
import random
import re
import weakref
from collections import deque
from pathlib import Path

import pytest
import torch

import droidspeak_ops as ds
from bench.small_contexts import make_context, make_tokens
from droidspeak_ops.context import slabs
from droidspeak_ops.context.slabs import SLAB, Slabs


@pytest.fixture(autouse=True)
def _none_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "_spare", deque(maxlen=slabs.SPARE))


def address(piece: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(piece))


def test_pieces_are_aligned_and_apart() -> None:
    rng, memory = random.Random(0), Slabs(1 << 16)
    start, taken = 8, []
    for number in range(300):
        piece = memory.take(rng.choice([1, 7, 64, 500, 4096]), start)
        assert address(piece) % 64 == 0
        assert not 0 < (address(piece) - start) % 4096 < 64, "where processors are slow to copy to"
        piece[:] = bytes([number % 256]) * len(piece)
        taken.append(piece)
        start += len(piece)
    assert all(piece == bytes([number % 256]) * len(piece) for number, piece in enumerate(taken))
    assert len({id(piece.obj) for piece in taken}) < 30


def test_a_slab_is_freed_with_its_last_piece() -> None:
    memory = Slabs(1000)
    pieces = [memory.take(400, 0) for _ in range(3)]
    first, second = weakref.ref(pieces[0].obj), weakref.ref(pieces[2].obj)
    assert pieces[1].obj is first() is not second()
    del pieces[0]
    assert first() is not None
    del pieces[0]
    assert first() is None and second() is not None


def test_a_slab_is_used_again_when_nothing_holds_a_piece_of_it() -> None:
    """By others too, as contexts come and go; tensors hold pieces."""
    first, held = Slabs(SLAB).take(10, 0), torch.frombuffer(Slabs(SLAB).take(10, 0), dtype=torch.uint8)
    held.fill_(1)
    place = address(first)
    del first
    again, new = Slabs(10**12).take(20, 0), Slabs(SLAB).take(20, 0)
    assert address(again) == place not in (held.data_ptr(), address(new))
    again[:], new[:] = bytes(20), bytes(20)
    assert held.eq(1).all()


def test_few_slabs_are_kept_for_later() -> None:
    pieces = [Slabs(SLAB).take(1, 0) for _ in range(slabs.SPARE + 2)]
    assert len(slabs._spare) == 0
    pieces.clear()
    assert len(slabs._spare) == slabs.SPARE


@pytest.mark.parametrize(("most", "nbytes", "size"), [(1000, 10, 1000), (10**12, 10, SLAB), (100, SLAB + 5, SLAB + 5)])
def test_slabs_are_no_larger_than_what_they_are_for(most: int, nbytes: int, size: int) -> None:
    assert size <= len(Slabs(most).take(nbytes, 0).obj) < size + 128


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="has no huge pages")
def test_slabs_are_in_huge_pages() -> None:
    piece = Slabs(SLAB).take(10, 0)
    place, mapped = address(piece), Path("/proc/self/smaps").read_text()
    mappings = re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$", mapped, re.DOTALL | re.MULTILINE)
    flags = next((each[3] for each in mappings if int(each[1], 16) <= place < int(each[2], 16)), None)
    if flags is None:
        pytest.skip("the kernel does not tell")
    assert "hg" in flags.split()


def test_pages_are_what_they_are_without_huge_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError("no such advice")

    monkeypatch.setattr(slabs.mmap, "mmap", Refusing)
    assert Slabs(SLAB).take(10, 0) == bytes(10)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert Slabs(SLAB).take(10, 0) == bytes(10)


def test_what_was_read_is_not_read_over(store: ds.ContextStore) -> None:
    """A tensor keeps the bytes whose digest was checked, whatever comes of its file."""
    context = make_context(make_tokens(70))
    store.save(context)
    entry = store.open(store.stored()[0].name)
    before = {name: entry.fetch(name) for name in entry.names}
    copies = {name: tensor.clone() for name, tensor in before.items()}
    path = Path(store.url) / store.stored()[0].name
    with path.open("r+b") as file:  # the file that is open
        file.seek(-100, os.SEEK_END)
        file.write(bytes(100))
    with pytest.raises(ds.ReuseError, match="kv.2.values: expected the digest"):
        entry.fetch("kv.2.values")
    for name, tensor in copies.items():
        assert before[name].equal(tensor)
