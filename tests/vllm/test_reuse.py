"""A receiver inside vLLM: the same tokens as by transformers, and nobody is served what another asked for."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine import BLOCK_SIZE, Engine
from support.serving import PLANS, Pair, asking, prompt

import droidspeak_ops as ds

pytest.importorskip("vllm.config")

SELECTED = {
    "peaks": ds.Plan(select=30),
    "share": ds.Plan(bands=[(2, 4)], project=[5], select=0.5),
    "recent": ds.Plan(select=30, selector="recent"),
    "deviation": ds.Plan(select=30, selector="deviation"),
    "all": ds.Plan(select=1.0),
}
FITTED = {
    "fitted": ds.Plan(project="rest"),
    "corrected": ds.Plan(bands=[(2, 4)], project="rest"),
    "repaired": ds.Plan(project="rest", select=30),
}


@pytest.mark.parametrize("name", [*PLANS, *SELECTED, *FITTED])
def test_greedy_tokens_are_those_of_transformers(name: str, receiver: Engine, llama: Pair, maps: ds.Maps) -> None:
    ids, suffix, used = llama.stored(128), llama.tokens(9), maps if name in FITTED else None
    plan = (PLANS | SELECTED | FITTED)[name]
    wish = asking(plan, sender="mapped" if used else "base")
    (found,) = receiver.generate([(prompt(ids, suffix), wish)])
    assert found.tokens == llama.expected(ids, suffix, plan, used)
    assert found.said == {"context_tokens": 128, "sender": wish["sender"], "plan": str(plan), "loaded": True}


def test_recomputing_all_layers_is_plain_vllm(receiver: Engine, llama: Pair) -> None:
    ids, suffix = llama.stored(128), llama.tokens(9)
    ((plain, said),) = receiver.generate([(prompt(ids, suffix), ...)])
    (whole,) = receiver.generate([(prompt(ids, suffix), asking(PLANS["whole"]))])
    (reused,) = receiver.generate([(prompt(ids, suffix), asking(PLANS["reuse"]))])
    assert plain == whole.tokens != reused.tokens
    assert whole.said["loaded"] and not said


def test_plain_and_mixed_requests_of_one_batch(receiver: Engine, llama: Pair) -> None:
    """All over one context, so that only their pages' isolation keeps them apart; and once more, from the pages alone."""
    ids, suffix = llama.stored(128), llama.tokens(9)
    batch = [(prompt(ids, suffix), asking(plan)) for plan in PLANS.values()] + [(prompt(ids, suffix), ...)]
    expected = [llama.expected(ids, suffix, plan) for plan in (*PLANS.values(), None)]
    first, second = receiver.generate(batch), receiver.generate(batch)
    assert [each.tokens for each in first] == [each.tokens for each in second] == expected
    assert [each.said.get("loaded") for each in first[:-1]] == [True] * len(PLANS)
    assert [each.said.get("loaded") for each in second[:-1]] == [False] * len(PLANS)


@pytest.mark.parametrize("isolated", [True, False])
def test_a_plain_request_is_not_served_mixed_pages(isolated: bool, receiver: Engine, llama: Pair) -> None:
    """Without its salt a mixed request leaves pages that the plain one behind it takes for its own."""
    ids, suffix = llama.stored(128), llama.tokens(9)
    with changed(receiver, set_isolation, isolated, True):
        (mixed,) = receiver.generate([(prompt(ids, suffix), asking(PLANS["reuse"]))])
        (plain,) = receiver.generate([(prompt(ids, suffix), ...)])
    own = llama.expected(ids, suffix, None)
    assert mixed.tokens == llama.expected(ids, suffix, PLANS["reuse"]) != own
    assert (plain.tokens == own) == isolated


def set_isolation(engine: Any, isolated: bool) -> None:
    """Have requests keep the salt that they came with, and their pages be filled nevertheless."""
    from dataclasses import replace

    scheduling = scheduling_of(engine)
    if isolated:
        vars(scheduling).pop("_match", None)
        return
    match = type(scheduling)._match

    def without_salt(request: Any, asked: Any) -> None:
        match(scheduling, request, asked)
        if request.request_id not in scheduling._matches:
            return
        request.cache_salt = None
        request.block_hashes.clear()
        request.update_block_hashes()
        scheduling._matches[request.request_id] = replace(scheduling._matches[request.request_id], salt=None)

    scheduling._match = without_salt


def scheduling_of(engine: Any) -> Any:
    return engine.llm_engine.engine_core.engine_core.scheduler.connector._scheduling


