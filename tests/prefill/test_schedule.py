"""Schedules: one decision from plan, maps and what a context holds, and what those who read it may rely on."""

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from support.models import tiny_pair, tokens
from test_plan import LAYERS, plans
from torch.multiprocessing.reductions import StorageWeakRef

import droidspeak_ops as ds
from droidspeak_ops.context.context import SharedContext
from droidspeak_ops.ops.library import LAYERS_PER_LAUNCH
from droidspeak_ops.prefill.schedule import Band, Read, Work, resolve

CHOICES = ("project", "fitted", "reuse", "fitted", "project", "fitted_kv")
MAPS: Any = SimpleNamespace(
    choices=CHOICES, choices_without_hidden=("project", *["fitted_kv"] * 5), corrections={4: None}
)
MAPS.used_by = lambda plan: MAPS
PLAN = ds.Plan([(4, 6)], project="rest")


def test_maps_choose_what_fills_the_layers_that_a_plan_projects() -> None:
    schedule = resolve(PLAN, 6, MAPS)
    assert schedule.sources == ("project", "fitted", "reuse", "fitted", "recompute", "recompute")
    assert schedule.bands == (Band(4, 6, corrected=True),)
    assert schedule.hidden_layers == (1, 3, 4)
    assert schedule.work == Work(run=1, projected=4, hidden=3, kv=1)
    assert schedule.uses_maps


def test_reads_come_in_the_order_of_use() -> None:
    hidden = [
        Read("hidden", 4),
        Read("hidden", 1),
        Read("sinks", 1),
        Read("kv", 2),
        Read("hidden", 3),
        Read("sinks", 3),
    ]
    assert list(resolve(PLAN, 6, MAPS).reads) == hidden


def test_without_the_hidden_states_that_maps_want_their_other_choices_count() -> None:
    assert resolve(PLAN, 6, MAPS, held=[1, 3, 4]) == resolve(PLAN, 6, MAPS)
    schedule = resolve(PLAN, 6, MAPS, held=[4])
    assert schedule.sources == ("project", "fitted_kv", "fitted_kv", "fitted_kv", "recompute", "recompute")
    assert schedule.hidden_layers == (4,)


def test_outside_their_domain_maps_are_left_aside() -> None:
    schedule = resolve(PLAN, 6, MAPS, in_domain=False)
    assert schedule.sources == ("project", "reuse", "reuse", "reuse", "recompute", "recompute")
    assert schedule.bands == (Band(4, 6, corrected=False),)


@given(plans())
def test_maps_without_a_part_in_a_plan_change_nothing(plan: ds.Plan) -> None:
    maps: Any = SimpleNamespace(
        choices=("project",) * LAYERS, choices_without_hidden=("project",) * LAYERS, corrections={}
    )
    maps.used_by = lambda plan: maps
    assert resolve(plan, LAYERS, maps) == resolve(plan, LAYERS)
    assert not resolve(plan, LAYERS, maps).uses_maps


@given(plans())
def test_each_layer_is_filled_from_what_is_read(plan: ds.Plan) -> None:
    schedule = resolve(plan, LAYERS)
    starts = {band.start for band in schedule.bands}
    for layer, source in enumerate(schedule.sources):
        what = {read.what for read in schedule.reads if read.layer == layer}
        wanted = {"reuse": {"kv"}, "project": {"hidden"} if layer else set(), "recompute": set()}[source]
        assert what == wanted | ({"hidden"} if layer in starts and layer else set())
    assert len(set(schedule.reads)) == len(schedule.reads)


def test_no_more_hidden_states_are_decoded_at_a_time_than_a_launch_takes(monkeypatch) -> None:
    depth = 2 * LAYERS_PER_LAUNCH + 3
    sender, receiver = tiny_pair(depth)
    plan = ds.Plan(project="rest")
    context = ds.capture(sender, tokens(9), layers=plan.hidden_layers(depth)).quantized(torch.int8)
    decoded: list[StorageWeakRef] = []
    most, hidden = 0, SharedContext.hidden

    def alive() -> int:
        return sum(not storage.expired() for storage in decoded)

    def counted(self: SharedContext, layer: int) -> torch.Tensor:
        nonlocal most
        states = hidden(self, layer)
        decoded.append(StorageWeakRef(states.untyped_storage()))
        most = max(most, alive())
        return states

    monkeypatch.setattr(SharedContext, "hidden", counted)
    ds.partial_prefill(receiver, context, plan)
    assert len(decoded) == depth - 1
    assert 0 < most <= LAYERS_PER_LAUNCH
    assert alive() == 0
