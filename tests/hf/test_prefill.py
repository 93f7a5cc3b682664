"""Partial prefill on transformers models: exact where it must be, equal to a slow independent computation elsewhere."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.compare import assert_bitwise_equal
from support.models import SHAPES, fine_tuned, tiny_llama, tokens
from support.prefills import assert_is_mixed, assert_is_own_prefill, own_prefill, prefill, suffix_logits
from support.slow import SlowDecoder, slow_mixed
from transformers import DynamicCache, LlamaForCausalLM

import droidspeak_ops as ds

LAYERS = 6
EVERYTHING = ds.Plan(bands=[(0, LAYERS)])


@pytest.mark.parametrize("shape", SHAPES)
def test_recomputing_everything_is_the_own_prefill(shape: tuple[int, int, int]) -> None:
    sender = tiny_llama(*shape, layers=LAYERS)
    receiver = fine_tuned(sender)
    ids, suffix = tokens(37), tokens(5)
    assert_is_own_prefill(receiver, prefill(sender, receiver, ids, EVERYTHING), ids, suffix)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "plan", [ds.Plan(), ds.Plan(project="rest"), ds.Plan([(1, 3), (4, 6)], project=[0, 3]), EVERYTHING]
)
def test_sender_equal_to_receiver_is_prefix_caching(plan: ds.Plan, attention: str) -> None:
    """Whatever is reused, projected or recomputed: with the same weights it is all the same."""
    model = tiny_llama(layers=LAYERS)
    model.set_attn_implementation(attention)
    ids, suffix = tokens(37, batch=2), tokens(5, batch=2)
    assert_is_own_prefill(model, prefill(model, model, ids, plan), ids, suffix)


@pytest.mark.parametrize("norm", ["hf", "folded"])
@pytest.mark.parametrize(
    ("bands", "project"),
    [
        ([], []),
        ([], [0, 2, 5]),
        ([], "rest"),
        ([(2, 4)], []),
        ([(0, 3)], []),
        ([(3, 4)], [4]),
        ([(1, 3), (4, 6)], "rest"),
        ([(1, 3), (3, 5)], []),
    ],
)
@pytest.mark.parametrize("shape", [(4, 2, 16), (2, 2, 24)])
def test_mixed_plan_equals_a_slow_computation(bands, project, norm: str, shape: tuple[int, int, int]) -> None:
    sender = tiny_llama(*shape, layers=LAYERS)
    receiver = fine_tuned(sender, 0.3)
    ids, suffix = tokens(11), tokens(3)
    projected = project
    if project == "rest":
        projected = [layer for layer in range(LAYERS) if not any(start <= layer < end for start, end in bands)]
    mixed, logits = slow_mixed(SlowDecoder(sender), SlowDecoder(receiver), ids, suffix, bands, projected)
    cache = prefill(sender, receiver, ids, ds.Plan(bands, project), norm=norm)
    assert_is_mixed(receiver, cache, suffix, mixed, logits)


def test_plans_differ() -> None:
    """The comparison above could not fail if sender and receiver were too alike."""
    sender = tiny_llama(layers=LAYERS)
    receiver = fine_tuned(sender, 0.3)
    ids, suffix = tokens(30), tokens(3)
    plans = [ds.Plan(), ds.Plan(project="rest"), ds.Plan([(2, 4)]), ds.Plan([(2, 4)], project="rest"), EVERYTHING]
    logits = [suffix_logits(receiver, suffix, prefill(sender, receiver, ids, plan)) for plan in plans]
    for index, one in enumerate(logits):
        for other in logits[:index]:
            assert (one - other).abs().max() > 1e-2 * one.abs().max()


def test_nothing_is_written_to_the_context() -> None:
    sender = tiny_llama(layers=LAYERS)
    receiver = fine_tuned(sender)
    plan = ds.Plan([(1, 3)], project=[4])
    context = ds.capture(sender, tokens(20), layers=plan.hidden_layers(LAYERS))
    before = copy.deepcopy(context)
    cache = ds.partial_prefill(receiver, context, plan)
    assert cache.layers[0].keys is context.kv(0)[0], "a reused layer is shared, not copied"
    receiver.generate(torch.cat((context.tokens, tokens(4)), 1), past_key_values=cache, max_new_tokens=5)
    cache.reset()
    for layer in range(LAYERS):
        for ours, theirs in zip(context.kv(layer)[:2], before.kv(layer)[:2], strict=True):
            assert_bitwise_equal(ours, theirs)
    for layer in context.hidden_layers:
        assert_bitwise_equal(context.hidden(layer), before.hidden(layer))


def test_capture_keeps_what_was_asked_for() -> None:
    model = tiny_llama(layers=LAYERS)
    ids = tokens(12)
    context = ds.capture(model, ids, layers=[5, 2])
    assert context.hidden_layers == (2, 5)
    with torch.no_grad():
        hidden_states = model(ids, output_hidden_states=True).hidden_states
    for layer in (2, 5):
        assert_bitwise_equal(context.hidden(layer), hidden_states[layer])


def test_threads_that_share_a_model_do_not_meet() -> None:
    """Captures of other contexts, and generation, at the same time as a capture."""
    model = tiny_llama(layers=LAYERS)
    contexts = [tokens(24) for _ in range(3)]
    expected = [ds.capture(model, ids, layers=range(LAYERS)) for ids in contexts]

    def work(index: int) -> bool:
        same = True
        for _ in range(15):
            got = ds.capture(model, contexts[index], layers=range(LAYERS))
            pairs = [(got.hidden(layer), expected[index].hidden(layer)) for layer in range(LAYERS)]
            pairs += [
                pair
                for layer in range(LAYERS)
                for pair in zip(got.kv(layer)[:2], expected[index].kv(layer)[:2], strict=True)
            ]
            same &= all(torch.equal(*pair) for pair in pairs)
            model.generate(contexts[index], max_new_tokens=2, do_sample=False)
        return same

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))


def test_a_cache_that_is_filled_in_inference_mode_serves_outside_of_it() -> None:
    model = tiny_llama(layers=LAYERS)
    prompt = tokens(20)
    context = ds.capture(model, prompt[:, :16], layers=range(LAYERS))
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    for plan in (ds.Plan(), ds.Plan([(1, 4)]), ds.Plan(project="rest"), EVERYTHING):
        with torch.inference_mode():
            cache = ds.partial_prefill(model, context, plan)
        assert torch.equal(model.generate(prompt, past_key_values=cache, max_new_tokens=6, do_sample=False), expected)


def test_a_compiled_model_is_the_model() -> None:
    model = tiny_llama(layers=LAYERS)
    context = ds.capture(model, tokens(8), layers=range(LAYERS))
    compiled = torch.compile(model, backend="eager")
    assert ds.capture(compiled, tokens(8)).sender == context.sender
    ds.partial_prefill(compiled, context, EVERYTHING)


# --- generate ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    torch.manual_seed(1)
    sender = tiny_llama(layers=LAYERS)
    return sender, fine_tuned(sender, 0.3)


@pytest.mark.parametrize("sample", [False, True])
def test_generation_after_recomputing_everything(pair, sample: bool) -> None:
    sender, receiver = pair
    prompt = tokens(30)
    options = {"max_new_tokens": 12, "do_sample": sample}
    torch.manual_seed(3)
    expected = receiver.generate(prompt, past_key_values=own_prefill(receiver, prompt[:, :24]), **options)
    torch.manual_seed(3)
    actual = receiver.generate(prompt, past_key_values=prefill(sender, receiver, prompt[:, :24], EVERYTHING), **options)
    assert torch.equal(actual, expected)
    assert len(set(actual[0, 30:].tolist())) > 3, "a constant continuation would prove little"


def test_greedy_generation_is_that_of_a_plain_prompt(pair) -> None:
    sender, receiver = pair
    prompt = tokens(30)
    expected = receiver.generate(prompt, max_new_tokens=12, do_sample=False)
    cache = prefill(sender, receiver, prompt[:, :24], EVERYTHING)
    assert torch.equal(receiver.generate(prompt, past_key_values=cache, max_new_tokens=12, do_sample=False), expected)


def test_reuse_with_one_model_generates_like_prefix_caching(pair) -> None:
    model, _ = pair
    prompt = tokens(30)
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)
    cache = prefill(model, model, prompt[:, :24], ds.Plan())
    assert torch.equal(model.generate(prompt, past_key_values=cache, max_new_tokens=12, do_sample=False), expected)


@pytest.mark.parametrize("plan", [ds.Plan(), ds.Plan([(2, 4)], project=[5])])
def test_several_generations_from_copies_of_one_cache(pair, plan: ds.Plan) -> None:
    sender, receiver = pair
    context = tokens(24)
    cache = prefill(sender, receiver, context, plan)
    for _ in range(3):
        prompt = torch.cat((context, tokens(5)), 1)
        fresh = prefill(sender, receiver, context, plan)
        expected = receiver.generate(prompt, past_key_values=fresh, max_new_tokens=8, do_sample=False)
        actual = receiver.generate(prompt, past_key_values=copy.deepcopy(cache), max_new_tokens=8, do_sample=False)
        assert torch.equal(actual, expected)
        assert cache.get_seq_length() == 24


@pytest.mark.parametrize("plan", [ds.Plan(), ds.Plan([(2, 4)], project="rest")])
def test_a_conversation_goes_on_over_one_cache(pair, plan: ds.Plan) -> None:
    """Three turns, against transformers' own dynamic cache holding the same context K/V."""
    sender, receiver = pair
    context = tokens(24)
    ours = prefill(sender, receiver, context, plan)
    theirs = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in ours.layers])
    text = [context, context]
    for _ in range(3):
        turn = tokens(4)
        for index, cache in enumerate((ours, theirs)):
            prompt = torch.cat((text[index], turn), 1)
            text[index] = receiver.generate(prompt, past_key_values=cache, max_new_tokens=150, do_sample=False)
        assert torch.equal(*text)


