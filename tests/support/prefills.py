"""Partial prefill as the tests run it, and what its result is compared with."""

import copy

import torch
from support.compare import assert_bitwise_equal, assert_close
from transformers import DynamicCache, PreTrainedModel

import droidspeak_ops as ds


@torch.no_grad()
def own_prefill(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def suffix_logits(model: PreTrainedModel, suffix: torch.Tensor, cache) -> torch.Tensor:
    return model(suffix, past_key_values=copy.deepcopy(cache)).logits


def prefill(sender, receiver, ids: torch.Tensor, plan: ds.Plan, **options) -> ds.MixedCache:
    context = ds.capture(sender, ids, layers=plan.hidden_layers(sender.config.num_hidden_layers))
    return ds.partial_prefill(receiver, context, plan, **options)


def assert_is_own_prefill(model: PreTrainedModel, cache, ids: torch.Tensor, suffix: torch.Tensor) -> None:
    """Bitwise, K/V of every layer and the logits of a suffix over them."""
    own = own_prefill(model, ids)
    for ours, theirs in zip(cache.layers, own.layers, strict=True):
        assert_bitwise_equal(ours.keys, theirs.keys)
        assert_bitwise_equal(ours.values, theirs.values)
    assert_bitwise_equal(suffix_logits(model, suffix, cache), suffix_logits(model, suffix, own))


def assert_is_mixed(model: PreTrainedModel, cache, suffix: torch.Tensor, mixed: list, logits: torch.Tensor) -> None:
    """K/V by layer and head, and the logits of a suffix over them, of `slow_mixed`."""
    layers = len(mixed)
    for layer, (keys, values) in zip(cache.layers, mixed, strict=True):
        rows = layer.keys.shape[2]  # of a sliding window the last ones
        assert_close(layer.keys[0], torch.stack(keys)[:, -rows:], torch.float32, operations=layers)
        assert_close(layer.values[0], torch.stack(values)[:, -rows:], torch.float32, operations=layers)
    assert_close(suffix_logits(model, suffix, cache)[0], logits, torch.float32, operations=layers)
