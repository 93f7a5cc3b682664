"""PEFT around a receiver: what is read, what is refused, and what a model with adapters is called."""

import copy

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from support.compare import assert_bitwise_equal, assert_close
from support.models import tiny, tiny_llama, tokens
from support.prefills import own_prefill

import droidspeak_ops as ds

LAYERS = 4
EVERYTHING = ds.Plan([(0, LAYERS)])


def lora(**changes) -> LoraConfig:
    settings = {"r": 4, "target_modules": ["k_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return LoraConfig(**settings | changes)


def adapted(config, **changes):
    return get_peft_model(tiny_llama(layers=LAYERS, **changes), config).eval()


def assert_own(model, plan: ds.Plan = EVERYTHING, **options) -> None:
    """All layers recomputed are those of the model with its adapters."""
    ids = tokens(15, batch=2)
    context = ds.capture(model, ids, layers=range(LAYERS))
    cache = ds.partial_prefill(model, context, plan, **options)
    for ours, theirs in zip(cache.layers, own_prefill(model, ids).layers, strict=True):
        assert_close(ours.keys, theirs.keys, torch.float32, operations=LAYERS)
        assert_close(ours.values, theirs.values, torch.float32, operations=LAYERS)


@pytest.mark.parametrize("norm", ["hf", "folded"])
@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(use_rslora=True, lora_alpha=3),
        lora(target_modules=["k_proj"]),
        lora(target_modules=["v_proj", "down_proj"], layers_to_transform=[0, 3]),
        lora(target_modules=["q_proj", "o_proj"], use_dora=True),  # not on K or V
        lora(modules_to_save=["embed_tokens"]),
        lora(target_modules=["k_proj", "embed_tokens"]),
    ],
    ids=["plain", "rslora", "of K", "some layers", "DoRA elsewhere", "saved embeddings", "of the embeddings"],
)
@pytest.mark.parametrize("plan", [EVERYTHING, ds.Plan(project="rest")])
def test_adapters_that_are_read(config, norm: str, plan: ds.Plan) -> None:
    assert_own(adapted(config), plan, norm=norm)


INVOCATION = [7, 8, 9]


def activated(**changes):
    """A model with an activated LoRA, and its base."""
    base = tiny_llama(layers=LAYERS)
    return get_peft_model(copy.deepcopy(base), lora(alora_invocation_tokens=INVOCATION, **changes)).eval(), base


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["q_proj", "o_proj"]])
@pytest.mark.parametrize("plan", [ds.Plan(), EVERYTHING, ds.Plan(project="rest"), ds.Plan([(1, 3)])])
def test_before_its_invocation_a_model_with_an_activated_lora_is_its_base(targets: list[str], plan: ds.Plan) -> None:
    model, base = activated(target_modules=targets)
    ids = tokens(20)
    ids[ids == 8] = 10
    prompt = torch.cat([ids, torch.tensor([[*INVOCATION, 11, 12]])], dim=1)
    context = ds.capture(base, ids, layers=plan.hidden_layers(LAYERS))
    cache = ds.partial_prefill(model, context, plan, prompt_ids=prompt)
    for ours, theirs in zip(cache.layers, own_prefill(base, ids).layers, strict=True):
        assert_close(ours.keys, theirs.keys, torch.float32, operations=LAYERS)
        assert_close(ours.values, theirs.values, torch.float32, operations=LAYERS)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(input_ids=prompt, **options)
    assert not torch.equal(base.generate(input_ids=prompt, **options), expected), "the adapter has a say"
    assert torch.equal(model.generate(input_ids=prompt, past_key_values=cache, **options), expected)


def test_an_activated_lora_that_is_invoked_in_the_context_is_refused() -> None:
    model, base = activated()
    ids = tokens(20)
    ids[ids == 8] = 10
    inside = ids.clone()
    inside[0, 4:7] = torch.tensor(INVOCATION)
    suffix = torch.tensor([[11, 12]])
    with pytest.raises(
        ds.ReuseError, match="invocation tokens of the adapter 'default' behind it, got them at token 4"
    ):
        ds.partial_prefill(model, ds.capture(base, inside), ds.Plan())
    with pytest.raises(ds.ReuseError, match="got them at token 4"):
        ds.capture(model, inside)
    again = torch.cat([inside, torch.tensor([[*INVOCATION, 11]])], dim=1)  # of several the last one counts
    ds.partial_prefill(model, ds.capture(base, inside), ds.Plan(), prompt_ids=again)
    across = torch.cat([ids, torch.tensor([INVOCATION]), suffix], dim=1)
    context = ds.capture(base, across[:, :22])
    with pytest.raises(ds.ReuseError, match="got them at token 20"):
        ds.partial_prefill(model, context, ds.Plan(), prompt_ids=across)
    with model.disable_adapter():
        ds.partial_prefill(model, ds.capture(base, inside), ds.Plan())


