"""Fitted maps: what they are made of, what they are refused for, and that they help where they should."""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.compare import assert_bitwise_equal, assert_close
from support.models import fine_tuned, save_with_tokenizer, tiny, tiny_llama, tiny_pair, tokens

import droidspeak_ops as ds
from droidspeak_ops.fitting.shares import KLObjective
from droidspeak_ops.hf.decoder import Decoder
from droidspeak_ops.prefill.maps import Correction
from droidspeak_ops.prefill.schedule import resolve

LAYERS = 4
SUFFIX = 32
ALL = ds.Plan(project="rest")


def examples(count: int, length: int = 160) -> list[ds.Example]:
    return [ds.Example.cut(tokens(length), SUFFIX) for _ in range(count)]


@pytest.fixture(scope="module")
def pair() -> tuple:
    return tiny_pair(LAYERS)


@pytest.fixture(scope="module")
def maps(pair) -> ds.Maps:
    torch.manual_seed(1)
    return ds.fit(*pair, examples(16), steps=0, show_progress=False)


@torch.no_grad()
def divergence(sender, receiver, plan: ds.Plan, maps: ds.Maps | None, held_out: list[ds.Example], **options) -> float:
    total = 0.0
    for example in held_out:
        context = ds.capture(sender, example.context, layers=range(LAYERS))
        if options:
            context = options["change"](context)
        cache = ds.partial_prefill(receiver, context, plan, maps=maps)
        ids = torch.cat((example.prompt, example.answer[:, :-1]), dim=1)
        expected = receiver(ids, logits_to_keep=SUFFIX).logits.log_softmax(-1)
        got = receiver(ids[:, -SUFFIX:], past_key_values=cache).logits.log_softmax(-1)
        total += torch.nn.functional.kl_div(got, expected, log_target=True, reduction="sum").item() / SUFFIX
    return total / len(held_out)


def without_hidden(context: ds.SharedContext) -> ds.SharedContext:
    return dataclasses.replace(context, hidden_states={})


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gemma3_text", "phi3", "qwen2", "smollm3"])
def test_maps_help_on_other_contexts(family: str) -> None:
    sender = tiny(family, LAYERS)
    receiver = fine_tuned(sender, 0.1)
    fitted = ds.fit(sender, receiver, examples(12, 200), steps=0, show_progress=False)
    held_out = examples(6, 200)
    reused = divergence(sender, receiver, ds.Plan(), None, held_out)
    assert divergence(sender, receiver, ALL, fitted, held_out) < 0.9 * reused
    assert divergence(sender, receiver, ALL, fitted, held_out, change=without_hidden) < 0.95 * reused


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss"])
def test_packed_examples_are_as_if_alone(family: str, attention: str, tmp_path: Path) -> None:
    """Also where sliding windows end inside the context, inside the suffix, and where layers differ in it."""
    if (family, attention) == ("gpt_oss", "sdpa"):
        pytest.skip("transformers has no SDPA for gpt_oss")
    model = tiny(family, LAYERS, attn_implementation=attention)
    context = tokens(20)
    some = [ds.Example(context, tokens(given), tokens(answered)) for given, answered in ((3, 1), (12, 4), (1, 9))]
    own = ds.capture(model, context)
    keys_values = [own.kv(layer)[:2] for layer in range(LAYERS)]
    objective = KLObjective(Decoder(model), [own], 0, some, tmp_path)
    together = objective._log_probabilities(keys_values, range(3))
    alone = []
    for example in some:
        ids = torch.cat((example.prompt, example.answer[:, :-1]), dim=1)
        logits = model(ids, logits_to_keep=example.answer.shape[1]).logits
        alone.append(logits[0].detach().log_softmax(-1))
    assert_close(together.detach(), torch.cat(alone), torch.float32, operations=64)
    kept = objective.reference([2, 0])
    assert_close(kept, torch.cat((together[5:], together[:1])).detach(), torch.float32, operations=64)
    assert torch.equal(objective.reference([0]), kept[-1:])


def test_maps_of_equal_models_change_nothing() -> None:
    model = tiny_llama(head_dim=16, layers=LAYERS)
    fitted = ds.fit(model, model, examples(4), steps=0, show_progress=False)
    assert divergence(model, model, ALL, fitted, examples(3)) < 1e-7