@pytest.mark.parametrize("plan", [ds.Plan(), ds.Plan([(2, 4)], project="rest"), EVERYTHING])
def test_assisted_generation_gives_the_same_tokens(pair, plan: ds.Plan) -> None:
    """A draft model proposes, the receiver accepts or crops its cache: the outcome is greedy decoding all the same."""
    sender, receiver = pair
    prompt = tokens(30)
    cache = prefill(sender, receiver, prompt[:, :24], plan)
    options = {"max_new_tokens": 16, "do_sample": False}
    expected = receiver.generate(prompt, past_key_values=copy.deepcopy(cache), **options)
    for how in ({"assistant_model": sender}, {"prompt_lookup_num_tokens": 3}):
        actual = receiver.generate(prompt, past_key_values=copy.deepcopy(cache), **how, **options)
        assert torch.equal(actual, expected)


def test_beam_search(pair) -> None:
    sender, receiver = pair
    prompt = tokens(30).expand(2, -1)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    expected = receiver.generate(prompt, **options)
    cache = prefill(sender, receiver, prompt[:, :24], EVERYTHING)
    cache.batch_repeat_interleave(3)
    assert torch.equal(receiver.generate(prompt, past_key_values=cache, **options), expected)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_compute(monkeypatch: pytest.MonkeyPatch):
    """Fails the test if a layer runs or a projection is computed from here on."""

    def forbid(*args, **kwargs):
        pytest.fail("computed before the error")

    def install() -> None:
        monkeypatch.setattr("droidspeak_ops.ops.kv_project_layers", forbid)
        monkeypatch.setattr(torch.nn.Linear, "forward", forbid)
        monkeypatch.setattr(torch.nn.Embedding, "forward", forbid)

    return install


