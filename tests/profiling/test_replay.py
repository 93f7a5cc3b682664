"""Replays of a suffix behind mixtures of K/V: each as if it ran alone through the whole model."""

import pytest
import torch
from support.compare import assert_close
from support.models import FAMILIES, fine_tuned, tiny, tokens

import droidspeak_ops as ds
from droidspeak_ops.hf.decoder import Decoder
from droidspeak_ops.metrics import kl_divergence
from droidspeak_ops.profiling import replay as replaying
from droidspeak_ops.profiling.replay import kl_and_top1, replay

LAYERS = 4


@pytest.mark.parametrize("row_tokens", [1, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_mixture_is_as_if_alone(family: str, row_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "ROW_TOKENS", row_tokens)
    changes = {"attn_implementation": "eager"} if family == "gpt_oss" else {}
    sender = tiny(family, LAYERS, **changes)
    receiver = fine_tuned(sender, 0.1)
    context = ds.capture(sender, tokens(20), layers=range(LAYERS))
    ids = tokens(12)
    plans = {start: ds.Plan([(start, LAYERS)]) for start in range(LAYERS)}
    caches = {
        name: ds.partial_prefill(receiver, context, plan)
        for name, plan in {"reuse": ds.Plan(), "project": ds.Plan(project="rest"), **plans}.items()
    }
    bands = {
        (rest, start, end): [start if start <= layer < end else rest for layer in range(LAYERS)]
        for rest in ("reuse", "project")
        for start in range(LAYERS)
        for end in range(start + 1, LAYERS + 1)
    }

    def keys_values(source, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return caches[source].layers[layer].keys, caches[source].layers[layer].values

    decoder = Decoder(receiver)
    states = replay(decoder, 20, ids, list(bands.values()), keys_values)
    for (rest, start, end), ours in zip(bands, states, strict=True):
        plan = ds.Plan([(start, end)], project="rest" if rest == "project" else [])
        with torch.no_grad():
            wanted = receiver(ids, past_key_values=ds.partial_prefill(receiver, context, plan)).logits[0]
        assert_close(decoder.logits(ours).detach(), wanted, torch.float32, operations=64)


def test_what_mixtures_share_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", LAYERS)
    context = ds.capture(model, tokens(20))
    rows: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(args[0].shape[1] // 5), with_kwargs=True
        )
    bands = [(start, end) for start in range(LAYERS) for end in range(start + 1, LAYERS + 1)]
    mixtures = [["own" if start <= layer < end else "reuse" for layer in range(LAYERS)] for start, end in bands]
    replay(Decoder(model), 20, tokens(5), [*mixtures, *mixtures], lambda source, layer: context.kv(layer)[:2])
    # At layer l: what has begun at one of l + 1 starts and not ended, what has ended before, and what is yet to begin.
    distinct = [len({tuple(mixture[: layer + 1]) for mixture in mixtures}) for layer in range(LAYERS)]
    assert sum(rows) == sum(distinct)
    assert len(rows) == 2 * LAYERS, "and what has one source runs in one row"


def test_divergence_and_agreement() -> None:
    model = tiny("llama", LAYERS)
    decoder = Decoder(model)
    states = torch.randn(5, 3, 48)
    with torch.no_grad():
        own = decoder.logits(states[1])
        logits = decoder.logits(states).double().log_softmax(-1)
    divergences, agreements = kl_and_top1(decoder, states, own)
    for row in range(5):
        wanted = (logits[1].exp() * (logits[1] - logits[row])).sum(-1).mean()
        assert divergences[row] == pytest.approx(wanted.item(), abs=1e-5)
        assert agreements[row] == pytest.approx((logits[row].argmax(-1) == logits[1].argmax(-1)).double().mean().item())
    assert divergences[1] == pytest.approx(0, abs=1e-9) and agreements[1] == 1
    states[4, 1] = float("nan")
    assert kl_and_top1(decoder, states, own)[0][4] == float("inf")


@pytest.mark.parametrize("change", [1e-4, 1e-2, 1.0, 10.0])
def test_kl_divergence(change: float) -> None:
    """The divergence is right for logits and log-probabilities, however small, with its gradient, and broadcasts."""
    reference = 3 * torch.randn(4, 1000)
    logits = (reference + change * torch.randn(2, 4, 1000)).requires_grad_()
    p, q = (each.double().log_softmax(-1) for each in (reference, logits))
    expected = (p.exp() * (p - q)).sum(-1)
    found = kl_divergence(reference, logits)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=3e-7 * change)
    of_log_probabilities = kl_divergence(reference.log_softmax(-1), logits.log_softmax(-1))
    torch.testing.assert_close(of_log_probabilities.double(), expected, rtol=1e-5, atol=3e-7 * change)
    gradient, wanted = (torch.autograd.grad(each.sum(), logits)[0] for each in (found, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=3e-7)
