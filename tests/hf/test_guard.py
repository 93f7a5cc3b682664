"""A model's own passes over a mixed cache: what generation gets wrong is put right, and what cannot be right is refused."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import FAMILIES, fine_tuned, tiny, tiny_llama, tokens
from support.prefills import prefill
from transformers import DynamicCache

import droidspeak_ops as ds

LAYERS = 6
EVERYTHING = ds.Plan([(0, LAYERS)])
greedy = {"max_new_tokens": 8, "do_sample": False}


def generated(model, prompt: torch.Tensor, **options) -> list[int]:
    return model.generate(prompt, **greedy, **options)[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_padding_ids_in_a_context_are_tokens(family: str) -> None:
    """Where it is given no mask, generate hides whatever has the id of padding, and moves all positions behind it."""
    model = tiny(family, LAYERS)
    ids, suffix = tokens(20), tokens(5)
    ids[0, 7] = ids[0, 12] = model.generation_config.pad_token_id
    prompt = torch.cat((ids, suffix), 1)
    expected = generated(model, prompt, attention_mask=torch.ones_like(prompt))
    assert generated(model, prompt) != expected, "the case is one only then"
    cache = prefill(model, model, ids, EVERYTHING)
    assert generated(model, prompt, past_key_values=copy.deepcopy(cache)) == expected
    assert generated(model, prompt, past_key_values=copy.deepcopy(cache), prompt_lookup_num_tokens=2) == expected
    assert generated(model, prompt, past_key_values=cache, attention_mask=torch.ones_like(prompt)) == expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("chunk", [3, 25])
def test_prefill_in_chunks_runs_the_suffix_alone(family: str, chunk: int) -> None:
    sender = tiny(family, LAYERS)
    receiver = fine_tuned(sender, 0.3)
    ids = tokens(20)
    prompt = torch.cat((ids, tokens(9)), 1)
    cache = prefill(sender, receiver, ids, ds.Plan([(1, 3)]))
    expected = generated(receiver, prompt, past_key_values=copy.deepcopy(cache))
    assert generated(receiver, prompt, past_key_values=cache, prefill_chunk_size=chunk) == expected
    assert cache.get_seq_length() == prompt.shape[1] + greedy["max_new_tokens"] - 1


def test_prefill_in_chunks_of_a_padded_batch() -> None:
    model = tiny_llama(layers=LAYERS)
    contexts = [ds.capture(model, tokens(count)) for count in (9, 17)]
    cache = ds.partial_prefill_batch(model, contexts, ds.Plan())
    prompt = cache.prompt([tokens(4)[0], tokens(6)[0]])
    expected = model.generate(**prompt, past_key_values=copy.deepcopy(cache), **greedy)
    assert torch.equal(model.generate(**prompt, past_key_values=cache, prefill_chunk_size=5, **greedy), expected)


def test_padding_is_hidden_without_a_mask_too() -> None:
    model = tiny_llama(layers=LAYERS)
    contexts = [ds.capture(model, tokens(count)) for count in (9, 17)]
    cache = ds.partial_prefill_batch(model, contexts, ds.Plan())
    suffixes = tokens(4, batch=2)
    prompt = cache.prompt(list(suffixes))
    shown = model.generate(**prompt, past_key_values=copy.deepcopy(cache), **greedy)
    everything = model.generate(
        prompt["input_ids"],
        attention_mask=torch.ones_like(prompt["input_ids"]),
        past_key_values=copy.deepcopy(cache),
        **greedy,
    )
    assert torch.equal(everything, shown)
    with torch.no_grad():
        logits = model(suffixes, past_key_values=copy.deepcopy(cache)).logits
        alone = ds.partial_prefill(model, contexts[0], ds.Plan())
        expected = model(suffixes[:1], past_key_values=alone).logits
    torch.testing.assert_close(logits[:1], expected)


def test_tokens_that_the_cache_holds_do_not_run_again() -> None:
    """Each pass is judged by itself: those of other caches, and of other requests, go by."""
    model = tiny_llama(layers=LAYERS)
    prompt = tokens(30)
    cache, other = (prefill(model, model, prompt[:, :24], EVERYTHING) for _ in range(2))
    with torch.no_grad():
        expected = model(prompt).logits[:, 24:]
        own = DynamicCache(config=model.config)
        model(prompt[:, :24], past_key_values=own)
        model(prompt[:, :6], past_key_values=own)
        assert own.get_seq_length() == 30
        for given in ({"attention_mask": torch.ones_like(prompt)}, {"position_ids": torch.arange(30)[None]}):
            over = copy.deepcopy(cache)
            logits = model(input_ids=prompt, past_key_values=over, **given).logits
            torch.testing.assert_close(logits, expected)
            assert over.get_seq_length() == 30
        logits = model(input_ids=prompt[:, 24:], past_key_values=other).logits
    torch.testing.assert_close(logits, expected)
    assert len(model.model._forward_pre_hooks) == 1


@torch.no_grad()
def test_a_pass_of_which_nothing_is_new_gives_nothing() -> None:
    model = tiny_llama(layers=LAYERS)
    prompt = tokens(30)
    cache = prefill(model, model, prompt[:, :24], EVERYTHING)
    out = model(input_ids=prompt[:, 3:9], position_ids=torch.arange(3, 9)[None], past_key_values=cache)
    assert out.logits.isnan().all()
    assert cache.get_seq_length() == 24
    after = model(input_ids=prompt[:, 24:], past_key_values=out.past_key_values)
    torch.testing.assert_close(after.logits, model(prompt).logits[:, 24:])
    assert cache.get_seq_length() == 30


@torch.no_grad()
def test_what_cannot_be_right_is_refused() -> None:
    model = tiny_llama(layers=LAYERS)
    ids, suffix = tokens(20), tokens(5)
    cache = prefill(model, model, ids, EVERYTHING)
    hidden = torch.ones(1, 25, dtype=torch.int64)
    hidden[0, 7] = 0
    with pytest.raises(ds.ReuseError, match="attention_mask: expected 1 at every token of the context, .* got 0 at 7"):
        model(suffix, attention_mask=hidden, past_key_values=cache)
    wrong = torch.cat((ids, suffix), 1)
    wrong[0, 3] = 100 - wrong[0, 3]
    for given in ({"attention_mask": torch.ones_like(wrong)}, {"position_ids": torch.arange(25)[None]}):
        with pytest.raises(ds.ReuseError, match="input_ids: expected new tokens behind the 20 .* got another at 3"):
            model(wrong, past_key_values=cache, **given)
    with pytest.raises(ds.ReuseError, match="input_ids: expected new tokens"):
        model(suffix, attention_mask=torch.ones_like(suffix), past_key_values=cache)
    assert cache.get_seq_length() == 20


def test_a_prompt_beyond_the_switch_of_a_longrope_is_refused() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        **factors,
        "original_max_position_embeddings": 32,
        "factor": 4.0,
    }
    model = tiny("llama", LAYERS, max_position_embeddings=128, rope_parameters=rope)
    ids = tokens(28)
    cache = prefill(model, model, ids, EVERYTHING)
    near = torch.cat((ids, tokens(2)), 1)
    few = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(near, past_key_values=copy.deepcopy(cache), **few), model.generate(near, **few))
    with pytest.raises(ds.ReuseError, match="prompt: expected up to 32 tokens, .* got 33"):
        model(tokens(5), past_key_values=cache)
    long = tokens(40)
    beyond = prefill(model, model, long, EVERYTHING)
    prompt = torch.cat((long, tokens(5)), 1)
    assert generated(model, prompt, past_key_values=beyond) == generated(model, prompt)


def test_another_adapter_than_the_caches_is_refused() -> None:
    model = get_peft_model(tiny_llama(layers=LAYERS), lora(), adapter_name="one")
    model.add_adapter("two", lora())
    model.set_adapter("one")
    model.eval()
    ids = tokens(20)
    prompt = torch.cat((ids, tokens(5)), 1)
    context = ds.capture(model, ids)
    cache = ds.partial_prefill(model, context, EVERYTHING)
    expected = generated(model, prompt)
    assert generated(model, prompt, past_key_values=copy.deepcopy(cache)) == expected
    named = model.generate(
        input_ids=prompt, past_key_values=copy.deepcopy(cache), adapter_names=["one"], **greedy
    )  # PEFT takes no positional prompt with names
    assert named[0, prompt.shape[1] :].tolist() == expected
    with pytest.raises(ds.ReuseError, match=r"adapter_names: expected \['one'\] in every row, .* got \['two'\]"):
        model.generate(input_ids=prompt, past_key_values=copy.deepcopy(cache), adapter_names=["two"], **greedy)
    assert generated(model, prompt) == expected, "PEFT would go on with the adapters of a call that has failed"
    with pytest.raises(ds.ReuseError, match=r"got \['__base__'\]"):
        model.generate(input_ids=prompt, past_key_values=copy.deepcopy(cache), adapter_names=["__base__"], **greedy)
    model.set_adapter("two")
    with pytest.raises(ds.ReuseError, match=r"receiver: expected the adapters \['one'\], .* got \['two'\] active"):
        generated(model, prompt, past_key_values=copy.deepcopy(cache))
    model.set_adapter("one")
    with model.disable_adapter():
        with pytest.raises(ds.ReuseError, match=r"got \[\] active"):
            generated(model, prompt, past_key_values=copy.deepcopy(cache))
        base = ds.partial_prefill(model, ds.capture(model, ids), EVERYTHING)
        assert generated(model, prompt, past_key_values=copy.deepcopy(base)) == generated(model, prompt)
    named = model.generate(input_ids=prompt, past_key_values=base, adapter_names=["__base__"], **greedy)
    with model.disable_adapter():
        assert named[0, prompt.shape[1] :].tolist() == generated(model, prompt)


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