def test_another_projection_alone_is_projected() -> None:
    """Where only K and V of layer 3 differ, the receiver's own weights are all that is needed, but for the sinks."""
    sender = tiny_llama(head_dim=16, layers=LAYERS)
    receiver = fine_tuned(sender, 0.0)
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            getattr(receiver.model.layers[3].self_attn, name).weight.add_(0.1 * torch.randn(32, 48))
    fitted = ds.fit(sender, receiver, examples(6), steps=0, show_progress=False)
    assert fitted.choices[3] in ("project", "fitted")
    held_out = examples(3)
    reused = divergence(sender, receiver, ds.Plan(), None, held_out)
    assert divergence(sender, receiver, ALL, fitted, held_out) < 0.1 * reused


def test_fitted_weights_run_through_the_same_operator(pair, maps, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    context = ds.capture(pair[0], tokens(50), layers=range(LAYERS))
    original = ds.ops.kv_project_layers
    monkeypatch.setattr(
        ds.ops, "kv_project_layers", lambda *args, **options: (calls.append(args), original(*args, **options))
    )
    weights = next(each for (_, role), each in maps.layers.items() if role == "fitted")
    layers = {(layer, "fitted"): weights for layer in range(1, LAYERS)}
    every = dataclasses.replace(maps, choices=("project", *["fitted"] * (LAYERS - 1)), layers=layers)
    ds.partial_prefill(pair[1], context, ALL, maps=every)
    assert sum(len(hidden_states) for hidden_states, *_ in calls) == LAYERS


def test_a_fitted_layer_is_its_formula(pair, maps) -> None:
    sender, receiver = pair
    ids = tokens(60, batch=2)
    context = ds.capture(sender, ids, layers=range(LAYERS))
    cache = ds.partial_prefill(receiver, context, ALL, maps=maps)
    for layer, role in enumerate(maps.choices):
        if role not in ("fitted", "fitted_kv"):
            continue
        fitted = maps.layers[layer, role]
        if role == "fitted":
            states = context.hidden(layer)
            rows = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + receiver.config.rms_norm_eps)
        else:
            cos, sin = context.rotations[layer]
            keys, values = context.kv(layer)[:2]
            first, second = keys.chunk(2, dim=-1)
            unturned = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
            rows = torch.cat([part.transpose(1, 2).flatten(2) for part in (unturned, values)], dim=-1)
        wanted = torch.nn.functional.linear(rows, fitted.v_weight, fitted.v_bias).unflatten(-1, (2, -1)).transpose(1, 2)
        assert_close(cache.layers[layer].values[:, :, 4:], wanted[:, :, 4:], torch.float32, operations=4)
        assert_bitwise_equal(cache.layers[layer].keys[:, :, :4], context.kv(layer).keys[:, :, :4])
        assert_bitwise_equal(cache.layers[layer].values[:, :, :4], context.kv(layer).values[:, :, :4])


def test_plans_that_select_tokens_are_filled_by_maps_at_share_1(pair, maps) -> None:
    sender, receiver = pair
    ids = tokens(60)
    context = ds.capture(sender, ids[:, :50], layers=range(LAYERS))
    by_hidden, by_kv = (("project", *[source] * (LAYERS - 1)) for source in ("fitted", "fitted_kv"))
    full = dataclasses.replace(maps, choices=by_hidden, choices_without_hidden=by_kv, layers=maps.repaired)
    plan = ds.Plan(project="rest", select=4, selector="recent")
    for of_context in (context, dataclasses.replace(context, hidden_states={})):
        repaired = ds.partial_prefill(receiver, of_context, plan, prompt_ids=ids, maps=maps)
        wanted = ds.partial_prefill(receiver, of_context, ALL, maps=full)
        learnt = ds.partial_prefill(receiver, of_context, ALL, maps=maps)
        for ours, theirs in zip(repaired.layers, wanted.layers, strict=True):
            assert_bitwise_equal(ours.keys[:, :, :46], theirs.keys[:, :, :46])
            assert_bitwise_equal(ours.values[:, :, :46], theirs.values[:, :, :46])
        assert not torch.equal(repaired.layers[-1].values[:, :, :46], learnt.layers[-1].values[:, :, :46])
    # From the sender's K/V a map at a share goes as much of the way from these to that at share 1.
    for (layer, source), part in maps.layers.items():
        if source == "fitted_kv":
            own = torch.eye(part.k_weight.shape[1])
            whole = maps.repaired[layer, source]
            for learnt, fitted, start, share in (
                (part.k_weight, whole.k_weight, own[: len(part.k_weight)], maps.shares[layer][0]),
                (part.v_weight, whole.v_weight, own[len(part.k_weight) :], maps.shares[layer][1]),
            ):
                assert_close(learnt, start + share * (fitted - start), torch.float32)