def test_a_bias_stays_beside_an_adapter() -> None:
    model = adapted(lora(), attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.normal_()
    assert_own(model)


def test_two_adapters_at_once() -> None:
    model = adapted(lora())
    model.add_adapter("other", lora(r=2))
    model.base_model.set_adapter(["default", "other"])
    assert_own(model, ds.Plan(project="rest"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_half_precision(dtype: torch.dtype) -> None:
    """At least as near to the model in float32 as the model itself in half precision."""
    model = adapted(lora())
    ids = tokens(15)
    exact = own_prefill(model, ids)
    model = model.to(dtype)
    ours, theirs = ds.partial_prefill(model, ds.capture(model, ids), EVERYTHING), own_prefill(model, ids)
    for name in ("keys", "values"):
        wanted = getattr(exact.layers[0], name)
        errors = [(getattr(cache.layers[0], name).float() - wanted).pow(2).mean() for cache in (ours, theirs)]
        assert errors[0] <= 1.05 * errors[1]


def test_merged_and_merged_for_good() -> None:
    model = adapted(lora())
    unmerged = ds.capture(model, tokens(4)).sender.weights
    model.merge_adapter()
    assert_own(model)
    merged = ds.capture(model, tokens(4)).sender.weights
    assert merged != unmerged
    model.unmerge_adapter()
    for_good = model.merge_and_unload()
    assert (
        ds.capture(for_good, tokens(4)).sender.weights == ds.capture(copy.deepcopy(for_good), tokens(4)).sender.weights
    )


def test_a_model_is_called_by_the_adapters_that_are_active() -> None:
    base = tiny_llama(layers=LAYERS)

    def weights(model) -> str | None:
        return ds.capture(model, tokens(4)).sender.weights

    plain = weights(base)
    model = get_peft_model(base, lora(), adapter_name="one").eval()
    model.add_adapter("two", lora())
    names = []
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        names.append(weights(model))
    with model.disable_adapter():
        assert weights(model) == plain
    assert len({plain, *names}) == 3
    model.set_adapter("one")
    assert weights(model) == names[0]
    model.base_model.model.model.layers[1].self_attn.k_proj.scaling["one"] *= 2
    assert weights(model) not in names


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["embed_tokens", "down_proj"]}),
        # PEFT puts one wrapper into another for two parameters of a module.
        ("mixtral", {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ],
    ids=["tokens", "saved", "embedding", "parameters"],
)
def test_all_that_adapters_change_is_part_of_a_models_identity(family: str, options: dict) -> None:
    base = tiny(family, LAYERS)
    plain = ds.capture(copy.deepcopy(base), tokens(4)).sender.weights
    model = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, **options)).eval()
    adapted = ds.capture(model, tokens(4)).sender.weights
    assert adapted != plain
    parts = ("lora_", "trainable_tokens_delta", "modules_to_save")
    for name, weight in model.named_parameters():
        if any(part in name for part in parts):
            with torch.no_grad():
                weight.add_(0.5)
            before, adapted = adapted, ds.capture(model, tokens(4)).sender.weights
            assert adapted != before, name
    with model.disable_adapter():
        assert ds.capture(model, tokens(4)).sender.weights == plain


def test_the_prompt_of_assisted_generation_is_cut_with_adapters_too() -> None:
    model = adapted(lora())
    ids = tokens(12)
    prompt = torch.cat([ids, tokens(3)], dim=1)
    options = {"max_new_tokens": 8, "do_sample": False}
    cache = ds.partial_prefill(model, ds.capture(model, ids), EVERYTHING)
    made = model.generate(input_ids=prompt, past_key_values=cache, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(made, model.generate(input_ids=prompt, **options))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (lora(use_dora=True), "k_proj: expected .*got the adapter 'default' with DoraLinearVariant"),
        (lora(lora_bias=True), "k_proj: expected .*got the adapter 'default' with a bias of its own"),
        (
            LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
            "input_layernorm: expected .*got LNTuningLayer",
        ),
        (lora(modules_to_save=["input_layernorm"]), "input_layernorm: expected .*got ModulesToSaveWrapper"),
        (
            IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
            "k_proj: expected .*got Linear .* merge the adapter into the model first",
        ),
        (
            PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
            "expected an adapter in layers, got PREFIX_TUNING",
        ),
    ],
    ids=["DoRA", "bias", "norm", "saved norm", "IA3", "prefix"],
)
def test_adapters_that_are_refused_by_name(config, match: str) -> None:
    model = adapted(config, attention_bias=True)
    with pytest.raises(ds.UnsupportedModelError, match=match):
        ds.capture(model, tokens(4))


def test_merged_and_disabled_is_refused() -> None:
    model = adapted(lora())
    model.merge_adapter()
    with model.disable_adapter(), pytest.raises(ds.UnsupportedModelError, match="unmerge it first"):
        ds.capture(model, tokens(4))


def test_reading_changes_nothing() -> None:
    model = adapted(lora())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_own(model)
    for name, tensor in model.state_dict().items():
        assert_bitwise_equal(tensor, before[name])