@contextmanager
def changed(engine: Engine, change: Callable[..., Any], to: Any, back: Any) -> Iterator[None]:
    """Have something of an engine be otherwise for a while."""
    engine.call(change, to)
    try:
        yield
    finally:
        engine.call(change, back)


def filling_of(_: Any) -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()._filling


def test_a_request_that_lost_its_salt_is_not_mixed(receiver: Engine, llama: Pair) -> None:
    ids, suffix = llama.stored(128), llama.tokens(9)
    with changed(receiver, lose_salt, True, False):
        (found,) = receiver.generate([(prompt(ids, suffix), asking(PLANS["reuse"]))])
    assert found.tokens == llama.expected(ids, suffix, None)


def lose_salt(engine: Any, lost: bool) -> None:
    scheduling = scheduling_of(engine)
    vars(scheduling).pop("add", None)
    if not lost:
        return

    def add(request: Any) -> None:
        type(scheduling).add(scheduling, request)
        request.cache_salt = None
        request.block_hashes.clear()
        request.update_block_hashes()

    scheduling.add = add


def test_tenants_do_not_share_pages(receiver: Engine, llama: Pair) -> None:
    """A request's own salt goes on to isolate it: the same mixture is filled for each."""
    ids, suffix = llama.stored(64), llama.tokens(9)
    said = [receiver.call(generate_for, salt, prompt(ids, suffix), asking(PLANS["reuse"])) for salt in "aba"]
    assert [each["loaded"] for each in said] == [True, True, False]


def generate_for(engine: Any, salt: str, ids: list[int], wish: Any) -> dict[str, Any]:
    from vllm import SamplingParams

    wishes = {"kv_transfer_params": {"droidspeak": wish}}
    parameters = SamplingParams(temperature=0.0, max_tokens=2, extra_args=wishes)
    (out,) = engine.generate([{"prompt_token_ids": ids, "cache_salt": salt}], parameters, use_tqdm=False)
    return out.kv_transfer_params["droidspeak"]


def test_selected_tokens_are_of_one_prompt(receiver: Engine, llama: Pair) -> None:
    """Others over the same context select by their own suffix; the same one finds its pages."""
    ids, plan = llama.stored(128), SELECTED["peaks"]
    for suffix in (first := llama.tokens(9), llama.tokens(9), first):
        (found,) = receiver.generate([(prompt(ids, suffix), asking(plan))])
        assert found.tokens == llama.expected(ids, suffix, plan)
    assert not found.said["loaded"]


def test_whole_blocks_of_a_context_are_reused(receiver: Engine, llama: Pair) -> None:
    """Its tokens in a page with others are the receiver's own."""
    ids, suffix = llama.stored(BLOCK_SIZE * 3 + 7), llama.tokens(9)
    (found,) = receiver.generate([(prompt(ids, suffix), asking(PLANS["middle"]))])
    cut = BLOCK_SIZE * 3
    assert found.said["context_tokens"] == cut
    assert found.tokens == llama.expected(ids[:, :cut], torch.cat([ids[:, cut:], suffix], dim=1), PLANS["middle"])


@pytest.mark.parametrize("more", [0, 1, 40])
def test_the_head_of_a_longer_context_is_reused(more: int, receiver: Engine, llama: Pair) -> None:
    """That the prompt shares with it; at least one token is left to run."""
    ids = llama.stored(192)
    head, suffix = ids[:, :128], torch.cat([ids[:, 128 : 128 + more], llama.tokens(9)], dim=1)
    if more == 0:
        suffix = llama.tokens(1)
    (found,) = receiver.generate([(prompt(head, suffix), asking(PLANS["middle"]))])
    assert found.said["context_tokens"] == 128
    assert found.tokens == llama.expected(head, suffix, PLANS["middle"])


def test_as_much_is_reused_as_a_request_wants(receiver: Engine, llama: Pair) -> None:
    ids, suffix = llama.stored(128), llama.tokens(9)
    (found,) = receiver.generate([(prompt(ids, suffix), asking(PLANS["reuse"], prefix_tokens=64 + 5))])
    assert found.said["context_tokens"] == 64
    assert found.tokens == llama.expected(ids[:, :64], torch.cat([ids[:, 64:], suffix], dim=1), PLANS["reuse"])


def test_plans_have_names(receiver: Engine, llama: Pair) -> None:
    ids, suffix = llama.stored(128), llama.tokens(9)
    (found,) = receiver.generate([(prompt(ids, suffix), {"plan": "two"})])
    assert found.tokens == llama.expected(ids, suffix, PLANS["two"])