def test_a_band_is_left_to_the_plan(pair, maps) -> None:
    context = ds.capture(pair[0], tokens(50), layers=range(LAYERS))
    plan = ds.Plan([(1, 3)], project="rest")
    with_maps, without = (ds.partial_prefill(pair[1], context, plan, maps=each) for each in (maps, None))
    for layer in (1, 2):
        assert_bitwise_equal(with_maps.layers[layer].keys, without.layers[layer].keys)
    plan = ds.Plan([(1, 3)])
    assert resolve(plan, LAYERS, maps).sources == resolve(plan, LAYERS).sources, "what a plan reuses stays reused"


def test_bands_start_from_corrected_states() -> None:
    torch.manual_seed(2)
    sender = tiny_llama(head_dim=16, layers=LAYERS)
    receiver = fine_tuned(sender, 0.1)
    band = (2, 4)
    maps = ds.fit(sender, receiver, examples(12, 200), bands=[band], steps=0, show_progress=False)
    assert set(maps.corrections) == {2}
    context = ds.capture(sender, tokens(60, batch=2), layers=range(LAYERS))
    plan = ds.Plan([band], project="rest")
    cache = ds.partial_prefill(receiver, context, plan, maps=maps)
    states = context.hidden(2)
    size = states.square().mean(-1, keepdim=True).sqrt()
    wanted = states + size * torch.nn.functional.linear(
        states / size, maps.corrections[2].weight, maps.corrections[2].bias
    )
    wanted[:, :4] = states[:, :4]
    corrected = dataclasses.replace(context, hidden_states={**context.hidden_states, 2: wanted})
    by_hand = ds.partial_prefill(receiver, corrected, ds.Plan([band]))
    for layer in range(*band):
        assert_close(cache.layers[layer].keys, by_hand.layers[layer].keys, torch.float32, operations=16)
    held_out = examples(6, 200)
    without = dataclasses.replace(maps, corrections={})
    assert divergence(sender, receiver, plan, maps, held_out) < divergence(sender, receiver, plan, without, held_out)


@pytest.mark.parametrize(("family", "band"), [("olmo2", (2, 4)), ("llama", (0, 2))])
def test_no_correction_where_there_is_nothing_to_correct(family: str, band: tuple[int, int]) -> None:
    """OLMo 2 has no input norm; and what enters layer 0 are the receiver's own embeddings."""
    sender = tiny(family, LAYERS)
    maps = ds.fit(sender, fine_tuned(sender, 0.1), examples(3), bands=[band], steps=0, show_progress=False)
    assert maps.corrections == {}


def test_the_receiver_is_left_as_it_was(pair, maps) -> None:
    assert all(parameter.grad is None and parameter.requires_grad for parameter in pair[1].parameters())


