"""A receiver that is read once: the same as the model, refused when the model changed, and no look at values on the way."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.compare import assert_bitwise_equal
from support.models import tiny, tiny_llama, tiny_pair, tokens
from torch.utils._python_dispatch import TorchDispatchMode

import droidspeak_ops as ds
from droidspeak_ops.hf import decoder

LAYERS = 6
PLANS = [ds.Plan(), ds.Plan(project="rest"), ds.Plan([(2, 5)]), ds.Plan([(0, 2), (3, 4)], project=[2, 5])]
NORMS = ["hf", "folded"]


def assert_same(actual: ds.MixedCache, expected: ds.MixedCache) -> None:
    for ours, theirs in zip(actual.layers, expected.layers, strict=True):
        assert_bitwise_equal(ours.keys, theirs.keys)
        assert_bitwise_equal(ours.values, theirs.values)


def captured(model: Any, count: int = 11, batch: int = 2) -> ds.SharedContext:
    return ds.capture(model, tokens(count, batch), layers=range(LAYERS))


def adapted() -> Any:
    settings = {"r": 4, "target_modules": ["k_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = get_peft_model(tiny_llama(layers=LAYERS), LoraConfig(**settings), adapter_name="one").eval()
    model.add_adapter("two", LoraConfig(**settings))
    return model


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2", "phi3", "smollm3"])
def test_is_the_model(family: str, norm: str) -> None:
    model = tiny(family, LAYERS)
    receiver = ds.Receiver(model)
    for plan in PLANS:
        context = captured(model)
        expected = ds.partial_prefill(model, context, plan, norm=norm)
        for _ in range(2):
            assert_same(ds.partial_prefill(receiver, context, plan, norm=norm), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_is_the_model_with_adapters(norm: str) -> None:
    model = adapted()
    receiver, context = ds.Receiver(model), captured(model)
    for plan in PLANS:
        expected = ds.partial_prefill(model, context, plan, norm=norm)
        assert_same(ds.partial_prefill(receiver, context, plan, norm=norm), expected)


def test_of_several_contexts() -> None:
    sender, model = tiny_pair(LAYERS)
    contexts = [captured(sender, count, 1) for count in (5, 9)]
    expected = ds.partial_prefill_batch(model, contexts, PLANS[1])
    assert_same(ds.partial_prefill_batch(ds.Receiver(model), contexts, PLANS[1]), expected)


@pytest.mark.parametrize("make", [adapted, lambda: tiny_llama(layers=LAYERS)], ids=["adapters", "plain"])
def test_weights_are_prepared_once(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    receiver, context = ds.Receiver(model), captured(model)
    ds.partial_prefill(receiver, context, PLANS[1], norm="folded")
    for name in ("fold_norm_weight", "rms_rstd"):
        made = getattr(ds.ops, name)
        monkeypatch.setattr(ds.ops, name, counted := Counted(made))
        ds.partial_prefill(receiver, context, PLANS[1], norm="folded")
        assert counted.calls == (name == "rms_rstd"), "only what embeddings need, which the context does not have"
    monkeypatch.setattr(decoder, "prepare", lambda *args: pytest.fail("prepared again"))
    ds.partial_prefill(receiver, context, PLANS[1], norm="folded")


class Counted:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


# --- 1/rms of a context ----------------------------------------------------------------------------------------------


def test_rstd_is_kept_with_the_context() -> None:
    context = captured(tiny_llama(layers=LAYERS))
    rstd = context.rstd(2, 1e-6)
    assert_bitwise_equal(rstd, ds.ops.rms_rstd(context.hidden(2), 1e-6))
    assert context.rstd(2, 1e-6) is rstd
    assert_bitwise_equal(context.rstd(2, 1e-3), ds.ops.rms_rstd(context.hidden(2), 1e-3))
    context.hidden(2).mul_(2)  # nobody should, but a graph that is replayed for another context does
    assert_bitwise_equal(context.rstd(2, 1e-6), ds.ops.rms_rstd(context.hidden(2), 1e-6))
    with pytest.raises(ds.ReuseError, match=r"expected them at layers \[7\]"):
        context.rstd(7, 1e-6)


def test_rstd_of_a_quantized_context_is_its_own() -> None:
    context = captured(tiny_llama(layers=LAYERS))
    before = context.rstd(2, 1e-6)
    quantized = context.quantized(torch.int8)
    assert not torch.equal(quantized.rstd(2, 1e-6), before)
    assert_bitwise_equal(quantized.rstd(2, 1e-6), ds.ops.rms_rstd(quantized.hidden(2), 1e-6))


# --- models that changed -------------------------------------------------------------------------------------------------


def written(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[3].self_attn.v_proj.weight[0, 0] += 1


def loaded(model: Any) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def replaced_weight(model: Any) -> None:
    linear = model.model.layers[3].self_attn.k_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().clone())


def replaced_module(model: Any) -> None:
    attention = model.model.layers[3].self_attn
    attention.k_proj = copy.deepcopy(attention.k_proj)


def replaced_layer(model: Any) -> None:
    model.model.layers[3] = copy.deepcopy(model.model.layers[3])


def replaced_inside(model: Any) -> None:
    model.model = copy.deepcopy(model.model)


def set_data(model: Any) -> None:
    weight = model.model.layers[3].input_layernorm.weight
    weight.data = weight.data * 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (written, r"layers\.3\.self_attn\.v_proj\.weight"),
        (loaded, r"layers\.0\.input_layernorm\.weight|layers\.0\.self_attn\.k_proj\.weight"),
        (replaced_weight, r"layers\.3\.self_attn\.k_proj\.weight"),
        (replaced_module, r"layers\.3\.self_attn\.k_proj"),
        (replaced_layer, r"layers\.3;"),
        (replaced_inside, "the model inside"),
        (set_data, r"layers\.3\.input_layernorm\.weight"),
        (lambda model: model.half(), r"layers\.0\.\S+\.weight"),
        (lambda model: model.model.rotary_emb.inv_freq.div_(4), r"rotary_emb\.inv_freq"),
        (
            lambda model: setattr(model.model.layers[1].input_layernorm, "variance_epsilon", 1.0),
            "layers.1.input_layernorm",
        ),
        (lambda model: setattr(model.model.rotary_emb, "attention_scaling", 2.0), "rotary_emb.attention_scaling"),
        (lambda model: model.train(), "its mode, which is training"),
        (lambda model: model.to("meta"), r"layers\.0\.\S+\.weight"),
        (
            lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")),
            r"layers\.0\.self_attn\.v_proj",
        ),
    ],
)
def test_a_model_that_changed_is_refused(change: Callable[[Any], Any], named: str) -> None:
    model = tiny_llama(layers=LAYERS)
    receiver, context = ds.Receiver(model), captured(model)
    ds.partial_prefill(receiver, context, PLANS[1])
    change(model)
    for prefill in (ds.partial_prefill, lambda *args: ds.partial_prefill_batch(args[0], [args[1]], args[2])):
        with pytest.raises(ds.ReuseError, match=f"expected the model as it was read, got another state of ({named})"):
            prefill(receiver, context, PLANS[1])


def test_another_state_of_the_adapters_is_refused_until_it_is_back() -> None:
    model = adapted()
    model.set_adapter("one")
    receiver, context = ds.Receiver(model), captured(model)
    expected = ds.partial_prefill(receiver, context, PLANS[1])

    def assert_refused() -> None:
        with pytest.raises(ds.ReuseError, match=r"another state of the adapters of layers\.0\.self_attn\.k_proj"):
            ds.partial_prefill(receiver, context, PLANS[1])

    model.set_adapter("two")
    assert_refused()
    other = ds.partial_prefill(ds.Receiver(model), context, PLANS[1])
    assert not torch.equal(other.layers[1].keys, expected.layers[1].keys)
    model.set_adapter("one")
    assert_same(ds.partial_prefill(receiver, context, PLANS[1]), expected)
    with model.disable_adapter():
        assert_refused()
    first = model.base_model.model.model.layers[0].self_attn.k_proj
    first.scaling["one"] *= 2
    assert_refused()
    first.scaling["one"] /= 2
    assert_same(ds.partial_prefill(receiver, context, PLANS[1]), expected)
    model.merge_adapter()
    assert_refused()


def test_a_plain_model_is_read_again_where_it_changed() -> None:
    """It is remembered from call to call, and whatever a receiver of it would refuse is read anew."""
    model = tiny_llama(layers=LAYERS)
    context = captured(model)
    for norm in ("hf", "folded"):
        ds.partial_prefill(model, context, PLANS[1], norm=norm)
        model.model.layers[2].self_attn.k_proj.weight.data.mul_(2)  # which leaves no trace
        model.model.layers[3].input_layernorm.weight.data.mul_(2)
        fresh = ds.partial_prefill(copy.deepcopy(model), context, PLANS[1], norm=norm)
        assert_same(ds.partial_prefill(model, context, PLANS[1], norm=norm), fresh)
    replaced = torch.nn.Linear(48, 128, bias=False).requires_grad_(False)
    model.model.layers[2].self_attn.v_proj = replaced
    assert_same(
        ds.partial_prefill(model, context, PLANS[1]), ds.partial_prefill(copy.deepcopy(model), context, PLANS[1])
    )
    expected = ds.partial_prefill(model, context, PLANS[1])
    handle = replaced.register_forward_hook(lambda module, args, output: output + 1)
    hooked = ds.partial_prefill(model, context, PLANS[1])
    assert_bitwise_equal(hooked.layers[2].values, expected.layers[2].values + 1)
    handle.remove()
    assert_same(ds.partial_prefill(model, context, PLANS[1]), expected)
    model.model.layers[2].input_layernorm.variance_epsilon *= 1e6
    assert not torch.equal(ds.partial_prefill(model, context, PLANS[1]).layers[2].keys, expected.layers[2].keys)
    model.model.rotary_emb.inv_freq.data.mul_(0.5)
    assert not torch.equal(ds.partial_prefill(model, context, PLANS[0]).layers[2].keys, context.kv(2).keys)


@pytest.mark.parametrize("of", ["model", "adapters"])
def test_a_model_that_was_read_is_not_kept(of: str) -> None:
    model = tiny_llama(layers=LAYERS) if of == "model" else adapted()
    ds.partial_prefill(model, captured(model), PLANS[1], norm="folded")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_hooks_are_refused_by_a_receiver_too() -> None:
    model = tiny_llama(layers=LAYERS)
    receiver, context = ds.Receiver(model), captured(model)
    model.model.layers[1].input_layernorm.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ds.ReuseError, match=r"layers\.1\.input_layernorm, which has hooks"):
        ds.partial_prefill(receiver, context, PLANS[1])


def test_changes_that_leave_no_trace_are_told_by_invalidate() -> None:
    model = tiny_llama(layers=LAYERS)
    receiver, context = ds.Receiver(model), captured(model)
    weights = context.sender.weights
    weight = model.model.layers[3].mlp.up_proj.weight
    weight.data[5, 7] += 1  # a single element: no element of each row, which are looked at, is among it
    assert captured(model).sender.weights == weights, "the case is one only then"
    ds.invalidate(model)
    assert captured(model).sender.weights != weights
    with pytest.raises(ds.ReuseError, match=r"its weights, as ds\.invalidate says"):
        ds.partial_prefill(receiver, context, PLANS[1])
    ds.partial_prefill(model, context, PLANS[1])


def test_layers_that_run_may_be_trained_elsewhere() -> None:
    """Only what was read must stay: an MLP is the model's own, as it is."""
    model = tiny_llama(layers=LAYERS)
    receiver, context = ds.Receiver(model), captured(model)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.mul_(2)
    assert_same(ds.partial_prefill(receiver, context, PLANS[2]), ds.partial_prefill(model, context, PLANS[2]))