class Vocabulary:
    def __init__(self, *words: str) -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}


def refused(no_compute, receiver, context, plan, match: str, error=ds.ReuseError, **options) -> None:
    no_compute()
    with pytest.raises(error, match=match):
        ds.partial_prefill(receiver, context, plan, **options)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"layers": 5}, "num_hidden_layers is 6 and 5"),
        ({"kv_heads": 4}, "num_key_value_heads is 2 and 4"),
        ({"head_dim": 32}, "head_dim is 64 and 32"),
    ],
)
def test_another_architecture_is_refused(no_compute, other, named: str) -> None:
    context = ds.capture(tiny_llama(layers=LAYERS), tokens(10))
    refused(no_compute, tiny_llama(**{"layers": LAYERS, **other}), context, ds.Plan(), named)


def test_another_dtype_is_refused(no_compute) -> None:
    context = ds.capture(tiny_llama(), tokens(10))
    refused(
        no_compute,
        tiny_llama().half(),
        context,
        ds.Plan(),
        "expected float16, the receiver's, got a context in float32",
    )


def test_another_tokenizer_is_refused(no_compute) -> None:
    model = tiny_llama()
    context = ds.capture(model, tokens(10), tokenizer=Vocabulary("a", "b"))
    ds.partial_prefill(model, context, ds.Plan(), tokenizer=Vocabulary("a", "b"))
    refused(no_compute, model, context, ds.Plan(), "expected one vocabulary", tokenizer=Vocabulary("b", "a"))


