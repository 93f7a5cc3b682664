"""Contexts that are still being read: the same as in memory, checked, in order, and with errors instead of waiting for ever."""

import copy
import dataclasses
import gc
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.compare import assert_bitwise_equal
from support.loading import PATIENCE, Source, await_event, await_readers
from support.models import tiny, tiny_llama, tokens

import droidspeak_ops as ds
from bench.fuzzing.wholes import make_context
from droidspeak_ops.context import loading
from droidspeak_ops.context.loading import LoadingContext, throttled

STORED = [None, torch.int8, torch.float8_e4m3fn]


def made(stored: torch.dtype | None = None) -> ds.SharedContext:
    context = ds.capture(tiny("gemma3_text", 4), tokens(20), layers=[1, 3])
    return context if stored is None else context.quantized(stored)


def assert_same(one: ds.SharedContext, other: ds.SharedContext) -> None:
    (values, tensors), (expected, in_memory) = one._described(), other._described()
    assert values == expected and list(tensors) == list(in_memory)
    for name, tensor in tensors.items():
        assert_bitwise_equal(tensor.cpu(), in_memory[name])


# --- what it is ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", STORED)
def test_it_is_what_it_is_in_memory(stored: torch.dtype | None, tmp_path: Any) -> None:
    context = made(stored)
    assert_same(Source(context).loading(), context)
    for layer in range(4):
        assert_bitwise_equal(Source(context).loading().unrotated(layer), context.unrotated(layer))
    for layer in (1, 3):
        assert_bitwise_equal(Source(context).loading().hidden(layer), context.hidden(layer))
        assert_bitwise_equal(Source(context).loading().rstd(layer, 1e-6), context.rstd(layer, 1e-6))
    Source(context).loading().save(tmp_path / "context")
    assert_same(ds.SharedContext.load(tmp_path / "context"), context)
    arriving = Source(context).loading()
    assert (arriving.nbytes, arriving.num_layers, arriving.hidden_layers) == (context.nbytes, 4, (1, 3))
    arriving.check_finite()
    assert arriving.kv(1).keys is arriving.kv(1).keys


def test_what_is_made_of_it_is_what_is_made_in_memory() -> None:
    context = made()
    assert_same(Source(context).loading().quantized(torch.int8), context.quantized(torch.int8))
    for other in (copy.deepcopy(Source(context).loading()), copy.copy(Source(context).loading())):
        assert_same(other, context)
    without = dataclasses.replace(Source(context).loading(), hidden_states={})
    assert without.hidden_layers == ()
    without.prefetch([("kv", 2)])
    assert_same(without, dataclasses.replace(context, hidden_states={}))
    assert_same(dataclasses.replace(Source(context).loading(), hidden_states={}).to("cpu"), without)


def test_on_another_device_nothing_is_read_twice() -> None:
    context = made()
    source = Source(context)
    arriving = source.loading()
    arriving.kv(2)
    moved = arriving.to("cpu")
    assert isinstance(moved, LoadingContext) and moved.rotations[0][0] is moved.rotations[1][0]
    assert_same(moved, context)
    assert sorted(source.asked) == sorted(source.tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", STORED)
def test_on_a_gpu(stored: torch.dtype | None) -> None:
    context = made(stored)
    moved = Source(context).loading(threads=2).to("cuda")
    moved.prefetch([("hidden", 3), ("kv", 0), ("kv", 1)])
    assert moved.kv(0).keys.is_cuda and moved.hidden(3).is_cuda
    assert_same(moved, context)
    assert_same(moved.to("cpu"), context)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names[1:], r"names: expected one of .* of kv.0, got \['values'\]"),
        (lambda names: names[2:], r"names: expected K and V of layers 0 to 2, got those of \[1, 2\]"),
        (lambda names: [*names, "kv.3.keys", "kv.3.values"], r"of layers 0 to 2, got those of \[0, 1, 2, 3\]"),
        (lambda names: [*names, "kv.0.k_scale"], r"of kv.0, got \['k_scale', 'keys', 'values'\]"),
        (lambda names: [*names, "kv.0.keys"], r"of kv.0, got \['keys', 'keys', 'values'\]"),
        (lambda names: [*names, "hidden.1.keys"], r"of hidden.1, got \['keys', 'states'\]"),
        (lambda names: [*names, "hidden.3.states"], r"hidden_states: expected layers 0 to 2, got \[3\]"),
        (lambda names: [*names, "sinks.keys"], r"names: expected one of .* of sinks, got \['keys'\]"),
        (lambda names: [*names, "sinks.0.keys"], "names: expected names such as 'kv.3.keys', got 'sinks.0.keys'"),
        (lambda names: [*names, "tokens"], "names: expected names such as 'kv.3.keys', got 'tokens'"),
        (lambda names: [*names, "kv.01.keys"], "names: expected names such as 'kv.3.keys', got 'kv.01.keys'"),
    ],
)
def test_names_that_are_none_of_a_context_are_refused(change: Any, message: str) -> None:
    context = make_context()
    names = change(list(Source(context).tensors))
    with pytest.raises(ValueError, match=message):
        LoadingContext.over(context.tokens, context.rotations, context.sender, names, Source(context).fetch)