# --- warm-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_warm_up(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family, LAYERS)
    receiver = ds.Receiver(model)
    launches: list[int] = []
    projects = ds.ops.kv_project_layers
    monkeypatch.setattr(
        ds.ops, "kv_project_layers", lambda *args, **kw: launches.append(len(args[0])) or projects(*args, **kw)
    )
    receiver.warm_up()
    assert {1, 2, 4} <= set(launches)
    receiver.warm_up([ds.Plan([(1, 3)])], tokens=(5, 40), norm="folded", quantized=torch.int8)
    with pytest.raises(ValueError, match="a model of 6"):
        receiver.warm_up([ds.Plan([(4, 9)])])
    context = captured(model)
    assert_same(
        ds.partial_prefill(receiver, context, PLANS[3], norm="folded"),
        ds.partial_prefill(model, context, PLANS[3], norm="folded"),
    )


# --- values that the host would wait for --------------------------------------------------------------------------------


class NoSynchronisation(TorchDispatchMode):
    """Fails on what waits for a GPU: a tensor's value on the host, or a size that depends on values.

    Operators of the library are one call here: what their references do on the CPU is not looked at.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.masked_select,
        ):
            pytest.fail(f"{function} waits for a GPU")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "granite", "smollm3"]
)
def test_no_synchronisation(family: str, plan: ds.Plan, norm: str) -> None:
    model = tiny(family, LAYERS)
    model.set_attn_implementation("sdpa")
    contexts = [captured(model), captured(model).quantized(torch.int8)]
    for receiver in (model, ds.Receiver(model)):
        for context in contexts:
            with NoSynchronisation():
                ds.partial_prefill(receiver, context, plan, norm=norm)


def test_a_synchronisation_would_be_noticed() -> None:
    model = tiny_llama(layers=LAYERS)
    context = captured(model)
    with NoSynchronisation(), pytest.raises(pytest.fail.Exception, match="waits for a GPU"):
        ds.partial_prefill(model, context, ds.Plan(), prompt_ids=torch.cat((context.tokens, tokens(2, 2)), 1))


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_attention_is_the_same_while_a_graph_is_captured(
    family: str, plan: ds.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers then makes other masks, with which SDPA takes another kernel."""
    model = tiny(family, LAYERS)
    model.set_attn_implementation("sdpa")
    receiver, context = ds.Receiver(model), captured(model)
    expected = ds.partial_prefill(receiver, context, plan)
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: True)
    attends = torch.nn.functional.scaled_dot_product_attention
    masked: list[bool] = []

    def seen(*args: Any, **kwargs: Any) -> torch.Tensor:
        masked.append(kwargs["attn_mask"] is not None)
        return attends(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    assert_same(ds.partial_prefill(receiver, context, plan), expected)
    if family == "llama":
        assert not any(masked)