def test_a_longer_queue_has_another_plan(receiver: Engine, llama: Pair) -> None:
    """Requests that name none get it by those that wait when they arrive; what runs or has ended does not wait."""
    ids, suffixes = llama.stored(128), [llama.tokens(9) for _ in range(4)]
    with changed(receiver, set_by_queue, {0: "two", 2: "reuse"}, {}):
        found = receiver.generate([(prompt(ids, suffix), {}) for suffix in suffixes])
        (later,) = receiver.generate([(prompt(ids, suffixes[0]), {})])
        (named, *_) = receiver.generate([(prompt(ids, suffix), asking(PLANS["first"])) for suffix in suffixes])
    expected = [PLANS[name] for name in ("two", "two", "reuse", "reuse", "two", "first")]
    assert [each.said["plan"] for each in (*found, later, named)] == [str(plan) for plan in expected]
    for each, suffix, plan in zip(found, suffixes, expected, strict=False):
        assert each.tokens == llama.expected(ids, suffix, plan)


def test_a_request_that_is_aborted_waits_no_more(receiver: Engine) -> None:
    assert receiver.call(waiting_before_and_after_an_abort) == (1, 0)


def waiting_before_and_after_an_abort(engine: Any) -> tuple[int, ...]:
    from types import SimpleNamespace

    scheduling = scheduling_of(engine)
    request = SimpleNamespace(request_id="aborted", kv_transfer_params={"droidspeak": None})
    found = []
    for happens in (scheduling.add, scheduling.finished):
        happens(request)
        found.append(len(scheduling._waiting))
    return tuple(found)


def set_by_queue(engine: Any, by_queue: dict[int, str]) -> None:
    from dataclasses import replace

    scheduling = scheduling_of(engine)
    scheduling._settings = replace(scheduling._settings, by_queue=by_queue)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"plan": {"bands": [[3, 2]]}}, "bands: expected .start, end."),
        ({"plan": {"bands": [[0, 7]]}}, "plan: expected layers 0 to 5 of a model of 6, got layer 6"),
        ({"plan": {"select": -1}}, "select: expected a share from 0.0 to 1.0"),
        ({"plan": "best"}, "expected a plan among .'reuse', 'two'., got 'best'"),
        ({"plan": {}, "sender": "other"}, "expected a sender among .'base', 'mapped'., got 'other'"),
        ({"plan": {}, "prefix_tokens": 0}, "expected prefix_tokens of 1 or more, got 0"),
        ({"plan": {}, "layers": 3}, "expected the fields plan, sender, prefix_tokens, capture, got .'layers'."),
        ({"capture": True}, "kv_role: expected kv_producer or kv_both"),
        (["plan"], "expected object, got array"),
    ],
)
def test_a_wish_that_cannot_be_met_is_named_and_the_request_runs(
    wish: Any, message: str, receiver: Engine, llama: Pair
) -> None:
    ids, suffix = llama.stored(64), llama.tokens(9)
    (found,) = receiver.generate([(prompt(ids, suffix), wish)], count=4)
    assert re.search(message, found.said["refused"].replace("`", ""))
    assert found.tokens == llama.expected(ids, suffix, None, count=4)


def test_a_context_without_hidden_states_serves_no_band(receiver: Engine, llama: Pair) -> None:
    ids, suffix = llama.tokens(128), llama.tokens(9)
    llama.store.save(ds.capture(llama.sender, ids, tokenizer=llama.tokenizer))
    band, reuse = receiver.generate([(prompt(ids, suffix), asking(PLANS[name])) for name in ("middle", "reuse")])
    assert "hidden states: expected them at layers [2]" in band.said["refused"]
    assert band.tokens == llama.expected(ids, suffix, None)
    assert reuse.tokens == llama.expected(ids, suffix, PLANS["reuse"])


def test_a_request_is_left_as_it_is(receiver: Engine, llama: Pair) -> None:
    """Without a plan by default, with a null, and where nothing is stored."""
    ids, suffix = llama.stored(128), llama.tokens(9)
    for ask, of in ((..., ids), (None, ids), (asking(PLANS["reuse"]), llama.tokens(128))):
        (found,) = receiver.generate([(prompt(of, suffix), ask)], count=4)
        assert found == (llama.expected(of, suffix, None, count=4), {})


