"""Selected tokens: all of them are a full prefill, none the plan without, and some a computation that is written out slowly."""

import copy
import re
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.compare import assert_bitwise_equal, assert_close
from support.models import FAMILIES, fine_tuned, tiny, tiny_llama, tokens
from support.prefills import own_prefill, prefill
from support.slow import SlowDecoder, slow_mixed, slow_selected

import droidspeak_ops as ds
from droidspeak_ops.prefill.select import (
    MIN_TOKENS,
    NEIGHBOURS,
    around_peaks,
    budget,
    layers_looked_at,
)

LAYERS = 6
CONTEXT, SUFFIX = 21, 5
greedy = {"max_new_tokens": 8, "do_sample": False}
of_each_family = pytest.mark.parametrize("family", sorted(FAMILIES))


def odd(context: torch.Tensor, suffix: torch.Tensor) -> torch.Tensor:
    """A selector of the user's."""
    return (context % 7).float()


def pair_of(family: str, **changes) -> tuple:
    sender = tiny(family, LAYERS, **changes)
    return sender, fine_tuned(sender, 0.3)


def selected(sender, receiver, prompt: torch.Tensor, plan: ds.Plan, **options) -> ds.MixedCache:
    return prefill(sender, receiver, prompt[:, :-SUFFIX], plan, prompt_ids=prompt, **options)


def around(monkeypatch: pytest.MonkeyPatch, neighbours: int) -> None:
    monkeypatch.setattr("droidspeak_ops.prefill.select.NEIGHBOURS", neighbours)


@of_each_family
@pytest.mark.parametrize("batch", [1, 2])
def test_every_token_is_a_full_prefill(family: str, batch: int) -> None:
    sender, receiver = pair_of(family)
    prompt = tokens(CONTEXT + SUFFIX, batch=batch)
    cache = selected(sender, receiver, prompt, ds.Plan(select=1.0))
    with torch.no_grad():
        logits = [receiver(ids[None], logits_to_keep=1).logits[:, -1] for ids in prompt]
    for row, ids in enumerate(prompt):
        own = own_prefill(receiver, ids[None])
        for ours, theirs in zip(cache.layers, own.layers, strict=True):
            for mine, other in ((ours.keys[row], theirs.keys[0]), (ours.values[row], theirs.values[0])):
                # Both end before the last token; a window has left its oldest row behind for that in the own prefill.
                count = min(mine.shape[1], other.shape[1] - 1)
                assert_bitwise_equal(mine[:, mine.shape[1] - count :], other[:, other.shape[1] - 1 - count : -1])
    assert_bitwise_equal(cache.next_logits, torch.cat(logits).float())
    assert cache.get_seq_length() == prompt.shape[1] - 1


@of_each_family
@pytest.mark.parametrize("selector", ["attention", "recent", odd], ids=["attention", "recent", "function"])
def test_some_tokens_equal_a_slow_computation(family: str, selector, monkeypatch: pytest.MonkeyPatch) -> None:
    around(monkeypatch, 1)
    monkeypatch.setattr("droidspeak_ops.prefill.select.LOOKED_AT", (1 / LAYERS, 4 / LAYERS))
    sender, receiver = pair_of(family)
    prompt = tokens(CONTEXT + SUFFIX)
    plan = ds.Plan([(1, 3)], project=[4], select=6, selector=selector)
    cache = selected(sender, receiver, prompt, plan)
    slow = SlowDecoder(receiver)
    context, suffix = prompt[:, :CONTEXT], prompt[:, CONTEXT:]
    mixed, _ = slow_mixed(SlowDecoder(sender), slow, context, suffix, plan.bands, plan.project)
    if selector == "attention":
        _, scores, _ = slow_selected(slow, mixed, prompt, CONTEXT, [], looked_at=range(1, 4))
        scores[:4] = 0
    else:
        scores = torch.arange(CONTEXT).float() if selector == "recent" else odd(context[0], suffix[0])
    chosen = list(range(CONTEXT - 6, CONTEXT)) if selector == "recent" else around_peaks(scores, 6).tolist()
    tables, _, states = slow_selected(slow, mixed, prompt, CONTEXT, chosen)
    for layer, table in zip(cache.layers, tables, strict=True):
        rows = layer.keys.shape[2]
        there = [table[at] for at in range(prompt.shape[1] - 1 - rows, prompt.shape[1] - 1)]
        for ours, part in ((layer.keys, 0), (layer.values, 1)):
            assert_close(ours[0], torch.stack([each[part] for each in there], 1), torch.float32, operations=LAYERS)
    assert_close(cache.next_logits[0], slow.logits(states[-1:])[0], torch.float32, operations=LAYERS)


