"""The check of each request's cache, and what it falls back on."""

import threading
from dataclasses import replace

import pytest
import torch
from support.compare import assert_bitwise_equal
from support.models import FAMILIES, fine_tuned, tiny, tiny_llama, tokens

import droidspeak_ops as ds
from droidspeak_ops.hf.decoder import Decoder
from droidspeak_ops.hf.gate import FULL_PREFILL

LAYERS, CONTEXT, SUFFIX = 6, 21, 5
RECENT = ds.Plan(select=6, selector="recent")
BAND = ds.Plan([(0, LAYERS)], select=6, selector="recent")


def deviation(sender, receiver, prompt: torch.Tensor, plan: ds.Plan = RECENT) -> float:
    return float(gated(ds.Gate([plan], 100.0), sender, receiver, prompt).deviations)


def gated(gate: ds.Gate, sender, receiver, prompt: torch.Tensor) -> ds.MixedCache:
    context = ds.capture(sender, prompt[:, :CONTEXT], layers=range(1, LAYERS))
    return gate.prefill(receiver, context, prompt)


# A row loses the oldest keys of a window to the rows behind it, which in windows as short as these is more than rounding.
WITHOUT_WINDOWS = [family for family in sorted(FAMILIES) if not any(Decoder(tiny(family, LAYERS)).windows)]


@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
def test_of_a_receiver_that_is_the_sender_every_cache_is_good(family: str) -> None:
    sender = tiny(family, LAYERS)
    gate, prompt = ds.Gate([RECENT], 1e-6), tokens(CONTEXT + SUFFIX, batch=2)
    cache = gated(gate, sender, sender, prompt)
    assert gate.counts == {RECENT: 1, FULL_PREFILL: 0}
    assert cache.deviations.shape == (2,)
    context = ds.capture(sender, prompt[:, :CONTEXT])
    usual = ds.partial_prefill(sender, context, RECENT, prompt_ids=prompt)
    assert_bitwise_equal(cache.next_logits, usual.next_logits)


def test_the_deviation_is_the_distance_of_what_was_there() -> None:
    """The selected tokens' over all layers, by hand."""
    sender = tiny("llama", LAYERS)
    receiver = fine_tuned(sender, 0.3)
    prompt = tokens(CONTEXT + SUFFIX)
    context = ds.capture(sender, prompt[:, :CONTEXT])
    cache = ds.Gate([RECENT], 8.0).prefill(receiver, context, prompt)
    parts = []
    for layer in range(LAYERS):
        for there, now in zip(
            context.kv(layer)[:2], (cache.layers[layer].keys, cache.layers[layer].values), strict=True
        ):
            there, now = there[0, :, CONTEXT - 6 :], now[0, :, CONTEXT - 6 : CONTEXT]
            parts.append(((there - now).norm() / now.norm()) ** 2)
    assert float(cache.deviations[0]) == pytest.approx(float(torch.stack(parts).mean()), rel=1e-4)


def test_a_further_receiver_deviates_further_and_a_band_less() -> None:
    sender, prompt = tiny("llama", LAYERS), tokens(CONTEXT + SUFFIX)
    near, far = fine_tuned(sender, 0.1), fine_tuned(sender, 0.5)
    assert 0.0 < deviation(sender, near, prompt) < deviation(sender, far, prompt)
    assert deviation(sender, far, prompt, BAND) < deviation(sender, far, prompt)


def test_what_is_too_far_falls_back_on_the_next_plan_and_then_on_full_prefill() -> None:
    sender = tiny("llama", LAYERS)
    receiver, prompt = fine_tuned(sender, 0.5), tokens(CONTEXT + SUFFIX)
    of_band, of_reuse = deviation(sender, receiver, prompt, BAND), deviation(sender, receiver, prompt)
    between = ds.Gate([RECENT, BAND], (of_band + of_reuse) / 2)
    gated(between, sender, receiver, prompt)
    assert between.counts == {RECENT: 0, BAND: 1, FULL_PREFILL: 0}
    strict = ds.Gate([RECENT, BAND], of_band / 2)
    cache = gated(strict, sender, receiver, prompt)
    assert strict.counts == {RECENT: 0, BAND: 0, FULL_PREFILL: 1}
    with torch.no_grad():
        own = receiver(prompt, logits_to_keep=1).logits[:, -1]
    assert_bitwise_equal(cache.next_logits, own.float())
    made = receiver.generate(prompt, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(made, receiver.generate(prompt, max_new_tokens=5, do_sample=False))


def test_a_context_of_nan_or_of_other_tokens_never_passes() -> None:
    sender, prompt = tiny_llama(layers=LAYERS), tokens(CONTEXT + SUFFIX)
    context = ds.capture(sender, prompt[:, :CONTEXT])
    broken = [kv._replace(keys=torch.full_like(kv.keys, torch.nan)) for kv in context.keys_values[:1]]
    other = ds.capture(sender, prompt[:, :CONTEXT].flip(1))
    gate = ds.Gate([RECENT], 0.1)
    for keys_values in ([*broken, *context.keys_values[1:]], other.keys_values):
        own = gate.prefill(sender, replace(context, keys_values=keys_values), prompt)
        assert own.next_logits.isfinite().all()
    assert gate.counts == {RECENT: 0, FULL_PREFILL: 2}


def test_threads_are_counted() -> None:
    sender = tiny("llama", LAYERS)
    gate, prompt = ds.Gate([RECENT], 1e-6), tokens(CONTEXT + SUFFIX)
    threads = [threading.Thread(target=gated, args=(gate, sender, sender, prompt)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gate.counts[RECENT] == 4


@pytest.mark.parametrize(
    ("plans", "limit", "match"),
    [
        ([], 1.0, "plans: expected some"),
        ([RECENT, ds.Plan([(1, 3)])], 1.0, "plans: expected some"),
        ([RECENT], 0.0, "limit: expected more than 0"),
        ([RECENT], float("nan"), "limit: expected more than 0"),
    ],
)
def test_wrong_arguments(plans: list, limit: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ds.Gate(plans, limit)
