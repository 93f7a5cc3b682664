"""Fills from contexts that are still being read: bitwise those from memory, in whatever order parts arrive, and no later than
they can be."""

import dataclasses
import json
import random
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compare import assert_bitwise_equal
from support.loading import PATIENCE, Source, await_event, await_readers, in_turn
from support.models import fine_tuned, tiny, tiny_pair, tokens

import droidspeak_ops as ds
from droidspeak_ops import ops
from droidspeak_ops.context import entry
from droidspeak_ops.hf.filling import CacheLayers
from droidspeak_ops.ops.library import LAYERS_PER_LAUNCH
from droidspeak_ops.prefill.schedule import resolve
from droidspeak_ops.trace import Trace

LAYERS = 6
BANDS = ds.Plan([(1, 3), (4, 5)], project=[0, 3])
REST = ds.Plan([(2, 4)], project="rest")


@cache
def pair(family: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    sender = tiny(family, LAYERS)
    return sender, fine_tuned(sender, 0.3)


def assert_alike(cache: Any, expected: Any) -> None:
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        assert_bitwise_equal(ours.keys, theirs.keys)
        assert_bitwise_equal(ours.values, theirs.values)


def shuffled(names: list[str], seed: int) -> list[str]:
    return random.Random(seed).sample(names, len(names))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("stored", [None, torch.int8], ids=str)
@pytest.mark.parametrize("plan", [ds.Plan(), BANDS, REST], ids=str)
def test_every_order_of_arrival_gives_what_memory_gives(family: str, stored: torch.dtype | None, plan: ds.Plan) -> None:
    sender, receiver = pair(family)
    context = ds.capture(sender, tokens(12, batch=2), layers=plan.hidden_layers(LAYERS))
    if stored is not None:
        context = context.quantized(stored)
    expected = ds.partial_prefill(receiver, context, plan)
    names = Source(context).names(resolve(plan, LAYERS).reads)
    for order in (names, names[::-1], *(shuffled(names, seed) for seed in range(3))):
        source = Source(context, in_turn(order))
        assert_alike(ds.partial_prefill(receiver, source.loading(threads=len(names)), plan), expected)
        assert sorted(source.asked) == sorted(names), "what the schedule reads, and no more"


@pytest.fixture(scope="module")
def maps() -> ds.Maps:
    """Each layer of another source."""
    torch.manual_seed(1)
    examples = [ds.Example.cut(tokens(160), 32) for _ in range(8)]
    fitted = ds.fit(*pair("llama"), examples, bands=[(2, 4)], steps=0, show_progress=False)
    choices = ("project", "fitted", "fitted", "reuse", "fitted_kv", "fitted")
    return dataclasses.replace(fitted, choices=choices, layers=fitted.repaired)


@pytest.mark.parametrize("sinks", [False, True], ids=["sinks in their layers", "sinks apart"])
@pytest.mark.parametrize("stored", [None, torch.int8], ids=str)
@pytest.mark.parametrize("norm", ["hf", "folded"])
def test_with_maps(maps: ds.Maps, norm: Any, stored: torch.dtype | None, sinks: bool) -> None:
    sender, receiver = pair("llama")
    context = ds.capture(sender, tokens(128), layers=range(LAYERS))
    if stored is not None:
        context = context.quantized(stored)
    for plan in (ds.Plan(project="rest"), REST):
        schedule = resolve(plan, LAYERS, maps)
        assert schedule.uses_maps and {"hidden", "kv", "sinks"} == {what for what, _ in schedule.reads}
        expected = ds.partial_prefill(receiver, context, plan, maps=maps, norm=norm)
        names = Source(context, sinks=sinks).names(schedule.reads)
        names = [name for name in names if f".{maps.domain.layer}." not in name]
        for order in (names[::-1], shuffled(names, 0)):
            turns = in_turn(order)
            arrives = lambda name, turns=turns, names=names: turns(name) if name in names else None  # noqa: E731
            source = Source(context, arrives, sinks=sinks)
            arriving = source.loading(threads=len(source.tensors))
            assert_alike(ds.partial_prefill(receiver, arriving, plan, maps=maps, norm=norm), expected)


@pytest.mark.parametrize("stored", [None, torch.int8], ids=str)
def test_of_fitted_layers_a_store_reads_the_sinks_alone(
    maps: ds.Maps, stored: torch.dtype | None, store: ds.ContextStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of one layer all, by which it is known whether the maps are for this context."""
    sender, receiver = pair("llama")
    maps = dataclasses.replace(maps, choices=("project", *["fitted"] * (LAYERS - 1)))
    plan, context = ds.Plan(project="rest"), ds.capture(sender, tokens(128), layers=range(1, LAYERS))
    if stored is not None:
        context = context.quantized(stored)
    expected = ds.partial_prefill(receiver, context, plan, maps=maps)
    read: dict[str, int] = {}
    fetch = entry.Entry.fetch

    def counted(self: entry.Entry, name: str) -> torch.Tensor:
        tensor = fetch(self, name)
        read[name] = tensor.nbytes
        return tensor

    def read_by_a_prefill() -> int:
        read.clear()
        found = store.load(context.tokens, context.sender)
        assert_alike(ds.partial_prefill(receiver, found, plan, maps=maps), expected)
        return sum(nbytes for name, nbytes in read.items() if not name.startswith("rotation."))

    def nbytes(*beginnings: str) -> int:
        return sum(part.nbytes for name, part in context._described()[1].items() if name.startswith(beginnings))

    monkeypatch.setattr(entry.Entry, "fetch", counted)
    store.save(context)
    sinks = sum(part.nbytes for kv in context.keys_values for part in kv.at(slice(4)) if part is not None)
    assert read_by_a_prefill() == nbytes("hidden.", f"kv.{maps.domain.layer}.") + sinks
    monkeypatch.setattr(entry, "sinks_of", lambda context: {})  # as stores were once written
    store.save(context)
    layers = {*range(1, LAYERS), maps.domain.layer}
    assert read_by_a_prefill() == nbytes("hidden.", *(f"kv.{layer}." for layer in layers))


def test_selected_tokens_come_after_all_layers() -> None:
    sender, receiver = pair("llama")
    plan = ds.Plan([(2, 4)], select=5)
    context = ds.capture(sender, tokens(30), layers=plan.hidden_layers(LAYERS))
    prompt = torch.cat((context.tokens, tokens(4)), 1)
    expected = ds.partial_prefill(receiver, context, plan, prompt_ids=prompt)
    got = ds.partial_prefill(receiver, Source(context).loading(), plan, prompt_ids=prompt)
    assert_alike(got, expected)
    assert_bitwise_equal(got.next_logits, expected.next_logits)


# --- when it is filled ---------------------------------------------------------------------------------------------------


def test_a_band_runs_before_what_is_reused_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = pair("llama")
    plan = ds.Plan([(2, 5)])
    context = ds.capture(sender, tokens(12), layers=[2])
    expected = ds.partial_prefill(receiver, context, plan)
    ran, run = threading.Event(), CacheLayers.run

    def tell(self: CacheLayers, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        out = run(self, layer, hidden_states)
        if layer == 3:
            ran.set()
        return out

    monkeypatch.setattr(CacheLayers, "run", tell)
    source = Source(context, lambda name: None if name.startswith("hidden") else await_event(ran))
    assert_alike(ds.partial_prefill(receiver, source.loading(), plan), expected)
    assert source.asked == Source(context).names(resolve(plan, LAYERS).reads)


def launches_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the layers of each launch of projections."""
    counts, project = [], ops.kv_project_layers

    def counted(layers: list[ops.Projection]) -> None:
        project(layers)
        counts.append(len(layers))

    monkeypatch.setattr(ops, "kv_project_layers", counted)
    return counts


def test_layers_are_projected_as_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden states of each layer arrive once all layers before it are projected."""
    sender, receiver = pair("llama")
    plan = ds.Plan(project="rest")
    context = ds.capture(sender, tokens(12), layers=range(LAYERS))
    expected = ds.partial_prefill(receiver, context, plan)
    projected = [threading.Event() for _ in range(LAYERS)]
    project = ops.kv_project_layers
    done = 0

    def tell(layers: list[ops.Projection]) -> None:
        nonlocal done
        project(layers)
        for event in projected[done : done + len(layers)]:
            event.set()
        done += len(layers)

    monkeypatch.setattr(ops, "kv_project_layers", tell)
    source = Source(context, lambda name: await_event(projected[int(name.split(".")[1]) - 1]))
    assert_alike(ds.partial_prefill(receiver, source.loading(), plan), expected)
    assert done == LAYERS


def test_layers_that_are_there_share_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    depth = 2 * LAYERS_PER_LAUNCH + 3
    sender, receiver = tiny_pair(depth)
    context = ds.capture(sender, tokens(9), layers=range(depth))
    arriving = Source(context).loading()
    arriving.check_finite()  # reads all
    for each in (context, arriving):
        counts = launches_of(monkeypatch)
        ds.partial_prefill(receiver, each, ds.Plan(project="rest"))
        assert counts == [LAYERS_PER_LAUNCH, LAYERS_PER_LAUNCH, 3]
        monkeypatch.undo()


def test_threads_share_a_context_that_is_being_read() -> None:
    sender, receiver = pair("llama")
    context = ds.capture(sender, tokens(12), layers=range(LAYERS))
    plans = [BANDS, REST, ds.Plan(), BANDS]
    expected = [ds.partial_prefill(receiver, context, plan) for plan in plans]
    together = threading.Barrier(len(plans), timeout=PATIENCE)
    source = Source(context)
    arriving, serving = source.loading(threads=2), ds.Receiver(receiver)
    caches: dict[int, Any] = {}

    def work(number: int) -> None:
        together.wait()
        caches[number] = ds.partial_prefill(serving, arriving, plans[number])

    working = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(plans))]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join(PATIENCE)
    for number, cache_of in enumerate(expected):
        assert_alike(caches[number], cache_of)
    assert len(source.asked) == len(set(source.asked))


def test_a_tensor_that_cannot_be_read_ends_the_prefill_and_nothing_else() -> None:
    sender, receiver = pair("llama")
    context = ds.capture(sender, tokens(12), layers=BANDS.hidden_layers(LAYERS))
    expected = ds.partial_prefill(receiver, context, BANDS)
    broken: set[str] = set()

    def fail(name: str) -> None:
        if name in broken:
            raise ds.ReuseError(f"{name}: expected its digest, got another")

    for threads in (1, 3):
        for name in Source(context).names(resolve(BANDS, LAYERS).reads):
            broken.add(name)
            arriving = Source(context, fail).loading(threads=threads)
            with pytest.raises(ds.ReuseError, match=f"{name}: expected its digest, got another"):
                ds.partial_prefill(receiver, arriving, BANDS)
            await_readers()
            broken.clear()
            assert_alike(ds.partial_prefill(receiver, arriving, BANDS), expected)


# --- what is traced ------------------------------------------------------------------------------------------------------


def test_a_trace_has_what_was_read_and_done(tmp_path: Path) -> None:
    sender, receiver = pair("llama")
    context = ds.capture(sender, tokens(12), layers=BANDS.hidden_layers(LAYERS))
    source, trace = Source(context), Trace()
    ds.partial_prefill(receiver, source.loading(), BANDS, trace=trace)
    await_readers()
    of_kind = {
        kind: [span for span in trace.spans if span.kind == kind] for kind in ("read", "run", "project", "reuse")
    }
    assert [(span.name, span.nbytes) for span in of_kind["read"]] == [
        (name, source.tensors[name].nbytes) for name in source.names(resolve(BANDS, LAYERS).reads)
    ]
    assert {span.thread for span in of_kind["read"]} == {"reader 0"}
    assert [span.name for span in of_kind["run"]] == ["layer 1"]
    assert [span.name for span in of_kind["reuse"]] == ["layer 5"]
    projected = " ".join(span.name for span in of_kind["project"])
    assert sorted(number for number in projected if number.isdigit()) == ["0", "2", "3", "4"]
    assert all(span.start <= span.end for span in trace.spans)

    trace.write_json(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    whole = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in whole] == [f"{span.kind} {span.name}" for span in trace.spans]
    assert min(event["ts"] for event in whole) == 0 and all(event["dur"] >= 0 for event in whole)
    named = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert [named[event["tid"]] for event in whole] == [span.thread for span in trace.spans]
    trace.plot(tmp_path / "trace.png", "a prefill")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    Trace().plot(tmp_path / "empty.png")
    Trace().write_json(tmp_path / "empty.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.json", "empty.png", "trace.json", "trace.png"]


def test_in_memory_nothing_is_read_or_waited_for() -> None:
    sender, receiver = pair("llama")
    trace = Trace()
    ds.partial_prefill(receiver, ds.capture(sender, tokens(12), layers=range(LAYERS)), BANDS, trace=trace)
    assert {span.kind for span in trace.spans} == {"run", "project", "reuse"}
