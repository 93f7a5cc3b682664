"""The cache layers against transformers' own dynamic layer, over random sequences of what generation does to a cache."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_bitwise_equal
from support.models import tiny_llama, tokens
from transformers.cache_utils import DynamicLayer

import droidspeak_ops as ds
from droidspeak_ops.context.growing import HEADROOM
from droidspeak_ops.hf.cache import MixedLayer

OPERATIONS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 40)),
    st.tuples(st.just("crop"), st.integers(0, 3)),
    st.tuples(st.just("reorder"), st.permutations(range(4))),
    st.tuples(st.just("repeat"), st.just(2)),
    st.tuples(st.just("select"), st.permutations(range(4))),
    st.tuples(st.just("copy"), st.none()),
    st.tuples(st.just("reset"), st.none()),
)


def random(batch: int, count: int) -> torch.Tensor:
    return torch.randn(batch, 2, count, 8)


@settings(max_examples=60, deadline=None)
@given(operations=st.lists(OPERATIONS, max_size=12), start=st.sampled_from(["shared", "written", "empty"]))
def test_behaves_like_the_dynamic_layer(operations, start: str) -> None:
    theirs, ours = DynamicLayer(), MixedLayer()
    keys, values = random(1, 9), random(1, 9)
    originals = keys.clone(), values.clone()
    if start != "empty":
        theirs.update(keys, values)
        ours = MixedLayer.shared(keys, values)
    if start == "written":
        ours = MixedLayer.uninitialized((1, 2, 9, 8), keys.dtype, keys.device)
        ours.keys.copy_(keys)
        ours.values.copy_(values)
    left_behind = []
    for name, argument in operations:
        batch = theirs.keys.shape[0] if theirs.is_initialized else 1
        if name == "update":
            new = random(batch, argument), random(batch, argument)
            for mine, other in zip(ours.update(*new), theirs.update(*new), strict=True):
                assert_bitwise_equal(mine, other)
        elif name == "copy":
            left_behind.append((ours, copy.deepcopy(theirs)))
            ours = copy.deepcopy(ours)
        elif name == "reset":
            ours.reset()
            theirs = DynamicLayer()
        elif theirs.is_initialized and theirs.get_seq_length() > 4:
            if name == "crop":
                ours.crop(-argument)
                theirs.crop(-argument)
            elif name == "repeat" and batch < 8:
                ours.batch_repeat_interleave(argument)
                theirs.batch_repeat_interleave(argument)
            elif name == "reorder" and batch >= 4:
                ours.reorder_cache(torch.tensor(argument))
                theirs.reorder_cache(torch.tensor(argument))
            elif name == "select" and batch >= 4:
                ours.batch_select_indices(torch.tensor(argument))
                theirs.batch_select_indices(torch.tensor(argument))
        check(ours, theirs)
    for copied, expected in left_behind:
        check(copied, expected)
    assert_bitwise_equal(keys, originals[0])
    assert_bitwise_equal(values, originals[1])


def check(ours: MixedLayer, theirs: DynamicLayer) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    if theirs.is_initialized:
        assert_bitwise_equal(ours.keys, theirs.keys)
        assert_bitwise_equal(ours.values, theirs.values)


def test_grows_in_place_within_its_headroom() -> None:
    layer = MixedLayer.uninitialized((1, 2, 9, 8), torch.float32, torch.device("cpu"))
    where = layer.keys.data_ptr()
    for _ in range(HEADROOM):
        layer.update(random(1, 1), random(1, 1))
    assert layer.keys.data_ptr() == where
    layer.update(random(1, 1), random(1, 1))
    assert layer.keys.data_ptr() != where


def test_copies_of_a_shared_layer_share_it() -> None:
    keys, values = random(1, 9), random(1, 9)
    layer = copy.deepcopy(MixedLayer.shared(keys, values))
    assert layer.keys is keys
    assert layer.values is values


def test_a_cache_says_why_it_is_not_pickled() -> None:
    model = tiny_llama(layers=2)
    cache = ds.partial_prefill(model, ds.capture(model, tokens(4)), ds.Plan())
    with pytest.raises(TypeError, match="MixedCache: it belongs to a model of this process"):
        pickle.dumps(cache)
    assert copy.copy(cache).layers is cache.layers