def test_examples_of_one_context_are_read_once(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from droidspeak_ops.fitting import run as fitting

    read = []
    original = fitting.capture
    monkeypatch.setattr(fitting, "capture", lambda *args, **kw: (read.append(kw), original(*args, **kw))[1])
    cut = examples(3)
    more = [ds.Example(each.context, tokens(5 + number), tokens(3)) for number, each in enumerate(cut)]
    ds.fit(*pair, [*cut, *more], steps=0, show_progress=False)
    assert len(read) == 2 * 3


def test_the_same_examples_give_the_same_maps(pair) -> None:
    cut = examples(3)
    one, other = (ds.fit(*pair, cut, steps=0, show_progress=False) for _ in range(2))
    assert one.choices == other.choices
    for key, each in one.layers.items():
        assert_bitwise_equal(each.k_weight, other.layers[key].k_weight)


def test_several_at_a_time_give_the_same_maps(pair) -> None:
    cut, threads = examples(5), torch.get_num_threads()
    several = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        try:
            several.append(ds.fit(*pair, cut, steps=3, seed=1, show_progress=False))
        finally:
            torch.set_num_threads(threads)
    one, *others = several
    for other in others:
        assert (other.choices, other.layers.keys()) == (one.choices, one.layers.keys())
        for key, each in one.repaired.items():
            assert_close(other.repaired[key].k_weight, each.k_weight, torch.float32, operations=100)


def test_a_batch_with_maps(pair, maps) -> None:
    contexts = [ds.capture(pair[0], tokens(count), layers=range(LAYERS)) for count in (20, 45)]
    together = ds.partial_prefill_batch(pair[1], contexts, ALL, maps=maps)
    for row, context in enumerate(contexts):
        alone = ds.partial_prefill(pair[1], context, ALL, maps=maps)
        for ours, theirs in zip(together.layers, alone.layers, strict=True):
            rows = theirs.keys.shape[2]
            assert_bitwise_equal(ours.keys[row, :, -rows:], theirs.keys[0])


def test_contexts_beyond_those_that_shares_need_are_summed_and_let_go(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    from droidspeak_ops.fitting import run as fitting

    cut = examples(6, 90)
    read: list[weakref.ref] = []

    def noted(*args, **options):
        context = capture(*args, **options)
        read.append(weakref.ref(context))
        return context

    held = []
    capture, learn = fitting.capture, fitting.learn_shares

    def counted(*args):
        gc.collect()
        held.append(sum(each() is not None for each in read))
        return learn(*args)

    monkeypatch.setattr(fitting, "capture", noted)
    monkeypatch.setattr(fitting, "learn_shares", counted)
    monkeypatch.setattr(fitting, "STEPS", 3)
    few = ds.fit(*pair, cut, steps=0, show_progress=False)
    # Those of the sender for the shares, and both of the last context, which the loop's names still hold.
    assert held[0] <= 3 + 2
    monkeypatch.undo()
    first = ds.fit(*pair, cut[:3], steps=0, show_progress=False)
    assert not torch.equal(few.domain.mean, first.domain.mean), "the regressions are of all contexts"


def test_8_bit_contexts(pair, maps) -> None:
    held_out = examples(3)
    exact = divergence(*pair, ALL, maps, held_out, change=without_hidden)
    coded = divergence(*pair, ALL, maps, held_out, change=lambda context: without_hidden(context).quantized(torch.int8))
    assert coded < 1.1 * exact


def test_a_pair_in_bfloat16() -> None:
    torch.manual_seed(5)
    sender = tiny_llama(head_dim=16, layers=LAYERS).bfloat16()
    receiver = fine_tuned(sender, 0.1)
    fitted = ds.fit(sender, receiver, examples(8), bands=[(2, 4)], steps=0, show_progress=False)
    assert {each.k_weight.dtype for each in fitted.layers.values()} == {torch.bfloat16}
    held_out = examples(3)
    reused = divergence(sender, receiver, ds.Plan(), None, held_out)
    assert divergence(sender, receiver, ALL, fitted, held_out) < 0.9 * reused


def test_unmerged_adapters_of_the_sender_itself() -> None:
    base = tiny_llama(head_dim=16, layers=LAYERS)
    config = LoraConfig(
        r=4, target_modules=["k_proj", "v_proj", "q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    sender, receiver = base, get_peft_model(fine_tuned(base, 0.0), config).eval()
    fitted = ds.fit(sender, receiver, examples(8), bands=[(2, 4)], steps=0, show_progress=False)
    held_out = examples(3)
    assert divergence(sender, receiver, ALL, fitted, held_out) < divergence(sender, receiver, ds.Plan(), None, held_out)


# --- files and errors ----------------------------------------------------------------------------------------------------


def test_saved_and_loaded(pair, maps, tmp_path) -> None:
    maps = dataclasses.replace(maps, corrections={2: Correction(torch.randn(48, 48), torch.randn(48))})
    path = tmp_path / "maps.safetensors"
    maps.save(path)
    loaded = ds.Maps.load(path)
    assert (loaded.sender, loaded.receiver) == (maps.sender, maps.receiver)
    assert (loaded.choices, loaded.choices_without_hidden) == (maps.choices, maps.choices_without_hidden)
    assert loaded.layers.keys() == maps.layers.keys()
    assert (loaded.domain.layer, loaded.domain.limit) == (maps.domain.layer, maps.domain.limit)
    assert_bitwise_equal(loaded.corrections[2].weight, maps.corrections[2].weight)
    context = ds.capture(pair[0], tokens(50), layers=loaded.hidden_layers(ALL))
    ours, theirs = (ds.partial_prefill(pair[1], context, ALL, maps=each) for each in (maps, loaded))
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert_bitwise_equal(one.keys, other.keys)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_another_file_is_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match="expected a file of droidspeak maps, got a safetensors file of something else"
    ):
        ds.Maps.load(tmp_path / "other.safetensors")


def test_maps_of_another_pair_are_refused(pair, maps) -> None:
    sender, receiver = pair
    context = ds.capture(sender, tokens(10), layers=range(LAYERS))
    with pytest.raises(ds.ReuseError, match="maps: expected .* got maps fitted to a receiver with other weights"):
        ds.partial_prefill(fine_tuned(receiver), context, ALL, maps=maps)
    other = ds.capture(fine_tuned(sender), tokens(10), layers=range(LAYERS))
    with pytest.raises(ds.ReuseError, match="got maps fitted to a sender with other weights"):
        ds.partial_prefill(receiver, other, ALL, maps=maps)
    half = ds.capture(fine_tuned(sender, 0.0).half(), tokens(10), layers=range(LAYERS))
    with pytest.raises(ds.ReuseError, match="got maps fitted to a sender in float32, not float16"):
        ds.partial_prefill(fine_tuned(receiver, 0.0).half(), half, ALL, maps=maps)
    deeper = tiny_llama(head_dim=16, layers=LAYERS + 1)
    with pytest.raises(ds.ReuseError, match="got maps fitted to a sender of another architecture"):
        ds.partial_prefill(deeper, ds.capture(deeper, tokens(10), layers=range(LAYERS + 1)), ALL, maps=maps)


@pytest.mark.parametrize("count", [0, 2])
def test_too_few_contexts(pair, count: int) -> None:
    with pytest.raises(ValueError, match=f"examples: expected at least 3 contexts, got {count}"):
        ds.fit(*pair, examples(count), steps=0, show_progress=False)


def test_contexts_that_are_no_longer_than_the_sinks(pair) -> None:
    with pytest.raises(ValueError, match="examples: expected contexts of more than 4 tokens, got one of 4"):
        ds.fit(*pair, [ds.Example.cut(tokens(37), 32), *examples(3)], steps=0, show_progress=False)


@pytest.mark.parametrize("field", ["suffix", "answer"])
def test_an_example_that_lacks_something(pair, field: str) -> None:
    cut = examples(3)
    cut[1] = cut[1]._replace(**{field: tokens(4)[:, :0]})
    with pytest.raises(ValueError, match=rf"expected the {field} of example 1 .* got torch.int64 \(1, 0\)"):
        ds.fit(*pair, cut, steps=0, show_progress=False)


def test_text_too_short_to_cut() -> None:
    with pytest.raises(ValueError, match=r"input_ids: expected shape \(1, 34 or more\), got \(1, 33\)"):
        ds.Example.cut(tokens(33), 32)


def test_a_band_that_is_none(pair) -> None:
    with pytest.raises(ValueError, match="bands"):
        ds.fit(*pair, examples(3), bands=[(3, 2)], steps=0, show_progress=False)


def test_attention_without_masks_is_refused(pair) -> None:
    receiver = fine_tuned(pair[1], 0.0)
    receiver.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ds.UnsupportedModelError, match="expected 'sdpa' or 'eager', .* got attention 'flash_attention_2'"
    ):
        ds.fit(pair[0], receiver, examples(3), steps=0, show_progress=False)


def test_a_pair_that_does_not_fit_is_refused(pair) -> None:
    with pytest.raises(ds.ReuseError, match="num_hidden_layers is 4 and 5"):
        ds.fit(pair[0], tiny_llama(head_dim=16, layers=5), examples(3), steps=0, show_progress=False)


# --- the command ---------------------------------------------------------------------------------------------------------


def test_the_command_fits_and_writes_maps(pair, tmp_path, capsys) -> None:
    from droidspeak_ops.cli import main

    sender, receiver = (save_with_tokenizer(model, tmp_path / str(number)) for number, model in enumerate(pair))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number}" for number in tokens(400)[0].tolist()), encoding="utf-8")
    out = tmp_path / "maps.safetensors"
    main(["fit", sender, receiver, str(text), "--tokens", "100", "--band", "2:4", "--steps", "3", "--out", str(out)])
    said = " ".join(capsys.readouterr().out.split())
    assert "268 tokens of 4 contexts" in said
    maps = ds.Maps.load(out)
    context = ds.capture(pair[0], tokens(30), layers=maps.hidden_layers(ds.Plan([(2, 4)], project="rest")))
    ds.partial_prefill(pair[1], context, ds.Plan([(2, 4)], project="rest"), maps=maps)