def test_what_else_does_not_fit_is_refused() -> None:
    context = make_context()
    source = Source(context)
    rest: Any = (context.sender, source.tensors, source.fetch)
    with pytest.raises(ValueError, match="threads: expected 1 or more, got 0"):
        source.loading(threads=0)
    with pytest.raises(ValueError, match="tokens: expected int64"):
        LoadingContext.over(context.tokens.int(), context.rotations, *rest)
    with pytest.raises(ValueError, match="rotations: expected an entry for each layer of 3, got 2"):
        LoadingContext.over(context.tokens, context.rotations[:2], *rest)
    with pytest.raises(ValueError, match="rotations: expected cos to be floating"):
        LoadingContext.over(context.tokens, [(torch.ones(4, 2),) * 2] * 3, *rest)
    unknown = dataclasses.replace(context.sender, architecture={"num_hidden_layers": 3})
    with pytest.raises(ValueError, match="architecture: expected .*head_dim"):
        LoadingContext.over(context.tokens, context.rotations, unknown, *rest[1:])
    with pytest.raises(ds.ReuseError, match="hidden states: expected them at layers .2., got them at .1."):
        source.loading().prefetch([("hidden", 2)])
    assert source.asked == []


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("kv.1.keys", torch.ones(1, 2, 4, 4), "layer 1: expected keys of 3 tokens by its sliding window, got 4"),
        ("kv.2.keys", torch.ones(2, 5, 4), r"layer 2: expected keys \[B, K, N, D\]"),
        ("kv.2.values", torch.ones(1, 2, 5, 4).half(), "layer 2: expected values to be .* got torch.float16"),
        ("kv.0.values", torch.ones(1, 2, 5, 8), r"layer 0: expected values to be .* got .*\(1, 2, 5, 8\)"),
        ("hidden.1.states", torch.ones(1, 5, 8), r"hidden states of layer 1: expected torch.float32 \(1, 5, 16\)"),
        ("sinks.keys", torch.ones(1, 6, 3, 4), r"sinks: expected keys to be .* \(1, 6, 4, 4\), got .*\(1, 6, 3, 4\)"),
        ("sinks.values", torch.ones(1, 4, 4, 4), r"sinks: expected values to be .* \(1, 6, 4, 4\), got"),
    ],
)
def test_what_arrives_is_checked_before_it_is_used(name: str, tensor: torch.Tensor, message: str) -> None:
    context = make_context()
    source = Source(context, sinks=True)
    source.tensors[name] = tensor
    arriving = source.loading()
    what, *layer = name.split(".")[:-1]
    read = what, int(*layer)
    use = {"kv": arriving.kv, "hidden": arriving.hidden, "sinks": lambda layer: arriving.sinks(layer, 1)}[what]
    with pytest.raises(ValueError, match=message):
        use(read[1])
    with pytest.raises(ValueError, match=message):
        arriving.wait([read])


# --- how it is read ------------------------------------------------------------------------------------------------------


def test_nothing_is_read_unless_it_is_asked_for_and_then_in_order() -> None:
    source = Source(make_context())
    arriving = source.loading()
    reads = [("hidden", 1), ("kv", 2), ("kv", 0)]
    assert not arriving.has_arrived(reads) and source.asked == []
    arriving.prefetch([*reads, *reads])
    arriving.prefetch(reads)
    arriving.wait(reads)
    assert arriving.has_arrived(reads) and not arriving.has_arrived([("kv", 1)])
    assert source.asked == ["hidden.1.states", "kv.2.keys", "kv.2.values", "kv.0.keys", "kv.0.values"]
    await_readers()
    arriving.kv(1)
    assert source.asked[5:] == ["kv.1.keys", "kv.1.values"]


def held_up() -> tuple[Source, threading.Event, threading.Event]:
    """A source that gives nothing until it is told to, and the events that it was asked and that it is told."""
    begun, let_through = threading.Event(), threading.Event()

    def wait(name: str) -> None:
        begun.set()
        await_event(let_through)

    return Source(make_context(), wait), begun, let_through


def test_what_is_used_is_read_before_what_was_asked_for_ahead() -> None:
    source, begun, let_through = held_up()
    arriving = source.loading()
    arriving.prefetch([("kv", 0), ("kv", 1)])
    await_event(begun)
    keys, values = arriving.keys_values.reader.ask(["kv.2.keys", "kv.2.values"], first=True)
    let_through.set()
    arriving.wait([("kv", 1)])
    assert arriving.kv(2) == (keys.result(), values.result(), None, None)
    assert source.asked == ["kv.0.keys", "kv.2.keys", "kv.2.values", "kv.0.values", "kv.1.keys", "kv.1.values"]