@of_each_family
def test_generation_goes_on_from_the_first_token(family: str) -> None:
    sender, receiver = pair_of(family)
    prompt = tokens(CONTEXT + SUFFIX)
    cache = selected(sender, receiver, prompt, ds.Plan(select=0.3))
    made = receiver.generate(prompt, past_key_values=copy.deepcopy(cache), **greedy)
    assert made[0, prompt.shape[1]] == cache.next_logits.argmax()
    ids, step = prompt, cache
    for _ in range(greedy["max_new_tokens"]):
        with torch.no_grad():
            logits = receiver(ids[:, -1:], past_key_values=step).logits[:, -1]
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(made, ids)
    everything = selected(sender, receiver, prompt, ds.Plan(select=1.0))
    assert torch.equal(
        receiver.generate(prompt, past_key_values=everything, **greedy), receiver.generate(prompt, **greedy)
    )


def test_other_tokens_and_the_context_stay_as_they_are() -> None:
    sender, receiver = pair_of("llama")
    prompt = tokens(CONTEXT + SUFFIX)
    plan = ds.Plan([(2, 4)])
    context = ds.capture(sender, prompt[:, :CONTEXT], layers=plan.hidden_layers(LAYERS))
    before = [tuple(part.clone() for part in context.kv(layer)[:2]) for layer in range(LAYERS)]
    without = ds.partial_prefill(receiver, context, plan)
    places = torch.tensor([3, 4, 11, 20])
    chosen = ds.Plan(plan.bands, select=6, selector=lambda context, suffix: places.flip(0))
    cache = ds.partial_prefill(receiver, context, chosen, prompt_ids=prompt)
    for layer, (ours, theirs) in enumerate(zip(cache.layers, without.layers, strict=True)):
        kept = torch.ones(CONTEXT, dtype=torch.bool).index_fill(0, places, False)
        for mine, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert_bitwise_equal(mine[:, :, :CONTEXT][:, :, kept], other[:, :, kept])
            assert (mine[:, :, places] != other[:, :, places]).any(-1)[0].any(0).all()
        assert_bitwise_equal(context.kv(layer).keys, before[layer][0])
        assert_bitwise_equal(context.kv(layer).values, before[layer][1])


def test_the_joint_pass_is_that_of_both_one_after_the_other() -> None:
    """First the selected tokens, then the suffix over what they left."""
    sender, receiver = pair_of("llama")
    prompt = tokens(CONTEXT + SUFFIX)
    joint = selected(sender, receiver, prompt, ds.Plan(select=8, selector="recent"))
    cut = prompt[:, : CONTEXT + 1]
    first = prefill(sender, receiver, prompt[:, :CONTEXT], ds.Plan(select=8, selector="recent"), prompt_ids=cut)
    with torch.no_grad():
        logits = receiver(prompt[:, CONTEXT:], past_key_values=first).logits[:, -1]
    assert_close(joint.next_logits, logits, torch.float32, operations=LAYERS)
    for ours, theirs in zip(joint.layers, first.layers, strict=True):
        assert_close(ours.keys, theirs.keys[:, :, :-1], torch.float32, operations=LAYERS)