@pytest.mark.parametrize("fault", ["damaged", "removed", "slow to open", "slow to read"])
def test_a_context_that_cannot_be_read_is_not_reused(fault: str, receiver: Engine, llama: Pair) -> None:
    """Or not in time: the request runs as it is, beside others."""
    ids, other, suffix = llama.stored(128), llama.stored(128), llama.tokens(9)
    path = next(path for path in Path(llama.store.url).glob("*/*") if holds(path, llama, ids))
    if fault == "damaged":
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    elif fault == "removed":
        receiver.call(remove_before_reading, str(path))
    else:
        receiver.call(stall_once, fault)
    wishes = [(prompt(each, suffix), asking(PLANS["middle"])) for each in (ids, other)]
    try:
        broken, whole = receiver.generate(wishes)
    finally:
        receiver.call(stall_once, None)
    assert broken.said == {"refused": "the context could not be read"}
    assert broken.tokens == llama.expected(ids, suffix, None)
    assert whole.said["loaded"] and whole.tokens == llama.expected(other, suffix, PLANS["middle"])


def holds(path: Path, llama: Pair, ids: torch.Tensor) -> bool:
    entry = llama.store.open(f"{path.parent.name}/{path.name}")
    return entry is not None and torch.equal(entry.fetch("tokens"), ids)


def remove_before_reading(engine: Any, path: str) -> None:
    filling = filling_of(engine)
    read = filling._read

    def removing(load: Any) -> Any:
        Path(path).unlink(missing_ok=True)
        filling._read = read
        return read(load)

    filling._read = removing


def stall_once(engine: Any, fault: str | None) -> None:
    """Have the first context that a worker reads take for ever: its file to be opened, or one of its tensors to be read."""
    import threading
    from types import SimpleNamespace

    filling = filling_of(engine)
    if fault is None:
        if isinstance(filling._store, SimpleNamespace):
            filling._store.release()
            filling._store, filling._read_seconds = filling._store.stalled, 10.0
        return
    store, stalled, waits = filling._store, [], threading.Event()

    def find(*asked: Any) -> Any:
        if stalled:
            return store.find(*asked)
        stalled.append(True)
        if fault == "slow to open":
            waits.wait()
            return None
        found = store.find(*asked)
        fetch = found.keys_values.reader._fetch
        found.keys_values.reader._fetch = lambda name: fetch(name) if name != "kv.5.values" else waits.wait()
        return found

    filling._store = SimpleNamespace(find=find, release=waits.set, stalled=store)
    filling._read_seconds = 2.0


def test_a_context_that_is_not_found_in_time_is_not_reused(receiver: Engine, llama: Pair) -> None:
    """The scheduler waits no longer than workers do."""
    ids, suffix = llama.stored(128), llama.tokens(9)
    with changed(receiver, find_nothing, True, False):
        (found,) = receiver.generate([(prompt(ids, suffix), asking(PLANS["reuse"]))])
    assert found.said == {"refused": "store: expected to read it within 0.2 s, got no answer"}
    assert found.tokens == llama.expected(ids, suffix, None)


def find_nothing(engine: Any, stalls: bool) -> None:
    import threading
    from dataclasses import replace
    from types import SimpleNamespace

    scheduling = scheduling_of(engine)
    if stalls:
        waits = threading.Event()
        scheduling._store = SimpleNamespace(
            find=lambda *_: waits.wait() and None, release=waits.set, stalled=scheduling._store
        )
    else:
        scheduling._store.release()
        scheduling._store = scheduling._store.stalled
    scheduling._settings = replace(scheduling._settings, read_seconds=0.2 if stalls else 10.0)


def test_a_context_that_could_not_be_read_is_not_tried_again(receiver: Engine) -> None:
    """As where its request is preempted, and begins anew."""
    assert receiver.call(matched_before_and_after_a_failure) == (128, 128, 0)


def matched_before_and_after_a_failure(engine: Any) -> tuple[int, ...]:
    from types import SimpleNamespace

    from droidspeak_ops.vllm.scheduler import Match

    scheduling = scheduling_of(engine)
    request = SimpleNamespace(request_id="again", cache_salt="salt")
    scheduling._matches["again"] = Match("salt", scheduling._own, "base", ds.Plan(), 128, 128)
    scheduling._filled["again"] = {7, 8}
    found = [scheduling.matched(request, 0)]
    for invalid in ({6, 9}, {8}):
        scheduling.stepped(invalid)
        found.append(scheduling.matched(request, 0))
    scheduling.finished(request)
    return tuple(found)