def test_several_threads_have_one_tensor_each_in_flight() -> None:
    together, lock = threading.Barrier(3, timeout=PATIENCE), threading.Lock()
    in_flight, most = 0, 0

    def count(name: str) -> None:
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        together.wait()  # breaks, and the read with it, unless three threads are here at once
        with lock:
            in_flight -= 1

    source = Source(make_context(), count)
    arriving = source.loading(threads=3)
    arriving.prefetch([("kv", 0), ("kv", 1), ("kv", 2)])
    arriving.wait([("kv", 2), ("kv", 1), ("kv", 0)])
    assert sorted(source.asked) == sorted(name for name in source.tensors if name.startswith("kv"))
    assert most <= 3


def test_reading_ends_when_nothing_holds_the_context() -> None:
    source, begun, let_through = held_up()
    arriving = source.loading()
    arriving.prefetch([("kv", 0), ("kv", 1)])
    await_event(begun)
    del arriving
    gc.collect()
    let_through.set()
    await_readers()
    assert source.asked == ["kv.0.keys"]


def test_reading_goes_on_for_what_is_made_of_a_context() -> None:
    source, begun, let_through = held_up()
    arriving = source.loading()
    arriving.prefetch([("kv", 0)])
    await_event(begun)
    without = dataclasses.replace(arriving, hidden_states={})
    del arriving
    gc.collect()
    let_through.set()
    without.wait([("kv", 0)])
    assert source.asked == ["kv.0.keys", "kv.0.values"]


def test_every_waiter_gets_the_error() -> None:
    begun, let_through = threading.Event(), threading.Event()

    def fail(name: str) -> None:
        begun.set()
        await_event(let_through)
        raise OSError(f"{name}: no such block")

    arriving = Source(make_context(), fail).loading()
    arriving.prefetch([("kv", 0), ("kv", 1)])
    await_event(begun)
    found: list[BaseException] = []

    def wait(layer: int) -> None:
        try:
            arriving.kv(layer)
        except OSError as error:
            found.append(error)

    waiting = [threading.Thread(target=wait, args=(layer,), daemon=True) for layer in (0, 0, 1)]
    for thread in waiting:
        thread.start()
    let_through.set()
    for thread in waiting:
        thread.join(PATIENCE)
    assert len(found) == 3 and all("no such block" in str(error) for error in found)
    assert all("of a context was read" in error.__notes__[0] for error in found)
    await_readers()


def test_a_tensor_that_could_not_be_read_is_read_again_when_it_is_asked_for_again() -> None:
    failed: list[str] = []

    class StoppedError(BaseException):
        """No ``Exception``, as a thread may raise it, too."""

    def fail_once(name: str) -> None:
        if name not in failed:
            failed.append(name)
            raise StoppedError

    context = make_context()
    source = Source(context, fail_once)
    arriving = source.loading()
    for _ in source.tensors:
        with pytest.raises(StoppedError):
            arriving.nbytes  # noqa: B018
    assert_same(arriving, context)


def test_reading_at_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now, overslept, slept = 0.0, 0.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds + overslept
        slept.append(seconds)

    def fetch(name: str) -> torch.Tensor:
        nonlocal now
        now += 2.0  # the source's own time counts
        return torch.ones(int(name), dtype=torch.uint8)

    monkeypatch.setattr(loading, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    slow = throttled(fetch, 10.0)
    assert [slow(name).nbytes for name in ("100", "5", "0")] == [100, 5, 0]
    assert slept == [8.0, 0.0, 0.0] and now == 14.0
    overslept = 0.5
    slow = throttled(lambda name: torch.ones(int(name), dtype=torch.uint8), 10.0)
    arrived = [(slow(name), now)[1] for name in ("100", "50", "100")]
    assert arrived == [24.5, 29.5, 39.5], "the link goes on while the reader is late"
    with pytest.raises(ValueError, match="rate: expected a positive number of bytes per second, got 0"):
        throttled(fetch, 0)


def test_a_sender_of_another_kind_is_refused_before_anything_is_read() -> None:
    source = Source(ds.capture(tiny_llama(layers=4), tokens(9), layers=[2]))
    with pytest.raises(ds.ReuseError, match="architecture: expected one for sender and receiver"):
        ds.partial_prefill(tiny_llama(layers=5), source.loading(), ds.Plan([(2, 3)]))
    with pytest.raises(ds.ReuseError, match="hidden states: expected them at layers"):
        ds.partial_prefill(tiny_llama(layers=4), source.loading(), ds.Plan([(1, 3)]))
    assert source.asked == []
