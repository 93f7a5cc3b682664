"""Contexts of another kind than maps were fitted to: what tells them apart, and what is done with them."""

import dataclasses
import warnings

import pytest
import torch
from support.compare import assert_bitwise_equal
from support.models import fine_tuned, tiny_llama, tiny_pair, tokens

import droidspeak_ops as ds

LAYERS = 4
ALL = ds.Plan(project="rest")


@pytest.fixture(scope="module")
def fitted() -> tuple:
    """A sender, a receiver and maps of theirs."""
    sender, receiver = tiny_pair(LAYERS)
    some = [ds.Example.cut(tokens(160)) for _ in range(16)]
    return sender, receiver, ds.fit(sender, receiver, some, steps=0, show_progress=False)


def test_a_context_of_another_kind_is_reused() -> None:
    torch.manual_seed(3)
    sender = tiny_llama(head_dim=16, layers=LAYERS)
    receiver = fine_tuned(sender, 0.1)
    of_few_words = [ds.Example.cut(tokens(200) % 8) for _ in range(12)]
    maps = ds.fit(sender, receiver, of_few_words, bands=[(2, 4)], steps=0, show_progress=False)
    assert "fitted" in maps.choices
    assert maps.corrections
    for plan in (ALL, ds.Plan([(2, 4)], project="rest"), ds.Plan(project=[1, 2])):
        context = ds.capture(sender, tokens(100), layers=range(LAYERS))
        assert maps.domain.distance(context) > 1.5 * maps.domain.limit
        with pytest.warns(
            UserWarning, match=r"maps: not used for a context unlike those they were fitted to \(distance"
        ):
            cache = ds.partial_prefill(receiver, context, plan, maps=maps)
        wanted = ds.partial_prefill(receiver, context, ds.Plan(plan.bands, [0] if plan.project == "rest" else []))
        for ours, theirs in zip(cache.layers, wanted.layers, strict=True):
            assert_bitwise_equal(ours.keys, theirs.keys)
            assert_bitwise_equal(ours.values, theirs.values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plan in (ds.Plan(), ds.Plan([(1, 3)])):  # which use nothing of the maps
            ds.partial_prefill(receiver, context, plan, maps=maps)


@pytest.mark.parametrize(
    "change",
    [
        lambda context: context,
        lambda context: dataclasses.replace(context, hidden_states={}),
        lambda context: context.quantized(torch.int8),
    ],
)
def test_a_context_of_the_same_kind_is_not(fitted, change) -> None:
    """Also one that is longer, of which only some rows are looked at, and one in 8 bits without hidden states."""
    sender, receiver, maps = fitted
    for count in (60, 127, 900):
        context = change(ds.capture(sender, tokens(count), layers=range(LAYERS)))
        assert maps.domain.distance(context) < maps.domain.limit
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ds.partial_prefill(receiver, context, ALL, maps=maps)


def test_the_furthest_sequence_counts(fitted) -> None:
    sender, _, maps = fitted
    sequences = [tokens(60) for _ in range(3)]
    alone = [maps.domain.distance(ds.capture(sender, ids)) for ids in sequences]
    together = maps.domain.distance(ds.capture(sender, torch.cat(sequences)))
    assert together == pytest.approx(max(alone), rel=1e-4)
    assert max(alone) > 1.01 * min(alone)
