"""Every family that is supported: exactness of the receiver's path, feature by feature (docs/models.md has the table)."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.compare import assert_bitwise_equal, assert_close
from support.models import FAMILIES, fine_tuned, tiny, tokens
from support.prefills import assert_is_mixed, assert_is_own_prefill, own_prefill, prefill, suffix_logits
from support.slow import SlowDecoder, slow_mixed
from torch._dynamo.testing import CompileCounter

import droidspeak_ops as ds
from droidspeak_ops.hf import families
from droidspeak_ops.prefill.schedule import resolve

LAYERS = 6
EVERYTHING = ds.Plan([(0, LAYERS)])
CONTEXT, WINDOW = 21, 8
SWITCHED = ("qwen2", "qwen3", "qwen3_moe", "smollm3")  # have windows if asked for them
ALWAYS = ("mistral", "mixtral", "phi3")  # have windows unless asked not to
NO_SDPA = ("gemma2", "gpt_oss")

CASES = [
    *((family, {}) for family in FAMILIES),
    *((family, {"use_sliding_window": True}) for family in SWITCHED),
    *((family, {"sliding_window": None}) for family in ALWAYS),
]
of_each = pytest.mark.parametrize(
    ("family", "options"), CASES, ids=["-".join([name, *options]) for name, options in CASES]
)
of_each_family = pytest.mark.parametrize("family", FAMILIES)
greedy = {"max_new_tokens": 12, "do_sample": False}


def pair_of(family: str, **options) -> tuple:
    sender = tiny(family, LAYERS, **options)
    return sender, fine_tuned(sender, 0.3)


def test_every_family_is_here() -> None:
    assert set(families.FAMILIES) == {*FAMILIES, "gemma3"}  # the one with other parts around gemma3_text


# --- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.feature("recompute")
@of_each
@pytest.mark.parametrize("count", [CONTEXT, WINDOW, WINDOW - 1, 3])
def test_recomputing_everything_is_the_own_prefill(family: str, options: dict, count: int) -> None:
    pair = pair_of(family, **options)
    ids, suffix = tokens(count, batch=2), tokens(5, batch=2)
    assert_is_own_prefill(pair[1], prefill(*pair, ids, EVERYTHING), ids, suffix)


@pytest.mark.feature("reuse")
@of_each
@pytest.mark.parametrize("plan", [ds.Plan(), ds.Plan(project="rest"), ds.Plan([(1, 3)], project=[0])])
def test_sender_equal_to_receiver_is_prefix_caching(family: str, options: dict, plan: ds.Plan) -> None:
    model = tiny(family, LAYERS, **options)
    ids, suffix = tokens(CONTEXT, batch=2), tokens(5, batch=2)
    assert_is_own_prefill(model, prefill(model, model, ids, plan), ids, suffix)


@pytest.mark.feature("mixed")
@of_each
@pytest.mark.parametrize("norm", ["hf", "folded"])
@pytest.mark.parametrize(("bands", "project"), [([], [0, 2]), ([(1, 4)], [0, 5]), ([(0, 2)], [])])
def test_mixed_plan_equals_a_slow_computation(family: str, options: dict, bands, project, norm: str) -> None:
    sender, receiver = pair_of(family, **options)
    ids, suffix = tokens(CONTEXT), tokens(3)
    mixed, logits = slow_mixed(SlowDecoder(sender), SlowDecoder(receiver), ids, suffix, bands, project)
    cache = prefill(sender, receiver, ids, ds.Plan(bands, project), norm=norm)
    assert_is_mixed(receiver, cache, suffix, mixed, logits)


@pytest.mark.feature("window")
@of_each
def test_of_a_window_only_what_the_next_token_sees_is_kept(family: str, options: dict) -> None:
    sender, receiver = pair_of(family, **options)
    slow = SlowDecoder(sender)
    windows = [slow.window(layer) for layer in range(LAYERS)]
    if not any(windows):
        pytest.skip("no windows")
    plan = ds.Plan([(1, 4)], project=[0])
    context = ds.capture(sender, tokens(CONTEXT), layers=plan.hidden_layers(LAYERS))
    cache = ds.partial_prefill(receiver, context, plan)
    for layer, window in enumerate(windows):
        rows = CONTEXT if window is None else window - 1
        for held in (context.kv(layer).keys, cache.layers[layer].keys):
            assert held.shape[2] == rows
            assert window is None or held.untyped_storage().nbytes() == held.nbytes, "no more than that is in memory"
    assert cache.get_seq_length() == CONTEXT


@pytest.mark.feature("generate")
@of_each
def test_greedy_generation_is_that_of_a_plain_prompt(family: str, options: dict) -> None:
    pair = pair_of(family, **options)
    ids = tokens(CONTEXT)
    prompt = torch.cat([ids, tokens(4)], dim=1)
    cache = prefill(*pair, ids, EVERYTHING, prompt_ids=prompt)
    expected = pair[1].generate(prompt, **greedy)
    assert torch.equal(pair[1].generate(prompt, past_key_values=copy.deepcopy(cache), **greedy), expected)
    assisted = pair[1].generate(prompt, past_key_values=cache, prompt_lookup_num_tokens=3, **greedy)
    assert torch.equal(assisted, expected)
    assert len(set(expected[0, prompt.shape[1] :].tolist())) > 1, "a constant continuation would prove little"


@pytest.mark.feature("half")
@of_each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    pair = [model.to(dtype) for model in pair_of(family)]
    ids, suffix = tokens(CONTEXT, batch=2), tokens(5, batch=2)
    assert_is_own_prefill(pair[1], prefill(*pair, ids, EVERYTHING), ids, suffix)


@of_each_family
@pytest.mark.parametrize(
    "attention", [pytest.param(name, marks=pytest.mark.feature(name)) for name in ("sdpa", "eager", "flex")]
)
def test_attention_is_the_models_own(family: str, attention: str) -> None:
    if attention == "sdpa" and family in NO_SDPA:
        pytest.skip("transformers has no SDPA for scores that are capped or have sinks")
    if attention == "flex" and family == "gpt_oss":
        pytest.skip("flex_attention has no sinks on a CPU")
    pair = pair_of(family)
    for model in pair:
        model.set_attn_implementation({"flex": "flex_attention"}.get(attention, attention))
    with torch.compiler.set_stance("force_eager"):  # flex_attention would be compiled, for a quarter of a minute
        ids, suffix = tokens(CONTEXT), tokens(5)
        assert_is_own_prefill(pair[1], prefill(*pair, ids, EVERYTHING), ids, suffix)


# --- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.feature("batch")
@of_each
@pytest.mark.parametrize("layout", ["left", "right", "packed"])
def test_a_ragged_batch_is_its_sequences_one_by_one(family: str, options: dict, layout: str) -> None:
    sender, receiver = pair_of(family, **options)
    plans = [ds.Plan([(1, 3)]), ds.Plan(project="rest"), EVERYTHING]
    sequences = [tokens(count)[0] for count in (13, 30, 5)]
    suffixes = [tokens(4)[0] for _ in sequences]
    if layout == "packed":
        bounds = torch.tensor([0, 13, 43, 48], dtype=torch.int32)
        contexts = ds.capture_batch(sender, torch.cat(sequences), cu_seqlens=bounds, layers=range(LAYERS))
    else:
        padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_side=layout)
        mask = (padded != 0).long()
        contexts = ds.capture_batch(sender, padded, attention_mask=mask, layers=range(LAYERS))
    cache = ds.partial_prefill_batch(receiver, contexts, plans)
    together = receiver.generate(**cache.prompt(suffixes), past_key_values=copy.deepcopy(cache), **greedy)
    for row, (sequence, suffix, plan) in enumerate(zip(sequences, suffixes, plans, strict=True)):
        alone = prefill(sender, receiver, sequence[None], plan)
        for ours, theirs in zip(cache.layers, alone.layers, strict=True):
            rows = theirs.keys.shape[2]
            assert_bitwise_equal(ours.keys[row, :, -rows:], theirs.keys[0])
            assert_bitwise_equal(ours.values[row, :, -rows:], theirs.values[0])
        expected = receiver.generate(torch.cat([sequence, suffix])[None], past_key_values=alone, **greedy)
        assert torch.equal(together[row, -12:], expected[0, -12:])


# --- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.feature("lora")
@of_each_family
def test_unmerged_adapters_on_the_sender_itself(family: str) -> None:
    """One set of weights: the base reads, adapters receive, one after the other."""
    base = tiny(family, LAYERS)
    plain = ds.capture(base, tokens(3)).sender
    targets = ["qkv_proj", "o_proj"] if family == "phi3" else ["q_proj", "k_proj", "v_proj"]
    settings = {"target_modules": targets, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, **settings), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, layers_to_transform=[1, 2, 4], **settings))
    model.eval()
    ids, suffix = tokens(CONTEXT), tokens(5)
    with model.disable_adapter():
        context = ds.capture(model, ids, layers=range(LAYERS))
    assert context.sender == plain
    logits = []
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        merged = copy.deepcopy(model).merge_and_unload()
        for norm in ("hf", "folded"):
            cache = ds.partial_prefill(model, context, EVERYTHING, norm=norm)
            own = own_prefill(base, ids)
            for ours, theirs in zip(cache.layers, own.layers, strict=True):
                assert_close(ours.keys, theirs.keys, torch.float32, operations=LAYERS)
                assert_close(ours.values, theirs.values, torch.float32, operations=LAYERS)
            plan = ds.Plan([(1, 3)], project=[0, 4])
            cache = ds.partial_prefill(model, context, plan, norm=norm)
            mixed, expected = slow_mixed(_without(model), SlowDecoder(merged), ids, suffix, plan.bands, plan.project)
            assert_is_mixed(model, cache, suffix, mixed, expected)
        logits.append(suffix_logits(model, suffix, cache))
        prompt = torch.cat([ids, suffix], dim=1)
        cache = ds.partial_prefill(model, context, EVERYTHING)
        assert torch.equal(
            model.generate(input_ids=prompt, past_key_values=cache, **greedy), merged.generate(prompt, **greedy)
        )
    assert (logits[0] - logits[1]).abs().max() > 0.01 * logits[0].abs().max()


def _without(model) -> SlowDecoder:
    """The base of a PEFT model."""
    return SlowDecoder(copy.deepcopy(model).unload())


# --- contexts ----------------------------------------------------------------------------------------------------------


@pytest.mark.feature("rope")
@of_each_family
@pytest.mark.parametrize("batch", [1, 2])
def test_keys_are_rotated_on_where_rope_parameters_differ(family: str, batch: int) -> None:
    receiver = tiny(family, LAYERS)
    sender = _with_other_rope(receiver)
    ids = tokens(CONTEXT, batch=batch)
    plan = ds.Plan([(3, 5)])
    cache = prefill(sender, receiver, ids, plan)
    context = ds.capture(sender, ids)
    for row in range(batch):
        # The sender's hidden states, the same weights, but the receiver's RoPE: what reused K should be.
        reader, translator = SlowDecoder(sender), SlowDecoder(receiver)
        entering = reader.embed(ids[row : row + 1])
        for layer, role in enumerate(resolve(plan, LAYERS).sources):
            if role == "reuse":
                held = cache.layers[layer]
                keys, values = (torch.stack(heads) for heads in translator.kv(layer, entering))
                rows = held.keys.shape[2]
                assert_close(held.keys[row], keys[:, -rows:], torch.float32, operations=LAYERS)
                assert_close(held.values[row], values[:, -rows:], torch.float32, operations=LAYERS)
                rotates = family != "smollm3" or (layer + 1) % 3
                differs = (context.kv(layer).keys[row] - held.keys[row]).abs().max() > 0.01 * held.keys.abs().max()
                assert bool(differs) == bool(rotates)
            entering = reader.layer(layer, entering)


def _with_other_rope(model):
    """The same weights with each RoPE base five times as large."""
    config = copy.deepcopy(model.config)
    for parameters in (config.rope_parameters, *config.rope_parameters.values()):
        if isinstance(parameters, dict) and "rope_theta" in parameters:
            parameters["rope_theta"] *= 5
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.feature("codes")
@of_each_family
@pytest.mark.parametrize(("dtype", "step"), [(torch.float8_e4m3fn, 2**-4), (torch.int8, 1 / 254)])
def test_contexts_in_8_bits(family: str, dtype: torch.dtype, step: float) -> None:
    sender, receiver = pair_of(family)
    plan = ds.Plan([(3, 5)], project=[1])
    context = ds.capture(sender, tokens(CONTEXT, batch=2), layers=plan.hidden_layers(LAYERS))
    coded = context.quantized(dtype)
    assert coded.nbytes < 0.4 * context.nbytes
    exact, cache = ds.partial_prefill(receiver, context, plan), ds.partial_prefill(receiver, coded, plan)
    for layer, role in enumerate(resolve(plan, LAYERS).sources):
        for name in ("keys", "values"):
            ours, theirs = getattr(cache.layers[layer], name), getattr(exact.layers[layer], name)
            assert ours.dtype == torch.float32
            assert not torch.equal(ours, theirs)
            if role == "reuse":
                assert ((ours - theirs).abs() <= 1.001 * step * theirs.abs().amax(-1, keepdim=True)).all()
            else:
                assert (ours - theirs).pow(2).mean() < (4 * step) ** 2 * theirs.pow(2).mean()


@pytest.mark.feature("static")
@of_each_family
def test_fixed_capacity_with_a_compiled_decode_step(family: str) -> None:
    sender, receiver = pair_of(family)
    ids, suffix = tokens(CONTEXT), tokens(4)
    cache = prefill(sender, receiver, ids, ds.Plan([(1, 3)], project=[0]))
    prompt = torch.cat([ids, suffix], dim=1)
    expected = receiver.generate(prompt, past_key_values=copy.deepcopy(cache), **greedy)
    static = cache.to_static(64)
    moe = family in ("mixtral", "qwen3_moe", "gpt_oss")  # which experts are asked decides what runs
    torch._dynamo.reset()  # which counts compilations of all models together
    counter = CompileCounter()
    step = torch.compile(receiver.forward, backend=counter, fullgraph=not moe)
    with torch.no_grad():
        token = receiver(suffix, past_key_values=static).logits[:, -1:].argmax(-1)
        made, graphs = [token], []
        for _ in range(11):
            token = step(input_ids=token, past_key_values=static).logits[:, -1:].argmax(-1)
            made.append(token)
            graphs.append(counter.frame_count)
    assert torch.equal(torch.cat(made, dim=1), expected[:, -12:])
    assert graphs[-1] == graphs[2], "compiled once, not at every step"
    assert moe or graphs[-1] <= 2
