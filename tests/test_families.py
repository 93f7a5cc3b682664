"""Families beside Llama's: exactness of the receiver's path, and what is refused by name."""

import pytest
import torch
from models import fine_tuned, tiny, tokens
from prefills import assert_is_mixed, assert_is_own_prefill, prefill
from slow import SlowDecoder, slow_mixed

import droidspeak_ops as ds

LAYERS = 4
FAMILIES = [("mistral", {"sliding_window": None}), ("qwen2", {}), ("qwen3", {})]
pytestmark = [pytest.mark.parametrize(("family", "options"), FAMILIES)]


@pytest.fixture
def pair(family: str, options: dict) -> tuple:
    sender = tiny(family, LAYERS, **options)
    return sender, fine_tuned(sender, 0.3)


def test_recomputing_everything_is_the_own_prefill(pair) -> None:
    ids, suffix = tokens(37, batch=2), tokens(5, batch=2)
    assert_is_own_prefill(pair[1], prefill(*pair, ids, ds.Plan([(0, LAYERS)])), ids, suffix)


@pytest.mark.parametrize("plan", [ds.Plan(), ds.Plan(project="rest"), ds.Plan([(1, 3)], project=[0])])
def test_sender_equal_to_receiver_is_prefix_caching(pair, plan: ds.Plan) -> None:
    ids, suffix = tokens(37), tokens(5)
    assert_is_own_prefill(pair[0], prefill(pair[0], pair[0], ids, plan), ids, suffix)


@pytest.mark.parametrize("norm", ["hf", "folded"])
@pytest.mark.parametrize(("bands", "project"), [([], [0, 2]), ([(1, 3)], [0, 3]), ([(0, 2)], [])])
def test_mixed_plan_equals_a_slow_computation(pair, bands, project, norm: str) -> None:
    sender, receiver = pair
    ids, suffix = tokens(11), tokens(3)
    mixed, logits = slow_mixed(SlowDecoder(sender), SlowDecoder(receiver), ids, suffix, bands, project)
    cache = prefill(sender, receiver, ids, ds.Plan(bands, project), norm=norm)
    assert_is_mixed(receiver, cache, suffix, mixed, logits)


def test_greedy_generation_is_that_of_a_plain_prompt(pair) -> None:
    ids = tokens(30)
    prompt = torch.cat([ids, tokens(4)], dim=1)
    cache = prefill(*pair, ids, ds.Plan([(0, LAYERS)]), prompt_ids=prompt)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(pair[1].generate(prompt, past_key_values=cache, **options), pair[1].generate(prompt, **options))


def test_sliding_windows_are_refused_by_name(family: str, options: dict) -> None:
    windows = {
        "sliding_window": 8,
        **({} if family == "mistral" else {"use_sliding_window": True, "max_window_layers": 2}),
    }
    model = tiny(family, LAYERS, **windows)
    with pytest.raises(ds.UnsupportedModelError, match="got sliding_attention; full_attention in all layers is needed"):
        ds.capture(model, tokens(4))