@of_each_family
@pytest.mark.parametrize("selector", ["attention", odd], ids=["attention", "function"])
def test_the_operator_attends_as_the_model_does(family: str, selector, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where it is a kernel and no mask is made."""
    around(monkeypatch, 1)
    sender, receiver = pair_of(family)
    prompt = tokens(CONTEXT + SUFFIX)
    plan = ds.Plan([(1, 3)], select=6, selector=selector)
    usual = selected(sender, receiver, prompt, plan)
    operator = mock.Mock(wraps=ds.ops.attend_rows)
    monkeypatch.setattr("droidspeak_ops.hf.passes.has_kernel", lambda device: True)
    monkeypatch.setattr(ds.ops, "attend_rows", operator)
    ours = selected(sender, receiver, prompt, plan)
    layers_run = LAYERS if callable(selector) else LAYERS + layers_looked_at(LAYERS).stop - 1
    assert operator.call_count == layers_run
    assert_close(ours.next_logits, usual.next_logits, torch.float32, operations=LAYERS)
    for mine, other in zip(ours.layers, usual.layers, strict=True):
        assert_close(mine.keys, other.keys, torch.float32, operations=LAYERS)
        assert_close(mine.values, other.values, torch.float32, operations=LAYERS)


@of_each_family
def test_grouped_heads_give_the_same_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = pair_of(family)
    prompt = tokens(CONTEXT + SUFFIX)
    plan = ds.Plan(select=6, selector=odd)
    ours = selected(sender, receiver, prompt, plan)
    monkeypatch.setattr("droidspeak_ops.hf.passes.attending_to_rows", lambda layer, config: _Plain(layer))
    plain = selected(sender, receiver, prompt, plan)
    for mine, other in zip(ours.layers, plain.layers, strict=True):
        assert_bitwise_equal(mine.keys, other.keys)
        assert_bitwise_equal(mine.values, other.values)
    # The last layer runs for one token, whose heads transformers groups from 5.24 on, and so rounds otherwise.
    assert_close(ours.next_logits, plain.next_logits, torch.float32)


class _Plain:
    """A layer as it is, which ignores what rows it is told of."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._layer = layer

    def __call__(self, *args, rows, **options) -> torch.Tensor:
        return self._layer(*args, **options)


def test_none_is_the_plan_without() -> None:
    assert ds.Plan([(1, 3)], select=0) == ds.Plan([(1, 3)], select=0.0) == ds.Plan([(1, 3)])
    sender, receiver = pair_of("llama")
    prompt = tokens(CONTEXT + SUFFIX)
    cache = selected(sender, receiver, prompt, ds.Plan(select=0.0))
    assert cache.get_seq_length() == CONTEXT and cache.next_logits is None


@pytest.mark.parametrize("selector", ["attention", "deviation", "recent"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_sequences_of_a_batch_select_by_themselves(family: str, selector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    around(monkeypatch, 1)
    sender, receiver = pair_of(family)
    prompt, plan = tokens(CONTEXT + SUFFIX, batch=3), ds.Plan(select=5, selector=selector)
    together = selected(sender, receiver, prompt, plan)
    for row in range(3):
        alone = selected(sender, receiver, prompt[row, None], plan)
        for ours, theirs in zip(together.layers, alone.layers, strict=True):
            assert_bitwise_equal(ours.keys[row, None], theirs.keys)
            assert_bitwise_equal(ours.values[row, None], theirs.values)
        assert_bitwise_equal(together.next_logits[row, None], alone.next_logits)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_contexts_of_a_batch_with_plans_of_their_own(family: str) -> None:
    """Lengths differ, plans differ, and one of them selects nothing: all are ready for their last token."""
    sender, receiver = pair_of(family)
    contexts = [ds.capture(sender, tokens(count)) for count in (15, 21, 18)]
    suffixes = [tokens(count)[0] for count in (4, 2, 6)]
    plans = [ds.Plan(select=5), ds.Plan(), ds.Plan(select=1.0)]
    together = ds.partial_prefill_batch(receiver, contexts, plans, suffixes=suffixes)
    prompt = together.prompt([suffix[-1:] for suffix in suffixes])
    made = receiver.generate(**prompt, past_key_values=copy.deepcopy(together), **greedy)
    for row, (context, suffix, plan) in enumerate(zip(contexts, suffixes, plans, strict=True)):
        ids = torch.cat((context.tokens, suffix[None]), 1)
        alone = ds.partial_prefill(receiver, context, plan, prompt_ids=ids)
        expected = receiver.generate(ids, past_key_values=alone, **greedy)
        assert torch.equal(made[row, -8:], expected[0, -8:])
        assert together.next_logits[row].argmax() == expected[0, -8]
    with pytest.raises(ValueError, match="suffixes: expected one for each of 3 sequences, got 2"):
        ds.partial_prefill_batch(receiver, contexts, plans, suffixes=suffixes[:2])
    with pytest.raises(ValueError, match="prompt_ids: expected the context and a suffix"):
        ds.partial_prefill_batch(receiver, contexts, plans)
    with pytest.raises(ValueError, match="suffixes: expected one length of at least 1"):
        ds.partial_prefill_batch(receiver, contexts, plans, suffixes=[suffixes[0], suffixes[1][:0], suffixes[2]])


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_over_contexts_in_8_bits_and_another_rope(stored: torch.dtype) -> None:
    sender = tiny("llama", LAYERS, rope_parameters={"rope_type": "default", "rope_theta": 5e3})
    receiver = tiny("llama", LAYERS)
    prompt = tokens(CONTEXT + SUFFIX)
    context = ds.capture(sender, prompt[:, :CONTEXT]).quantized(stored)
    cache = ds.partial_prefill(receiver, context, ds.Plan(select=1.0), prompt_ids=prompt)
    own = own_prefill(receiver, prompt)
    for ours, theirs in zip(cache.layers, own.layers, strict=True):
        assert_bitwise_equal(ours.keys, theirs.keys[:, :, :-1])
    some = ds.partial_prefill(receiver, context, ds.Plan(select=7), prompt_ids=prompt)
    plain = ds.partial_prefill(receiver, context, ds.Plan())
    assert int((some.layers[3].keys[:, :, :CONTEXT] != plain.layers[3].keys).any(-1).any(1).sum()) == 7


def test_with_adapters_that_are_not_merged() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(layers=LAYERS), config).eval()
    prompt = tokens(CONTEXT + SUFFIX)
    with model.disable_adapter():
        context = ds.capture(model, prompt[:, :CONTEXT])
    cache = ds.partial_prefill(model, context, ds.Plan(select=1.0), prompt_ids=prompt)
    for ours, theirs in zip(cache.layers, own_prefill(model, prompt).layers, strict=True):
        assert_bitwise_equal(ours.keys, theirs.keys[:, :, :-1])
    some = ds.partial_prefill(ds.Receiver(model), context, ds.Plan(select=7), prompt_ids=prompt)
    made = model.generate(input_ids=prompt, past_key_values=some, **greedy)
    assert made[0, prompt.shape[1]] == some.next_logits.argmax()


def test_several_suffixes_select_each_for_itself() -> None:
    sender, receiver = pair_of("llama")
    ids = tokens(60)
    context = ds.capture(sender, ids)
    prompts = [torch.cat((ids, tokens(SUFFIX)), 1) for _ in range(2)]
    caches = [ds.partial_prefill(receiver, context, ds.Plan(select=10), prompt_ids=prompt) for prompt in prompts]
    plain = ds.partial_prefill(receiver, context, ds.Plan())
    changed = [(cache.layers[3].keys[:, :, :60] != plain.layers[3].keys).any(-1)[0].any(0) for cache in caches]
    assert changed[0].sum() == changed[1].sum() == 10
    assert not torch.equal(*changed)


def test_the_deviation_is_that_of_the_second_layer() -> None:
    """Where one token was read by another model, it is the one that differs."""
    receiver = tiny_llama(layers=LAYERS)
    prompt = tokens(CONTEXT + SUFFIX)
    context = ds.capture(receiver, prompt[:, :CONTEXT])
    context.kv(1).values[0, 1, 13] += 1
    cache = ds.partial_prefill(receiver, context, ds.Plan(select=1, selector="deviation"), prompt_ids=prompt)
    own = own_prefill(receiver, prompt)
    torch.testing.assert_close(cache.layers[1].values, own.layers[1].values[:, :, :-1])


@pytest.mark.parametrize(("tokens_", "count"), [(1, 1), (5, 0), (5, 3), (60, 60), (300, 40), (300, 100)])
def test_peaks_come_with_their_neighbours(tokens_: int, count: int) -> None:
    scores = torch.rand(tokens_)
    expected: list[int] = []
    for peak in sorted(range(tokens_), key=lambda at: (-scores[at].item(), at)):
        for distance in range(NEIGHBOURS + 1):
            for at in (peak - distance, peak + distance):
                if 0 <= at < tokens_ and at not in expected and len(expected) < count:
                    expected.append(at)
    assert around_peaks(scores, count).tolist() == sorted(expected)


def test_a_budget_is_a_share_or_a_number() -> None:
    assert budget(0.05, 2000) == 100 and budget(0.05, 300) == MIN_TOKENS and budget(0.05, 20) == 20
    assert budget(7, 2000) == 7 and budget(7, 5) == 5 and budget(0, 9) == budget(0.0, 9) == 0 and budget(1.0, 9) == 9


def test_json_keeps_a_selection() -> None:
    for plan in (ds.Plan(select=0.05), ds.Plan([(1, 2)], select=40, selector="recent")):
        again = ds.Plan.from_json(plan.to_json())
        assert again == plan and type(again.select) is type(plan.select)
    assert "select" not in ds.Plan().to_json()
    with pytest.raises(ValueError, match="selector: expected one of 'attention', .*, got a function"):
        ds.Plan(select=0.1, selector=odd).to_json()
    assert str(ds.Plan(select=0.05)) == "rest reused, 0.05 of tokens selected by attention"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"select": 1.5}, "select: expected a share from 0.0 to 1.0, or an integer number of tokens, got 1.5"),
        ({"select": -1}, "select: expected .* got -1"),
        ({"select": float("nan")}, "select: expected .* got nan"),
        ({"select": True}, "select: expected .* got True"),
        ({"select": "most"}, "select: expected .* got 'most'"),
        ({"select": 0.1, "selector": "best"}, "selector: expected one of .* or a function, got 'best'"),
    ],
)
def test_a_wrong_selection_is_refused(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ds.Plan(**arguments)


def test_what_a_selection_needs() -> None:
    sender, receiver = pair_of("llama")
    prompt = tokens(CONTEXT + SUFFIX)
    with pytest.raises(ValueError, match="prompt_ids: expected the context and a suffix, .* got None"):
        prefill(sender, receiver, prompt[:, :CONTEXT], ds.Plan(select=0.1))
    wrong = (
        torch.zeros(5),
        torch.arange(4),
        torch.tensor([21]),
        torch.tensor([-1]),
        torch.arange(0),
        torch.zeros(21).bool(),
    )
    for found in wrong:
        expected = "selector: expected a score for each of 21 tokens, or positions of 1 to 3 of them, got "
        with pytest.raises(ValueError, match=re.escape(f"{expected}{found.dtype} {tuple(found.shape)}")):
            selected(sender, receiver, prompt, ds.Plan(select=3, selector=lambda *_, found=found: found))
    receiver.set_attn_implementation("flex_attention")
    with pytest.raises(ds.UnsupportedModelError, match="expected 'sdpa' or 'eager', which take masks"):
        selected(sender, receiver, prompt, ds.Plan(select=3))