def test_a_vocabulary_with_added_tokens(no_compute) -> None:
    """A fine-tune with tokens of its own reads what its base has read, and the other way round where it knows the tokens."""
    base = tiny_llama(layers=LAYERS)
    receiver = copy.deepcopy(base)
    receiver.resize_token_embeddings(104)
    ids, suffix = tokens(10), torch.tensor([[102, 5, 103]])
    words = [chr(97 + index) for index in range(6)]
    context = ds.capture(base, ids, tokenizer=Vocabulary(*words))
    cache = ds.partial_prefill(receiver, context, EVERYTHING, tokenizer=Vocabulary(*words, "added"))
    assert_is_own_prefill(receiver, cache, ids, suffix)
    with pytest.raises(ds.ReuseError, match="expected one vocabulary"):
        ds.partial_prefill(receiver, context, ds.Plan(), tokenizer=Vocabulary("added", *words))
    ds.partial_prefill(base, ds.capture(receiver, ids), EVERYTHING)
    refused(no_compute, base, ds.capture(receiver, suffix), ds.Plan(), "expected tokens up to 100, .* got 103")


def test_missing_hidden_states_are_named(no_compute) -> None:
    model = tiny_llama(layers=LAYERS)
    context = ds.capture(model, tokens(10), layers=[2])
    refused(
        no_compute,
        model,
        context,
        ds.Plan([(2, 4)], project=[5]),
        r"expected them at layers \[2, 5\], got them at \[2\]",
    )


@pytest.mark.parametrize("plan", [ds.Plan([(4, 7)]), ds.Plan(project=[6])])
def test_a_layer_outside_the_model_is_refused(no_compute, plan: ds.Plan) -> None:
    model = tiny_llama(layers=LAYERS)
    context = ds.capture(model, tokens(10), layers=range(LAYERS))
    refused(no_compute, model, context, plan, "expected layers 0 to 5 of a model of 6", error=ValueError)


def test_a_prompt_that_does_not_continue_the_context_is_refused(no_compute) -> None:
    model = tiny_llama()
    context = ds.capture(model, torch.arange(1, 11)[None])
    other = torch.tensor([[1, 2, 3, 99, 5, 6, 7, 8, 9, 10, 11]])
    cache = ds.partial_prefill(model, context, ds.Plan(), prompt_ids=torch.arange(1, 13)[None])
    with pytest.raises(ds.ReuseError, match="expected the tokens of the context at their head, got another at token 3"):
        cache.check_prompt(other)
    model(torch.tensor([[11]]), past_key_values=cache)
    with pytest.raises(ds.ReuseError, match="holds 1 tokens behind its context"):
        cache.check_prompt(torch.arange(1, 14)[None])
    refused(
        no_compute,
        model,
        context,
        ds.Plan(),
        "expected the tokens of the context at their head, got another at token 3",
        prompt_ids=other,
    )
    refused(no_compute, model, context, ds.Plan(), "then a suffix", prompt_ids=context.tokens)
    refused(no_compute, model, context, ds.Plan(), "then a suffix", prompt_ids=context.tokens[:, :5])


@pytest.mark.parametrize(
    "ids", [torch.arange(4), torch.arange(4, dtype=torch.int32)[None], torch.empty((1, 0), dtype=torch.int64)]
)
def test_bad_input_ids(ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="input_ids: expected .*got"):
        ds.capture(tiny_llama(), ids)


def test_bad_layers_and_norm() -> None:
    model = tiny_llama(layers=LAYERS)
    with pytest.raises(ValueError, match=r"layers: expected .*got \[6\]"):
        ds.capture(model, tokens(4), layers=[6])
    with pytest.raises(ValueError, match="norm: expected 'hf' or 'folded', got 'fast'"):
        ds.partial_prefill(model, ds.capture(model, tokens(4)), ds.Plan(), norm="fast")


# --- identity ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_weights() -> None:
    model = tiny_llama()
    first = ds.capture(model, tokens(4)).sender
    assert ds.capture(model, tokens(4)).sender == first
    assert ds.capture(copy.deepcopy(model), tokens(4)).sender == first
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    changed = ds.capture(model, tokens(4)).sender
    assert changed.weights != first.weights
    model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data * 2
    assert ds.capture(model, tokens(4)).sender.weights != changed.weights
